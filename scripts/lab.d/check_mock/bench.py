"""What the checks are run with."""
import ctypes
import os
import sys
import traceback

import uapi
from mock import Mock

IOVA = 0x40000000
SIZE = 64 << 20
SYSFS = "/sys/devices/platform/ferry_mock_vfio.%d"


class Bench:
    """Counts what holds, and makes and closes devices."""

    def __init__(self, kind):
        self.kind = kind
        self.passed = 0
        self.failed = 0
        self._misses = 0
        self._opened = []
        self.defaults = {i: _settings(SYSFS % i) for i in (0, 1)}

    def run(self, name, function):
        """Runs a check; whether it failed."""
        self._misses = 0
        try:
            function(self)
        except Exception:  # pylint: disable=broad-except
            self.expect(False, f"{name} ended early:\n{traceback.format_exc()}")
        self.close()
        if self._misses:
            self.failed += 1
        else:
            self.passed += 1
        return self._misses > 0

    def expect(self, truth, what):
        if truth:
            return
        self._misses += 1
        frame = sys._getframe(1)
        print(f"  line {frame.f_lineno} of {frame.f_code.co_name}: NOT {what}", flush=True)

    def equal(self, have, want, what):
        if have == want:
            return
        self._misses += 1
        frame = sys._getframe(1)
        print(f"  line {frame.f_lineno} of {frame.f_code.co_name}: {what}: {have!r}, not {want!r}", flush=True)

    def space(self):
        space = uapi.Container() if self.kind == "group" else uapi.Ioas()
        self._opened.append(space)
        return space

    def set(self, index, **settings):
        """Settings of a device (`config` or `faults`), until the end of the check."""
        for name, value in settings.items():
            paths = [f"{SYSFS % index}/{folder}/{name}" for folder in ("config", "faults")]
            path = next(path for path in paths if os.path.exists(path))
            with open(path, "w", encoding="ascii") as file:
                file.write(str(value))

    def device(self, index, space=None, memory=None):
        """Opens a device with bus mastering on, in `space`, or in one of its own with memory at IOVA."""
        if space is None:
            space = self.space()
        if memory is None:
            memory = uapi.Memory(SIZE)
        # The first device of a container brings its IOMMU.
        device = Mock(space, SYSFS % index)
        self._opened.append(device)
        if not getattr(space, "memory", None):
            space.map(memory.address, IOVA, memory.size)
            space.memory = memory
        device.memory = space.memory
        device.bus_master()
        return device

    def map_peer(self, space, mailbox, iova):
        """Lets the devices of `space` reach a mailbox that is mapped here."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(mailbox))
        space.map(address, iova, len(mailbox))

    def drop(self, device):
        """Closes a device before the end of the check."""
        self._opened.remove(device)
        device.close()

    def close(self):
        """Devices before their spaces, and every setting as it was."""
        for opened in reversed(self._opened):
            opened.close()
        self._opened.clear()
        for defaults in self.defaults.values():
            for path, value in defaults.items():
                with open(path, encoding="ascii") as file:
                    now = file.read()
                if now != value:
                    with open(path, "w", encoding="ascii") as file:
                        file.write(value)


def _settings(sysfs):
    """Every setting and its value."""
    found = {}
    for folder in ("config", "faults"):
        for name in os.listdir(f"{sysfs}/{folder}"):
            path = f"{sysfs}/{folder}/{name}"
            if os.stat(path).st_mode & 0o444:
                with open(path, encoding="ascii") as file:
                    found[path] = file.read()
    return found
