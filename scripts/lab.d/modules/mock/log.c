// SPDX-License-Identifier: GPL-2.0
/*
 * The DMA log of the mock device: one entry per written page of log_page bytes, kept from log_start
 * to log_stop, and given to the kernel's iova_bitmap when a report asks for it.
 */
#include <linux/interval_tree.h>
#include <linux/log2.h>
#include "mock.h"

static bool in_ranges(struct mock_device *mock, u64 first, u64 last)
{
	u32 i;

	for (i = 0; i < mock->range_count; i++) {
		if (first <= mock->ranges[i].last && last >= mock->ranges[i].first)
			return true;
	}
	return false;
}

/* Whether this write is one of those that a test wants forgotten. */
static bool is_lost(struct mock_device *mock)
{
	u64 every = READ_ONCE(mock->settings.lose_log);

	return every && ++mock->log_seen % every == 0;
}

void mock_log_write(struct mock_device *mock, u64 iova, u64 length)
{
	u64 last = iova + length - 1, shift, page;

	lockdep_assert_held(&mock->dma_lock);
	if (!mock->logging || last < iova)
		return;
	shift = ilog2(mock->log_page);
	if (is_lost(mock)) {
		mock->stats.lost++;
		return;
	}
	for (page = iova >> shift; page <= last >> shift; page++) {
		if (!in_ranges(mock, page << shift, (page << shift) + (mock->log_page - 1)))
			continue;
		if (xa_is_err(xa_store(&mock->dirty, page, xa_mk_value(1), GFP_KERNEL)))
			mock->log_broken = true;
		mock->stats.logged++;
	}
}

/* Takes over the ranges; their sum must be what the device can follow. */
static int take_ranges(struct mock_device *mock, struct rb_root_cached *ranges, u32 count)
{
	u64 limit = READ_ONCE(mock->settings.log_bytes), total = 0;
	u32 most = READ_ONCE(mock->settings.log_ranges);
	struct interval_tree_node *node;

	if (count > most) {
		if (READ_ONCE(mock->settings.log_ranges_refused))
			return -EOPNOTSUPP;
		vfio_combine_iova_ranges(ranges, count, most);
	}
	mock->range_count = 0;
	for (node = interval_tree_iter_first(ranges, 0, ULONG_MAX);
	     node && mock->range_count < MOCK_RANGES;
	     node = interval_tree_iter_next(node, 0, ULONG_MAX)) {
		mock->ranges[mock->range_count].first = node->start;
		mock->ranges[mock->range_count].last = node->last;
		mock->range_count++;
		total += node->last - node->start + 1;
	}
	return limit && total > limit ? -EOPNOTSUPP : 0;
}

static int log_start(struct mock_device *mock, struct rb_root_cached *ranges, u32 count,
		     u64 *page_size)
{
	int ret;

	if (mock->logging || !is_power_of_2(*page_size))
		return -EINVAL;
	if (mock_fault(mock, &mock->settings.fail_log_start))
		return -EIO;
	ret = take_ranges(mock, ranges, count);
	if (ret)
		return ret;
	/* Asked for is one thing; a device says what it does. */
	*page_size = clamp(*page_size, READ_ONCE(mock->settings.log_page_min),
			   READ_ONCE(mock->settings.log_page_max));
	mock->log_page = *page_size;
	mock->log_broken = false;
	mock->log_seen = 0;
	mock->logging = true;
	return 0;
}

static int mock_log_start(struct vfio_device *vdev, struct rb_root_cached *ranges, u32 count,
			  u64 *page_size)
{
	struct mock_device *mock = to_mock(vdev);
	int ret;

	mutex_lock(&mock->dma_lock);
	ret = log_start(mock, ranges, count, page_size);
	mutex_unlock(&mock->dma_lock);
	return ret;
}

int mock_log_stop(struct vfio_device *vdev)
{
	struct mock_device *mock = to_mock(vdev);

	mutex_lock(&mock->dma_lock);
	mock->logging = false;
	xa_destroy(&mock->dirty);
	mutex_unlock(&mock->dma_lock);
	return 0;
}

static bool report_fails(struct mock_device *mock)
{
	struct mock_settings *settings = &mock->settings;

	return READ_ONCE(settings->fail_report) &&
	       !mock_fault(mock, &settings->fail_report_skip) &&
	       mock_fault(mock, &settings->fail_report);
}

static int log_report(struct mock_device *mock, u64 iova, u64 length, struct iova_bitmap *dirty)
{
	u64 shift = ilog2(mock->log_page), last = iova + length - 1;
	bool fails = report_fails(mock);
	unsigned long page;
	void *entry;

	if (!length || last < iova)
		return -EINVAL;
	mock->stats.reports++;
	xa_for_each_range(&mock->dirty, page, entry, iova >> shift, last >> shift) {
		u64 first = (u64)page << shift, end = first + (mock->log_page - 1);
		u64 from = max(first, iova), to = min(end, last);

		if (!fails)
			iova_bitmap_set(dirty, from, to - from + 1);
		/* A page that reaches beyond the window is kept for the window that has its rest. */
		if (first >= iova && end <= last)
			xa_erase(&mock->dirty, page);
	}
	/* A report that fails has forgotten what it had to say: that is what makes it dangerous. */
	return fails || mock->log_broken ? -EIO : 0;
}

static int mock_log_report(struct vfio_device *vdev, unsigned long iova, unsigned long length,
			   struct iova_bitmap *dirty)
{
	struct mock_device *mock = to_mock(vdev);
	int ret = -EINVAL;

	mutex_lock(&mock->dma_lock);
	if (mock->logging)
		ret = log_report(mock, iova, length, dirty);
	mutex_unlock(&mock->dma_lock);
	return ret;
}

const struct vfio_log_ops mock_log_ops = {
	.log_start = mock_log_start,
	.log_stop = mock_log_stop,
	.log_read_and_clear = mock_log_report,
};
