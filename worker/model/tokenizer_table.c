#include "worker/model/tokenizer_table.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"

enum odsi_err tokenizer_table_open(struct tokenizer_table *self, const uint8_t seed[32],
                                   const char *texts, uint32_t count_max)
{
    uint32_t slot_count = 2;
    while (slot_count / 2 < count_max)
        slot_count *= 2;
    *self = (struct tokenizer_table){
        .texts = texts,
        .mask = slot_count - 1,
        .base = 256 + bytes_load_u64(seed) % (TOKENIZER_HASH_PRIME - 256),
    };
    const enum odsi_err err = alloc_zeroed(&self->slots, slot_count, sizeof *self->slots);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; i < slot_count; i++)
        self->slots[i].id = TOKENIZER_TABLE_NONE;
    return ODSI_OK;
}

void tokenizer_table_close(struct tokenizer_table *self)
{
    alloc_free(self->slots);
    alloc_free(self->powers);
    self->slots = NULL;
    self->powers = NULL;
}

void tokenizer_table_add(struct tokenizer_table *self, uint32_t id, uint32_t offset, uint32_t size)
{
    const char *text = self->texts + offset;
    struct tokenizer_slot *slot =
        tokenizer_table_slot(self, tokenizer_table_hash(self, text, size), text, size);
    if (slot->id != TOKENIZER_TABLE_NONE)
        return;
    *slot = (struct tokenizer_slot){.id = id, .offset = offset, .size = size};
    if (size > self->size_max)
        self->size_max = size;
}

enum odsi_err tokenizer_table_finish(struct tokenizer_table *self)
{
    const enum odsi_err err =
        alloc_zeroed(&self->powers, (size_t)self->size_max + 1, sizeof *self->powers);
    if (err != ODSI_OK)
        return err;
    self->powers[0] = 1;
    for (uint32_t i = 1; i <= self->size_max; i++)
        self->powers[i] = tokenizer_table_multiply_add(self->powers[i - 1], self->base, 0);
    return ODSI_OK;
}

uint32_t tokenizer_table_find_joined(const struct tokenizer_table *self, uint64_t hash,
                                     const char *left, size_t left_size, const char *right,
                                     size_t right_size)
{
    uint32_t at = (uint32_t)(hash ^ hash >> 32) & self->mask;
    for (;; at = (at + 1) & self->mask) {
        const struct tokenizer_slot *slot = &self->slots[at];
        const char *text = self->texts + slot->offset;
        if (slot->id == TOKENIZER_TABLE_NONE ||
            (slot->size == left_size + right_size && memcmp(text, left, left_size) == 0 &&
             memcmp(text + left_size, right, right_size) == 0))
            return slot->id;
    }
}

/* ---- merges --------------------------------------------------------------------------------- */

enum odsi_err tokenizer_merges_open(struct tokenizer_merges *self, const uint8_t seed[32],
                                    uint32_t count_max)
{
    *self = (struct tokenizer_merges){
        .shift = 63,
        .factors = {bytes_load_u64(seed + 8) | 1, bytes_load_u64(seed + 16) | 1},
    };
    while (UINT64_C(1) << (63 - self->shift) < count_max)
        self->shift--;
    const size_t slot_count = (size_t)1 << (64 - self->shift);
    const enum odsi_err err = alloc_zeroed(&self->slots, slot_count, sizeof *self->slots);
    if (err != ODSI_OK)
        return err;
    memset(self->slots, 0xff, slot_count * sizeof *self->slots);
    return ODSI_OK;
}

void tokenizer_merges_close(struct tokenizer_merges *self)
{
    alloc_free(self->slots);
    self->slots = NULL;
}

void tokenizer_merges_add(struct tokenizer_merges *self, const struct tokenizer_merge *merge)
{
    ODSI_ASSERT(merge->id != TOKENIZER_TABLE_NONE);
    struct tokenizer_merge *slot = tokenizer_merges_slot(self, merge->left, merge->right);
    if (slot->id == TOKENIZER_TABLE_NONE)
        *slot = *merge;
}
