#include "kernels/det.h"
#include "kernels/ref/ref.h"

void ref_rope(float *x, const float *cos, const float *sin, uint32_t heads, uint32_t head_dim)
{
    for (uint32_t h = 0; h < heads; h++) {
        float *head = x + (size_t)h * head_dim;
        for (uint32_t i = 0; i < head_dim / 2; i++) {
            const float a = head[2 * i];
            const float b = head[2 * i + 1];
            head[2 * i] = det_fma(a, cos[i], -(b * sin[i]));
            head[2 * i + 1] = det_fma(a, sin[i], b * cos[i]);
        }
    }
}
