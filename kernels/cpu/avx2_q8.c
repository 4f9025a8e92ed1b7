/* Q8_0 on AVX2. vpmaddubsw multiplies unsigned by signed bytes and adds pairs in 16 bits, so it
 * gets |w| and x with the sign of w: at most 2 * 128 * 127 = 32512, which never saturates. */
#include "kernels/cpu/avx2_loops.h"
#include "kernels/cpu/avx2_vec.inc"
#include "kernels/ref/ref.h"

#define Q8_GROUPS      1u
#define PREFETCH_AHEAD 4096 /* bytes; past the end is harmless */
#define Q8_TOKENS      4u

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
    const __m256i ones = _mm256_set1_epi16(1);
    SIMD_UNROLL
    for (uint32_t t = 0; t < tokens; t++)
        SIMD_UNROLL
    for (uint32_t g = 0; g < groups; g++)
        sum[g][t] = _mm256_setzero_si256();
    SIMD_UNROLL
    for (uint32_t i = 0; i < OPS_BLOCK / 4; i++) {
        SIMD_UNROLL
        for (uint32_t g = 0; g < groups; g++) {
            const size_t block = (size_t)(tile->group + g) * blocks + b;
            const uint8_t *at = weights + (block * (OPS_BLOCK / 4) + i) * 32;
            const __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)at);
            if (tokens == 1 && i % 2 == 0) /* the stream of a decode */
                _mm_prefetch((const char *)at + PREFETCH_AHEAD, _MM_HINT_T0);
            const __m256i magnitude = _mm256_abs_epi8(w);
            SIMD_UNROLL
            for (uint32_t t = 0; t < tokens; t++) {
                const __m256i x = _mm256_set1_epi32(load_quad(q + (size_t)t * cols + i * 4));
                const __m256i pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(x, w));
                sum[g][t] = _mm256_add_epi32(sum[g][t], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
}

#include "kernels/cpu/simd_q8.inc"

static const float amax_min = 0x1p-100f;

static float largest_magnitude(const VEC value[4])
{
    const __m256i mask = _mm256_set1_epi32(INT32_MAX);
    __m256i most = _mm256_setzero_si256(); /* magnitudes order like their bits, NaN highest */
    SIMD_UNROLL
    for (uint32_t i = 0; i < 4; i++)
        most = _mm256_max_epu32(most, _mm256_and_si256(_mm256_castps_si256(value[i]), mask));
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1));
    return det_from_bits((uint32_t)_mm_cvtsi128_si32(half));
}

void avx2_quantize(int8_t *q, float *scales, int32_t *offsets, const float *x, uint32_t cols)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    (void)offsets;
    for (uint32_t b = 0; b < cols / OPS_BLOCK; b++) {
        VEC value[4];
        SIMD_UNROLL
        for (uint32_t i = 0; i < 4; i++)
            value[i] = vec_load(x + (size_t)b * OPS_BLOCK + i * VEC_LANES);
        const float amax = largest_magnitude(value);
        __m256i *to = (__m256i *)(void *)(q + (size_t)b * OPS_BLOCK);
        if (!det_finite(amax) || amax < amax_min) {
            scales[b] = det_finite(amax) ? 0.0f : det_from_bits(0x7fc00000u);
            _mm256_storeu_si256(to, _mm256_setzero_si256());
            continue;
        }
        const VEC inverse = vec_set1(127.0f / amax);
        scales[b] = amax / 127.0f;
        __m256i whole[4];
        SIMD_UNROLL
        for (uint32_t i = 0; i < 4; i++)
            whole[i] = _mm256_cvtps_epi32(vec_mul(value[i], inverse));
        const __m256i low = _mm256_packs_epi32(whole[0], whole[1]);
        const __m256i high = _mm256_packs_epi32(whole[2], whole[3]);
        const __m256i bytes = _mm256_packs_epi16(low, high);
        _mm256_storeu_si256(to, _mm256_permutevar8x32_epi32(bytes, order));
    }
}
