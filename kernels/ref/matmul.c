#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"

/* Below this an activation block counts as zero, so that 127 / amax cannot overflow. */
static const float amax_min = 0x1p-100f;

void ref_quantize(int8_t *q, float *scales, const float *x, uint32_t cols)
{
    for (uint32_t b = 0; b < cols / OPS_BLOCK; b++) {
        const float *block = x + (size_t)b * OPS_BLOCK;
        int8_t *to = q + (size_t)b * OPS_BLOCK;
        uint32_t amax_bits = 0; /* of |x|, bits order like values, NaN above infinity */
        for (uint32_t i = 0; i < OPS_BLOCK; i++) {
            const uint32_t bits = det_bits(block[i]) & 0x7fffffffu;
            amax_bits = bits > amax_bits ? bits : amax_bits;
        }
        const float amax = det_from_bits(amax_bits);
        if (!det_finite(amax) || amax < amax_min) {
            scales[b] = det_finite(amax) ? 0.0f : det_from_bits(0x7fc00000u);
            memset(to, 0, OPS_BLOCK);
            continue;
        }
        scales[b] = amax / 127.0f;
        const float inverse = 127.0f / amax;
        for (uint32_t i = 0; i < OPS_BLOCK; i++)
            to[i] = (int8_t)det_rint(block[i] * inverse);
    }
}

/* The end of strand s of count elements or blocks; its begin is the end of strand s - 1. */
static uint32_t strand_end(uint32_t strand, uint32_t count)
{
    const uint32_t length = (count + OPS_STRANDS - 1) / OPS_STRANDS;
    const uint32_t end = (strand + 1) * length;
    return end < count ? end : count;
}

float ref_dot_f32(const float *w, const float *x, uint32_t cols)
{
    float result = 0.0f;
    for (uint32_t strand = 0, c = 0; strand < OPS_STRANDS; strand++) {
        float sum = 0.0f;
        for (; c < strand_end(strand, cols); c++)
            sum = det_fma(w[c], x[c], sum);
        result += sum;
    }
    return result;
}

float ref_dot_f16(const uint16_t *w, const float *x, uint32_t cols)
{
    float result = 0.0f;
    for (uint32_t strand = 0, c = 0; strand < OPS_STRANDS; strand++) {
        float sum = 0.0f;
        for (; c < strand_end(strand, cols); c++)
            sum = det_fma(det_f32_from_f16(w[c]), x[c], sum);
        result += sum;
    }
    return result;
}

float ref_dot_bf16(const uint16_t *w, const float *x, uint32_t cols)
{
    float result = 0.0f;
    for (uint32_t strand = 0, c = 0; strand < OPS_STRANDS; strand++) {
        float sum = 0.0f;
        for (; c < strand_end(strand, cols); c++)
            sum = det_fma(det_f32_from_bf16(w[c]), x[c], sum);
        result += sum;
    }
    return result;
}

/* One block of 32 columns, whose activations have the scale d. */
static float add_block(float sum, const struct quant_group *w, const int8_t *q, float d)
{
    for (uint32_t first = 0, g = 0; first < OPS_BLOCK; first += w->group_cols, g++) {
        int32_t products = 0;
        int32_t total = 0;
        for (uint32_t i = first; i < first + w->group_cols; i++) {
            products += (int32_t)w->q[i] * q[i];
            total += q[i];
        }
        sum = det_fma((float)products, w->scale[g] * d, sum);
        if (w->has_min)
            sum = det_fma(w->min[g], (float)total * d, sum);
    }
    return sum;
}

float ref_dot_quant(enum tensor_type type, const void *w, const int8_t *q, const float *scales,
                    uint32_t cols)
{
    const uint32_t blocks = cols / OPS_BLOCK;
    float result = 0.0f;
    for (uint32_t strand = 0, b = 0; strand < OPS_STRANDS; strand++) {
        float sum = 0.0f;
        for (; b < strand_end(strand, blocks); b++) {
            struct quant_group group;
            quant_read(&group, type, w, b);
            sum = add_block(sum, &group, q + (size_t)b * OPS_BLOCK, scales[b]);
        }
        result += sum;
    }
    return result;
}
