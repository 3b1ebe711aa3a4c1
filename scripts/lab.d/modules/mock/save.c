// SPDX-License-Identifier: GPL-2.0
/* Migration data that the mock device gives. */
#include <linux/bitmap.h>
#include <linux/fs.h>
#include <linux/pci_regs.h>
#include <linux/random.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>
#include "stream.h"

#define CHUNK(type) (sizeof(struct mock_chunk) + sizeof(type))

/* Puts header and hash around a body that is already in place. */
static int emit_chunk(struct mock_file *file, u16 type, u32 index, u32 bytes)
{
	struct mock_chunk *head = (struct mock_chunk *)file->chunk;

	*head = (struct mock_chunk) {
		.magic = MOCK_CHUNK_MAGIC,
		.version = MOCK_STREAM_VERSION,
		.type = type,
		.bytes = bytes,
		.index = index,
	};
	head->hash = mock_chunk_hash(file->chunk);
	if (type == MOCK_CHUNK_BLOCK)
		mock_file_note_block(file, index, head->hash);
	if (mock_fault(file->mock, &file->mock->settings.corrupt_state))
		file->chunk[sizeof(*head) + bytes / 2] ^= 0x10;
	file->have = sizeof(*head) + bytes;
	file->at = 0;
	return file->have;
}

static int emit_head(struct mock_file *file)
{
	struct mock_head *head = (struct mock_head *)(file->chunk + sizeof(struct mock_chunk));
	const u8 *config = file->mock->config;

	*head = (struct mock_head) {
		.vendor = get_unaligned_le16(config + PCI_VENDOR_ID),
		.device = get_unaligned_le16(config + PCI_DEVICE_ID),
		.subvendor = get_unaligned_le16(config + PCI_SUBSYSTEM_VENDOR_ID),
		.subdevice = get_unaligned_le16(config + PCI_SUBSYSTEM_ID),
		.block_bytes = MOCK_BLOCK_BYTES,
		.state_bytes = file->state_bytes,
	};
	file->head_done = true;
	return emit_chunk(file, MOCK_CHUNK_HEAD, 0, sizeof(*head));
}

/* Each copy of a block is different, so that a stale one in its place is noticed. */
static int emit_block(struct mock_file *file, u32 index)
{
	u64 word = file->mock->seed ^ index ^ (++file->serial << 32);
	u64 bytes = mock_block_bytes(file, index);
	u8 *body = file->chunk + sizeof(struct mock_chunk);
	u64 at;

	for (at = 0; at < bytes; at += 8) {
		word = word * 6364136223846793005ULL + 1442695040888963407ULL;
		put_unaligned_le64(word, body + at);
	}
	return emit_chunk(file, MOCK_CHUNK_BLOCK, index, bytes);
}

/* How many blocks the running device has changed since it was last asked, by its setting. */
static void note_dirty(struct mock_file *file)
{
	u64 rate = READ_ONCE(file->mock->settings.precopy_dirty_rate);
	ktime_t now = ktime_get();
	u64 ms = min_t(u64, ktime_ms_delta(now, file->dirtied), MSEC_PER_SEC);

	if (file->final || !file->next_block || !ms)
		return;
	file->dirtied = now;
	file->dirty_bytes += div_u64(rate * ms, MSEC_PER_SEC);
	while (file->dirty_bytes >= MOCK_BLOCK_BYTES && file->dirty_count < file->next_block) {
		file->dirty_bytes -= MOCK_BLOCK_BYTES;
		file->dirty_next %= file->next_block;
		if (!test_and_set_bit(file->dirty_next++, file->dirty))
			file->dirty_count++;
	}
	file->dirty_bytes %= MOCK_BLOCK_BYTES;
}

static int emit_dirty_block(struct mock_file *file)
{
	u32 index = find_first_bit(file->dirty, file->blocks);

	clear_bit(index, file->dirty);
	file->dirty_count--;
	file->again = true;
	return emit_block(file, index);
}

static int emit_device(struct mock_file *file)
{
	memcpy(file->chunk + sizeof(struct mock_chunk), &file->snapshot, sizeof(file->snapshot));
	return emit_chunk(file, MOCK_CHUNK_DEVICE, 0, sizeof(file->snapshot));
}

static int emit_end(struct mock_file *file)
{
	struct mock_end *end = (struct mock_end *)(file->chunk + sizeof(struct mock_chunk));

	end->blocks = file->blocks;
	end->hash_sum = file->hash_sum;
	return emit_chunk(file, MOCK_CHUNK_END, 0, sizeof(*end));
}

/* Makes the next chunk. 0: the stream ends here; -ENOMSG: for now. */
static int next_chunk(struct mock_file *file)
{
	u32 limit = file->final ? file->blocks : file->initial_blocks;

	file->again = false;
	if (READ_ONCE(file->mock->settings.stateless))
		return file->final ? 0 : -ENOMSG;
	if (!file->head_done)
		return emit_head(file);
	if (file->next_block < limit)
		return emit_block(file, file->next_block++);
	note_dirty(file);
	if (file->dirty_count)
		return emit_dirty_block(file);
	if (!file->final)
		return -ENOMSG;
	switch (file->tail++) {
	case 0:
		return emit_device(file);
	case 1:
		return emit_end(file);
	default:
		file->tail = 2;
		return 0;
	}
}

/* Faults in front of a read: 1 if it may go on. */
static int read_faults(struct mock_file *file, u64 *most)
{
	const struct mock_settings *settings = &file->mock->settings;
	u64 cut = READ_ONCE(settings->cut_state);

	if (!file->final && file->enomsg < READ_ONCE(settings->enomsg_run)) {
		file->enomsg++;
		return -ENOMSG;
	}
	file->enomsg = 0;
	if (cut && file->total >= cut)
		return 0;
	if (cut)
		*most = min(*most, cut - file->total);
	return 1;
}

static ssize_t save_read_locked(struct mock_file *file, char __user *buf, u64 count)
{
	int ret;

	if (!file->mock)
		return -ENODEV;
	ret = read_faults(file, &count);
	if (ret <= 0)
		return ret;
	if (file->at == file->have) {
		ret = next_chunk(file);
		if (ret <= 0)
			return ret;
	}
	count = min_t(u64, count, file->have - file->at);
	if (copy_to_user(buf, file->chunk + file->at, count))
		return -EFAULT;
	file->at += count;
	file->total += count;
	mock_file_charge(file, count, READ_ONCE(file->mock->settings.save_rate));
	return count;
}

static ssize_t save_read(struct file *filp, char __user *buf, size_t count, loff_t *pos)
{
	struct mock_file *file = filp->private_data;
	ssize_t ret = mock_file_pace(file, filp);

	if (ret || !count)
		return ret;
	count = mock_file_short(file, count);
	mutex_lock(&file->lock);
	ret = save_read_locked(file, buf, count);
	mutex_unlock(&file->lock);
	return ret;
}

/* Bytes of the chunks of blocks `from` to before `to`. */
static u64 blocks_bytes(u64 state_bytes, u32 from, u32 to)
{
	u64 first = (u64)from * MOCK_BLOCK_BYTES;
	u64 last = min((u64)to * MOCK_BLOCK_BYTES, state_bytes);

	if (from >= to)
		return 0;
	return (u64)(to - from) * sizeof(struct mock_chunk) + last - first;
}

static void precopy_bytes(struct mock_file *file, u64 *initial, u64 *dirty)
{
	u64 unread = file->have - file->at;

	note_dirty(file);
	*initial = blocks_bytes(file->state_bytes, file->next_block, file->initial_blocks);
	if (!file->head_done)
		*initial += CHUNK(struct mock_head);
	*dirty = (u64)file->dirty_count * (sizeof(struct mock_chunk) + MOCK_BLOCK_BYTES);
	*(file->again ? dirty : initial) += unread;
}

static long save_ioctl(struct file *filp, unsigned int cmd, unsigned long arg)
{
	const size_t minsz = offsetofend(struct vfio_precopy_info, dirty_bytes);
	struct mock_file *file = filp->private_data;
	struct vfio_precopy_info info = {};
	int ret = 0;

	if (cmd != VFIO_MIG_GET_PRECOPY_INFO)
		return -ENOTTY;
	if (copy_from_user(&info, (void __user *)arg, offsetofend(struct vfio_precopy_info, flags)))
		return -EFAULT;
	if (info.argsz < minsz)
		return -EINVAL;
	mutex_lock(&file->lock);
	if (!file->mock)
		ret = -ENODEV;
	else if (file->final)
		ret = -EINVAL;
	else if (!READ_ONCE(file->mock->settings.stateless))
		precopy_bytes(file, &info.initial_bytes, &info.dirty_bytes);
	mutex_unlock(&file->lock);
	if (ret)
		return ret;
	return copy_to_user((void __user *)arg, &info, minsz) ? -EFAULT : 0;
}

static const struct file_operations save_fops = {
	.owner = THIS_MODULE,
	.read = save_read,
	.unlocked_ioctl = save_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.release = mock_file_release,
};

/* Starts to give the device's state; it goes on running until mock_save_finish(). */
int mock_save_open(struct mock_device *mock)
{
	const struct mock_settings *settings = &mock->settings;
	struct mock_file *file = mock_file_open(mock, &save_fops, O_RDONLY);
	int ret;

	if (IS_ERR(file))
		return PTR_ERR(file);
	ret = mock_file_prepare(file, READ_ONCE(settings->state_bytes));
	if (ret) {
		mock_file_drop(mock);
		return ret;
	}
	file->initial_blocks = div_u64(file->blocks * READ_ONCE(settings->precopy_percent), 100);
	file->dirtied = ktime_get();
	/* A block of another migration must not pass for one of this. */
	file->serial = get_random_u32();
	return 0;
}

/* The device stands still: takes the part of its state that only then can be had. */
void mock_save_finish(struct mock_file *file)
{
	mutex_lock(&file->lock);
	note_dirty(file);
	file->final = true;
	mutex_lock(&file->mock->dma_lock);
	mock_regs_save(file->mock, &file->snapshot);
	mutex_unlock(&file->mock->dma_lock);
	mutex_unlock(&file->lock);
}

/* Bytes of the stream that are still to come if the device stops now. */
u64 mock_save_left(struct mock_file *file)
{
	u64 left;

	mutex_lock(&file->lock);
	note_dirty(file);
	left = file->have - file->at;
	left += blocks_bytes(file->state_bytes, file->next_block, file->blocks);
	left += (u64)file->dirty_count * (sizeof(struct mock_chunk) + MOCK_BLOCK_BYTES);
	if (!file->head_done)
		left += CHUNK(struct mock_head);
	if (file->tail < 1)
		left += CHUNK(struct mock_snapshot);
	if (file->tail < 2)
		left += CHUNK(struct mock_end);
	mutex_unlock(&file->lock);
	return left;
}

/* Bytes of the stream of a device of which nothing was read yet. */
u64 mock_save_whole(struct mock_device *mock)
{
	u64 state_bytes = READ_ONCE(mock->settings.state_bytes);

	return blocks_bytes(state_bytes, 0, DIV_ROUND_UP_ULL(state_bytes, MOCK_BLOCK_BYTES)) +
	       CHUNK(struct mock_head) + CHUNK(struct mock_snapshot) + CHUNK(struct mock_end);
}
