#include "tests/kernels/kernel_fixture.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct rng rng_make(const char *test)
{
    const char *text = getenv("ODSI_TEST_SEED");
    const uint64_t seed = text ? strtoull(text, NULL, 0) : clock_unix_us();
    fprintf(stderr, "%s: ODSI_TEST_SEED=%" PRIu64 "\n", test, seed);
    return (struct rng){.state = seed, .seed = seed};
}

/* splitmix64 */
uint64_t rng_u64(struct rng *self)
{
    uint64_t z = self->state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint32_t rng_range(struct rng *self, uint32_t first, uint32_t last)
{
    return first + (uint32_t)(rng_u64(self) % ((uint64_t)last - first + 1));
}

static float plain(struct rng *rng)
{
    return (float)(int32_t)(rng_u64(rng) >> 40) / 8388608.0f - 1.0f;
}

static float extreme(struct rng *rng)
{
    const uint32_t kind = rng_range(rng, 0, 7);
    const uint32_t sign = (uint32_t)(rng_u64(rng) & 0x80000000u);
    const uint32_t mantissa = (uint32_t)(rng_u64(rng) & 0x7fffffu);
    if (kind == 0)
        return det_from_bits(sign);
    if (kind == 1)
        return det_from_bits(sign | mantissa); /* subnormal */
    if (kind == 2)
        return det_from_bits(sign | rng_range(rng, 1, 254) << 23 | mantissa);
    if (kind == 3)
        return det_from_bits(sign | 0x7f7fffffu); /* the largest */
    return plain(rng);
}

static float non_finite(struct rng *rng)
{
    static const uint32_t kinds[] = {0x7fc00000u, 0xffc12345u, 0x7f800000u, 0xff800000u};
    if (rng_range(rng, 0, 99) > 0)
        return plain(rng);
    return det_from_bits(kinds[rng_range(rng, 0, 3)]);
}

void fill_f32(struct rng *rng, float *out, size_t count, enum content content)
{
    static const float few[] = {1.0f, -1.0f, 0.5f, -0.5f, 16777216.0f, -16777216.0f, 0.0f, -0.0f};
    float unit = 1.0f;
    for (size_t i = 0; i < count; i++) {
        if (i % OPS_BLOCK == 0)
            unit = det_from_bits(rng_range(rng, 20, 34) << 23); /* 2^-107 .. 2^-93 */
        if (content == CONTENT_TINY)
            out[i] = plain(rng) * unit;
        else if (content == CONTENT_EXTREME)
            out[i] = extreme(rng);
        else if (content == CONTENT_CANCELLING)
            out[i] = few[rng_range(rng, 0, 7)];
        else if (content == CONTENT_NON_FINITE)
            out[i] = non_finite(rng);
        else
            out[i] = plain(rng);
    }
}

void fill_f16(struct rng *rng, uint16_t *out, size_t count, enum content content)
{
    /* both zeros, the smallest and the largest subnormals, the smallest normal, the largest */
    static const uint16_t ends[] = {0x0000u, 0x8000u, 0x0001u, 0x8001u,
                                    0x03ffu, 0x0400u, 0x7bffu, 0xfbffu};
    for (size_t i = 0; i < count; i++) {
        if (content == CONTENT_EXTREME && rng_range(rng, 0, 3) == 0) {
            out[i] = ends[rng_range(rng, 0, 7)];
        } else if (content == CONTENT_EXTREME) {
            do
                out[i] = (uint16_t)rng_u64(rng);
            while ((out[i] & 0x7c00u) == 0x7c00u);
        } else {
            float value;
            fill_f32(rng, &value, 1, content);
            out[i] = det_f16_from_f32(value > 60000.0f ? 60000.0f : value);
        }
    }
}

const enum tensor_type test_types[TEST_TYPE_COUNT] = {
    TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q8_0, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0,
    TENSOR_Q5_1, TENSOR_Q2_K, TENSOR_Q3_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};

/* Where the f16 numbers of a block are; returns how many, 1 or 2. */
static uint32_t heads_of(uint32_t offsets[2], enum tensor_type type)
{
    offsets[0] = 0;
    offsets[1] = 2;
    if (type == TENSOR_Q2_K)
        offsets[0] = 80, offsets[1] = 82;
    if (type == TENSOR_Q3_K)
        offsets[0] = 108;
    if (type == TENSOR_Q6_K)
        offsets[0] = 208;
    return type == TENSOR_Q4_1 || type == TENSOR_Q5_1 || type == TENSOR_Q2_K ||
                   type == TENSOR_Q4_K || type == TENSOR_Q5_K
               ? 2
               : 1;
}

void fill_blocks(struct rng *rng, enum tensor_type type, uint8_t *out, size_t block_count,
                 enum content content)
{
    static const uint8_t same[] = {0x00, 0xff, 0x80, 0x7f};
    const uint32_t size = quant_block_size(type);
    for (size_t b = 0; b < block_count; b++) {
        uint8_t *block = out + b * size;
        uint32_t offsets[2];
        const uint32_t heads = heads_of(offsets, type);
        const uint32_t kind = rng_range(rng, 0, 31);
        for (uint32_t i = 0; i < size; i++)
            block[i] = kind < 4 ? same[kind] : (uint8_t)rng_u64(rng);
        for (uint32_t h = 0; h < heads; h++) {
            uint16_t head;
            fill_f16(rng, &head, 1, content);
            memcpy(block + offsets[h], &head, sizeof head);
        }
    }
}

static void fill_bf16(struct rng *rng, uint16_t *out, size_t count, enum content content)
{
    for (size_t i = 0; i < count; i++) {
        float value;
        fill_f32(rng, &value, 1, content);
        out[i] = (uint16_t)(det_bits(value) >> 16);
    }
}

void *test_memory(size_t size)
{
    void *memory = NULL;
    cr_assert_eq(alloc_aligned(&memory, size, 1), ODSI_OK);
    return memory;
}

void *test_matrix(struct rng *rng, enum tensor_type type, uint32_t rows, uint32_t cols,
                  enum content content)
{
    void *matrix = test_memory(rows * quant_row_size(type, cols));
    if (type == TENSOR_F32)
        fill_f32(rng, matrix, (size_t)rows * cols, content);
    else if (type == TENSOR_F16)
        fill_f16(rng, matrix, (size_t)rows * cols, content);
    else if (type == TENSOR_BF16)
        fill_bf16(rng, matrix, (size_t)rows * cols, content);
    else
        fill_blocks(rng, type, matrix, (size_t)rows * (cols / quant_block_cols(type)), content);
    return matrix;
}

void for_each_backend(void (*check)(struct backend *backend, void *context), void *context)
{
    for (const char *const *name = backend_names(); *name; name++) {
        for (uint32_t threads = 1; threads <= 3; threads++) {
            const struct backend_config config = {.name = *name, .thread_count = threads};
            struct backend *backend = NULL;
            cr_assert_eq(backend_open(&backend, &config), ODSI_OK, "%s", odsi_err_text());
            cr_assert_str_eq(backend->ops->name, *name);
            check(backend, context);
            backend_close(&backend);
        }
    }
}

int same_bits(const struct backend *backend, const char *what, const float *want, const float *got,
              size_t count, uint64_t seed)
{
    for (size_t i = 0; i < count; i++) {
        if (det_bits(want[i]) == det_bits(got[i]))
            continue;
        if (want[i] != want[i] && got[i] != got[i])
            continue;
        fprintf(stderr,
                "%s, %s with %u threads: element %zu is %a (%08x), the reference says %a (%08x); "
                "ODSI_TEST_SEED=%" PRIu64 "\n",
                what, backend->ops->name, backend->thread_count, i, (double)got[i],
                det_bits(got[i]), (double)want[i], det_bits(want[i]), seed);
        return 0;
    }
    return 1;
}

struct weight *test_weight(struct backend *backend, enum tensor_type type, const void *source,
                           uint32_t rows, uint32_t cols)
{
    struct weight *weight = NULL;
    cr_assert_eq(backend->ops->weight_open(backend, &weight, type, rows, cols, 1), ODSI_OK);
    cr_assert_eq(backend->ops->weight_fill(backend, weight, 0, source, rows), ODSI_OK);
    return weight;
}
