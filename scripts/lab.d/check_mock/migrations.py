"""Migration: states, streams, what arrives."""
import errno
import os
import time

import uapi
from bench import IOVA, SIZE
from mock import CHUNK_HEADER, BLOCK, PAGE, chunks, last_stamps, read_stream, record, write_stream

FLAGS = (1, 3, 5, 7)


def save(dev, flags, bench):
    """The whole stream of a device, by PRE_COPY where it has that."""
    head = b""
    if flags & 4:
        fd = dev.set_state(uapi.PRE_COPY)
        initial, dirty = uapi.precopy_info(fd)
        head, end = read_stream(fd)
        bench.equal((len(head), dirty, end), (initial, 0, errno.ENOMSG), "what comes in precopy")
        bench.equal(uapi.precopy_info(fd), (0, 0), "what is left of it")
        bench.equal(dev.set_state(uapi.STOP_COPY), -1, "data fd of the same session")
    else:
        fd = dev.set_state(uapi.STOP_COPY)
    size = dev.data_size()
    tail, end = read_stream(fd)
    bench.equal((len(tail), end), (size, None), "what comes in stop-copy")
    dev.set_state(uapi.STOP)
    bench.equal(uapi.outcome(os.read, fd, 1), "ENODEV", "a read after the end")
    os.close(fd)
    return head + tail


def load(dev, stream):
    """How loading ends: errno of a write, name of the error of the arc, or (None, None)."""
    fd = dev.set_state(uapi.RESUMING)
    wrote = write_stream(fd, stream)
    arc = uapi.outcome(dev.set_state, uapi.STOP)
    os.close(fd)
    return wrote and uapi.name_of(wrote), arc


def check_flags(bench):
    for flags in FLAGS:
        bench.set(0, migration_flags=flags)
        dev = bench.device(0)
        bench.equal(dev.migration_flags(), flags, "migration flags")
        bench.close()
    bench.set(0, migration_flags=0)
    dev = bench.device(0)
    bench.equal(uapi.outcome(dev.migration_flags), "ENOTTY", "flags of a device that does not migrate")
    bench.equal(uapi.outcome(dev.state), "ENOTTY", "its state")


def check_states(bench):
    """Every state that the flags allow is reached from every other, but for those that may not be."""
    final = {uapi.STOP, uapi.RUNNING, uapi.STOP_COPY, uapi.RESUMING, uapi.RUNNING_P2P, uapi.PRE_COPY, uapi.PRE_COPY_P2P}
    for flags in FLAGS:
        bench.set(0, migration_flags=flags)
        dev = bench.device(0)
        states = set(final)
        if not flags & 2:
            states -= {uapi.RUNNING_P2P, uapi.PRE_COPY_P2P}
        if not flags & 4:
            states -= {uapi.PRE_COPY, uapi.PRE_COPY_P2P}
        for start in states:
            for end in states:
                dev.reset()
                walk(bench, dev, start, end, flags)
        for state in final - states | {uapi.ERROR, 99}:
            bench.equal(uapi.outcome(dev.set_state, state), "EINVAL", f"state {state} with flags {flags}")
        bench.close()


def walk(bench, dev, start, end, flags):
    fds = [dev.set_state(start)]
    blocked = start == uapi.STOP_COPY and end in (uapi.PRE_COPY, uapi.PRE_COPY_P2P)
    # What was not written cannot be loaded, so that a way out of RESUMING fails.
    unloaded = start == uapi.RESUMING and end != uapi.RESUMING
    want = "EINVAL" if blocked else "ENODATA" if unloaded else None
    try:
        fds.append(dev.set_state(end))
        have = None
    except uapi.Failed as error:
        have = str(error)
    bench.equal(have, want, f"way from {start} to {end} with flags {flags}")
    if have is None:
        bench.equal(dev.state(), end, "the state that was asked for")
    for fd in fds:
        if fd >= 0:
            os.close(fd)


def check_migration(bench):
    """Registers, engine and mailbox go on at the other device; memory is what the engine wrote."""
    for flags in FLAGS:
        for size in (0, 1, BLOCK, 1 << 20, (3 << 20) + 5):
            for index in (0, 1):
                bench.set(index, migration_flags=flags, state_bytes=size)
            src, dst = bench.device(0), bench.device(1)
            src.set(scratch=0xC0FFEE)
            src.write(2, 100, b"in the mailbox")
            src.start_engine([(IOVA, 64)], rate=5000, record=64, step=5)
            src.wait_stamp(100)
            stream = save(src, flags, bench)
            stamp = src.get("stamp")
            bench.equal(src.ring(IOVA, 4, 1), 16, "status of a doorbell of a stopped device (EBUSY)")
            dst.memory.map[: 64 * PAGE] = src.memory.map[: 64 * PAGE]
            bench.equal(load(dst, stream), (None, None), f"loading {size} bytes, flags {flags}")
            bench.equal((dst.get("stamp"), dst.get("scratch"), dst.get("instance")), (stamp, 0xC0FFEE, 1), "registers")
            bench.equal(dst.read(2, 100, 14), b"in the mailbox", "mailbox")
            dst.set_state(uapi.RUNNING)
            bench.expect(dst.wait_stamp(stamp + 10), "the engine goes on")
            dst.set(engine=0)
            wrong = [
                page for page, last in enumerate(last_stamps(dst.get("stamp"), 64, 5))
                if dst.memory.map[page * PAGE : page * PAGE + 64] != record(last, 0x1122334455667788, 64)
            ]
            bench.equal(wrong, [], "pages that are wrong")
            bench.close()


def check_abort(bench):
    """A migration that is given up leaves the source running, and it can be tried again."""
    dev = bench.device(0)
    dev.start_engine([(IOVA, 64)], rate=5000)
    for state in (uapi.PRE_COPY, uapi.STOP_COPY):
        fd = dev.set_state(state)
        os.read(fd, 4096)
        dev.set_state(uapi.RUNNING)
        bench.equal(uapi.outcome(os.read, fd, 1), "ENODEV", "a read after an abort")
        os.close(fd)
        bench.expect(dev.wait_stamp(dev.get("stamp") + 10), "the engine goes on after an abort")
    save(dev, 7, bench)


def check_stopped(bench):
    """No DMA once the device is asked to stop."""
    for state in (uapi.STOP, uapi.STOP_COPY, uapi.RUNNING_P2P):
        dev = bench.device(0)
        dev.log_start([(IOVA, SIZE)])
        dev.start_engine([(IOVA, 64)], rate=5000)
        dev.wait_stamp(50)
        fd = dev.set_state(state)
        stamp = dev.get("stamp")
        dev.report(IOVA, SIZE)
        time.sleep(0.1)
        bench.equal((dev.get("stamp"), dev.report(IOVA, SIZE)), (stamp, []), f"DMA in state {state}")
        if fd >= 0:
            os.close(fd)
        bench.close()
    bench.set(0, p2p_ram_dma=1)
    dev = bench.device(0)
    dev.start_engine([(IOVA, 64)], rate=5000)
    dev.wait_stamp(50)
    dev.set_state(uapi.RUNNING_P2P)
    bench.expect(dev.wait_stamp(dev.get("stamp") + 10), "with p2p_ram_dma memory is written in RUNNING_P2P")


def check_precopy_share(bench):
    """precopy_percent, and state that changes while the device runs."""
    for index in (0, 1):
        bench.set(index, state_bytes=2 << 20, precopy_percent=50)
    src, dst = bench.device(0), bench.device(1)
    fd = src.set_state(uapi.PRE_COPY)
    head, _ = read_stream(fd)
    bench.equal([c[1] for c in chunks(head)], [1] + [2] * 16, "chunks in precopy")
    bench.set(0, precopy_dirty_rate=1 << 20)
    time.sleep(0.5)
    initial, dirty = uapi.precopy_info(fd)
    bench.equal(initial, 0, "initial bytes")
    bench.expect(dirty >= 4 * (BLOCK + CHUNK_HEADER), f"dirty bytes after half a second ({dirty})")
    again, _ = read_stream(fd)
    bench.expect(len(again) >= dirty, "they can be read")
    src.set_state(uapi.STOP_COPY)
    tail, _ = read_stream(fd)
    os.close(fd)
    bench.equal(load(dst, head + again + tail), (None, None), "loading")
    stale = head + b"".join(
        again[at : at + CHUNK_HEADER + size] for at, _, _, size in chunks(again)[1:]) + tail
    dst.reset()
    bench.equal(load(dst, stale)[1], "EBADMSG", "loading with one block not sent again")


def check_rates(bench):
    """A device that saves and loads 8 MiB a second."""
    for index in (0, 1):
        bench.set(index, state_bytes=4 << 20, save_rate=8 << 20, load_rate=8 << 20)
    src, dst = bench.device(0), bench.device(1)
    began = time.monotonic()
    fd = src.set_state(uapi.STOP_COPY)
    os.read(fd, 1 << 20)
    os.set_blocking(fd, False)
    for _ in range(100):
        late = uapi.outcome(os.read, fd, 1 << 20)
        if late:
            break
    bench.equal(late, "EAGAIN", "a read that does not wait, too early")
    src.reset()
    os.close(fd)
    began = time.monotonic()
    stream = save(src, 1, bench)
    saved = time.monotonic() - began
    began = time.monotonic()
    bench.equal(load(dst, stream), (None, None), "loading")
    loaded = time.monotonic() - began
    bench.expect(0.4 < saved < 2, f"saving 4 MiB takes half a second ({saved:.2f})")
    bench.expect(0.4 < loaded < 2, f"loading 4 MiB takes half a second ({loaded:.2f})")


def check_large_state(bench):
    """64 MiB, from device to device without a copy in between."""
    for index in (0, 1):
        bench.set(index, state_bytes=64 << 20)
    src, dst = bench.device(0), bench.device(1)
    out, into = src.set_state(uapi.STOP_COPY), dst.set_state(uapi.RESUMING)
    want, total, failed = src.data_size(), 0, None
    began = time.monotonic()
    while failed is None:
        part = os.read(out, 1 << 20)
        if not part:
            break
        total += len(part)
        failed = write_stream(into, part)
    bench.equal((total, failed), (want, None), "bytes that were moved")
    bench.equal(uapi.outcome(dst.set_state, uapi.RUNNING), None, "running from them")
    print(f"  64 MiB of state in {time.monotonic() - began:.1f} s", flush=True)
    os.close(out)
    os.close(into)
