/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What a driver sees of the mock device: PCI identity, BARs and registers.
 *
 * PCI function 1234:fe77, class ff0000, MSI-X with four vectors.
 *
 *   BAR 0  4 KiB, 32 bit, trapped: the registers below.
 *   BAR 2  64 KiB, 64 bit, prefetchable: the first page is the mailbox, plain memory that can be
 *          mapped and that other devices write to (peer-to-peer DMA); at 0x8000 the MSI-X table,
 *          at 0xc000 the pending bits (both read as zeros: who passes the device on owns them).
 *
 * Registers are little-endian. They are accessed by 4 or 8 aligned bytes; others read as ones and
 * write nothing. All of them from 0x010 on move in a migration. Like any PCI function the device
 * does DMA only while bus mastering is enabled, and whether it is does not move with it.
 *
 * The engine writes one record per page, over and over: write number s (from 1) goes to page
 * ((s - 1) * step) modulo the number of pages of all segments, in their order. The record is
 * `bytes` long: word 0 is s, word k is (s ^ pattern) + k * MOCK_WORD_STEP. The stamp register is
 * the number of writes done, so for every page it follows what the page has to hold.
 */
#ifndef FERRY_MOCK_REGISTERS_H
#define FERRY_MOCK_REGISTERS_H

#include <linux/types.h>

#define MOCK_VENDOR		0x1234
#define MOCK_DEVICE		0xfe77
#define MOCK_SUBVENDOR		0x1234
#define MOCK_SUBDEVICE		0x0001

#define MOCK_REGS_BYTES		4096
#define MOCK_BAR2_BYTES		65536
#define MOCK_MAILBOX_BYTES	4096
#define MOCK_MSIX_TABLE		0x8000
#define MOCK_MSIX_PBA		0xc000
#define MOCK_VECTORS		4

#define MOCK_VECTOR_DOORBELL	0	/* a doorbell's DMA is done */
#define MOCK_VECTOR_PASS	1	/* the engine has written every page once more */
#define MOCK_VECTOR_PEER	2	/* a write to a peer was refused */

#define MOCK_MAGIC		0x44564d46	/* "FMVD" */
#define MOCK_REGS_VERSION	1
#define MOCK_SEGMENTS		128
#define MOCK_DMA_MAX		(4 << 20)
#define MOCK_RECORD_MIN		8
#define MOCK_RECORD_MAX		4096
/* Bits of the register `engine`. */
#define MOCK_ENGINE_ON		1
/* With ON: the engine does not move. What a migration lost would soon be written over. */
#define MOCK_ENGINE_STAYS	2
#define MOCK_WORD_STEP		0x9e3779b97f4a7c15ULL

struct mock_regs {
	/* 0x000, read-only */
	__u32 magic;
	__u32 version;
	__u32 instance;		/* which device of its host: differs after a migration */
	__u32 _reserved0;
	/* 0x010: one DMA write by a doorbell */
	__u64 dma_addr;
	__u32 dma_bytes;	/* 1 to MOCK_DMA_MAX */
	__u32 dma_pattern;	/* this word, repeated */
	/* 0x020 */
	__u32 doorbell;		/* write 1: start; it is done when the write returns */
	__u32 doorbells;	/* ro: how many rang */
	__u32 status;		/* errno of the last DMA, of any kind, that failed; write: forget it */
	__u32 failures;		/* ro: DMA that failed or was not allowed */
	/* 0x030 */
	__u64 stamp;		/* ro: records that the engine wrote */
	__u64 pattern;
	/* 0x040 */
	__u32 engine;		/* MOCK_ENGINE_*. Once a write of 0 has returned, no DMA is under way */
	__u32 rate;		/* records per second */
	__u32 bytes;		/* of a record, a multiple of 8 */
	__u32 step;		/* prime to the number of pages */
	/* 0x050: the pages of the engine; may be changed while it is off */
	__u32 segment;		/* which one the next two are about */
	__u32 segment_pages;	/* write: sets the segment's pages, at segment_addr; 0 removes it */
	__u64 segment_addr;
	/* 0x060 */
	__u64 pages;		/* ro: of all segments */
	__u64 _reserved1;
	/* 0x070: with each burst of records the engine writes peer_stamp here; 0: it does not */
	__u64 peer_addr;
	__u64 peer_stamp;	/* ro: writes to the peer that were done */
	/* 0x080 */
	__u64 peer_refused;	/* ro: writes to the peer that failed */
	__u64 _reserved2;
	/* 0x090: 16 words for a driver's own use */
	__u32 scratch[16];
};

#endif
