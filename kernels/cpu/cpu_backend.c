#include "kernels/cpu/cpu_backend.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/limits.h"
#include "kernels/cpu/cpu_attention.h"
#include "kernels/cpu/cpu_loops.h"
#include "kernels/cpu/cpu_weight.h"
#include "kernels/cpu/pool.h"
#include "kernels/ref/ref.h"

#include <string.h>

/* An op whose work is below this is not worth waking other threads for; about 2 us on one thread.
 * Work counts multiply-adds of a matmul; other ops weigh their elements as so many of those. */
#define WORK_MIN_SHARED     (1u << 17)
#define WORK_PER_EXP        64u
#define WORK_PER_ELEMENT    16u
#define TASKS_PER_THREAD    4u    /* of a matmul: a late thread costs a quarter of its share */
#define ELEMENTS_PER_TASK   8192u /* of an op without rows */
#define ATTENTION_MADD_WORK 4u    /* a multiply-add of attention against one of a matmul */

/* Memory that grows to the largest call so far and is then reused. */
struct scratch {
    void *memory;
    size_t size;
};

struct cpu_backend {
    struct backend base; /* first */
    struct cpu_loops loops;
    struct pool *pool;
    struct scratch quants;    /* activations of a Q8_0 matmul: q, scales, offsets */
    struct scratch attention; /* one part for each thread */
    struct scratch parts;
};

static struct cpu_backend *cpu(struct backend *base)
{
    return (struct cpu_backend *)(void *)base;
}

static enum odsi_err scratch_need(struct scratch *self, size_t size)
{
    if (size <= self->size)
        return ODSI_OK;
    alloc_free(self->memory);
    self->size = 0;
    enum odsi_err err = alloc_aligned(&self->memory, size, 1);
    if (err == ODSI_OK)
        self->size = size;
    return err;
}

static size_t line_round(size_t size)
{
    return (size + ALLOC_ALIGNMENT - 1) / ALLOC_ALIGNMENT * ALLOC_ALIGNMENT;
}

/* Runs the tasks on the pool, or here when they are small. */
static void share(struct cpu_backend *self, pool_task *task, void *context, uint64_t count,
                  uint64_t work)
{
    ODSI_ASSERT(count < POOL_TASKS_MAX);
    if (work >= WORK_MIN_SHARED) {
        pool_run(self->pool, task, context, (uint32_t)count);
        return;
    }
    for (uint32_t i = 0; i < (uint32_t)count; i++)
        task(context, i, 0);
}

/* ---- memory and weights ---- */

static void cpu_close(struct backend *base)
{
    struct cpu_backend *self = cpu(base);
    pool_close(&self->pool);
    alloc_free(self->quants.memory);
    alloc_free(self->attention.memory);
    alloc_free(self->parts.memory);
    alloc_free(self);
}

static enum odsi_err cpu_mem_alloc(struct backend *base, void **out_dev, size_t size)
{
    (void)base;
    return alloc_aligned(out_dev, size, 1);
}

static void cpu_mem_free(struct backend *base, void *memory_dev)
{
    (void)base;
    alloc_free(memory_dev);
}

static enum odsi_err cpu_upload(struct backend *base, void *to_dev, const void *from, size_t size)
{
    (void)base;
    if (size > 0)
        memcpy(to_dev, from, size);
    return ODSI_OK;
}

static enum odsi_err cpu_download(struct backend *base, void *to, const void *from_dev, size_t size)
{
    return cpu_upload(base, to, from_dev, size);
}

static enum odsi_err cpu_sync(struct backend *base)
{
    (void)base; /* every op is done when it returns */
    return ODSI_OK;
}

/* Ranges of weight groups, for packing and for matmul. */
struct group_job {
    const struct cpu_loops *loops;
    struct weight *packed;
    const void *source;
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

static void pack_task(void *context, uint32_t index, uint32_t thread)
{
    const struct group_job *job = context;
    (void)thread;
    cpu_weight_pack(job->packed, job->source, group_bound(job, index), group_bound(job, index + 1));
}

static enum odsi_err cpu_weight_load(struct backend *base, struct weight **out,
                                     enum tensor_type type, const void *data, uint32_t rows,
                                     uint32_t cols)
{
    struct cpu_backend *self = cpu(base);
    ODSI_ASSERT(type == TENSOR_F32 || type == TENSOR_F16 || type == TENSOR_Q8_0);
    ODSI_ASSERT(rows > 0 && cols > 0);
    ODSI_ASSERT(type != TENSOR_Q8_0 || cols % OPS_BLOCK == 0);
    enum odsi_err err =
        cpu_weight_open(out, type, rows, cols, self->loops.group_rows, self->loops.quant_flip);
    if (err != ODSI_OK)
        return err;
    struct group_job job = {.packed = *out, .source = data};
    group_split(&job, self, (*out)->group_count);
    share(self, pack_task, &job, job.task_count, (uint64_t)rows * cols);
    return ODSI_OK;
}

static void cpu_weight_free(struct backend *base, struct weight *weight)
{
    (void)base;
    cpu_weight_close(&weight);
}

/* ---- ops by row ---- */

struct row_job {
    const struct cpu_loops *loops;
    float *out;
    const float *x;
    const float *weight;
    uint32_t cols;
    float eps;
    int8_t *q;
    float *scales;
    int32_t *offsets;
};

static enum odsi_err cpu_embed(struct backend *base, float *out_dev, const struct weight *table,
                               const uint32_t *tokens, uint32_t rows)
{
    (void)base;
    for (uint32_t r = 0; r < rows; r++) {
        ODSI_ASSERT(tokens[r] < table->rows);
        cpu_weight_row(out_dev + (size_t)r * table->cols, table, tokens[r]);
    }
    return ODSI_OK;
}

static void rmsnorm_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    const size_t at = (size_t)index * job->cols;
    (void)thread;
    job->loops->rmsnorm(job->out + at, job->x + at, job->weight, job->cols, job->eps);
}

static enum odsi_err cpu_rmsnorm(struct backend *base, float *out_dev, const float *x_dev,
                                 const float *weight_dev, uint32_t rows, uint32_t cols, float eps)
{
    struct cpu_backend *self = cpu(base);
    ODSI_ASSERT(cols > 0);
    struct row_job job = {.loops = &self->loops,
                          .out = out_dev,
                          .x = x_dev,
                          .weight = weight_dev,
                          .cols = cols,
                          .eps = eps};
    share(self, rmsnorm_task, &job, rows, (uint64_t)rows * cols * WORK_PER_ELEMENT);
    return ODSI_OK;
}

static enum odsi_err cpu_rope(struct backend *base, float *x_dev, const struct rope_table *table,
                              const struct op_batch *batch, uint32_t heads, uint32_t head_dim)
{
    struct cpu_backend *self = cpu(base);
    ODSI_ASSERT(head_dim == 2 * table->half_dim);
    for (uint32_t r = 0; r < batch->rows; r++) {
        ODSI_ASSERT(batch->position[r] < table->position_count);
        const size_t at = (size_t)batch->position[r] * table->half_dim;
        self->loops.rope(x_dev + (size_t)r * heads * head_dim, table->cos_dev + at,
                         table->sin_dev + at, heads, head_dim);
    }
    return ODSI_OK;
}

/* ---- matmul ---- */

static void quantize_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    const size_t at = (size_t)index * job->cols;
    const size_t block = (size_t)index * (job->cols / OPS_BLOCK);
    (void)thread;
    job->loops->quantize(job->q + at, job->scales + block, job->offsets + block, job->x + at,
                         job->cols);
}

static enum odsi_err quantize(struct cpu_backend *self, struct cpu_matmul *job)
{
    const size_t count = (size_t)job->rows * job->weight->cols;
    const size_t quants_size = line_round(count);
    const size_t scales_size = line_round(count / OPS_BLOCK * sizeof(float));
    enum odsi_err err = scratch_need(&self->quants, quants_size + 2 * scales_size);
    if (err != ODSI_OK)
        return err;
    uint8_t *memory = self->quants.memory;
    struct row_job rows = {.loops = &self->loops, .x = job->x, .cols = job->weight->cols};
    rows.q = (int8_t *)memory;
    rows.scales = (float *)(void *)(memory + quants_size);
    rows.offsets = (int32_t *)(void *)(memory + quants_size + scales_size);
    share(self, quantize_task, &rows, job->rows, (uint64_t)count * WORK_PER_ELEMENT);
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
    if (job->matmul->weight->type == TENSOR_F32)
        job->loops->matmul_f32(job->matmul, first, end);
    else if (job->matmul->weight->type == TENSOR_F16)
        job->loops->matmul_f16(job->matmul, first, end);
    else
        job->loops->matmul_q8(job->matmul, first, end);
}

static enum odsi_err cpu_matmul(struct backend *base, float *out_dev, const struct weight *weight,
                                const float *x_dev, uint32_t rows)
{
    struct cpu_backend *self = cpu(base);
    struct cpu_matmul matmul = {.out = out_dev, .weight = weight, .x = x_dev, .rows = rows};
    if (rows == 0)
        return ODSI_OK;
    if (weight->type == TENSOR_Q8_0) {
        enum odsi_err err = quantize(self, &matmul);
        if (err != ODSI_OK)
            return err;
    }
    struct group_job job = {.matmul = &matmul};
    group_split(&job, self, weight->group_count);
    share(self, matmul_task, &job, job.task_count, (uint64_t)rows * weight->rows * weight->cols);
    return ODSI_OK;
}

/* ---- attention ---- */

static enum odsi_err cpu_kv_write(struct backend *base, const struct kv_pool *pool, uint32_t layer,
                                  const struct op_batch *batch, const float *k_dev,
                                  const float *v_dev)
{
    struct cpu_backend *self = cpu(base);
    ODSI_ASSERT(layer < pool->layers);
    for (uint32_t r = 0; r < batch->rows; r++) {
        const uint32_t position = batch->position[r];
        const uint32_t page = batch->page_table[r][position / KV_PAGE_TOKENS];
        const size_t token = (size_t)(position % KV_PAGE_TOKENS) * pool->head_dim;
        ODSI_ASSERT(page < pool->page_count);
        for (uint32_t h = 0; h < pool->kv_heads; h++) {
            const size_t from = ((size_t)r * pool->kv_heads + h) * pool->head_dim;
            uint16_t *keys = pool->pages_dev + ref_kv_offset(pool, page, layer, 0, h);
            uint16_t *values = pool->pages_dev + ref_kv_offset(pool, page, layer, 1, h);
            self->loops.kv_round(keys + token, k_dev + from, pool->head_dim);
            self->loops.kv_round(values + token, v_dev + from, pool->head_dim);
        }
    }
    return ODSI_OK;
}

struct attention_job {
    const struct cpu_loops *loops;
    const struct cpu_attention_plan *plan;
    float *scratch;
    size_t scratch_count; /* floats of one thread */
};

static void attention_task(void *context, uint32_t index, uint32_t thread)
{
    const struct attention_job *job = context;
    struct cpu_attention piece;
    cpu_attention_piece(&piece, job->plan, index);
    piece.scratch = job->scratch + thread * job->scratch_count;
    job->loops->attention(&piece);
}

static enum odsi_err cpu_attention(struct backend *base, float *out_dev, const float *q_dev,
                                   const struct kv_pool *pool, uint32_t layer,
                                   const struct op_batch *batch, uint32_t heads)
{
    struct cpu_backend *self = cpu(base);
    ODSI_ASSERT(layer < pool->layers);
    ODSI_ASSERT(heads > 0 && heads % pool->kv_heads == 0);
    ODSI_ASSERT(pool->head_dim > 0 && pool->head_dim <= LIMIT_HEAD_DIM_MAX);
    if (batch->rows == 0)
        return ODSI_OK;
    const uint32_t threads = pool_thread_count(self->pool);
    struct cpu_attention_plan plan = {
        .out = out_dev, .q = q_dev, .pool = pool, .batch = batch, .layer = layer, .heads = heads};
    enum odsi_err err = scratch_need(&self->parts, batch->rows * sizeof(struct cpu_attention_part));
    if (err != ODSI_OK)
        return err;
    cpu_attention_plan(&plan, self->parts.memory, threads);
    const size_t count =
        cpu_attention_scratch(plan.vectors_max, plan.position_count, pool->head_dim);
    err = scratch_need(&self->attention, count * threads * sizeof(float));
    if (err != ODSI_OK)
        return err;
    struct attention_job job = {.loops = &self->loops,
                                .plan = &plan,
                                .scratch = self->attention.memory,
                                .scratch_count = count};
    const uint64_t work = (uint64_t)batch->rows * heads * plan.position_count * pool->head_dim;
    share(self, attention_task, &job, cpu_attention_piece_count(&plan), work * ATTENTION_MADD_WORK);
    return ODSI_OK;
}

/* ---- ops by element ---- */

struct element_job {
    const struct cpu_loops *loops;
    float *out;
    const float *a;
    const float *b;
    size_t count;
};

static size_t element_count(const struct element_job *job, uint32_t index)
{
    const size_t rest = job->count - (size_t)index * ELEMENTS_PER_TASK;
    return rest < ELEMENTS_PER_TASK ? rest : ELEMENTS_PER_TASK;
}

static void silu_mul_task(void *context, uint32_t index, uint32_t thread)
{
    const struct element_job *job = context;
    const size_t at = (size_t)index * ELEMENTS_PER_TASK;
    (void)thread;
    job->loops->silu_mul(job->out + at, job->a + at, job->b + at, element_count(job, index));
}

static void add_task(void *context, uint32_t index, uint32_t thread)
{
    const struct element_job *job = context;
    const size_t at = (size_t)index * ELEMENTS_PER_TASK;
    (void)thread;
    job->loops->add(job->out + at, job->a + at, job->b + at, element_count(job, index));
}

static enum odsi_err cpu_silu_mul(struct backend *base, float *out_dev, const float *gate_dev,
                                  const float *up_dev, size_t count)
{
    struct cpu_backend *self = cpu(base);
    struct element_job job = {&self->loops, out_dev, gate_dev, up_dev, count};
    share(self, silu_mul_task, &job, (count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK,
          (uint64_t)count * WORK_PER_EXP);
    return ODSI_OK;
}

static enum odsi_err cpu_add(struct backend *base, float *out_dev, const float *a_dev,
                             const float *b_dev, size_t count)
{
    struct cpu_backend *self = cpu(base);
    struct element_job job = {&self->loops, out_dev, a_dev, b_dev, count};
    share(self, add_task, &job, (count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK,
          (uint64_t)count * WORK_PER_ELEMENT);
    return ODSI_OK;
}

static enum odsi_err cpu_all_finite(struct backend *base, int *out, const float *x_dev,
                                    size_t count)
{
    *out = cpu(base)->loops.all_finite(x_dev, count);
    return ODSI_OK;
}

/* ---- opening ---- */

#define CPU_OPS(level_name)                                                                        \
    {                                                                                              \
        .name = (level_name), .close = cpu_close, .mem_alloc = cpu_mem_alloc,                      \
        .mem_free = cpu_mem_free, .upload = cpu_upload, .download = cpu_download,                  \
        .sync = cpu_sync, .weight_load = cpu_weight_load, .weight_free = cpu_weight_free,          \
        .embed = cpu_embed, .rmsnorm = cpu_rmsnorm, .matmul = cpu_matmul, .rope = cpu_rope,        \
        .kv_write = cpu_kv_write, .attention = cpu_attention, .silu_mul = cpu_silu_mul,            \
        .add = cpu_add, .all_finite = cpu_all_finite                                               \
    }

static void loops_fill(struct cpu_loops *loops, enum cpu_level level)
{
    scalar_loops_fill(loops);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("fma"))
        fma_loops_fill(loops);
    if (level >= CPU_AVX2)
        avx2_loops_fill(loops);
    if (level >= CPU_AVX512)
        avx512_loops_fill(loops);
#else
    ODSI_ASSERT(level == CPU_SCALAR);
#endif
}

enum odsi_err cpu_backend_open(struct backend **out, enum cpu_level level, uint32_t thread_count)
{
    static const struct backend_ops ops[CPU_LEVEL_COUNT] = {CPU_OPS("scalar"), CPU_OPS("avx2"),
                                                            CPU_OPS("avx512")};
    *out = NULL;
    ODSI_ASSERT(!cpu_level_lacks(level));
    if (thread_count == 0)
        thread_count = pool_cpu_count();
    struct cpu_backend *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->base.ops = &ops[level];
    self->base.thread_count = thread_count;
    loops_fill(&self->loops, level);
    err = pool_open(&self->pool, thread_count);
    if (err != ODSI_OK) {
        cpu_close(&self->base);
        return err;
    }
    *out = &self->base;
    return ODSI_OK;
}
