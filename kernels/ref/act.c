#include "kernels/det.h"
#include "kernels/ref/ref.h"

static float silu(float x)
{
    return x / (1.0f + det_exp(-x));
}

static float gelu_tanh(float x)
{
    const float inner = det_fma(DET_GELU_CUBE * x, x, 1.0f);
    return (0.5f * x) * (1.0f + det_tanh((DET_GELU_SCALE * x) * inner));
}

void ref_act_mul(float *out, const float *gate, const float *up, size_t count, enum act_kind kind)
{
    for (size_t i = 0; i < count; i++)
        out[i] = (kind == ACT_SILU ? silu(gate[i]) : gelu_tanh(gate[i])) * up[i];
}

void ref_scale(float *x, size_t count, float factor)
{
    for (size_t i = 0; i < count; i++)
        x[i] = x[i] * factor;
}

void ref_softcap(float *x, size_t count, float cap)
{
    for (size_t i = 0; i < count; i++)
        x[i] = det_softcap(x[i], cap);
}

void ref_add_bias(float *x, const float *bias, uint32_t cols)
{
    for (uint32_t c = 0; c < cols; c++)
        x[c] = (x[c] + bias[c]) + 0.0f;
}

void ref_add(float *out, const float *a, const float *b, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = (a[i] + b[i]) + 0.0f;
}

int ref_all_finite(const float *x, size_t count)
{
    uint32_t largest = 0;
    for (size_t i = 0; i < count; i++) {
        const uint32_t magnitude = det_bits(x[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest < 0x7f800000u;
}
