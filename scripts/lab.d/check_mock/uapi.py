"""Raw ioctls of VFIO and iommufd (linux/vfio.h, linux/iommufd.h), no library between."""
import ctypes
import errno
import fcntl
import mmap
import os
import struct

# Device features (VFIO_DEVICE_FEATURE) and what is done with them.
MIGRATION, MIG_STATE, LOG_START, LOG_STOP, LOG_REPORT, DATA_SIZE = 1, 2, 6, 7, 8, 9
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18

# enum vfio_device_mig_state
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)

MSIX, ERR_IRQ, REQ_IRQ = 2, 3, 4
CONFIG_REGION = 7

_GROUP_SET_CONTAINER, _GROUP_GET_DEVICE_FD = 0x3B68, 0x3B6A
_SET_IOMMU, _MAP_DMA, _UNMAP_DMA, _DIRTY_PAGES = 0x3B66, 0x3B71, 0x3B72, 0x3B75
_REGION_INFO, _IRQ_INFO, _SET_IRQS, _RESET = 0x3B6C, 0x3B6D, 0x3B6E, 0x3B6F
_FEATURE, _BIND_IOMMUFD, _ATTACH, _PRECOPY_INFO = 0x3B75, 0x3B76, 0x3B77, 0x3B79
_IOAS_ALLOC, _IOAS_MAP, _IOAS_UNMAP = 0x3B81, 0x3B85, 0x3B86
_TYPE1V2 = 3


def name_of(number):
    """The name of an errno; of two names the one that the kernel uses."""
    return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))


class Failed(Exception):
    """A call that returned an error."""

    def __init__(self, number):
        super().__init__(name_of(number))
        self.number = number


def ioctl(fd, request, data=None):
    """Returns what the call returned; `data` (a bytearray) is changed in place."""
    try:
        return fcntl.ioctl(fd, request, 0 if data is None else data)
    except OSError as error:
        raise Failed(error.errno) from None


def outcome(call, *args):
    """The errno's name that a call fails with, or None."""
    try:
        call(*args)
    except (Failed, OSError) as error:
        return name_of(error.number if isinstance(error, Failed) else error.errno)
    return None


class Memory:
    """Memory to be written by devices."""

    def __init__(self, size):
        self.size = size
        self.map = mmap.mmap(-1, size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def u64(self, at):
        return struct.unpack_from("<Q", self.map, at)[0]


class Container:
    """DMA addresses of the devices of one VM, by a type1 container."""

    def __init__(self):
        self.fd = os.open("/dev/vfio/vfio", os.O_RDWR)
        self.groups = []

    def device(self, sysfs):
        number = os.path.basename(os.readlink(f"{sysfs}/iommu_group"))
        group = os.open(f"/dev/vfio/{number}", os.O_RDWR)
        self.groups.append(group)
        ioctl(group, _GROUP_SET_CONTAINER, bytearray(struct.pack("i", self.fd)))
        if len(self.groups) == 1:
            ioctl(self.fd, _SET_IOMMU, _TYPE1V2)
        name = os.path.basename(sysfs).encode() + b"\0"
        return ioctl(group, _GROUP_GET_DEVICE_FD, bytearray(name))

    def map(self, address, iova, size):
        ioctl(self.fd, _MAP_DMA, bytearray(struct.pack("<IIQQQ", 32, 3, address, iova, size)))

    def unmap(self, iova, size):
        ioctl(self.fd, _UNMAP_DMA, bytearray(struct.pack("<IIQQ", 24, 0, iova, size)))

    def close(self):
        for group in self.groups:
            os.close(group)
        os.close(self.fd)


class Ioas:
    """The same by iommufd."""

    def __init__(self):
        self.fd = os.open("/dev/iommu", os.O_RDWR)
        data = bytearray(struct.pack("<III", 12, 0, 0))
        ioctl(self.fd, _IOAS_ALLOC, data)
        self.id = struct.unpack("<III", data)[2]

    def device(self, sysfs):
        name = os.listdir(f"{sysfs}/vfio-dev")[0]
        fd = os.open(f"/dev/vfio/devices/{name}", os.O_RDWR)
        ioctl(fd, _BIND_IOMMUFD, bytearray(struct.pack("<IIiI", 16, 0, self.fd, 0)))
        ioctl(fd, _ATTACH, bytearray(struct.pack("<III", 12, 0, self.id)))
        return fd

    def map(self, address, iova, size):
        # Fixed address, readable, writable.
        data = struct.pack("<IIIIQQQ", 40, 7, self.id, 0, address, size, iova)
        ioctl(self.fd, _IOAS_MAP, bytearray(data))

    def unmap(self, iova, size):
        ioctl(self.fd, _IOAS_UNMAP, bytearray(struct.pack("<IIQQ", 24, self.id, iova, size)))

    def close(self):
        os.close(self.fd)


class Bitmap:
    """A buffer for a report."""

    def __init__(self, bits):
        self.words = Memory(max((bits + 63) // 64 * 8, 8))
        self.bits = bits

    def pages(self):
        value = int.from_bytes(self.words.map[:], "little")
        found = []
        while value:
            low = (value & -value).bit_length() - 1
            found.append(low)
            value &= value - 1
        return found


class Device:
    """A VFIO device that is open."""

    def __init__(self, space, sysfs):
        self.space = space
        self.sysfs = sysfs
        self.fd = space.device(sysfs)
        self.regions = {i: self.region_info(i) for i in (0, 2, CONFIG_REGION)}

    def close(self):
        os.close(self.fd)

    def attribute(self, name, value=None):
        """Reads or writes a file of the device's folder in sysfs."""
        if value is None:
            with open(f"{self.sysfs}/{name}", encoding="ascii") as file:
                return file.read().strip()
        with open(f"{self.sysfs}/{name}", "w", encoding="ascii") as file:
            file.write(str(value))
        return None

    def number(self, name):
        return int(self.attribute(name))

    def region_info(self, index):
        """(flags, size, offset, [(offset, size) that can be mapped])"""
        data = bytearray(struct.pack("<IIIIQQ", 256, 0, index, 0, 0, 0) + bytes(224))
        ioctl(self.fd, _REGION_INFO, data)
        _, flags, _, cap, size, offset = struct.unpack_from("<IIIIQQ", data)
        areas = []
        if cap:
            ident, _, _, count, _ = struct.unpack_from("<HHIII", data, cap)
            assert ident == 1, "sparse mmap is the only capability there is"
            areas = [struct.unpack_from("<QQ", data, cap + 16 + 16 * i) for i in range(count)]
        return flags, size, offset, areas

    def irq_count(self, index):
        data = bytearray(struct.pack("<IIII", 16, 0, index, 0))
        ioctl(self.fd, _IRQ_INFO, data)
        return struct.unpack("<IIII", data)[3]

    def set_irqs(self, index, start, fds):
        """Eventfds (-1: none) for vectors; an empty list turns all off."""
        flags = (1 << 2 | 1 << 5) if fds else (1 << 0 | 1 << 5)
        head = struct.pack("<IIIII", 20 + 4 * len(fds), flags, index, start, len(fds))
        ioctl(self.fd, _SET_IRQS, bytearray(head + struct.pack(f"<{len(fds)}i", *fds)))

    def read(self, region, at, size):
        return os.pread(self.fd, size, self.regions[region][2] + at)

    def write(self, region, at, data):
        return os.pwrite(self.fd, data, self.regions[region][2] + at)

    def map_region(self, region, size):
        return mmap.mmap(self.fd, size, offset=self.regions[region][2])

    def reset(self):
        ioctl(self.fd, _RESET)

    def feature(self, flags, data=b""):
        buffer = bytearray(struct.pack("<II", 8 + len(data), flags) + data)
        ioctl(self.fd, _FEATURE, buffer)
        return bytes(buffer[8:])

    def migration_flags(self):
        return struct.unpack("<Q", self.feature(GET | MIGRATION, bytes(8)))[0]

    def data_size(self):
        return struct.unpack("<Q", self.feature(GET | DATA_SIZE, bytes(8)))[0]

    def state(self):
        return struct.unpack("<Ii", self.feature(GET | MIG_STATE, bytes(8)))[0]

    def set_state(self, state):
        """Returns the data fd, or -1."""
        return struct.unpack("<Ii", self.feature(SET | MIG_STATE, struct.pack("<Ii", state, -1)))[1]

    def log_start(self, ranges, page=4096):
        """Returns the page size that the device chose."""
        table = ctypes.create_string_buffer(b"".join(struct.pack("<QQ", *r) for r in ranges))
        data = struct.pack("<QIIQ", page, len(ranges), 0, ctypes.addressof(table))
        return struct.unpack("<QIIQ", self.feature(SET | LOG_START, data))[0]

    def log_stop(self):
        self.feature(SET | LOG_STOP)

    def report(self, iova, length, page=4096):
        """The numbers of the dirty pages, from `iova` on."""
        bitmap = Bitmap((length + page - 1) // page)
        data = struct.pack("<QQQQ", iova, length, page, bitmap.words.address)
        self.feature(GET | LOG_REPORT, data)
        return bitmap.pages()


def precopy_info(fd):
    """(initial bytes, dirty bytes)"""
    data = bytearray(struct.pack("<IIQQ", 24, 0, 0, 0))
    ioctl(fd, _PRECOPY_INFO, data)
    return struct.unpack("<IIQQ", data)[2:]


def container_dirty_start(container):
    ioctl(container.fd, _DIRTY_PAGES, bytearray(struct.pack("<II", 8, 1)))


def container_dirty(container, iova, length):
    """The type1 container's own bitmap."""
    bitmap = Bitmap(length // 4096)
    data = struct.pack("<IIQQQQQ", 48, 4, iova, length, 4096, bitmap.words.size, bitmap.words.address)
    ioctl(container.fd, _DIRTY_PAGES, bytearray(data))
    return bitmap.pages()
