/* Which path was given the beginning of a text last: its workers hold the keys and values of it,
 * unless they needed the memory since (worker/hop/hop.h, "Prefix reuse"). What is held is only of
 * use on the same path from its first stage on, so whole paths are remembered.
 *
 * Bounded: the last PREFIX_BOOK_PATHS paths, and some PREFIX_BOOK_KEYS keys, of which newer ones
 * push out older ones. Pure; threads: one owner. */
#ifndef ODSI_WORKER_GATEWAY_PREFIX_BOOK_H
#define ODSI_WORKER_GATEWAY_PREFIX_BOOK_H
#include "common/base/err.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"

#include <stdint.h>

#define PREFIX_BOOK_PATHS 64u
#define PREFIX_BOOK_KEYS  8192u

struct prefix_book;

struct prefix_book_stage {
    struct digest worker_id;
    uint32_t layer_first;
    uint32_t layer_end;
};

/* Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err prefix_book_open(struct prefix_book **out);
void prefix_book_close(struct prefix_book **self);

/* A text with these prefix keys (worker/engine/prefix_key.h) goes over that path; stage_count is 1
 * to LIMIT_STAGES_MAX. */
void prefix_book_note(struct prefix_book *self, const struct digest *keys, uint32_t key_count,
                      const struct prefix_book_stage *stages, uint32_t stage_count);
/* The path that was given the longest beginning of a text with these keys: how many of the keys,
 * and the path in *stages, valid until the next call. 0: none is known. */
uint32_t prefix_book_find(const struct prefix_book *self, const struct digest *keys,
                          uint32_t key_count, const struct prefix_book_stage **stages,
                          uint32_t *stage_count);
#endif
