/* The reference and its scalar loops once more, compiled with the fused multiply-add instruction
 * where the processor has one. The bits are those of the plain build by definition of fma; there,
 * each fma is a call into the C library, some twenty times slower. */
#if defined(__x86_64__) || defined(__i386__)
#define ref_embed         fma_embed
#define ref_rmsnorm       fma_rmsnorm
#define ref_quantize      fma_quantize
#define ref_dot_f32       fma_dot_f32
#define ref_dot_f16       fma_dot_f16
#define ref_dot_bf16      fma_dot_bf16
#define ref_dot_quant     fma_dot_quant
#define ref_add_bias      fma_add_bias
#define ref_rope          fma_rope
#define ref_kv_round      fma_kv_round
#define ref_kv_offset     fma_kv_offset
#define ref_attention     fma_attention
#define ref_window_first  fma_window_first
#define ref_act_mul       fma_act_mul
#define ref_scale         fma_scale
#define ref_softcap       fma_softcap
#define ref_route         fma_route
#define ref_combine       fma_combine
#define ref_add           fma_add
#define ref_all_finite    fma_all_finite
#define scalar_loops_fill fma_loops_fill

#include "kernels/cpu/scalar_loops.c"
#include "kernels/ref/act.c"
#include "kernels/ref/attention.c"
#include "kernels/ref/embed.c"
#include "kernels/ref/matmul.c"
#include "kernels/ref/norm.c"
#include "kernels/ref/rope.c"
#include "kernels/ref/route.c"
#endif
