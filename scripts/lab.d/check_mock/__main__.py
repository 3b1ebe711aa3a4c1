#!/usr/bin/env python3
"""Checks the lab's mock device by raw ioctls, so that the fixture is known to be right before
anything is tested with it.

usage: scripts/lab run -- python3 scripts/lab.d/check_mock group|iommufd [PART-OF-A-CHECK'S-NAME...]

It loads the modules, runs the checks, unloads the mock device, and looks for complaints in the
kernel's log. A line per expectation that does not hold; then `N passed, N failed, 0 skipped`."""
import os
import subprocess
import sys
import time

import checks
import faults
import logs
import migrations
from bench import Bench


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in ("group", "iommufd"):
        sys.exit(__doc__)
    kind, wanted = sys.argv[1], sys.argv[2:]
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    subprocess.run([f"{here}/load-modules", kind, "devices=2"], check=True)
    bench = Bench(kind)
    for module in (checks, logs, migrations, faults):
        for name, function in vars(module).items():
            if not name.startswith("check_"):
                continue
            if wanted and not any(part in name for part in wanted):
                continue
            began = time.monotonic()
            failed = bench.run(name, function)
            print(f"{'FAILED' if failed else 'ok    '} {time.monotonic() - began:6.1f} s  {name[6:]}", flush=True)
    bench.run("unload", lambda bench: unload(bench))
    print(f"{bench.passed} passed, {bench.failed} failed, 0 skipped")
    sys.exit(1 if bench.failed else 0)


def unload(bench):
    """Nothing of the device is left, and the kernel had nothing to complain about."""
    bench.defaults.clear()
    done = subprocess.run(["rmmod", "ferry_mock_vfio"], check=False)
    bench.expect(done.returncode == 0, "the module unloads")
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    bad = [line for line in log.splitlines() if any(w in line for w in ("WARNING:", "BUG:", "Oops", "INFO: task"))]
    bench.expect(not bad, f"the kernel complains of nothing: {bad}")


main()
