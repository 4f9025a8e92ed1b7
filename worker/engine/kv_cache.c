#include "worker/engine/kv_cache.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"

#include <string.h>

#define NONE UINT32_MAX

struct page {
    struct digest key; /* shared and cached */
    uint32_t ref_count;
    int has_key;
    uint32_t parent;       /* the page in front of it; NONE: it is a first one */
    uint32_t child_count;  /* pages with a key behind it */
    uint32_t bucket_next;  /* another one with a key of that bucket; NONE: the last */
    uint32_t older, newer; /* cached: its neighbours by when it was last given back */
};

struct kv_cache {
    struct backend *backend;
    struct kv_pool pool;
    struct page *pages;   /* [page_count] */
    uint32_t *free_pages; /* stack; the first free_count entries are free */
    uint32_t free_count;
    uint32_t *buckets; /* [bucket_count]: pages with a key, by its first bytes */
    uint32_t bucket_count;
    uint32_t oldest, newest; /* of the cached ones; NONE: there are none */
    uint32_t cached_count;
    uint64_t page_size;
    uint8_t *copies; /* [2][page_size] of host memory, for copying and comparing */
};

uint64_t kv_cache_page_size(uint32_t layers, uint32_t kv_heads, uint32_t head_dim)
{
    return (uint64_t)layers * 2u * kv_heads * KV_PAGE_TOKENS * head_dim * sizeof(uint16_t);
}

/* ---- opening and closing -------------------------------------------------------------------- */

static enum odsi_err take_memory(struct kv_cache *self)
{
    const uint32_t page_count = self->pool.page_count;
    self->bucket_count = 1;
    while (self->bucket_count < page_count && self->bucket_count < 1u << 30)
        self->bucket_count *= 2;
    enum odsi_err err = alloc_zeroed(&self->free_pages, page_count, sizeof *self->free_pages);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->pages, page_count, sizeof *self->pages);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->buckets, self->bucket_count, sizeof *self->buckets);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->copies, 2 * self->page_size, 1);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; i < page_count; i++)
        self->free_pages[i] = page_count - 1 - i; /* page 0 is handed out first */
    self->free_count = page_count;
    for (uint32_t i = 0; i < self->bucket_count; i++)
        self->buckets[i] = NONE;
    self->oldest = NONE;
    self->newest = NONE;
    const uint64_t size = page_count * self->page_size;
    err = self->backend->ops->mem_alloc(self->backend, (void **)&self->pool.pages_dev, size);
    if (err != ODSI_OK)
        err = odsi_fail_prefix(err, "KV cache of %llu MiB", (unsigned long long)(size >> 20));
    return err;
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
    self->page_size = kv_cache_page_size(layers, kv_heads, head_dim);
    err = take_memory(self);
    if (err != ODSI_OK) {
        kv_cache_close(&self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void kv_cache_close(struct kv_cache **self)
{
    if (!*self)
        return;
    if ((*self)->pool.pages_dev)
        (*self)->backend->ops->mem_free((*self)->backend, (*self)->pool.pages_dev);
    alloc_free((*self)->free_pages);
    alloc_free((*self)->pages);
    alloc_free((*self)->buckets);
    alloc_free((*self)->copies);
    alloc_free(*self);
    *self = NULL;
}

/* ---- pages by key --------------------------------------------------------------------------- */

static uint32_t *bucket_of(struct kv_cache *self, const struct digest *key)
{
    return &self->buckets[bytes_load_u32(key->bytes) & (self->bucket_count - 1)];
}

static uint32_t find(struct kv_cache *self, const struct digest *key)
{
    uint32_t at = *bucket_of(self, key);
    while (at != NONE && !digest_equal(&self->pages[at].key, key))
        at = self->pages[at].bucket_next;
    return at;
}

static void add_key(struct kv_cache *self, uint32_t index, const struct digest *key,
                    uint32_t parent)
{
    struct page *page = &self->pages[index];
    uint32_t *bucket = bucket_of(self, key);
    page->key = *key;
    page->has_key = 1;
    page->parent = parent;
    page->child_count = 0;
    page->bucket_next = *bucket;
    *bucket = index;
    if (parent != NONE)
        self->pages[parent].child_count++;
}

static void remove_key(struct kv_cache *self, uint32_t index)
{
    struct page *page = &self->pages[index];
    uint32_t *at = bucket_of(self, &page->key);
    ODSI_ASSERT(page->child_count == 0);
    while (*at != index)
        at = &self->pages[*at].bucket_next;
    *at = page->bucket_next;
    page->has_key = 0;
    if (page->parent != NONE)
        self->pages[page->parent].child_count--;
}

/* ---- cached pages, by age ------------------------------------------------------------------- */

static void cache_add(struct kv_cache *self, uint32_t index)
{
    struct page *page = &self->pages[index];
    page->older = self->newest;
    page->newer = NONE;
    if (self->newest != NONE)
        self->pages[self->newest].newer = index;
    else
        self->oldest = index;
    self->newest = index;
    self->cached_count++;
}

static void cache_remove(struct kv_cache *self, uint32_t index)
{
    const struct page *page = &self->pages[index];
    if (page->older != NONE)
        self->pages[page->older].newer = page->newer;
    else
        self->oldest = page->newer;
    if (page->newer != NONE)
        self->pages[page->newer].older = page->older;
    else
        self->newest = page->older;
    self->cached_count--;
}

/* ---- references ----------------------------------------------------------------------------- */

static void reference(struct kv_cache *self, uint32_t index)
{
    if (self->pages[index].ref_count++ == 0)
        cache_remove(self, index);
}

static void release(struct kv_cache *self, uint32_t index)
{
    struct page *page = &self->pages[index];
    ODSI_ASSERT(page->ref_count > 0);
    if (--page->ref_count > 0)
        return;
    if (page->has_key)
        cache_add(self, index);
    else
        self->free_pages[self->free_count++] = index;
}

/* A private page; there must be a free or a cached one. */
static uint32_t take_page(struct kv_cache *self)
{
    uint32_t index;
    if (self->free_count > 0) {
        index = self->free_pages[--self->free_count];
    } else {
        index = self->oldest;
        ODSI_ASSERT(index != NONE);
        cache_remove(self, index);
        remove_key(self, index);
    }
    self->pages[index].ref_count = 1;
    return index;
}

static uint16_t *page_dev(const struct kv_cache *self, uint32_t index)
{
    return self->pool.pages_dev + (size_t)index * (self->page_size / sizeof(uint16_t));
}

/* The whole page: which positions of it count is the session's business. */
static enum odsi_err copy_page(struct kv_cache *self, uint32_t to, uint32_t from)
{
    struct backend *backend = self->backend;
    enum odsi_err err =
        backend->ops->download(backend, self->copies, page_dev(self, from), self->page_size);
    if (err == ODSI_OK)
        err = backend->ops->upload(backend, page_dev(self, to), self->copies, self->page_size);
    return err;
}

static int pages_equal(struct kv_cache *self, uint32_t a, uint32_t b)
{
    struct backend *backend = self->backend;
    uint8_t *second = self->copies + self->page_size;
    return backend->ops->download(backend, self->copies, page_dev(self, a), self->page_size) ==
               ODSI_OK &&
           backend->ops->download(backend, second, page_dev(self, b), self->page_size) == ODSI_OK &&
           memcmp(self->copies, second, self->page_size) == 0;
}

/* ---- tables --------------------------------------------------------------------------------- */

/* How many pages from the first on are kept, each with a reference taken, in pages[]. */
static uint32_t match(struct kv_cache *self, uint32_t *pages, const struct digest *keys,
                      uint32_t key_count)
{
    uint32_t count = 0;
    while (count < key_count) {
        const uint32_t index = find(self, &keys[count]);
        if (index == NONE)
            break;
        ODSI_ASSERT(self->pages[index].parent == (count == 0 ? NONE : pages[count - 1]));
        reference(self, index);
        pages[count++] = index;
    }
    return count;
}

static void release_last(struct kv_cache *self, const uint32_t *pages, uint32_t first, uint32_t end)
{
    while (end > first)
        release(self, pages[--end]);
}

static int has_room(const struct kv_cache *self, uint32_t page_count)
{
    return page_count <= self->free_count + self->cached_count;
}

static enum odsi_err no_room(const struct kv_cache *self, uint32_t token_count)
{
    return odsi_fail(ODSI_ERR_BUSY,
                     "a session of %u positions: the KV cache has room for %llu now; try again "
                     "later",
                     token_count, (unsigned long long)kv_cache_free_pages(self) * KV_PAGE_TOKENS);
}

/* Private pages for the places [first, end), for which there is room; the first one is a copy of
 * `partial` (NONE: of nothing), whose reference is given up. After an error the places are filled
 * all the same, but the copy is not one. */
static enum odsi_err fill_private(struct kv_cache *self, uint32_t *pages, uint32_t first,
                                  uint32_t end, uint32_t partial)
{
    enum odsi_err err = ODSI_OK;
    for (uint32_t i = first; i < end; i++)
        pages[i] = take_page(self);
    if (partial != NONE) {
        err = copy_page(self, pages[first], partial);
        release(self, partial);
    }
    return err;
}

/* Takes what is kept and the rest fresh. A page that would have to be copied is left alone when
 * there is no room beside it. */
static enum odsi_err fill_table(struct kv_cache *self, struct kv_table *table,
                                const struct digest *keys, uint32_t key_count, uint32_t held_max,
                                uint32_t *held_count)
{
    const uint32_t matched = match(self, table->pages, keys, key_count);
    const uint32_t whole = held_max / KV_PAGE_TOKENS;
    const uint32_t shared = matched < whole ? matched : whole;
    const int is_cut = matched > whole && held_max % KV_PAGE_TOKENS != 0;
    uint32_t partial = is_cut ? table->pages[whole] : NONE;
    release_last(self, table->pages, shared + (is_cut ? 1 : 0), matched);
    if (partial != NONE && !has_room(self, table->page_count - shared)) {
        release(self, partial);
        partial = NONE;
    }
    if (!has_room(self, table->page_count - shared)) {
        release_last(self, table->pages, 0, shared);
        return no_room(self, table->page_count * KV_PAGE_TOKENS);
    }
    table->shared_count = shared;
    *held_count = partial != NONE ? held_max : shared * KV_PAGE_TOKENS;
    return fill_private(self, table->pages, shared, table->page_count, partial);
}

enum odsi_err kv_cache_take(struct kv_cache *self, struct kv_table *table, uint32_t token_count,
                            const struct digest *keys, uint32_t key_count, uint32_t held_max,
                            uint32_t *held_count)
{
    ODSI_ASSERT(table->page_count == 0);
    const uint32_t need = (uint32_t)(((uint64_t)token_count + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS);
    ODSI_ASSERT(key_count <= need && held_max <= token_count);
    *held_count = 0;
    if (need > self->pool.page_count)
        return odsi_fail(ODSI_ERR_RANGE,
                         "a session of %u positions: the KV cache holds %llu in all; raise "
                         "--kv-memory on this worker",
                         token_count, (unsigned long long)self->pool.page_count * KV_PAGE_TOKENS);
    enum odsi_err err = alloc_zeroed(&table->pages, need, sizeof *table->pages);
    if (err != ODSI_OK)
        return err;
    table->page_count = need;
    err = fill_table(self, table, keys, key_count, held_max, held_count);
    if (err == ODSI_OK)
        return ODSI_OK;
    if (err == ODSI_ERR_BUSY)
        table->page_count = 0; /* it got none */
    kv_cache_give(self, table);
    return err;
}

void kv_cache_give(struct kv_cache *self, struct kv_table *table)
{
    release_last(self, table->pages, 0, table->page_count);
    ODSI_ASSERT(self->free_count + self->cached_count <= self->pool.page_count);
    alloc_free(table->pages);
    memset(table, 0, sizeof *table);
}

enum odsi_err kv_cache_truncate(struct kv_cache *self, struct kv_table *table, uint32_t length)
{
    const uint32_t first = length / KV_PAGE_TOKENS;
    const uint32_t shared = table->shared_count;
    if (shared <= first)
        return ODSI_OK;
    const int is_cut = length % KV_PAGE_TOKENS != 0;
    const uint32_t kept = first + (is_cut ? 1 : 0);
    uint32_t own_count = 0; /* pages that nobody else holds are there to be taken */
    for (uint32_t i = kept; i < shared; i++)
        own_count += self->pages[table->pages[i]].ref_count == 1;
    if (shared - first > own_count && !has_room(self, shared - first - own_count))
        return no_room(self, table->page_count * KV_PAGE_TOKENS);
    const uint32_t partial = is_cut ? table->pages[first] : NONE;
    release_last(self, table->pages, kept, shared);
    table->shared_count = first;
    return fill_private(self, table->pages, first, shared, partial);
}

int kv_cache_publish(struct kv_cache *self, struct kv_table *table, const struct digest *key)
{
    const uint32_t place = table->shared_count;
    ODSI_ASSERT(place < table->page_count);
    const uint32_t own = table->pages[place];
    const uint32_t kept = find(self, key);
    if (kept == NONE) {
        add_key(self, own, key, place == 0 ? NONE : table->pages[place - 1]);
    } else {
        ODSI_ASSERT(self->pages[kept].parent == (place == 0 ? NONE : table->pages[place - 1]));
        if (!pages_equal(self, own, kept))
            return 0;
        reference(self, kept);
        release(self, own);
        table->pages[place] = kept;
    }
    table->shared_count++;
    return 1;
}

const struct kv_pool *kv_cache_pool(const struct kv_cache *self)
{
    return &self->pool;
}

uint32_t kv_cache_free_pages(const struct kv_cache *self)
{
    return self->free_count + self->cached_count;
}

uint32_t kv_cache_cached_pages(const struct kv_cache *self)
{
    return self->cached_count;
}
