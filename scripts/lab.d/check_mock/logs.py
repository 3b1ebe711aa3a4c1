"""The DMA log: what was written is reported, exactly, by the kernel's own iova_bitmap."""
import time

import uapi
from bench import IOVA, SIZE
from mock import PAGE


def check_log_offered(bench):
    dev = bench.device(0)
    for feature in (uapi.LOG_START, uapi.LOG_STOP, uapi.LOG_REPORT):
        bench.equal(uapi.outcome(dev.feature, uapi.PROBE | feature), None, f"probe of feature {feature}")
    bench.close()
    bench.set(0, dirty_log=0)
    dev = bench.device(0)
    bench.equal(uapi.outcome(dev.feature, uapi.PROBE | uapi.LOG_START), "ENOTTY", "probe without a log")


def check_log_exact(bench):
    dev = bench.device(0)
    bench.equal(uapi.outcome(dev.report, IOVA, SIZE), "EINVAL", "a report before the start")
    bench.equal(dev.log_start([(IOVA, SIZE // 2), (IOVA + SIZE // 2, SIZE // 2)]), PAGE, "page size")
    dev.ring(IOVA + 5 * PAGE + 8, 4, 1)
    dev.ring(IOVA + 10 * PAGE - 2, 4, 1)
    dev.ring(IOVA + 100 * PAGE, 3 * PAGE, 1)
    dev.ring(IOVA + SIZE - PAGE, PAGE, 1)
    bench.equal(dev.report(IOVA, SIZE), [5, 9, 10, 100, 101, 102, SIZE // PAGE - 1], "pages of a report")
    bench.equal(dev.report(IOVA, SIZE), [], "pages of the next report")
    dev.ring(IOVA + 700 * PAGE, 4, 1)
    bench.equal(dev.report(IOVA, SIZE, 2 << 20), [1], "pages of 2 MiB")
    dev.ring(IOVA + 7 * PAGE, 4, 1)
    bench.equal(dev.report(IOVA + 6 * PAGE, 8 * PAGE), [1], "pages of a window that begins later")
    bench.equal(uapi.outcome(dev.log_start, [(IOVA, SIZE)]), "EINVAL", "a second start")
    dev.log_stop()
    bench.equal(uapi.outcome(dev.report, IOVA, SIZE), "EINVAL", "a report after the stop")
    dev.log_start([(IOVA, SIZE)])
    bench.equal(dev.report(IOVA, SIZE), [], "a log that was started anew")


def check_log_arguments(bench):
    dev = bench.device(0)
    bench.equal(uapi.outcome(dev.log_start, [(IOVA, SIZE)], 3000), "EINVAL", "a page size of 3000")
    bench.equal(uapi.outcome(dev.log_start, [(IOVA + 1, PAGE)]), "EINVAL", "a range that is not aligned")
    bench.equal(uapi.outcome(dev.log_start, [(IOVA, PAGE)] * 2), "EINVAL", "ranges that overlap")
    many = [(IOVA + 2 * i * PAGE, PAGE) for i in range(257)]
    bench.equal(uapi.outcome(dev.log_start, many), "E2BIG", "257 ranges")
    bench.equal(uapi.outcome(dev.log_start, many[:256]), None, "256 ranges")


def check_log_ranges(bench):
    """Only what is in the ranges is reported; too many are merged or refused."""
    dev = bench.device(0)
    ranges = [(IOVA, 4 * PAGE), (IOVA + 8 * PAGE, 4 * PAGE), (IOVA + 1000 * PAGE, 4 * PAGE)]
    dev.log_start(ranges)
    for page in (0, 5, 9, 500, 1001):
        dev.ring(IOVA + page * PAGE, 4, 1)
    bench.equal(dev.report(IOVA, SIZE), [0, 9, 1001], "pages with three ranges")
    dev.log_stop()
    bench.set(0, log_ranges=2)
    dev.log_start(ranges)
    for page in (0, 5, 9, 500, 1001):
        dev.ring(IOVA + page * PAGE, 4, 1)
    bench.equal(dev.report(IOVA, SIZE), [0, 5, 9, 1001], "pages with the two nearest ranges merged")
    dev.log_stop()
    bench.set(0, log_ranges_refused=1)
    bench.equal(uapi.outcome(dev.log_start, ranges), "EOPNOTSUPP", "too many ranges")
    bench.equal(uapi.outcome(dev.log_start, ranges[:2]), None, "as many as it takes")
    dev.log_stop()
    bench.set(0, log_bytes=8 * PAGE)
    bench.equal(uapi.outcome(dev.log_start, [(IOVA, 9 * PAGE)]), "EOPNOTSUPP", "more memory than it can follow")


def check_log_page_sizes(bench):
    """The device's own page size, and reports of other sizes and places."""
    bench.set(0, log_page_min=65536)
    dev = bench.device(0)
    bench.equal(dev.log_start([(IOVA, SIZE)]), 65536, "page size of a device of 64 KiB")
    dev.ring(IOVA + 5 * PAGE, 4, 1)
    bench.equal(dev.report(IOVA, SIZE), list(range(16)), "a page of 64 KiB in pages of 4 KiB")
    bench.equal(dev.report(IOVA, SIZE), [], "the next report")
    dev.ring(IOVA + 16 * PAGE, 4, 1)
    # A window that has half of the page: the other half must not be forgotten.
    bench.equal(dev.report(IOVA, 24 * PAGE), list(range(16, 24)), "the first half of a page")
    bench.equal(dev.report(IOVA, 32 * PAGE), list(range(16, 32)), "both halves later")
    dev.log_stop()
    bench.set(0, log_page_min=4096, log_page_max=8192)
    bench.equal(dev.log_start([(IOVA, SIZE)], 2 << 20), 8192, "page size of a device of at most 8 KiB")


def check_log_engine(bench):
    """Reports while the engine writes: together they have every page that was written."""
    dev = bench.device(0)
    dev.log_start([(IOVA, SIZE)])
    dev.start_engine([(IOVA + 50 * PAGE, 64)], rate=5000, step=7)
    seen = set()
    for _ in range(20):
        seen.update(dev.report(IOVA, SIZE))
        time.sleep(0.01)
    dev.set_state(uapi.STOP)
    seen.update(dev.report(IOVA, SIZE))
    want = {50 + (s - 1) * 7 % 64 for s in range(1, dev.get("stamp") + 1)}
    bench.expect(dev.get("stamp") > 64, "the engine got around")
    bench.equal(seen, want, "pages of all reports")
    bench.equal(dev.report(IOVA, SIZE), [], "a report of a stopped device")


def check_log_survives_reset(bench):
    dev = bench.device(0)
    dev.log_start([(IOVA, SIZE)])
    dev.ring(IOVA + 3 * PAGE, 4, 1)
    dev.reset()
    dev.ring(IOVA + 4 * PAGE, 4, 1)
    bench.equal(dev.report(IOVA, SIZE), [3, 4], "pages before and after a reset")


def check_lose_log(bench):
    bench.set(0, lose_log=3)
    dev = bench.device(0)
    dev.log_start([(IOVA, SIZE)])
    for page in range(6):
        dev.ring(IOVA + page * PAGE, 4, 1)
    bench.equal(dev.report(IOVA, SIZE), [0, 1, 3, 4], "pages with each third lost")
    bench.equal(dev.number("stats/lost"), 2, "how many were lost")


def check_fail_report(bench):
    """A report that fails has forgotten what it had to say."""
    bench.set(0, fail_report=1, fail_report_skip=1)
    dev = bench.device(0)
    dev.log_start([(IOVA, SIZE)])
    dev.ring(IOVA, 4, 1)
    bench.equal(dev.report(IOVA, SIZE), [0], "the report that is skipped")
    dev.ring(IOVA + PAGE, 4, 1)
    bench.equal(uapi.outcome(dev.report, IOVA, SIZE), "EIO", "the one that is to fail")
    bench.equal(dev.report(IOVA, SIZE), [], "the one after it")


def check_fail_log_start(bench):
    bench.set(0, fail_log_start=1)
    dev = bench.device(0)
    bench.equal(uapi.outcome(dev.log_start, [(IOVA, SIZE)]), "EIO", "a start that is to fail")
    bench.equal(uapi.outcome(dev.log_start, [(IOVA, SIZE)]), None, "the next one")


def check_container_bitmap(bench):
    """The type1 container knows exactly what this device wrote, too."""
    if bench.kind != "group":
        return
    dev = bench.device(0)
    uapi.container_dirty_start(dev.space)
    uapi.container_dirty(dev.space, IOVA, SIZE)
    dev.ring(IOVA + 2000 * PAGE, 4, 9)
    bench.equal(uapi.container_dirty(dev.space, IOVA, SIZE), [2000], "pages of the container's bitmap")
