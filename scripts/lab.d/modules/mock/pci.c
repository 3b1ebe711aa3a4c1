// SPDX-License-Identifier: GPL-2.0
/* The PCI function that the mock device looks like: configuration space, BARs, regions. */
#include <linux/mm.h>
#include <linux/pci_regs.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>
#include <linux/vmalloc.h>
#include "mock.h"

/* As vfio-pci has it, and as some users take for granted. */
#define REGION_SHIFT	40
#define MSIX_CAP	0x40
#define BOUNCE_BYTES	64

/* A value of configuration space and which of its bits can be written. */
static void config_16(struct mock_device *mock, int at, u16 value, u16 mask)
{
	put_unaligned_le16(value, mock->config + at);
	put_unaligned_le16(mask, mock->config_mask + at);
}

static void config_32(struct mock_device *mock, int at, u32 value, u32 mask)
{
	put_unaligned_le32(value, mock->config + at);
	put_unaligned_le32(mask, mock->config_mask + at);
}

static void config_msix(struct mock_device *mock)
{
	config_16(mock, MSIX_CAP, PCI_CAP_ID_MSIX, 0);
	config_16(mock, MSIX_CAP + PCI_MSIX_FLAGS, MOCK_VECTORS - 1,
		  PCI_MSIX_FLAGS_ENABLE | PCI_MSIX_FLAGS_MASKALL);
	config_32(mock, MSIX_CAP + PCI_MSIX_TABLE, MOCK_MSIX_TABLE | 2, 0);
	config_32(mock, MSIX_CAP + PCI_MSIX_PBA, MOCK_MSIX_PBA | 2, 0);
}

/* As after power-on. A device reset keeps it: VFIO restores it around real ones, too. */
void mock_config_init(struct mock_device *mock)
{
	memset(mock->config, 0, sizeof(mock->config));
	memset(mock->config_mask, 0, sizeof(mock->config_mask));
	config_16(mock, PCI_VENDOR_ID, MOCK_VENDOR, 0);
	config_16(mock, PCI_DEVICE_ID, READ_ONCE(mock->settings.pci_device), 0);
	config_16(mock, PCI_COMMAND, 0, PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER |
		  PCI_COMMAND_PARITY | PCI_COMMAND_SERR | PCI_COMMAND_INTX_DISABLE);
	config_16(mock, PCI_STATUS, PCI_STATUS_CAP_LIST, 0);
	config_32(mock, PCI_CLASS_REVISION, 0xff000001, 0);
	config_16(mock, PCI_CACHE_LINE_SIZE, 0, 0xffff);
	config_32(mock, PCI_BASE_ADDRESS_0, 0, ~(MOCK_REGS_BYTES - 1));
	config_32(mock, PCI_BASE_ADDRESS_2,
		  PCI_BASE_ADDRESS_MEM_TYPE_64 | PCI_BASE_ADDRESS_MEM_PREFETCH,
		  ~(MOCK_BAR2_BYTES - 1));
	config_32(mock, PCI_BASE_ADDRESS_3, 0, ~0);
	config_16(mock, PCI_SUBSYSTEM_VENDOR_ID, MOCK_SUBVENDOR, 0);
	config_16(mock, PCI_SUBSYSTEM_ID, READ_ONCE(mock->settings.pci_subdevice), 0);
	config_16(mock, PCI_CAPABILITY_LIST, MSIX_CAP, 0);
	config_16(mock, PCI_INTERRUPT_LINE, 0, 0xff);
	config_msix(mock);
}

bool mock_bus_master(struct mock_device *mock)
{
	return mock->config[PCI_COMMAND] & PCI_COMMAND_MASTER;
}

static void config_access(struct mock_device *mock, u8 *data, u32 at, u32 count, bool write)
{
	u32 i;

	for (i = 0; i < count; i++) {
		u8 mask = mock->config_mask[at + i];

		if (write)
			mock->config[at + i] = (mock->config[at + i] & ~mask) | (data[i] & mask);
		else
			data[i] = mock->config[at + i];
	}
	if (write && at <= PCI_COMMAND && at + count > PCI_COMMAND)
		mock_engine_wake(mock);
}

static void register_access(struct mock_device *mock, u8 *data, u32 at, u32 count, bool write)
{
	u32 i;

	if ((count != 4 && count != 8) || at % count || at + count > sizeof(mock->regs)) {
		if (!write)
			memset(data, 0xff, count);
		return;
	}
	for (i = 0; i < count; i += 4) {
		if (write)
			mock_register_write(mock, at + i, get_unaligned_le32(data + i));
		else
			memcpy(data + i, (u8 *)&mock->regs + at + i, 4);
	}
}

static void mailbox_access(struct mock_device *mock, u8 *data, u32 at, u32 count, bool write)
{
	u32 i;

	for (i = 0; i < count; i++) {
		if (at + i >= MOCK_MAILBOX_BYTES)
			data[i] = 0;
		else if (write)
			mock->mailbox[at + i] = data[i];
		else
			data[i] = mock->mailbox[at + i];
	}
}

static u64 region_size(u32 index)
{
	switch (index) {
	case VFIO_PCI_BAR0_REGION_INDEX:
		return MOCK_REGS_BYTES;
	case VFIO_PCI_BAR2_REGION_INDEX:
		return MOCK_BAR2_BYTES;
	case VFIO_PCI_CONFIG_REGION_INDEX:
		return MOCK_CONFIG_BYTES;
	default:
		return 0;
	}
}

static void region_access(struct mock_device *mock, u32 index, u8 *data, u32 at, u32 count,
			  bool write)
{
	mutex_lock(&mock->dma_lock);
	if (index == VFIO_PCI_CONFIG_REGION_INDEX)
		config_access(mock, data, at, count, write);
	else if (index == VFIO_PCI_BAR0_REGION_INDEX)
		register_access(mock, data, at, count, write);
	else
		mailbox_access(mock, data, at, count, write);
	mutex_unlock(&mock->dma_lock);
}

/* The largest access that a register access may be part of, else what fits the bounce buffer. */
static u32 piece(u32 index, u64 at, size_t left)
{
	if (index != VFIO_PCI_BAR0_REGION_INDEX)
		return min_t(size_t, left, BOUNCE_BYTES);
	if (left >= 8 && IS_ALIGNED(at, 8))
		return 8;
	if (left >= 4 && IS_ALIGNED(at, 4))
		return 4;
	return 1;
}

/* Either user buffer may be NULL: it says which way the access goes. */
static ssize_t region_rw(struct mock_device *mock, char __user *to, const char __user *from,
			 size_t count, loff_t *ppos)
{
	u32 index = *ppos >> REGION_SHIFT;
	u64 at = *ppos & ((1ULL << REGION_SHIFT) - 1);
	u64 size = region_size(index);
	u8 data[BOUNCE_BYTES];
	size_t done = 0;

	if (at >= size)
		return -EINVAL;
	count = min_t(u64, count, size - at);
	while (done < count) {
		u32 n = piece(index, at + done, count - done);

		if (from && copy_from_user(data, from + done, n))
			return -EFAULT;
		region_access(mock, index, data, at + done, n, from);
		if (to && copy_to_user(to + done, data, n))
			return -EFAULT;
		done += n;
	}
	*ppos += done;
	return done;
}

ssize_t mock_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos)
{
	return region_rw(to_mock(vdev), buf, NULL, count, ppos);
}

ssize_t mock_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos)
{
	return region_rw(to_mock(vdev), NULL, buf, count, ppos);
}

/*
 * Only the mailbox can be mapped. Its pages are ordinary ones with a reference for each mapping, so
 * that they can be pinned for DMA and outlive a device that is taken away.
 */
int mock_mmap(struct vfio_device *vdev, struct vm_area_struct *vma)
{
	const unsigned long index_shift = REGION_SHIFT - PAGE_SHIFT;
	unsigned long page = vma->vm_pgoff & ((1UL << index_shift) - 1);

	if (vma->vm_pgoff >> index_shift != VFIO_PCI_BAR2_REGION_INDEX)
		return -EINVAL;
	if (!(vma->vm_flags & VM_SHARED))
		return -EINVAL;
	if (page + vma_pages(vma) > MOCK_MAILBOX_BYTES >> PAGE_SHIFT)
		return -EINVAL;
	return remap_vmalloc_range(vma, to_mock(vdev)->mailbox, page);
}

/* The capability that leaves the MSI-X table out of what can be mapped. */
static int sparse_mmap(struct vfio_info_cap *caps)
{
	struct {
		struct vfio_region_info_cap_sparse_mmap cap;
		struct vfio_region_sparse_mmap_area area;
	} sparse = {
		.cap.header.id = VFIO_REGION_INFO_CAP_SPARSE_MMAP,
		.cap.header.version = 1,
		.cap.nr_areas = 1,
		.area.size = MOCK_MAILBOX_BYTES,
	};

	return vfio_info_add_capability(caps, &sparse.cap.header, sizeof(sparse));
}

static int copy_caps(struct vfio_region_info *info, struct vfio_info_cap *caps, void __user *arg)
{
	info->flags |= VFIO_REGION_INFO_FLAG_CAPS;
	if (info->argsz < sizeof(*info) + caps->size) {
		info->argsz = sizeof(*info) + caps->size;
		info->cap_offset = 0;
		return 0;
	}
	vfio_info_cap_shift(caps, sizeof(*info));
	if (copy_to_user(arg + sizeof(*info), caps->buf, caps->size))
		return -EFAULT;
	info->cap_offset = sizeof(*info);
	return 0;
}

int mock_region_info(unsigned long arg)
{
	const size_t minsz = offsetofend(struct vfio_region_info, offset);
	struct vfio_info_cap caps = {};
	struct vfio_region_info info;
	int ret = 0;

	if (copy_from_user(&info, (void __user *)arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= VFIO_PCI_NUM_REGIONS)
		return -EINVAL;
	info.cap_offset = 0;
	info.offset = (u64)info.index << REGION_SHIFT;
	info.size = region_size(info.index);
	info.flags = info.size ? VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE : 0;
	if (info.index == VFIO_PCI_BAR2_REGION_INDEX) {
		info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
		ret = sparse_mmap(&caps);
		if (!ret)
			ret = copy_caps(&info, &caps, (void __user *)arg);
		kfree(caps.buf);
	}
	if (ret)
		return ret;
	return copy_to_user((void __user *)arg, &info, minsz) ? -EFAULT : 0;
}
