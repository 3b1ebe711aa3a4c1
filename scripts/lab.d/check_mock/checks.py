"""What any PCI device has: configuration space, regions, interrupts; and DMA."""
import os
import select
import struct
import threading
import time

import uapi
from bench import IOVA, SIZE, SYSFS
from mock import MAGIC, PAGE, last_stamps, record


def check_identity(bench):
    dev = bench.device(0)
    config = dev.read(uapi.CONFIG_REGION, 0, 256)
    bench.equal(len(config), 256, "length of configuration space")
    bench.equal(struct.unpack_from("<HH", config), (0x1234, 0xFE77), "identity")
    bench.equal(struct.unpack_from("<HH", config, 0x2C), (0x1234, 1), "subsystem")
    bench.equal(config[0x34], 0x40, "first capability")
    bench.equal(struct.unpack_from("<BBHII", config, 0x40), (0x11, 0, 3, 0x8002, 0xC002), "MSI-X")
    bench.equal(dev.get("magic"), MAGIC, "magic")
    bench.equal(dev.get("instance"), 0, "instance")


def check_bar_sizes(bench):
    dev = bench.device(0)
    dev.write(uapi.CONFIG_REGION, 0x10, b"\xff" * 24)
    bars = struct.unpack("<6I", dev.read(uapi.CONFIG_REGION, 0x10, 24))
    bench.equal(bars, (0xFFFFF000, 0, 0xFFFF000C, 0xFFFFFFFF, 0, 0), "size masks")
    dev.write(uapi.CONFIG_REGION, 0, b"\xff" * 4)
    bench.equal(dev.read(uapi.CONFIG_REGION, 0, 4), b"\x34\x12\x77\xfe", "identity after a write")


def check_regions(bench):
    dev = bench.device(0)
    bench.equal(dev.regions[0][:2], (3, 4096), "BAR 0")
    bench.equal(dev.regions[2][:2], (3 | 4 | 8, 65536), "BAR 2")
    bench.equal(dev.regions[2][3], [(0, 4096)], "what of BAR 2 can be mapped")
    mailbox = dev.map_region(2, 4096)
    mailbox[0:8] = b"mailbox!"
    bench.equal(dev.read(2, 0, 8), b"mailbox!", "BAR 2 is the same mapped and read")
    bench.equal(dev.read(2, 0x8000, 8), bytes(8), "the MSI-X table")
    bench.equal(uapi.outcome(dev.map_region, 2, 8192), "EINVAL", "mapping more than the mailbox")
    bench.equal(uapi.outcome(dev.map_region, 0, 4096), "EINVAL", "mapping registers")
    bench.equal(dev.read(0, 1, 2), b"\xff\xff", "an access that no register has")


def check_interrupts(bench):
    dev = bench.device(0)
    counts = [dev.irq_count(i) for i in range(5)]
    bench.equal(counts, [0, 0, 4, 1, 1], "how many interrupts of each kind")
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    dev.set_irqs(uapi.MSIX, 0, [fds[0], -1, fds[1], -1])
    dev.ring(IOVA, 4, 1)
    dev.ring(IOVA, 4, 1)
    bench.equal(os.eventfd_read(fds[0]), 2, "interrupts of two doorbells")
    bench.equal(uapi.outcome(os.eventfd_read, fds[1]), "EAGAIN", "another vector")
    dev.set_irqs(uapi.MSIX, 0, [])
    dev.ring(IOVA, 4, 1)
    bench.equal(uapi.outcome(os.eventfd_read, fds[0]), "EAGAIN", "a vector that was turned off")
    dev.set_irqs(uapi.ERR_IRQ, 0, [fds[1]])
    dev.attribute("faults/raise_error", 1)
    bench.equal(os.eventfd_read(fds[1]), 1, "the error interrupt")
    for fd in fds:
        os.close(fd)


def check_removal(bench):
    """A device that is unbound while somebody has it asks for itself, and goes when it is closed."""
    dev = bench.device(1)
    event = os.eventfd(0)
    dev.set_irqs(uapi.REQ_IRQ, 0, [event])
    driver = "/sys/bus/platform/drivers/ferry_mock_vfio"

    def unbind():
        with open(f"{driver}/unbind", "w", encoding="ascii") as file:
            file.write("ferry_mock_vfio.1")

    thread = threading.Thread(target=unbind)
    thread.start()
    bench.expect(select.select([event], [], [], 15)[0], "the request arrives")
    bench.drop(dev)
    thread.join(15)
    bench.expect(not thread.is_alive(), "it is gone once it is closed")
    with open(f"{driver}/bind", "w", encoding="ascii") as file:
        file.write("ferry_mock_vfio.1")
    bench.close()
    bench.equal(bench.device(1).get("magic"), MAGIC, "magic after it came back")
    os.close(event)


def check_bus_master(bench):
    dev = bench.device(0)
    dev.bus_master(False)
    bench.equal(dev.ring(IOVA, 4, 1), 16, "status of a doorbell without bus mastering (EBUSY)")
    dev.start_engine([(IOVA, 16)], rate=1000)
    time.sleep(0.1)
    bench.equal(dev.get("stamp"), 0, "records without bus mastering")
    dev.bus_master()
    bench.expect(dev.wait_stamp(10), "the engine starts with bus mastering")
    bench.equal(dev.number("stats/dma_no_master"), 1, "what the device says of it")


def check_doorbell(bench):
    dev = bench.device(0)
    bench.equal(dev.ring(IOVA + 5 * PAGE + 8, 4, 0x11223344), 0, "status")
    bench.equal(dev.memory.map[5 * PAGE : 5 * PAGE + 16], bytes(8) + b"\x44\x33\x22\x11" + bytes(4), "memory")
    # type1 says EINVAL, iommufd ENOENT.
    nowhere = 22 if bench.kind == "group" else 2
    bench.equal(dev.ring(IOVA + SIZE, 4, 1), nowhere, "status of DMA to nowhere")
    bench.equal(dev.ring(IOVA, 0, 1), 22, "status of DMA of no bytes")
    bench.equal(dev.ring(IOVA, (4 << 20) + 1, 1), 22, "status of too much DMA")
    bench.equal(dev.get("failures"), 1, "how many writes failed")
    bench.equal(dev.ring(IOVA + PAGE, 4 << 20, 7), 0, "status of the largest DMA")


def check_engine(bench):
    """Every page holds exactly the last record that went to it, in any order of pages."""
    dev = bench.device(0)
    segments, step, size, pattern = [(IOVA, 32), (IOVA + 100 * PAGE, 32)], 11, 128, 0xFEEDFACE12345678
    dev.start_engine(segments, 20000, size, step, pattern)
    bench.expect(dev.wait_stamp(500), "the engine runs")
    dev.set(engine=0)
    stamp = dev.get("stamp")
    time.sleep(0.05)
    bench.equal(dev.get("stamp"), stamp, "records after it was turned off")
    pages = [iova - IOVA + i * PAGE for iova, count in segments for i in range(count)]
    wrong = 0
    for at, last in zip(pages, last_stamps(stamp, 64, step)):
        want = record(last, pattern, size) + bytes(PAGE - size)
        wrong += dev.memory.map[at : at + PAGE] != want
    bench.equal(wrong, 0, "pages that are not what the stamp says")
    bench.equal(dev.memory.map[32 * PAGE : 100 * PAGE].count(0), 68 * PAGE, "zeros between the segments")


def check_lose_dma(bench):
    bench.set(0, lose_dma=100)
    dev = bench.device(0)
    dev.start_engine([(IOVA, 64)], 20000)
    bench.expect(dev.wait_stamp(200), "the engine runs")
    dev.set(engine=0)
    stamp = dev.get("stamp")
    have = [dev.memory.u64(page * PAGE) for page in range(64)]
    want = [s - 64 if s % 100 == 0 else s for s in last_stamps(stamp, 64, 1)]
    bench.equal(have, want, "records, one of which was not written in every hundred")


def check_engine_registers(bench):
    """What would break the engine cannot be set."""
    dev = bench.device(0)
    dev.set(bytes=12)
    bench.equal(dev.get("bytes"), 8, "a length that is no multiple of 8")
    dev.set(bytes=8192)
    bench.equal(dev.get("bytes"), 8, "a length of more than a page")
    dev.set(segment=1000, segment_pages=5)
    bench.equal(dev.get("pages"), 0, "pages of a segment that there is not")
    dev.set(segment=0, segment_pages=1 << 30)
    bench.equal(dev.get("pages"), 0, "pages of a segment that is too long")
    dev.start_engine([(IOVA, 4)], rate=10)
    dev.set(segment=0, segment_pages=0, bytes=64)
    bench.equal((dev.get("pages"), dev.get("bytes")), (4, 64), "the engine while it is on")


def check_rate(bench):
    dev = bench.device(0)
    dev.start_engine([(IOVA, 64)], rate=2000, record=8)
    dev.wait_stamp(0)
    began, first = time.monotonic(), dev.get("stamp")
    time.sleep(1)
    rate = (dev.get("stamp") - first) / (time.monotonic() - began)
    bench.expect(1400 < rate < 2200, f"2000 records a second ({rate:.0f})")


def check_reset(bench):
    dev = bench.device(0)
    dev.start_engine([(IOVA, 4)], rate=1000)
    dev.wait_stamp(5)
    dev.reset()
    bench.equal((dev.get("stamp"), dev.get("engine"), dev.get("pages")), (0, 0, 0), "after a reset")
    bench.equal(dev.state(), uapi.RUNNING, "state after a reset")
    bench.equal(dev.ring(IOVA, 4, 1), 0, "a doorbell after a reset: bus mastering is kept")
    dev.attribute("faults/fail_reset", 1)
    bench.equal(uapi.outcome(dev.reset), "EIO", "a reset that is to fail")
    bench.equal(uapi.outcome(dev.reset), None, "the next one")


def check_closed(bench):
    """A device starts anew for each user."""
    dev = bench.device(0)
    dev.start_engine([(IOVA, 4)], rate=1000)
    dev.log_start([(IOVA, SIZE)])
    dev.wait_stamp(5)
    bench.close()
    dev = bench.device(0)
    bench.equal((dev.get("stamp"), dev.get("engine")), (0, 0), "registers of a new user")
    bench.equal(uapi.outcome(dev.report, IOVA, PAGE), "EINVAL", "a report before logging is started")


def check_peer_reached(bench):
    """A writes to B's mailbox where it is mapped; where it is not the writes are refused."""
    space = bench.space()
    a, b = bench.device(0, space), bench.device(1, space)
    mailbox = b.map_region(2, PAGE)
    target = 0x7F0000000
    a.set(peer_addr=target + 16)
    a.start_engine([(IOVA, 4)], rate=1000)
    a.wait_stamp(50)
    bench.expect(a.get("peer_refused") > 0, "writes to a peer that is not mapped are refused")
    bench.equal(a.get("peer_stamp"), 0, "writes that reached a peer that is not mapped")
    bench.map_peer(space, mailbox, target)
    a.set(engine=0)
    refused = a.get("peer_refused")
    a.set(engine=1)
    a.wait_stamp(a.get("stamp") + 50)
    a.set(engine=0)
    bench.equal(a.get("peer_refused"), refused, "refused writes once it is mapped")
    bench.expect(a.get("peer_stamp") > 0, "writes reach the peer")
    bench.equal(struct.unpack("<Q", b.read(2, 16, 8))[0], a.get("peer_stamp"), "the peer's mailbox")


def check_peer_states(bench):
    """In the P2P states no peer is written to; a write that comes too late is noticed."""
    bench.set(0, p2p_ram_dma=1)
    space = bench.space()
    a, b = bench.device(0, space), bench.device(1, space)
    mailbox = b.map_region(2, PAGE)
    bench.map_peer(space, mailbox, 0x7F0000000)
    a.set(peer_addr=0x7F0000000)
    a.start_engine([(IOVA, 4)], rate=1000)
    a.wait_stamp(50)
    # The right order: nobody starts DMA to a peer before anybody stops.
    late = b.number("stats/peer_late")
    a.set_state(uapi.RUNNING_P2P)
    b.set_state(uapi.RUNNING_P2P)
    sent = a.get("peer_stamp")
    bench.expect(a.wait_stamp(a.get("stamp") + 50), "the engine goes on in RUNNING_P2P")
    b.set_state(uapi.STOP)
    a.set_state(uapi.STOP)
    time.sleep(0.1)
    bench.equal(a.get("peer_stamp"), sent, "writes to the peer in RUNNING_P2P")
    bench.equal(b.number("stats/peer_late"), late, "late writes in the right order")
    b.set_state(uapi.RUNNING)
    a.set_state(uapi.RUNNING)
    a.wait_stamp(a.get("stamp") + 50)
    # The wrong order.
    b.set_state(uapi.STOP)
    a.wait_stamp(a.get("stamp") + 50)
    bench.expect(b.number("stats/peer_late") > late, "a write to a stopped device is noticed")


def check_sysfs_refuses(bench):
    path = SYSFS % 0
    for name, value, want in [
        ("config/migration_flags", "2", "EINVAL"), ("config/migration_flags", "8", "ERANGE"),
        ("config/log_page_min", "3000", "EINVAL"), ("config/state_bytes", str(1 << 31), "ERANGE"),
        ("config/dirty_log", "x", "EINVAL"), ("faults/fail_arc", "RUNNING NOWHERE 1 stay", "EINVAL"),
        ("faults/fail_arc", "RUNNING STOP 1 maybe", "EINVAL"), ("faults/fail_arc", "RUNNING", "EINVAL"),
        ("faults/raise_error", "1", "ENOTCONN"),
    ]:
        def write():
            fd = os.open(f"{path}/{name}", os.O_WRONLY)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        bench.equal(uapi.outcome(write), want, f"{name} = {value}")
