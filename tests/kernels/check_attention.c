/* Rope, the KV cache and attention of every backend against kernels/ref, bit for bit. */
#include "common/base/alloc.h"
#include "kernels/cpu/cpu_attention.h"
#include "kernels/det.h"
#include "kernels/ref/ref.h"
#include "kernels/rope_table.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define ROWS_MAX     128u
#define SESSIONS_MAX 3u
#define TABLE_MAX    360u /* pages of one session */

/* What is to be drawn. */
struct attention_shape {
    uint32_t kv_heads;
    uint32_t group; /* heads of one kv head */
    uint32_t head_dim;
    uint32_t positions_max;
    enum content content;
    uint32_t window;
    float softcap;
    uint32_t chunk; /* rows of one session from first on; 0: some rows of some sessions */
    uint32_t first;
};

struct attention_case {
    struct kv_pool pool;
    struct attention_params params;
    uint32_t heads;
    uint32_t layer;
    struct op_batch batch;
    uint32_t position[ROWS_MAX];
    const uint32_t *page_table[ROWS_MAX];
    uint32_t table_count; /* pages of one session */
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
    for (uint32_t i = 0; i < self->pool.page_count; i++)
        ids[i] = i;
    for (uint32_t i = self->pool.page_count - 1; i > 0; i--) {
        const uint32_t k = rng_range(rng, 0, i);
        const uint32_t id = ids[i];
        ids[i] = ids[k];
        ids[k] = id;
    }
    for (uint32_t s = 0; s < SESSIONS_MAX; s++)
        memcpy(self->tables[s], ids + (size_t)s * self->table_count,
               self->table_count * sizeof *ids);
}

/* chunk rows of session s from position first on. */
static void rows_add(struct attention_case *self, uint32_t s, uint32_t first, uint32_t chunk)
{
    for (uint32_t i = 0; i < chunk; i++) {
        self->position[self->batch.rows] = first + i;
        self->page_table[self->batch.rows] = self->tables[s];
        self->batch.rows++;
    }
}

/* Rows of one to three sessions, each a chunk in ascending position, unless the shape says. */
static void rows_choose(struct attention_case *self, struct rng *rng,
                        const struct attention_shape *shape)
{
    self->batch.position = self->position;
    self->batch.page_table = self->page_table;
    if (shape->chunk > 0) {
        rows_add(self, 0, shape->first, shape->chunk);
        return;
    }
    const uint32_t sessions = rng_range(rng, 1, SESSIONS_MAX);
    for (uint32_t s = 0; s < sessions; s++) {
        const uint32_t chunk = rng_range(rng, 0, 2) ? rng_range(rng, 1, 20) : 1;
        rows_add(self, s, rng_range(rng, 0, shape->positions_max - chunk), chunk);
    }
}

/* All keys and values that some row looks at are drawn; what lies before its window and beyond its
 * position is NaN, so that reading it shows. */
static void pages_fill(struct attention_case *self, struct rng *rng, enum content content)
{
    const size_t head_dim = self->pool.head_dim;
    for (size_t i = 0; i < self->page_count; i++)
        self->pool.pages_dev[i] = 0x7e00u;
    for (uint32_t r = 0; r < self->batch.rows; r++)
        for (uint32_t p = ref_window_first(self->position[r], self->params.window);
             p <= self->position[r]; p++)
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

static void attention_case_open(struct attention_case *self, struct rng *rng,
                                const struct attention_shape *shape)
{
    const uint32_t head_dim = shape->head_dim;
    memset(self, 0, sizeof *self);
    self->seed = rng->seed;
    self->table_count = (shape->positions_max + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    cr_assert(self->table_count <= TABLE_MAX);
    self->pool.page_count = SESSIONS_MAX * self->table_count;
    self->pool.layers = 2;
    self->pool.kv_heads = shape->kv_heads;
    self->pool.head_dim = head_dim;
    self->heads = shape->kv_heads * shape->group;
    self->params = (struct attention_params){.heads = self->heads,
                                             .scale = 1.0f / det_sqrt((float)head_dim),
                                             .softcap = shape->softcap,
                                             .window = shape->window};
    self->layer = rng_range(rng, 0, 1);
    self->page_count =
        (size_t)self->pool.page_count * 2 * 2 * shape->kv_heads * KV_PAGE_TOKENS * head_dim;
    self->pool.pages_dev = test_memory(self->page_count * sizeof(uint16_t));
    self->pages_want = test_memory(self->page_count * sizeof(uint16_t));
    pages_shuffle(self, rng);
    rows_choose(self, rng, shape);
    pages_fill(self, rng, shape->content);
    self->count = (size_t)self->batch.rows * self->heads * head_dim;
    self->q = test_memory(self->count * sizeof(float));
    self->want = test_memory(self->count * sizeof(float));
    self->got = test_memory(self->count * sizeof(float));
    self->scratch = test_memory((size_t)shape->positions_max * sizeof(float));
    fill_f32(rng, self->q, self->count, shape->content);
    snprintf(self->what, sizeof self->what,
             "attention: %u rows, %u heads, %u kv heads, head_dim %u, window %u, softcap %g, "
             "content %d, first position %u",
             self->batch.rows, self->heads, shape->kv_heads, head_dim, shape->window,
             (double)shape->softcap, (int)shape->content, self->position[0]);
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

static void attention_try(struct rng *rng, const struct attention_shape *shape)
{
    struct attention_case test;
    attention_case_open(&test, rng, shape);
    attention_reference(&test);
    if (shape->content == CONTENT_PLAIN)
        for (size_t i = 0; i < test.count; i++)
            cr_assert(det_finite(test.want[i]), "the case reads beyond its positions");
    for_each_backend(attention_check, &test);
    attention_case_close(&test);
}

/* With a window and a softcap in some cases. */
static void attention_try_any(struct rng *rng, uint32_t kv_heads, uint32_t group, uint32_t head_dim,
                              uint32_t positions_max, enum content content)
{
    const struct attention_shape shape = {
        .kv_heads = kv_heads,
        .group = group,
        .head_dim = head_dim,
        .positions_max = positions_max,
        .content = content,
        .window = rng_range(rng, 0, 2) == 0 ? rng_range(rng, 1, positions_max) : 0,
        .softcap = rng_range(rng, 0, 2) == 0 ? 5.0f : 0.0f};
    attention_try(rng, &shape);
}

Test(attention, equals_the_reference_for_every_head_size_and_grouping)
{
    static const uint32_t head_dims[] = {1,  2,  4,  8,  12, 16, 20,  31, 32,
                                         40, 62, 64, 72, 80, 96, 128, 256};
    static const uint32_t groups[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 50};
    struct rng rng = rng_make("attention");
    for (uint32_t i = 0; i < sizeof head_dims / sizeof *head_dims; i++)
        for (uint32_t k = 0; k < sizeof groups / sizeof *groups; k++)
            attention_try_any(&rng, rng_range(&rng, 1, 3), groups[k], head_dims[i],
                              rng_range(&rng, 20, groups[k] < 10 ? 200 : 70), CONTENT_PLAIN);
}

/* Goal: tile boundaries, and the tiles that are added up side by side. */
Test(attention, equals_the_reference_across_many_pages)
{
    struct rng rng = rng_make("attention pages");
    for (uint32_t i = 0; i < 12; i++)
        attention_try_any(&rng, 1 + i % 2, 1 + i % 5, i % 3 ? 64 : 32, 1024, CONTENT_PLAIN);
}

/* Goal: a window may begin and end anywhere in a tile. How: every window and every first row within
 * one of a tile's border, for chunks that do and do not cross one; the positions before are NaN. */
Test(attention, equals_the_reference_for_windows_around_tile_borders)
{
    static const uint32_t windows[] = {1, 2, 7, 63, 64, 65, 66, 127, 128, 129, 191, 192, 193, 300};
    static const uint32_t firsts[] = {0, 1, 62, 63, 64, 65, 127, 128, 129, 192, 255};
    static const uint32_t chunks[] = {1, 2, 9, 70};
    struct rng rng = rng_make("attention windows");
    for (uint32_t w = 0; w < sizeof windows / sizeof *windows; w++)
        for (uint32_t f = 0; f < sizeof firsts / sizeof *firsts; f++) {
            const struct attention_shape shape = {.kv_heads = 1,
                                                  .group = 1 + (w + f) % 4,
                                                  .head_dim = 16 * (1 + f % 2),
                                                  .positions_max = 330,
                                                  .window = windows[w],
                                                  .softcap = w % 3 == 0 ? 2.0f : 0.0f,
                                                  .chunk = chunks[(w + f) % 4],
                                                  .first = firsts[f]};
            attention_try(&rng, &shape);
        }
}

static uint16_t *value_at(struct attention_case *self, uint32_t row, uint32_t position)
{
    const uint32_t page = self->page_table[row][position / KV_PAGE_TOKENS];
    return self->pool.pages_dev + ref_kv_offset(&self->pool, page, self->layer, 1, 0) +
           (size_t)(position % KV_PAGE_TOKENS) * self->pool.head_dim;
}

/* Goal: rows that are computed together do not see each other's values, which a weight of 0 would
 * not keep a NaN from. How: the values that only the last row sees, and those that only the first
 * row's window reaches, are NaN; all rows between are finite and right. */
Test(attention, keeps_a_value_that_is_not_finite_to_the_rows_that_look_at_it)
{
    struct rng rng = rng_make("attention values");
    for (uint32_t chunk = 3; chunk <= 40; chunk++) {
        const struct attention_shape shape = {.kv_heads = 1,
                                              .group = 1 + chunk % 3,
                                              .head_dim = chunk % 2 ? 64 : 20,
                                              .positions_max = 330,
                                              .window = 100,
                                              .chunk = chunk,
                                              .first = rng_range(&rng, 110, 250)};
        struct attention_case test;
        attention_case_open(&test, &rng, &shape);
        for (uint32_t c = 0; c < shape.head_dim; c++) {
            value_at(&test, 0, shape.first - 99)[c] = 0x7e00u;
            value_at(&test, 0, shape.first + chunk - 1)[c] = 0x7e00u;
        }
        attention_reference(&test);
        const size_t row_size = (size_t)test.heads * shape.head_dim;
        cr_assert(!det_finite(test.want[0]) && !det_finite(test.want[test.count - 1]));
        for (size_t i = row_size; i < test.count - row_size; i++)
            cr_assert(det_finite(test.want[i]));
        for_each_backend(attention_check, &test);
        attention_case_close(&test);
    }
}

/* Goal: prompts in chunks as a forward runs them, with and without a window. */
Test(attention, equals_the_reference_for_whole_chunks)
{
    struct rng rng = rng_make("attention chunks");
    for (uint32_t i = 0; i < 8; i++) {
        const struct attention_shape shape = {.kv_heads = 2,
                                              .group = 1u << (i % 4),
                                              .head_dim = i % 2 ? 64 : 48,
                                              .positions_max = 500,
                                              .window = i % 3 == 1 ? 100 : 0,
                                              .softcap = i % 4 == 3 ? 30.0f : 0.0f,
                                              .chunk = rng_range(&rng, 100, ROWS_MAX),
                                              .first = rng_range(&rng, 0, 300)};
        attention_try(&rng, &shape);
    }
}

/* Goal: contexts whose scores a thread does not hold for all heads at once. */
Test(attention, equals_the_reference_when_scores_are_more_than_are_held)
{
    struct rng rng = rng_make("attention long");
    const struct attention_shape shape = {.kv_heads = 1,
                                          .group = 48,
                                          .head_dim = 4,
                                          .positions_max = 23000,
                                          .chunk = 2,
                                          .first = 22990};
    attention_try(&rng, &shape);
}

Test(attention, equals_the_reference_for_extreme_and_non_finite_values)
{
    struct rng rng = rng_make("attention extreme");
    for (int content = 1; content < CONTENT_COUNT; content++)
        for (uint32_t i = 0; i < 12; i++)
            attention_try_any(&rng, 2, rng_range(&rng, 1, 8), 8 * rng_range(&rng, 1, 12), 300,
                              (enum content)content);
}

/* Goal: working memory does not grow with the square of the context, nor with the number of heads.
 * How: plans alone, for prompts and decodes up to a million positions, however the heads are
 * grouped; a thread needs 5 MiB, or one float for each position of the one head that has more. */
Test(attention, plans_with_bounded_memory)
{
    static const uint32_t positions[] = {512, 8192, 32768, 131072, 1048576};
    static const uint32_t groups[] = {1, 4, 8, 32, 1024};
    static struct cpu_attention_part parts[512];
    static uint32_t position[512];
    static const uint32_t *tables[512];
    for (uint32_t i = 0; i < 5; i++)
        for (uint32_t g = 0; g < 5; g++)
            for (uint32_t rows = 1; rows <= 512; rows += 511) {
                const struct kv_pool pool = {.layers = 1, .kv_heads = 2, .head_dim = 128};
                const struct attention_params params = {.heads = 2 * groups[g], .scale = 1.0f};
                const struct op_batch batch = {rows, position, tables};
                struct cpu_attention_plan plan = {
                    .pool = &pool, .params = &params, .batch = &batch};
                for (uint32_t r = 0; r < rows; r++)
                    position[r] = positions[i] - rows + r;
                cpu_attention_plan(&plan, parts, 2);
                const size_t size = plan.scratch_count * sizeof(float);
                const size_t held = ((size_t)5 << 20) + positions[i] * sizeof(float);
                cr_expect_leq(size, held, "%u positions, group %u, %u rows: %zu bytes",
                              positions[i], groups[g], rows, size);
                cr_expect_geq(cpu_attention_piece_count(&plan), 2u);
            }
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
        const struct attention_shape shape = {.kv_heads = rng_range(&rng, 1, 3),
                                              .group = 1,
                                              .head_dim = head_dims[i % 5],
                                              .positions_max = 200,
                                              .content = (enum content)(i % CONTENT_COUNT)};
        attention_case_open(&test, &rng, &shape);
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
    uint32_t position[300];
    uint32_t heads;
    uint32_t head_dim;
    float *x;
    float *want;
    float *got;
    size_t count;
    uint64_t seed;
};

static void rope_check(struct backend *backend, void *context)
{
    struct rope_case *self = context;
    const uint32_t head_dim = self->head_dim;
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

/* One table, one batch of rows and their heads, of which the dims beyond 2 * half_dim stay. */
static void rope_try(struct rng *rng, enum rope_style style, uint32_t half_dim, uint32_t still,
                     uint32_t rows, enum content content)
{
    struct rope_case test = {.seed = rng->seed};
    float *cos = test_memory((size_t)200 * half_dim * sizeof(float));
    float *sin = test_memory((size_t)200 * half_dim * sizeof(float));
    double *frequency = test_memory(half_dim * sizeof *frequency);
    rope_table_frequencies(frequency, half_dim, 10000.0, 1.0, NULL);
    rope_table_fill(cos, sin, 200, half_dim, frequency, 1.0);
    alloc_free(frequency);
    test.table = (struct rope_table){cos, sin, 200, half_dim, style};
    test.batch = (struct op_batch){.rows = rows, .position = test.position};
    for (uint32_t r = 0; r < rows; r++)
        test.position[r] = rng_range(rng, 0, 199);
    test.heads = rng_range(rng, 1, 9);
    test.head_dim = 2 * half_dim + still;
    test.count = (size_t)rows * test.heads * test.head_dim;
    test.x = test_memory(test.count * sizeof(float));
    test.want = test_memory(test.count * sizeof(float));
    test.got = test_memory(test.count * sizeof(float));
    fill_f32(rng, test.x, test.count, content);
    for_each_backend(rope_check, &test);
    alloc_free(test.got);
    alloc_free(test.want);
    alloc_free(test.x);
    alloc_free(sin);
    alloc_free(cos);
}

/* Goal: both styles, whole heads and parts of them, and rows enough for all threads. */
Test(rope, equals_the_reference)
{
    struct rng rng = rng_make("rope");
    for (uint32_t i = 0; i < 80; i++)
        rope_try(&rng, i % 2 ? ROPE_PAIRS : ROPE_HALVES, rng_range(&rng, 1, 70),
                 i % 3 ? 0 : rng_range(&rng, 1, 40), rng_range(&rng, 1, 9),
                 (enum content)(i % CONTENT_COUNT));
    for (uint32_t i = 0; i < 6; i++)
        rope_try(&rng, i % 2 ? ROPE_PAIRS : ROPE_HALVES, 32, 0, 300, CONTENT_PLAIN);
}

/* Goal: what turns with what. How: one angle of a quarter turn, where (a, b) becomes (-b, a). */
Test(rope, pairs_neighbours_or_halves)
{
    const float cos[2] = {0.0f, 1.0f};
    const float sin[2] = {1.0f, 0.0f};
    float pairs[5] = {1, 2, 3, 4, 5};
    float halves[5] = {1, 2, 3, 4, 5};
    ref_rope(pairs, cos, sin, 2, ROPE_PAIRS, 1, 5);
    ref_rope(halves, cos, sin, 2, ROPE_HALVES, 1, 5);
    const float pairs_want[5] = {-2, 1, 3, 4, 5};
    const float halves_want[5] = {-3, 2, 1, 4, 5};
    cr_expect_arr_eq(pairs, pairs_want, sizeof pairs);
    cr_expect_arr_eq(halves, halves_want, sizeof halves);
}
