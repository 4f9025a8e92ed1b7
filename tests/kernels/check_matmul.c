/* Products with weights of every type, and the rows of weights, of every backend against
 * kernels/ref, bit for bit. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

/* ---- one matrix ---- */

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

/* One row of the result: the row of x times every row of the matrix. */
static void row_reference(float *want, enum tensor_type type, const uint8_t *matrix,
                          uint32_t weight_rows, const float *x, uint32_t cols)
{
    const size_t row_size = quant_row_size(type, cols);
    int8_t *q = test_memory(cols);
    float *scales = test_memory((cols / OPS_BLOCK + 1) * sizeof *scales);
    if (quant_is_quantized(type))
        ref_quantize(q, scales, x, cols);
    for (uint32_t r = 0; r < weight_rows; r++) {
        const void *w = matrix + r * row_size;
        if (type == TENSOR_F32)
            want[r] = ref_dot_f32(w, x, cols);
        else if (type == TENSOR_F16)
            want[r] = ref_dot_f16(w, x, cols);
        else if (type == TENSOR_BF16)
            want[r] = ref_dot_bf16(w, x, cols);
        else
            want[r] = ref_dot_quant(type, w, q, scales, cols);
    }
    alloc_free(scales);
    alloc_free(q);
}

static void matmul_reference(struct matmul_case *self)
{
    for (uint32_t t = 0; t < self->rows; t++)
        row_reference(self->want + (size_t)t * self->weight_rows, self->type, self->source,
                      self->weight_rows, self->x + (size_t)t * self->cols, self->cols);
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
    snprintf(self->what, sizeof self->what, "matmul %s, x [%u][%u], weight rows %u, content %d",
             quant_name(self->type), self->rows, self->cols, self->weight_rows, (int)self->content);
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

/* Goal: strands of several blocks, whole and with a short or missing last one, and of an odd number
 * of parts of a block of 256; numbers of token rows on both sides of every way to walk them. */
Test(matmul, equals_the_reference_for_long_strands_and_many_rows)
{
    static const uint32_t rows[] = {1, 3, 8, 9, 16, 17, 18, 31, 50, 131};
    static const uint32_t cols[] = {768, 1280, 2048, 2304, 4352, 5632};
    struct rng rng = rng_make("matmul long");
    for (uint32_t i = 0; i < sizeof rows / sizeof *rows; i++)
        matmul_try_types(&rng, rows[i], rng_range(&rng, 1, 50), cols[i % 6], CONTENT_PLAIN);
}

Test(matmul, equals_the_reference_for_extreme_and_non_finite_values)
{
    struct rng rng = rng_make("matmul extreme");
    for (int content = 0; content < CONTENT_COUNT; content++)
        for (uint32_t i = 0; i < 12; i++)
            matmul_try_types(&rng, rng_range(&rng, 1, 9), rng_range(&rng, 1, 70),
                             rng_range(&rng, 1, 400), (enum content)content);
}

/* Goal: a NaN or infinity in a row of x cannot be lost in a product, not even with weights whose
 * quants are all zero. */
Test(matmul, gives_a_non_finite_row_for_a_non_finite_input)
{
    static const uint32_t bad[] = {0x7fc00000u, 0x7f800000u, 0xff800000u};
    struct rng rng = rng_make("matmul non-finite");
    for (uint32_t i = 0; i < 3 * TEST_TYPE_COUNT; i++) {
        const enum tensor_type type = test_types[i / 3];
        float x[512];
        float got[3];
        fill_f32(&rng, x, 512, CONTENT_PLAIN);
        x[rng_range(&rng, 0, 511)] = det_from_bits(bad[i % 3]);
        uint8_t *matrix = test_matrix(&rng, type, 3, 512, CONTENT_PLAIN);
        memset(matrix, 0, quant_row_size(type, 512)); /* the first row */
        row_reference(got, type, matrix, 3, x, 512);
        for (uint32_t r = 0; r < 3; r++)
            cr_expect(!det_finite(got[r]), "%s, row %u", quant_name(type), r);
        alloc_free(matrix);
    }
}

/* ---- filling ---- */

struct fill_case {
    struct matmul_case matmul;
    uint32_t cuts[5]; /* rows of all matrices are filled in these pieces, last one first */
};

static void fill_check(struct backend *backend, void *context)
{
    struct fill_case *self = context;
    struct matmul_case *test = &self->matmul;
    const size_t row_size = quant_row_size(test->type, test->cols);
    const uint32_t ids[3] = {2, 0, 1};
    struct weight *weight = NULL;
    cr_assert_eq(
        backend->ops->weight_open(backend, &weight, test->type, test->weight_rows, test->cols, 3),
        ODSI_OK);
    for (uint32_t i = 4; i > 0; i--) {
        const uint32_t first = self->cuts[i - 1];
        const uint8_t *from = (const uint8_t *)test->source + first * row_size;
        cr_assert_eq(backend->ops->weight_fill(backend, weight, first, from, self->cuts[i] - first),
                     ODSI_OK);
    }
    cr_assert_eq(backend->ops->matmul_experts(backend, test->got, weight, test->x, ids, 3, 3),
                 ODSI_OK);
    cr_assert_eq(backend->ops->sync(backend), ODSI_OK);
    cr_expect(same_bits(backend, test->what, test->want, test->got, (size_t)3 * test->weight_rows,
                        test->seed));
    backend->ops->weight_free(backend, weight);
}

/* Goal: a loader may hand over rows in any pieces and order, across the ends of matrices. */
Test(weight, is_the_same_whatever_pieces_it_was_filled_in)
{
    struct rng rng = rng_make("weight pieces");
    for (uint32_t i = 0; i < 2 * TEST_TYPE_COUNT; i++) {
        struct fill_case test = {.matmul = {.type = test_types[i / 2], .seed = rng.seed}};
        struct matmul_case *matmul = &test.matmul;
        matmul->weight_rows = rng_range(&rng, 1, 60);
        matmul->cols = 256 * rng_range(&rng, 1, 2);
        const uint32_t all = 3 * matmul->weight_rows;
        const size_t matrix_size = matmul->weight_rows * quant_row_size(matmul->type, matmul->cols);
        test.cuts[1] = rng_range(&rng, 0, all);
        test.cuts[2] = rng_range(&rng, test.cuts[1], all);
        test.cuts[3] = rng_range(&rng, test.cuts[2], all);
        test.cuts[4] = all;
        matmul->source = test_matrix(&rng, matmul->type, all, matmul->cols, CONTENT_PLAIN);
        matmul->x = test_memory(matmul->cols * sizeof(float));
        matmul->want = test_memory(all * sizeof(float));
        matmul->got = test_memory(all * sizeof(float));
        fill_f32(&rng, matmul->x, matmul->cols, CONTENT_PLAIN);
        snprintf(matmul->what, sizeof matmul->what, "%s [%u][%u] filled at %u, %u, %u",
                 quant_name(matmul->type), matmul->weight_rows, matmul->cols, test.cuts[1],
                 test.cuts[2], test.cuts[3]);
        static const uint32_t order[3] = {2, 0, 1};
        for (uint32_t m = 0; m < 3; m++)
            row_reference(matmul->want + (size_t)m * matmul->weight_rows, matmul->type,
                          (const uint8_t *)matmul->source + order[m] * matrix_size,
                          matmul->weight_rows, matmul->x, matmul->cols);
        for_each_backend(fill_check, &test);
        alloc_free(matmul->got);
        alloc_free(matmul->want);
        alloc_free(matmul->x);
        alloc_free(matmul->source);
    }
}

/* ---- experts ---- */

struct experts_case {
    struct matmul_case matmul; /* rows of x; want and got are of all slots */
    uint32_t matrices;
    uint32_t slots;
    uint32_t slots_per_row;
    uint32_t *ids;
};

static void experts_check(struct backend *backend, void *context)
{
    struct experts_case *self = context;
    struct matmul_case *test = &self->matmul;
    const size_t count = (size_t)self->slots * test->weight_rows;
    struct weight *weight = NULL;
    cr_assert_eq(backend->ops->weight_open(backend, &weight, test->type, test->weight_rows,
                                           test->cols, self->matrices),
                 ODSI_OK);
    cr_assert_eq(backend->ops->weight_fill(backend, weight, 0, test->source,
                                           self->matrices * test->weight_rows),
                 ODSI_OK);
    memset(test->got, 0x55, count * sizeof *test->got);
    cr_assert_eq(backend->ops->matmul_experts(backend, test->got, weight, test->x, self->ids,
                                              self->slots, self->slots_per_row),
                 ODSI_OK);
    cr_assert_eq(backend->ops->sync(backend), ODSI_OK);
    cr_expect(same_bits(backend, test->what, test->want, test->got, count, test->seed));
    backend->ops->weight_free(backend, weight);
}

static void experts_try(struct rng *rng, struct experts_case *self)
{
    struct matmul_case *test = &self->matmul;
    const size_t count = (size_t)self->slots * test->weight_rows;
    const size_t matrix_size = test->weight_rows * quant_row_size(test->type, test->cols);
    test->seed = rng->seed;
    test->rows = self->slots / self->slots_per_row;
    test->source =
        test_matrix(rng, test->type, self->matrices * test->weight_rows, test->cols, test->content);
    test->x = test_memory((size_t)test->rows * test->cols * sizeof *test->x);
    test->want = test_memory(count * sizeof *test->want);
    test->got = test_memory(count * sizeof *test->got);
    fill_f32(rng, test->x, (size_t)test->rows * test->cols, test->content);
    snprintf(test->what, sizeof test->what, "experts %s, %u [%u][%u], %u slots, %u of a row",
             quant_name(test->type), self->matrices, test->weight_rows, test->cols, self->slots,
             self->slots_per_row);
    for (uint32_t i = 0; i < self->slots; i++)
        row_reference(test->want + (size_t)i * test->weight_rows, test->type,
                      (const uint8_t *)test->source + self->ids[i] * matrix_size, test->weight_rows,
                      test->x + (size_t)(i / self->slots_per_row) * test->cols, test->cols);
    for_each_backend(experts_check, self);
    alloc_free(test->got);
    alloc_free(test->want);
    alloc_free(test->x);
    alloc_free(test->source);
}

/* spread: how many of the matrices are chosen at all. */
static void experts_try_types(struct rng *rng, uint32_t rows, uint32_t slots_per_row,
                              uint32_t matrices, uint32_t spread, enum content content)
{
    for (uint32_t i = 0; i < TEST_TYPE_COUNT; i++) {
        const enum tensor_type type = test_types[i];
        struct experts_case test = {.matmul = {.type = type, .content = content},
                                    .matrices = matrices,
                                    .slots = rows * slots_per_row,
                                    .slots_per_row = slots_per_row};
        test.matmul.weight_rows = rng_range(rng, 1, 40);
        test.matmul.cols = quant_is_quantized(type) ? quant_block_cols(type) * rng_range(rng, 1, 3)
                                                    : rng_range(rng, 1, 200);
        test.ids = test_memory(test.slots * sizeof *test.ids);
        for (uint32_t s = 0; s < test.slots; s++)
            test.ids[s] = rng_range(rng, 0, spread - 1);
        experts_try(rng, &test);
        alloc_free(test.ids);
    }
}

/* Goal: whatever slots choose, each gets its own product: one row, many, every slot the same
 * expert, more experts than slots, a row that chooses an expert twice. */
Test(experts, equal_the_reference)
{
    struct rng rng = rng_make("experts");
    experts_try_types(&rng, 1, 1, 1, 1, CONTENT_PLAIN);
    experts_try_types(&rng, 1, 8, 64, 64, CONTENT_PLAIN);
    experts_try_types(&rng, 5, 2, 8, 8, CONTENT_PLAIN);
    experts_try_types(&rng, 30, 1, 4, 3, CONTENT_PLAIN);
    experts_try_types(&rng, 21, 4, 6, 1, CONTENT_PLAIN);
    experts_try_types(&rng, 60, 2, 3, 3, CONTENT_PLAIN);
    for (int content = 0; content < CONTENT_COUNT; content++)
        experts_try_types(&rng, rng_range(&rng, 1, 9), 2, 4, 4, (enum content)content);
}

/* ---- embed ---- */

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
