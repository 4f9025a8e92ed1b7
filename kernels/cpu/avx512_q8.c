/* Q8_0 on AVX-512 VNNI. vpdpbusd multiplies unsigned by signed bytes, so weights are stored with
 * 128 added (xor 0x80) and each block's integer sum starts at -128 * sum(q) to take it off again:
 * exact, as all of it is integers. */
#include "kernels/cpu/avx512_loops.h"
#include "kernels/cpu/avx512_vec.inc"
#include "kernels/ref/ref.h"

#define Q8_GROUPS 2u
#define Q8_TOKENS 6u

struct q8_tile {
    const struct cpu_matmul *job;
    uint32_t group; /* the first of the tile's weight groups */
    uint32_t token; /* the first of its token rows */
    uint32_t block_first;
    uint32_t block_end;
};

SIMD_INLINE int32_t load_quad(const int8_t *from)
{
    int32_t quad;
    memcpy(&quad, from, sizeof quad);
    return quad;
}

/* sum[g][t]: the integer sums of block b. */
SIMD_INLINE void q8_block(VEC_INT sum[Q8_GROUPS][Q8_TOKENS], const struct q8_tile *tile, uint32_t b,
                          uint32_t groups, uint32_t tokens)
{
    const struct cpu_matmul *job = tile->job;
    const uint32_t cols = job->weight->cols;
    const uint32_t blocks = cols / OPS_BLOCK;
    const uint8_t *weights = job->weight->data;
    const int8_t *q = job->q + (size_t)tile->token * cols + (size_t)b * OPS_BLOCK;
    const int32_t *offsets = job->offsets + (size_t)tile->token * blocks + b;
    SIMD_UNROLL
    for (uint32_t t = 0; t < tokens; t++)
        SIMD_UNROLL
    for (uint32_t g = 0; g < groups; g++)
        sum[g][t] = _mm512_set1_epi32(offsets[(size_t)t * blocks]);
    SIMD_UNROLL
    for (uint32_t i = 0; i < OPS_BLOCK / 4; i++) {
        __m512i w[Q8_GROUPS];
        SIMD_UNROLL
        for (uint32_t g = 0; g < groups; g++) {
            const size_t block = (size_t)(tile->group + g) * blocks + b;
            w[g] = _mm512_loadu_si512(weights + (block * (OPS_BLOCK / 4) + i) * 64);
        }
        SIMD_UNROLL
        for (uint32_t t = 0; t < tokens; t++) {
            const __m512i x = _mm512_set1_epi32(load_quad(q + (size_t)t * cols + i * 4));
            SIMD_UNROLL
            for (uint32_t g = 0; g < groups; g++)
                sum[g][t] = _mm512_dpbusd_epi32(sum[g][t], w[g], x);
        }
    }
}

#include "kernels/cpu/simd_q8.inc"

static const float amax_min = 0x1p-100f;

void avx512_quantize(int8_t *q, float *scales, int32_t *offsets, const float *x, uint32_t cols)
{
    const __m512i magnitude_mask = _mm512_set1_epi32(INT32_MAX);
    for (uint32_t b = 0; b < cols / OPS_BLOCK; b++) {
        const VEC low = vec_load(x + (size_t)b * OPS_BLOCK);
        const VEC high = vec_load(x + (size_t)b * OPS_BLOCK + VEC_LANES);
        const __m512i low_bits = _mm512_and_si512(_mm512_castps_si512(low), magnitude_mask);
        const __m512i high_bits = _mm512_and_si512(_mm512_castps_si512(high), magnitude_mask);
        const float amax =
            det_from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(low_bits, high_bits)));
        float inverse = 0.0f;
        scales[b] = 0.0f;
        if (!det_finite(amax)) {
            scales[b] = det_from_bits(0x7fc00000u);
        } else if (amax >= amax_min) {
            scales[b] = amax / 127.0f;
            inverse = 127.0f / amax;
        }
        __m512i low_q = _mm512_setzero_si512();
        __m512i high_q = _mm512_setzero_si512();
        if (inverse != 0.0f) {
            low_q = _mm512_cvtps_epi32(vec_mul(low, vec_set1(inverse)));
            high_q = _mm512_cvtps_epi32(vec_mul(high, vec_set1(inverse)));
        }
        __m128i *to = (__m128i *)(void *)(q + (size_t)b * OPS_BLOCK);
        _mm_storeu_si128(to, _mm512_cvtepi32_epi8(low_q));
        _mm_storeu_si128(to + 1, _mm512_cvtepi32_epi8(high_q));
        offsets[b] = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(low_q, high_q));
    }
}
