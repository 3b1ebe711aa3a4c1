"""Frames, and what is to be hashed of them: known because they are made here."""
import socket
import struct
import sys

V4, TCP4, UDP4, V6, TCP6, UDP6 = range(6)
ALL = 0x3F
NOTHING = (0, 0)
TCP, UDP = 6, 17


class Frame:
    """A frame, and its flow: version (0 if it is none), protocol if it has ports, addresses, ports."""

    def __init__(self, name, body, version=0, proto=0, addresses=b"", ports=b"", tags=b""):
        self.name = name
        kind = {4: 0x0800, 6: 0x86DD}.get(version, 0x0806)
        self.data = b"\x52\x54\x00\x00\x00\x01\x52\x54\x00\x00\x00\x02" + tags + struct.pack("!H", kind) + body
        self.version, self.proto, self.addresses, self.ports = version, proto, addresses, ports

    def report(self, key, types):
        """(type of the report, value) by the specification."""
        if not self.addresses:
            return NOTHING
        base = V4 if self.version == 4 else V6
        if self.proto:
            bit = base + (1 if self.proto == TCP else 2)
            if types >> bit & 1:
                return bit + 1, toeplitz(key, self.addresses + self.ports)
        if types >> base & 1:
            return base + 1, toeplitz(key, self.addresses)
        return NOTHING


def toeplitz(key, data):
    """Of the key's bits as one number, 32 from each bit of the data that is set."""
    bits = len(key) * 8
    number, value = int.from_bytes(key, "big"), 0
    for at in range(len(data) * 8):
        if data[at // 8] >> (7 - at % 8) & 1:
            value ^= number >> (bits - 32 - at) & 0xFFFFFFFF
    return value


A4, B4 = socket.inet_aton("66.9.149.187"), socket.inet_aton("161.142.100.80")
A6 = socket.inet_pton(socket.AF_INET6, "3ffe:2501:200:1fff::7")
B6 = socket.inet_pton(socket.AF_INET6, "3ffe:2501:200:3::1")
PORTS = struct.pack("!HH", 2794, 1766)
PAYLOAD = PORTS + bytes(range(40))


def v4(proto, payload=PAYLOAD, options=b"", fragment=0, total=None, ihl=None):
    length = 20 + len(options)
    total = length + len(payload) if total is None else total
    first = 0x40 | (length // 4 if ihl is None else ihl)
    header = struct.pack("!BBHHHBBH", first, 0, total, 7, fragment, 64, proto, 0)
    return header + A4 + B4 + options + payload


def v6(proto, payload=PAYLOAD, length=None):
    length = len(payload) if length is None else length
    return struct.pack("!IHBB", 6 << 28, length, proto, 64) + A6 + B6 + payload


def tag(*kinds):
    return b"".join(struct.pack("!HH", kind, 100 + at) for at, kind in enumerate(kinds))


def flow(name, body, proto=0, tags=b""):
    """A frame whose addresses are hashed, and its ports if `proto` is TCP or UDP."""
    version = body[0] >> 4
    addresses = A4 + B4 if version == 4 else A6 + B6
    return Frame(name, body, version, proto, addresses, PORTS if proto else b"", tags)


def none(name, body, version):
    """A frame that looks like IP and is not."""
    return Frame(name, body, version)


ROUTER_ALERT = bytes([TCP, 0, 5, 2, 0, 0, 1, 0])
HOME = bytes([UDP, 2, 1, 2, 0, 0, 0xC9, 16]) + bytes(range(16))

FRAMES = [
    flow("TCPv4", v4(TCP), TCP),
    flow("UDPv4", v4(UDP), UDP),
    flow("ICMP", v4(1)),
    flow("TCPv6", v6(TCP), TCP),
    flow("UDPv6", v6(UDP), UDP),
    flow("ICMPv6", v6(58)),
    flow("VLAN", v4(TCP), TCP, tag(0x8100)),
    flow("QinQ", v6(UDP), UDP, tag(0x88A8, 0x8100)),
    flow("IPv4 options", v4(TCP, options=b"\x01" * 12), TCP),
    flow("first fragment of IPv4", v4(UDP, fragment=0x2000)),
    flow("later fragment of IPv4", v4(UDP, fragment=0x0010)),
    flow("router alert", v6(0, ROUTER_ALERT + PAYLOAD), TCP),
    flow("home address", v6(60, HOME + PAYLOAD), UDP),
    flow("fragment of IPv6", v6(44, bytes([UDP, 0, 0, 1, 0, 0, 0, 9]) + PAYLOAD)),
    flow("too short for ports", v4(TCP, PAYLOAD[:3])),
    flow("padding is no ports", v4(UDP, bytes(26), total=20)),
    flow("GRE with IPv4 inside", v4(47, struct.pack("!HH", 0, 0x0800) + v4(TCP)[:12] + B4 + A4 + PAYLOAD)),
    flow("IPv4 in IPv4", v4(4, v4(TCP)[:12] + B4 + A4 + PAYLOAD)),
    flow("encrypted", v6(50)),
    flow("mobility header", v6(135, bytes([TCP, 0, 0, 0, 0, 0, 0, 0]) + PAYLOAD), TCP),
    none("cut ports", v4(TCP)[:23], 4),
    none("cut ports of IPv6", v6(UDP)[:41], 6),
    none("total of nothing", v4(TCP, total=0), 4),
    none("short IHL", v4(TCP, ihl=4), 4),
    none("total shorter than the header", v4(TCP, total=19), 4),
    none("cut IPv4 header", v4(TCP)[:19], 4),
    none("IPv6 version in IPv4", b"\x65" + v4(TCP)[1:], 4),
    none("cut IPv6 header", v6(TCP)[:39], 6),
    none("extension header beyond the end", v6(60, bytes([TCP, 9]) + PAYLOAD), 6),
    none("option beyond its header", v6(60, bytes([TCP, 0, 1, 9, 0, 0, 0, 0]) + PAYLOAD), 6),
    none("ARP", bytes(28), 0),
    none("nothing behind Ethernet", b"", 0),
]


def named(name):
    return next(frame for frame in FRAMES if frame.name == name)


if __name__ == "__main__":
    sys.exit("run scripts/lab.d/check_tun")
