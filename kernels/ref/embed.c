#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"

static void embed_quant(float *out, enum tensor_type type, const void *row, uint32_t cols)
{
    for (uint32_t b = 0; b < cols / OPS_BLOCK; b++) {
        struct quant_group group;
        quant_read(&group, type, row, b);
        for (uint32_t i = 0; i < OPS_BLOCK; i++) {
            const uint32_t g = i / group.group_cols;
            out[b * OPS_BLOCK + i] = det_fma(group.scale[g], (float)group.q[i], group.min[g]);
        }
    }
}

void ref_embed(float *out, enum tensor_type type, const void *row, uint32_t cols)
{
    const uint16_t *halves = row;
    switch (type) {
    case TENSOR_F32:
        memcpy(out, row, cols * sizeof *out);
        return;
    case TENSOR_F16:
        for (uint32_t c = 0; c < cols; c++)
            out[c] = det_f32_from_f16(halves[c]);
        return;
    case TENSOR_BF16:
        for (uint32_t c = 0; c < cols; c++)
            out[c] = det_f32_from_bf16(halves[c]);
        return;
    default:
        embed_quant(out, type, row, cols);
        return;
    }
}
