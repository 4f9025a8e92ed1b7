/* The inner loops of a CPU backend, one table per instruction set. Each entry does a piece of an op
 * (one row, a range of weight rows, some heads) in the calling thread; cpu_backend.c cuts ops into
 * such pieces. A table is filled with the scalar loops first and then overwritten upward by each
 * instruction set that the backend may use.
 *
 * Pure functions of their arguments; any thread. Shapes were checked by the caller. */
#ifndef ODSI_KERNELS_CPU_CPU_LOOPS_H
#define ODSI_KERNELS_CPU_CPU_LOOPS_H
#include "kernels/cpu/cpu_weight.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

/* Legend: T token rows, C columns of x (= weight cols), B = C / 32 blocks, R weight rows. */

/* Activations quantized as op matmul says, for weights of one type. Block b of row t is number n:
 * b * stride + t when weights are interleaved (group_rows > 1), so that a product finds all rows of
 * a block together; otherwise t * B + b. */
struct cpu_quants {
    int8_t *q;     /* [n][32] */
    float *scales; /* [n]: d */
    int32_t
        *offsets;  /* [b][group of columns][stride]: -bias * sum of its q, types without minimum */
    float *totals; /* [b][group of columns][stride]: (float)(sum of its q) * d, others; the one of
                         offsets and totals that the type has no use for is NULL */
    uint32_t stride; /* rows that there is room for; above T when T is odd */
    int32_t bias;
    uint32_t groups; /* of columns in a block */
};

struct cpu_matmul {
    float *out;                  /* [T or more][R] */
    const uint32_t *out_rows;    /* [T]: which row of out each row is for; NULL: the same */
    const struct weight *weight; /* [R][C] */
    const float *x;              /* [T][C]; float types */
    struct cpu_quants quants;    /* quantized types: x quantized */
    uint32_t rows;               /* T */
};

/* Weight groups group_first .. group_end - 1. panel: memory for this thread alone, of
 * cpu_matmul_panel_size bytes, aligned to a cache line. */
typedef void cpu_matmul_loop(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                             void *panel);

/* Enough for every instruction set. */
size_t cpu_matmul_panel_size(const struct weight *weight, uint32_t rows);

static inline size_t cpu_matmul_out_row(const struct cpu_matmul *job, uint32_t row)
{
    return job->out_rows ? job->out_rows[row] : row;
}

/* Some heads of one kv head, for rows of one session in ascending position. The tiles are all that
 * some row looks at. */
struct cpu_attention {
    float *out;     /* [rows][heads][head_dim], the first row */
    const float *q; /* as out */
    const struct kv_pool *pool;
    const uint32_t *page_table;
    const uint32_t *position; /* [rows] */
    uint32_t rows;
    const struct attention_params *params;
    uint32_t layer;
    uint32_t kv_head;
    uint32_t head_first;
    uint32_t head_count;
    uint32_t tile_first;
    uint32_t tile_count;
    float *scratch; /* cpu_attention_scratch floats, aligned to a cache line */
};

struct cpu_loops {
    uint32_t group_rows; /* how weights are packed, see cpu_weight.h */
    uint8_t quant_flip;  /* what is xor-ed to the bytes of 8-bit types */

    void (*rmsnorm)(float *out, const float *x, const float *weight, uint32_t cols, float eps);
    void (*quantize)(const struct cpu_quants *to, uint32_t row, const float *x, uint32_t cols);
    cpu_matmul_loop *matmul_f32;
    cpu_matmul_loop *matmul_f16;
    cpu_matmul_loop *matmul_bf16;
    cpu_matmul_loop *matmul_quant;
    void (*add_bias)(float *x, const float *bias, uint32_t cols);
    void (*rope)(float *x, const float *cos, const float *sin, uint32_t half_dim,
                 enum rope_style style, uint32_t heads, uint32_t head_dim);
    void (*kv_round)(uint16_t *to, const float *from, size_t count);
    void (*attention)(const struct cpu_attention *job);
    void (*act_mul)(float *out, const float *gate, const float *up, size_t count,
                    enum act_kind kind);
    void (*scale)(float *x, size_t count, float factor);
    void (*softcap)(float *x, size_t count, float cap);
    void (*route)(uint32_t *ids, float *weights, const float *logits, uint32_t experts,
                  uint32_t used);
    void (*combine)(float *out, const float *y, const float *weights, uint32_t used, uint32_t cols);
    void (*add)(float *out, const float *a, const float *b, size_t count);
    int (*all_finite)(const float *x, size_t count);
};

/* Each fills or overwrites the entries it has. fma_loops_fill is the scalar code compiled for
 * processors with a fused multiply-add instruction: the same bits, many times faster. */
void scalar_loops_fill(struct cpu_loops *loops);
void fma_loops_fill(struct cpu_loops *loops);
void avx2_loops_fill(struct cpu_loops *loops);
void avx512_loops_fill(struct cpu_loops *loops);
#endif
