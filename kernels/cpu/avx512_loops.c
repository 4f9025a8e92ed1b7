#include "kernels/cpu/avx512_loops.h"

void avx512_loops_fill(struct cpu_loops *loops)
{
    loops->group_rows = 16;
    loops->quant_flip = 0x80;
    loops->rmsnorm = avx512_rmsnorm;
    loops->quantize = avx512_quantize;
    loops->matmul_f32 = avx512_matmul_f32;
    loops->matmul_f16 = avx512_matmul_f16;
    loops->matmul_bf16 = avx512_matmul_bf16;
    loops->matmul_quant = avx512_matmul_quant;
    loops->kv_round = avx512_kv_round;
    loops->attention = avx512_attention;
    loops->act_mul = avx512_act_mul;
    loops->scale = avx512_scale;
    loops->softcap = avx512_softcap;
    loops->add = avx512_add;
    loops->add_bias = avx512_add_bias;
    loops->combine = avx512_combine;
    loops->rope = avx512_rope;
    loops->route = avx512_route;
}
