/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The mock device inside the kernel.
 *
 * Locks, outermost first:
 *   state_lock     the migration state and which data file is open
 *   mock_file.lock one stream of migration data (stream.h)
 *   dma_lock       registers, engine, DMA log, interrupts. DMA and its record in the log are one step
 *                  under it; so are a report and the clearing of what it reports; and once a state
 *                  change has had it, no DMA of the state before is under way.
 *   settings_lock  the counts of faults still to come (a spinlock, a leaf)
 *
 * DMA takes the mapping process' mmap_lock while dma_lock is held, so nothing that runs under
 * mmap_lock (mmap, page faults) takes any of these, and user memory of a caller is copied
 * outside dma_lock.
 */
#ifndef FERRY_MOCK_H
#define FERRY_MOCK_H

#include <linux/eventfd.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/vfio.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#include "registers.h"

#define MOCK_NAME		"ferry_mock_vfio"
#define MOCK_CONFIG_BYTES	256
#define MOCK_STATE_MAX		(1ULL << 30)
#define MOCK_ARCS		48
/* As many as the uAPI lets a caller give: LOG_MAX_RANGES of the VFIO core. */
#define MOCK_RANGES		256

/* Every value that a test may set (sysfs.c says what they mean). Read without a lock. */
struct mock_settings {
	/* What the device can do; README.md says which are taken over when it is opened. */
	u64 migration_flags;
	u64 dirty_log;
	u64 state_bytes;
	u64 precopy_percent;
	u64 pci_device;
	u64 pci_subdevice;
	u64 log_page_min;
	u64 log_page_max;
	u64 log_ranges;
	u64 log_bytes;
	u64 log_ranges_refused;
	u64 p2p_ram_dma;
	/* How fast; at once. */
	u64 save_rate;
	u64 load_rate;
	u64 precopy_dirty_rate;
	u64 arc_delay_ms;
	/* Faults; at once. */
	u64 fail_log_start;
	u64 fail_report;
	u64 fail_report_skip;
	u64 fail_reset;
	u64 lose_log;
	u64 lose_dma;
	u64 enomsg_run;
	u64 short_io;
	u64 corrupt_state;
	u64 cut_state;
	u64 stateless;
};

/* Arcs that are to fail; guarded by settings_lock. */
struct mock_arc_fault {
	int from, to;		/* -1: any */
	u64 times;
	bool to_error;
};

/* One arc that was tried. */
struct mock_arc {
	u64 number;		/* over all devices, so their order can be told */
	u64 ns;
	u8 from, to;
	int error;
};

struct mock_segment {
	u64 addr;
	u64 pages;
};

struct mock_range {
	u64 first, last;
};

struct mock_stats {
	u64 dma_writes;
	u64 dma_no_master;
	u64 doorbells_refused;
	u64 reports;
	u64 logged;
	u64 lost;
	u64 interrupts;
	u64 peer_late;
};

struct mock_file;

struct mock_device {
	struct vfio_device vdev;
	int index;
	struct mock_settings settings;
	spinlock_t settings_lock;
	struct mock_arc_fault arc_fault;

	struct mutex state_lock;
	enum vfio_device_mig_state state;	/* written with dma_lock held, too */
	struct mock_file *file;
	struct mock_arc arcs[MOCK_ARCS];
	u64 arcs_done;

	struct mutex dma_lock;
	bool open;
	struct mock_regs regs;
	struct mock_segment segments[MOCK_SEGMENTS];
	u64 seed;			/* what the opaque part of the state is made of */
	u8 config[MOCK_CONFIG_BYTES];
	u8 config_mask[MOCK_CONFIG_BYTES];
	u8 *mailbox;
	u64 mailbox_hash;		/* when the device stopped */
	struct delayed_work tick;
	ktime_t ticked;
	u64 credit;			/* records times nanoseconds */
	struct mock_stats stats;

	bool logging;
	bool log_broken;		/* a write could not be noted: no report can be right */
	u64 log_page;
	u64 log_seen;			/* writes, for lose_log */
	struct xarray dirty;		/* by IOVA / log_page */
	struct mock_range ranges[MOCK_RANGES];
	u32 range_count;

	struct eventfd_ctx *msix[MOCK_VECTORS];
	struct eventfd_ctx *error_irq;
	struct eventfd_ctx *request_irq;
};

static inline struct mock_device *to_mock(struct vfio_device *vdev)
{
	return container_of(vdev, struct mock_device, vdev);
}

/* Uses up one of the faults still to come, if there is one. */
static inline bool mock_fault(struct mock_device *mock, u64 *left)
{
	bool due;

	spin_lock(&mock->settings_lock);
	due = *left > 0;
	if (due)
		--*left;
	spin_unlock(&mock->settings_lock);
	return due;
}

/* pci.c: configuration space and BARs */
void mock_config_init(struct mock_device *mock);
bool mock_bus_master(struct mock_device *mock);
ssize_t mock_read(struct vfio_device *vdev, char __user *buf, size_t count, loff_t *ppos);
ssize_t mock_write(struct vfio_device *vdev, const char __user *buf, size_t count, loff_t *ppos);
int mock_mmap(struct vfio_device *vdev, struct vm_area_struct *vma);
int mock_region_info(unsigned long arg);

/* irq.c */
int mock_irq_info(unsigned long arg);
int mock_set_irqs(struct mock_device *mock, unsigned long arg);
void mock_interrupt(struct mock_device *mock, unsigned int vector);
void mock_drop_irqs(struct mock_device *mock);
void mock_request(struct vfio_device *vdev, unsigned int count);
bool mock_signal_error(struct mock_device *mock);

/* engine.c: all DMA; callers hold dma_lock */
void mock_regs_reset(struct mock_device *mock);
bool mock_is_stopped(struct mock_device *mock);
void mock_register_write(struct mock_device *mock, u32 offset, u32 value);
void mock_engine_wake(struct mock_device *mock);
void mock_tick(struct work_struct *work);
void mock_mailbox_settle(struct mock_device *mock);
void mock_mailbox_check(struct mock_device *mock);
extern struct workqueue_struct *mock_workqueue;

/* iommu.c: used only with the module parameter `iommu` */
int mock_iommu_init(void);
void mock_iommu_exit(void);
int mock_iommu_adopt(struct device *dev);
int mock_iommu_write(struct mock_device *mock, u64 iova, const void *data, size_t length);
extern bool mock_has_iommu;

/* log.c */
extern const struct vfio_log_ops mock_log_ops;
void mock_log_write(struct mock_device *mock, u64 iova, u64 length);
int mock_log_stop(struct vfio_device *vdev);

/* migration.c */
extern const struct vfio_migration_ops mock_migration_ops;
void mock_break(struct mock_device *mock);
int mock_reset(struct mock_device *mock);
void mock_state_reset(struct mock_device *mock);

/* sysfs.c */
extern const struct attribute_group *mock_groups[];
extern const char * const mock_state_names[];

#endif
