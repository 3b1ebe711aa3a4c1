// SPDX-License-Identifier: GPL-2.0
/* Interrupts of the mock device: MSI-X, and the eventfds for errors and for giving it back. */
#include <linux/slab.h>
#include <linux/uaccess.h>
#include "mock.h"

static u32 vectors_of(u32 index)
{
	switch (index) {
	case VFIO_PCI_MSIX_IRQ_INDEX:
		return MOCK_VECTORS;
	case VFIO_PCI_ERR_IRQ_INDEX:
	case VFIO_PCI_REQ_IRQ_INDEX:
		return 1;
	default:
		return 0;
	}
}

int mock_irq_info(unsigned long arg)
{
	const size_t minsz = offsetofend(struct vfio_irq_info, count);
	struct vfio_irq_info info;

	if (copy_from_user(&info, (void __user *)arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz || info.index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	info.count = vectors_of(info.index);
	info.flags = info.count ? VFIO_IRQ_INFO_EVENTFD : 0;
	if (info.count == 1)
		info.flags |= VFIO_IRQ_INFO_NORESIZE;
	return copy_to_user((void __user *)arg, &info, minsz) ? -EFAULT : 0;
}

/* The eventfds of an index, vectors_of() of them. */
static struct eventfd_ctx **irq_slots(struct mock_device *mock, u32 index)
{
	switch (index) {
	case VFIO_PCI_MSIX_IRQ_INDEX:
		return mock->msix;
	case VFIO_PCI_ERR_IRQ_INDEX:
		return &mock->error_irq;
	default:
		return &mock->request_irq;
	}
}

static int set_eventfd(struct mock_device *mock, struct eventfd_ctx **slot, int fd)
{
	struct eventfd_ctx *ctx = NULL;

	if (fd >= 0) {
		ctx = eventfd_ctx_fdget(fd);
		if (IS_ERR(ctx))
			return PTR_ERR(ctx);
	}
	mutex_lock(&mock->dma_lock);
	swap(*slot, ctx);
	mutex_unlock(&mock->dma_lock);
	if (ctx)
		eventfd_ctx_put(ctx);
	return 0;
}

static void signal(struct mock_device *mock, struct eventfd_ctx **slot)
{
	mutex_lock(&mock->dma_lock);
	if (*slot)
		eventfd_signal(*slot);
	mutex_unlock(&mock->dma_lock);
}

static int set_trigger(struct mock_device *mock, struct vfio_irq_set *hdr, void *data)
{
	struct eventfd_ctx **slots = irq_slots(mock, hdr->index);
	u32 i;
	int ret = 0;

	if (!hdr->count) {
		for (i = 0; i < vectors_of(hdr->index); i++)
			set_eventfd(mock, &slots[i], -1);
		return 0;
	}
	slots += hdr->start;
	for (i = 0; !ret && i < hdr->count; i++) {
		if (hdr->flags & VFIO_IRQ_SET_DATA_EVENTFD)
			ret = set_eventfd(mock, &slots[i], ((s32 *)data)[i]);
		else if ((hdr->flags & VFIO_IRQ_SET_DATA_NONE) || ((u8 *)data)[i])
			signal(mock, &slots[i]);
	}
	return ret;
}

int mock_set_irqs(struct mock_device *mock, unsigned long arg)
{
	const size_t minsz = offsetofend(struct vfio_irq_set, count);
	struct vfio_irq_set hdr;
	void *data = NULL;
	size_t size = 0;
	int ret;

	if (copy_from_user(&hdr, (void __user *)arg, minsz))
		return -EFAULT;
	if (hdr.argsz < minsz || hdr.index >= VFIO_PCI_NUM_IRQS)
		return -EINVAL;
	ret = vfio_set_irqs_validate_and_prepare(&hdr, vectors_of(hdr.index), VFIO_PCI_NUM_IRQS,
						 &size);
	if (ret)
		return ret;
	/* Nothing here can be masked, as with vfio-pci's MSI-X. */
	if ((hdr.flags & VFIO_IRQ_SET_ACTION_TYPE_MASK) != VFIO_IRQ_SET_ACTION_TRIGGER)
		return -ENOTTY;
	if (size) {
		data = memdup_user((void __user *)(arg + minsz), size);
		if (IS_ERR(data))
			return PTR_ERR(data);
	}
	ret = set_trigger(mock, &hdr, data);
	kfree(data);
	return ret;
}

void mock_interrupt(struct mock_device *mock, unsigned int vector)
{
	lockdep_assert_held(&mock->dma_lock);
	if (!mock->msix[vector])
		return;
	eventfd_signal(mock->msix[vector]);
	mock->stats.interrupts++;
}

void mock_drop_irqs(struct mock_device *mock)
{
	u32 i;

	for (i = 0; i < MOCK_VECTORS; i++)
		set_eventfd(mock, &mock->msix[i], -1);
	set_eventfd(mock, &mock->error_irq, -1);
	set_eventfd(mock, &mock->request_irq, -1);
}

/* The driver core wants the device back (unbind, removal) and its user still has it. */
void mock_request(struct vfio_device *vdev, unsigned int count)
{
	struct mock_device *mock = to_mock(vdev);

	signal(mock, &mock->request_irq);
}

/* Says that the device broke down; false if nobody listens. */
bool mock_signal_error(struct mock_device *mock)
{
	bool heard;

	mutex_lock(&mock->dma_lock);
	heard = mock->error_irq;
	if (heard)
		eventfd_signal(mock->error_irq);
	mutex_unlock(&mock->dma_lock);
	return heard;
}
