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

#define REF_Q8_BLOCK_SIZE 34u /* bytes of a Q8_0 block in its source: f16 scale, 32 int8 */

/* Bytes of one row of cols elements in its source. */
size_t ref_row_size(enum tensor_type type, uint32_t cols);

/* out[cols] = row (in its source layout) converted to f32. */
void ref_embed(float *out, enum tensor_type type, const void *row, uint32_t cols);

/* out[cols]; out may be x. */
void ref_rmsnorm(float *out, const float *x, const float *weight, uint32_t cols, float eps);

/* One activation row for a Q8_0 product: q[cols] and one scale for each 32 columns. */
void ref_quantize(int8_t *q, float *scales, const float *x, uint32_t cols);

/* One element of a matmul: w is a row of the matrix in its source layout. */
float ref_dot_f32(const float *w, const float *x, uint32_t cols);
float ref_dot_f16(const uint16_t *w, const float *x, uint32_t cols);
float ref_dot_q8(const uint8_t *w, const int8_t *q, const float *scales, uint32_t cols);

/* One row x[heads][head_dim] in place; cos and sin are the table's rows of its position. */
void ref_rope(float *x, const float *cos, const float *sin, uint32_t heads, uint32_t head_dim);

/* to[count] = from[count] as the KV cache stores it. */
void ref_kv_round(uint16_t *to, const float *from, size_t count);

/* One head of one row: out[head_dim] from q[head_dim] over positions 0..position of the session
 * whose pages page_table names. scratch holds position + 1 floats. */
void ref_attention(float *out, const float *q, const struct kv_pool *pool, uint32_t layer,
                   uint32_t kv_head, const uint32_t *page_table, uint32_t position, float *scratch);

/* Where the vectors of one kv head begin in a page: [KV_PAGE_TOKENS][head_dim]. which: 0 keys,
 * 1 values. */
size_t ref_kv_offset(const struct kv_pool *pool, uint32_t page, uint32_t layer, uint32_t which,
                     uint32_t kv_head);

/* out[count]; out may be gate or up. */
void ref_silu_mul(float *out, const float *gate, const float *up, size_t count);

/* out[count]; out may be a or b. */
void ref_add(float *out, const float *a, const float *b, size_t count);

/* 1 when no element is NaN or infinite. */
int ref_all_finite(const float *x, size_t count);

#ifdef __cplusplus
}
#endif
#endif
