/* Names for the beginning of a text, so that what was computed for it is known again.
 *
 * A prefix key names the first n * KV_PAGE_TOKENS tokens of a text: a chain of SHA-256,
 *     key[i] = SHA-256("odsi kv prefix 1" || key[i - 1] || 64 token ids, u32 little-endian),
 * where key[-1] is a seed of the caller's. Who does not know the seed cannot tell from the keys
 * what the text is, not even by guessing it.
 *
 * A page key names the keys and values that a span of layers has for those tokens, among those
 * that may share them (the scope; worker/hop/hop.h says who that is):
 *     page[-1] = SHA-256("odsi kv scope 1" || scope || u32 layer_first || u32 layer_end),
 *     page[i]  = SHA-256("odsi kv page 1" || page[i - 1] || key[i]).
 * Chained again, so that equal page keys have equal keys before them whatever a caller made the
 * prefix keys of. Tags stand without a NUL. Pure; any thread. */
#ifndef ODSI_WORKER_ENGINE_PREFIX_KEY_H
#define ODSI_WORKER_ENGINE_PREFIX_KEY_H
#include "common/crypto/digest.h"
#include "kernels/ops.h"

#include <stdint.h>

/* keys[key_count] of tokens[key_count * KV_PAGE_TOKENS]. */
void prefix_key_chain(struct digest *keys, const struct digest *seed, const uint32_t *tokens,
                      uint32_t key_count);

/* pages[key_count] of keys[key_count] for layers [layer_first, layer_end). */
void prefix_key_pages(struct digest *pages, const struct digest *scope, uint32_t layer_first,
                      uint32_t layer_end, const struct digest *keys, uint32_t key_count);
#endif
