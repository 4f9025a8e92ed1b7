#include "kernels/cpu/cpu_backend.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/limits.h"
#include "kernels/cpu/cpu_attention.h"
#include "kernels/cpu/cpu_parts.h"
#include "kernels/ref/ref.h"

#include <stdatomic.h>
#include <string.h>

/* Work below this is not worth waking other threads for; about 2 us on one thread. */
#define WORK_MIN_SHARED      (1u << 17)
#define ELEMENTS_PER_TASK    8192u /* of an op without rows */
#define ATTENTION_MADD_WORK  4u    /* a multiply-add of attention against one of a matmul */
#define ROUTE_LOGIT_ELEMENTS 8u    /* a logit of route against an element of an op by row */

enum odsi_err cpu_scratch_need(struct cpu_scratch *self, size_t size)
{
    if (size <= self->size)
        return ODSI_OK;
    /* by half at least: what attention needs grows a little with every page of a long answer */
    size = size > self->size + self->size / 2 ? size : self->size + self->size / 2;
    alloc_free(self->memory);
    self->size = 0;
    enum odsi_err err = alloc_aligned(&self->memory, size, 1);
    if (err == ODSI_OK)
        self->size = size;
    return err;
}

void cpu_share(struct cpu_backend *self, pool_task *task, void *context, uint64_t count,
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

/* ---- memory ---- */

static void cpu_close(struct backend *base)
{
    struct cpu_backend *self = cpu_of(base);
    pool_close(&self->pool);
    alloc_free(self->quants.memory);
    alloc_free(self->experts.memory);
    alloc_free(self->attention.memory);
    alloc_free(self->parts.memory);
    cpu_memory_close(&self->memory);
    alloc_free(self);
}

static enum odsi_err cpu_mem_alloc(struct backend *base, void **out_dev, size_t size)
{
    return cpu_memory_take(&cpu_of(base)->memory, out_dev, size, 0);
}

static void cpu_mem_free(struct backend *base, void *memory_dev)
{
    cpu_memory_give_back(&cpu_of(base)->memory, memory_dev);
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

/* ---- ops by row ---- */

/* A task takes several rows when they are short, so that claiming it costs little beside them. */
struct row_job {
    const struct cpu_loops *loops;
    float *out;
    const float *x;
    const float *weight;
    uint32_t rows;
    uint32_t cols;
    uint32_t task_rows;
    float eps;
    /* rope and kv_write */
    const struct op_batch *batch;
    const struct rope_table *table;
    uint32_t heads;
    uint32_t head_dim;
    const struct kv_pool *pool;
    uint32_t layer;
    /* route and combine */
    uint32_t *ids;
    uint32_t used;
};

/* Runs task over all rows; size: elements that one row reads. */
static void share_rows(struct cpu_backend *self, pool_task *task, struct row_job *job,
                       uint64_t size)
{
    const uint64_t task_rows = size < ELEMENTS_PER_TASK ? ELEMENTS_PER_TASK / (size + 1) : 1;
    job->loops = &self->loops;
    job->task_rows = task_rows < job->rows ? (uint32_t)task_rows : job->rows;
    if (job->rows > 0)
        cpu_share(self, task, job, (job->rows + job->task_rows - 1) / job->task_rows,
                  job->rows * size * CPU_WORK_PER_ELEMENT);
}

static uint32_t task_end(const struct row_job *job, uint32_t index)
{
    const uint32_t rest = job->rows - index * job->task_rows;
    return index * job->task_rows + (rest < job->task_rows ? rest : job->task_rows);
}

static void rmsnorm_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    (void)thread;
    for (uint32_t r = index * job->task_rows; r < task_end(job, index); r++) {
        const size_t at = (size_t)r * job->cols;
        job->loops->rmsnorm(job->out + at, job->x + at, job->weight, job->cols, job->eps);
    }
}

static enum odsi_err cpu_rmsnorm(struct backend *base, float *out_dev, const float *x_dev,
                                 const float *weight_dev, uint32_t rows, uint32_t cols, float eps)
{
    ODSI_ASSERT(cols > 0);
    struct row_job job = {
        .out = out_dev, .x = x_dev, .weight = weight_dev, .rows = rows, .cols = cols, .eps = eps};
    share_rows(cpu_of(base), rmsnorm_task, &job, cols);
    return ODSI_OK;
}

static void add_bias_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    (void)thread;
    for (uint32_t r = index * job->task_rows; r < task_end(job, index); r++)
        job->loops->add_bias(job->out + (size_t)r * job->cols, job->weight, job->cols);
}

static enum odsi_err cpu_add_bias(struct backend *base, float *x_dev, const float *bias_dev,
                                  uint32_t rows, uint32_t cols)
{
    struct row_job job = {.out = x_dev, .weight = bias_dev, .rows = rows, .cols = cols};
    share_rows(cpu_of(base), add_bias_task, &job, cols);
    return ODSI_OK;
}

static void rope_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    const struct rope_table *table = job->table;
    (void)thread;
    for (uint32_t r = index * job->task_rows; r < task_end(job, index); r++) {
        const size_t at = (size_t)job->batch->position[r] * table->half_dim;
        ODSI_ASSERT(job->batch->position[r] < table->position_count);
        job->loops->rope(job->out + (size_t)r * job->heads * job->head_dim, table->cos_dev + at,
                         table->sin_dev + at, table->half_dim, table->style, job->heads,
                         job->head_dim);
    }
}

static enum odsi_err cpu_rope(struct backend *base, float *x_dev, const struct rope_table *table,
                              const struct op_batch *batch, uint32_t heads, uint32_t head_dim)
{
    ODSI_ASSERT(2 * table->half_dim <= head_dim);
    struct row_job job = {.out = x_dev,
                          .rows = batch->rows,
                          .batch = batch,
                          .table = table,
                          .heads = heads,
                          .head_dim = head_dim};
    share_rows(cpu_of(base), rope_task, &job, (uint64_t)heads * table->half_dim * 2);
    return ODSI_OK;
}

static void kv_write_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    const struct kv_pool *pool = job->pool;
    (void)thread;
    for (uint32_t r = index * job->task_rows; r < task_end(job, index); r++) {
        const uint32_t position = job->batch->position[r];
        const uint32_t page = job->batch->page_table[r][position / KV_PAGE_TOKENS];
        const size_t token = (size_t)(position % KV_PAGE_TOKENS) * pool->head_dim;
        ODSI_ASSERT(page < pool->page_count);
        for (uint32_t h = 0; h < pool->kv_heads; h++) {
            const size_t from = ((size_t)r * pool->kv_heads + h) * pool->head_dim;
            uint16_t *keys = pool->pages_dev + ref_kv_offset(pool, page, job->layer, 0, h);
            uint16_t *values = pool->pages_dev + ref_kv_offset(pool, page, job->layer, 1, h);
            job->loops->kv_round(keys + token, job->x + from, pool->head_dim);
            job->loops->kv_round(values + token, job->weight + from, pool->head_dim);
        }
    }
}

static enum odsi_err cpu_kv_write(struct backend *base, const struct kv_pool *pool, uint32_t layer,
                                  const struct op_batch *batch, const float *k_dev,
                                  const float *v_dev)
{
    ODSI_ASSERT(layer < pool->layers);
    struct row_job job = {.x = k_dev,
                          .weight = v_dev,
                          .rows = batch->rows,
                          .batch = batch,
                          .pool = pool,
                          .layer = layer};
    share_rows(cpu_of(base), kv_write_task, &job, (uint64_t)pool->kv_heads * pool->head_dim * 2);
    return ODSI_OK;
}

static void route_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    (void)thread;
    for (uint32_t r = index * job->task_rows; r < task_end(job, index); r++)
        job->loops->route(job->ids + (size_t)r * job->used, job->out + (size_t)r * job->used,
                          job->x + (size_t)r * job->cols, job->cols, job->used);
}

static enum odsi_err cpu_route(struct backend *base, uint32_t *ids_dev, float *weights_dev,
                               const float *logits_dev, uint32_t rows, uint32_t experts,
                               uint32_t used)
{
    ODSI_ASSERT(used > 0 && used <= experts);
    struct row_job job = {.out = weights_dev,
                          .x = logits_dev,
                          .rows = rows,
                          .cols = experts,
                          .ids = ids_dev,
                          .used = used};
    share_rows(cpu_of(base), route_task, &job, (uint64_t)experts * ROUTE_LOGIT_ELEMENTS);
    return ODSI_OK;
}

static void combine_task(void *context, uint32_t index, uint32_t thread)
{
    const struct row_job *job = context;
    (void)thread;
    for (uint32_t r = index * job->task_rows; r < task_end(job, index); r++)
        job->loops->combine(job->out + (size_t)r * job->cols,
                            job->x + (size_t)r * job->used * job->cols,
                            job->weight + (size_t)r * job->used, job->used, job->cols);
}

static enum odsi_err cpu_combine(struct backend *base, float *out_dev, const float *y_dev,
                                 const float *weights_dev, uint32_t rows, uint32_t used,
                                 uint32_t cols)
{
    struct row_job job = {.out = out_dev,
                          .x = y_dev,
                          .weight = weights_dev,
                          .rows = rows,
                          .cols = cols,
                          .used = used};
    share_rows(cpu_of(base), combine_task, &job, (uint64_t)used * cols);
    return ODSI_OK;
}

/* ---- attention ---- */

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
                                   const struct op_batch *batch,
                                   const struct attention_params *params)
{
    struct cpu_backend *self = cpu_of(base);
    const uint32_t heads = params->heads;
    ODSI_ASSERT(layer < pool->layers);
    ODSI_ASSERT(heads > 0 && heads % pool->kv_heads == 0);
    ODSI_ASSERT(pool->head_dim > 0 && pool->head_dim <= LIMIT_HEAD_DIM_MAX);
    if (batch->rows == 0)
        return ODSI_OK;
    const uint32_t threads = pool_thread_count(self->pool);
    struct cpu_attention_plan plan = {
        .out = out_dev, .q = q_dev, .pool = pool, .batch = batch, .params = params, .layer = layer};
    enum odsi_err err =
        cpu_scratch_need(&self->parts, batch->rows * sizeof(struct cpu_attention_part));
    if (err != ODSI_OK)
        return err;
    cpu_attention_plan(&plan, self->parts.memory, threads);
    err = cpu_scratch_need(&self->attention, plan.scratch_count * threads * sizeof(float));
    if (err != ODSI_OK)
        return err;
    struct attention_job job = {.loops = &self->loops,
                                .plan = &plan,
                                .scratch = self->attention.memory,
                                .scratch_count = plan.scratch_count};
    const uint64_t work = plan.tile_rows * OPS_TILE_TOKENS * heads * pool->head_dim;
    cpu_share(self, attention_task, &job, cpu_attention_piece_count(&plan),
              work * ATTENTION_MADD_WORK);
    return ODSI_OK;
}

/* ---- ops by element ---- */

struct element_job {
    const struct cpu_loops *loops;
    float *out;
    const float *a;
    const float *b;
    size_t count;
    float factor; /* or cap */
    enum act_kind kind;
    atomic_int finite;
};

/* Runs task over all elements; weight: the work of one. */
static void share_elements(struct cpu_backend *self, pool_task *task, struct element_job *job,
                           uint64_t weight)
{
    job->loops = &self->loops;
    cpu_share(self, task, job, (job->count + ELEMENTS_PER_TASK - 1) / ELEMENTS_PER_TASK,
              job->count * weight);
}

static size_t element_count(const struct element_job *job, uint32_t index)
{
    const size_t rest = job->count - (size_t)index * ELEMENTS_PER_TASK;
    return rest < ELEMENTS_PER_TASK ? rest : ELEMENTS_PER_TASK;
}

static void act_mul_task(void *context, uint32_t index, uint32_t thread)
{
    const struct element_job *job = context;
    const size_t at = (size_t)index * ELEMENTS_PER_TASK;
    (void)thread;
    job->loops->act_mul(job->out + at, job->a + at, job->b + at, element_count(job, index),
                        job->kind);
}

static enum odsi_err cpu_act_mul(struct backend *base, float *out_dev, const float *gate_dev,
                                 const float *up_dev, size_t count, enum act_kind kind)
{
    struct element_job job = {
        .out = out_dev, .a = gate_dev, .b = up_dev, .count = count, .kind = kind};
    share_elements(cpu_of(base), act_mul_task, &job, CPU_WORK_PER_EXP);
    return ODSI_OK;
}

static void add_task(void *context, uint32_t index, uint32_t thread)
{
    const struct element_job *job = context;
    const size_t at = (size_t)index * ELEMENTS_PER_TASK;
    (void)thread;
    job->loops->add(job->out + at, job->a + at, job->b + at, element_count(job, index));
}

static enum odsi_err cpu_add(struct backend *base, float *out_dev, const float *a_dev,
                             const float *b_dev, size_t count)
{
    struct element_job job = {.out = out_dev, .a = a_dev, .b = b_dev, .count = count};
    share_elements(cpu_of(base), add_task, &job, CPU_WORK_PER_ELEMENT);
    return ODSI_OK;
}

static void scale_task(void *context, uint32_t index, uint32_t thread)
{
    const struct element_job *job = context;
    (void)thread;
    job->loops->scale(job->out + (size_t)index * ELEMENTS_PER_TASK, element_count(job, index),
                      job->factor);
}

static enum odsi_err cpu_scale(struct backend *base, float *x_dev, size_t count, float factor)
{
    struct element_job job = {.out = x_dev, .count = count, .factor = factor};
    share_elements(cpu_of(base), scale_task, &job, CPU_WORK_PER_ELEMENT);
    return ODSI_OK;
}

static void softcap_task(void *context, uint32_t index, uint32_t thread)
{
    const struct element_job *job = context;
    (void)thread;
    job->loops->softcap(job->out + (size_t)index * ELEMENTS_PER_TASK, element_count(job, index),
                        job->factor);
}

static enum odsi_err cpu_softcap(struct backend *base, float *x_dev, size_t count, float cap)
{
    ODSI_ASSERT(cap > 0.0f);
    struct element_job job = {.out = x_dev, .count = count, .factor = cap};
    share_elements(cpu_of(base), softcap_task, &job, CPU_WORK_PER_EXP);
    return ODSI_OK;
}

static void all_finite_task(void *context, uint32_t index, uint32_t thread)
{
    struct element_job *job = context;
    (void)thread;
    if (!job->loops->all_finite(job->a + (size_t)index * ELEMENTS_PER_TASK,
                                element_count(job, index)))
        atomic_store_explicit(&job->finite, 0, memory_order_relaxed);
}

static enum odsi_err cpu_all_finite(struct backend *base, int *out, const float *x_dev,
                                    size_t count)
{
    struct element_job job = {.a = x_dev, .count = count};
    atomic_init(&job.finite, 1);
    share_elements(cpu_of(base), all_finite_task, &job, CPU_WORK_PER_ELEMENT);
    *out = atomic_load_explicit(&job.finite, memory_order_relaxed);
    return ODSI_OK;
}

/* ---- opening ---- */

#define CPU_OPS(level_name)                                                                        \
    {                                                                                              \
        .name = (level_name), .close = cpu_close, .mem_alloc = cpu_mem_alloc,                      \
        .mem_free = cpu_mem_free, .upload = cpu_upload, .download = cpu_download,                  \
        .sync = cpu_sync, .weight_open = cpu_matmul_weight_open,                                   \
        .weight_fill = cpu_matmul_weight_fill, .weight_free = cpu_matmul_weight_free,              \
        .embed = cpu_matmul_embed, .rmsnorm = cpu_rmsnorm, .matmul = cpu_matmul_run,               \
        .matmul_experts = cpu_matmul_experts, .add_bias = cpu_add_bias, .rope = cpu_rope,          \
        .kv_write = cpu_kv_write, .attention = cpu_attention, .act_mul = cpu_act_mul,              \
        .scale = cpu_scale, .softcap = cpu_softcap, .route = cpu_route, .combine = cpu_combine,    \
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
    cpu_memory_init(&self->memory);
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
