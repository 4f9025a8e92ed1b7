/* Weights of the CPU backends and the products with them. */
#include "common/base/assert.h"
#include "kernels/cpu/cpu_parts.h"
#include "kernels/cpu/cpu_weight.h"
#include "kernels/quant.h"

#include <string.h>

#define TASKS_PER_THREAD 4u /* of a matmul: a late thread costs a quarter of its share */

/* ---- weights ---- */

enum odsi_err cpu_matmul_weight_open(struct backend *base, struct weight **out,
                                     enum tensor_type type, uint32_t rows, uint32_t cols,
                                     uint32_t matrix_count)
{
    const struct cpu_backend *self = cpu_of(base);
    ODSI_ASSERT(quant_is_known(type));
    ODSI_ASSERT(rows > 0 && cols > 0 && matrix_count > 0);
    ODSI_ASSERT(cols % quant_block_cols(type) == 0);
    return cpu_weight_open(out, type, rows, cols, matrix_count, &self->loops);
}

enum odsi_err cpu_matmul_weight_fill(struct backend *base, struct weight *weight,
                                     uint32_t row_first, const void *data, uint32_t rows)
{
    (void)base;
    cpu_weight_pack(weight, row_first, data, rows);
    return ODSI_OK;
}

void cpu_matmul_weight_free(struct backend *base, struct weight *weight)
{
    (void)base;
    cpu_weight_close(&weight);
}

enum odsi_err cpu_matmul_embed(struct backend *base, float *out_dev, const struct weight *table,
                               const uint32_t *tokens, uint32_t rows)
{
    (void)base;
    for (uint32_t r = 0; r < rows; r++) {
        ODSI_ASSERT(tokens[r] < table->rows);
        cpu_weight_row(out_dev + (size_t)r * table->cols, table, tokens[r]);
    }
    return ODSI_OK;
}

/* ---- matmul ---- */

/* Ranges of weight groups. */
struct group_job {
    const struct cpu_loops *loops;
    const struct cpu_matmul *matmul;
    uint32_t group_count;
    uint32_t task_count;
};

static uint32_t group_bound(const struct group_job *job, uint32_t index)
{
    return (uint32_t)((uint64_t)job->group_count * index / job->task_count);
}

static void group_split(struct group_job *job, const struct cpu_backend *self, uint32_t group_count)
{
    const uint32_t threads = pool_thread_count(self->pool);
    const uint32_t wanted = threads > 1 ? threads * TASKS_PER_THREAD : 1;
    job->loops = &self->loops;
    job->group_count = group_count;
    job->task_count = wanted < group_count ? wanted : group_count;
}

struct quantize_job {
    const struct cpu_loops *loops;
    const float *x;
    uint32_t cols;
    int8_t *q;
    float *scales;
    int32_t *offsets;
};

static void quantize_task(void *context, uint32_t index, uint32_t thread)
{
    const struct quantize_job *job = context;
    const size_t at = (size_t)index * job->cols;
    const size_t block = (size_t)index * (job->cols / OPS_BLOCK);
    (void)thread;
    job->loops->quantize(job->q + at, job->scales + block, job->offsets + block, job->x + at,
                         job->cols);
}

static enum odsi_err quantize(struct cpu_backend *self, struct cpu_matmul *job)
{
    const size_t count = (size_t)job->rows * job->weight->cols;
    const size_t quants_size = cpu_line_round(count);
    const size_t scales_size = cpu_line_round(count / OPS_BLOCK * sizeof(float));
    enum odsi_err err = cpu_scratch_need(&self->quants, quants_size + 2 * scales_size);
    if (err != ODSI_OK)
        return err;
    uint8_t *memory = self->quants.memory;
    struct quantize_job rows = {.loops = &self->loops, .x = job->x, .cols = job->weight->cols};
    rows.q = (int8_t *)memory;
    rows.scales = (float *)(void *)(memory + quants_size);
    rows.offsets = (int32_t *)(void *)(memory + quants_size + scales_size);
    cpu_share(self, quantize_task, &rows, job->rows, (uint64_t)count * CPU_WORK_PER_ELEMENT);
    job->q = rows.q;
    job->scales = rows.scales;
    job->offsets = rows.offsets;
    return ODSI_OK;
}

static void matmul_task(void *context, uint32_t index, uint32_t thread)
{
    const struct group_job *job = context;
    const uint32_t first = group_bound(job, index);
    const uint32_t end = group_bound(job, index + 1);
    (void)thread;
    switch (job->matmul->weight->type) {
    case TENSOR_F32:
        job->loops->matmul_f32(job->matmul, first, end);
        return;
    case TENSOR_F16:
        job->loops->matmul_f16(job->matmul, first, end);
        return;
    case TENSOR_BF16:
        job->loops->matmul_bf16(job->matmul, first, end);
        return;
    case TENSOR_Q8_0:
        job->loops->matmul_q8(job->matmul, first, end);
        return;
    default:
        job->loops->matmul_quant(job->matmul, first, end);
        return;
    }
}

static enum odsi_err matmul(struct cpu_backend *self, float *out, const struct weight *weight,
                            const float *x, uint32_t rows)
{
    struct cpu_matmul matmul = {.out = out, .weight = weight, .x = x, .rows = rows};
    if (quant_is_quantized(weight->type)) {
        enum odsi_err err = quantize(self, &matmul);
        if (err != ODSI_OK)
            return err;
    }
    struct group_job job = {.matmul = &matmul};
    group_split(&job, self, weight->group_count);
    cpu_share(self, matmul_task, &job, job.task_count,
              (uint64_t)rows * weight->rows * weight->cols);
    return ODSI_OK;
}

enum odsi_err cpu_matmul_run(struct backend *base, float *out_dev, const struct weight *weight,
                             const float *x_dev, uint32_t rows)
{
    ODSI_ASSERT(weight->matrix_count == 1);
    return rows == 0 ? ODSI_OK : matmul(cpu_of(base), out_dev, weight, x_dev, rows);
}

/* ---- experts ---- */

/* The slots of one matrix: their rows of x are brought together, multiplied, and put back. */
static enum odsi_err expert_run(struct cpu_backend *self, float *out, const struct weight *weight,
                                const float *x, const uint32_t *slots, uint32_t count,
                                uint32_t slots_per_row, float *memory)
{
    float *rows = memory;
    float *results = memory + (size_t)count * weight->cols;
    for (uint32_t i = 0; i < count; i++)
        memcpy(rows + (size_t)i * weight->cols,
               x + (size_t)(slots[i] / slots_per_row) * weight->cols, weight->cols * sizeof *rows);
    const enum odsi_err err = matmul(self, results, weight, rows, count);
    for (uint32_t i = 0; i < count && err == ODSI_OK; i++)
        memcpy(out + (size_t)slots[i] * weight->rows, results + (size_t)i * weight->rows,
               weight->rows * sizeof *results);
    return err;
}

enum odsi_err cpu_matmul_experts(struct backend *base, float *out_dev, const struct weight *weight,
                                 const float *x_dev, const uint32_t *ids_dev, uint32_t slots,
                                 uint32_t slots_per_row)
{
    struct cpu_backend *self = cpu_of(base);
    const size_t list_size = cpu_line_round(slots * sizeof(uint32_t));
    const size_t rows_size = (size_t)slots * (weight->rows + weight->cols) * sizeof(float);
    ODSI_ASSERT(slots_per_row > 0);
    enum odsi_err err = cpu_scratch_need(&self->experts, list_size + rows_size);
    uint32_t *list = self->experts.memory;
    for (uint32_t m = 0; m < weight->matrix_count && err == ODSI_OK; m++) {
        struct weight matrix;
        uint32_t count = 0;
        for (uint32_t i = 0; i < slots; i++) {
            ODSI_ASSERT(ids_dev[i] < weight->matrix_count);
            if (ids_dev[i] == m)
                list[count++] = i;
        }
        if (count == 0)
            continue;
        cpu_weight_matrix(&matrix, weight, m);
        err = expert_run(self, out_dev, &matrix, x_dev, list, count, slots_per_row,
                         (float *)(void *)((uint8_t *)self->experts.memory + list_size));
    }
    return err;
}
