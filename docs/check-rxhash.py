#!/usr/bin/env python3
"""Compares the receive hash of TCP and UDP packets with one computed here.

usage: check-rxhash.py INTERFACE KEY [COUNT]

KEY is the hash key as `ethtool -x INTERFACE` shows it: 40 bytes with colons. Run as root in the guest.
See hash-report.md.
"""
import mmap
import select
import socket
import struct
import sys

# linux/socket.h; uapi linux/if_packet.h and linux/if_ether.h
SOL_PACKET = 263
PACKET_RX_RING, PACKET_VERSION, TPACKET_V3 = 5, 10, 2
TP_FT_REQ_FILL_RXHASH, TP_STATUS_USER, TP_STATUS_KERNEL = 1, 1, 0
ETH_P_ALL = 3
BLOCK, BLOCKS, RETIRE_MS = 1 << 16, 16, 10


def toeplitz(key, data):
    """The XOR, over each bit that is set, of the 32 bits of the key from there on."""
    key, bits, total = int.from_bytes(key, "big"), len(key) * 8, 0
    for i in range(len(data) * 8):
        if data[i // 8] >> (7 - i % 8) & 1:
            total ^= key >> (bits - 32 - i) & 0xFFFFFFFF
    return total


def hash_input(frame):
    """Addresses and ports of plain TCP and UDP; None for all else."""
    kind, packet = frame[12:14], frame[14:]
    if kind == b"\x08\x00" and len(packet) >= 20:
        fragment = struct.unpack("!H", packet[6:8])[0] & 0x3FFF
        next_header, addresses, payload = packet[9], packet[12:20], packet[(packet[0] & 15) * 4 :]
    elif kind == b"\x86\xdd" and len(packet) >= 40:
        fragment, next_header, addresses, payload = 0, packet[6], packet[8:40], packet[40:]
    else:
        return None
    if fragment or next_header not in (6, 17) or len(payload) < 4:
        return None
    return addresses + payload[:4]


def packets(interface):
    """Each received packet, and its hash as the kernel has it."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_VERSION, TPACKET_V3)
    # struct tpacket_req3
    frames = BLOCK * BLOCKS // 2048
    ring = struct.pack("7I", BLOCK, BLOCKS, 2048, frames, RETIRE_MS, 0, TP_FT_REQ_FILL_RXHASH)
    sock.setsockopt(SOL_PACKET, PACKET_RX_RING, ring)
    memory = mmap.mmap(sock.fileno(), BLOCK * BLOCKS, mmap.MAP_SHARED)
    sock.bind((interface, ETH_P_ALL))
    block = 0
    while True:
        base = block * BLOCK
        # struct tpacket_block_desc: version, offset, status, packets, offset of the first
        status, count, at = struct.unpack_from("3I", memory, base + 8)
        if not status & TP_STATUS_USER:
            select.select([sock], [], [])
            continue
        at += base
        for _ in range(count):
            # struct tpacket3_hdr: next, sec, nsec, snaplen, len, status, mac, net, then hv1.tp_rxhash
            following, length, mac, rxhash = struct.unpack_from("I8xI8xH2xI", memory, at)
            # struct sockaddr_ll behind it, aligned to 16: its sll_pkttype is at 10
            if memory[at + 48 + 10] != socket.PACKET_OUTGOING:
                yield memory[at + mac : at + mac + length], rxhash
            at += following
        struct.pack_into("I", memory, base + 8, TP_STATUS_KERNEL)
        block = (block + 1) % BLOCKS


def main():
    # The first vector of Microsoft's "Verifying the RSS hash calculation".
    known = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
    assert toeplitz(known, bytes([66, 9, 149, 187, 161, 142, 100, 80, 0x0A, 0xEA, 0x06, 0xE6])) == 0x51CCC178
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    key = bytes.fromhex(sys.argv[2].strip().replace(":", ""))
    left = int(sys.argv[3]) if len(sys.argv) == 4 else 20
    wrong = 0
    for frame, found in packets(sys.argv[1]):
        data = hash_input(frame)
        if data is None:
            continue
        right = toeplitz(key, data)
        wrong += found != right
        print(f"{data.hex()}  reported {found:08x}  computed {right:08x}  {'ok' if found == right else 'DIFFERS'}", flush=True)
        left -= 1
        if left == 0:
            break
    sys.exit(1 if wrong else 0)


main()
