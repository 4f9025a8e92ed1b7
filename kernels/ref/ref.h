/* The definition of every op in plain C, to be read beside kernels/ops.h: one row, one head or one
 * dot product at a time, in host memory, no layout but that of the source. All other
 * implementations must give these bits (tests/kernels/check_ops.c).
 *
 * Pure; any thread. Shapes and limits as in ops.h; nothing is checked here. */
#ifndef ODSI_KERNELS_REF_REF_H
#define ODSI_KERNELS_REF_REF_H
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* out[cols] = row (in its source layout) converted to f32. */
void ref_embed(float *out, enum tensor_type type, const void *row, uint32_t cols);

/* out[cols]; out may be x. */
void ref_rmsnorm(float *out, const float *x, const float *weight, uint32_t cols, float eps);

/* One activation row for a quantized product: q[cols] and one scale for each 32 columns. */
void ref_quantize(int8_t *q, float *scales, const float *x, uint32_t cols);

/* One element of a matmul: w is a row of the matrix in its source layout. */
float ref_dot_f32(const float *w, const float *x, uint32_t cols);
float ref_dot_f16(const uint16_t *w, const float *x, uint32_t cols);
float ref_dot_bf16(const uint16_t *w, const float *x, uint32_t cols);
float ref_dot_quant(enum tensor_type type, const void *w, const int8_t *q, const float *scales,
                    uint32_t cols);

/* One row x[cols] in place. */
void ref_add_bias(float *x, const float *bias, uint32_t cols);

/* One row x[heads][head_dim] in place; cos and sin are the table's rows of its position. */
void ref_rope(float *x, const float *cos, const float *sin, uint32_t half_dim,
              enum rope_style style, uint32_t heads, uint32_t head_dim);

/* to[count] = from[count] as the KV cache stores it. */
void ref_kv_round(uint16_t *to, const float *from, size_t count);

/* The first position that a row at position looks at. */
uint32_t ref_window_first(uint32_t position, uint32_t window);

/* One head of one row: out[head_dim] from q[head_dim] over the positions up to position of the
 * session whose pages page_table names. scratch holds a float for each position it looks at. */
void ref_attention(float *out, const float *q, const struct kv_pool *pool, uint32_t layer,
                   uint32_t kv_head, const uint32_t *page_table, uint32_t position,
                   const struct attention_params *params, float *scratch);

/* Where the vectors of one kv head begin in a page: [KV_PAGE_TOKENS][head_dim]. which: 0 keys,
 * 1 values. */
size_t ref_kv_offset(const struct kv_pool *pool, uint32_t page, uint32_t layer, uint32_t which,
                     uint32_t kv_head);

/* out[count]; out may be gate or up. */
void ref_act_mul(float *out, const float *gate, const float *up, size_t count, enum act_kind kind);

/* x[count] in place. */
void ref_scale(float *x, size_t count, float factor);
void ref_softcap(float *x, size_t count, float cap);

/* One row: ids[used] and weights[used] from logits[experts]. */
void ref_route(uint32_t *ids, float *weights, const float *logits, uint32_t experts, uint32_t used);

/* One row: out[cols] from y[used][cols]. */
void ref_combine(float *out, const float *y, const float *weights, uint32_t used, uint32_t cols);

/* out[count]; out may be a or b. */
void ref_add(float *out, const float *a, const float *b, size_t count);

/* 1 when no element is NaN or infinite. */
int ref_all_finite(const float *x, size_t count);

#ifdef __cplusplus
}
#endif
#endif
