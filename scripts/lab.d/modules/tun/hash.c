// SPDX-License-Identifier: GPL-2.0
/* What user space sets, the Toeplitz hash, and reports. */
#include <linux/in.h>
#include <linux/kernel.h>
#include <linux/random.h>
#include <linux/rtnetlink.h>
#include <linux/slab.h>
#include <linux/unaligned.h>
#include <linux/uaccess.h>

#include "vnet_hash.h"

/* How many bytes of the key types take: the longest input of them, and 4. */
static size_t key_bytes(u32 types)
{
	u32 v6_ports = VIRTIO_NET_RSS_HASH_TYPE_TCPv6 | VIRTIO_NET_RSS_HASH_TYPE_UDPv6;
	u32 v6 = VIRTIO_NET_RSS_HASH_TYPE_IPv6;
	u32 v4_ports = VIRTIO_NET_RSS_HASH_TYPE_TCPv4 | VIRTIO_NET_RSS_HASH_TYPE_UDPv4;
	u32 v4 = VIRTIO_NET_RSS_HASH_TYPE_IPv4;

	if (vnet_hash_defects() & DEFECT_KEY) {
		v6_ports = VIRTIO_NET_HASH_REPORT_TCPv6 | VIRTIO_NET_HASH_REPORT_UDPv6;
		v6 = VIRTIO_NET_HASH_REPORT_IPv6;
		v4_ports = VIRTIO_NET_HASH_REPORT_TCPv4 | VIRTIO_NET_HASH_REPORT_UDPv4;
		v4 = VIRTIO_NET_HASH_REPORT_IPv4;
	}
	if (types & v6_ports)
		return 36 + 4;
	if (types & v6)
		return 32 + 4;
	if (types & v4_ports)
		return 12 + 4;
	if (types & v4)
		return 8 + 4;
	return 4;
}

/* Bit by bit: a fixture has time. */
static u32 toeplitz(const u8 *key, const u8 *input, size_t length)
{
	u64 window = get_unaligned_be64(key);
	u32 hash = 0;
	size_t at, bit;

	for (at = 0; at < length; at++) {
		for (bit = 0; bit < 8; bit++) {
			if (input[at] & (0x80 >> bit))
				hash ^= window >> 32;
			window <<= 1;
		}
		/* 32 bits are left of the 64; the key ends 4 bytes behind the longest input. */
		if (at + 8 < VNET_HASH_KEY)
			window |= key[at + 8];
	}
	return hash;
}

/* A new setting with room for a table of `entries`, on the way to user space's. */
static struct vnet_hash *new_setting(u32 types, bool report, bool rss, size_t entries)
{
	struct vnet_hash *hash = kzalloc(struct_size(hash, table, entries), GFP_KERNEL);

	if (!hash)
		return NULL;
	hash->types = types;
	hash->report = report;
	hash->rss = rss;
	/* What the series leaves uninitialised is no memory of this kernel's here. */
	get_random_bytes(hash->key, sizeof(hash->key));
	return hash;
}

static long replace(struct vnet_hash __rcu **set, struct vnet_hash *hash)
{
	struct vnet_hash *old = rtnl_dereference(*set);

	rcu_assign_pointer(*set, hash);
	if (old)
		kfree_rcu(old, rcu);
	return 0;
}

/* Reads table and key behind `rss`, which are user space's, and takes the setting over. */
static long set_rss(struct vnet_hash __rcu **set, u32 types, bool report,
		    const struct tun_vnet_hash_rss *rss, void __user *behind)
{
	size_t entries = (size_t)rss->indirection_table_mask + 1;
	size_t bytes = entries * sizeof(u16);
	struct vnet_hash *hash = new_setting(types, report, true, entries);

	if (!hash)
		return -ENOMEM;
	hash->mask = rss->indirection_table_mask;
	hash->unclassified = rss->unclassified_queue;
	if (copy_from_user(hash->table, behind, bytes) ||
	    copy_from_user(hash->key, behind + bytes, key_bytes(types))) {
		kfree(hash);
		return -EFAULT;
	}
	return replace(set, hash);
}

static long set_automq(struct vnet_hash __rcu **set, u32 types, bool report)
{
	struct vnet_hash *hash = report ? new_setting(types, true, false, 0) : NULL;

	if (report && !hash)
		return -ENOMEM;
	return replace(set, hash);
}

static long ioctl_5(struct vnet_hash __rcu **set, bool steered, unsigned int cmd, void __user *argp)
{
	struct tun_vnet_hash hash = {
		.flags = TUN_VNET_HASH_REPORT | TUN_VNET_HASH_RSS,
		.types = VNET_HASH_TYPES,
	};
	struct tun_vnet_hash_rss rss;

	switch (cmd) {
	case TUNGETVNETHASHCAP:
		return copy_to_user(argp, &hash, sizeof(hash)) ? -EFAULT : 0;
	case TUNSETVNETHASH:
		if (!set)
			return -EBADFD;
		if (copy_from_user(&hash, argp, sizeof(hash)))
			return -EFAULT;
		/* Types that are not calculated are accepted, and reported by none. */
		if (!(hash.flags & TUN_VNET_HASH_RSS))
			return set_automq(set, hash.types, hash.flags & TUN_VNET_HASH_REPORT);
		if (steered)
			return -EBUSY;
		if (copy_from_user(&rss, argp + sizeof(hash), sizeof(rss)))
			return -EFAULT;
		return set_rss(set, hash.types, hash.flags & TUN_VNET_HASH_REPORT, &rss,
			       argp + sizeof(hash) + sizeof(rss));
	}
	return -ENOIOCTLCMD;
}

static long ioctl_12(struct vnet_hash __rcu **set, unsigned int cmd, void __user *argp)
{
	struct tun_vnet_rss rss;
	u32 types = VNET_HASH_TYPES;

	switch (cmd) {
	case TUNGETVNETHASHTYPES:
		return put_user(types, (u32 __user *)argp);
	case TUNSETVNETREPORTINGAUTOMQ:
		if (!set)
			return -EBADFD;
		if (get_user(types, (u32 __user *)argp))
			return -EFAULT;
		if (types & ~VNET_HASH_TYPES)
			return -EINVAL;
		return set_automq(set, types, types);
	case TUNSETVNETREPORTINGRSS:
	case TUNSETVNETRSS:
		if (!set)
			return -EBADFD;
		if (copy_from_user(&rss, argp, sizeof(rss)))
			return -EFAULT;
		if (rss.hash_types & ~VNET_HASH_TYPES)
			return -EINVAL;
		return set_rss(set, rss.hash_types, cmd == TUNSETVNETREPORTINGRSS, &rss.rss,
			       argp + sizeof(rss));
	}
	return -ENOIOCTLCMD;
}

long vnet_hash_ioctl(struct vnet_hash __rcu **set, bool steered, unsigned int cmd, void __user *argp)
{
	switch (vnet_hash_generation()) {
	case 5:
		return ioctl_5(set, steered, cmd, argp);
	case 12:
		return ioctl_12(set, cmd, argp);
	}
	return -ENOIOCTLCMD;
}

bool vnet_hash_refuses_steering(struct vnet_hash __rcu **set)
{
	struct vnet_hash *hash = rtnl_dereference(*set);

	return vnet_hash_generation() == 5 && hash && hash->rss;
}

void vnet_hash_free(struct vnet_hash __rcu **set)
{
	/* Nobody reads any more when a device is freed. */
	kfree(rcu_dereference_protected(*set, true));
	RCU_INIT_POINTER(*set, NULL);
}

static bool find_flow(const struct sk_buff *skb, struct vnet_flow *flow)
{
	if (vnet_hash_defects() & DEFECT_TUNNELS)
		return vnet_flow_dissect(skb, flow);
	return vnet_flow_find(skb, flow);
}

/* The type that is reported for a flow, and how many bytes of it are hashed. */
static u16 choose(u32 types, const struct vnet_flow *flow, size_t *length)
{
	/* The six types are 1 << 0 to 1 << 5, IPv6 behind IPv4, and each report is one more than its bit. */
	unsigned int base = flow->v6 ? ilog2(VIRTIO_NET_RSS_HASH_TYPE_IPv6) : ilog2(VIRTIO_NET_RSS_HASH_TYPE_IPv4);
	unsigned int bit;

	*length = flow->addresses + 4;
	bit = base + (flow->proto == IPPROTO_TCP ? 1 : 2);
	if (flow->proto && types & BIT(bit))
		return bit + 1;
	*length = flow->addresses;
	return types & BIT(base) ? base + 1 : VIRTIO_NET_HASH_REPORT_NONE;
}

static struct vnet_hash_report calculate(const struct vnet_hash *hash, const struct sk_buff *skb)
{
	struct vnet_hash_report report = { 0, VIRTIO_NET_HASH_REPORT_NONE };
	struct vnet_flow flow;
	size_t length;

	if (!find_flow(skb, &flow))
		return report;
	report.type = choose(hash->types, &flow, &length);
	if (report.type != VIRTIO_NET_HASH_REPORT_NONE)
		report.value = toeplitz(hash->key, flow.input, length);
	return report;
}

int vnet_hash_queue(const struct vnet_hash *hash, const struct sk_buff *skb, u32 queues)
{
	struct vnet_hash_report report;

	if (!hash || !hash->rss || !queues)
		return -1;
	report = calculate(hash, skb);
	if (report.type == VIRTIO_NET_HASH_REPORT_NONE)
		return hash->unclassified % queues;
	return hash->table[report.value & hash->mask] % queues;
}

void vnet_hash_note(const struct vnet_hash *hash, struct sk_buff *skb, u32 queues)
{
	struct vnet_hash_report report = { 0, VIRTIO_NET_HASH_REPORT_NONE };
	unsigned int defects = vnet_hash_defects();

	BUILD_BUG_ON(sizeof(report) > sizeof(skb->cb));
	if (hash && hash->report && !(queues == 1 && defects & DEFECT_SINGLE_QUEUE)) {
		/* Without a key there is no hash to report, though the series does. */
		if (hash->rss || defects & DEFECT_AUTOMQ)
			report = calculate(hash, skb);
		if (!hash->rss && report.type != VIRTIO_NET_HASH_REPORT_NONE)
			report.value = skb->l4_hash ? skb->hash : skb_get_queue_mapping(skb);
	}
	memcpy(skb->cb, &report, sizeof(report));
}

bool vnet_hash_reports(const struct vnet_hash *hash)
{
	return hash && hash->report;
}

void vnet_hash_fill(const struct sk_buff *skb, struct virtio_net_hdr_v1_hash *header)
{
	struct vnet_hash_report report;

	memcpy(&report, skb->cb, sizeof(report));
	header->hdr.num_buffers = cpu_to_le16(1);
	header->hash_value = cpu_to_le32(report.value);
	header->hash_report = cpu_to_le16(report.type);
	header->padding = 0;
}
