#include "kernels/det.h"
#include "kernels/ref/ref.h"

static const uint32_t quiet_nan_bits = 0x7fc00000u;

void ref_rmsnorm(float *out, const float *x, const float *weight, uint32_t cols, float eps)
{
    float lane[OPS_LANES] = {0};
    for (uint32_t c = 0; c < cols; c++)
        lane[c % OPS_LANES] = det_fma(x[c], x[c], lane[c % OPS_LANES]);
    for (uint32_t width = OPS_LANES / 2; width > 0; width /= 2)
        for (uint32_t i = 0; i < width; i++)
            lane[i] += lane[i + width];

    const float mean = lane[0] / (float)cols;
    const float scale =
        det_finite(mean) ? 1.0f / det_sqrt(mean + eps) : det_from_bits(quiet_nan_bits);
    for (uint32_t c = 0; c < cols; c++)
        out[c] = (x[c] * scale) * weight[c];
}
