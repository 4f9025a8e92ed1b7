/* How an attention call is cut into pieces for the threads of a CPU backend, and the memory that a
 * piece works in. Pure. */
#ifndef ODSI_KERNELS_CPU_CPU_ATTENTION_H
#define ODSI_KERNELS_CPU_CPU_ATTENTION_H
#include "common/base/alloc.h"
#include "kernels/cpu/cpu_loops.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

/* Query vectors (rows * heads) of one piece: enough to make up for rearranging each tile of keys,
 * few enough for their scores to stay in the second-level cache. */
#define CPU_ATTENTION_VECTORS_MAX 48u

/* Rows of one session that one thread takes together, to read its keys and values once. */
struct cpu_attention_part {
    uint32_t row_first;
    uint32_t row_count;
    uint32_t tile_first; /* of those that the rows look at */
    uint32_t tile_count;
};

struct cpu_attention_plan {
    float *out;
    const float *q;
    const struct kv_pool *pool;
    const struct op_batch *batch;
    const struct attention_params *params;
    uint32_t layer;
    uint32_t head_split; /* heads of one kv head go to this many pieces */
    uint32_t part_count;
    uint64_t tile_rows;   /* rows * tiles of all parts: what the call costs */
    size_t scratch_count; /* floats that the largest piece works in */
    const struct cpu_attention_part *parts;
};

/* Fills plan from its first six members (parts has room for batch->rows), aiming at no fewer
 * pieces than there are threads. */
void cpu_attention_plan(struct cpu_attention_plan *plan, struct cpu_attention_part *parts,
                        uint32_t thread_count);

/* Number of pieces; each is independent of the others. */
uint64_t cpu_attention_piece_count(const struct cpu_attention_plan *plan);

/* Describes piece index, all but scratch. */
void cpu_attention_piece(struct cpu_attention *out, const struct cpu_attention_plan *plan,
                         uint64_t index);

/* count floats, rounded up to whole cache lines. */
static inline size_t cpu_attention_line_round(size_t count)
{
    const size_t line = ALLOC_ALIGNMENT / sizeof(float);
    return (count + line - 1) / line * line;
}
#endif
