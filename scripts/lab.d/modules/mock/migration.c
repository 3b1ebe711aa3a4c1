// SPDX-License-Identifier: GPL-2.0
/* Migration states of the mock device and the arcs between them (enum vfio_device_mig_state). */
#include <linux/delay.h>
#include <linux/file.h>
#include "stream.h"

#define ARC(from, to) \
	(VFIO_DEVICE_STATE_##from << 8 | VFIO_DEVICE_STATE_##to)

/* Numbers arcs over all devices. */
static atomic64_t arc_number;

/*
 * Goes to a state. DMA is done under dma_lock, so when this returns from a state that allowed it,
 * none is under way.
 */
static void enter(struct mock_device *mock, enum vfio_device_mig_state next)
{
	bool stopped;

	lockdep_assert_held(&mock->state_lock);
	mutex_lock(&mock->dma_lock);
	stopped = mock_is_stopped(mock);
	mock_mailbox_check(mock);
	mock->state = next;
	if (!stopped && mock_is_stopped(mock))
		mock_mailbox_settle(mock);
	mock_engine_wake(mock);
	mutex_unlock(&mock->dma_lock);
}

static int arc_fault(struct mock_device *mock, int from, int to, bool *to_error)
{
	struct mock_arc_fault *fault = &mock->arc_fault;
	bool hit;

	spin_lock(&mock->settings_lock);
	hit = fault->times && (fault->from < 0 || fault->from == from) &&
	      (fault->to < 0 || fault->to == to);
	if (hit)
		fault->times--;
	*to_error = hit && fault->to_error;
	spin_unlock(&mock->settings_lock);
	return hit ? -EIO : 0;
}

/* Loads what was written; the mailbox came with it, so it is what the stopped device has. */
static int finish_load(struct mock_device *mock)
{
	int ret = mock_load_finish(mock->file);

	if (ret)
		return ret;
	mock_file_drop(mock);
	mutex_lock(&mock->dma_lock);
	mock_mailbox_settle(mock);
	mutex_unlock(&mock->dma_lock);
	return 0;
}

/* What an arc needs to have done before the state changes. Returns 1 if it opened a file. */
static int before_arc(struct mock_device *mock, int arc)
{
	int ret;

	switch (arc) {
	case ARC(RUNNING, PRE_COPY):
	case ARC(RUNNING_P2P, PRE_COPY_P2P):
		ret = mock_save_open(mock);
		return ret ?: 1;
	case ARC(STOP, STOP_COPY):
		ret = mock_save_open(mock);
		if (!ret)
			mock_save_finish(mock->file);
		return ret ?: 1;
	case ARC(STOP, RESUMING):
		ret = mock_load_open(mock);
		return ret ?: 1;
	case ARC(RESUMING, STOP):
		return finish_load(mock);
	case ARC(STOP_COPY, STOP):
	case ARC(PRE_COPY, RUNNING):
	case ARC(PRE_COPY_P2P, RUNNING_P2P):
		mock_file_drop(mock);
		return 0;
	default:
		return 0;
	}
}

/* One arc. Returns 1 if it opened a file, 0, or why it failed; then the state is as it was. */
static int do_arc(struct mock_device *mock, enum vfio_device_mig_state next)
{
	int arc = mock->state << 8 | next, ret;
	bool to_error;

	msleep_interruptible(READ_ONCE(mock->settings.arc_delay_ms));
	ret = arc_fault(mock, mock->state, next, &to_error);
	if (to_error) {
		mock_file_drop(mock);
		enter(mock, VFIO_DEVICE_STATE_ERROR);
	}
	if (ret)
		return ret;
	ret = before_arc(mock, arc);
	if (ret < 0)
		return ret;
	enter(mock, next);
	/* The stream that began in precopy goes on, with what only a stopped device can give. */
	if (arc == ARC(PRE_COPY, STOP_COPY) || arc == ARC(PRE_COPY_P2P, STOP_COPY))
		mock_save_finish(mock->file);
	return ret;
}

static void note_arc(struct mock_device *mock, u8 from, u8 to, int error)
{
	mock->arcs[mock->arcs_done++ % MOCK_ARCS] = (struct mock_arc) {
		.number = atomic64_inc_return(&arc_number),
		.ns = ktime_get_ns(),
		.from = from,
		.to = to,
		.error = error,
	};
}

static struct file *set_state(struct mock_device *mock, enum vfio_device_mig_state target)
{
	enum vfio_device_mig_state next, from;
	int ret;

	while (mock->state != target) {
		from = mock->state;
		/* The core takes it for a driver's mistake to ask what is next. */
		if (from == VFIO_DEVICE_STATE_ERROR)
			return ERR_PTR(-EINVAL);
		ret = vfio_mig_get_next_state(&mock->vdev, from, target, &next);
		if (ret)
			return ERR_PTR(ret);
		ret = do_arc(mock, next);
		note_arc(mock, from, next, min(ret, 0));
		if (ret < 0)
			return ERR_PTR(ret);
		/* Only the last arc of a way opens a file (the table of states sees to it). */
		if (ret)
			return get_file(mock->file->filp);
	}
	return NULL;
}

static struct file *mock_set_state(struct vfio_device *vdev, enum vfio_device_mig_state target)
{
	struct mock_device *mock = to_mock(vdev);
	struct file *filp;

	mutex_lock(&mock->state_lock);
	filp = set_state(mock, target);
	mutex_unlock(&mock->state_lock);
	return filp;
}

static int mock_get_state(struct vfio_device *vdev, enum vfio_device_mig_state *state)
{
	struct mock_device *mock = to_mock(vdev);

	mutex_lock(&mock->state_lock);
	*state = mock->state;
	mutex_unlock(&mock->state_lock);
	return 0;
}

static int mock_data_size(struct vfio_device *vdev, unsigned long *bytes)
{
	struct mock_device *mock = to_mock(vdev);

	mutex_lock(&mock->state_lock);
	if (READ_ONCE(mock->settings.stateless))
		*bytes = 0;
	else if (mock->file && mock->state != VFIO_DEVICE_STATE_RESUMING)
		*bytes = mock_save_left(mock->file);
	else
		*bytes = mock_save_whole(mock);
	mutex_unlock(&mock->state_lock);
	return 0;
}

const struct vfio_migration_ops mock_migration_ops = {
	.migration_set_state = mock_set_state,
	.migration_get_state = mock_get_state,
	.migration_get_data_size = mock_data_size,
};

/* The device breaks down: only a reset helps. */
void mock_break(struct mock_device *mock)
{
	mutex_lock(&mock->state_lock);
	mock_file_drop(mock);
	enter(mock, VFIO_DEVICE_STATE_ERROR);
	mutex_unlock(&mock->state_lock);
}

/* Everything but configuration space, the DMA log and the interrupts as after power-on. */
void mock_state_reset(struct mock_device *mock)
{
	mutex_lock(&mock->state_lock);
	mock_file_drop(mock);
	mutex_lock(&mock->dma_lock);
	mock_mailbox_check(mock);
	mock_regs_reset(mock);
	mock->state = VFIO_DEVICE_STATE_RUNNING;
	mutex_unlock(&mock->dma_lock);
	mutex_unlock(&mock->state_lock);
}

int mock_reset(struct mock_device *mock)
{
	if (mock_fault(mock, &mock->settings.fail_reset))
		return -EIO;
	mock_state_reset(mock);
	return 0;
}
