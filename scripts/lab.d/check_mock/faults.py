"""Streams that must be refused, and faults on demand."""
import errno
import os
import struct
import time

import uapi
from bench import IOVA
from migrations import load, save
from mock import CHUNK_HEADER, REGISTERS, chunks, forge, read_stream, write_stream


def stream_of(bench, dev):
    stream = save(dev, 7, bench)
    dev.set_state(uapi.RUNNING)
    return stream


def check_corrupt_streams(bench):
    """Any bit that flips is noticed, wherever it is."""
    for index in (0, 1):
        bench.set(index, state_bytes=200000)
    src, dst = bench.device(0), bench.device(1)
    stream = stream_of(bench, src)
    places = [at + i for at, _, _, _ in chunks(stream) for i in (0, 4, 6, 8, 12, 16, CHUNK_HEADER)]
    for at in places + [len(stream) - 1]:
        bad = bytearray(stream)
        bad[at] ^= 0x40
        wrote, arc = load(dst, bytes(bad))
        bench.expect(arc is not None, f"a flipped bit at {at} is refused ({wrote}, {arc})")
        bench.equal(dst.state(), uapi.RESUMING, "state after it was refused")
        dst.reset()
    bench.equal(load(dst, stream), (None, None), "the sound stream")


def check_wrong_streams(bench):
    """Sound chunks in a sequence that is not."""
    for index in (0, 1):
        bench.set(index, state_bytes=200000)
    src, dst = bench.device(0), bench.device(1)
    stream = stream_of(bench, src)
    parts = [stream[at : at + CHUNK_HEADER + size] for at, _, _, size in chunks(stream)]
    bench.equal([c[1] for c in chunks(stream)], [1, 2, 2, 2, 2, 3, 4], "the sequence of chunks")
    other = stream_of(bench, src)
    others = [other[at : at + CHUNK_HEADER + size] for at, _, _, size in chunks(other)]
    wrong = {
        "nothing": [],
        "no head": parts[1:],
        "two heads": parts[:1] + parts,
        "a block is missing": parts[:2] + parts[3:],
        "a block is of another migration": parts[:2] + others[2:3] + parts[3:],
        "no registers": parts[:5] + parts[6:],
        "no end": parts[:-1],
        "half an end": parts[:-1] + [parts[-1][:30]],
        "something after the end": parts + parts[1:2],
    }
    for what, sequence in wrong.items():
        wrote, arc = load(dst, b"".join(sequence))
        bench.expect(arc is not None, f"{what} is refused ({wrote}, {arc})")
        dst.reset()
    swapped = parts[:1] + parts[4:0:-1] + parts[5:]
    bench.equal(load(dst, b"".join(swapped)), (None, None), "blocks in another order")


def check_forged_streams(bench):
    """Hashes that are right around registers that would break the engine, and other nonsense."""
    for index in (0, 1):
        bench.set(index, state_bytes=4096)
    src, dst = bench.device(0), bench.device(1)
    src.start_engine([(IOVA, 4)], rate=10)
    stream = stream_of(bench, src)
    bench.equal([c[1] for c in chunks(stream)], [1, 2, 3, 4], "the sequence of chunks")
    u32, u64 = struct.Struct("<I").pack, struct.Struct("<Q").pack
    bench.equal(load(dst, forge(stream, 2, 0x90, u32(7))), (None, None), "a harmless register")
    bench.equal(dst.get("scratch"), 7, "the harmless register")
    wrong = [
        ("a record longer than a page", 2, REGISTERS["bytes"][0], u32(1 << 20)),
        ("a record of 12 bytes", 2, REGISTERS["bytes"][0], u32(12)),
        ("no record", 2, REGISTERS["bytes"][0], u32(0)),
        ("a rate beyond the limit", 2, REGISTERS["rate"][0], u32(1 << 31)),
        ("pages that no segment has", 2, REGISTERS["pages"][0], u64(5)),
        ("no pages though a segment has some", 2, REGISTERS["pages"][0], u64(0)),
        ("a segment that is too long", 2, 0xD0 + 24, u64(1 << 40)),
        ("another kind of device", 2, 0, u32(1)),
        ("another number of blocks", 3, 0, u64(2)),
        ("another sum", 3, 8, u64(2)),
        ("another block size", 0, 8, u32(4096)),
        ("a state of 2^64 bytes", 0, 16, u64((1 << 64) - 1)),
    ]
    for what, chunk, at, value in wrong:
        dst.reset()
        wrote, arc = load(dst, forge(stream, chunk, at, value))
        bench.expect(arc in ("EINVAL", "EBADMSG", "ENOSPC"), f"{what} is refused ({wrote}, {arc})")


def check_other_device(bench):
    bench.set(1, pci_subdevice=2)
    src, dst = bench.device(0), bench.device(1)
    stream = stream_of(bench, src)
    bench.equal(load(dst, stream)[1], "EINVAL", "the state of another kind of device")
    bench.close()
    bench.set(1, pci_subdevice=1, state_bytes=4096)
    src, dst = bench.device(0), bench.device(1)
    bench.equal(load(dst, stream)[1], "ENOSPC", "more state than there is room for")


def check_injected_stream_faults(bench):
    """The source's own faults make streams that the destination refuses."""
    src, dst = bench.device(0), bench.device(1)
    for fault in ({"corrupt_state": 1}, {"cut_state": 5000}):
        bench.set(0, **fault)
        fd = src.set_state(uapi.STOP_COPY)
        stream, _ = read_stream(fd)
        os.close(fd)
        src.set_state(uapi.RUNNING)
        bench.expect(load(dst, stream)[1] is not None, f"{fault} is refused")
        dst.reset()
    bench.set(0, cut_state=0)
    bench.equal(load(dst, stream_of(bench, src)), (None, None), "the stream after the faults")


def check_stateless(bench):
    for index in (0, 1):
        bench.set(index, stateless=1)
    src, dst = bench.device(0), bench.device(1)
    fd = src.set_state(uapi.PRE_COPY)
    bench.equal(read_stream(fd), (b"", errno.ENOMSG), "precopy of a device without state")
    src.set_state(uapi.STOP_COPY)
    bench.equal(read_stream(fd), (b"", None), "its stream")
    bench.equal(src.data_size(), 0, "its size")
    os.close(fd)
    bench.equal(load(dst, b""), (None, None), "loading nothing")


def check_enomsg_and_short(bench):
    bench.set(0, enomsg_run=3, short_io=1000)
    bench.set(1, short_io=777)
    src, dst = bench.device(0), bench.device(1)
    fd = src.set_state(uapi.PRE_COPY)
    outcomes = [uapi.outcome(os.read, fd, 4096) for _ in range(8)]
    bench.equal(outcomes, ["ENOMSG"] * 3 + [None] + ["ENOMSG"] * 3 + [None], "runs of ENOMSG")
    src.set_state(uapi.RUNNING)
    os.close(fd)
    fd = src.set_state(uapi.STOP_COPY)
    first = os.read(fd, 4096)
    bench.expect(len(first) <= 1000, "a short read")
    tail, _ = read_stream(fd)
    os.close(fd)
    fd = dst.set_state(uapi.RESUMING)
    bench.equal(os.write(fd, (first + tail)[:4096]), 777, "a short write")
    bench.equal(write_stream(fd, (first + tail)[777:]), None, "the rest")
    bench.equal(uapi.outcome(dst.set_state, uapi.RUNNING), None, "running from it")
    os.close(fd)


def arcs(dev):
    return [line.split()[2:] for line in dev.attribute("stats/arcs").splitlines()]


def check_failing_arcs(bench):
    dev = bench.device(0)
    dev.start_engine([(IOVA, 4)], rate=1000)
    dev.attribute("faults/fail_arc", "RUNNING PRE_COPY 2 stay")
    for _ in range(2):
        bench.equal(uapi.outcome(dev.set_state, uapi.PRE_COPY), "EIO", "an arc that is to fail")
        bench.equal(dev.state(), uapi.RUNNING, "the state after it")
    fd = dev.set_state(uapi.PRE_COPY)
    bench.equal(arcs(dev)[-3:], [["RUNNING", "PRE_COPY", "-5"]] * 2 + [["RUNNING", "PRE_COPY", "0"]], "arcs")
    # In the middle of a way: the first arc is done, the second is not.
    dev.attribute("faults/fail_arc", "* STOP_COPY 1 stay")
    bench.equal(uapi.outcome(dev.set_state, uapi.STOP_COPY), "EIO", "a way whose second arc fails")
    bench.equal(dev.state(), uapi.PRE_COPY_P2P, "the state in the middle")
    dev.attribute("faults/fail_arc", "* * 1 error")
    bench.equal(uapi.outcome(dev.set_state, uapi.RUNNING), "EIO", "an arc that ends in ERROR")
    bench.equal(dev.state(), uapi.ERROR, "the state after it")
    bench.equal(uapi.outcome(os.read, fd, 1), "ENODEV", "its data")
    bench.equal(uapi.outcome(dev.set_state, uapi.RUNNING), "EINVAL", "leaving ERROR without a reset")
    os.close(fd)
    dev.reset()
    bench.equal(dev.state(), uapi.RUNNING, "the state after a reset")


def check_break(bench):
    """The device breaks down by itself, and while its state is read."""
    dev = bench.device(0)
    fd = dev.set_state(uapi.PRE_COPY)
    dev.attribute("faults/break_now", 1)
    bench.equal(dev.state(), uapi.ERROR, "the state")
    bench.equal(uapi.outcome(os.read, fd, 1), "ENODEV", "its data")
    bench.equal(dev.ring(IOVA, 4, 1), 16, "status of a doorbell (EBUSY)")
    os.close(fd)
    dev.reset()
    bench.equal(dev.ring(IOVA, 4, 1), 0, "status of a doorbell after a reset")


def check_slow_arcs(bench):
    bench.set(0, arc_delay_ms=200)
    dev = bench.device(0)
    began = time.monotonic()
    dev.set_state(uapi.STOP)
    bench.expect(0.35 < time.monotonic() - began < 3, "two arcs of 200 ms each")


def check_arc_order(bench):
    """Arcs of all devices have one numbering."""
    space = bench.space()
    a, b = bench.device(0, space), bench.device(1, space)
    for dev, state in ((a, uapi.RUNNING_P2P), (b, uapi.RUNNING_P2P), (a, uapi.STOP), (b, uapi.STOP)):
        dev.set_state(state)
    numbers = [
        (int(line.split()[0]), name) for name, dev in (("a", a), ("b", b))
        for line in dev.attribute("stats/arcs").splitlines()[-2:]
    ]
    bench.equal([name for _, name in sorted(numbers)], ["a", "b", "a", "b"], "the order of arcs")


def check_close_in_the_middle(bench):
    """A user that goes away while data moves leaves nothing behind."""
    for state in (uapi.PRE_COPY, uapi.STOP_COPY, uapi.RESUMING):
        dev = bench.device(0)
        dev.log_start([(IOVA, 1 << 20)])
        dev.start_engine([(IOVA, 64)], rate=5000)
        fd = dev.set_state(state)
        bench.close()
        call = (os.write, fd, b"x") if state == uapi.RESUMING else (os.read, fd, 1)
        bench.equal(uapi.outcome(*call), "ENODEV", f"data of a device that was closed in state {state}")
        os.close(fd)
    bench.equal(bench.device(0).state(), uapi.RUNNING, "the state for the next user")
