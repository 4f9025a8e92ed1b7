#include "kernels/cpu/avx2_loops.h"

void avx2_loops_fill(struct cpu_loops *loops)
{
    loops->group_rows = 8;
    loops->quant_flip = 0;
    loops->rmsnorm = avx2_rmsnorm;
    loops->quantize = avx2_quantize;
    loops->matmul_f32 = avx2_matmul_f32;
    loops->matmul_f16 = avx2_matmul_f16;
    loops->matmul_bf16 = avx2_matmul_bf16;
    loops->matmul_quant = avx2_matmul_quant;
    loops->kv_round = avx2_kv_round;
    loops->attention = avx2_attention;
    loops->act_mul = avx2_act_mul;
    loops->scale = avx2_scale;
    loops->softcap = avx2_softcap;
    loops->add = avx2_add;
    loops->add_bias = avx2_add_bias;
    loops->combine = avx2_combine;
    loops->rope = avx2_rope;
    loops->route = avx2_route;
}
