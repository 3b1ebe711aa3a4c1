// SPDX-License-Identifier: GPL-2.0
/* What the mock device does: registers, DMA by doorbell, DMA by itself, DMA to its peer. */
#include <linux/random.h>
#include <linux/slab.h>
#include <linux/xxhash.h>
#include "stream.h"

#define RATE_MAX	1000000U
#define SEGMENT_PAGES_MAX (1U << 20)
/* Records per hold of dma_lock, so that a register access waits for milliseconds at most. */
#define BURST		512
/* What was not done in that time is not made up for: a stop must not be followed by a storm. */
#define CREDIT_NS	(100 * NSEC_PER_MSEC)

void mock_regs_reset(struct mock_device *mock)
{
	lockdep_assert_held(&mock->dma_lock);
	memset(&mock->regs, 0, sizeof(mock->regs));
	memset(mock->segments, 0, sizeof(mock->segments));
	memset(mock->mailbox, 0, MOCK_MAILBOX_BYTES);
	mock->regs.magic = MOCK_MAGIC;
	mock->regs.version = MOCK_REGS_VERSION;
	mock->regs.instance = mock->index;
	mock->regs.bytes = MOCK_RECORD_MIN;
	mock->regs.step = 1;
	mock->seed = get_random_u64();
	mock->credit = 0;
}

/* The part of the state that moves, but for opaque bytes. */
void mock_regs_save(struct mock_device *mock, struct mock_snapshot *snapshot)
{
	lockdep_assert_held(&mock->dma_lock);
	snapshot->regs = mock->regs;
	memcpy(snapshot->segments, mock->segments, sizeof(snapshot->segments));
	snapshot->seed = mock->seed;
	memcpy(snapshot->mailbox, mock->mailbox, MOCK_MAILBOX_BYTES);
}

/* Its hashes only say that it is what somebody wrote, so what the engine relies on is checked. */
int mock_regs_load(struct mock_device *mock, const struct mock_snapshot *snapshot)
{
	const struct mock_regs *regs = &snapshot->regs;
	u64 pages = 0;
	u32 i;

	lockdep_assert_held(&mock->dma_lock);
	for (i = 0; i < MOCK_SEGMENTS; i++) {
		if (snapshot->segments[i].pages > SEGMENT_PAGES_MAX)
			return -EINVAL;
		pages += snapshot->segments[i].pages;
	}
	if (regs->magic != MOCK_MAGIC || regs->version != MOCK_REGS_VERSION ||
	    regs->pages != pages || regs->rate > RATE_MAX || regs->bytes < MOCK_RECORD_MIN ||
	    regs->bytes > MOCK_RECORD_MAX || !IS_ALIGNED(regs->bytes, 8))
		return -EINVAL;
	mock->regs = *regs;
	mock->regs.instance = mock->index;
	if (regs->engine & MOCK_ENGINE_STAYS)
		mock->regs.engine = 0;
	memcpy(mock->segments, snapshot->segments, sizeof(mock->segments));
	mock->seed = snapshot->seed;
	memcpy(mock->mailbox, snapshot->mailbox, MOCK_MAILBOX_BYTES);
	return 0;
}

bool mock_is_stopped(struct mock_device *mock)
{
	switch (mock->state) {
	case VFIO_DEVICE_STATE_RUNNING:
	case VFIO_DEVICE_STATE_PRE_COPY:
	case VFIO_DEVICE_STATE_RUNNING_P2P:
	case VFIO_DEVICE_STATE_PRE_COPY_P2P:
		return false;
	default:
		return true;
	}
}

/*
 * In the P2P states a device answers its peers but writes to none of them. Whether it still
 * writes to memory is its own choice; both kinds exist, so it is a setting.
 */
static bool may_dma(struct mock_device *mock, bool to_peer)
{
	if (!mock_bus_master(mock))
		return false;
	switch (mock->state) {
	case VFIO_DEVICE_STATE_RUNNING:
	case VFIO_DEVICE_STATE_PRE_COPY:
		return true;
	case VFIO_DEVICE_STATE_RUNNING_P2P:
	case VFIO_DEVICE_STATE_PRE_COPY_P2P:
		return !to_peer && READ_ONCE(mock->settings.p2p_ram_dma);
	default:
		return false;
	}
}

/* The one place where the device writes memory that is not its own. */
static int dma_write(struct mock_device *mock, u64 iova, const void *data, size_t length)
{
	int ret;

	lockdep_assert_held(&mock->dma_lock);
	/* Noted first, and even if it fails: it may have been done in part. */
	mock_log_write(mock, iova, length);
	ret = mock_has_iommu ? mock_iommu_write(mock, iova, data, length) :
			       vfio_dma_rw(&mock->vdev, iova, (void *)data, length, true);
	mock->stats.dma_writes++;
	if (ret) {
		mock->regs.status = -ret;
		mock->regs.failures++;
	}
	return ret;
}

static int doorbell_dma(struct mock_device *mock)
{
	const struct mock_regs *regs = &mock->regs;
	u32 words = DIV_ROUND_UP(regs->dma_bytes, 4);
	u32 *data;
	int ret;

	if (!regs->dma_bytes || regs->dma_bytes > MOCK_DMA_MAX)
		return -EINVAL;
	data = kvmalloc_array(words, 4, GFP_KERNEL);
	if (!data)
		return -ENOMEM;
	memset32(data, regs->dma_pattern, words);
	ret = dma_write(mock, regs->dma_addr, data, regs->dma_bytes);
	kvfree(data);
	return ret;
}

static void ring(struct mock_device *mock)
{
	struct mock_regs *regs = &mock->regs;
	int ret;

	regs->doorbells++;
	if (may_dma(mock, false)) {
		ret = doorbell_dma(mock);
		if (ret)
			regs->status = -ret;
		mock_interrupt(mock, MOCK_VECTOR_DOORBELL);
		return;
	}
	if (!mock_bus_master(mock))
		mock->stats.dma_no_master++;
	mock->stats.doorbells_refused++;
	regs->failures++;
	regs->status = EBUSY;
}

static void set_segment(struct mock_device *mock, u32 pages)
{
	struct mock_regs *regs = &mock->regs;
	struct mock_segment *segment;

	if (regs->segment >= MOCK_SEGMENTS || pages > SEGMENT_PAGES_MAX)
		return;
	segment = &mock->segments[regs->segment];
	regs->pages += pages;
	regs->pages -= segment->pages;
	segment->addr = regs->segment_addr;
	segment->pages = pages;
	regs->segment_pages = pages;
}

/* A write of 32 bits to a register of the engine, which must not change under its feet. */
static void write_engine(struct mock_device *mock, u32 offset, u32 value)
{
	struct mock_regs *regs = &mock->regs;

	if (regs->engine)
		return;
	switch (offset) {
	case offsetof(struct mock_regs, bytes):
		if (value >= MOCK_RECORD_MIN && value <= MOCK_RECORD_MAX && IS_ALIGNED(value, 8))
			regs->bytes = value;
		break;
	case offsetof(struct mock_regs, segment_pages):
		set_segment(mock, value);
		break;
	default:
		((u32 *)regs)[offset / 4] = value;
	}
}

#define WORDS_OF(field) \
	offsetof(struct mock_regs, field) ... offsetofend(struct mock_regs, field) - 1

void mock_register_write(struct mock_device *mock, u32 offset, u32 value)
{
	struct mock_regs *regs = &mock->regs;

	lockdep_assert_held(&mock->dma_lock);
	switch (offset) {
	case offsetof(struct mock_regs, doorbell):
		if (value == 1)
			ring(mock);
		break;
	case offsetof(struct mock_regs, status):
		regs->status = 0;
		break;
	case offsetof(struct mock_regs, engine):
		regs->engine = value & (MOCK_ENGINE_ON | MOCK_ENGINE_STAYS);
		mock_engine_wake(mock);
		break;
	case offsetof(struct mock_regs, rate):
		regs->rate = min(value, RATE_MAX);
		break;
	case WORDS_OF(stamp):
	case WORDS_OF(pattern):
	case WORDS_OF(bytes):
	case WORDS_OF(step):
	case WORDS_OF(segment):
	case WORDS_OF(segment_pages):
	case WORDS_OF(segment_addr):
	case WORDS_OF(peer_addr):
		write_engine(mock, offset, value);
		break;
	case WORDS_OF(dma_addr):
	case WORDS_OF(dma_bytes):
	case WORDS_OF(dma_pattern):
	case WORDS_OF(scratch):
		((u32 *)regs)[offset / 4] = value;
		break;
	}
}

/* Where record number `stamp` goes. */
static u64 record_addr(struct mock_device *mock, u64 stamp)
{
	u64 page = (stamp - 1) % mock->regs.pages * mock->regs.step % mock->regs.pages;
	u32 i;

	for (i = 0; i < MOCK_SEGMENTS; i++) {
		if (page < mock->segments[i].pages)
			return mock->segments[i].addr + (page << 12);
		page -= mock->segments[i].pages;
	}
	WARN_ON_ONCE(1);
	return 0;
}

static int write_record(struct mock_device *mock, u64 *record)
{
	u64 stamp = mock->regs.stamp + 1, lose = READ_ONCE(mock->settings.lose_dma);
	struct mock_regs *regs = &mock->regs;
	int ret = 0;
	u32 i;

	record[0] = stamp;
	for (i = 1; i < regs->bytes / 8; i++)
		record[i] = (stamp ^ regs->pattern) + i * MOCK_WORD_STEP;
	/* A fault: counted and not done, so that whoever checks memory can be seen to notice. */
	if (!lose || stamp % lose)
		ret = dma_write(mock, record_addr(mock, stamp), record, regs->bytes);
	if (ret)
		return ret;
	regs->stamp = stamp;
	if (stamp % regs->pages == 0)
		mock_interrupt(mock, MOCK_VECTOR_PASS);
	return 0;
}

static void write_peer(struct mock_device *mock)
{
	struct mock_regs *regs = &mock->regs;
	u64 stamp = regs->peer_stamp + 1;

	if (!regs->peer_addr || !may_dma(mock, true))
		return;
	if (!dma_write(mock, regs->peer_addr, &stamp, sizeof(stamp))) {
		regs->peer_stamp = stamp;
		return;
	}
	regs->peer_refused++;
	mock_interrupt(mock, MOCK_VECTOR_PEER);
}

/* How many records are due since the last tick. */
static u32 due(struct mock_device *mock)
{
	ktime_t now = ktime_get();
	u64 elapsed = min_t(u64, ktime_to_ns(ktime_sub(now, mock->ticked)), CREDIT_NS);
	u32 count;

	mock->ticked = now;
	mock->credit = min_t(u64, mock->credit + elapsed * mock->regs.rate,
			     (u64)CREDIT_NS * mock->regs.rate);
	count = min_t(u64, div_u64(mock->credit, NSEC_PER_SEC), BURST);
	mock->credit -= (u64)count * NSEC_PER_SEC;
	return count;
}

static bool engine_runs(struct mock_device *mock)
{
	return mock->open && (mock->regs.engine & MOCK_ENGINE_ON) && mock->regs.pages &&
	       mock->regs.rate && may_dma(mock, false);
}

void mock_tick(struct work_struct *work)
{
	struct mock_device *mock = container_of(to_delayed_work(work), struct mock_device, tick);
	u64 *record = kmalloc(MOCK_RECORD_MAX, GFP_KERNEL);
	bool again;
	u32 left;

	mutex_lock(&mock->dma_lock);
	again = engine_runs(mock);
	if (again && record) {
		left = due(mock);
		if (left)
			write_peer(mock);
		while (left-- && !write_record(mock, record))
			;
	}
	mutex_unlock(&mock->dma_lock);
	kfree(record);
	if (again)
		queue_delayed_work(mock_workqueue, &mock->tick, 1);
}

/* After anything that may let the engine run. */
void mock_engine_wake(struct mock_device *mock)
{
	lockdep_assert_held(&mock->dma_lock);
	if (engine_runs(mock))
		queue_delayed_work(mock_workqueue, &mock->tick, 0);
}

/* Remembers what a device that stops has in its mailbox. */
void mock_mailbox_settle(struct mock_device *mock)
{
	mock->mailbox_hash = xxh64(mock->mailbox, MOCK_MAILBOX_BYTES, 0);
}

/* Notices that a peer wrote to a device that stood still: such a write is lost. */
void mock_mailbox_check(struct mock_device *mock)
{
	u64 hash = xxh64(mock->mailbox, MOCK_MAILBOX_BYTES, 0);

	if (!mock_is_stopped(mock) || hash == mock->mailbox_hash)
		return;
	mock->stats.peer_late++;
	mock->mailbox_hash = hash;
}
