// SPDX-License-Identifier: GPL-2.0
/*
 * ferry_mock_vfio: a migratable DMA device for the tests of Ferry, a VMM.
 *
 * Each device is a platform device ferry_mock_vfio.N with a VFIO device of emulated IOMMU on it,
 * which looks like a PCI function to its user. This file is its life: module, probe, open, close.
 */
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include "stream.h"

#define DEVICES_MAX 16

static unsigned int devices = 2;
module_param(devices, uint, 0444);
MODULE_PARM_DESC(devices, "how many devices there are (default 2, at most 16)");
static unsigned int migration_flags = 7;
module_param(migration_flags, uint, 0444);
MODULE_PARM_DESC(migration_flags, "0 none, else 1 STOP_COPY + 2 P2P + 4 PRE_COPY (default 7)");
static unsigned long state_bytes = 1 << 20;
module_param(state_bytes, ulong, 0444);
MODULE_PARM_DESC(state_bytes, "opaque state of each device (default 1 MiB, at most 1 GiB)");
static bool dirty_log = true;
module_param(dirty_log, bool, 0444);
MODULE_PARM_DESC(dirty_log, "whether the devices log their DMA (default yes)");
bool mock_has_iommu;
module_param_named(iommu, mock_has_iommu, bool, 0444);
MODULE_PARM_DESC(iommu, "an IOMMU of their own, with dirty bits, instead of VFIO's emulation (default no)");

struct workqueue_struct *mock_workqueue;
static struct platform_device *platform_devices[DEVICES_MAX];

static void default_settings(struct mock_device *mock)
{
	mock->settings = (struct mock_settings) {
		.migration_flags = migration_flags,
		.dirty_log = dirty_log,
		.state_bytes = min_t(u64, state_bytes, MOCK_STATE_MAX),
		.precopy_percent = 100,
		.pci_device = MOCK_DEVICE,
		.pci_subdevice = MOCK_SUBDEVICE,
		.log_page_min = PAGE_SIZE,
		.log_page_max = 1 << 30,
		.log_ranges = MOCK_RANGES,
	};
}

static int mock_init(struct vfio_device *vdev)
{
	struct mock_device *mock = to_mock(vdev);

	mock->mailbox = vmalloc_user(MOCK_MAILBOX_BYTES);
	if (!mock->mailbox)
		return -ENOMEM;
	mock->index = to_platform_device(vdev->dev)->id;
	mutex_init(&mock->state_lock);
	mutex_init(&mock->dma_lock);
	spin_lock_init(&mock->settings_lock);
	xa_init(&mock->dirty);
	INIT_DELAYED_WORK(&mock->tick, mock_tick);
	default_settings(mock);
	mock_config_init(mock);
	mock_state_reset(mock);
	return 0;
}

static void mock_release(struct vfio_device *vdev)
{
	struct mock_device *mock = to_mock(vdev);

	xa_destroy(&mock->dirty);
	vfree(mock->mailbox);
	mutex_destroy(&mock->dma_lock);
	mutex_destroy(&mock->state_lock);
}

/*
 * The core reads flags and ops only in ioctls of an open device, and calls this for the first of its
 * opens alone, so what the device can do may change from one user to the next without a rebind.
 */
static int mock_open_device(struct vfio_device *vdev)
{
	struct mock_device *mock = to_mock(vdev);
	u64 flags = READ_ONCE(mock->settings.migration_flags);

	vdev->migration_flags = flags;
	vdev->mig_ops = flags ? &mock_migration_ops : NULL;
	vdev->log_ops = READ_ONCE(mock->settings.dirty_log) ? &mock_log_ops : NULL;
	mock_state_reset(mock);
	mutex_lock(&mock->dma_lock);
	mock_config_init(mock);
	mock->open = true;
	mutex_unlock(&mock->dma_lock);
	return 0;
}

static void mock_close_device(struct vfio_device *vdev)
{
	struct mock_device *mock = to_mock(vdev);

	mutex_lock(&mock->dma_lock);
	mock->open = false;
	mutex_unlock(&mock->dma_lock);
	cancel_delayed_work_sync(&mock->tick);
	mock_log_stop(vdev);
	mock_drop_irqs(mock);
	mock_state_reset(mock);
}

static int device_info(unsigned long arg)
{
	const size_t minsz = offsetofend(struct vfio_device_info, num_irqs);
	struct vfio_device_info info;

	if (copy_from_user(&info, (void __user *)arg, minsz))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
	info.num_regions = VFIO_PCI_NUM_REGIONS;
	info.num_irqs = VFIO_PCI_NUM_IRQS;
	return copy_to_user((void __user *)arg, &info, minsz) ? -EFAULT : 0;
}

static long mock_ioctl(struct vfio_device *vdev, unsigned int cmd, unsigned long arg)
{
	struct mock_device *mock = to_mock(vdev);

	switch (cmd) {
	case VFIO_DEVICE_GET_INFO:
		return device_info(arg);
	case VFIO_DEVICE_GET_REGION_INFO:
		return mock_region_info(arg);
	case VFIO_DEVICE_GET_IRQ_INFO:
		return mock_irq_info(arg);
	case VFIO_DEVICE_SET_IRQS:
		return mock_set_irqs(mock, arg);
	case VFIO_DEVICE_RESET:
		return mock_reset(mock);
	default:
		return -ENOTTY;
	}
}

static const struct vfio_device_ops mock_ops = {
	.name = MOCK_NAME,
	.init = mock_init,
	.release = mock_release,
	.open_device = mock_open_device,
	.close_device = mock_close_device,
	.read = mock_read,
	.write = mock_write,
	.mmap = mock_mmap,
	.ioctl = mock_ioctl,
	.request = mock_request,
	.bind_iommufd = vfio_iommufd_emulated_bind,
	.unbind_iommufd = vfio_iommufd_emulated_unbind,
	.attach_ioas = vfio_iommufd_emulated_attach_ioas,
	.detach_ioas = vfio_iommufd_emulated_detach_ioas,
};

/* The same behind the IOMMU. */
static struct vfio_device_ops mock_physical_ops;

static int mock_probe(struct platform_device *pdev)
{
	struct mock_device *mock = vfio_alloc_device(mock_device, vdev, &pdev->dev,
						     mock_has_iommu ? &mock_physical_ops : &mock_ops);
	int ret;

	if (IS_ERR(mock))
		return PTR_ERR(mock);
	platform_set_drvdata(pdev, mock);
	ret = mock_has_iommu ? vfio_register_group_dev(&mock->vdev) :
			       vfio_register_emulated_iommu_dev(&mock->vdev);
	if (ret)
		vfio_put_device(&mock->vdev);
	return ret;
}

static void mock_remove(struct platform_device *pdev)
{
	struct mock_device *mock = platform_get_drvdata(pdev);

	vfio_unregister_group_dev(&mock->vdev);
	vfio_put_device(&mock->vdev);
}

static struct platform_driver mock_driver = {
	.probe = mock_probe,
	.remove_new = mock_remove,
	.driver = {
		.name = MOCK_NAME,
		.dev_groups = mock_groups,
	},
	/* The users of VFIO have them, behind whichever IOMMU. */
	.driver_managed_dma = true,
};

static void remove_devices(void)
{
	unsigned int i;

	for (i = 0; i < DEVICES_MAX; i++)
		platform_device_unregister(platform_devices[i]);
}

static int add_devices(void)
{
	struct platform_device *pdev;
	unsigned int i;
	int ret;

	for (i = 0; i < devices; i++) {
		pdev = platform_device_alloc(MOCK_NAME, i);
		ret = pdev ? 0 : -ENOMEM;
		if (!ret && mock_has_iommu)
			ret = mock_iommu_adopt(&pdev->dev);
		if (!ret)
			ret = platform_device_add(pdev);
		if (ret) {
			platform_device_put(pdev);
			remove_devices();
			return ret;
		}
		platform_devices[i] = pdev;
	}
	return 0;
}

static int __init mock_module_init(void)
{
	int ret;

	if (devices > DEVICES_MAX || (migration_flags && !(migration_flags & 1)) ||
	    migration_flags > 7)
		return -EINVAL;
	mock_workqueue = alloc_workqueue(MOCK_NAME, WQ_UNBOUND, 0);
	if (!mock_workqueue)
		return -ENOMEM;
	mock_physical_ops = mock_ops;
	mock_physical_ops.bind_iommufd = vfio_iommufd_physical_bind;
	mock_physical_ops.unbind_iommufd = vfio_iommufd_physical_unbind;
	mock_physical_ops.attach_ioas = vfio_iommufd_physical_attach_ioas;
	mock_physical_ops.detach_ioas = vfio_iommufd_physical_detach_ioas;
	ret = mock_has_iommu ? mock_iommu_init() : 0;
	if (ret)
		goto no_iommu;
	ret = platform_driver_register(&mock_driver);
	if (ret)
		goto no_driver;
	ret = add_devices();
	if (ret)
		goto no_devices;
	return 0;

no_devices:
	platform_driver_unregister(&mock_driver);
no_driver:
	if (mock_has_iommu)
		mock_iommu_exit();
no_iommu:
	destroy_workqueue(mock_workqueue);
	return ret;
}

static void __exit mock_module_exit(void)
{
	remove_devices();
	platform_driver_unregister(&mock_driver);
	if (mock_has_iommu)
		mock_iommu_exit();
	destroy_workqueue(mock_workqueue);
}

module_init(mock_module_init);
module_exit(mock_module_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Migratable mock DMA device for VFIO");
MODULE_IMPORT_NS(IOMMUFD);
