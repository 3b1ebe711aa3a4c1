"""The mock device's registers (scripts/lab.d/modules/mock/registers.h) and migration stream."""
import os
import struct
import time

import uapi

REGISTERS = {
    "magic": (0x00, 4), "version": (0x04, 4), "instance": (0x08, 4),
    "dma_addr": (0x10, 8), "dma_bytes": (0x18, 4), "dma_pattern": (0x1C, 4),
    "doorbell": (0x20, 4), "doorbells": (0x24, 4), "status": (0x28, 4), "failures": (0x2C, 4),
    "stamp": (0x30, 8), "pattern": (0x38, 8),
    "engine": (0x40, 4), "rate": (0x44, 4), "bytes": (0x48, 4), "step": (0x4C, 4),
    "segment": (0x50, 4), "segment_pages": (0x54, 4), "segment_addr": (0x58, 8),
    "pages": (0x60, 8),
    "peer_addr": (0x70, 8), "peer_stamp": (0x78, 8), "peer_refused": (0x80, 8),
    "scratch": (0x90, 4),
}
MAGIC = 0x44564D46
WORD_STEP = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
PAGE = 4096
CHUNK_HEADER = 24
BLOCK = 65536


class Mock(uapi.Device):
    """A mock device that is open."""

    def get(self, name):
        at, size = REGISTERS[name]
        return int.from_bytes(self.read(0, at, size), "little")

    def set(self, **values):
        for name, value in values.items():
            at, size = REGISTERS[name]
            self.write(0, at, value.to_bytes(size, "little"))

    def bus_master(self, on=True):
        self.write(uapi.CONFIG_REGION, 4, struct.pack("<H", 6 if on else 0))

    def ring(self, iova, size, pattern):
        """One DMA write; returns the errno it ended with."""
        self.set(status=0, dma_addr=iova, dma_bytes=size, dma_pattern=pattern, doorbell=1)
        return self.get("status")

    def start_engine(self, segments, rate, record=64, step=1, pattern=0x1122334455667788):
        """`segments`: (IOVA, pages)"""
        self.set(engine=0, stamp=0)
        for index, (iova, pages) in enumerate(segments):
            self.set(segment=index, segment_addr=iova, segment_pages=pages)
        self.set(rate=rate, bytes=record, step=step, pattern=pattern, engine=1)

    def wait_stamp(self, above, seconds=10):
        """Waits until the engine has written more than `above` records."""
        end = time.monotonic() + seconds
        while self.get("stamp") <= above and time.monotonic() < end:
            time.sleep(0.01)
        return self.get("stamp") > above


def record(stamp, pattern, size):
    """What the engine writes."""
    words = [stamp] + [((stamp ^ pattern) + k * WORD_STEP) & MASK for k in range(1, size // 8)]
    return struct.pack(f"<{len(words)}Q", *words)


def last_stamps(stamp, pages, step):
    """For each page the last record that went to it, 0 if none did."""
    last = [0] * pages
    for s in range(max(1, stamp - pages + 1), stamp + 1):
        last[(s - 1) * step % pages] = s
    return last


def read_stream(fd, limit=None, size=1 << 20):
    """Reads to the end of the stream; returns what came and how it ended: None or an errno."""
    parts = []
    total = 0
    while limit is None or total < limit:
        try:
            part = os.read(fd, size)
        except OSError as error:
            return b"".join(parts), error.errno
        if not part:
            break
        parts.append(part)
        total += len(part)
    return b"".join(parts), None


def write_stream(fd, data):
    """Writes all of it; returns the errno that ended it early, or None."""
    at = 0
    view = memoryview(data)
    while at < len(data):
        try:
            at += os.write(fd, view[at : at + (1 << 20)])
        except OSError as error:
            return error.errno
    return None


_P1, _P2, _P3, _P4, _P5 = (
    11400714785074694791, 14029467366897019727, 1609587929392839161, 9650029242287828579, 2870177450012600261)


def _rotate(value, bits):
    return (value << bits | value >> (64 - bits)) & MASK


def _round(lane, word):
    return _rotate((lane + word * _P2) & MASK, 31) * _P1 & MASK


def xxh64(data, seed=0):
    """XXH64, as the stream's hashes are made."""
    whole = len(data) // 32 * 32
    if whole:
        lanes = [(seed + _P1 + _P2) & MASK, (seed + _P2) & MASK, seed, (seed - _P1) & MASK]
        for stripe in struct.iter_unpack("<4Q", data[:whole]):
            lanes = [_round(lane, word) for lane, word in zip(lanes, stripe)]
        value = sum(_rotate(lane, bits) for lane, bits in zip(lanes, (1, 7, 12, 18))) & MASK
        for lane in lanes:
            value = ((value ^ _round(0, lane)) * _P1 + _P4) & MASK
    else:
        value = (seed + _P5) & MASK
    value = (value + len(data)) & MASK
    tail = data[whole:]
    while len(tail) >= 8:
        value = (_rotate(value ^ _round(0, int.from_bytes(tail[:8], "little")), 27) * _P1 + _P4) & MASK
        tail = tail[8:]
    if len(tail) >= 4:
        value = (_rotate(value ^ int.from_bytes(tail[:4], "little") * _P1 & MASK, 23) * _P2 + _P3) & MASK
        tail = tail[4:]
    for byte in tail:
        value = _rotate(value ^ byte * _P5 & MASK, 11) * _P1 & MASK
    value = (value ^ value >> 33) * _P2 & MASK
    value = (value ^ value >> 29) * _P3 & MASK
    return value ^ value >> 32


def forge(stream, chunk, at, value):
    """The stream with `value` at `at` of the body of chunk number `chunk`, and its hash made right."""
    start, _, _, size = chunks(stream)[chunk]
    part = bytearray(stream[start : start + CHUNK_HEADER + size])
    part[CHUNK_HEADER + at : CHUNK_HEADER + at + len(value)] = value
    seed = xxh64(bytes(part[: CHUNK_HEADER - 8]))
    struct.pack_into("<Q", part, CHUNK_HEADER - 8, xxh64(bytes(part[CHUNK_HEADER:]), seed))
    return stream[:start] + bytes(part) + stream[start + len(part) :]


def chunks(stream):
    """(offset, type, index, body length) of each chunk."""
    at = 0
    found = []
    while at < len(stream):
        _, _, kind, size, index, _ = struct.unpack_from("<IHHIIQ", stream, at)
        found.append((at, kind, index, size))
        at += CHUNK_HEADER + size
    return found
