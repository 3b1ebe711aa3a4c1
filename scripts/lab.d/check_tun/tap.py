"""Taps by raw ioctls, and packets that the host sends to them."""
import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess

# uapi linux/if_tun.h.
TUNSETIFF = 0x400454CA
TUNSETQUEUE = 0x400454D9
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
TUNSETSTEERINGEBPF = 0x800454E0
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100

# The series, spelled out rather than taken from vnet_hash.h: a wrong number there is to be found.
TUNGETVNETHASHCAP = 0x800854E4
TUNSETVNETHASH = 0x400854E5
REPORT, RSS = 1, 2
TUNGETVNETHASHTYPES = 0x800454E4
TUNSETVNETREPORTINGAUTOMQ = 0x800454E5
TUNSETVNETREPORTINGRSS = 0x800854E6
TUNSETVNETRSS = 0x800854E7

PARAMETERS = "/sys/module/tun/parameters"
HEADER = 20


def parameter(name, value):
    with open(f"{PARAMETERS}/{name}", "w", encoding="ascii") as file:
        # Nothing at all would not be written.
        file.write(f"{value}\n")


def failure(function, *arguments):
    """The name of the error that a call fails with; None if it does not."""
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return None


def unattached():
    return os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)


class Tap:
    """A tap with queues, headers of 20 bytes and nothing of its own to say."""

    def __init__(self, name, queues):
        self.name = name
        self.fds = []
        for _ in range(queues):
            fd = unattached()
            flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
            self.fds.append(fd)
        fcntl.ioctl(self.fds[0], TUNSETVNETHDRSZ, struct.pack("i", HEADER))
        fcntl.ioctl(self.fds[0], TUNSETVNETLE, struct.pack("i", 1))
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "w", encoding="ascii") as file:
            file.write("1")
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.socket.bind((name, 0))

    def close(self):
        self.socket.close()
        for fd in self.fds:
            os.close(fd)

    def set(self, number, argument):
        fcntl.ioctl(self.fds[-1], number, argument)

    def set_5(self, flags, types, table=(), unclassified=0, key=b""):
        argument = struct.pack("=HxxI", flags, types)
        if flags & RSS:
            argument += struct.pack(f"=HH{len(table)}H", len(table) - 1, unclassified, *table) + key
        self.set(TUNSETVNETHASH, argument)

    def set_12(self, number, types, table, unclassified, key):
        argument = struct.pack(f"=IHH{len(table)}H", types, len(table) - 1, unclassified, *table)
        self.set(number, argument + key)

    def automq_12(self, types):
        self.set(TUNSETVNETREPORTINGAUTOMQ, struct.pack("=I", types))

    def reports(self, generation, types, table, unclassified, key):
        """RSS with reports, by the ioctl of a generation."""
        if generation == 5:
            self.set_5(REPORT | RSS, types, table, unclassified, key)
        else:
            self.set_12(TUNSETVNETREPORTINGRSS, types, table, unclassified, key)

    def steer(self, fd):
        self.set(TUNSETSTEERINGEBPF, struct.pack("i", fd))

    def exchange(self, frame):
        """Sends a frame to the tap; (queue, header) that it comes by. Nothing else may come."""
        self.socket.send(frame)
        ready, _, _ = select.select(self.fds, [], [], 5)
        if len(ready) != 1:
            raise RuntimeError(f"{len(ready)} queues have a packet")
        # What the kernel does not write stays.
        buffer = bytearray(b"\xee" * 2048)
        length = os.readv(ready[0], [buffer])
        if bytes(buffer[HEADER:length]) != frame:
            raise RuntimeError(f"another frame: {buffer[HEADER:length].hex()}")
        return self.fds.index(ready[0]), bytes(buffer[:HEADER])


def steering_program():
    """A program that always chooses queue 0."""
    program = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    code, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    attributes = ctypes.create_string_buffer(
        struct.pack("=IIQQ104x", 1, 2, ctypes.addressof(code), ctypes.addressof(licence)))
    libc = ctypes.CDLL(None, use_errno=True)
    # bpf(BPF_PROG_LOAD) of a BPF_PROG_TYPE_SOCKET_FILTER (uapi linux/bpf.h).
    fd = libc.syscall(321, 5, attributes, len(attributes) - 1)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "loading a program")
    return fd
