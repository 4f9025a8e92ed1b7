/* Rope, the KV cache and attention of every backend against kernels/ref, bit for bit. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/ref/ref.h"
#include "kernels/rope_table.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define ROWS_MAX     64u
#define SESSIONS_MAX 3u
#define TABLE_MAX    16u /* pages of one session */

struct attention_case {
    struct kv_pool pool;
    struct attention_params params;
    uint32_t heads;
    uint32_t layer;
    struct op_batch batch;
    uint32_t position[ROWS_MAX];
    const uint32_t *page_table[ROWS_MAX];
    uint32_t tables[SESSIONS_MAX][TABLE_MAX];
    float *q;
    float *want;
    float *got;
    float *scratch;
    uint16_t *pages_want;
    size_t page_count; /* halves in all pages */
    size_t count;
    uint64_t seed;
    char what[160];
};

/* Every page belongs to at most one session, in an order that has nothing to do with positions. */
static void pages_shuffle(struct attention_case *self, struct rng *rng)
{
    uint32_t ids[SESSIONS_MAX * TABLE_MAX];
    for (uint32_t i = 0; i < SESSIONS_MAX * TABLE_MAX; i++)
        ids[i] = i;
    for (uint32_t i = SESSIONS_MAX * TABLE_MAX - 1; i > 0; i--) {
        const uint32_t k = rng_range(rng, 0, i);
        const uint32_t id = ids[i];
        ids[i] = ids[k];
        ids[k] = id;
    }
    memcpy(self->tables, ids, sizeof self->tables);
}

/* Rows of one to three sessions, each a chunk in ascending position. */
static void rows_choose(struct attention_case *self, struct rng *rng, uint32_t positions_max)
{
    const uint32_t sessions = rng_range(rng, 1, SESSIONS_MAX);
    uint32_t rows = 0;
    for (uint32_t s = 0; s < sessions; s++) {
        const uint32_t chunk = rng_range(rng, 0, 2) ? rng_range(rng, 1, 20) : 1;
        const uint32_t first = rng_range(rng, 0, positions_max - chunk);
        for (uint32_t i = 0; i < chunk; i++, rows++) {
            self->position[rows] = first + i;
            self->page_table[rows] = self->tables[s];
        }
    }
    self->batch.rows = rows;
    self->batch.position = self->position;
    self->batch.page_table = self->page_table;
}

/* All keys and values are drawn up to the last position of each session; what lies beyond is NaN,
 * so that reading it shows. */
static void pages_fill(struct attention_case *self, struct rng *rng, enum content content)
{
    const size_t head_dim = self->pool.head_dim;
    for (size_t i = 0; i < self->page_count; i++)
        self->pool.pages_dev[i] = 0x7e00u;
    for (uint32_t r = 0; r < self->batch.rows; r++)
        for (uint32_t p = 0; p <= self->position[r]; p++)
            for (uint32_t h = 0; h < self->pool.kv_heads; h++)
                for (uint32_t which = 0; which < 2; which++) {
                    const uint32_t page = self->page_table[r][p / KV_PAGE_TOKENS];
                    uint16_t *at = self->pool.pages_dev +
                                   ref_kv_offset(&self->pool, page, self->layer, which, h) +
                                   (p % KV_PAGE_TOKENS) * head_dim;
                    if (at[0] == 0x7e00u)
                        fill_f16(rng, at, head_dim, content);
                }
}

static void attention_case_open(struct attention_case *self, struct rng *rng, uint32_t kv_heads,
                                uint32_t group, uint32_t head_dim, uint32_t positions_max,
                                enum content content)
{
    memset(self, 0, sizeof *self);
    self->seed = rng->seed;
    self->pool.page_count = SESSIONS_MAX * TABLE_MAX;
    self->pool.layers = 2;
    self->pool.kv_heads = kv_heads;
    self->pool.head_dim = head_dim;
    self->heads = kv_heads * group;
    self->params.heads = self->heads;
    self->params.scale = 1.0f / det_sqrt((float)head_dim);
    if (rng_range(rng, 0, 2) == 0)
        self->params.window = rng_range(rng, 1, positions_max);
    if (rng_range(rng, 0, 2) == 0)
        self->params.softcap = 5.0f;
    self->layer = rng_range(rng, 0, 1);
    self->page_count = (size_t)self->pool.page_count * 2 * 2 * kv_heads * KV_PAGE_TOKENS * head_dim;
    self->pool.pages_dev = test_memory(self->page_count * sizeof(uint16_t));
    self->pages_want = test_memory(self->page_count * sizeof(uint16_t));
    pages_shuffle(self, rng);
    rows_choose(self, rng, positions_max);
    pages_fill(self, rng, content);
    self->count = (size_t)self->batch.rows * self->heads * head_dim;
    self->q = test_memory(self->count * sizeof(float));
    self->want = test_memory(self->count * sizeof(float));
    self->got = test_memory(self->count * sizeof(float));
    self->scratch = test_memory((size_t)positions_max * sizeof(float));
    fill_f32(rng, self->q, self->count, content);
    snprintf(
        self->what, sizeof self->what,
        "attention: %u rows, %u heads, %u kv heads, head_dim %u, content %d, first position %u",
        self->batch.rows, self->heads, kv_heads, head_dim, (int)content, self->position[0]);
}

static void attention_case_close(struct attention_case *self)
{
    alloc_free(self->scratch);
    alloc_free(self->got);
    alloc_free(self->want);
    alloc_free(self->q);
    alloc_free(self->pages_want);
    alloc_free(self->pool.pages_dev);
}

static void attention_reference(struct attention_case *self)
{
    const size_t head_dim = self->pool.head_dim;
    for (uint32_t r = 0; r < self->batch.rows; r++)
        for (uint32_t h = 0; h < self->heads; h++) {
            const size_t at = ((size_t)r * self->heads + h) * head_dim;
            ref_attention(self->want + at, self->q + at, &self->pool, self->layer,
                          h / (self->heads / self->pool.kv_heads), self->page_table[r],
                          self->position[r], &self->params, self->scratch);
        }
}

static void attention_check(struct backend *backend, void *context)
{
    struct attention_case *self = context;
    memset(self->got, 0x55, self->count * sizeof(float));
    cr_assert_eq(backend->ops->attention(backend, self->got, self->q, &self->pool, self->layer,
                                         &self->batch, &self->params),
                 ODSI_OK);
    cr_expect(same_bits(backend, self->what, self->want, self->got, self->count, self->seed));
}

static void attention_try(struct rng *rng, uint32_t kv_heads, uint32_t group, uint32_t head_dim,
                          uint32_t positions_max, enum content content)
{
    struct attention_case test;
    attention_case_open(&test, rng, kv_heads, group, head_dim, positions_max, content);
    attention_reference(&test);
    if (content == CONTENT_PLAIN)
        for (size_t i = 0; i < test.count; i++)
            cr_assert(det_finite(test.want[i]), "the case reads beyond its positions");
    for_each_backend(attention_check, &test);
    attention_case_close(&test);
}

Test(attention, equals_the_reference_for_every_head_size_and_grouping)
{
    static const uint32_t head_dims[] = {2, 4, 8, 12, 16, 20, 32, 40, 64, 80, 96, 128, 256};
    static const uint32_t groups[] = {1, 2, 3, 4, 7, 8, 9};
    struct rng rng = rng_make("attention");
    for (uint32_t i = 0; i < sizeof head_dims / sizeof *head_dims; i++)
        for (uint32_t k = 0; k < sizeof groups / sizeof *groups; k++)
            attention_try(&rng, rng_range(&rng, 1, 3), groups[k], head_dims[i],
                          rng_range(&rng, 20, 200), CONTENT_PLAIN);
}

/* Goal: tile boundaries, and the tiles that are added up side by side. */
Test(attention, equals_the_reference_across_many_pages)
{
    struct rng rng = rng_make("attention pages");
    for (uint32_t i = 0; i < 12; i++)
        attention_try(&rng, 1 + i % 2, 1 + i % 5, i % 3 ? 64 : 32, TABLE_MAX * KV_PAGE_TOKENS,
                      CONTENT_PLAIN);
}

Test(attention, equals_the_reference_for_extreme_and_non_finite_values)
{
    struct rng rng = rng_make("attention extreme");
    for (int content = 1; content < CONTENT_COUNT; content++)
        for (uint32_t i = 0; i < 8; i++)
            attention_try(&rng, 2, rng_range(&rng, 1, 8), 8 * rng_range(&rng, 1, 12), 300,
                          (enum content)content);
}

static void kv_write_check(struct backend *backend, void *context)
{
    struct attention_case *self = context;
    const uint32_t kv_heads = self->pool.kv_heads;
    const size_t head_dim = self->pool.head_dim;
    memset(self->pages_want, 0x11, self->page_count * sizeof(uint16_t));
    memset(self->pool.pages_dev, 0x11, self->page_count * sizeof(uint16_t));
    for (uint32_t r = 0; r < self->batch.rows; r++)
        for (uint32_t h = 0; h < kv_heads; h++)
            for (uint32_t which = 0; which < 2; which++) {
                const uint32_t p = self->position[r];
                const uint32_t page = self->page_table[r][p / KV_PAGE_TOKENS];
                uint16_t *to = self->pages_want +
                               ref_kv_offset(&self->pool, page, self->layer, which, h) +
                               (p % KV_PAGE_TOKENS) * head_dim;
                const float *from = which ? self->want : self->q;
                ref_kv_round(to, from + ((size_t)r * kv_heads + h) * head_dim, head_dim);
            }
    cr_assert_eq(backend->ops->kv_write(backend, &self->pool, self->layer, &self->batch, self->q,
                                        self->want),
                 ODSI_OK);
    cr_expect_eq(memcmp(self->pages_want, self->pool.pages_dev, self->page_count * 2), 0,
                 "%s, seed %" PRIu64, backend->ops->name, self->seed);
}

Test(kv_write, stores_what_the_reference_stores_and_nothing_else)
{
    static const uint32_t head_dims[] = {2, 8, 20, 64, 128};
    struct rng rng = rng_make("kv_write");
    for (uint32_t i = 0; i < 20; i++) {
        struct attention_case test;
        attention_case_open(&test, &rng, rng_range(&rng, 1, 3), 1, head_dims[i % 5], 200,
                            (enum content)(i % CONTENT_COUNT));
        fill_f32(&rng, test.want, test.count, (enum content)(i % CONTENT_COUNT));
        for (size_t k = 0; k < test.count; k += 7) /* around the largest binary16 */
            test.q[k] = det_from_bits(0x477fe000u + rng_range(&rng, 0, 0x2000u) - 0x800u);
        for_each_backend(kv_write_check, &test);
        attention_case_close(&test);
    }
}

/* Goal: an overflowing key cannot pass as one that nobody attends to. */
Test(kv_write, makes_every_reader_of_an_overflow_non_finite)
{
    const float beyond[] = {65520.0f,
                            -65520.0f,
                            1e30f,
                            det_from_bits(0x7f800000u),
                            det_from_bits(0xff800000u),
                            det_from_bits(0x7fc00000u)};
    for (uint32_t i = 0; i < sizeof beyond / sizeof *beyond; i++) {
        uint16_t stored = 0;
        ref_kv_round(&stored, &beyond[i], 1);
        cr_expect_eq(stored, 0x7e00u);
    }
    const float largest = 65519.996f;
    uint16_t stored = 0;
    ref_kv_round(&stored, &largest, 1);
    cr_expect_eq(stored, 0x7bffu);
}

struct rope_case {
    struct rope_table table;
    struct op_batch batch;
    uint32_t position[9];
    uint32_t heads;
    float *x;
    float *want;
    float *got;
    size_t count;
    uint64_t seed;
};

static void rope_check(struct backend *backend, void *context)
{
    struct rope_case *self = context;
    const uint32_t head_dim = 2 * self->table.half_dim;
    memcpy(self->want, self->x, self->count * sizeof(float));
    memcpy(self->got, self->x, self->count * sizeof(float));
    for (uint32_t r = 0; r < self->batch.rows; r++) {
        const size_t at = (size_t)self->position[r] * self->table.half_dim;
        ref_rope(self->want + (size_t)r * self->heads * head_dim, self->table.cos_dev + at,
                 self->table.sin_dev + at, self->table.half_dim, self->table.style, self->heads,
                 head_dim);
    }
    cr_assert_eq(
        backend->ops->rope(backend, self->got, &self->table, &self->batch, self->heads, head_dim),
        ODSI_OK);
    cr_expect(same_bits(backend, "rope", self->want, self->got, self->count, self->seed));
}

Test(rope, equals_the_reference)
{
    struct rng rng = rng_make("rope");
    for (uint32_t i = 0; i < 40; i++) {
        struct rope_case test = {.seed = rng.seed};
        const uint32_t half_dim = rng_range(&rng, 1, 70);
        float *cos = test_memory((size_t)200 * half_dim * sizeof(float));
        float *sin = test_memory((size_t)200 * half_dim * sizeof(float));
        double *frequency = test_memory(half_dim * sizeof *frequency);
        rope_table_frequencies(frequency, half_dim, 10000.0, 1.0, NULL);
        rope_table_fill(cos, sin, 200, half_dim, frequency, 1.0);
        alloc_free(frequency);
        test.table = (struct rope_table){cos, sin, 200, half_dim, ROPE_PAIRS};
        test.batch = (struct op_batch){.rows = rng_range(&rng, 1, 9), .position = test.position};
        for (uint32_t r = 0; r < test.batch.rows; r++)
            test.position[r] = rng_range(&rng, 0, 199);
        test.heads = rng_range(&rng, 1, 9);
        test.count = (size_t)test.batch.rows * test.heads * 2 * half_dim;
        test.x = test_memory(test.count * sizeof(float));
        test.want = test_memory(test.count * sizeof(float));
        test.got = test_memory(test.count * sizeof(float));
        fill_f32(&rng, test.x, test.count, (enum content)(i % CONTENT_COUNT));
        for_each_backend(rope_check, &test);
        alloc_free(test.got);
        alloc_free(test.want);
        alloc_free(test.x);
        alloc_free(sin);
        alloc_free(cos);
    }
}
