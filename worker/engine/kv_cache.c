#include "worker/engine/kv_cache.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

struct kv_cache {
    struct backend *backend;
    struct kv_pool pool;
    uint32_t *free_pages; /* stack; the first free_count entries are free */
    uint32_t free_count;
};

uint64_t kv_cache_page_size(uint32_t layers, uint32_t kv_heads, uint32_t head_dim)
{
    return (uint64_t)layers * 2u * kv_heads * KV_PAGE_TOKENS * head_dim * sizeof(uint16_t);
}

enum odsi_err kv_cache_open(struct kv_cache **out, struct backend *backend, uint32_t page_count,
                            uint32_t layers, uint32_t kv_heads, uint32_t head_dim)
{
    struct kv_cache *self = NULL;
    *out = NULL;
    if (page_count == 0 || layers == 0 || kv_heads == 0 || head_dim == 0)
        return odsi_fail(ODSI_ERR_INVALID, "a KV cache needs at least one page of one layer");
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->backend = backend;
    self->pool.page_count = page_count;
    self->pool.layers = layers;
    self->pool.kv_heads = kv_heads;
    self->pool.head_dim = head_dim;
    err = alloc_zeroed(&self->free_pages, page_count, sizeof *self->free_pages);
    if (err != ODSI_OK)
        goto fail;
    for (uint32_t i = 0; i < page_count; i++)
        self->free_pages[i] = page_count - 1 - i; /* page 0 is handed out first */
    self->free_count = page_count;
    const uint64_t size = page_count * kv_cache_page_size(layers, kv_heads, head_dim);
    err = backend->ops->mem_alloc(backend, (void **)&self->pool.pages_dev, size);
    if (err != ODSI_OK) {
        err = odsi_fail_prefix(err, "KV cache of %llu MiB", (unsigned long long)(size >> 20));
        goto fail;
    }
    *out = self;
    return ODSI_OK;
fail:
    kv_cache_close(&self);
    return err;
}

void kv_cache_close(struct kv_cache **self)
{
    if (!*self)
        return;
    if ((*self)->pool.pages_dev)
        (*self)->backend->ops->mem_free((*self)->backend, (*self)->pool.pages_dev);
    alloc_free((*self)->free_pages);
    alloc_free(*self);
    *self = NULL;
}

enum odsi_err kv_cache_take(struct kv_cache *self, struct kv_table *table, uint32_t token_count)
{
    ODSI_ASSERT(table->page_count == 0);
    const uint32_t need = (uint32_t)(((uint64_t)token_count + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
    if (need > self->pool.page_count)
        return odsi_fail(ODSI_ERR_RANGE,
                         "a session of %u positions: the KV cache holds %llu in all; raise "
                         "--kv-memory on this worker",
                         token_count, (unsigned long long)self->pool.page_count * KV_PAGE_TOKENS);
    if (need > self->free_count)
        return odsi_fail(ODSI_ERR_BUSY,
                         "a session of %u positions: the KV cache has room for %llu now; try "
                         "again later",
                         token_count, (unsigned long long)self->free_count * KV_PAGE_TOKENS);
    enum odsi_err err = alloc_zeroed(&table->pages, need, sizeof *table->pages);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; i < need; i++)
        table->pages[i] = self->free_pages[--self->free_count];
    table->page_count = need;
    return ODSI_OK;
}

void kv_cache_give(struct kv_cache *self, struct kv_table *table)
{
    for (uint32_t i = table->page_count; i > 0; i--)
        self->free_pages[self->free_count++] = table->pages[i - 1];
    ODSI_ASSERT(self->free_count <= self->pool.page_count);
    alloc_free(table->pages);
    table->pages = NULL;
    table->page_count = 0;
}

const struct kv_pool *kv_cache_pool(const struct kv_cache *self)
{
    return &self->pool;
}

uint32_t kv_cache_free_pages(const struct kv_cache *self)
{
    return self->free_count;
}
