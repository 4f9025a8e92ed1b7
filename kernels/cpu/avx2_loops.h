/* The loops of struct cpu_loops (kernels/cpu/cpu_loops.h) in AVX2 with FMA and F16C, bit for
 * bit those of kernels/ref. Only for processors that cpu_level_lacks has nothing against. */
#ifndef ODSI_KERNELS_CPU_AVX2_LOOPS_H
#define ODSI_KERNELS_CPU_AVX2_LOOPS_H
#include "kernels/cpu/cpu_loops.h"

void avx2_rmsnorm(float *out, const float *x, const float *weight, uint32_t cols, float eps);
void avx2_quantize(const struct cpu_quants *to, uint32_t row, const float *x, uint32_t cols);
void avx2_matmul_f32(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                     void *panel);
void avx2_matmul_f16(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                     void *panel);
void avx2_matmul_bf16(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                      void *panel);
void avx2_matmul_quant(const struct cpu_matmul *job, uint32_t group_first, uint32_t group_end,
                       void *panel);
void avx2_kv_round(uint16_t *to, const float *from, size_t count);
void avx2_attention(const struct cpu_attention *job);
void avx2_act_mul(float *out, const float *gate, const float *up, size_t count, enum act_kind kind);
void avx2_scale(float *x, size_t count, float factor);
void avx2_softcap(float *x, size_t count, float cap);
void avx2_add(float *out, const float *a, const float *b, size_t count);
void avx2_add_bias(float *x, const float *bias, uint32_t cols);
void avx2_combine(float *out, const float *y, const float *weights, uint32_t used, uint32_t cols);
void avx2_rope(float *x, const float *cos, const float *sin, uint32_t half_dim,
               enum rope_style style, uint32_t heads, uint32_t head_dim);
void avx2_route(uint32_t *ids, float *weights, const float *logits, uint32_t experts,
                uint32_t used);
#endif
