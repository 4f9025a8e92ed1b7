/* The block formats (kernels/quant.h): against a second decoder, written as the formats are
 * commonly described, a whole block at a time; and against blocks written by hand. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* ---- a second decoder ---- */

static double half_at(const uint8_t *from)
{
    return (double)det_f32_from_f16((uint16_t)(from[0] | from[1] << 8));
}

/* Values are exact: at most 11 bits of d, 8 of a factor and 8 of q. */
static void decode_32(double out[32], enum tensor_type type, const uint8_t *b)
{
    const int has_min = type == TENSOR_Q4_1 || type == TENSOR_Q5_1;
    const int fives = type == TENSOR_Q5_0 || type == TENSOR_Q5_1;
    const double d = half_at(b);
    const double m = has_min ? half_at(b + 2) : 0.0;
    const uint8_t *after = b + (has_min ? 4 : 2);
    uint32_t qh = 0;
    if (type == TENSOR_Q8_0) {
        for (int i = 0; i < 32; i++)
            out[i] = d * (double)(int8_t)b[2 + i];
        return;
    }
    if (fives) {
        memcpy(&qh, after, sizeof qh);
        after += 4;
    }
    for (int j = 0; j < 16; j++) {
        const uint32_t high_0 = ((qh >> j) << 4) & 0x10;
        const uint32_t high_1 = (qh >> (j + 12)) & 0x10;
        const int x0 = (int)((after[j] & 15u) | (fives ? high_0 : 0));
        const int x1 = (int)((uint32_t)(after[j] >> 4) | (fives ? high_1 : 0));
        const int minus = has_min ? 0 : fives ? 16 : 8;
        out[j] = d * (x0 - minus) + m;
        out[j + 16] = d * (x1 - minus) + m;
    }
}

static void decode_q2_k(double out[256], const uint8_t *b)
{
    const double d = half_at(b + 80);
    const double min = half_at(b + 82);
    const uint8_t *q = b + 16;
    int is = 0;
    for (int n = 0; n < 256; n += 128, q += 32)
        for (int shift = 0; shift < 8; shift += 2)
            for (int half = 0; half < 32; half += 16, is++)
                for (int l = 0; l < 16; l++)
                    *out++ = d * (b[is] & 15) * ((q[half + l] >> shift) & 3) - min * (b[is] >> 4);
}

static void decode_q3_k(double out[256], const uint8_t *b)
{
    const double d = half_at(b + 108);
    const uint8_t *q = b + 32;
    uint32_t aux[4];
    int8_t scales[16];
    memcpy(aux, b + 96, 12);
    const uint32_t top = aux[2];
    aux[2] = ((aux[0] >> 4) & 0x0f0f0f0fu) | ((top >> 4) & 0x03030303u) << 4;
    aux[3] = ((aux[1] >> 4) & 0x0f0f0f0fu) | ((top >> 6) & 0x03030303u) << 4;
    aux[0] = (aux[0] & 0x0f0f0f0fu) | (top & 0x03030303u) << 4;
    aux[1] = (aux[1] & 0x0f0f0f0fu) | ((top >> 2) & 0x03030303u) << 4;
    memcpy(scales, aux, 16);
    int is = 0;
    uint32_t mask = 1;
    for (int n = 0; n < 256; n += 128, q += 32)
        for (int shift = 0; shift < 8; shift += 2, mask <<= 1)
            for (int half = 0; half < 32; half += 16, is++)
                for (int l = 0; l < 16; l++)
                    *out++ = d * (scales[is] - 32) *
                             (((q[half + l] >> shift) & 3) - (b[half + l] & mask ? 0 : 4));
}

static void scale_min(int j, const uint8_t *q, double *scale, double *min)
{
    *scale = j < 4 ? q[j] & 63 : (q[j + 4] & 15) | (q[j - 4] >> 6) << 4;
    *min = j < 4 ? q[j + 4] & 63 : (q[j + 4] >> 4) | (q[j] >> 6) << 4;
}

static void decode_q4_q5_k(double out[256], const uint8_t *b, int fives)
{
    const double d = half_at(b);
    const double dmin = half_at(b + 2);
    const uint8_t *qh = b + 16;
    const uint8_t *q = b + (fives ? 48 : 16);
    uint32_t mask = 1;
    for (int j = 0; j < 8; j++, mask <<= 1) {
        double scale, min;
        scale_min(j, b + 4, &scale, &min);
        for (int l = 0; l < 32; l++) {
            const int low = j % 2 ? q[l] >> 4 : q[l] & 15;
            *out++ = d * scale * (low + (fives && qh[l] & mask ? 16 : 0)) - dmin * min;
        }
        q += j % 2 ? 32 : 0;
    }
}

static void decode_q6_k(double out[256], const uint8_t *b)
{
    const uint8_t *ql = b;
    const uint8_t *qh = b + 128;
    const int8_t *sc = (const int8_t *)b + 192;
    const double d = half_at(b + 208);
    for (int n = 0; n < 256; n += 128, out += 128, ql += 64, qh += 32, sc += 8)
        for (int l = 0; l < 32; l++) {
            const int is = l / 16;
            out[l] = d * sc[is] * (((ql[l] & 15) | (qh[l] & 3) << 4) - 32);
            out[l + 32] = d * sc[is + 2] * (((ql[l + 32] & 15) | ((qh[l] >> 2) & 3) << 4) - 32);
            out[l + 64] = d * sc[is + 4] * ((ql[l] >> 4 | ((qh[l] >> 4) & 3) << 4) - 32);
            out[l + 96] = d * sc[is + 6] * ((ql[l + 32] >> 4 | ((qh[l] >> 6) & 3) << 4) - 32);
        }
}

static void decode(double out[256], enum tensor_type type, const uint8_t *block)
{
    switch (type) {
    case TENSOR_Q2_K:
        decode_q2_k(out, block);
        return;
    case TENSOR_Q3_K:
        decode_q3_k(out, block);
        return;
    case TENSOR_Q4_K:
        decode_q4_q5_k(out, block, 0);
        return;
    case TENSOR_Q5_K:
        decode_q4_q5_k(out, block, 1);
        return;
    case TENSOR_Q6_K:
        decode_q6_k(out, block);
        return;
    default:
        decode_32(out, type, block);
        return;
    }
}

/* The weight of a column, without the rounding to f32 that embed does. */
static double read_column(enum tensor_type type, const uint8_t *row, uint32_t column)
{
    struct quant_group group;
    memset(&group, 0x55, sizeof group);
    quant_read(&group, type, row, column / OPS_BLOCK);
    const uint32_t i = column % OPS_BLOCK;
    const uint32_t g = i / group.group_cols;
    return (double)group.scale[g] * group.q[i] + (group.has_min ? (double)group.min[g] : 0.0);
}

/* Goal: every bit of a block means what it means elsewhere. How: blocks of random bits, with f16
 * numbers of every finite magnitude; both decoders are exact in binary64, so they must agree. */
Test(quant, reads_what_a_second_decoder_reads)
{
    struct rng rng = rng_make("quant");
    for (uint32_t i = 0; i < TEST_TYPE_COUNT; i++) {
        const enum tensor_type type = test_types[i];
        if (!quant_is_quantized(type))
            continue;
        const uint32_t cols = quant_block_cols(type);
        uint8_t row[3 * QUANT_BLOCK_SIZE_MAX];
        double want[QUANT_BLOCK_COLS_MAX];
        for (uint32_t run = 0; run < 200; run++) {
            fill_blocks(&rng, type, row, 3, run % 2 ? CONTENT_EXTREME : CONTENT_PLAIN);
            for (uint32_t c = 0; c < 3 * cols; c++) {
                if (c % cols == 0)
                    decode(want, type, row + (size_t)(c / cols) * quant_block_size(type));
                const double got = read_column(type, row, c);
                cr_assert(want[c % cols] == got, "%s column %u: %a instead of %a, seed %" PRIu64,
                          quant_name(type), c, got, want[c % cols], rng.seed);
            }
        }
    }
}

/* ---- by hand ---- */

struct byte_at {
    uint32_t offset;
    uint8_t value;
};

/* A block of zero bytes but for some, and one column of it. 0x3c00 is 1, 0x4000 is 2, 0x0001 is
 * 2^-24, 0x7bff is 65504. */
static const struct hand {
    enum tensor_type type;
    struct byte_at bytes[6];
    uint32_t column;
    double value;
} hands[] = {
    {TENSOR_Q4_0, {{1, 0x3c}, {2 + 5, 0x0b}}, 5, 3.0},
    {TENSOR_Q4_0, {{1, 0x3c}, {2 + 5, 0xb0}}, 21, 3.0},
    {TENSOR_Q4_0, {{0, 0x01}, {2 + 0, 0x00}}, 0, -8.0 * 0x1p-24},
    {TENSOR_Q4_1, {{1, 0x3c}, {3, 0xc0}, {4 + 15, 0xf0}}, 31, 13.0},
    {TENSOR_Q5_0, {{1, 0x3c}, {2 + 2, 0x02}, {6 + 1, 0x70}}, 17, 7.0},
    {TENSOR_Q5_0, {{1, 0x3c}, {2 + 0, 0x02}, {6 + 1, 0x07}}, 1, 7.0},
    {TENSOR_Q5_1, {{1, 0x3c}, {3, 0x3c}, {4 + 3, 0x80}, {8 + 15, 0xf0}}, 31, 32.0},
    {TENSOR_Q8_0, {{0, 0xff}, {1, 0x7b}, {2 + 31, 0x80}}, 31, -128.0 * 65504.0},
    {TENSOR_Q2_K, {{81, 0x3c}, {83, 0x3c}, {9, 0x2f}, {16 + 32 + 20, 0x03}}, 148, 43.0},
    {TENSOR_Q2_K, {{83, 0x3c}, {15, 0xf0}}, 255, -15.0},
    {TENSOR_Q3_K,
     {{109, 0x3c}, {96 + 7, 0xf0}, {96 + 8 + 3, 0xc0}, {31, 0x80}, {95, 0xc0}},
     255,
     31.0 * 3.0},
    {TENSOR_Q3_K, {{109, 0x3c}}, 0, -32.0 * -4.0},
    {TENSOR_Q4_K,
     {{1, 0x3c}, {3, 0x3c}, {4 + 3, 0xc0}, {4 + 11, 0x0f}, {16 + 127, 0xf0}},
     255,
     63.0 * 15.0},
    {TENSOR_Q4_K, {{1, 0x3c}, {3, 0x40}, {4 + 0, 0x3f}, {4 + 4, 0x01}, {16, 0x01}}, 0, 61.0},
    {TENSOR_Q4_K, {{3, 0x3c}, {4 + 7, 0xc0}, {4 + 11, 0xf0}}, 224, -63.0},
    {TENSOR_Q5_K, {{1, 0x3c}, {4 + 1, 0x02}, {16 + 3, 0x02}, {48 + 3, 0x10}}, 35, 34.0},
    {TENSOR_Q6_K,
     {{209, 0x3c}, {192 + 15, 0x80}, {63 + 64, 0xf0}, {128 + 63, 0xc0}},
     255,
     -128.0 * 31.0},
    {TENSOR_Q6_K, {{209, 0x3c}, {192 + 2, 0x01}}, 32, -32.0},
};

Test(quant, reads_blocks_written_by_hand)
{
    for (size_t i = 0; i < sizeof hands / sizeof *hands; i++) {
        const struct hand *hand = &hands[i];
        uint8_t block[QUANT_BLOCK_SIZE_MAX] = {0};
        for (uint32_t k = 0; k < 6; k++)
            if (hand->bytes[k].value)
                block[hand->bytes[k].offset] = hand->bytes[k].value;
        const double got = read_column(hand->type, block, hand->column);
        cr_expect(got == hand->value, "hand %zu, %s column %u: %a instead of %a", i,
                  quant_name(hand->type), hand->column, got, hand->value);
    }
}

/* ---- facts ---- */

Test(quant, knows_every_type_by_number_and_name)
{
    for (uint32_t i = 0; i < TEST_TYPE_COUNT; i++) {
        enum tensor_type found = TENSOR_F32;
        const enum tensor_type type = test_types[i];
        cr_assert(quant_is_known((uint32_t)type));
        cr_expect(quant_find(quant_name((uint32_t)type), &found) && found == type);
        cr_expect_leq(quant_block_cols(type), QUANT_BLOCK_COLS_MAX);
        cr_expect_leq(quant_block_size(type), QUANT_BLOCK_SIZE_MAX);
        cr_expect_eq(quant_row_size(type, 1024),
                     (size_t)1024 / quant_block_cols(type) * quant_block_size(type));
    }
    enum tensor_type found = TENSOR_F32;
    cr_expect(quant_find("Q4_K", &found) && found == TENSOR_Q4_K);
    cr_expect_not(quant_find("q4", &found));
    cr_expect_not(quant_find("", &found));
    static const uint32_t unknown[] = {4, 5, 9, 15, 16, 29, 31, 255, UINT32_MAX};
    for (size_t i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        cr_expect_not(quant_is_known(unknown[i]));
        cr_expect_null(quant_name(unknown[i]));
    }
}
