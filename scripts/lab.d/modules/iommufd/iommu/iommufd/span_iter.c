// SPDX-License-Identifier: GPL-2.0
/*
 * The kernel's lib/interval_tree.c with its span iterator, which the distribution's configuration
 * leaves out. The rest of that file is in the kernel, which exports it already.
 */
#include <linux/export.h>
#undef EXPORT_SYMBOL_GPL
#define EXPORT_SYMBOL_GPL(symbol)
#include "interval_tree.c"
