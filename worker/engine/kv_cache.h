/* Paged KV cache: which page of key/value memory belongs to which sessions.
 *
 * A page holds KV_PAGE_TOKENS positions of all layers of this worker (layout: struct kv_pool in
 * kernels/ops.h). A session's pages are taken when it opens, for as many positions as it may ever
 * reach: what was admitted can always go on, and no session can run into another's memory. The
 * pages of a text's beginning are kept under a key and shared by all sessions that begin so.
 *
 * States of a page, and who moves it:
 *
 *     free -- take --> private -- publish --> shared <--- take / give ---> cached
 *      ^------ give ------'                                                   |
 *      '------------------------------ eviction (take, truncate) -------------'
 *
 * Invariants:
 *  1. A private page is in one place of one table, and only that session's steps write to it.
 *  2. A shared or cached page has a key and is immutable from publish to eviction. A session that
 *     is to write into one gets a private page first, with a copy of the positions it keeps.
 *  3. The first shared_count places of a table are shared pages and the others private ones; the
 *     session writes behind the shared ones only. Each place holds one reference; a shared page
 *     has one for each table it is in, a cached page none.
 *  4. The page in front of a shared one in a table is the one in front of it in every table (keys
 *     are chains: worker/engine/prefix_key.h), so a page has at least the references of each page
 *     behind it. References are given up from the end of a table, so among cached pages one is
 *     always older than the page in front of it: evicting the oldest takes leaves before parents,
 *     and what is kept can be found from its beginning.
 *  5. A page is evicted only when it is cached. free + cached + private + shared = page_count.
 *
 * Threads: none of its own; one owner thread (the engine's). No call blocks.
 * Limits: all memory is taken by kv_cache_open, but for a table of 4 bytes a page. */
#ifndef ODSI_WORKER_ENGINE_KV_CACHE_H
#define ODSI_WORKER_ENGINE_KV_CACHE_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "kernels/backend.h"

#include <stdint.h>

struct kv_cache; /* one per engine */

/* The pages of one session; zero-initialize. */
struct kv_table {
    uint32_t *pages; /* [page_count]; index position / KV_PAGE_TOKENS */
    uint32_t page_count;
    uint32_t shared_count; /* the first of them */
};

/* Takes page_count pages of layers x kv_heads x head_dim from backend, which must outlive the
 * cache. Errors: ODSI_ERR_INVALID (a count is 0), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err kv_cache_open(struct kv_cache **out, struct backend *backend,
                                          uint32_t page_count, uint32_t layers, uint32_t kv_heads,
                                          uint32_t head_dim);
void kv_cache_close(struct kv_cache **self);

/* Bytes of one page of that shape. */
uint64_t kv_cache_page_size(uint32_t layers, uint32_t kv_heads, uint32_t head_dim);

/* Takes the pages for token_count positions, or changes nothing; evicts cached pages where free
 * ones do not do. Those kept under keys[key_count] (page keys, from the first page on) become the
 * table's as far as there are any, but hold at most held_max positions: a page of which only some
 * positions are within is copied. *held_count: the positions that are there already.
 * Errors: ODSI_ERR_BUSY (too few pages now), ODSI_ERR_RANGE (more than there are at all),
 * ODSI_ERR_NO_MEMORY, those of the backend. */
ODSI_MUST_USE enum odsi_err kv_cache_take(struct kv_cache *self, struct kv_table *table,
                                          uint32_t token_count, const struct digest *keys,
                                          uint32_t key_count, uint32_t held_max,
                                          uint32_t *held_count);
/* Gives a session's pages back, shared ones to the cache; table is empty afterwards and may be so
 * before. */
void kv_cache_give(struct kv_cache *self, struct kv_table *table);

/* Makes positions from length on writable again: shared pages behind it are replaced by private
 * ones, the one that it is inside of by a copy. Never fails for a table that has none of those.
 * Errors: ODSI_ERR_BUSY (too few pages now): nothing has changed; those of the backend: positions
 * of the page that length is inside of are lost. */
ODSI_MUST_USE enum odsi_err kv_cache_truncate(struct kv_cache *self, struct kv_table *table,
                                              uint32_t length);

/* Shares the first private page of the table, whose positions are all written, under key, the next
 * one of the chain of those in front of it. If one is kept under that key already and has the same
 * content, that one takes its place and the page becomes free. Returns 0, and nothing has changed,
 * when the content differs (somebody did not compute what the key says, and nobody can tell who) or
 * cannot be read from the backend. */
int kv_cache_publish(struct kv_cache *self, struct kv_table *table, const struct digest *key);

const struct kv_pool *kv_cache_pool(const struct kv_cache *self);
/* Pages that new sessions could get now: free and cached ones. */
uint32_t kv_cache_free_pages(const struct kv_cache *self);
/* The cached ones among them. */
uint32_t kv_cache_cached_pages(const struct kv_cache *self);
#endif
