/* How fast the matrix products and attention of each CPU backend are on this machine, beside the
 * plain speed of reading memory, which bounds a decode.
 *
 *   bench_kernels [--json] [--threads N] [--backend NAME] [--seconds S]
 *
 * Each line is the best of several runs: other programs on the machine can only slow one down.
 * A digest of every result goes with it, so that a fast wrong kernel is seen. */
#include "common/base/alloc.h"
#include "common/base/args.h"
#include "common/base/clock.h"
#include "common/crypto/digest.h"
#include "kernels/backend.h"
#include "kernels/det.h"
#include "kernels/quant.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct options {
    int json;
    uint32_t threads;
    const char *backend; /* NULL: all */
    float seconds;       /* for each line */
};

struct shape {
    const char *name;
    enum tensor_type type;
    uint32_t rows; /* token rows */
    uint32_t weight_rows;
    uint32_t cols;
};

/* Of a model with 1.1 billion weights, dim 2048 and ffn 5632. Decode shapes are larger than caches
 * usually are, as a whole model is. */
static const struct shape shapes[] = {
    {"prefill q8_0 up", TENSOR_Q8_0, 128, 5632, 2048},
    {"prefill q8_0 down", TENSOR_Q8_0, 128, 2048, 5632},
    {"prefill f16 up", TENSOR_F16, 128, 5632, 2048},
    {"prefill f32 up", TENSOR_F32, 128, 5632, 2048},
    {"batch 8 q8_0 up", TENSOR_Q8_0, 8, 5632, 2048},
    {"decode q8_0 output", TENSOR_Q8_0, 1, 131072, 2048},
    {"decode q8_0 down", TENSOR_Q8_0, 1, 49152, 5632},
    {"decode f16 output", TENSOR_F16, 1, 65536, 2048},
    {"decode f32 output", TENSOR_F32, 1, 32768, 2048},
};
#define SHAPE_COUNT (sizeof shapes / sizeof *shapes)

#define RUNS_MIN 3u

static void die(void)
{
    fprintf(stderr, "bench_kernels: %s\n", odsi_err_text());
    exit(1);
}

static void *memory_of(size_t size)
{
    void *memory = NULL;
    if (alloc_aligned(&memory, size, 1) != ODSI_OK)
        die();
    return memory;
}

static uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static float random_float(uint64_t *state)
{
    return (float)(int32_t)(random_next(state) >> 40) / 8388608.0f - 1.0f;
}

static void matrix_fill(uint8_t *matrix, enum tensor_type type, size_t count)
{
    uint64_t state = 0x9e3779b97f4a7c15u;
    if (type == TENSOR_F32) {
        for (size_t i = 0; i < count; i++)
            ((float *)(void *)matrix)[i] = random_float(&state);
    } else if (type == TENSOR_F16) {
        for (size_t i = 0; i < count; i++)
            ((uint16_t *)(void *)matrix)[i] = det_f16_from_f32(random_float(&state));
    } else {
        for (size_t b = 0; b < count / OPS_BLOCK; b++) {
            const uint16_t scale = det_f16_from_f32(0.01f);
            uint8_t *block = matrix + b * 34;
            memcpy(block, &scale, sizeof scale);
            for (uint32_t i = 0; i < OPS_BLOCK; i += 8) {
                const uint64_t bytes = random_next(&state);
                memcpy(block + 2 + i, &bytes, sizeof bytes);
            }
        }
    }
}

static void line_print(const struct options *options, const char *backend, const char *name,
                       double gmac_s, double gb_s, const char *digest)
{
    if (options->json)
        printf("{\"backend\":\"%s\",\"name\":\"%s\",\"threads\":%u,\"gmac_per_s\":%.2f,"
               "\"gb_per_s\":%.2f,\"digest\":\"%.16s\"}\n",
               backend, name, options->threads, gmac_s, gb_s, digest);
    else
        printf("%-8s %-22s %9.2f GMAC/s %8.2f GB/s  %.16s\n", backend, name, gmac_s, gb_s, digest);
    fflush(stdout);
}

#define STREAMS 4u

/* Reads size bytes as fast as plain loads go, from four places at a time as the kernels do; the sum
 * keeps the compiler from leaving the loads out. */
static uint64_t memory_read(const uint64_t *memory, size_t size)
{
    const size_t stream = size / sizeof *memory / STREAMS;
    uint64_t sum[STREAMS][8] = {{0}};
    for (size_t i = 0; i + 8 <= stream; i += 8)
        for (uint32_t s = 0; s < STREAMS; s++)
            for (uint32_t k = 0; k < 8; k++)
                sum[s][k] += memory[s * stream + i + k];
    uint64_t total = 0;
    for (uint32_t s = 0; s < STREAMS; s++)
        for (uint32_t k = 0; k < 8; k++)
            total += sum[s][k];
    return total;
}

static void bench_memory(const struct options *options)
{
    const size_t size = (size_t)256 << 20;
    uint64_t *memory = memory_of(size);
    memset(memory, 1, size);
    uint64_t best_us = UINT64_MAX;
    uint64_t sum = 0;
    for (uint32_t run = 0; run < 8; run++) {
        const uint64_t start_us = clock_monotonic_us();
        sum += memory_read(memory, size);
        const uint64_t took_us = clock_monotonic_us() - start_us;
        best_us = took_us < best_us ? took_us : best_us;
    }
    char text[DIGEST_HEX_SIZE];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)sum);
    line_print(options, "memory", "read, 1 thread", 0.0, (double)size / (double)best_us / 1e3,
               text);
    alloc_free(memory);
}

static void digest_text(char out[DIGEST_HEX_SIZE], const void *data, size_t size)
{
    struct digest digest;
    digest_of(&digest, data, size);
    digest_to_hex(out, &digest);
}

static void bench_shape(const struct options *options, struct backend *backend,
                        const struct shape *shape)
{
    const size_t weight_size = shape->weight_rows * quant_row_size(shape->type, shape->cols);
    const size_t out_count = (size_t)shape->rows * shape->weight_rows;
    uint8_t *source = memory_of(weight_size);
    float *x = memory_of((size_t)shape->rows * shape->cols * sizeof *x);
    float *out = memory_of(out_count * sizeof *out);
    struct weight *weight = NULL;
    uint64_t state = 88172645463325252u;
    matrix_fill(source, shape->type, (size_t)shape->weight_rows * shape->cols);
    for (size_t i = 0; i < (size_t)shape->rows * shape->cols; i++)
        x[i] = random_float(&state);
    if (backend->ops->weight_open(backend, &weight, shape->type, shape->weight_rows, shape->cols,
                                  1) != ODSI_OK ||
        backend->ops->weight_fill(backend, weight, 0, source, shape->weight_rows) != ODSI_OK)
        die();
    alloc_free(source);

    const uint64_t end_us = clock_monotonic_us() + (uint64_t)((double)options->seconds * 1e6);
    uint64_t best_us = UINT64_MAX;
    for (uint32_t run = 0; run < RUNS_MIN || clock_monotonic_us() < end_us; run++) {
        const uint64_t start_us = clock_monotonic_us();
        if (backend->ops->matmul(backend, out, weight, x, shape->rows) != ODSI_OK)
            die();
        const uint64_t took_us = clock_monotonic_us() - start_us;
        best_us = took_us < best_us ? took_us : best_us;
    }
    char text[DIGEST_HEX_SIZE];
    digest_text(text, out, out_count * sizeof *out);
    const double macs = (double)out_count * shape->cols;
    line_print(options, backend->ops->name, shape->name, macs / (double)best_us / 1e3,
               (double)weight_size / (double)best_us / 1e3, text);
    backend->ops->weight_free(backend, weight);
    alloc_free(out);
    alloc_free(x);
}

#define ATTENTION_POSITIONS 2048u
#define ATTENTION_HEADS     32u
#define ATTENTION_KV_HEADS  4u
#define ATTENTION_HEAD_DIM  64u
#define ATTENTION_ROWS_MAX  128u

/* The last `rows` positions of a session of ATTENTION_POSITIONS. Counts both products. */
static void bench_attention(const struct options *options, struct backend *backend,
                            const char *name, uint32_t rows)
{
    struct kv_pool pool = {.page_count = ATTENTION_POSITIONS / KV_PAGE_TOKENS,
                           .layers = 1,
                           .kv_heads = ATTENTION_KV_HEADS,
                           .head_dim = ATTENTION_HEAD_DIM};
    uint32_t table[ATTENTION_POSITIONS / KV_PAGE_TOKENS];
    uint32_t position[ATTENTION_ROWS_MAX];
    const uint32_t *tables[ATTENTION_ROWS_MAX];
    const size_t kv_count =
        (size_t)ATTENTION_POSITIONS * 2 * ATTENTION_KV_HEADS * ATTENTION_HEAD_DIM;
    const size_t count = (size_t)rows * ATTENTION_HEADS * ATTENTION_HEAD_DIM;
    pool.pages_dev = memory_of(kv_count * sizeof *pool.pages_dev);
    float *q = memory_of(count * sizeof *q);
    float *out = memory_of(count * sizeof *out);
    uint64_t state = 88172645463325252u;
    matrix_fill((uint8_t *)pool.pages_dev, TENSOR_F16, kv_count);
    for (size_t i = 0; i < count; i++)
        q[i] = random_float(&state);
    for (uint32_t i = 0; i < pool.page_count; i++)
        table[i] = pool.page_count - 1 - i;
    for (uint32_t r = 0; r < rows; r++) {
        position[r] = ATTENTION_POSITIONS - rows + r;
        tables[r] = table;
    }
    const struct op_batch batch = {.rows = rows, .position = position, .page_table = tables};
    const struct attention_params params = {.heads = ATTENTION_HEADS, .scale = 0.125f};
    const uint64_t end_us = clock_monotonic_us() + (uint64_t)((double)options->seconds * 1e6);
    uint64_t best_us = UINT64_MAX;
    for (uint32_t run = 0; run < RUNS_MIN || clock_monotonic_us() < end_us; run++) {
        const uint64_t start_us = clock_monotonic_us();
        if (backend->ops->attention(backend, out, q, &pool, 0, &batch, &params) != ODSI_OK)
            die();
        const uint64_t took_us = clock_monotonic_us() - start_us;
        best_us = took_us < best_us ? took_us : best_us;
    }
    char text[DIGEST_HEX_SIZE];
    digest_text(text, out, count * sizeof *out);
    line_print(options, backend->ops->name, name,
               2.0 * (double)count * ATTENTION_POSITIONS / (double)best_us / 1e3,
               (double)kv_count * sizeof *pool.pages_dev / (double)best_us / 1e3, text);
    alloc_free(out);
    alloc_free(q);
    alloc_free(pool.pages_dev);
}

static void bench_backend(const struct options *options, const char *name)
{
    const struct backend_config config = {.name = name, .thread_count = options->threads};
    struct backend *backend = NULL;
    if (backend_open(&backend, &config) != ODSI_OK)
        die();
    for (size_t i = 0; i < SHAPE_COUNT; i++)
        bench_shape(options, backend, &shapes[i]);
    bench_attention(options, backend, "attention decode 2048", 1);
    bench_attention(options, backend, "attention prefill 2048", ATTENTION_ROWS_MAX);
    backend_close(&backend);
}

int main(int argc, char **argv)
{
    struct options options = {.threads = 1, .seconds = 0.5f};
    const struct args_option table[] = {
        {"json", 0, ARGS_FLAG, &options.json, NULL, "one JSON object for each line"},
        {"threads", 't', ARGS_U32, &options.threads, "N", "compute threads (default 1)"},
        {"backend", 'b', ARGS_TEXT, &options.backend, "NAME", "only this one (default: all)"},
        {"seconds", 's', ARGS_F32, &options.seconds, "S", "time for each line (default 0.5)"},
        {NULL, 0, ARGS_FLAG, NULL, NULL, NULL}};
    const struct args_program program = {.name = "bench_kernels",
                                         .summary = "Measures the matrix products and attention.",
                                         .usage = "[options]",
                                         .options = table};
    struct args *args = NULL;
    int rest = 0;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    if (outcome == ARGS_RUN) {
        bench_memory(&options);
        for (const char *const *name = backend_names(); *name; name++)
            if (!options.backend || strcmp(options.backend, *name) == 0)
                bench_backend(&options, *name);
    }
    args_close(&args);
    return outcome == ARGS_EXIT_USAGE ? 2 : 0;
}
