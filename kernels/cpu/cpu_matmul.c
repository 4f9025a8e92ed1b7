/* Weights of the CPU backends and the products with them. */
#include "common/base/assert.h"
#include "kernels/cpu/cpu_format.h"
#include "kernels/cpu/cpu_parts.h"
#include "kernels/cpu/cpu_weight.h"
#include "kernels/quant.h"

#include <string.h>

#define TASKS_PER_THREAD 4u /* of a matmul: a late thread costs a quarter of its share */
#define PANEL_GROUPS_MAX 2u /* weight groups that loops unpack at a time */
#define WEIGHT_ROWS      8u /* products that take as long as fetching the weight from memory */

/* ---- weights ---- */

enum odsi_err cpu_matmul_weight_open(struct backend *base, struct weight **out,
                                     enum tensor_type type, uint32_t rows, uint32_t cols,
                                     uint32_t matrix_count)
{
    struct cpu_backend *self = cpu_of(base);
    ODSI_ASSERT(quant_is_known(type));
    ODSI_ASSERT(rows > 0 && cols > 0 && matrix_count > 0);
    ODSI_ASSERT(cols % quant_block_cols(type) == 0);
    return cpu_weight_open(out, type, rows, cols, matrix_count, &self->loops, &self->memory);
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

/* ---- quantized activations ---- */

static size_t quants_count(const struct weight *weight, uint32_t stride)
{
    return (size_t)weight->cols / OPS_BLOCK * stride;
}

/* An odd number, so that the rows of different blocks do not all fall into the same few sets of a
 * cache. */
static uint32_t quants_stride(const struct weight *weight, uint32_t rows)
{
    return weight->group_rows > 1 ? rows | 1u : rows;
}

/* Bytes that quants_place needs, in whole cache lines. */
static size_t quants_size(const struct weight *weight, uint32_t rows)
{
    const size_t count = quants_count(weight, quants_stride(weight, rows));
    const size_t sums = count * cpu_format_of(weight->type).groups * sizeof(int32_t);
    return cpu_line_round(count * OPS_BLOCK) + cpu_line_round(count * sizeof(float)) +
           cpu_line_round(sums);
}

static void quants_place(struct cpu_quants *out, uint8_t *memory, const struct weight *weight,
                         uint32_t rows)
{
    const struct cpu_format format = cpu_format_of(weight->type);
    const uint32_t stride = quants_stride(weight, rows);
    const size_t count = quants_count(weight, stride);
    uint8_t *scales = memory + cpu_line_round(count * OPS_BLOCK);
    uint8_t *sums = scales + cpu_line_round(count * sizeof(float));
    *out = (struct cpu_quants){.stride = stride, .groups = format.groups};
    out->q = (int8_t *)memory;
    out->scales = (float *)(void *)scales;
    if (format.has_min)
        out->totals = (float *)(void *)sums;
    else
        out->offsets = (int32_t *)(void *)sums;
    /* signed bytes have no bias */
    out->bias = format.low_bits == 8 && weight->quant_flip == 0 ? 0 : (int32_t)format.bias;
}

/* Row `from_row` of one as row `to_row` of another, for interleaved weights of the same shape. */
static void quants_copy(const struct cpu_quants *to, uint32_t to_row, const struct cpu_quants *from,
                        uint32_t from_row, uint32_t blocks)
{
    for (uint32_t b = 0; b < blocks; b++) {
        const size_t t = (size_t)b * to->stride + to_row;
        const size_t f = (size_t)b * from->stride + from_row;
        memcpy(to->q + t * OPS_BLOCK, from->q + f * OPS_BLOCK, OPS_BLOCK);
        to->scales[t] = from->scales[f];
        for (uint32_t g = 0; g < to->groups; g++) {
            const size_t to_sum = ((size_t)b * to->groups + g) * to->stride + to_row;
            const size_t from_sum = ((size_t)b * to->groups + g) * from->stride + from_row;
            if (to->offsets)
                to->offsets[to_sum] = from->offsets[from_sum];
            if (to->totals)
                to->totals[to_sum] = from->totals[from_sum];
        }
    }
}

/* ---- matmul ---- */

/* Ranges of the weight groups of one matrix. */
struct group_job {
    const struct cpu_loops *loops;
    struct cpu_matmul matmul;
    uint8_t *panels; /* one for each thread */
    size_t panel_size;
    uint32_t task_count;
};

/* Even but for the last, as loops like to take two groups at a time. */
static uint32_t group_bound(const struct group_job *job, uint32_t index)
{
    const uint32_t count = job->matmul.weight->group_count;
    const uint32_t bound = (uint32_t)((uint64_t)count * index / job->task_count);
    return index == job->task_count || count < 2 * job->task_count ? bound : bound & ~1u;
}

static void group_run(const struct group_job *job, uint32_t index, uint32_t thread)
{
    const uint32_t first = group_bound(job, index);
    const uint32_t end = group_bound(job, index + 1);
    void *panel = job->panels + thread * job->panel_size;
    switch (job->matmul.weight->type) {
    case TENSOR_F32:
        job->loops->matmul_f32(&job->matmul, first, end, panel);
        return;
    case TENSOR_F16:
        job->loops->matmul_f16(&job->matmul, first, end, panel);
        return;
    case TENSOR_BF16:
        job->loops->matmul_bf16(&job->matmul, first, end, panel);
        return;
    default:
        job->loops->matmul_quant(&job->matmul, first, end, panel);
        return;
    }
}

static void group_task(void *context, uint32_t index, uint32_t thread)
{
    group_run(context, index, thread);
}

static void quantize_task(void *context, uint32_t index, uint32_t thread)
{
    const struct group_job *job = context;
    const uint32_t cols = job->matmul.weight->cols;
    (void)thread;
    job->loops->quantize(&job->matmul.quants, index, job->matmul.x + (size_t)index * cols, cols);
}

size_t cpu_matmul_panel_size(const struct weight *weight, uint32_t rows)
{
    const struct cpu_format format = cpu_format_of(weight->type);
    const uint32_t strand = (weight->cols / OPS_BLOCK + OPS_STRANDS - 1) / OPS_STRANDS;
    const size_t quads = format.low_bits < 8 ? OPS_BLOCK : 0;
    const size_t scales = format.groups * (1 + format.has_min) * sizeof(float);
    if (rows == 1 || weight->group_rows == 1 || format.low_bits == 0)
        return 0;
    const size_t lanes = PANEL_GROUPS_MAX * weight->group_rows;
    return cpu_line_round(lanes * (strand * (quads + scales) + rows * sizeof(float)));
}

static uint32_t tasks_wanted(const struct cpu_backend *self)
{
    const uint32_t threads = pool_thread_count(self->pool);
    return threads > 1 ? threads * TASKS_PER_THREAD : 1;
}

enum odsi_err cpu_matmul_run(struct backend *base, float *out_dev, const struct weight *weight,
                             const float *x_dev, uint32_t rows)
{
    struct cpu_backend *self = cpu_of(base);
    const uint32_t wanted = tasks_wanted(self);
    struct group_job job = {.loops = &self->loops};
    ODSI_ASSERT(weight->matrix_count == 1);
    if (rows == 0)
        return ODSI_OK;
    job.matmul = (struct cpu_matmul){.out = out_dev, .weight = weight, .x = x_dev, .rows = rows};
    job.task_count = wanted < weight->group_count ? wanted : weight->group_count;
    if (quant_is_quantized(weight->type)) {
        const size_t size = quants_size(weight, rows);
        job.panel_size = cpu_matmul_panel_size(weight, rows);
        const enum odsi_err err =
            cpu_scratch_need(&self->quants, size + job.panel_size * pool_thread_count(self->pool));
        if (err != ODSI_OK)
            return err;
        job.panels = (uint8_t *)self->quants.memory + size;
        quants_place(&job.matmul.quants, self->quants.memory, weight, rows);
        cpu_share(self, quantize_task, &job, rows,
                  (uint64_t)rows * weight->cols * CPU_WORK_PER_ELEMENT);
    }
    cpu_share(self, group_task, &job, job.task_count, (uint64_t)rows * weight->rows * weight->cols);
    return ODSI_OK;
}

/* ---- experts ---- */

/* One matrix that slots chose, and its part of the tasks. */
struct expert {
    struct weight weight;
    struct group_job job;
    uint32_t task_first;
    uint32_t slot_first; /* in expert_job.order */
};

/* Where the row of a slot is among those of its expert. */
struct expert_slot {
    uint32_t expert;
    uint32_t row;
};

struct expert_job {
    const struct cpu_loops *loops;
    const struct weight *weight;
    const float *x;
    float *rows; /* float types: those of x, expert by expert */
    uint32_t slots_per_row;
    uint32_t expert_count;
    struct expert *experts;    /* [expert_count] */
    struct expert_slot *slots; /* [slots] */
    uint32_t *order;           /* [slots]: slots, expert by expert */
    uint32_t *matrix_experts; /* [matrix_count]: how many slots chose it, then which expert it is */
};

static enum odsi_err experts_place(struct expert_job *job, struct cpu_backend *self, uint32_t slots)
{
    const struct weight *weight = job->weight;
    const uint32_t most = slots < weight->matrix_count ? slots : weight->matrix_count;
    const int quantized = quant_is_quantized(weight->type);
    const size_t experts_size = cpu_line_round(most * sizeof *job->experts);
    const size_t slots_size = cpu_line_round(slots * sizeof *job->slots);
    const size_t order_size = cpu_line_round(slots * sizeof *job->order);
    const size_t matrix_size = cpu_line_round(weight->matrix_count * sizeof *job->matrix_experts);
    const size_t rows_size = quantized ? 0 : (size_t)slots * weight->cols * sizeof *job->rows;
    const enum odsi_err err = cpu_scratch_need(
        &self->experts, experts_size + slots_size + order_size + matrix_size + rows_size);
    if (err != ODSI_OK)
        return err;
    uint8_t *memory = self->experts.memory;
    job->experts = (struct expert *)(void *)memory;
    job->slots = (struct expert_slot *)(void *)(memory += experts_size);
    job->order = (uint32_t *)(void *)(memory += slots_size);
    job->matrix_experts = (uint32_t *)(void *)(memory += order_size);
    job->rows = (float *)(void *)(memory + matrix_size);
    return ODSI_OK;
}

/* Sorts the slots by matrix. */
static void experts_sort(struct expert_job *job, float *out, const uint32_t *ids, uint32_t slots)
{
    uint32_t slot_first = 0;
    memset(job->matrix_experts, 0, job->weight->matrix_count * sizeof *job->matrix_experts);
    for (uint32_t i = 0; i < slots; i++) {
        ODSI_ASSERT(ids[i] < job->weight->matrix_count);
        job->matrix_experts[ids[i]]++;
    }
    for (uint32_t m = 0; m < job->weight->matrix_count; m++) {
        const uint32_t count = job->matrix_experts[m];
        if (count == 0)
            continue;
        struct expert *expert = &job->experts[job->expert_count];
        *expert = (struct expert){.slot_first = slot_first};
        cpu_weight_matrix(&expert->weight, job->weight, m);
        expert->job.loops = job->loops;
        expert->job.matmul = (struct cpu_matmul){
            .out = out, .out_rows = job->order + slot_first, .weight = &expert->weight, .rows = 0};
        job->matrix_experts[m] = job->expert_count++;
        slot_first += count;
    }
    for (uint32_t i = 0; i < slots; i++) {
        const uint32_t index = job->matrix_experts[ids[i]];
        struct expert *expert = &job->experts[index];
        job->slots[i] = (struct expert_slot){index, expert->job.matmul.rows++};
        job->order[expert->slot_first + job->slots[i].row] = i;
    }
}

/* Shares out about `wanted` tasks by work, where fetching a weight counts as WEIGHT_ROWS products
 * with it. Returns how many there are. */
static uint32_t experts_split(struct expert_job *job, uint32_t wanted, uint32_t slots)
{
    const uint64_t work = slots + (uint64_t)job->expert_count * WEIGHT_ROWS;
    uint32_t tasks = 0;
    for (uint32_t e = 0; e < job->expert_count; e++) {
        struct expert *expert = &job->experts[e];
        const uint64_t share = (uint64_t)wanted * (expert->job.matmul.rows + WEIGHT_ROWS) / work;
        expert->task_first = tasks;
        expert->job.task_count = share > 1 ? (uint32_t)share : 1;
        if (expert->job.task_count > expert->weight.group_count)
            expert->job.task_count = expert->weight.group_count;
        tasks += expert->job.task_count;
    }
    return tasks;
}

/* Memory for the quantized rows of all experts. */
static enum odsi_err experts_quants(struct expert_job *job, struct cpu_backend *self)
{
    size_t size = 0;
    size_t panel_size = 0;
    for (uint32_t e = 0; e < job->expert_count; e++) {
        const struct expert *expert = &job->experts[e];
        const size_t panel = cpu_matmul_panel_size(&expert->weight, expert->job.matmul.rows);
        size += quants_size(&expert->weight, expert->job.matmul.rows);
        panel_size = panel > panel_size ? panel : panel_size;
    }
    const enum odsi_err err =
        cpu_scratch_need(&self->quants, size + panel_size * pool_thread_count(self->pool));
    if (err != ODSI_OK)
        return err;
    uint8_t *memory = self->quants.memory;
    for (uint32_t e = 0; e < job->expert_count; e++) {
        struct expert *expert = &job->experts[e];
        quants_place(&expert->job.matmul.quants, memory, &expert->weight, expert->job.matmul.rows);
        memory += quants_size(&expert->weight, expert->job.matmul.rows);
        expert->job.panels = (uint8_t *)self->quants.memory + size;
        expert->job.panel_size = panel_size;
    }
    return ODSI_OK;
}

/* Row `index` of x goes to each expert that a slot of it chose; it is quantized once. */
static void experts_row_task(void *context, uint32_t index, uint32_t thread)
{
    const struct expert_job *job = context;
    const uint32_t cols = job->weight->cols;
    const float *x = job->x + (size_t)index * cols;
    const struct expert_slot *first = &job->slots[(size_t)index * job->slots_per_row];
    const struct cpu_quants *quants = &job->experts[first->expert].job.matmul.quants;
    const int by_block = job->weight->group_rows > 1;
    (void)thread;
    for (uint32_t i = 0; i < job->slots_per_row; i++) {
        const struct expert *expert = &job->experts[first[i].expert];
        if (!quant_is_quantized(job->weight->type))
            memcpy(job->rows + ((size_t)expert->slot_first + first[i].row) * cols, x,
                   cols * sizeof *x);
        else if (i == 0 || !by_block)
            job->loops->quantize(&expert->job.matmul.quants, first[i].row, x, cols);
        else
            quants_copy(&expert->job.matmul.quants, first[i].row, quants, first->row,
                        cols / OPS_BLOCK);
    }
}

static void experts_group_task(void *context, uint32_t index, uint32_t thread)
{
    const struct expert_job *job = context;
    uint32_t e = 0;
    while (e + 1 < job->expert_count && job->experts[e + 1].task_first <= index)
        e++;
    group_run(&job->experts[e].job, index - job->experts[e].task_first, thread);
}

enum odsi_err cpu_matmul_experts(struct backend *base, float *out_dev, const struct weight *weight,
                                 const float *x_dev, const uint32_t *ids_dev, uint32_t slots,
                                 uint32_t slots_per_row)
{
    struct cpu_backend *self = cpu_of(base);
    ODSI_ASSERT(slots_per_row > 0 && slots % slots_per_row == 0);
    if (slots == 0)
        return ODSI_OK;
    struct expert_job job = {
        .loops = &self->loops, .weight = weight, .x = x_dev, .slots_per_row = slots_per_row};
    enum odsi_err err = experts_place(&job, self, slots);
    if (err != ODSI_OK)
        return err;
    experts_sort(&job, out_dev, ids_dev, slots);
    const uint32_t tasks = experts_split(&job, tasks_wanted(self), slots);
    if (quant_is_quantized(weight->type))
        err = experts_quants(&job, self);
    if (err != ODSI_OK)
        return err;
    for (uint32_t e = 0; e < job.expert_count; e++)
        job.experts[e].job.matmul.x = job.rows + (size_t)job.experts[e].slot_first * weight->cols;
    cpu_share(self, experts_row_task, &job, slots / slots_per_row,
              (uint64_t)slots * weight->cols * CPU_WORK_PER_ELEMENT);
    cpu_share(self, experts_group_task, &job, tasks, (uint64_t)slots * weight->rows * weight->cols);
    return ODSI_OK;
}
