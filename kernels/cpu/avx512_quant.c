/* Quantized types on AVX-512 VNNI. vpdpbusd multiplies unsigned by signed bytes, so weights keep
 * the bias that makes them unsigned and each integer sum starts at -bias * sum(q) to take it off
 * again: exact, as all of it is integers. */
#include "common/base/assert.h"
#include "kernels/cpu/avx512_loops.h"
#include "kernels/cpu/avx512_vec.inc"
#include "kernels/cpu/cpu_format.h"

#define QUANT_GROUPS  2u
#define PANEL_TOKENS  6u
#define DIRECT_TOKENS 8u
#define DIRECT_ROWS   16u

#define HAS_OFFSETS(type) (!cpu_format_of(type).has_min)

SIMD_INLINE VEC_INT int_load(const uint8_t *from)
{
    return _mm512_loadu_si512(from);
}

SIMD_INLINE void int_store(uint8_t *to, VEC_INT value)
{
    _mm512_storeu_si512(to, value);
}

SIMD_INLINE VEC_INT int_set1(int32_t value)
{
    return _mm512_set1_epi32(value);
}

SIMD_INLINE VEC_INT bits_right(VEC_INT a, uint32_t count)
{
    return count == 0 ? a : _mm512_srli_epi16(a, count);
}

SIMD_INLINE VEC_INT bits_left(VEC_INT a, uint32_t count)
{
    return count == 0 ? a : _mm512_slli_epi16(a, count);
}

SIMD_INLINE VEC_INT bits_and(VEC_INT a, int mask)
{
    return _mm512_and_si512(a, _mm512_set1_epi8((char)mask));
}

SIMD_INLINE VEC_INT bits_join(VEC_INT a, VEC_INT b, int mask)
{
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi8((char)mask), 0xf8);
}

SIMD_INLINE VEC bytes_unsigned(const uint8_t *from, int shift, int mask)
{
    __m128i bytes = _mm_loadu_si128((const void *)from);
    if (shift > 0)
        bytes = _mm_srli_epi16(bytes, shift);
    if (mask < 255)
        bytes = _mm_and_si128(bytes, _mm_set1_epi8((char)mask));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

SIMD_INLINE VEC bytes_signed(const uint8_t *from)
{
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)from)));
}

/* Nothing to keep between quads: one instruction adds four products to 32 bits. */
struct pairs {
    char unused;
};

SIMD_INLINE VEC_INT quads_dot(VEC_INT sum, struct pairs *pairs, VEC_INT quad, VEC_INT value,
                              uint32_t i, uint32_t quads, enum tensor_type type)
{
    (void)pairs;
    (void)i;
    (void)quads;
    (void)type;
    return _mm512_dpbusd_epi32(sum, quad, value);
}

#include "kernels/cpu/simd_quant.inc"

/* Panels differ in how many groups of columns a block has and whether there are minimums. */
#define PANEL_TILES(type)                                                                          \
    PANEL_TILE(type, 1, 4)                                                                         \
    PANEL_TILE(type, 1, 5)                                                                         \
    PANEL_TILE(type, 1, 6)                                                                         \
    PANEL_TILE(type, 2, 4)                                                                         \
    PANEL_TILE(type, 2, 5)                                                                         \
    PANEL_TILE(type, 2, 6)
PANEL_TILES(Q8_0)
PANEL_TILES(Q4_1)
PANEL_TILES(Q6_K)
PANEL_TILES(Q2_K)

#define TILES(type, panel_type)                                                                    \
    DIRECT_TILE(type, 1)                                                                           \
    DIRECT_TILE(type, 2)                                                                           \
    DIRECT_TILE(type, 3)                                                                           \
    DIRECT_TILE(type, 4)                                                                           \
    DIRECT_TILE(type, 5)                                                                           \
    DIRECT_TILE(type, 6)                                                                           \
    DIRECT_TILE(type, 7)                                                                           \
    DIRECT_TILE(type, 8)                                                                           \
    PANEL_FILL(type)                                                                               \
    static const struct quant_tiles tiles_##type = {                                               \
        {direct_##type##_1, direct_##type##_2, direct_##type##_3, direct_##type##_4,               \
         direct_##type##_5, direct_##type##_6, direct_##type##_7, direct_##type##_8},              \
        {{NULL, NULL, NULL, panel_##panel_type##_1_4, panel_##panel_type##_1_5,                    \
          panel_##panel_type##_1_6},                                                               \
         {NULL, NULL, NULL, panel_##panel_type##_2_4, panel_##panel_type##_2_5,                    \
          panel_##panel_type##_2_6}},                                                              \
        fill_##type};
TILES(Q4_0, Q8_0)
TILES(Q4_1, Q4_1)
TILES(Q5_0, Q8_0)
TILES(Q5_1, Q4_1)
TILES(Q8_0, Q8_0)
TILES(Q2_K, Q2_K)
TILES(Q3_K, Q6_K)
TILES(Q4_K, Q4_1)
TILES(Q5_K, Q4_1)
TILES(Q6_K, Q6_K)

QUANT_MATMUL

static const float amax_min = 0x1p-100f;

void avx512_quantize(const struct cpu_quants *to, uint32_t row, const float *x, uint32_t cols)
{
    const __m512i magnitude_mask = _mm512_set1_epi32(INT32_MAX);
    for (uint32_t b = 0; b < cols / OPS_BLOCK; b++) {
        const size_t at = (size_t)b * to->stride + row;
        const VEC low = vec_load(x + (size_t)b * OPS_BLOCK);
        const VEC high = vec_load(x + (size_t)b * OPS_BLOCK + VEC_LANES);
        const __m512i low_bits = _mm512_and_si512(_mm512_castps_si512(low), magnitude_mask);
        const __m512i high_bits = _mm512_and_si512(_mm512_castps_si512(high), magnitude_mask);
        const float amax =
            det_from_bits(_mm512_reduce_max_epu32(_mm512_max_epu32(low_bits, high_bits)));
        float inverse = 0.0f;
        to->scales[at] = 0.0f;
        if (!det_finite(amax)) {
            to->scales[at] = det_from_bits(0x7fc00000u);
        } else if (amax >= amax_min) {
            to->scales[at] = amax / 127.0f;
            inverse = 127.0f / amax;
        }
        __m512i low_q = _mm512_setzero_si512();
        __m512i high_q = _mm512_setzero_si512();
        if (inverse != 0.0f) {
            low_q = _mm512_cvtps_epi32(vec_mul(low, vec_set1(inverse)));
            high_q = _mm512_cvtps_epi32(vec_mul(high, vec_set1(inverse)));
        }
        const __m256i bytes =
            _mm256_set_m128i(_mm512_cvtepi32_epi8(high_q), _mm512_cvtepi32_epi8(low_q));
        _mm256_storeu_si256((void *)(to->q + at * OPS_BLOCK), bytes);
        quants_sums(to, b, row, bytes);
    }
}
