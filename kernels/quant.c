#include "kernels/quant.h"

#include "common/base/assert.h"
#include "kernels/det.h"

#include <strings.h>

static const struct format {
    enum tensor_type type;
    const char *name;
    uint32_t block_cols;
    uint32_t block_size;
    uint32_t group_cols; /* 0: not quantized */
    int has_min;
} formats[] = {
    {TENSOR_F32, "f32", 1, 4, 0, 0},        {TENSOR_F16, "f16", 1, 2, 0, 0},
    {TENSOR_BF16, "bf16", 1, 2, 0, 0},      {TENSOR_Q4_0, "q4_0", 32, 18, 32, 0},
    {TENSOR_Q4_1, "q4_1", 32, 20, 32, 1},   {TENSOR_Q5_0, "q5_0", 32, 22, 32, 0},
    {TENSOR_Q5_1, "q5_1", 32, 24, 32, 1},   {TENSOR_Q8_0, "q8_0", 32, 34, 32, 0},
    {TENSOR_Q2_K, "q2_k", 256, 84, 16, 1},  {TENSOR_Q3_K, "q3_k", 256, 110, 16, 0},
    {TENSOR_Q4_K, "q4_k", 256, 144, 32, 1}, {TENSOR_Q5_K, "q5_k", 256, 176, 32, 1},
    {TENSOR_Q6_K, "q6_k", 256, 210, 16, 0},
};

static const struct format *format_find(uint32_t type)
{
    for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++)
        if (formats[i].type == type)
            return &formats[i];
    return NULL;
}

static const struct format *format_of(enum tensor_type type)
{
    const struct format *format = format_find(type);
    ODSI_ASSERT(format);
    return format;
}

int quant_is_known(uint32_t type)
{
    return format_find(type) != NULL;
}

int quant_is_quantized(enum tensor_type type)
{
    return format_of(type)->group_cols != 0;
}

uint32_t quant_block_cols(enum tensor_type type)
{
    return format_of(type)->block_cols;
}

uint32_t quant_block_size(enum tensor_type type)
{
    return format_of(type)->block_size;
}

size_t quant_row_size(enum tensor_type type, uint32_t cols)
{
    const struct format *format = format_of(type);
    return (size_t)(cols / format->block_cols) * format->block_size;
}

const char *quant_name(uint32_t type)
{
    const struct format *format = format_find(type);
    return format ? format->name : NULL;
}

int quant_find(const char *name, enum tensor_type *out)
{
    for (size_t i = 0; i < sizeof formats / sizeof formats[0]; i++)
        if (strcasecmp(name, formats[i].name) == 0) {
            *out = formats[i].type;
            return 1;
        }
    return 0;
}

static float load_f16(const uint8_t *from)
{
    return det_f32_from_f16((uint16_t)(from[0] | from[1] << 8));
}

/* ---- blocks of 32 ---------------------------------------------------------------------------- */

static void read_nibbles(struct quant_group *out, const uint8_t *qs, int minus)
{
    for (uint32_t i = 0; i < 16; i++) {
        out->q[i] = (int8_t)((qs[i] & 15) - minus);
        out->q[i + 16] = (int8_t)((qs[i] >> 4) - minus);
    }
}

/* The nibbles and a fifth bit for each column. */
static void read_fives(struct quant_group *out, const uint8_t *qh, const uint8_t *qs, int minus)
{
    read_nibbles(out, qs, minus);
    for (uint32_t i = 0; i < 32; i++)
        out->q[i] = (int8_t)(out->q[i] + ((qh[i / 8] >> (i % 8)) & 1) * 16);
}

static void read_small(struct quant_group *out, enum tensor_type type, const uint8_t *block)
{
    out->scale[0] = load_f16(block);
    switch (type) {
    case TENSOR_Q4_0:
        read_nibbles(out, block + 2, 8);
        return;
    case TENSOR_Q4_1:
        out->min[0] = load_f16(block + 2);
        read_nibbles(out, block + 4, 0);
        return;
    case TENSOR_Q5_0:
        read_fives(out, block + 2, block + 6, 16);
        return;
    case TENSOR_Q5_1:
        out->min[0] = load_f16(block + 2);
        read_fives(out, block + 4, block + 8, 0);
        return;
    default: /* Q8_0 */
        memcpy(out->q, block + 2, 32);
        return;
    }
}

/* ---- blocks of 256: part is which 32 columns, 0 to 7 ----------------------------------------- */

/* Q4_K and Q5_K keep eight 6-bit factors and eight 6-bit minimums in 12 bytes: those of parts 0 to
 * 3 in the low bits of bytes 0 to 3 and 4 to 7; of parts 4 to 7 the low four bits are in bytes 8
 * to 11 (factor low, minimum high) and the upper two on top of the bytes of parts 0 to 3. */
static void read_scale_min(struct quant_group *out, const uint8_t *block, uint32_t part)
{
    const uint8_t *scales = block + 4;
    uint32_t factor = scales[part % 4] & 63u;
    uint32_t minimum = scales[part % 4 + 4] & 63u;
    if (part >= 4) {
        factor = (scales[part + 4] & 15u) | (uint32_t)(scales[part - 4] >> 6) << 4;
        minimum = (uint32_t)(scales[part + 4] >> 4) | (uint32_t)(scales[part] >> 6) << 4;
    }
    out->scale[0] = load_f16(block) * (float)factor;
    out->min[0] = -(load_f16(block + 2) * (float)minimum);
}

/* Bytes 32 * (part / 2) on hold part 2n in their low nibbles and part 2n + 1 in their high ones. */
static void read_part_nibbles(struct quant_group *out, const uint8_t *qs, uint32_t part)
{
    const uint8_t *from = qs + (size_t)(part / 2) * 32;
    for (uint32_t i = 0; i < 32; i++)
        out->q[i] = (int8_t)(part % 2 ? from[i] >> 4 : from[i] & 15);
}

static void read_q4_k(struct quant_group *out, const uint8_t *block, uint32_t part)
{
    read_scale_min(out, block, part);
    read_part_nibbles(out, block + 16, part);
}

/* Bit `part` of qh[i] is the fifth bit of column i of that part. */
static void read_q5_k(struct quant_group *out, const uint8_t *block, uint32_t part)
{
    read_scale_min(out, block, part);
    read_part_nibbles(out, block + 48, part);
    for (uint32_t i = 0; i < 32; i++)
        out->q[i] = (int8_t)(out->q[i] + ((block[16 + i] >> part) & 1) * 16);
}

/* Each half of 128 columns: 64 bytes of nibbles, where byte i holds columns i (low) and i + 64
 * (high), and 32 bytes whose two bits 2k belong to part k of the half. */
static void read_q6_k(struct quant_group *out, const uint8_t *block, uint32_t part)
{
    const uint32_t half = part / 4;
    const uint32_t k = part % 4;
    const uint8_t *low = block + (size_t)half * 64 + (size_t)(k % 2) * 32;
    const uint8_t *high = block + 128 + (size_t)half * 32;
    const float d = load_f16(block + 208);
    for (uint32_t i = 0; i < 32; i++) {
        const int nibble = k < 2 ? low[i] & 15 : low[i] >> 4;
        out->q[i] = (int8_t)(nibble + ((high[i] >> (2 * k)) & 3) * 16 - 32);
    }
    for (uint32_t g = 0; g < 2; g++)
        out->scale[g] = d * (float)(int8_t)block[192 + part * 2 + g];
}

/* Two bits 2k of byte i of the half's 32 are column i of its part k, in Q2_K and Q3_K. */
static int two_bits(const uint8_t *qs, uint32_t part, uint32_t i)
{
    return (qs[(size_t)(part / 4) * 32 + i] >> (2 * (part % 4))) & 3;
}

static void read_q2_k(struct quant_group *out, const uint8_t *block, uint32_t part)
{
    const float d = load_f16(block + 80);
    const float dmin = load_f16(block + 82);
    for (uint32_t i = 0; i < 32; i++)
        out->q[i] = (int8_t)two_bits(block + 16, part, i);
    for (uint32_t g = 0; g < 2; g++) {
        out->scale[g] = d * (float)(block[part * 2 + g] & 15);
        out->min[g] = -(dmin * (float)(block[part * 2 + g] >> 4));
    }
}

/* Sixteen 6-bit factors, 32 too large, in 12 bytes: the low four bits of factor n in a nibble of
 * byte n % 8 (low for n < 8), the upper two in bits 2 * (n / 4) of byte 8 + n % 4. */
static int q3_k_factor(const uint8_t *scales, uint32_t n)
{
    const int low = n < 8 ? scales[n] & 15 : scales[n - 8] >> 4;
    return (low | ((scales[8 + n % 4] >> (2 * (n / 4))) & 3) << 4) - 32;
}

/* Bit `part` of the mask's byte i, when not set, takes 4 off column i. */
static void read_q3_k(struct quant_group *out, const uint8_t *block, uint32_t part)
{
    const float d = load_f16(block + 108);
    for (uint32_t i = 0; i < 32; i++)
        out->q[i] = (int8_t)(two_bits(block + 32, part, i) + ((block[i] >> part) & 1) * 4 - 4);
    for (uint32_t g = 0; g < 2; g++)
        out->scale[g] = d * (float)q3_k_factor(block + 96, part * 2 + g);
}

void quant_read(struct quant_group *out, enum tensor_type type, const void *row, uint32_t index)
{
    const struct format *format = format_of(type);
    const uint32_t parts = format->block_cols / OPS_BLOCK;
    const uint8_t *block = (const uint8_t *)row + (size_t)(index / parts) * format->block_size;
    const uint32_t part = index % parts;
    out->group_cols = format->group_cols;
    out->has_min = format->has_min;
    out->min[0] = out->min[1] = 0.0f;
    switch (type) {
    case TENSOR_Q2_K:
        read_q2_k(out, block, part);
        return;
    case TENSOR_Q3_K:
        read_q3_k(out, block, part);
        return;
    case TENSOR_Q4_K:
        read_q4_k(out, block, part);
        return;
    case TENSOR_Q5_K:
        read_q5_k(out, block, part);
        return;
    case TENSOR_Q6_K:
        read_q6_k(out, block, part);
        return;
    default:
        read_small(out, type, block);
        return;
    }
}
