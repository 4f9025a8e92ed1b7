/* Paged KV cache: which page of key/value memory belongs to which session.
 *
 * A page holds KV_PAGE_TOKENS positions of all layers of this worker (layout: struct kv_pool in
 * kernels/ops.h). A session's pages are taken when it opens, for as many positions as it may ever
 * reach: what was admitted can always go on, and no session can run into another's memory.
 * Threads: none of its own; one owner thread (the engine's). No call blocks.
 * Limits: all page memory is taken by kv_cache_open; nothing allocates device memory afterwards. */
#ifndef ODSI_WORKER_ENGINE_KV_CACHE_H
#define ODSI_WORKER_ENGINE_KV_CACHE_H
#include "common/base/err.h"
#include "kernels/backend.h"

#include <stdint.h>

struct kv_cache; /* one per engine */

/* The pages of one session; zero-initialize. */
struct kv_table {
    uint32_t *pages; /* [page_count]; index position / KV_PAGE_TOKENS */
    uint32_t page_count;
};

/* Takes page_count pages of layers x kv_heads x head_dim from backend, which must outlive the
 * cache. Errors: ODSI_ERR_INVALID (a count is 0), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err kv_cache_open(struct kv_cache **out, struct backend *backend,
                                          uint32_t page_count, uint32_t layers, uint32_t kv_heads,
                                          uint32_t head_dim);
void kv_cache_close(struct kv_cache **self);

/* Bytes of one page of that shape. */
uint64_t kv_cache_page_size(uint32_t layers, uint32_t kv_heads, uint32_t head_dim);

/* Takes the pages for token_count positions, or changes nothing.
 * Errors: ODSI_ERR_BUSY (too few free pages now), ODSI_ERR_RANGE (more than there are at all),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err kv_cache_take(struct kv_cache *self, struct kv_table *table,
                                          uint32_t token_count);
/* Gives a session's pages back; table is empty afterwards and may be so before. */
void kv_cache_give(struct kv_cache *self, struct kv_table *table);

const struct kv_pool *kv_cache_pool(const struct kv_cache *self);
uint32_t kv_cache_free_pages(const struct kv_cache *self);
#endif
