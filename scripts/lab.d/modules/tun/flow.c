// SPDX-License-Identifier: GPL-2.0
/*
 * From a packet to what of it is hashed: as the virtio specification has it, and as the series does
 * by the kernel's dissector.
 */
#include <linux/if_ether.h>
#include <linux/if_vlan.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <net/flow_dissector.h>
#include <net/ip.h>
#include <net/ipv6.h>

#include "vnet_hash.h"

/* Headers beyond these bytes are not looked at. */
#define HEAD_BYTES 256

#define NEXTHDR_HIP	139
#define NEXTHDR_SHIM6	140

/* The rest of a packet's head. */
struct rest {
	const u8 *at;
	unsigned int length;
	/* How long it should be, by the IP header. */
	unsigned int claimed;
};

static bool skip(struct rest *rest, unsigned int bytes)
{
	if (bytes > rest->length)
		return false;
	rest->at += bytes;
	rest->length -= bytes;
	rest->claimed -= min(bytes, rest->claimed);
	return true;
}

/* What is behind the length in the IP header is padding. */
static void claim(struct rest *rest, unsigned int bytes)
{
	rest->claimed = bytes;
	rest->length = min(rest->length, bytes);
}

/* Takes the ports if the packet has any; false if it should have and they are cut off. */
static bool find_ports(const struct rest *rest, u8 proto, struct vnet_flow *flow)
{
	if ((proto != IPPROTO_TCP && proto != IPPROTO_UDP) || rest->claimed < 4)
		return true;
	if (rest->length < 4)
		return false;
	flow->proto = proto;
	memcpy(flow->input + flow->addresses, rest->at, 4);
	return true;
}

static bool find_v4(struct rest rest, struct vnet_flow *flow)
{
	struct iphdr header;
	unsigned int total;

	if (rest.length < sizeof(header))
		return false;
	memcpy(&header, rest.at, sizeof(header));
	if (header.version != 4 || header.ihl < 5 || rest.length < header.ihl * 4)
		return false;
	total = ntohs(header.tot_len);
	if (total < header.ihl * 4)
		return false;
	claim(&rest, total);
	flow->v6 = false;
	flow->addresses = 8;
	memcpy(flow->input, &header.saddr, 4);
	memcpy(flow->input + 4, &header.daddr, 4);
	/* Not all fragments have ports, so none shall be hashed by them. */
	if (header.frag_off & htons(IP_MF | IP_OFFSET))
		return true;
	return skip(&rest, header.ihl * 4) && find_ports(&rest, header.protocol, flow);
}

/* Whether the options of a destination options header are sound. */
static bool options_sound(const u8 *header, unsigned int length)
{
	struct rest rest = { header, length, length };

	if (!skip(&rest, 2))
		return false;
	while (rest.length) {
		if (rest.at[0] == IPV6_TLV_PAD1) {
			skip(&rest, 1);
			continue;
		}
		if (rest.length < 2 || !skip(&rest, 2 + rest.at[1]))
			return false;
	}
	return true;
}

static bool find_v6(struct rest rest, struct vnet_flow *flow)
{
	struct ipv6hdr header;
	unsigned int bytes;
	u8 next;

	if (rest.length < sizeof(header))
		return false;
	memcpy(&header, rest.at, sizeof(header));
	if (header.version != 6)
		return false;
	skip(&rest, sizeof(header));
	claim(&rest, ntohs(header.payload_len));
	flow->v6 = true;
	flow->addresses = 32;
	memcpy(flow->input, &header.saddr, 16);
	memcpy(flow->input + 16, &header.daddr, 16);
	for (next = header.nexthdr;; next = rest.at[-(int)bytes]) {
		switch (next) {
		case NEXTHDR_HOP:
		case NEXTHDR_ROUTING:
		case NEXTHDR_DEST:
		case NEXTHDR_MOBILITY:
		case NEXTHDR_HIP:
		case NEXTHDR_SHIM6:
			if (rest.length < 2)
				return false;
			bytes = (rest.at[1] + 1) * 8;
			break;
		case NEXTHDR_AUTH:
			if (rest.length < 2)
				return false;
			bytes = (rest.at[1] + 2) * 4;
			break;
		case NEXTHDR_FRAGMENT:
		case NEXTHDR_ESP:
			return rest.length >= 8;
		default:
			return find_ports(&rest, next, flow);
		}
		if (!skip(&rest, bytes))
			return false;
		if (next == NEXTHDR_DEST && !options_sound(rest.at - bytes, bytes))
			return false;
	}
}

bool vnet_flow_find(const struct sk_buff *skb, struct vnet_flow *flow)
{
	u8 head[HEAD_BYTES];
	struct rest rest = { head, min_t(unsigned int, skb->len, sizeof(head)) };
	__be16 proto;

	memset(flow, 0, sizeof(*flow));
	if (skb_copy_bits(skb, 0, head, rest.length) || !skip(&rest, 2 * ETH_ALEN))
		return false;
	/* Tags that the stack has taken out of the packet need not be skipped. */
	for (;;) {
		if (rest.length < sizeof(proto))
			return false;
		memcpy(&proto, rest.at, sizeof(proto));
		skip(&rest, sizeof(proto));
		switch (proto) {
		case htons(ETH_P_IP):
			return find_v4(rest, flow);
		case htons(ETH_P_IPV6):
			return find_v6(rest, flow);
		case htons(ETH_P_8021Q):
		case htons(ETH_P_8021AD):
			if (!skip(&rest, 2))
				return false;
			break;
		default:
			return false;
		}
	}
}

/* What the dissector fills. */
struct keys {
	struct flow_dissector_key_control control;
	struct flow_dissector_key_basic basic;
	union {
		struct flow_dissector_key_ipv4_addrs v4;
		struct flow_dissector_key_ipv6_addrs v6;
	} addrs;
	struct flow_dissector_key_ports ports;
};

static const struct flow_dissector_key wanted[] = {
	{ FLOW_DISSECTOR_KEY_CONTROL, offsetof(struct keys, control) },
	{ FLOW_DISSECTOR_KEY_BASIC, offsetof(struct keys, basic) },
	{ FLOW_DISSECTOR_KEY_IPV4_ADDRS, offsetof(struct keys, addrs.v4) },
	{ FLOW_DISSECTOR_KEY_IPV6_ADDRS, offsetof(struct keys, addrs.v6) },
	{ FLOW_DISSECTOR_KEY_PORTS, offsetof(struct keys, ports) },
};

bool vnet_flow_dissect(const struct sk_buff *skb, struct vnet_flow *flow)
{
	struct flow_dissector dissector;
	struct keys keys;
	size_t addresses;

	memset(flow, 0, sizeof(*flow));
	memset(&keys, 0, sizeof(keys));
	skb_flow_dissector_init(&dissector, wanted, ARRAY_SIZE(wanted));
	/* Flags of 0: tunnels are entered. */
	if (!__skb_flow_dissect(NULL, skb, &dissector, &keys, NULL, 0, 0, 0, 0))
		return false;
	if (keys.basic.n_proto == htons(ETH_P_IP))
		addresses = sizeof(keys.addrs.v4);
	else if (keys.basic.n_proto == htons(ETH_P_IPV6))
		addresses = sizeof(keys.addrs.v6);
	else
		return false;
	flow->v6 = addresses == sizeof(keys.addrs.v6);
	flow->addresses = addresses;
	memcpy(flow->input, &keys.addrs, addresses);
	if ((keys.basic.ip_proto == IPPROTO_TCP || keys.basic.ip_proto == IPPROTO_UDP) &&
	    !(keys.control.flags & FLOW_DIS_IS_FRAGMENT)) {
		flow->proto = keys.basic.ip_proto;
		memcpy(flow->input + addresses, &keys.ports.ports, 4);
	}
	return true;
}
