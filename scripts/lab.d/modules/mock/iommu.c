// SPDX-License-Identifier: GPL-2.0
/*
 * An IOMMU of the mock devices' own, in place of VFIO's emulation (module parameter `iommu`): devices
 * reach memory through the domain that they are attached to, whose entries have dirty bits. By it the
 * kernel's own iommufd, from HWPT_ALLOC to HWPT_GET_DIRTY_BITMAP, can be tested without such hardware.
 *
 * A domain is an array of pages by IOVA, marked where they are dirty. All of it, DMA too, is under one
 * lock: so a dirty bit and the write that it is of are one step, and a domain or page does not go
 * under a write's feet.
 */
#include <linux/highmem.h>
#include <linux/iommu.h>
#include <linux/platform_device.h>
#include <linux/property.h>
#include <linux/slab.h>
#include <uapi/linux/iommufd.h>
#include "mock.h"

#define DIRTY XA_MARK_0

struct mock_domain {
	struct iommu_domain domain;
	struct xarray pages;
	bool tracking;
};

/* What is behind the IOMMU. */
struct mock_endpoint {
	struct mock_domain *domain;	/* NULL: it reaches nothing */
};

static DEFINE_MUTEX(iommu_lock);
static struct iommu_device mock_iommu;

static struct mock_domain *to_domain(struct iommu_domain *domain)
{
	return container_of(domain, struct mock_domain, domain);
}

static int attach(struct device *dev, struct mock_domain *domain)
{
	struct mock_endpoint *endpoint = dev_iommu_priv_get(dev);

	mutex_lock(&iommu_lock);
	endpoint->domain = domain;
	mutex_unlock(&iommu_lock);
	return 0;
}

static int paging_attach(struct iommu_domain *domain, struct device *dev)
{
	return attach(dev, to_domain(domain));
}

static int nothing_attach(struct iommu_domain *domain, struct device *dev)
{
	return attach(dev, NULL);
}

static int map_pages(struct iommu_domain *domain, unsigned long iova, phys_addr_t paddr,
		     size_t pgsize, size_t pgcount, int prot, gfp_t gfp, size_t *mapped)
{
	struct xarray *pages = &to_domain(domain)->pages;
	size_t done;
	int ret = 0;

	mutex_lock(&iommu_lock);
	for (done = 0; done < pgsize * pgcount; done += PAGE_SIZE) {
		ret = xa_err(xa_store(pages, (iova + done) >> PAGE_SHIFT,
				      xa_mk_value((paddr + done) >> PAGE_SHIFT), gfp));
		if (ret)
			break;
	}
	mutex_unlock(&iommu_lock);
	*mapped += done;
	return ret;
}

static size_t unmap_pages(struct iommu_domain *domain, unsigned long iova, size_t pgsize,
			  size_t pgcount, struct iommu_iotlb_gather *gather)
{
	struct xarray *pages = &to_domain(domain)->pages;
	size_t done;

	mutex_lock(&iommu_lock);
	for (done = 0; done < pgsize * pgcount; done += PAGE_SIZE)
		if (!xa_erase(pages, (iova + done) >> PAGE_SHIFT))
			break;
	mutex_unlock(&iommu_lock);
	return done;
}

static phys_addr_t iova_to_phys(struct iommu_domain *domain, dma_addr_t iova)
{
	void *entry = xa_load(&to_domain(domain)->pages, iova >> PAGE_SHIFT);

	return entry ? (xa_to_value(entry) << PAGE_SHIFT) + offset_in_page(iova) : 0;
}

static void free_domain(struct iommu_domain *domain)
{
	xa_destroy(&to_domain(domain)->pages);
	kfree(to_domain(domain));
}

static int set_dirty_tracking(struct iommu_domain *domain, bool enabled)
{
	mutex_lock(&iommu_lock);
	to_domain(domain)->tracking = enabled;
	mutex_unlock(&iommu_lock);
	return 0;
}

static int read_and_clear_dirty(struct iommu_domain *domain, unsigned long iova, size_t size,
				unsigned long flags, struct iommu_dirty_bitmap *dirty)
{
	struct mock_domain *of = to_domain(domain);
	unsigned long page, last = (iova + size - 1) >> PAGE_SHIFT;
	void *entry;
	int ret = 0;

	mutex_lock(&iommu_lock);
	if (!of->tracking && dirty->bitmap) {
		ret = -EINVAL;
		goto out;
	}
	page = iova >> PAGE_SHIFT;
	for (entry = xa_find(&of->pages, &page, last, DIRTY); entry;
	     entry = xa_find_after(&of->pages, &page, last, DIRTY)) {
		iommu_dirty_bitmap_record(dirty, page << PAGE_SHIFT, PAGE_SIZE);
		if (!(flags & IOMMU_DIRTY_NO_CLEAR))
			xa_clear_mark(&of->pages, page, DIRTY);
	}
out:
	mutex_unlock(&iommu_lock);
	return ret;
}

static const struct iommu_domain_ops paging_ops = {
	.attach_dev = paging_attach,
	.map_pages = map_pages,
	.unmap_pages = unmap_pages,
	.iova_to_phys = iova_to_phys,
	.free = free_domain,
};

static const struct iommu_dirty_ops dirty_ops = {
	.set_dirty_tracking = set_dirty_tracking,
	.read_and_clear_dirty = read_and_clear_dirty,
};

static struct iommu_domain *alloc_paging(struct device *dev)
{
	struct mock_domain *domain = kzalloc(sizeof(*domain), GFP_KERNEL);

	if (!domain)
		return NULL;
	xa_init(&domain->pages);
	domain->domain.type = IOMMU_DOMAIN_UNMANAGED;
	domain->domain.ops = &paging_ops;
	domain->domain.pgsize_bitmap = PAGE_SIZE;
	domain->domain.geometry.aperture_end = (1ULL << 48) - 1;
	domain->domain.geometry.force_aperture = true;
	return &domain->domain;
}

static struct iommu_domain *alloc_user(struct device *dev, u32 flags, struct iommu_domain *parent,
				       const struct iommu_user_data *user_data)
{
	struct iommu_domain *domain;

	if ((flags & ~IOMMU_HWPT_ALLOC_DIRTY_TRACKING) || parent || user_data)
		return ERR_PTR(-EOPNOTSUPP);
	domain = alloc_paging(dev);
	if (!domain)
		return ERR_PTR(-ENOMEM);
	if (flags & IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
		domain->dirty_ops = &dirty_ops;
	return domain;
}

static bool is_capable(struct device *dev, enum iommu_cap cap)
{
	return cap == IOMMU_CAP_CACHE_COHERENCY || cap == IOMMU_CAP_DIRTY_TRACKING;
}

static struct iommu_device *probe_device(struct device *dev)
{
	struct mock_endpoint *endpoint = kzalloc(sizeof(*endpoint), GFP_KERNEL);

	if (!endpoint)
		return ERR_PTR(-ENOMEM);
	dev_iommu_priv_set(dev, endpoint);
	return &mock_iommu;
}

static void release_device(struct device *dev)
{
	kfree(dev_iommu_priv_get(dev));
}

static const struct iommu_domain_ops nothing_ops = { .attach_dev = nothing_attach };
static struct iommu_domain platform_domain = {
	.type = IOMMU_DOMAIN_PLATFORM,
	.ops = &nothing_ops,
};
static struct iommu_domain blocked_domain = {
	.type = IOMMU_DOMAIN_BLOCKED,
	.ops = &nothing_ops,
};

static const struct iommu_ops mock_iommu_ops = {
	.capable = is_capable,
	.domain_alloc_paging = alloc_paging,
	.domain_alloc_user = alloc_user,
	.probe_device = probe_device,
	.release_device = release_device,
	.device_group = generic_device_group,
	.default_domain_ops = &paging_ops,
	.default_domain = &platform_domain,
	.blocked_domain = &blocked_domain,
	.pgsize_bitmap = PAGE_SIZE,
	.owner = THIS_MODULE,
};

int mock_iommu_write(struct mock_device *mock, u64 iova, const void *data, size_t length)
{
	struct mock_endpoint *endpoint = dev_iommu_priv_get(mock->vdev.dev);
	u64 every = READ_ONCE(mock->settings.lose_log);
	bool lost = every && ++mock->log_seen % every == 0;
	int ret = 0;

	mutex_lock(&iommu_lock);
	while (length && !ret) {
		struct mock_domain *domain = endpoint->domain;
		size_t piece = min_t(size_t, length, PAGE_SIZE - offset_in_page(iova));
		void *entry = domain ? xa_load(&domain->pages, iova >> PAGE_SHIFT) : NULL;

		if (!entry) {
			ret = -EFAULT;
			break;
		}
		memcpy_to_page(pfn_to_page(xa_to_value(entry)), offset_in_page(iova), data, piece);
		if (domain->tracking && !lost)
			xa_set_mark(&domain->pages, iova >> PAGE_SHIFT, DIRTY);
		iova += piece;
		data += piece;
		length -= piece;
	}
	mutex_unlock(&iommu_lock);
	if (lost)
		mock->stats.lost++;
	return ret;
}

/* Puts a device that is not added yet behind the IOMMU. */
int mock_iommu_adopt(struct device *dev)
{
	return iommu_fwspec_init(dev, mock_iommu.fwnode);
}

int mock_iommu_init(void)
{
	int ret;

	mock_iommu.fwnode = fwnode_create_software_node(NULL, NULL);
	if (IS_ERR(mock_iommu.fwnode))
		return PTR_ERR(mock_iommu.fwnode);
	ret = iommu_device_sysfs_add(&mock_iommu, NULL, NULL, MOCK_NAME);
	if (ret)
		goto no_sysfs;
	ret = iommu_device_register(&mock_iommu, &mock_iommu_ops, NULL);
	if (ret)
		goto no_iommu;
	return 0;

no_iommu:
	iommu_device_sysfs_remove(&mock_iommu);
no_sysfs:
	fwnode_remove_software_node(mock_iommu.fwnode);
	return ret;
}

void mock_iommu_exit(void)
{
	iommu_device_unregister(&mock_iommu);
	iommu_device_sysfs_remove(&mock_iommu);
	fwnode_remove_software_node(mock_iommu.fwnode);
}
