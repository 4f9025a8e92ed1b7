/* The scalar loops: the reference, called piece by piece. */
#include "kernels/cpu/cpu_loops.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"

static void quantize(const struct cpu_quants *to, uint32_t row, const float *x, uint32_t cols)
{
    ref_quantize(to->q + (size_t)row * cols, to->scales + (size_t)row * (cols / OPS_BLOCK), x,
                 cols);
}

/* Where the product of weight row r and token row t goes. */
static float *out_at(const struct cpu_matmul *job, uint32_t r, uint32_t t)
{
    return job->out + cpu_matmul_out_row(job, t) * job->weight->rows + r;
}

static void matmul_f32(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                       void *panel)
{
    const uint32_t cols = job->weight->cols;
    (void)panel;
    for (uint32_t r = group_first; r < group_end; r++) {
        const float *w = (const float *)(const void *)job->weight->data + (size_t)r * cols;
        for (uint32_t t = 0; t < job->rows; t++)
            *out_at(job, r, t) = ref_dot_f32(w, job->x + (size_t)t * cols, cols);
    }
}

static void matmul_f16(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                       void *panel)
{
    const uint32_t cols = job->weight->cols;
    (void)panel;
    for (uint32_t r = group_first; r < group_end; r++) {
        const uint16_t *w = (const uint16_t *)(const void *)job->weight->data + (size_t)r * cols;
        for (uint32_t t = 0; t < job->rows; t++)
            *out_at(job, r, t) = ref_dot_f16(w, job->x + (size_t)t * cols, cols);
    }
}

static void matmul_bf16(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                        void *panel)
{
    const uint32_t cols = job->weight->cols;
    (void)panel;
    for (uint32_t r = group_first; r < group_end; r++) {
        const uint16_t *w = (const uint16_t *)(const void *)job->weight->data + (size_t)r * cols;
        for (uint32_t t = 0; t < job->rows; t++)
            *out_at(job, r, t) = ref_dot_bf16(w, job->x + (size_t)t * cols, cols);
    }
}

static void matmul_quant(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                         void *panel)
{
    const struct weight *weight = job->weight;
    const uint32_t cols = weight->cols;
    const size_t row_size = quant_row_size(weight->type, cols);
    (void)panel;
    for (uint32_t r = group_first; r < group_end; r++) {
        const uint8_t *w = weight->data + r * row_size;
        for (uint32_t t = 0; t < job->rows; t++)
            *out_at(job, r, t) =
                ref_dot_quant(weight->type, w, job->quants.q + (size_t)t * cols,
                              job->quants.scales + (size_t)t * (cols / OPS_BLOCK), cols);
    }
}

static void attention(const struct cpu_attention *job)
{
    const size_t head_dim = job->pool->head_dim;
    for (uint32_t r = 0; r < job->rows; r++) {
        for (uint32_t h = job->head_first; h < job->head_first + job->head_count; h++) {
            const size_t at = ((size_t)r * job->params->heads + h) * head_dim;
            ref_attention(job->out + at, job->q + at, job->pool, job->layer, job->kv_head,
                          job->page_table, job->position[r], job->params, job->scratch);
        }
    }
}

void scalar_loops_fill(struct cpu_loops *loops)
{
    loops->group_rows = 1;
    loops->quant_flip = 0;
    loops->rmsnorm = ref_rmsnorm;
    loops->quantize = quantize;
    loops->matmul_f32 = matmul_f32;
    loops->matmul_f16 = matmul_f16;
    loops->matmul_bf16 = matmul_bf16;
    loops->matmul_quant = matmul_quant;
    loops->add_bias = ref_add_bias;
    loops->rope = ref_rope;
    loops->kv_round = ref_kv_round;
    loops->attention = attention;
    loops->act_mul = ref_act_mul;
    loops->scale = ref_scale;
    loops->softcap = ref_softcap;
    loops->route = ref_route;
    loops->combine = ref_combine;
    loops->add = ref_add;
    loops->all_finite = ref_all_finite;
}
