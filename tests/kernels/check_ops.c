/* Ops by row and by element of every backend against kernels/ref, bit for bit. Other ops:
 * check_matmul.c, check_attention.c, check_route.c. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

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
