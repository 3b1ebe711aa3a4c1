#!/usr/bin/env python3
"""Checks the lab's tun with hash reports by raw ioctls, so that the fixture is known to be right, and its
defects to be wrong, before anything is tested with it.

usage: scripts/lab run -- python3 scripts/lab.d/check_tun [PART-OF-A-CHECK'S-NAME...]

A line per expectation that does not hold; then `N passed, N failed, 0 skipped`."""
import fcntl
import os
import random
import struct
import subprocess
import sys
import traceback

import tap
from packets import ALL, FRAMES, NOTHING, PORTS, A4, A6, B4, B6, V4, named, toeplitz
from tap import Tap, failure, parameter

KEY = random.Random(5).randbytes(40)
misses = 0


def expect(truth, what, depth=1):
    global misses
    if truth:
        return
    misses += 1
    if misses <= 10:
        frame = sys._getframe(depth)
        print(f"  line {frame.f_lineno} of {frame.f_code.co_name}: NOT {what}", flush=True)


def equal(have, want, what):
    expect(have == want, f"{what}: {have!r}, but {want!r}", 2)


def table_of(queues):
    return [random.Random(9).randrange(queues) for _ in range(128)]


def seen(header):
    """(type, value) of a header's report."""
    return struct.unpack_from("<IH", header, 12)[::-1]


def check_published_vectors():
    """The checker itself, by Microsoft's vectors."""
    key = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
    for data, want in [(A4 + B4, 0x323E8FC2), (A4 + B4 + PORTS, 0x51CCC178),
                       (A6 + B6, 0x2CC18CD5), (A6 + B6 + PORTS, 0x40207D3D)]:
        equal(toeplitz(key, data), want, data.hex())


def check_probes():
    """What a file that is attached to nothing says tells generations apart."""
    wants = {0: ("EBADFD", "EBADFD", "EBADFD"), 5: (struct.pack("=HxxI", 3, ALL), "EBADFD", "EBADFD"),
             12: ("EBADFD", struct.pack("=I", ALL), "EBADFD")}
    for generation, (cap, types, setting) in wants.items():
        parameter("generation", generation)
        fd = tap.unattached()
        for number, size, want in [(tap.TUNGETVNETHASHCAP, 8, cap), (tap.TUNGETVNETHASHTYPES, 4, types),
                                   (tap.TUNSETVNETHASH, 8, setting), (tap.TUNSETVNETRSS, 8, setting),
                                   (tap.TUNSETVNETREPORTINGRSS, 8, setting),
                                   (tap.TUNSETVNETREPORTINGAUTOMQ, 4, setting)]:
            answer = bytearray(size)
            said = failure(fcntl.ioctl, fd, number, answer) or bytes(answer)
            equal(said, want, f"generation {generation}, {number:#x}")
        os.close(fd)
    expect(failure(parameter, "generation", 7) == "EINVAL", "an unknown generation is refused")
    expect(failure(parameter, "defects", "automq,other") == "EINVAL", "an unknown defect is refused")
    parameter("defects", "tunnels,automq")
    with open(f"{tap.PARAMETERS}/defects", encoding="ascii") as file:
        equal(file.read(), "automq,tunnels\n", "defects")


def check_refusals(generation, device):
    table = [0] * 8
    equal(failure(device.reports, generation, ALL, table, 0, KEY), None, "a good setting")
    if generation == 5:
        equal(failure(device.steer, tap.steering_program()), "EBUSY", "a program beside RSS")
        device.set_5(0, 0)
        program = tap.steering_program()
        device.steer(program)
        equal(failure(device.reports, 5, ALL, table, 0, KEY), "EBUSY", "RSS beside a program")
        equal(failure(device.set_5, tap.REPORT, ALL), None, "reports beside a program")
        device.steer(-1)
    else:
        equal(failure(device.reports, 12, 0x40, table, 0, KEY), "EINVAL", "a type that is not supported")
        equal(failure(device.automq_12, 0x40), "EINVAL", "a type that is not supported")
        equal(failure(device.steer, tap.steering_program()), None, "a program beside RSS")
        queue, header = device.exchange(named("TCPv4").data)
        equal((queue, seen(header)), (0, named("TCPv4").report(KEY, ALL)), "with a program")
        device.steer(-1)


def check_off(generation, device):
    """As the stock tap: what is behind the header of 10 bytes stays as it was."""
    for _ in range(2):
        equal(device.exchange(named("TCPv4").data)[1][10:], b"\xee" * 10, "no report")
        device.reports(generation, ALL, [0], 0, KEY)
        expect(seen(device.exchange(named("TCPv4").data)[1])[0], "there is a report")
        if generation == 5:
            device.set_5(0, 0)
        else:
            device.automq_12(0)


def check_reports(generation, device):
    """Each frame's report and queue, with types in many combinations."""
    queues = len(device.fds)
    table = table_of(queues)
    for types in [ALL, 0x38, 0x07, 0x09, 0x36, 0x10, 0]:
        unclassified = types % queues
        device.reports(generation, types, table, unclassified, KEY)
        for frame in FRAMES:
            kind, value = frame.report(KEY, types)
            want = table[value & 127] if kind else unclassified
            queue, header = device.exchange(frame.data)
            about = f"{frame.name}, types {types:#x}, {queues} queues"
            equal((queue, seen(header)), (want, (kind, value)), about)
            equal((header[10:12], header[18:]), (b"\1\0", b"\0\0"), f"the rest of the header, {about}")


def check_rss_alone(generation, device):
    table = table_of(len(device.fds))
    if generation == 5:
        device.set_5(tap.RSS, ALL, table, 0, KEY)
    else:
        device.set_12(tap.TUNSETVNETRSS, ALL, table, 0, KEY)
    for frame in FRAMES:
        kind, value = frame.report(KEY, ALL)
        queue, header = device.exchange(frame.data)
        equal(queue, table[value & 127] if kind else 0, frame.name)
        equal(header[10:], b"\xee" * 10, "no report")


def check_automq(generation, device):
    """Without a key there is no hash; the series makes one up."""
    automq = (lambda: device.set_5(tap.REPORT, ALL)) if generation == 5 else (lambda: device.automq_12(ALL))
    automq()
    for frame in FRAMES:
        equal(seen(device.exchange(frame.data)[1]), NOTHING, frame.name)
    parameter("defects", "automq")
    for frame in FRAMES[:6]:
        queue, header = device.exchange(frame.data)
        equal(seen(header), (frame.report(KEY, ALL)[0], queue), f"{frame.name}, with the defect")


def check_key_defect(generation, device):
    """Without a type of IPv4 the key is not all there."""
    table = table_of(len(device.fds))
    wrong = [frame for frame in FRAMES if frame.version == 6 and frame.addresses]
    for defects, types, are_wrong in [("key", 0x38, True), ("key", 0x39, False), ("", 0x38, False)]:
        parameter("defects", defects)
        device.reports(generation, types, table, 0, KEY)
        for frame in wrong:
            kind, value = seen(device.exchange(frame.data)[1])
            equal(kind, frame.report(KEY, types)[0], frame.name)
            equal(value != frame.report(KEY, types)[1], are_wrong, f"{frame.name} wrong with {defects}, {types:#x}")


def check_single_queue_defect(generation, device):
    alone = len(device.fds) == 1
    device.reports(generation, ALL, [0], 0, KEY)
    parameter("defects", "single_queue")
    frame = named("UDPv6")
    equal(seen(device.exchange(frame.data)[1]), NOTHING if alone else frame.report(KEY, ALL), "with the defect")
    parameter("defects", "")
    equal(seen(device.exchange(frame.data)[1]), frame.report(KEY, ALL), "without")


def check_tunnel_defect(generation, device):
    """The dissector takes the inner addresses, which are the other way round. (Of a packet socket's frame with
    a tag inside it sees nothing.)"""
    device.reports(generation, ALL, [0], 0, KEY)
    parameter("defects", "tunnels")
    inner = (V4 + 2, toeplitz(KEY, B4 + A4 + PORTS))
    for name in ["GRE with IPv4 inside", "IPv4 in IPv4"]:
        equal(seen(device.exchange(named(name).data)[1]), inner, name)
    for name in ["TCPv4", "UDPv6", "first fragment of IPv4", "ARP"]:
        equal(seen(device.exchange(named(name).data)[1]), named(name).report(KEY, ALL), name)


def run(name, function, *arguments):
    """Runs a check; whether it failed."""
    global misses
    misses = 0
    try:
        function(*arguments)
    except Exception:  # pylint: disable=broad-except
        expect(False, f"it ended early:\n{traceback.format_exc()}")
    parameter("defects", "")
    if misses:
        print(f"FAILED {name}", flush=True)
    return misses > 0


def on_device(function, generation, queues):
    parameter("generation", generation)
    device = Tap("check0", queues)
    try:
        function(generation, device)
    finally:
        device.close()


def unload():
    equal(subprocess.run(["rmmod", "tun"], check=False).returncode, 0, "unloading")
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    bad = [line for line in log.splitlines() if any(w in line for w in ("WARNING:", "BUG:", "Oops", "INFO: task"))]
    equal(bad, [], "the kernel's complaints")


def main():
    wanted = sys.argv[1:]
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([f"{here}/load-modules", "tun"], check=True)
    done = []
    for name, function in list(globals().items()):
        if not name.startswith("check_") or (wanted and not any(part in name for part in wanted)):
            continue
        if function.__code__.co_argcount == 0:
            done.append(run(name[6:], function))
            continue
        for generation in (5, 12):
            for queues in (1, 2, 4):
                about = f"{name[6:]}, generation {generation}, {queues} queues"
                done.append(run(about, on_device, function, generation, queues))
    bad = sum(done)
    global misses
    misses = 0
    unload()
    bad += misses > 0
    print(f"{len(done) + 1 - bad} passed, {bad} failed, 0 skipped")
    sys.exit(1 if bad else 0)


main()
