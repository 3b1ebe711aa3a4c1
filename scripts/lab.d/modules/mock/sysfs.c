// SPDX-License-Identifier: GPL-2.0
/*
 * What a test sets and sees of a device, in its folder of sysfs: `config` (what it can do; taken
 * over when it is opened next, but for rates), `faults` (at once), `stats`. README.md has the list.
 */
#include <linux/ctype.h>
#include <linux/log2.h>
#include <linux/string.h>
#include <linux/sysfs.h>
#include "mock.h"

const char * const mock_state_names[] = {
	"ERROR", "STOP", "RUNNING", "STOP_COPY", "RESUMING", "RUNNING_P2P", "PRE_COPY",
	"PRE_COPY_P2P",
};

struct number {
	struct device_attribute attr;
	size_t at;			/* in struct mock_settings */
	u64 min, max;
	bool (*is_legal)(u64 value);
};

static u64 *setting(struct device *dev, struct number *number)
{
	struct mock_device *mock = dev_get_drvdata(dev);

	return (u64 *)((u8 *)&mock->settings + number->at);
}

static ssize_t number_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct number *number = container_of(attr, struct number, attr);

	return sysfs_emit(buf, "%llu\n", READ_ONCE(*setting(dev, number)));
}

static ssize_t number_store(struct device *dev, struct device_attribute *attr, const char *buf,
			    size_t count)
{
	struct number *number = container_of(attr, struct number, attr);
	struct mock_device *mock = dev_get_drvdata(dev);
	u64 value;
	int ret = kstrtoull(buf, 0, &value);

	if (ret)
		return ret;
	if (value < number->min || value > number->max)
		return -ERANGE;
	if (number->is_legal && !number->is_legal(value))
		return -EINVAL;
	spin_lock(&mock->settings_lock);
	WRITE_ONCE(*setting(dev, number), value);
	spin_unlock(&mock->settings_lock);
	return count;
}

#define NUMBER_CHECKED(_name, _min, _max, _is_legal)				\
	static struct number number_##_name = {					\
		.attr = __ATTR(_name, 0644, number_show, number_store),		\
		.at = offsetof(struct mock_settings, _name),			\
		.min = _min,							\
		.max = _max,							\
		.is_legal = _is_legal,						\
	}
#define NUMBER(_name, _min, _max) NUMBER_CHECKED(_name, _min, _max, NULL)

/* P2P and PRE_COPY come with STOP_COPY only. */
static bool legal_flags(u64 value)
{
	return !value || (value & VFIO_MIGRATION_STOP_COPY);
}

static bool legal_page(u64 value)
{
	return is_power_of_2(value);
}

NUMBER_CHECKED(migration_flags, 0, 7, legal_flags);
NUMBER(dirty_log, 0, 1);
NUMBER(state_bytes, 0, MOCK_STATE_MAX);
NUMBER(precopy_percent, 0, 100);
NUMBER(pci_device, 0, U16_MAX);
NUMBER(pci_subdevice, 0, U16_MAX);
NUMBER_CHECKED(log_page_min, 1, 1ULL << 40, legal_page);
NUMBER_CHECKED(log_page_max, 1, 1ULL << 40, legal_page);
NUMBER(log_ranges, 1, MOCK_RANGES);
NUMBER(log_bytes, 0, U64_MAX);
NUMBER(log_ranges_refused, 0, 1);
NUMBER(p2p_ram_dma, 0, 1);
NUMBER(save_rate, 0, U64_MAX);
NUMBER(load_rate, 0, U64_MAX);
NUMBER(precopy_dirty_rate, 0, 1ULL << 40);
NUMBER(arc_delay_ms, 0, 60000);

static struct attribute *config_attrs[] = {
	&number_migration_flags.attr.attr,
	&number_dirty_log.attr.attr,
	&number_state_bytes.attr.attr,
	&number_precopy_percent.attr.attr,
	&number_pci_device.attr.attr,
	&number_pci_subdevice.attr.attr,
	&number_log_page_min.attr.attr,
	&number_log_page_max.attr.attr,
	&number_log_ranges.attr.attr,
	&number_log_bytes.attr.attr,
	&number_log_ranges_refused.attr.attr,
	&number_p2p_ram_dma.attr.attr,
	&number_save_rate.attr.attr,
	&number_load_rate.attr.attr,
	&number_precopy_dirty_rate.attr.attr,
	&number_arc_delay_ms.attr.attr,
	NULL
};

NUMBER(fail_log_start, 0, U64_MAX);
NUMBER(fail_report, 0, U64_MAX);
NUMBER(fail_report_skip, 0, U64_MAX);
NUMBER(fail_reset, 0, U64_MAX);
NUMBER(lose_log, 0, U64_MAX);
NUMBER(lose_dma, 0, U64_MAX);
NUMBER(enomsg_run, 0, U64_MAX);
NUMBER(short_io, 0, U64_MAX);
NUMBER(corrupt_state, 0, U64_MAX);
NUMBER(cut_state, 0, U64_MAX);
NUMBER(stateless, 0, 1);

static int state_number(const char *name)
{
	return strcmp(name, "*") ? match_string(mock_state_names, ARRAY_SIZE(mock_state_names), name) : -1;
}

/* "FROM TO TIMES stay|error": states by name, * for any. TIMES 0: no fault. */
static ssize_t fail_arc_store(struct device *dev, struct device_attribute *attr, const char *buf,
			      size_t count)
{
	struct mock_device *mock = dev_get_drvdata(dev);
	char from[16], to[16], outcome[8];
	struct mock_arc_fault fault;

	if (sscanf(buf, "%15s %15s %llu %7s", from, to, &fault.times, outcome) != 4)
		return -EINVAL;
	fault.from = state_number(from);
	fault.to = state_number(to);
	fault.to_error = !strcmp(outcome, "error");
	if (fault.from < -1 || fault.to < -1 || (!fault.to_error && strcmp(outcome, "stay")))
		return -EINVAL;
	spin_lock(&mock->settings_lock);
	mock->arc_fault = fault;
	spin_unlock(&mock->settings_lock);
	return count;
}

static const char *state_name(int number)
{
	return number < 0 ? "*" : mock_state_names[number];
}

static ssize_t fail_arc_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct mock_device *mock = dev_get_drvdata(dev);
	struct mock_arc_fault fault;

	spin_lock(&mock->settings_lock);
	fault = mock->arc_fault;
	spin_unlock(&mock->settings_lock);
	return sysfs_emit(buf, "%s %s %llu %s\n", state_name(fault.from), state_name(fault.to),
			  fault.times, fault.to_error ? "error" : "stay");
}
static DEVICE_ATTR_RW(fail_arc);

/* Any write: the device breaks down and needs a reset. */
static ssize_t break_now_store(struct device *dev, struct device_attribute *attr, const char *buf,
			       size_t count)
{
	mock_break(dev_get_drvdata(dev));
	return count;
}
static DEVICE_ATTR_WO(break_now);

/* Any write: the error interrupt is raised; ENOTCONN if nobody listens. */
static ssize_t raise_error_store(struct device *dev, struct device_attribute *attr,
				 const char *buf, size_t count)
{
	return mock_signal_error(dev_get_drvdata(dev)) ? count : -ENOTCONN;
}
static DEVICE_ATTR_WO(raise_error);

static struct attribute *fault_attrs[] = {
	&number_fail_log_start.attr.attr,
	&number_fail_report.attr.attr,
	&number_fail_report_skip.attr.attr,
	&number_fail_reset.attr.attr,
	&number_lose_log.attr.attr,
	&number_lose_dma.attr.attr,
	&number_enomsg_run.attr.attr,
	&number_short_io.attr.attr,
	&number_corrupt_state.attr.attr,
	&number_cut_state.attr.attr,
	&number_stateless.attr.attr,
	&dev_attr_fail_arc.attr,
	&dev_attr_break_now.attr,
	&dev_attr_raise_error.attr,
	NULL
};

struct counter {
	struct device_attribute attr;
	size_t at;			/* in struct mock_device */
};

static ssize_t counter_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct counter *counter = container_of(attr, struct counter, attr);
	struct mock_device *mock = dev_get_drvdata(dev);
	u64 value;

	mutex_lock(&mock->dma_lock);
	mock_mailbox_check(mock);
	value = *(u64 *)((u8 *)mock + counter->at);
	mutex_unlock(&mock->dma_lock);
	return sysfs_emit(buf, "%llu\n", value);
}

#define COUNTER(_name, _where)							\
	static struct counter counter_##_name = {					\
		.attr = __ATTR(_name, 0444, counter_show, NULL),			\
		.at = offsetof(struct mock_device, _where._name),		\
	}

COUNTER(dma_writes, stats);
COUNTER(dma_no_master, stats);
COUNTER(doorbells_refused, stats);
COUNTER(reports, stats);
COUNTER(logged, stats);
COUNTER(lost, stats);
COUNTER(interrupts, stats);
COUNTER(peer_late, stats);
COUNTER(stamp, regs);
COUNTER(peer_stamp, regs);
COUNTER(peer_refused, regs);

static ssize_t state_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct mock_device *mock = dev_get_drvdata(dev);
	enum vfio_device_mig_state state;

	mutex_lock(&mock->state_lock);
	state = mock->state;
	mutex_unlock(&mock->state_lock);
	return sysfs_emit(buf, "%s\n", mock_state_names[state]);
}
static DEVICE_ATTR_RO(state);

/* The last arcs, oldest first: number over all devices, nanoseconds, from, to, 0 or -errno. */
static ssize_t arcs_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct mock_device *mock = dev_get_drvdata(dev);
	int length = 0;
	u64 i;

	mutex_lock(&mock->state_lock);
	for (i = mock->arcs_done - min_t(u64, mock->arcs_done, MOCK_ARCS); i < mock->arcs_done; i++) {
		struct mock_arc *arc = &mock->arcs[i % MOCK_ARCS];

		length += sysfs_emit_at(buf, length, "%llu %llu %s %s %d\n", arc->number, arc->ns,
					mock_state_names[arc->from], mock_state_names[arc->to],
					arc->error);
	}
	mutex_unlock(&mock->state_lock);
	return length;
}
static DEVICE_ATTR_RO(arcs);

static struct attribute *stat_attrs[] = {
	&counter_dma_writes.attr.attr,
	&counter_dma_no_master.attr.attr,
	&counter_doorbells_refused.attr.attr,
	&counter_reports.attr.attr,
	&counter_logged.attr.attr,
	&counter_lost.attr.attr,
	&counter_interrupts.attr.attr,
	&counter_peer_late.attr.attr,
	&counter_stamp.attr.attr,
	&counter_peer_stamp.attr.attr,
	&counter_peer_refused.attr.attr,
	&dev_attr_state.attr,
	&dev_attr_arcs.attr,
	NULL
};

static const struct attribute_group config_group = { .name = "config", .attrs = config_attrs };
static const struct attribute_group fault_group = { .name = "faults", .attrs = fault_attrs };
static const struct attribute_group stat_group = { .name = "stats", .attrs = stat_attrs };

const struct attribute_group *mock_groups[] = {
	&config_group,
	&fault_group,
	&stat_group,
	NULL
};
