/* How an attention call is cut into pieces for the threads of a CPU backend. Pure. */
#ifndef ODSI_KERNELS_CPU_CPU_ATTENTION_H
#define ODSI_KERNELS_CPU_CPU_ATTENTION_H
#include "kernels/cpu/cpu_loops.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

/* Rows of one session that one thread takes together, to read its keys and values once. */
struct cpu_attention_part {
    uint32_t row_first;
    uint32_t row_count;
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
    uint32_t vectors_max;    /* rows * heads of the largest piece */
    uint32_t position_count; /* the furthest that a row looks */
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
#endif
