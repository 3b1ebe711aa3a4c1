// SPDX-License-Identifier: GPL-2.0
/* Parameters of the module; both can be changed while it is loaded (/sys/module/tun/parameters). */
#include <linux/module.h>
#include <linux/string.h>

#include "vnet_hash.h"

static unsigned int generation = 12;
static unsigned int defects;

static const char *const defect_names[] = { "automq", "key", "single_queue", "tunnels" };

unsigned int vnet_hash_generation(void)
{
	return READ_ONCE(generation);
}

unsigned int vnet_hash_defects(void)
{
	return READ_ONCE(defects);
}

static int generation_set(const char *text, const struct kernel_param *param)
{
	unsigned int number;
	int ret = kstrtouint(text, 0, &number);

	if (ret)
		return ret;
	if (number != 0 && number != 5 && number != 12)
		return -EINVAL;
	WRITE_ONCE(generation, number);
	return 0;
}

static int defects_set(const char *text, const struct kernel_param *param)
{
	char line[64], *rest = line, *name;
	unsigned int bits = 0;
	int at;

	if (strscpy(line, text, sizeof(line)) < 0)
		return -EINVAL;
	while ((name = strsep(&rest, ",")) != NULL) {
		name = strim(name);
		if (!*name)
			continue;
		at = match_string(defect_names, ARRAY_SIZE(defect_names), name);
		if (at < 0)
			return at;
		bits |= BIT(at);
	}
	WRITE_ONCE(defects, bits);
	return 0;
}

static int defects_get(char *buffer, const struct kernel_param *param)
{
	const char *comma = "";
	int at, length = 0;

	for (at = 0; at < ARRAY_SIZE(defect_names); at++) {
		if (!(vnet_hash_defects() & BIT(at)))
			continue;
		length += sprintf(buffer + length, "%s%s", comma, defect_names[at]);
		comma = ",";
	}
	return length + sprintf(buffer + length, "\n");
}

static const struct kernel_param_ops generation_ops = {
	.set = generation_set,
	.get = param_get_uint,
};

static const struct kernel_param_ops defects_ops = {
	.set = defects_set,
	.get = defects_get,
};

module_param_cb(generation, &generation_ops, &generation, 0644);
MODULE_PARM_DESC(generation, "ioctls of the series' RFC v5 (5) or v12 (12), or none (0)");
module_param_cb(defects, &defects_ops, NULL, 0644);
MODULE_PARM_DESC(defects, "list of the series' defects: automq,key,single_queue,tunnels");
