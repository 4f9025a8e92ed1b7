#include "worker/model/quantizer.h"

#include "common/base/alloc.h"
#include "common/crypto/digest.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "tests/unit/model/model_fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

#define COLS 512u
#define ROWS 96u

static const enum tensor_type all_types[] = {
    TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0, TENSOR_Q5_1,
    TENSOR_Q8_0, TENSOR_Q2_K, TENSOR_Q3_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};
#define TYPE_COUNT (sizeof all_types / sizeof all_types[0])

/* Sums of twelve uniform numbers, so near to Gaussian, with a deviation of 0.02; exact arithmetic,
 * so the same everywhere. */
static float *gaussian(uint64_t seed, uint64_t count)
{
    float *out = NULL;
    cr_assert_eq(alloc_zeroed(&out, count, sizeof *out), ODSI_OK);
    for (uint64_t i = 0; i < count; i++) {
        int64_t sum = 0;
        for (int k = 0; k < 3; k++) {
            const uint64_t bits = fixture_random(&seed);
            for (int part = 0; part < 4; part++)
                sum += (int64_t)((bits >> (16 * part)) & 0xffff) - 0x8000;
        }
        out[i] = (float)sum / 65536.0f / 50.0f;
    }
    return out;
}

static uint8_t *quantized(const float *weights, enum tensor_type type, uint32_t threads)
{
    struct quantizer *quantizer = NULL;
    uint8_t *out = NULL;
    cr_assert_eq(alloc_zeroed(&out, ROWS, quant_row_size(type, COLS)), ODSI_OK);
    cr_assert_eq(quantizer_open(&quantizer, threads), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(quantizer_rows(quantizer, type, weights, ROWS, COLS, out), ODSI_OK, "%s",
                 odsi_err_text());
    quantizer_close(&quantizer);
    return out;
}

/* Root mean square of what is lost, relative to the weights. */
static double loss(const float *weights, enum tensor_type type, const uint8_t *rows)
{
    float got[COLS];
    double off = 0, size = 0;
    for (uint32_t row = 0; row < ROWS; row++) {
        quantizer_read_row(type, rows + row * quant_row_size(type, COLS), COLS, got);
        for (uint32_t c = 0; c < COLS; c++) {
            const double weight = (double)weights[row * COLS + c];
            off += ((double)got[c] - weight) * ((double)got[c] - weight);
            size += weight * weight;
        }
    }
    return sqrt(off / size);
}

/* Goal: no other quantizer of these formats loses less on Gaussian weights. How: the bounds are
 * what llama.cpp's loses on such (0.0859 of the weights for Q4_0 and so on), or a hair more; a
 * wrong layout or a lost bit is far above. */
Test(quantizer, loses_no_more_than_the_formats_must)
{
    const double bounds[TYPE_COUNT] = {0,      0.0003, 0.0018, 0.0859, 0.0782, 0.0426, 0.0378,
                                       0.0054, 0.2900, 0.1508, 0.0716, 0.0361, 0.0177};
    const uint64_t seed = 3;
    float *weights = gaussian(seed, (uint64_t)ROWS * COLS);
    for (size_t i = 0; i < TYPE_COUNT; i++) {
        uint8_t *rows = quantized(weights, all_types[i], 1);
        const double lost = loss(weights, all_types[i], rows);
        cr_expect(lost <= bounds[i], "%s: %g", quant_name(all_types[i]), lost);
        cr_expect(i == 0 || lost > bounds[i] / 8, "%s: %g is too good to be true",
                  quant_name(all_types[i]), lost);
        alloc_free(rows);
    }
    alloc_free(weights);
}

/* Goal: a quantized model has the same id wherever it was made. How: digests of one input, and the
 * same bytes whatever the number of threads. */
Test(quantizer, gives_the_same_bytes_everywhere)
{
    static const char *const wanted[TYPE_COUNT] = {
        "793494d0bd7fe08c66bb25d652fe9dab73e838596c4fb3be00cdd8886b7b32e9", /* f32 */
        "4d12cacd8298b6a6daedf216b62677ff6f9dea8636e97ab326f0cb193498c48f", /* f16 */
        "228a332362fa5f569beba8be7d08cdb9e9d5469838e8d21c02b16965eef575f1", /* bf16 */
        "12c0d198f82dd3d79e85f1329945da7377348465fbb73ea1cb826e6652f990a7", /* q4_0 */
        "a3bcf835b64c6508e8bd692650552a36387be7205f17f3451505c7a3f906483a", /* q4_1 */
        "d8a29726d40a4e93e5db370dd50b4d06ebe21d7bdba98bf02cf56a398272a03d", /* q5_0 */
        "5bb1c55fb22f90dd8c59b81a10fbd270176c8cdf68c2635305e17999b96f3002", /* q5_1 */
        "d314d15a384dc2ea11eb34272d07dd7b77794c306667d5401b89b62b035e9b27", /* q8_0 */
        "19ed1d65cef7df95d13896b80749e248b69c342dc2e75773e0d7e8a66a636e30", /* q2_k */
        "862cbe695b9d7f383365d598f088ead1e272d3fe9c6922f1f43dad9efe09becc", /* q3_k */
        "2aa4ba4815c9a1cb8cdb52fe2c86782c0b97b6d09bff432664ca3488a9f48633", /* q4_k */
        "60cd6210947680544d0354d6a4f143ba17a431ff6f19767e59f076241285064a", /* q5_k */
        "6291b34b1472055df5a7cf8a58355e889f96a84498a04b8a0c88200c0dd45f3e", /* q6_k */
    };
    float *weights = gaussian(7, (uint64_t)ROWS * COLS);
    for (size_t i = 0; i < TYPE_COUNT; i++) {
        const enum tensor_type type = all_types[i];
        const size_t size = ROWS * quant_row_size(type, COLS);
        uint8_t *rows = quantized(weights, type, 1);
        char hex[DIGEST_HEX_SIZE];
        struct digest digest;
        digest_of(&digest, rows, size);
        digest_to_hex(hex, &digest);
        cr_expect_str_eq(hex, wanted[i], "%s: \"%s\"", quant_name(type), hex);
        for (uint32_t threads = 2; threads <= 5; threads++) {
            uint8_t *others = quantized(weights, type, threads);
            cr_expect_eq(memcmp(rows, others, size), 0, "%s, %u threads", quant_name(type),
                         threads);
            alloc_free(others);
        }
        alloc_free(rows);
    }
    alloc_free(weights);
}

/* Writes the index-th odd row: constants, spikes, one sign, tiny, huge, mostly zeros. */
static void odd_row(uint32_t index, float row[COLS], uint64_t *seed)
{
    for (uint32_t c = 0; c < COLS; c++) {
        const float unit = (float)(fixture_random(seed) >> 40) / 16777216.0f;
        const float values[] = {0.0f,
                                -0.0f,
                                1.0f,
                                -3.0f,
                                unit,
                                -unit,
                                5.0f + unit,
                                unit * 1e-7f,
                                unit * 1e-30f,
                                unit * 1e-42f,
                                (unit - 0.5f) * 131008.0f,
                                c % 97 == 0 ? unit * 1000.0f : unit * 1e-3f,
                                c % 61 == 5 ? -unit : 0.0f,
                                c < 256 ? 0.0f : unit - 0.5f,
                                c % 2 ? QUANTIZER_WEIGHT_MAX : -QUANTIZER_WEIGHT_MAX,
                                (unit - 0.5f) * (c % 32 < 16 ? 1.0f : 1e-6f)};
        row[c] = values[index % 16];
    }
}

/* Goal: no row breaks it, and every weight comes back within a step of its block's range. */
Test(quantizer, keeps_odd_rows_within_their_range)
{
    /* Part of the range of the weights and zero, by type; two bits have the largest steps. */
    const double steps[TYPE_COUNT] = {0,     5e-4, 4e-3, 0.17, 0.08, 0.08, 0.04,
                                      0.005, 0.40, 0.34, 0.09, 0.05, 0.04};
    uint64_t seed = 11;
    for (uint32_t index = 0; index < 64; index++) {
        float row[COLS], got[COLS];
        uint8_t bytes[COLS * 4];
        odd_row(index, row, &seed);
        for (size_t i = 0; i < TYPE_COUNT; i++) {
            const uint32_t block = quant_block_cols(all_types[i]);
            cr_assert_eq(quantizer_row(all_types[i], row, COLS, bytes), COLS);
            quantizer_read_row(all_types[i], bytes, COLS, got);
            for (uint32_t c = 0; c < COLS; c++) {
                double low = 0, high = 0;
                for (uint32_t k = c / block * block; k < c / block * block + block; k++) {
                    low = fmin(low, (double)row[k]);
                    high = fmax(high, (double)row[k]);
                }
                /* f16 scales know nothing below 2^-25, times the largest integers. */
                const double bound = steps[i] * (high - low) + (i == 0 ? 0 : 63 * 31 * 0x1p-25);
                cr_assert(fabs((double)got[c] - (double)row[c]) <= bound,
                          "%s, row %u, column %u: %g became %g", quant_name(all_types[i]), index, c,
                          (double)row[c], (double)got[c]);
            }
        }
    }
}

Test(quantizer, rounds_to_the_nearest_float)
{
    const float weights[] = {1.0f, 1.00390625f, 1.01171875f, -1.005f, 65504.0f, 1e-8f, 3e-8f};
    const uint32_t count = sizeof weights / sizeof weights[0];
    const uint16_t bf16[] = {0x3f80, 0x3f80, 0x3f82, 0xbf81, 0x4780, 0x322c, 0x3301};
    const uint16_t f16[] = {0x3c00, 0x3c04, 0x3c0c, 0xbc05, 0x7bff, 0x0000, 0x0001};
    uint16_t got[sizeof weights / sizeof weights[0]];
    cr_assert_eq(quantizer_row(TENSOR_BF16, weights, count, got), count);
    for (uint32_t i = 0; i < count; i++)
        cr_expect_eq(got[i], bf16[i], "bf16 of %g: %04x", (double)weights[i], got[i]);
    cr_assert_eq(quantizer_row(TENSOR_F16, weights, count, got), count);
    for (uint32_t i = 0; i < count; i++)
        cr_expect_eq(got[i], f16[i], "f16 of %g: %04x", (double)weights[i], got[i]);
}

Test(quantizer, refuses_weights_that_no_model_has)
{
    const float bad[] = {(float)NAN, (float)INFINITY, -(float)INFINITY, 65505.0f, -1e30f, 3.4e38f};
    struct quantizer *quantizer = NULL;
    float *weights = gaussian(1, (uint64_t)ROWS * COLS);
    uint8_t *out = NULL;
    cr_assert_eq(alloc_zeroed(&out, ROWS * COLS, 4), ODSI_OK);
    cr_assert_eq(quantizer_open(&quantizer, 3), ODSI_OK);
    for (size_t i = 0; i < TYPE_COUNT; i++)
        for (size_t b = 0; b < sizeof bad / sizeof bad[0]; b++) {
            const enum tensor_type type = all_types[i];
            const int takes =
                (type == TENSOR_F32 && b >= 3) || (type == TENSOR_BF16 && b >= 3 && b != 5);
            weights[40 * COLS + 300] = weights[77 * COLS] = bad[b];
            const enum odsi_err err = quantizer_rows(quantizer, type, weights, ROWS, COLS, out);
            cr_expect_eq(err, takes ? ODSI_OK : ODSI_ERR_NUMERIC, "%s, %g", quant_name(type),
                         (double)bad[b]);
            cr_expect(takes || strstr(odsi_err_text(), "row 40, column 300 "), "%s",
                      odsi_err_text());
        }
    quantizer_close(&quantizer);
    alloc_free(out);
    alloc_free(weights);
}

Test(quantizer, reports_threads_and_memory_that_are_not_there)
{
    struct quantizer *quantizer = NULL;
    cr_expect_eq(quantizer_open(&quantizer, 0), ODSI_ERR_INVALID);
    cr_expect_null(quantizer);
    for (long failing = 0;; failing++) {
        alloc_fail_after(failing);
        const enum odsi_err err = quantizer_open(&quantizer, 2);
        alloc_fail_after(-1);
        if (err == ODSI_OK) {
            cr_expect(failing >= 2);
            break;
        }
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY);
        cr_expect_null(quantizer);
    }
    quantizer_close(&quantizer);
    quantizer_close(&quantizer);
}
