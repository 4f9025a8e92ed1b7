/* The inside of the CPU backends, shared by cpu_backend.c and cpu_matmul.c. */
#ifndef ODSI_KERNELS_CPU_CPU_PARTS_H
#define ODSI_KERNELS_CPU_CPU_PARTS_H
#include "common/base/alloc.h"
#include "kernels/backend.h"
#include "kernels/cpu/cpu_loops.h"
#include "kernels/cpu/cpu_memory.h"
#include "kernels/cpu/pool.h"

#include <stddef.h>
#include <stdint.h>

/* Memory that grows to the largest call so far and is then reused. */
struct cpu_scratch {
    void *memory;
    size_t size;
};

struct cpu_backend {
    struct backend base; /* first */
    struct cpu_loops loops;
    struct pool *pool;
    struct cpu_memory memory;
    struct cpu_scratch quants;    /* activations of a quantized matmul: q, scales, offsets */
    struct cpu_scratch experts;   /* which slots each expert has, and their rows side by side */
    struct cpu_scratch attention; /* one part for each thread */
    struct cpu_scratch parts;
};

static inline struct cpu_backend *cpu_of(struct backend *base)
{
    return (struct cpu_backend *)(void *)base;
}

static inline size_t cpu_line_round(size_t size)
{
    return (size + ALLOC_ALIGNMENT - 1) / ALLOC_ALIGNMENT * ALLOC_ALIGNMENT;
}

/* Errors: ODSI_ERR_NO_MEMORY; what was in it is gone either way when it had to grow. */
ODSI_MUST_USE enum odsi_err cpu_scratch_need(struct cpu_scratch *self, size_t size);

/* Runs the tasks on the pool, or here when they are small. work counts multiply-adds of a matmul;
 * other ops weigh their elements as so many of those. */
void cpu_share(struct cpu_backend *self, pool_task *task, void *context, uint64_t count,
               uint64_t work);
#define CPU_WORK_PER_EXP     64u
#define CPU_WORK_PER_ELEMENT 16u

/* The ops of cpu_matmul.c. */
enum odsi_err cpu_matmul_weight_open(struct backend *base, struct weight **out,
                                     enum tensor_type type, uint32_t rows, uint32_t cols,
                                     uint32_t matrix_count);
enum odsi_err cpu_matmul_weight_fill(struct backend *base, struct weight *weight,
                                     uint32_t row_first, const void *data, uint32_t rows);
void cpu_matmul_weight_free(struct backend *base, struct weight *weight);
enum odsi_err cpu_matmul_embed(struct backend *base, float *out_dev, const struct weight *table,
                               const uint32_t *tokens, uint32_t rows);
enum odsi_err cpu_matmul_run(struct backend *base, float *out_dev, const struct weight *weight,
                             const float *x_dev, uint32_t rows);
enum odsi_err cpu_matmul_experts(struct backend *base, float *out_dev, const struct weight *weight,
                                 const float *x_dev, const uint32_t *ids_dev, uint32_t slots,
                                 uint32_t slots_per_row);
#endif
