#include "kernels/det.h"
#include "kernels/ref/ref.h"

void ref_silu_mul(float *out, const float *gate, const float *up, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = (gate[i] / (1.0f + det_exp(-gate[i]))) * up[i];
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
