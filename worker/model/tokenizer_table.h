/* The two hash tables of a tokenizer: normal tokens by text, and merges by the pair they join.
 *
 * Texts are hashed as polynomials modulo 2^61-1, so that the hash of two neighbours joined comes
 * from theirs without reading them again. The base, and the factors of the pair hash, come from a
 * digest of the whole vocabulary: whoever makes a vocabulary cannot aim for collisions.
 * Threads: built by one owner, then any thread. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_TABLE_H
#define ODSI_WORKER_MODEL_TOKENIZER_TABLE_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define TOKENIZER_HASH_PRIME ((UINT64_C(1) << 61) - 1)
#define TOKENIZER_TABLE_NONE UINT32_MAX

/* A text of the table: bytes [offset, offset + size) of the texts that it was opened with. */
struct tokenizer_slot {
    uint32_t id; /* TOKENIZER_TABLE_NONE: empty */
    uint32_t offset;
    uint32_t size;
};

struct tokenizer_table {
    const char *texts;            /* the tokenizer's; outlives the table */
    struct tokenizer_slot *slots; /* [mask + 1], open addressing */
    uint32_t mask;
    uint32_t size_max; /* of any text in it */
    uint64_t base;
    uint64_t *powers; /* [size_max + 1] of base; NULL until tokenizer_table_finish */
};

/* seed: 32 bytes that depend on everything in the vocabulary. count_max: of texts to add.
 * Errors: ODSI_ERR_NO_MEMORY; closing is then allowed, too. */
ODSI_MUST_USE enum odsi_err tokenizer_table_open(struct tokenizer_table *self,
                                                 const uint8_t seed[32], const char *texts,
                                                 uint32_t count_max);
void tokenizer_table_close(struct tokenizer_table *self);
/* Keeps the first id of equal texts. */
void tokenizer_table_add(struct tokenizer_table *self, uint32_t id, uint32_t offset, uint32_t size);
/* After the last add, before the first tokenizer_table_joined_hash. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_table_finish(struct tokenizer_table *self);

/* a * b + c modulo the prime; all below it. */
static inline uint64_t tokenizer_table_multiply_add(uint64_t a, uint64_t b, uint64_t c)
{
    const unsigned __int128 product = (unsigned __int128)a * b + c;
    const uint64_t folded = (uint64_t)(product & TOKENIZER_HASH_PRIME) + (uint64_t)(product >> 61);
    return folded >= TOKENIZER_HASH_PRIME ? folded - TOKENIZER_HASH_PRIME : folded;
}

static inline uint64_t tokenizer_table_hash(const struct tokenizer_table *self, const char *text,
                                            size_t size)
{
    uint64_t hash = 0;
    for (size_t i = 0; i < size; i++)
        hash = tokenizer_table_multiply_add(hash, self->base, (uint64_t)(uint8_t)text[i] + 1);
    return hash;
}

/* The hash of two neighbours joined; right_size <= size_max. */
static inline uint64_t tokenizer_table_joined_hash(const struct tokenizer_table *self,
                                                   uint64_t left_hash, uint64_t right_hash,
                                                   size_t right_size)
{
    return tokenizer_table_multiply_add(left_hash, self->powers[right_size], right_hash);
}

/* The slot that holds text, or the empty one where it would be. */
static inline struct tokenizer_slot *tokenizer_table_slot(const struct tokenizer_table *self,
                                                          uint64_t hash, const char *text,
                                                          size_t size)
{
    uint32_t at = (uint32_t)(hash ^ hash >> 32) & self->mask;
    for (;; at = (at + 1) & self->mask) {
        struct tokenizer_slot *slot = &self->slots[at];
        if (slot->id == TOKENIZER_TABLE_NONE ||
            (slot->size == size && memcmp(self->texts + slot->offset, text, size) == 0))
            return slot;
    }
}

/* The token whose text this is, or TOKENIZER_TABLE_NONE. hash is that of text. */
static inline uint32_t tokenizer_table_find(const struct tokenizer_table *self, uint64_t hash,
                                            const char *text, size_t size)
{
    return size > self->size_max ? TOKENIZER_TABLE_NONE
                                 : tokenizer_table_slot(self, hash, text, size)->id;
}

/* The same for a text in two parts. */
uint32_t tokenizer_table_find_joined(const struct tokenizer_table *self, uint64_t hash,
                                     const char *left, size_t left_size, const char *right,
                                     size_t right_size);

/* ---- merges --------------------------------------------------------------------------------- */

struct tokenizer_merge {
    uint32_t left, right; /* both TOKENIZER_TABLE_NONE: empty */
    uint32_t rank;        /* the lower joins first */
    uint32_t id;          /* what they make */
};

struct tokenizer_merges {
    struct tokenizer_merge *slots; /* [1 << (64 - shift)] */
    unsigned shift;
    uint64_t factors[2];
};

/* Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_merges_open(struct tokenizer_merges *self,
                                                  const uint8_t seed[32], uint32_t count_max);
void tokenizer_merges_close(struct tokenizer_merges *self);
/* Keeps the first rank of equal pairs. */
void tokenizer_merges_add(struct tokenizer_merges *self, const struct tokenizer_merge *merge);

static inline struct tokenizer_merge *tokenizer_merges_slot(const struct tokenizer_merges *self,
                                                            uint32_t left, uint32_t right)
{
    const uint64_t hash = left * self->factors[0] + right * self->factors[1];
    const uint64_t mask = UINT64_MAX >> self->shift;
    for (uint64_t at = hash >> self->shift;; at = (at + 1) & mask) {
        struct tokenizer_merge *slot = &self->slots[at];
        if ((slot->left == left && slot->right == right) || slot->id == TOKENIZER_TABLE_NONE)
            return slot;
    }
}

/* The merge of these two tokens, or NULL. */
static inline const struct tokenizer_merge *
tokenizer_merges_find(const struct tokenizer_merges *self, uint32_t left, uint32_t right)
{
    const struct tokenizer_merge *slot = tokenizer_merges_slot(self, left, right);
    return slot->id == TOKENIZER_TABLE_NONE ? NULL : slot;
}
#endif
