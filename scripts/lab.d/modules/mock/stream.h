/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Migration data of the mock device.
 *
 * The stream is a sequence of chunks, each a struct mock_chunk and its body, little-endian:
 *
 *   HEAD      struct mock_head: what kind of device this is the state of
 *   BLOCK...  64 KiB of opaque state each (the last may be shorter), in any order; one that
 *             comes again replaces what came before
 *   DEVICE    struct mock_snapshot
 *   END       struct mock_end: how many blocks there are, and the sum of their last hashes
 *
 * A chunk's hash is XXH64 of its body, seeded with XXH64 of its header up to the hash. So a bit
 * that flips, a block that is missing, stale or in another's place, and an end that comes early
 * are all refused by the device that loads it.
 *
 * Opaque state is made when it is read and forgotten when it was checked: a GiB of it needs no
 * memory.
 */
#ifndef FERRY_MOCK_STREAM_H
#define FERRY_MOCK_STREAM_H

#include "mock.h"

#define MOCK_CHUNK_MAGIC	0x43564d46	/* "FMVC" */
#define MOCK_STREAM_VERSION	1
#define MOCK_BLOCK_BYTES	65536

enum mock_chunk_type {
	MOCK_CHUNK_HEAD = 1,
	MOCK_CHUNK_BLOCK,
	MOCK_CHUNK_DEVICE,
	MOCK_CHUNK_END,
};

struct mock_chunk {
	u32 magic;
	u16 version;
	u16 type;
	u32 bytes;		/* of the body */
	u32 index;		/* of a block, else 0 */
	u64 hash;
};

struct mock_head {
	u16 vendor, device, subvendor, subdevice;
	u32 block_bytes;
	u32 _reserved;
	u64 state_bytes;
};

struct mock_snapshot {
	struct mock_regs regs;
	struct mock_segment segments[MOCK_SEGMENTS];
	u64 seed;
	u8 mailbox[MOCK_MAILBOX_BYTES];
};

struct mock_end {
	u64 blocks;
	u64 hash_sum;
};

/*
 * One data file descriptor. The device holds a reference to the file until it drops it; from then
 * on `mock` is NULL and the descriptor only says ENODEV.
 */
struct mock_file {
	struct mutex lock;
	struct mock_device *mock;
	struct file *filp;
	wait_queue_head_t wait;		/* for `mock` to go, while a rate limit sleeps */
	ktime_t free_at;		/* when the rate limit lets more through */

	u8 *chunk;			/* being read, or being put together */
	u32 have;			/* bytes of it that are there */
	u64 state_bytes;
	u32 blocks;
	u64 *hashes;			/* last hash of each block, 0: none yet */
	u64 hash_sum;			/* over all */
	struct mock_snapshot snapshot;

	/* Saving */
	bool final;			/* the device stands still, the snapshot is taken */
	bool head_done;
	int tail;			/* which chunk comes after the blocks */
	u32 at;				/* bytes of the chunk that were read */
	bool again;			/* it is a block that was read before */
	u32 next_block;
	u32 initial_blocks;		/* those before it can be read while the device runs */
	u64 serial;			/* makes each copy of a block different */
	unsigned long *dirty;		/* blocks to be read again */
	u32 dirty_count, dirty_next;
	u64 dirty_bytes;		/* not yet a whole block */
	ktime_t dirtied;
	u64 enomsg;			/* how often in a row */
	u64 total;			/* bytes read */

	/* Loading */
	int error;			/* sticky: the stream was refused */
	u32 received;			/* blocks of which there is at least one copy */
	bool head_seen, device_seen, ended;
};

/* stream.c */
struct mock_file *mock_file_open(struct mock_device *mock, const struct file_operations *fops,
				 int flags);
int mock_file_prepare(struct mock_file *file, u64 state_bytes);
void mock_file_drop(struct mock_device *mock);
int mock_file_release(struct inode *inode, struct file *filp);
int mock_file_pace(struct mock_file *file, struct file *filp);
void mock_file_charge(struct mock_file *file, u64 bytes, u64 rate);
u64 mock_file_short(struct mock_file *file, u64 count);
u64 mock_chunk_hash(const u8 *chunk);
u64 mock_block_bytes(struct mock_file *file, u32 index);
void mock_file_note_block(struct mock_file *file, u32 index, u64 hash);

/* save.c */
int mock_save_open(struct mock_device *mock);
void mock_save_finish(struct mock_file *file);
u64 mock_save_left(struct mock_file *file);
u64 mock_save_whole(struct mock_device *mock);

/* load.c */
int mock_load_open(struct mock_device *mock);
int mock_load_finish(struct mock_file *file);

/* engine.c; callers hold dma_lock */
void mock_regs_save(struct mock_device *mock, struct mock_snapshot *snapshot);
int mock_regs_load(struct mock_device *mock, const struct mock_snapshot *snapshot);

#endif
