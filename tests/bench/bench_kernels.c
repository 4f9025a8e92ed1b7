/* How fast the matrix products and attention of each CPU backend are on this machine, beside the
 * plain speed of reading memory, which bounds a decode.
 *
 *   bench_kernels [--json] [--threads N] [--backend NAME] [--only TEXT] [--seconds S]
 *
 * Each line is the best of several runs: other programs on the machine can only slow one down.
 * A digest of every result goes with it, so that a fast wrong kernel is seen. */
#include "common/base/alloc.h"
#include "common/base/args.h"
#include "common/base/clock.h"
#include "common/crypto/digest.h"
#include "kernels/backend.h"
#include "kernels/cpu/pool.h"
#include "kernels/det.h"
#include "kernels/quant.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct options {
    int json;
    uint32_t threads;
    const char *backend; /* NULL: all */
    const char *only;    /* NULL: all lines */
    float seconds;       /* for each line */
};

static const enum tensor_type types[] = {
    TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q8_0, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0,
    TENSOR_Q5_1, TENSOR_Q2_K, TENSOR_Q3_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K};
#define TYPE_COUNT (sizeof types / sizeof *types)

/* Of a model with 1.1 billion weights, dim 2048 and ffn 5632, for every type. A prefill has some of
 * the weight rows only, as a run of a millisecond is seldom put aside for another program. The
 * matrix of a decode is larger than caches usually are, as a whole model is. */
static const struct shape {
    const char *name;
    uint32_t rows; /* token rows */
    uint32_t weight_rows;
    uint32_t cols;
} shapes[] = {
    {"prefill up", 128, 5632, 2048}, {"prefill down", 128, 2048, 5632},
    {"decode 1", 1, 131072, 2048},   {"decode 2", 2, 65536, 2048},
    {"decode 4", 4, 65536, 2048},    {"decode 8", 8, 65536, 2048},
    {"decode 16", 16, 65536, 2048},
};
#define SHAPE_COUNT (sizeof shapes / sizeof *shapes)

/* Of a layer of experts: 8 of 64 for each token row. */
#define EXPERTS       64u
#define EXPERTS_USED  8u
#define EXPERT_ROWS   1024u
#define EXPERT_COLS   2048u
#define EXPERT_TOKENS 128u

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

/* Where the f16 numbers of a block are, the same one twice if there is but one. */
static void block_heads(uint32_t offsets[2], enum tensor_type type)
{
    const int has_min = type == TENSOR_Q4_1 || type == TENSOR_Q5_1 || type == TENSOR_Q2_K ||
                        type == TENSOR_Q4_K || type == TENSOR_Q5_K;
    offsets[0] = type == TENSOR_Q2_K ? 80 : type == TENSOR_Q3_K ? 108 : 0;
    if (type == TENSOR_Q6_K)
        offsets[0] = 208;
    offsets[1] = offsets[0] + (has_min ? 2 : 0);
}

static void block_fill(uint8_t *block, enum tensor_type type, uint64_t *state)
{
    const uint16_t scale = det_f16_from_f32(0.01f);
    uint32_t offsets[2];
    if (type == TENSOR_F32) {
        const float value = random_float(state);
        memcpy(block, &value, sizeof value);
        return;
    }
    if (!quant_is_quantized(type)) {
        const uint16_t half = type == TENSOR_F16 ? det_f16_from_f32(random_float(state))
                                                 : (uint16_t)(det_bits(random_float(state)) >> 16);
        memcpy(block, &half, sizeof half);
        return;
    }
    for (uint32_t i = 0; i < quant_block_size(type); i++)
        block[i] = (uint8_t)(random_next(state) >> 32);
    block_heads(offsets, type);
    memcpy(block + offsets[0], &scale, sizeof scale);
    memcpy(block + offsets[1], &scale, sizeof scale);
}

#define BLOCKS_RANDOM 65521u /* a prime: then they repeat, at another column of every row */

static void matrix_fill(uint8_t *matrix, enum tensor_type type, size_t count)
{
    uint64_t state = 0x9e3779b97f4a7c15u;
    const size_t blocks = count / quant_block_cols(type);
    const size_t size = quant_block_size(type);
    for (size_t b = 0; b < blocks; b++)
        if (b < BLOCKS_RANDOM)
            block_fill(matrix + b * size, type, &state);
        else
            memcpy(matrix + b * size, matrix + (b - BLOCKS_RANDOM) * size, size);
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

struct memory_job {
    const uint64_t *memory;
    size_t size; /* of one thread's part */
    atomic_uint_fast64_t sum;
};

static void memory_task(void *context, uint32_t index, uint32_t thread)
{
    struct memory_job *job = context;
    (void)thread;
    atomic_fetch_add(&job->sum, memory_read(job->memory + index * (job->size / 8), job->size));
}

static void bench_memory(const struct options *options)
{
    const size_t size = (size_t)256 << 20;
    struct pool *pool = NULL;
    uint64_t *memory = memory_of(size);
    memset(memory, 1, size);
    uint64_t best_us = UINT64_MAX;
    struct memory_job job = {.memory = memory};
    job.size = size / options->threads / 64 * 64;
    if (pool_open(&pool, options->threads) != ODSI_OK)
        die();
    for (uint32_t run = 0; run < 16; run++) {
        const uint64_t start_us = clock_monotonic_us();
        pool_run(pool, memory_task, &job, options->threads);
        const uint64_t took_us = clock_monotonic_us() - start_us;
        best_us = took_us < best_us ? took_us : best_us;
    }
    char text[DIGEST_HEX_SIZE];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)atomic_load(&job.sum));
    line_print(options, "memory", "read", 0.0, (double)size / (double)best_us / 1e3, text);
    pool_close(&pool);
    alloc_free(memory);
}

static void digest_text(char out[DIGEST_HEX_SIZE], const void *data, size_t size)
{
    struct digest digest;
    digest_of(&digest, data, size);
    digest_to_hex(out, &digest);
}

/* One product, ready to run. experts: the matrices of it, else 0. */
struct product {
    struct weight *weight;
    float *x;
    float *out;
    uint32_t *ids;
    uint32_t rows;
    uint32_t experts;
};

static void product_run(struct backend *backend, const struct product *self)
{
    const enum odsi_err err =
        self->experts
            ? backend->ops->matmul_experts(backend, self->out, self->weight, self->x, self->ids,
                                           self->rows * EXPERTS_USED, EXPERTS_USED)
            : backend->ops->matmul(backend, self->out, self->weight, self->x, self->rows);
    if (err != ODSI_OK)
        die();
}

static uint64_t product_best_us(const struct options *options, struct backend *backend,
                                const struct product *self)
{
    const uint64_t end_us = clock_monotonic_us() + (uint64_t)((double)options->seconds * 1e6);
    uint64_t best_us = UINT64_MAX;
    for (uint32_t run = 0; run < RUNS_MIN || clock_monotonic_us() < end_us; run++) {
        const uint64_t start_us = clock_monotonic_us();
        product_run(backend, self);
        const uint64_t took_us = clock_monotonic_us() - start_us;
        best_us = took_us < best_us ? took_us : best_us;
    }
    return best_us;
}

/* The packed weight, and how long packing it took in one thread. */
static uint64_t weight_make(struct backend *backend, struct weight **out, enum tensor_type type,
                            uint32_t rows, uint32_t cols, uint32_t matrices)
{
    uint8_t *source = memory_of(matrices * rows * quant_row_size(type, cols));
    matrix_fill(source, type, (size_t)matrices * rows * cols);
    const uint64_t start_us = clock_monotonic_us();
    if (backend->ops->weight_open(backend, out, type, rows, cols, matrices) != ODSI_OK ||
        backend->ops->weight_fill(backend, *out, 0, source, matrices * rows) != ODSI_OK)
        die();
    const uint64_t took_us = clock_monotonic_us() - start_us;
    alloc_free(source);
    return took_us;
}

static int line_wanted(const struct options *options, char *name, size_t size, const char *what,
                       enum tensor_type type)
{
    snprintf(name, size, "%s %s", quant_name(type), what);
    return !options->only || strstr(name, options->only);
}

static void bench_product(const struct options *options, struct backend *backend,
                          const struct shape *shape, enum tensor_type type, uint32_t experts)
{
    const uint32_t used = experts ? EXPERTS_USED : 1;
    const size_t out_count = (size_t)shape->rows * used * shape->weight_rows;
    struct product product = {.rows = shape->rows, .experts = experts};
    uint64_t state = 88172645463325252u;
    char name[64];
    if (!line_wanted(options, name, sizeof name, shape->name, type))
        return;
    weight_make(backend, &product.weight, type, shape->weight_rows, shape->cols,
                experts ? experts : 1);
    product.x = memory_of((size_t)shape->rows * shape->cols * sizeof *product.x);
    product.out = memory_of(out_count * sizeof *product.out);
    product.ids = memory_of((size_t)shape->rows * used * sizeof *product.ids);
    for (size_t i = 0; i < (size_t)shape->rows * shape->cols; i++)
        product.x[i] = random_float(&state);
    for (uint32_t r = 0; r < shape->rows; r++) { /* different ones for each row */
        const uint32_t first = (uint32_t)(random_next(&state) >> 32);
        for (uint32_t j = 0; j < used && experts; j++)
            product.ids[r * used + j] = (first + j * 7) % experts;
    }
    const uint64_t best_us = product_best_us(options, backend, &product);
    char text[DIGEST_HEX_SIZE];
    digest_text(text, product.out, out_count * sizeof *product.out);
    const uint32_t read = !experts                       ? 1
                          : shape->rows * used < experts ? shape->rows * used
                                                         : experts;
    const double size =
        (double)quant_row_size(type, shape->cols) * (double)shape->weight_rows * (double)read;
    line_print(options, backend->ops->name, name,
               (double)out_count * shape->cols / (double)best_us / 1e3,
               size / (double)best_us / 1e3, text);
    backend->ops->weight_free(backend, product.weight);
    alloc_free(product.ids);
    alloc_free(product.out);
    alloc_free(product.x);
}

/* How fast a weight is packed, in bytes of its source. */
static void bench_pack(const struct options *options, struct backend *backend,
                       enum tensor_type type)
{
    const uint32_t rows = 16384;
    const uint32_t cols = 2048;
    uint64_t best_us = UINT64_MAX;
    char name[64];
    if (!line_wanted(options, name, sizeof name, "pack", type))
        return;
    for (uint32_t run = 0; run < RUNS_MIN; run++) {
        struct weight *weight = NULL;
        const uint64_t took_us = weight_make(backend, &weight, type, rows, cols, 1);
        backend->ops->weight_free(backend, weight);
        best_us = took_us < best_us ? took_us : best_us;
    }
    line_print(options, backend->ops->name, name, 0.0,
               (double)(rows * quant_row_size(type, cols)) / (double)best_us / 1e3, "");
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
    if (options->only && !strstr(name, options->only))
        return;
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
    const struct shape decode = {"experts decode", 1, EXPERT_ROWS, EXPERT_COLS};
    const struct shape prefill = {"experts prefill", EXPERT_TOKENS, EXPERT_ROWS, EXPERT_COLS};
    for (size_t t = 0; t < TYPE_COUNT; t++) {
        for (size_t i = 0; i < SHAPE_COUNT; i++)
            bench_product(options, backend, &shapes[i], types[t], 0);
        bench_product(options, backend, &decode, types[t], EXPERTS);
        bench_product(options, backend, &prefill, types[t], EXPERTS);
        bench_pack(options, backend, types[t]);
    }
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
        {"only", 'o', ARGS_TEXT, &options.only, "TEXT", "only lines with this in their name"},
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
