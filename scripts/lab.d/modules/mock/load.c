// SPDX-License-Identifier: GPL-2.0
/* Migration data that the mock device takes. */
#include <linux/fs.h>
#include <linux/pci_regs.h>
#include <linux/uaccess.h>
#include <linux/unaligned.h>
#include "stream.h"

#define HEADER sizeof(struct mock_chunk)

/* How long the body of such a chunk has to be at this place in the stream. */
static int body_bytes(struct mock_file *file, const struct mock_chunk *chunk)
{
	if (file->ended || file->head_seen == (chunk->type == MOCK_CHUNK_HEAD))
		return -EINVAL;
	switch (chunk->type) {
	case MOCK_CHUNK_HEAD:
		return sizeof(struct mock_head);
	case MOCK_CHUNK_BLOCK:
		return chunk->index < file->blocks ? mock_block_bytes(file, chunk->index) : -EINVAL;
	case MOCK_CHUNK_DEVICE:
		return sizeof(struct mock_snapshot);
	case MOCK_CHUNK_END:
		return sizeof(struct mock_end);
	default:
		return -EINVAL;
	}
}

static int check_header(struct mock_file *file)
{
	const struct mock_chunk *chunk = (struct mock_chunk *)file->chunk;
	int bytes;

	if (chunk->magic != MOCK_CHUNK_MAGIC)
		return -EBADMSG;
	if (chunk->version != MOCK_STREAM_VERSION)
		return -EPROTONOSUPPORT;
	bytes = body_bytes(file, chunk);
	if (bytes < 0)
		return bytes;
	return chunk->bytes == bytes ? 0 : -EBADMSG;
}

static int load_head(struct mock_file *file, const struct mock_head *head)
{
	const u8 *config = file->mock->config;
	u64 room = READ_ONCE(file->mock->settings.state_bytes);

	if (head->vendor != get_unaligned_le16(config + PCI_VENDOR_ID) ||
	    head->device != get_unaligned_le16(config + PCI_DEVICE_ID) ||
	    head->subvendor != get_unaligned_le16(config + PCI_SUBSYSTEM_VENDOR_ID) ||
	    head->subdevice != get_unaligned_le16(config + PCI_SUBSYSTEM_ID) ||
	    head->block_bytes != MOCK_BLOCK_BYTES)
		return -EINVAL;
	if (head->state_bytes > room)
		return -ENOSPC;
	file->head_seen = true;
	return mock_file_prepare(file, head->state_bytes);
}

static int load_end(struct mock_file *file, const struct mock_end *end)
{
	if (!file->device_seen || file->received != file->blocks)
		return -ENODATA;
	if (end->blocks != file->blocks || end->hash_sum != file->hash_sum)
		return -EBADMSG;
	file->ended = true;
	return 0;
}

static int load_chunk(struct mock_file *file)
{
	const struct mock_chunk *chunk = (struct mock_chunk *)file->chunk;
	const void *body = file->chunk + HEADER;

	if (mock_chunk_hash(file->chunk) != chunk->hash)
		return -EBADMSG;
	switch (chunk->type) {
	case MOCK_CHUNK_HEAD:
		return load_head(file, body);
	case MOCK_CHUNK_BLOCK:
		mock_file_note_block(file, chunk->index, chunk->hash);
		return 0;
	case MOCK_CHUNK_DEVICE:
		memcpy(&file->snapshot, body, sizeof(file->snapshot));
		file->device_seen = true;
		return 0;
	default:
		return load_end(file, body);
	}
}

/* Takes as many bytes as the current header or body lacks; returns how many. */
static ssize_t load_some(struct mock_file *file, const char __user *buf, u64 count)
{
	const struct mock_chunk *chunk = (struct mock_chunk *)file->chunk;
	u64 want = file->have < HEADER ? HEADER : HEADER + chunk->bytes;

	count = min(count, want - file->have);
	if (copy_from_user(file->chunk + file->have, buf, count))
		return -EFAULT;
	file->have += count;
	if (file->have == HEADER)
		file->error = check_header(file);
	if (!file->error && file->have >= HEADER && file->have == HEADER + chunk->bytes) {
		file->error = load_chunk(file);
		file->have = 0;
	}
	if (file->error)
		return file->error;
	mock_file_charge(file, count, READ_ONCE(file->mock->settings.load_rate));
	return count;
}

static ssize_t load_write_locked(struct mock_file *file, const char __user *buf, u64 count)
{
	if (!file->mock)
		return -ENODEV;
	if (file->error)
		return file->error;
	return load_some(file, buf, count);
}

/* The rate limit sleeps between pieces, without the lock. */
static ssize_t load_write(struct file *filp, const char __user *buf, size_t count, loff_t *pos)
{
	struct mock_file *file = filp->private_data;
	size_t done = 0;
	ssize_t ret;

	count = mock_file_short(file, count);
	while (done < count) {
		ret = mock_file_pace(file, filp);
		if (!ret) {
			mutex_lock(&file->lock);
			ret = load_write_locked(file, buf + done, count - done);
			mutex_unlock(&file->lock);
		}
		if (ret < 0)
			return done ?: ret;
		done += ret;
	}
	return done;
}

static const struct file_operations load_fops = {
	.owner = THIS_MODULE,
	.write = load_write,
	.release = mock_file_release,
};

int mock_load_open(struct mock_device *mock)
{
	return PTR_ERR_OR_ZERO(mock_file_open(mock, &load_fops, O_WRONLY));
}

/* Makes the loaded state the device's, if it is whole. */
int mock_load_finish(struct mock_file *file)
{
	struct mock_device *mock = file->mock;
	int ret;

	mutex_lock(&file->lock);
	ret = file->error;
	if (!ret && !file->ended) {
		bool empty = !file->head_seen && !file->have;

		if (!empty || !READ_ONCE(mock->settings.stateless))
			ret = -ENODATA;
	} else if (!ret) {
		mutex_lock(&mock->dma_lock);
		ret = mock_regs_load(mock, &file->snapshot);
		mutex_unlock(&mock->dma_lock);
	}
	mutex_unlock(&file->lock);
	return ret;
}
