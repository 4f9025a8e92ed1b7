/* Choosing experts and adding up what they give, on every backend against kernels/ref. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/ref/ref.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct route_case {
    uint32_t rows;
    uint32_t experts;
    uint32_t used;
    float *logits;       /* [rows][experts] */
    uint32_t *ids_want;  /* [rows][used] */
    uint32_t *ids_got;   /* [rows][used] */
    float *weights_want; /* [rows][used] */
    float *weights_got;  /* [rows][used] */
    uint64_t seed;
    char what[80];
};

static void route_case_open(struct route_case *self, struct rng *rng, uint32_t rows,
                            uint32_t experts, uint32_t used, enum content content)
{
    const size_t count = (size_t)rows * used;
    *self = (struct route_case){.rows = rows, .experts = experts, .used = used, .seed = rng->seed};
    self->logits = test_memory((size_t)rows * experts * sizeof(float));
    self->ids_want = test_memory(count * sizeof(uint32_t));
    self->ids_got = test_memory(count * sizeof(uint32_t));
    self->weights_want = test_memory(count * sizeof(float));
    self->weights_got = test_memory(count * sizeof(float));
    fill_f32(rng, self->logits, (size_t)rows * experts, content);
    snprintf(self->what, sizeof self->what, "route: %u rows, %u of %u experts, content %d", rows,
             used, experts, (int)content);
}

static void route_case_close(struct route_case *self)
{
    alloc_free(self->weights_got);
    alloc_free(self->weights_want);
    alloc_free(self->ids_got);
    alloc_free(self->ids_want);
    alloc_free(self->logits);
}

static void route_check(struct backend *backend, void *context)
{
    struct route_case *self = context;
    const size_t count = (size_t)self->rows * self->used;
    memset(self->ids_got, 0x55, count * sizeof(uint32_t));
    memset(self->weights_got, 0x55, count * sizeof(float));
    cr_assert_eq(backend->ops->route(backend, self->ids_got, self->weights_got, self->logits,
                                     self->rows, self->experts, self->used),
                 ODSI_OK);
    for (size_t i = 0; i < count; i++)
        cr_assert_eq(self->ids_got[i], self->ids_want[i],
                     "%s, %s: place %zu has expert %u, the reference says %u; seed %" PRIu64,
                     self->what, backend->ops->name, i, self->ids_got[i], self->ids_want[i],
                     self->seed);
    cr_expect(
        same_bits(backend, self->what, self->weights_want, self->weights_got, count, self->seed));
}

static void route_try(struct rng *rng, uint32_t rows, uint32_t experts, uint32_t used,
                      enum content content)
{
    struct route_case test;
    route_case_open(&test, rng, rows, experts, used, content);
    for (uint32_t r = 0; r < rows; r++)
        ref_route(test.ids_want + (size_t)r * used, test.weights_want + (size_t)r * used,
                  test.logits + (size_t)r * experts, experts, used);
    for_each_backend(route_check, &test);
    route_case_close(&test);
}

/* Goal: every number of experts around the vector widths, ties (few different values), both zeros,
 * rows that are not finite, and all experts used. */
Test(route, equals_the_reference)
{
    static const uint32_t experts[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 60, 64, 128, 129, 300};
    struct rng rng = rng_make("route");
    for (uint32_t i = 0; i < sizeof experts / sizeof *experts; i++)
        for (int content = 0; content < CONTENT_COUNT; content++) {
            const uint32_t few = experts[i] < 8 ? experts[i] : 8;
            route_try(&rng, 40, experts[i], rng_range(&rng, 1, few), (enum content)content);
            route_try(&rng, 5, experts[i], experts[i], (enum content)content);
        }
    route_try(&rng, 512, 128, 8, CONTENT_PLAIN);
    route_try(&rng, 512, 128, 8, CONTENT_CANCELLING);
}

Test(route, breaks_ties_by_the_lower_id_and_makes_weights_of_one)
{
    const float logits[6] = {1.0f, 3.0f, -0.0f, 3.0f, 0.0f, 3.0f};
    const uint32_t want[5] = {1, 3, 5, 0, 2};
    uint32_t ids[5];
    float weights[5];
    ref_route(ids, weights, logits, 6, 5);
    cr_expect_arr_eq(ids, want, sizeof ids);
    cr_expect_eq(weights[0], weights[2], "equal logits have equal weights");
    const float sum = weights[0] + weights[1] + weights[2] + weights[3] + weights[4];
    cr_expect(sum > 0.999999f && sum < 1.000001f);
}

/* Goal: a number that is not finite cannot vanish, even in an expert that is not chosen. */
Test(route, gives_nan_weights_when_any_logit_is_not_finite)
{
    static const uint32_t bad[] = {0x7fc00000u, 0x7f800000u, 0xff800000u};
    for (uint32_t i = 0; i < 3; i++) {
        float logits[4] = {1.0f, 2.0f, 3.0f, det_from_bits(bad[i])};
        uint32_t ids[2];
        float weights[2];
        ref_route(ids, weights, logits, 4, 2);
        cr_expect_eq(ids[0], 0u);
        cr_expect_eq(ids[1], 1u);
        cr_expect(weights[0] != weights[0] && weights[1] != weights[1]);
    }
}

struct combine_case {
    uint32_t rows;
    uint32_t used;
    uint32_t cols;
    float *y;
    float *weights;
    float *want;
    float *got;
    uint64_t seed;
};

static void combine_check(struct backend *backend, void *context)
{
    struct combine_case *self = context;
    const size_t count = (size_t)self->rows * self->cols;
    memset(self->got, 0x55, count * sizeof(float));
    cr_assert_eq(backend->ops->combine(backend, self->got, self->y, self->weights, self->rows,
                                       self->used, self->cols),
                 ODSI_OK);
    cr_expect(same_bits(backend, "combine", self->want, self->got, count, self->seed));
}

Test(combine, equals_the_reference)
{
    static const uint32_t cols[] = {1, 7, 8, 9, 15, 16, 17, 64, 100, 513, 2048};
    struct rng rng = rng_make("combine");
    for (uint32_t i = 0; i < sizeof cols / sizeof *cols; i++)
        for (int content = 0; content < CONTENT_COUNT; content++) {
            struct combine_case test = {.rows = rng_range(&rng, 1, 20),
                                        .used = rng_range(&rng, 1, 9),
                                        .cols = cols[i],
                                        .seed = rng.seed};
            const size_t slots = (size_t)test.rows * test.used;
            test.y = test_memory(slots * test.cols * sizeof(float));
            test.weights = test_memory(slots * sizeof(float));
            test.want = test_memory((size_t)test.rows * test.cols * sizeof(float));
            test.got = test_memory((size_t)test.rows * test.cols * sizeof(float));
            fill_f32(&rng, test.y, slots * test.cols, (enum content)content);
            fill_f32(&rng, test.weights, slots, (enum content)content);
            for (uint32_t r = 0; r < test.rows; r++)
                ref_combine(test.want + (size_t)r * test.cols,
                            test.y + (size_t)r * test.used * test.cols,
                            test.weights + (size_t)r * test.used, test.used, test.cols);
            for_each_backend(combine_check, &test);
            alloc_free(test.got);
            alloc_free(test.want);
            alloc_free(test.weights);
            alloc_free(test.y);
        }
}
