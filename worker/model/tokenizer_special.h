/* Tokens that a text may name outright: control and user-defined ones, by their text.
 *
 * Of those that begin at a byte the longest counts. Looking at one byte of a text takes no more
 * than TOKENIZER_SPECIAL_SIZE_MAX steps, each a search among the tokens that are still possible.
 * Threads: built by one owner, then any thread. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_SPECIAL_H
#define ODSI_WORKER_MODEL_TOKENIZER_SPECIAL_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

struct tokenizer_special_text {
    const char *text; /* the tokenizer's */
    uint32_t size;    /* at least 1 */
    uint32_t id;
    int is_control; /* found only where control tokens may be written */
};

struct tokenizer_special {
    struct tokenizer_special_text *sorted; /* [count], by their bytes */
    uint32_t count;
    uint32_t capacity;
    uint32_t first[257]; /* those that begin with byte b are [first[b], first[b + 1]) */
};

/* Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_special_add(struct tokenizer_special *self,
                                                  const struct tokenizer_special_text *text);
/* After the last add: keeps the lowest id of equal texts, and makes the index. */
void tokenizer_special_finish(struct tokenizer_special *self);
void tokenizer_special_close(struct tokenizer_special *self);

/* The longest that the size bytes at text begin with; control tokens count when they end within
 * control_size bytes. NULL: none. size > 0. */
const struct tokenizer_special_text *tokenizer_special_at(const struct tokenizer_special *self,
                                                          const char *text, size_t size,
                                                          size_t control_size);
/* The one with exactly this text, or NULL. */
const struct tokenizer_special_text *tokenizer_special_find(const struct tokenizer_special *self,
                                                            const char *text, size_t size);
#endif
