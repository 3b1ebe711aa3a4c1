/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Hash reports and RSS of virtio-net in tun, as two generations of a patch series that was never merged
 * ("tun: Introduce virtio-net hashing feature", RFC v5 of October 2024 and v12 of May 2025) have
 * them for user space. Numbers and structures are theirs. What is reported is what the virtio specification
 * says, unless a defect of theirs is asked for.
 */
#ifndef FERRY_VNET_HASH_H
#define FERRY_VNET_HASH_H

#include <linux/ioctl.h>
#include <linux/rcupdate.h>
#include <linux/skbuff.h>
#include <linux/types.h>
#include <uapi/linux/virtio_net.h>

/* RFC v5. */
struct tun_vnet_hash {
	__u16 flags;
	__u8 pad[2];
	__u32 types;
};

#define TUN_VNET_HASH_REPORT	0x0001
#define TUN_VNET_HASH_RSS	0x0002

/* Behind it with TUN_VNET_HASH_RSS; then follow table (mask + 1 entries) and key. */
struct tun_vnet_hash_rss {
	__u16 indirection_table_mask;
	__u16 unclassified_queue;
};

#define TUNGETVNETHASHCAP	_IOR('T', 228, struct tun_vnet_hash)
#define TUNSETVNETHASH		_IOW('T', 229, struct tun_vnet_hash)

/* v12; table and key follow as above. */
struct tun_vnet_rss {
	__u32 hash_types;
	struct tun_vnet_hash_rss rss;
};

#define TUNGETVNETHASHTYPES		_IOR('T', 228, __u32)
#define TUNSETVNETREPORTINGAUTOMQ	_IOR('T', 229, __u32)
#define TUNSETVNETREPORTINGRSS		_IOR('T', 230, struct tun_vnet_rss)
#define TUNSETVNETRSS			_IOR('T', 231, struct tun_vnet_rss)

/* Defects of the series; bits of vnet_hash_defects(). */
enum vnet_hash_defect {
	/* The report of automatic queue selection has the queue's number for its value. */
	DEFECT_AUTOMQ = 1 << 0,
	/* The key's length is told by the wrong mask: without a type of IPv4 only 4 bytes are taken. */
	DEFECT_KEY = 1 << 1,
	/* A device with one queue reports nothing. */
	DEFECT_SINGLE_QUEUE = 1 << 2,
	/* Inner headers of tunnels are hashed. */
	DEFECT_TUNNELS = 1 << 3,
};

/* What the series calculates. */
#define VNET_HASH_TYPES (VIRTIO_NET_RSS_HASH_TYPE_IPv4 | VIRTIO_NET_RSS_HASH_TYPE_TCPv4 | \
			 VIRTIO_NET_RSS_HASH_TYPE_UDPv4 | VIRTIO_NET_RSS_HASH_TYPE_IPv6 | \
			 VIRTIO_NET_RSS_HASH_TYPE_TCPv6 | VIRTIO_NET_RSS_HASH_TYPE_UDPv6)

/* Longest input (two IPv6 addresses and two ports), and the 32 bits of the key that its last bit takes. */
#define VNET_HASH_INPUT 36
#define VNET_HASH_KEY (VNET_HASH_INPUT + 4)

/* What user space has set; it is replaced as a whole. */
struct vnet_hash {
	struct rcu_head rcu;
	u32 types;
	bool report;
	bool rss;
	u16 mask;
	u16 unclassified;
	u8 key[VNET_HASH_KEY];
	u16 table[];
};

/* A packet's report, in skb->cb between transmit and read. */
struct vnet_hash_report {
	u32 value;
	u16 type;	/* VIRTIO_NET_HASH_REPORT_* */
};

/* What of a packet is hashed. */
struct vnet_flow {
	bool v6;
	u8 proto;	/* IPPROTO_TCP or IPPROTO_UDP if ports are there, else 0 */
	u8 addresses;	/* bytes of input that are addresses */
	u8 input[VNET_HASH_INPUT];
};

/* params.c */
unsigned int vnet_hash_generation(void);
unsigned int vnet_hash_defects(void);

/* flow.c: finds the flow of a packet whose data begin with its Ethernet header. */
bool vnet_flow_find(const struct sk_buff *skb, struct vnet_flow *flow);
bool vnet_flow_dissect(const struct sk_buff *skb, struct vnet_flow *flow);

/*
 * hash.c. Serves the ioctls of the generation that is chosen: `set` is NULL if the file is attached to no
 * device; `steered` says that the device has a steering program. -ENOIOCTLCMD if it is none of them.
 */
long vnet_hash_ioctl(struct vnet_hash __rcu **set, bool steered, unsigned int cmd, void __user *argp);
/* Whether RSS is on, which in generation 5 keeps steering programs away. */
bool vnet_hash_refuses_steering(struct vnet_hash __rcu **set);
void vnet_hash_free(struct vnet_hash __rcu **set);
/* The queue that RSS has for a packet; -1 if RSS is off. Under rcu_read_lock. */
int vnet_hash_queue(const struct vnet_hash *hash, const struct sk_buff *skb, u32 queues);
/* Notes a packet's report in it. Under rcu_read_lock. */
void vnet_hash_note(const struct vnet_hash *hash, struct sk_buff *skb, u32 queues);
/* Whether headers have reports. Under rcu_read_lock. */
bool vnet_hash_reports(const struct vnet_hash *hash);
/* Puts the report into a header. */
void vnet_hash_fill(const struct sk_buff *skb, struct virtio_net_hdr_v1_hash *header);

#endif
