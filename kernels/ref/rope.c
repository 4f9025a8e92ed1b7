#include "kernels/det.h"
#include "kernels/ref/ref.h"

void ref_rope(float *x, const float *cos, const float *sin, uint32_t half_dim,
              enum rope_style style, uint32_t heads, uint32_t head_dim)
{
    const uint32_t step = style == ROPE_PAIRS ? 2 : 1;
    const uint32_t apart = style == ROPE_PAIRS ? 1 : half_dim;
    for (uint32_t h = 0; h < heads; h++) {
        float *head = x + (size_t)h * head_dim;
        for (uint32_t i = 0; i < half_dim; i++) {
            float *first = head + (size_t)i * step;
            float *second = first + apart;
            const float a = *first;
            const float b = *second;
            *first = det_fma(a, cos[i], -(b * sin[i]));
            *second = det_fma(a, sin[i], b * cos[i]);
        }
    }
}
