/* Every op of every backend against kernels/ref, bit for bit. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* ---- matmul and embed ---- */

struct matmul_case {
    enum tensor_type type;
    uint32_t rows; /* of x */
    uint32_t weight_rows;
    uint32_t cols;
    enum content content;
    void *source;
    float *x;
    float *want;
    float *got;
    uint64_t seed;
    char what[128];
};

static void matmul_reference(struct matmul_case *self)
{
    const size_t row_size = quant_row_size(self->type, self->cols);
    int8_t *q = test_memory(self->cols);
    float *scales = test_memory((self->cols / OPS_BLOCK + 1) * sizeof *scales);
    for (uint32_t t = 0; t < self->rows; t++) {
        const float *x = self->x + (size_t)t * self->cols;
        if (quant_is_quantized(self->type))
            ref_quantize(q, scales, x, self->cols);
        for (uint32_t r = 0; r < self->weight_rows; r++) {
            const void *w = (const uint8_t *)self->source + r * row_size;
            float *to = &self->want[(size_t)t * self->weight_rows + r];
            if (self->type == TENSOR_F32)
                *to = ref_dot_f32(w, x, self->cols);
            else if (self->type == TENSOR_F16)
                *to = ref_dot_f16(w, x, self->cols);
            else if (self->type == TENSOR_BF16)
                *to = ref_dot_bf16(w, x, self->cols);
            else
                *to = ref_dot_quant(self->type, w, q, scales, self->cols);
        }
    }
    alloc_free(scales);
    alloc_free(q);
}

static void matmul_check(struct backend *backend, void *context)
{
    struct matmul_case *self = context;
    const size_t count = (size_t)self->rows * self->weight_rows;
    struct weight *weight = NULL;
    weight = test_weight(backend, self->type, self->source, self->weight_rows, self->cols);
    memset(self->got, 0x55, count * sizeof *self->got);
    cr_assert_eq(backend->ops->matmul(backend, self->got, weight, self->x, self->rows), ODSI_OK);
    cr_assert_eq(backend->ops->sync(backend), ODSI_OK);
    cr_expect(same_bits(backend, self->what, self->want, self->got, count, self->seed));
    backend->ops->weight_free(backend, weight);
}

static void matmul_try(struct rng *rng, struct matmul_case *self)
{
    const size_t count = (size_t)self->rows * self->weight_rows;
    self->seed = rng->seed;
    /* plain weights with tiny activations: products of two tiny numbers are all zero */
    self->source = test_matrix(rng, self->type, self->weight_rows, self->cols,
                               self->content == CONTENT_TINY ? CONTENT_PLAIN : self->content);
    self->x = test_memory((size_t)self->rows * self->cols * sizeof *self->x);
    self->want = test_memory(count * sizeof *self->want);
    self->got = test_memory(count * sizeof *self->got);
    fill_f32(rng, self->x, (size_t)self->rows * self->cols, self->content);
    snprintf(self->what, sizeof self->what,
             "matmul type %d, x [%u][%u], weight rows %u, content %d", (int)self->type, self->rows,
             self->cols, self->weight_rows, (int)self->content);
    matmul_reference(self);
    for_each_backend(matmul_check, self);
    alloc_free(self->got);
    alloc_free(self->want);
    alloc_free(self->x);
    alloc_free(self->source);
}

static void matmul_try_types(struct rng *rng, uint32_t rows, uint32_t weight_rows, uint32_t cols,
                             enum content content)
{
    for (uint32_t i = 0; i < TEST_TYPE_COUNT; i++) {
        const uint32_t block = quant_block_cols(test_types[i]);
        struct matmul_case test = {.type = test_types[i],
                                   .rows = rows,
                                   .weight_rows = weight_rows,
                                   .cols = (cols + block - 1) / block * block,
                                   .content = content};
        matmul_try(rng, &test);
    }
}

/* Goal: no shape falls between the register blocks. How: every number of token rows up to 17 with
 * weight rows and columns around the vector widths, and 1 to 9 blocks of columns. */
Test(matmul, equals_the_reference_for_small_and_odd_shapes)
{
    static const uint32_t weight_rows[] = {1, 7, 8, 9, 15, 16, 17, 31, 33, 47, 64, 65, 81};
    struct rng rng = rng_make("matmul");
    for (uint32_t rows = 1; rows <= 17; rows++)
        for (uint32_t i = 0; i < sizeof weight_rows / sizeof *weight_rows; i++) {
            const uint32_t cols =
                rng_range(&rng, 0, 1) ? rng_range(&rng, 1, 300) : OPS_BLOCK * rng_range(&rng, 1, 9);
            matmul_try_types(&rng, rows, weight_rows[i], cols, CONTENT_PLAIN);
        }
}

/* Goal: shapes whose work is shared between threads. */
Test(matmul, equals_the_reference_for_shapes_that_threads_share)
{
    struct rng rng = rng_make("matmul shared");
    matmul_try_types(&rng, 1, 1111, 352, CONTENT_PLAIN);
    matmul_try_types(&rng, 5, 300, 704, CONTENT_PLAIN);
    matmul_try_types(&rng, 17, 129, 1056, CONTENT_PLAIN);
    matmul_try_types(&rng, 40, 250, 96, CONTENT_PLAIN);
}

Test(matmul, equals_the_reference_for_extreme_and_non_finite_values)
{
    struct rng rng = rng_make("matmul extreme");
    for (int content = 0; content < CONTENT_COUNT; content++)
        for (uint32_t i = 0; i < 12; i++)
            matmul_try_types(&rng, rng_range(&rng, 1, 9), rng_range(&rng, 1, 70),
                             rng_range(&rng, 1, 400), (enum content)content);
}

/* Goal: a NaN or infinity in a row of x cannot be lost in a product. */
Test(matmul, gives_a_non_finite_row_for_a_non_finite_input)
{
    static const uint32_t bad[] = {0x7fc00000u, 0x7f800000u, 0xff800000u};
    struct rng rng = rng_make("matmul non-finite");
    for (uint32_t i = 0; i < 3; i++) {
        float x[64];
        fill_f32(&rng, x, 64, CONTENT_PLAIN);
        x[rng_range(&rng, 0, 63)] = det_from_bits(bad[i]);
        int8_t q[64];
        float scales[2];
        uint8_t w[2 * 34];
        fill_blocks(&rng, TENSOR_Q8_0, w, 2, CONTENT_PLAIN);
        ref_quantize(q, scales, x, 64);
        cr_expect(!det_finite(ref_dot_quant(TENSOR_Q8_0, w, q, scales, 64)));
        float zeros[64] = {0};
        cr_expect(!det_finite(ref_dot_f32(zeros, x, 64)));
    }
}

struct embed_case {
    struct matmul_case matrix;
    uint32_t tokens[5];
};

static void embed_check(struct backend *backend, void *context)
{
    struct embed_case *self = context;
    struct matmul_case *matrix = &self->matrix;
    const size_t row_size = quant_row_size(matrix->type, matrix->cols);
    struct weight *weight = NULL;
    weight = test_weight(backend, matrix->type, matrix->source, matrix->weight_rows, matrix->cols);
    for (uint32_t i = 0; i < 5; i++)
        ref_embed(matrix->want + (size_t)i * matrix->cols, matrix->type,
                  (const uint8_t *)matrix->source + self->tokens[i] * row_size, matrix->cols);
    cr_assert_eq(backend->ops->embed(backend, matrix->got, weight, self->tokens, 5), ODSI_OK);
    cr_expect(same_bits(backend, "embed", matrix->want, matrix->got, (size_t)5 * matrix->cols,
                        matrix->seed));
    backend->ops->weight_free(backend, weight);
}

Test(embed, equals_the_reference)
{
    struct rng rng = rng_make("embed");
    for (uint32_t i = 0; i < 4 * TEST_TYPE_COUNT; i++) {
        const enum tensor_type type = test_types[i % TEST_TYPE_COUNT];
        struct embed_case test = {.matrix = {.type = type, .seed = rng.seed}};
        struct matmul_case *matrix = &test.matrix;
        matrix->weight_rows = rng_range(&rng, 1, 100);
        matrix->cols = quant_is_quantized(type) ? quant_block_cols(type) * rng_range(&rng, 1, 9)
                                                : rng_range(&rng, 1, 300);
        matrix->source =
            test_matrix(&rng, matrix->type, matrix->weight_rows, matrix->cols, CONTENT_EXTREME);
        matrix->want = test_memory((size_t)5 * matrix->cols * sizeof(float));
        matrix->got = test_memory((size_t)5 * matrix->cols * sizeof(float));
        for (uint32_t k = 0; k < 5; k++)
            test.tokens[k] = rng_range(&rng, 0, matrix->weight_rows - 1);
        test.tokens[4] = matrix->weight_rows - 1;
        for_each_backend(embed_check, &test);
        alloc_free(matrix->got);
        alloc_free(matrix->want);
        alloc_free(matrix->source);
    }
}

/* ---- ops by row and by element ---- */

struct vector_case {
    float *a;
    float *b;
    float *want;
    float *got;
    uint32_t rows;
    uint32_t cols;
    size_t count;
    uint64_t seed;
};

static void vector_case_open(struct vector_case *self, struct rng *rng, uint32_t rows,
                             uint32_t cols, enum content content)
{
    self->rows = rows;
    self->cols = cols;
    self->count = (size_t)rows * cols;
    self->seed = rng->seed;
    self->a = test_memory(self->count * sizeof(float));
    self->b = test_memory(self->count * sizeof(float));
    self->want = test_memory(self->count * sizeof(float));
    self->got = test_memory(self->count * sizeof(float));
    fill_f32(rng, self->a, self->count, content);
    fill_f32(rng, self->b, self->count, content);
}

static void vector_case_close(struct vector_case *self)
{
    alloc_free(self->got);
    alloc_free(self->want);
    alloc_free(self->b);
    alloc_free(self->a);
}

static void rmsnorm_check(struct backend *backend, void *context)
{
    struct vector_case *self = context;
    for (uint32_t r = 0; r < self->rows; r++) {
        const size_t at = (size_t)r * self->cols;
        ref_rmsnorm(self->want + at, self->a + at, self->b, self->cols, 1e-5f);
    }
    cr_assert_eq(
        backend->ops->rmsnorm(backend, self->got, self->a, self->b, self->rows, self->cols, 1e-5f),
        ODSI_OK);
    cr_expect(same_bits(backend, "rmsnorm", self->want, self->got, self->count, self->seed));
    memcpy(self->got, self->a, self->count * sizeof(float));
    cr_assert_eq(backend->ops->rmsnorm(backend, self->got, self->got, self->b, self->rows,
                                       self->cols, 1e-5f),
                 ODSI_OK);
    cr_expect(
        same_bits(backend, "rmsnorm in place", self->want, self->got, self->count, self->seed));
}

static void act_mul_check_kind(struct backend *backend, struct vector_case *self,
                               enum act_kind kind)
{
    const char *what = kind == ACT_SILU ? "silu" : "gelu_tanh";
    ref_act_mul(self->want, self->a, self->b, self->count, kind);
    cr_assert_eq(backend->ops->act_mul(backend, self->got, self->a, self->b, self->count, kind),
                 ODSI_OK);
    cr_expect(same_bits(backend, what, self->want, self->got, self->count, self->seed));
    memcpy(self->got, self->b, self->count * sizeof(float));
    cr_assert_eq(backend->ops->act_mul(backend, self->got, self->a, self->got, self->count, kind),
                 ODSI_OK);
    cr_expect(same_bits(backend, what, self->want, self->got, self->count, self->seed),
              "in the place of up");
    memcpy(self->got, self->a, self->count * sizeof(float));
    cr_assert_eq(backend->ops->act_mul(backend, self->got, self->got, self->b, self->count, kind),
                 ODSI_OK);
    cr_expect(same_bits(backend, what, self->want, self->got, self->count, self->seed),
              "in the place of gate");
}

static void act_mul_check(struct backend *backend, void *context)
{
    act_mul_check_kind(backend, context, ACT_SILU);
    act_mul_check_kind(backend, context, ACT_GELU_TANH);
}

static void softcap_check(struct backend *backend, void *context)
{
    static const float caps[] = {1.0f, 30.0f, 50.0f, 1e-30f};
    struct vector_case *self = context;
    for (uint32_t i = 0; i < 4; i++) {
        memcpy(self->want, self->a, self->count * sizeof(float));
        memcpy(self->got, self->a, self->count * sizeof(float));
        ref_softcap(self->want, self->count, caps[i]);
        cr_assert_eq(backend->ops->softcap(backend, self->got, self->count, caps[i]), ODSI_OK);
        cr_expect(same_bits(backend, "softcap", self->want, self->got, self->count, self->seed));
        for (size_t k = 0; k < self->count; k++)
            cr_assert(det_finite(self->a[k]) || !det_finite(self->got[k]),
                      "softcap hid a number that is not finite");
    }
}

static void scale_check(struct backend *backend, void *context)
{
    struct vector_case *self = context;
    memcpy(self->want, self->a, self->count * sizeof(float));
    memcpy(self->got, self->a, self->count * sizeof(float));
    ref_scale(self->want, self->count, 45.254834f);
    cr_assert_eq(backend->ops->scale(backend, self->got, self->count, 45.254834f), ODSI_OK);
    cr_expect(same_bits(backend, "scale", self->want, self->got, self->count, self->seed));
}

static void add_bias_check(struct backend *backend, void *context)
{
    struct vector_case *self = context;
    memcpy(self->want, self->a, self->count * sizeof(float));
    memcpy(self->got, self->a, self->count * sizeof(float));
    for (uint32_t r = 0; r < self->rows; r++)
        ref_add_bias(self->want + (size_t)r * self->cols, self->b, self->cols);
    cr_assert_eq(backend->ops->add_bias(backend, self->got, self->b, self->rows, self->cols),
                 ODSI_OK);
    cr_expect(same_bits(backend, "add_bias", self->want, self->got, self->count, self->seed));
    for (size_t i = 0; i < self->count; i++)
        cr_assert_neq(det_bits(self->got[i]), 0x80000000u, "add_bias let a negative zero out");
}

static void add_check(struct backend *backend, void *context)
{
    struct vector_case *self = context;
    ref_add(self->want, self->a, self->b, self->count);
    memcpy(self->got, self->a, self->count * sizeof(float));
    cr_assert_eq(backend->ops->add(backend, self->got, self->got, self->b, self->count), ODSI_OK);
    cr_expect(same_bits(backend, "add", self->want, self->got, self->count, self->seed));
    for (size_t i = 0; i < self->count; i++)
        cr_assert_neq(det_bits(self->got[i]), 0x80000000u, "add let a negative zero out");
}

static void all_finite_check(struct backend *backend, void *context)
{
    static const uint32_t bad[] = {0x7fc00000u, 0xffc00001u, 0x7f800000u, 0xff800000u, 0x7f800001u};
    struct vector_case *self = context;
    struct rng rng = {.state = self->seed, .seed = self->seed};
    int finite = 0;
    fill_f32(&rng, self->want, self->count, CONTENT_EXTREME);
    cr_assert_eq(backend->ops->all_finite(backend, &finite, self->want, self->count), ODSI_OK);
    cr_expect_eq(finite, 1);
    const size_t at = rng_u64(&rng) % self->count;
    self->want[at] = det_from_bits(bad[rng_range(&rng, 0, 4)]);
    cr_assert_eq(backend->ops->all_finite(backend, &finite, self->want, self->count), ODSI_OK);
    cr_expect_eq(finite, 0, "seed %" PRIu64 ", element %zu", self->seed, at);
}

static void vector_try(const char *name, void (*check)(struct backend *backend, void *context))
{
    static const uint32_t cols[] = {1,   2,    7,    8,    15,   16,   17,   127,
                                    128, 129,  255,  256,  257,  300,  511,  512,
                                    640, 1000, 2048, 2049, 4096, 5632, 9001, 20000};
    struct rng rng = rng_make(name);
    for (uint32_t i = 0; i < sizeof cols / sizeof *cols; i++)
        for (int content = 0; content < CONTENT_COUNT; content++) {
            struct vector_case test;
            vector_case_open(&test, &rng, rng_range(&rng, 1, 6), cols[i], (enum content)content);
            for_each_backend(check, &test);
            vector_case_close(&test);
        }
}

Test(rmsnorm, equals_the_reference)
{
    vector_try("rmsnorm", rmsnorm_check);
}

/* Goal: squares that overflow do not turn a row into zeros. */
Test(rmsnorm, gives_nan_when_the_mean_is_not_finite)
{
    float x[2] = {1e30f, 1.0f};
    const float weight[2] = {1.0f, 1.0f};
    ref_rmsnorm(x, x, weight, 2, 1e-5f);
    cr_expect(x[0] != x[0] && x[1] != x[1]);
}

/* Goal: norms of many short rows, as those of heads are, which threads take several at a time. */
Test(rmsnorm, equals_the_reference_for_many_short_rows)
{
    static const uint32_t cols[] = {1, 16, 64, 80, 128};
    struct rng rng = rng_make("rmsnorm rows");
    for (uint32_t i = 0; i < 5; i++) {
        struct vector_case test;
        vector_case_open(&test, &rng, rng_range(&rng, 900, 2500), cols[i], CONTENT_PLAIN);
        for_each_backend(rmsnorm_check, &test);
        vector_case_close(&test);
    }
}

Test(act_mul, equals_the_reference)
{
    vector_try("act_mul", act_mul_check);
}

Test(softcap, equals_the_reference)
{
    vector_try("softcap", softcap_check);
}

Test(scale, equals_the_reference)
{
    vector_try("scale", scale_check);
}

Test(add_bias, equals_the_reference_and_never_gives_negative_zero)
{
    vector_try("add_bias", add_bias_check);
}

/* Bit patterns of a vector case, `step` apart from `first` on. */
static void patterns_try(uint32_t first, uint32_t step)
{
    struct rng rng = {.state = 0, .seed = 0};
    struct vector_case test;
    vector_case_open(&test, &rng, 1, 1u << 18, CONTENT_PLAIN);
    for (uint32_t i = 0; i < test.count; i++) {
        test.a[i] = det_from_bits(first + i * step);
        test.b[i] = 1.0f;
    }
    for_each_backend(act_mul_check, &test);
    for_each_backend(softcap_check, &test);
    vector_case_close(&test);
}

/* Goal: the vector exponential and tangent are det_exp and det_tanh for every kind of argument.
 * How: a walk through all bit patterns, and every one around each place where the rules change:
 * where tanh turns from its polynomial, where it becomes 1, and where exp ends on either side. */
Test(act_mul, has_the_functions_of_det_h_over_all_bit_patterns)
{
    static const float edges[] = {DET_TANH_SMALL, 9.01f, DET_EXP_MAX, -DET_EXP_MIN, 44.36f};
    patterns_try(0, 16381);
    patterns_try(0x7f800000u - 1000u, 1); /* infinity, and NaNs of many payloads */
    for (uint32_t i = 0; i < 5; i++) {
        patterns_try(det_bits(edges[i]) - (1u << 17), 1);
        patterns_try(det_bits(-edges[i]) - (1u << 17), 1);
    }
}

Test(add, equals_the_reference_and_never_gives_negative_zero)
{
    vector_try("add", add_check);
}

Test(all_finite, finds_the_one_bad_element)
{
    vector_try("all_finite", all_finite_check);
}
