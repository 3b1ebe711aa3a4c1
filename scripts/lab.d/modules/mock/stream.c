// SPDX-License-Identifier: GPL-2.0
/* What saving and loading have in common: the file, its pace, chunks. */
#include <linux/anon_inodes.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/hrtimer.h>
#include <linux/slab.h>
#include <linux/wait.h>
#include <linux/xxhash.h>
#include "stream.h"

/* A reader that was late by no more than this may catch up, so that a rate is kept on average. */
#define CATCH_UP_NS (50 * NSEC_PER_MSEC)

static void file_free(struct mock_file *file)
{
	kvfree(file->chunk);
	kvfree(file->hashes);
	bitmap_free(file->dirty);
	mutex_destroy(&file->lock);
	kvfree(file);
}

/* Opens a data file and makes it the device's. */
struct mock_file *mock_file_open(struct mock_device *mock, const struct file_operations *fops,
				 int flags)
{
	struct mock_file *file = kvzalloc(sizeof(*file), GFP_KERNEL);
	struct file *filp;

	lockdep_assert_held(&mock->state_lock);
	if (!file)
		return ERR_PTR(-ENOMEM);
	mutex_init(&file->lock);
	init_waitqueue_head(&file->wait);
	file->mock = mock;
	file->free_at = ktime_get();
	file->chunk = kvmalloc(sizeof(struct mock_chunk) + MOCK_BLOCK_BYTES, GFP_KERNEL);
	if (!file->chunk) {
		file_free(file);
		return ERR_PTR(-ENOMEM);
	}
	filp = anon_inode_getfile("ferry_mock_migration", fops, file, flags);
	if (IS_ERR(filp)) {
		file_free(file);
		return ERR_CAST(filp);
	}
	stream_open(filp->f_inode, filp);
	file->filp = filp;
	mock->file = file;
	return file;
}

/* Makes room to follow the blocks of a state of that size. */
int mock_file_prepare(struct mock_file *file, u64 state_bytes)
{
	file->state_bytes = state_bytes;
	file->blocks = DIV_ROUND_UP_ULL(state_bytes, MOCK_BLOCK_BYTES);
	file->hashes = kvcalloc(max(file->blocks, 1U), sizeof(*file->hashes), GFP_KERNEL);
	file->dirty = bitmap_zalloc(max(file->blocks, 1U), GFP_KERNEL);
	return file->hashes && file->dirty ? 0 : -ENOMEM;
}

/* Ends the device's data transfer, if there is one. Its user's descriptor stays, without use. */
void mock_file_drop(struct mock_device *mock)
{
	struct mock_file *file = mock->file;

	lockdep_assert_held(&mock->state_lock);
	if (!file)
		return;
	mock->file = NULL;
	mutex_lock(&file->lock);
	WRITE_ONCE(file->mock, NULL);
	mutex_unlock(&file->lock);
	wake_up_all(&file->wait);
	fput(file->filp);
}

/* By then nobody has it: the device let go, and the last descriptor is closed. */
int mock_file_release(struct inode *inode, struct file *filp)
{
	file_free(filp->private_data);
	return 0;
}

/* Waits until the rate limit lets more through, without a lock. */
int mock_file_pace(struct mock_file *file, struct file *filp)
{
	ktime_t wait = ktime_sub(READ_ONCE(file->free_at), ktime_get());
	int ret;

	if (wait <= 0)
		return 0;
	if (filp->f_flags & O_NONBLOCK)
		return -EAGAIN;
	ret = wait_event_interruptible_hrtimeout(file->wait, !READ_ONCE(file->mock), wait);
	return ret == -ETIME ? 0 : ret;
}

/* Notes what went through; `rate` is in bytes per second, 0 means no limit. */
void mock_file_charge(struct mock_file *file, u64 bytes, u64 rate)
{
	ktime_t from = ktime_sub_ns(ktime_get(), CATCH_UP_NS);

	lockdep_assert_held(&file->lock);
	if (!rate)
		return;
	if (ktime_after(file->free_at, from))
		from = file->free_at;
	WRITE_ONCE(file->free_at, ktime_add_ns(from, div64_u64(bytes * NSEC_PER_SEC, rate)));
}

/* How much of `count` bytes a call may move: a fault may want it short. */
u64 mock_file_short(struct mock_file *file, u64 count)
{
	u64 most = 0;

	mutex_lock(&file->lock);
	if (file->mock)
		most = READ_ONCE(file->mock->settings.short_io);
	mutex_unlock(&file->lock);
	return most ? min(count, most) : count;
}

u64 mock_chunk_hash(const u8 *chunk)
{
	const struct mock_chunk *head = (const struct mock_chunk *)chunk;
	u64 seed = xxh64(head, offsetof(struct mock_chunk, hash), 0);

	return xxh64(chunk + sizeof(*head), head->bytes, seed);
}

/* Bytes of the body of a block. */
u64 mock_block_bytes(struct mock_file *file, u32 index)
{
	return min_t(u64, MOCK_BLOCK_BYTES, file->state_bytes - (u64)index * MOCK_BLOCK_BYTES);
}

/* A copy of a block went through, and replaces the one before. */
void mock_file_note_block(struct mock_file *file, u32 index, u64 hash)
{
	hash = hash ?: 1;	/* 0 is none */
	if (!file->hashes[index])
		file->received++;
	file->hash_sum += hash - file->hashes[index];
	file->hashes[index] = hash;
}
