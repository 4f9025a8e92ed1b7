#include "worker/model/quantizer.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "kernels/cpu/pool.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "worker/model/quantizer_block.h"

#include <inttypes.h>
#include <string.h>

#define TASK_COLS 16384u /* columns of one task, in whole rows */

struct quantizer {
    struct pool *pool;
    float *rows; /* [threads][cols_max] */
    uint32_t cols_max;
};

/* One call of quantizer_convert, or of quantizer_rows, where the rows are there as f32. */
struct job {
    enum tensor_type from;
    const uint8_t *in;
    enum tensor_type type;
    uint8_t *out;
    uint64_t row_count;
    uint32_t cols;
    uint64_t task_rows;
    float *rows;      /* [threads][cols] */
    uint64_t bad_row; /* the lowest one, UINT64_MAX: none */
};

enum odsi_err quantizer_open(struct quantizer **out, uint32_t thread_count)
{
    struct quantizer *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err == ODSI_OK)
        err = pool_open(&self->pool, thread_count);
    if (err != ODSI_OK)
        quantizer_close(&self);
    *out = self;
    return err;
}

void quantizer_close(struct quantizer **self_pointer)
{
    struct quantizer *self = *self_pointer;
    if (!self)
        return;
    pool_close(&self->pool);
    alloc_free(self->rows);
    alloc_free(self);
    *self_pointer = NULL;
}

/* ---- one row --------------------------------------------------------------------------------- */

/* The first column whose magnitude is above top or that is a NaN. */
static uint32_t find_bad(const float *weights, uint32_t cols, float top)
{
    uint32_t bad_count = 0;
    for (uint32_t i = 0; i < cols; i++)
        bad_count += !(weights[i] <= top && weights[i] >= -top);
    for (uint32_t i = 0; bad_count > 0 && i < cols; i++)
        if (!(weights[i] <= top && weights[i] >= -top))
            return i;
    return cols;
}

/* Nearest, ties to even; value is finite. */
static uint16_t bf16_from_f32(float value)
{
    const uint32_t bits = det_bits(value);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static void store_row(enum tensor_type type, const float *weights, uint32_t cols, uint8_t *out)
{
    for (uint32_t i = 0; i < cols; i++) {
        const uint32_t bits = type == TENSOR_F32   ? det_bits(weights[i])
                              : type == TENSOR_F16 ? det_f16_from_f32(weights[i])
                                                   : bf16_from_f32(weights[i]);
        *out++ = (uint8_t)bits;
        *out++ = (uint8_t)(bits >> 8);
        if (type == TENSOR_F32) {
            *out++ = (uint8_t)(bits >> 16);
            *out++ = (uint8_t)(bits >> 24);
        }
    }
}

/* The largest magnitude that type takes; of BF16 what rounds to a finite one. */
static float weight_max(enum tensor_type type)
{
    if (type == TENSOR_F32)
        return 3.4028234663852886e38f;
    return type == TENSOR_BF16 ? 3.3895313892515355e38f : QUANTIZER_WEIGHT_MAX;
}

uint32_t quantizer_row(enum tensor_type type, const float *weights, uint32_t cols, void *out)
{
    const uint32_t block_cols = quant_block_cols(type);
    const uint32_t bad = find_bad(weights, cols, weight_max(type));
    ODSI_ASSERT(cols % block_cols == 0);
    if (bad < cols)
        return bad;
    if (block_cols == 1) {
        store_row(type, weights, cols, out);
        return cols;
    }
    uint8_t *to = out;
    for (uint32_t at = 0; at < cols; at += block_cols, to += quant_block_size(type)) {
        if (block_cols == 32)
            quantizer_block_small(type, weights + at, to);
        else
            quantizer_block_k(type, weights + at, to);
    }
    return cols;
}

static float read_float(enum tensor_type type, const uint8_t *from)
{
    const uint32_t low = (uint32_t)from[0] | (uint32_t)from[1] << 8;
    if (type == TENSOR_F16)
        return det_f32_from_f16((uint16_t)low);
    if (type == TENSOR_BF16)
        return det_f32_from_bf16((uint16_t)low);
    return det_from_bits(low | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24);
}

void quantizer_read_row(enum tensor_type type, const void *row, uint32_t cols, float *out)
{
    const uint8_t *from = row;
    if (!quant_is_quantized(type)) {
        for (uint32_t i = 0; i < cols; i++)
            out[i] = read_float(type, from + (size_t)i * quant_block_size(type));
        return;
    }
    for (uint32_t at = 0; at < cols; at += OPS_BLOCK) {
        struct quant_group group;
        quant_read(&group, type, row, at / OPS_BLOCK);
        for (uint32_t i = 0; i < OPS_BLOCK; i++) {
            const uint32_t part = i / group.group_cols;
            out[at + i] = group.scale[part] * (float)group.q[i] + group.min[part];
        }
    }
}

/* ---- many rows ------------------------------------------------------------------------------- */

static void note_bad(struct job *job, uint64_t row)
{
    uint64_t known = __atomic_load_n(&job->bad_row, __ATOMIC_RELAXED);
    while (row < known && !__atomic_compare_exchange_n(&job->bad_row, &known, row, 0,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED))
        ;
}

/* The index-th row as f32: as it is, or read into this thread's room. */
static const float *row_of(const struct job *job, uint64_t index, uint32_t thread)
{
    const uint8_t *from = job->in + index * quant_row_size(job->from, job->cols);
    if (!job->rows)
        return (const float *)(const void *)from;
    float *row = job->rows + (size_t)thread * job->cols;
    quantizer_read_row(job->from, from, job->cols, row);
    return row;
}

static void run_task(void *context, uint32_t index, uint32_t thread)
{
    struct job *job = context;
    const size_t row_size = quant_row_size(job->type, job->cols);
    const uint64_t first = index * job->task_rows;
    for (uint64_t row = first; row < first + job->task_rows && row < job->row_count; row++)
        if (quantizer_row(job->type, row_of(job, row, thread), job->cols,
                          job->out + row * row_size) < job->cols)
            note_bad(job, row);
}

static enum odsi_err run_job(struct quantizer *self, struct job *job)
{
    job->task_rows = job->cols >= TASK_COLS ? 1 : TASK_COLS / job->cols;
    job->bad_row = UINT64_MAX;
    const uint64_t task_count = (job->row_count + job->task_rows - 1) / job->task_rows;
    ODSI_ASSERT(task_count < POOL_TASKS_MAX);
    pool_run(self->pool, run_task, job, (uint32_t)task_count);
    if (job->bad_row == UINT64_MAX)
        return ODSI_OK;
    const float *row = row_of(job, job->bad_row, 0);
    const uint32_t column = find_bad(row, job->cols, weight_max(job->type));
    return odsi_fail(ODSI_ERR_NUMERIC,
                     "the weight in row %" PRIu64 ", column %" PRIu32
                     " is %g, which %s cannot hold",
                     job->bad_row, column, (double)row[column], quant_name((uint32_t)job->type));
}

enum odsi_err quantizer_rows(struct quantizer *self, enum tensor_type type, const float *weights,
                             uint64_t row_count, uint32_t cols, void *out)
{
    struct job job = {.from = TENSOR_F32,
                      .in = (const uint8_t *)weights,
                      .type = type,
                      .out = out,
                      .row_count = row_count,
                      .cols = cols};
    return run_job(self, &job);
}

enum odsi_err quantizer_convert(struct quantizer *self, enum tensor_type from, const void *in,
                                enum tensor_type type, uint64_t row_count, uint32_t cols, void *out)
{
    if (cols > self->cols_max) {
        const enum odsi_err err = alloc_resize(
            &self->rows, (size_t)pool_thread_count(self->pool) * cols, sizeof *self->rows);
        if (err != ODSI_OK)
            return err;
        self->cols_max = cols;
    }
    struct job job = {.from = from,
                      .in = in,
                      .type = type,
                      .out = out,
                      .row_count = row_count,
                      .cols = cols,
                      .rows = self->rows};
    return run_job(self, &job);
}
