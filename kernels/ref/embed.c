#include "kernels/det.h"
#include "kernels/ref/ref.h"

size_t ref_row_size(enum tensor_type type, uint32_t cols)
{
    if (type == TENSOR_F32)
        return (size_t)cols * sizeof(float);
    if (type == TENSOR_F16)
        return (size_t)cols * sizeof(uint16_t);
    return (size_t)cols / OPS_BLOCK * REF_Q8_BLOCK_SIZE;
}

static void embed_q8(float *out, const uint8_t *row, uint32_t cols)
{
    for (uint32_t b = 0; b < cols / OPS_BLOCK; b++) {
        const uint8_t *block = row + (size_t)b * REF_Q8_BLOCK_SIZE;
        uint16_t scale;
        memcpy(&scale, block, sizeof scale);
        for (uint32_t i = 0; i < OPS_BLOCK; i++)
            out[b * OPS_BLOCK + i] = det_f32_from_f16(scale) * (float)(int8_t)block[2 + i];
    }
}

void ref_embed(float *out, enum tensor_type type, const void *row, uint32_t cols)
{
    if (type == TENSOR_F32) {
        memcpy(out, row, ref_row_size(type, cols));
    } else if (type == TENSOR_F16) {
        const uint16_t *halves = row;
        for (uint32_t c = 0; c < cols; c++)
            out[c] = det_f32_from_f16(halves[c]);
    } else {
        embed_q8(out, row, cols);
    }
}
