/* What the kernel tests share: random inputs from a printed seed, backends to compare, and the
 * comparison itself. */
#ifndef ODSI_TESTS_KERNELS_KERNEL_FIXTURE_H
#define ODSI_TESTS_KERNELS_KERNEL_FIXTURE_H
#include "kernels/backend.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

struct rng {
    uint64_t state;
    uint64_t seed;
};

/* Seeded by ODSI_TEST_SEED when that is set, by the clock otherwise; prints the seed. */
struct rng rng_make(const char *test);
uint64_t rng_u64(struct rng *self);
/* In [first, last]. */
uint32_t rng_range(struct rng *self, uint32_t first, uint32_t last);

/* What a vector is made of. */
enum content {
    CONTENT_PLAIN,      /* -1 .. 1 */
    CONTENT_EXTREME,    /* any finite magnitude, subnormals, both zeros, some plain */
    CONTENT_CANCELLING, /* few values and their opposites: sums near zero */
    CONTENT_TINY,       /* runs of 32 of one tiny magnitude: where quantization gives up */
    CONTENT_NON_FINITE, /* plain, and here and there a NaN or infinity */
};
#define CONTENT_COUNT 5

void fill_f32(struct rng *rng, float *out, size_t count, enum content content);
void fill_f16(struct rng *rng, uint16_t *out, size_t count, enum content content);
/* Every type of a weight. */
#define TEST_TYPE_COUNT 13u
extern const enum tensor_type test_types[TEST_TYPE_COUNT];

/* Blocks of a quantized type in their source layout: any bits, but for the f16 numbers, which are
 * as content says. Some blocks are one byte all through, so that all quants are extreme at once. */
void fill_blocks(struct rng *rng, enum tensor_type type, uint8_t *out, size_t block_count,
                 enum content content);

/* size bytes, zeroed; ends the test when there is no memory. Ended with alloc_free. */
void *test_memory(size_t size);

/* A matrix in its source layout; ended with alloc_free. */
void *test_matrix(struct rng *rng, enum tensor_type type, uint32_t rows, uint32_t cols,
                  enum content content);

/* The matrix on the backend; ends the test when there is no memory. */
struct weight *test_weight(struct backend *backend, enum tensor_type type, const void *source,
                           uint32_t rows, uint32_t cols);

/* Calls check for every backend of this machine with 1, 2 and 3 threads. */
void for_each_backend(void (*check)(struct backend *backend, void *context), void *context);

/* Same bits everywhere, where any NaN is as good as another. Reports the first difference. */
int same_bits(const struct backend *backend, const char *what, const float *want, const float *got,
              size_t count, uint64_t seed);
#endif
