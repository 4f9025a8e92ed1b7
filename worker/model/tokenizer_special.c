#include "worker/model/tokenizer_special.h"

#include "common/base/alloc.h"

#include <stdlib.h>
#include <string.h>

static int compare_bytes(const char *a, size_t a_size, const char *b, size_t b_size)
{
    const int order = memcmp(a, b, a_size < b_size ? a_size : b_size);
    return order != 0 ? order : (a_size > b_size) - (a_size < b_size);
}

static int compare(const void *left, const void *right)
{
    const struct tokenizer_special_text *a = left;
    const struct tokenizer_special_text *b = right;
    const int order = compare_bytes(a->text, a->size, b->text, b->size);
    return order != 0 ? order : (a->id > b->id) - (a->id < b->id);
}

enum odsi_err tokenizer_special_add(struct tokenizer_special *self,
                                    const struct tokenizer_special_text *text)
{
    if (self->count == self->capacity) {
        const uint32_t capacity = self->capacity ? 2 * self->capacity : 64;
        const enum odsi_err err = alloc_resize(&self->sorted, capacity, sizeof *self->sorted);
        if (err != ODSI_OK)
            return err;
        self->capacity = capacity;
    }
    self->sorted[self->count++] = *text;
    return ODSI_OK;
}

void tokenizer_special_finish(struct tokenizer_special *self)
{
    uint32_t kept = 0;
    if (self->count > 0)
        qsort(self->sorted, self->count, sizeof *self->sorted, compare);
    for (uint32_t i = 0; i < self->count; i++) {
        const struct tokenizer_special_text *one = &self->sorted[i];
        const struct tokenizer_special_text *last = kept ? &self->sorted[kept - 1] : NULL;
        if (!last || compare_bytes(last->text, last->size, one->text, one->size) != 0)
            self->sorted[kept++] = *one;
    }
    self->count = kept;
    for (uint32_t byte = 0, at = 0; byte <= 256; byte++) {
        while (at < kept && (uint8_t)self->sorted[at].text[0] < byte)
            at++;
        self->first[byte] = at;
    }
}

void tokenizer_special_close(struct tokenizer_special *self)
{
    alloc_free(self->sorted);
    self->sorted = NULL;
}

/* The first of [low, high), which all are longer than depth, whose byte at depth is at least byte;
 * high when there is none. */
static uint32_t first_at_least(const struct tokenizer_special *self, uint32_t low, uint32_t high,
                               uint32_t depth, unsigned byte)
{
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if ((uint8_t)self->sorted[middle].text[depth] < byte)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

const struct tokenizer_special_text *tokenizer_special_at(const struct tokenizer_special *self,
                                                          const char *text, size_t size,
                                                          size_t control_size)
{
    const struct tokenizer_special_text *best = NULL;
    uint32_t low = self->first[(uint8_t)text[0]];
    uint32_t high = self->first[(uint8_t)text[0] + 1];
    for (uint32_t depth = 1; low < high; depth++) {
        /* All of [low, high) begin with depth bytes of text; the shortest stands first. */
        const struct tokenizer_special_text *one = &self->sorted[low];
        if (one->size == depth) {
            if (!one->is_control || depth <= control_size)
                best = one;
            low++;
        }
        if (depth == size || low == high)
            break;
        const unsigned byte = (uint8_t)text[depth];
        if ((uint8_t)self->sorted[low].text[depth] != byte)
            low = first_at_least(self, low, high, depth, byte);
        if (low < high && (uint8_t)self->sorted[high - 1].text[depth] != byte)
            high = first_at_least(self, low, high, depth, byte + 1);
    }
    return best;
}

const struct tokenizer_special_text *tokenizer_special_find(const struct tokenizer_special *self,
                                                            const char *text, size_t size)
{
    uint32_t low = 0;
    uint32_t high = self->count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        const struct tokenizer_special_text *one = &self->sorted[middle];
        const int order = compare_bytes(one->text, one->size, text, size);
        if (order == 0)
            return one;
        if (order < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return NULL;
}
