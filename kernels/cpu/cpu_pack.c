#include "kernels/cpu/cpu_pack.h"

#include "common/base/assert.h"
#include "kernels/cpu/cpu_format.h"
#include "kernels/det.h"

#include <string.h>

/* Everything here works on words of 32 bits: one quad of a row, which is also one lane of a vector.
 * The sources differ in which columns share a byte; all of that is moving bits inside and between
 * words. (Byte order: little endian, as everywhere in kernels/cpu.) */
#define WORDS_MAX (8u * 8u) /* of one row: 8 parts of 8 bits, or fewer */
#define LOW_1     0x01010101u
#define LOW_2     0x03030303u
#define LOW_4     0x0f0f0f0fu

/* What one source block of one row becomes: the words of its parts, and its scales. */
struct packed {
    uint32_t words[WORDS_MAX]; /* [part][bits] */
    uint8_t heads[4];          /* d, m */
    uint8_t bytes[16];         /* [part][2] */
};

static void load_words(uint32_t *out, const uint8_t *from, uint32_t count)
{
    memcpy(out, from, count * sizeof *out);
}

/* Two words of bytes become one of halves: their low halves, or their high ones. */
static uint32_t join_low(uint32_t a, uint32_t b)
{
    return (a & LOW_4) | (b & LOW_4) << 4;
}

static uint32_t join_high(uint32_t a, uint32_t b)
{
    return ((a >> 4) & LOW_4) | (b & ~LOW_4);
}

/* Swaps the bits of *a selected by mask << shift with those of *b selected by mask. */
static void swap_bits(uint32_t *a, uint32_t *b, uint32_t shift, uint32_t mask)
{
    const uint32_t differ = ((*a >> shift) ^ *b) & mask;
    *a ^= differ << shift;
    *b ^= differ;
}

/* Of 4 words: pair k of the bits of word i and pair i of word k change places, in every byte. */
static void transpose_pairs(uint32_t word[4])
{
    swap_bits(&word[0], &word[2], 4, LOW_4);
    swap_bits(&word[1], &word[3], 4, LOW_4);
    swap_bits(&word[0], &word[1], 2, 0x33333333u);
    swap_bits(&word[2], &word[3], 2, 0x33333333u);
}

/* Of 8 words: bit k of word i and bit i of word k change places, in every byte. */
static void transpose_bits(uint32_t word[8])
{
    for (uint32_t i = 0; i < 4; i++)
        swap_bits(&word[i], &word[i + 4], 4, LOW_4);
    for (uint32_t i = 0; i < 8; i += i % 4 == 1 ? 3 : 1)
        swap_bits(&word[i], &word[i + 2], 2, 0x33333333u);
    for (uint32_t i = 0; i < 8; i += 2)
        swap_bits(&word[i], &word[i + 1], 1, 0x55555555u);
}

/* ---- blocks of 32 ---------------------------------------------------------------------------- */

/* Byte i has column i in its low half and column i + 16 in its high half. */
static void pack_halves(uint32_t words[4], const uint8_t *qs)
{
    uint32_t from[4];
    load_words(from, qs, 4);
    words[0] = join_low(from[0], from[1]);
    words[1] = join_low(from[2], from[3]);
    words[2] = join_high(from[0], from[1]);
    words[3] = join_high(from[2], from[3]);
}

/* Bit 4i + c becomes bit i of byte c. */
static uint32_t pack_fifths(const uint8_t *qh)
{
    uint32_t word = 0;
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t even = ((qh[i] & 15u) * 0x00204081u) & LOW_1;
        const uint32_t odd = ((uint32_t)(qh[i] >> 4) * 0x00204081u) & LOW_1;
        word |= (even | odd << 1) << (2 * i);
    }
    return word;
}

static void pack_q8(struct packed *out, const uint8_t *block, uint32_t flip)
{
    load_words(out->words, block + 2, CPU_QUAD_COUNT);
    for (uint32_t i = 0; i < CPU_QUAD_COUNT; i++)
        out->words[i] ^= flip;
}

/* ---- blocks of 256 --------------------------------------------------------------------------- */

/* 32 bytes whose low halves are one part of 32 columns and whose high halves are another. */
static void pack_parts(uint32_t *low, uint32_t *high, const uint8_t *qs)
{
    uint32_t from[8];
    load_words(from, qs, 8);
    for (uint32_t i = 0; i < 4; i++) {
        low[i] = join_low(from[2 * i], from[2 * i + 1]);
        high[i] = join_high(from[2 * i], from[2 * i + 1]);
    }
}

/* 32 bytes whose bits 2k are part k: two words of each of the four parts. */
static void pack_quarters(uint32_t *words, uint32_t part_words, const uint8_t *qs)
{
    uint32_t from[8];
    load_words(from, qs, 8);
    transpose_pairs(from);
    transpose_pairs(from + 4);
    for (uint32_t part = 0; part < 4; part++) {
        words[part * part_words] = from[part];
        words[part * part_words + 1] = from[4 + part];
    }
}

/* 32 bytes whose bit k is part k: one word of each of the eight parts. */
static void pack_eighths(uint32_t *words, uint32_t part_words, const uint8_t *qh)
{
    uint32_t from[8];
    load_words(from, qh, 8);
    transpose_bits(from);
    for (uint32_t part = 0; part < 8; part++)
        words[part * part_words] = from[part];
}

/* As quant.c reads them: for each part its 6-bit factor and minimum. */
static void pack_scale_min(uint8_t bytes[16], const uint8_t scales[12])
{
    for (uint32_t part = 0; part < 4; part++) {
        const uint8_t low = scales[part];
        const uint8_t middle = scales[part + 4];
        const uint8_t high = scales[part + 8];
        bytes[2 * part] = low & 63u;
        bytes[2 * part + 1] = middle & 63u;
        bytes[2 * part + 8] = (uint8_t)((high & 15u) | (low >> 6) << 4);
        bytes[2 * part + 9] = (uint8_t)((high >> 4) | (middle >> 6) << 4);
    }
}

static void pack_q2_k(struct packed *out, const uint8_t *block)
{
    for (uint32_t half = 0; half < 2; half++)
        pack_quarters(out->words + (size_t)half * 8, 2, block + 16 + (size_t)half * 32);
    memcpy(out->bytes, block, 16);
    memcpy(out->heads, block + 80, 4);
}

static void pack_q3_k(struct packed *out, const uint8_t *block)
{
    const uint8_t *scales = block + 96;
    for (uint32_t half = 0; half < 2; half++)
        pack_quarters(out->words + (size_t)half * 12, 3, block + 32 + (size_t)half * 32);
    pack_eighths(out->words + 2, 3, block);
    for (uint32_t n = 0; n < 16; n++) {
        const uint32_t low = n < 8 ? scales[n] & 15u : scales[n - 8] >> 4;
        const uint32_t high = (scales[8 + n % 4] >> (2 * (n / 4))) & 3u;
        out->bytes[n] = (uint8_t)((low | high << 4) - 32u);
    }
    memcpy(out->heads, block + 108, 2);
}

static void pack_q4_k(struct packed *out, const uint8_t *block)
{
    for (uint32_t pair = 0; pair < 4; pair++)
        pack_parts(out->words + (size_t)pair * 8, out->words + (size_t)pair * 8 + 4,
                   block + 16 + (size_t)pair * 32);
    pack_scale_min(out->bytes, block + 4);
    memcpy(out->heads, block, 4);
}

static void pack_q5_k(struct packed *out, const uint8_t *block)
{
    for (uint32_t pair = 0; pair < 4; pair++)
        pack_parts(out->words + (size_t)pair * 10, out->words + (size_t)pair * 10 + 5,
                   block + 48 + (size_t)pair * 32);
    pack_eighths(out->words + 4, 5, block + 16);
    pack_scale_min(out->bytes, block + 4);
    memcpy(out->heads, block, 4);
}

/* In each half of 128 columns, parts k and k + 2 share bytes. */
static void pack_q6_k(struct packed *out, const uint8_t *block)
{
    for (uint32_t half = 0; half < 2; half++) {
        uint32_t *words = out->words + (size_t)half * 24;
        for (uint32_t k = 0; k < 2; k++)
            pack_parts(words + (size_t)k * 6, words + (size_t)(k + 2) * 6,
                       block + (size_t)half * 64 + (size_t)k * 32);
        pack_quarters(words + 4, 6, block + 128 + (size_t)half * 32);
    }
    memcpy(out->bytes, block + 192, 16);
    memcpy(out->heads, block + 208, 2);
}

/* type is a constant of the caller. */
static inline __attribute__((always_inline)) void
pack_block(struct packed *out, enum tensor_type type, const uint8_t *block, uint32_t flip)
{
    const uint32_t head_size = 2 + 2 * cpu_format_of(type).has_min;
    if (cpu_format_of(type).parts == 1)
        memcpy(out->heads, block, head_size);
    switch (type) {
    case TENSOR_Q4_0:
    case TENSOR_Q4_1:
        pack_halves(out->words, block + head_size);
        return;
    case TENSOR_Q5_0:
    case TENSOR_Q5_1:
        pack_halves(out->words, block + head_size + 4);
        out->words[4] = pack_fifths(block + head_size);
        return;
    case TENSOR_Q8_0:
        pack_q8(out, block, flip);
        return;
    case TENSOR_Q2_K:
        pack_q2_k(out, block);
        return;
    case TENSOR_Q3_K:
        pack_q3_k(out, block);
        return;
    case TENSOR_Q4_K:
        pack_q4_k(out, block);
        return;
    case TENSOR_Q5_K:
        pack_q5_k(out, block);
        return;
    default:
        pack_q6_k(out, block);
        return;
    }
}

/* ---- all rows of a group --------------------------------------------------------------------- */

/* Block by block and in each row by row: what a block becomes is written while it is in the cache,
 * and the source is read as one stream for each row. type and group_rows are constants. */
static inline __attribute__((always_inline)) void
pack_rows(struct weight *self, uint32_t group, uint32_t lane_first, const uint8_t *rows,
          uint32_t lanes, enum tensor_type type, uint32_t group_rows)
{
    const struct cpu_format format = cpu_format_of(type);
    const uint32_t words = format.parts * cpu_format_bits(type);
    const uint32_t scales_size = cpu_format_scales_size(type, group_rows);
    const uint32_t flip = self->quant_flip * LOW_1;
    const size_t row_size = quant_row_size(type, self->cols);
    const size_t block_size = quant_block_size(type);
    const uint32_t count = self->cols / quant_block_cols(type);
    for (uint32_t b = 0; b < count; b++) {
        uint8_t *data = self->data + group * self->data_size + b * (size_t)words * 4 * group_rows;
        uint8_t *scales = self->scales + group * self->scales_size + b * (size_t)scales_size;
        for (uint32_t i = 0; i < lanes; i++) {
            struct packed packed;
            const uint32_t lane = lane_first + i;
            pack_block(&packed, type, rows + i * row_size + b * block_size, flip);
            for (uint32_t w = 0; w < words; w++)
                memcpy(data + ((size_t)w * group_rows + lane) * 4, &packed.words[w], 4);
            uint8_t *to = scales + (size_t)lane * 2;
            for (uint32_t h = 0; h <= format.has_min; h++, to += 2 * group_rows)
                memcpy(to, packed.heads + (size_t)h * 2, 2);
            to -= lane; /* from here on one byte for each row */
            for (uint32_t k = 0; format.parts > 1 && k < 2 * format.parts; k++)
                to[(size_t)k * group_rows] = packed.bytes[k];
        }
    }
}

#define PACK_CASE(name)                                                                            \
    case name:                                                                                     \
        if (self->group_rows == 16)                                                                \
            pack_rows(self, group, lane_first, rows, lanes, name, 16);                             \
        else                                                                                       \
            pack_rows(self, group, lane_first, rows, lanes, name, self->group_rows);               \
        return;

void cpu_pack_rows(struct weight *self, uint32_t group, uint32_t lane_first, const uint8_t *rows,
                   uint32_t lanes)
{
    switch (self->type) {
        PACK_CASE(TENSOR_Q4_0)
        PACK_CASE(TENSOR_Q4_1)
        PACK_CASE(TENSOR_Q5_0)
        PACK_CASE(TENSOR_Q5_1)
        PACK_CASE(TENSOR_Q8_0)
        PACK_CASE(TENSOR_Q2_K)
        PACK_CASE(TENSOR_Q3_K)
        PACK_CASE(TENSOR_Q4_K)
        PACK_CASE(TENSOR_Q5_K)
        PACK_CASE(TENSOR_Q6_K)
    default:
        ODSI_ASSERT(!"quantized types only");
    }
}

/* ---- and back -------------------------------------------------------------------------------- */

/* Quad i of one row; planes points to the row's word of the block's first vector. */
static uint32_t quad_read(const uint8_t *planes, const struct weight *self, uint32_t i)
{
    const struct cpu_format format = cpu_format_of(self->type);
    const size_t vector = (size_t)self->group_rows * CPU_QUAD;
    const uint32_t per_vector = 8 / format.low_bits; /* quads */
    uint32_t low = 0;
    memcpy(&low, planes + i / per_vector * vector, sizeof low);
    if (format.low_bits == 8)
        return low ^ self->quant_flip * LOW_1;
    low = (low >> (i % per_vector * format.low_bits)) & (format.low_bits == 4 ? LOW_4 : LOW_2);
    if (format.high_bits == 0)
        return low;
    uint32_t high = 0;
    const uint8_t *upper = planes + format.low_bits * vector;
    if (format.high_bits == 1) {
        memcpy(&high, upper, sizeof high);
        return low | ((high >> i) & LOW_1) << format.low_bits;
    }
    memcpy(&high, upper + i / 4 * vector, sizeof high);
    return low | ((high >> (2 * (i % 4))) & LOW_2) << format.low_bits;
}

static float head_read(const uint8_t *from)
{
    uint16_t half = 0;
    memcpy(&half, from, sizeof half);
    return det_f32_from_f16(half);
}

static void scales_read(struct quant_group *out, const struct weight *self, uint32_t group,
                        uint32_t lane, uint32_t block)
{
    const struct cpu_format format = cpu_format_of(self->type);
    const uint32_t size = cpu_format_scales_size(self->type, self->group_rows);
    const uint8_t *scales = self->scales + group * self->scales_size;
    const uint8_t *heads = scales + (size_t)(block / format.parts) * size + (size_t)lane * 2;
    const float d = head_read(heads);
    const float m = format.has_min ? head_read(heads + (size_t)self->group_rows * 2) : 0.0f;
    out->scale[0] = d;
    out->min[0] = m;
    out->min[1] = 0.0f;
    if (format.parts == 1)
        return;
    const uint8_t *at =
        scales + cpu_format_bytes_offset(self->type, self->group_rows, block) + lane;
    const uint8_t bytes[2] = {at[0], at[self->group_rows]};
    for (uint32_t g = 0; g < 2; g++) {
        if (format.groups == 1) {
            out->scale[0] = d * (float)bytes[0];
            out->min[0] = -(m * (float)bytes[1]);
        } else if (format.has_min) {
            out->scale[g] = d * (float)(bytes[g] & 15u);
            out->min[g] = -(m * (float)(bytes[g] >> 4));
        } else {
            out->scale[g] = d * (float)(int8_t)bytes[g];
        }
    }
}

void cpu_pack_read(struct quant_group *out, const struct weight *self, uint32_t row, uint32_t block)
{
    const struct cpu_format format = cpu_format_of(self->type);
    const uint32_t group = row / self->group_rows;
    const uint32_t lane = row % self->group_rows;
    const size_t block_size = (size_t)cpu_format_bits(self->type) * CPU_QUAD * self->group_rows;
    const uint8_t *planes =
        self->data + group * self->data_size + block * block_size + (size_t)lane * CPU_QUAD;
    const int bias = format.low_bits == 8 ? 0 : (int)format.bias;
    for (uint32_t i = 0; i < CPU_QUAD_COUNT; i++) {
        const uint32_t quad = quad_read(planes, self, i);
        for (uint32_t k = 0; k < CPU_QUAD; k++)
            out->q[i * CPU_QUAD + k] = (int8_t)((int)(int8_t)(quad >> (8 * k)) - bias);
    }
    out->group_cols = OPS_BLOCK / format.groups;
    out->has_min = (int)format.has_min;
    scales_read(out, self, group, lane, block);
}
