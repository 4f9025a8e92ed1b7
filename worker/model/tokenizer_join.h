/* From the bytes of a word to the ids of its tokens: symbols join, the best pair first, until no
 * pair of neighbours makes a token.
 *
 * The time of a word is n log n in its size. Words come back all the time, so the ids of short
 * ones are remembered for as long as the object lives; they are where the time of a text goes.
 * Threads: one owner; the tokenizer outlives it. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_JOIN_H
#define ODSI_WORKER_MODEL_TOKENIZER_JOIN_H
#include "common/base/err.h"
#include "worker/model/tokenizer_parts.h"

#include <stddef.h>
#include <stdint.h>

struct tokenizer_symbol;
struct tokenizer_joint;
struct tokenizer_seen;

struct tokenizer_join {
    const struct tokenizer *tokenizer;
    const char *text;                 /* every word lies in it */
    struct tokenizer_symbol *symbols; /* [capacity] */
    uint32_t symbol_count;
    uint32_t capacity;
    struct tokenizer_joint *heap; /* [2 * capacity], the best one first */
    uint32_t heap_count;
    struct tokenizer_seen *seen; /* [seen_mask + 1], by hash of the word; NULL for short texts */
    uint32_t seen_mask;
};

/* text stays where it is, and its words as they are, until the close.
 * Errors: ODSI_ERR_NO_MEMORY; closing is then allowed, too. */
ODSI_MUST_USE enum odsi_err tokenizer_join_open(struct tokenizer_join *self,
                                                const struct tokenizer *tokenizer, const char *text,
                                                size_t size);
void tokenizer_join_close(struct tokenizer_join *self);

/* Adds the ids of the word of size bytes at offset of the text. size > 0.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_join_word(struct tokenizer_join *self, uint32_t offset,
                                                uint32_t size, struct tokenizer_ids *list);
#endif
