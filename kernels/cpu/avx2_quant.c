/* Quantized types on AVX2. vpmaddubsw multiplies unsigned by signed bytes and adds pairs of them in
 * 16 bits. Types of at most 6 bits keep the bias that makes them unsigned, as on AVX-512, and as
 * many pairs are added in 16 bits as surely fit. Bytes of 8-bit types are signed: |w| is multiplied
 * with x that took the sign of w, at most 2 * 128 * 127 = 32512. */
#include "common/base/assert.h"
#include "kernels/cpu/avx2_loops.h"
#include "kernels/cpu/avx2_vec.inc"
#include "kernels/cpu/cpu_format.h"

#define QUANT_GROUPS  1u
#define PANEL_TOKENS  4u
#define DIRECT_TOKENS 4u
#define DIRECT_ROWS   8u

#define HAS_OFFSETS(type) (!cpu_format_of(type).has_min && cpu_format_of(type).low_bits < 8)

SIMD_INLINE VEC_INT int_load(const uint8_t *from)
{
    return _mm256_loadu_si256((const void *)from);
}

SIMD_INLINE void int_store(uint8_t *to, VEC_INT value)
{
    _mm256_storeu_si256((void *)to, value);
}

SIMD_INLINE VEC_INT int_set1(int32_t value)
{
    return _mm256_set1_epi32(value);
}

SIMD_INLINE VEC_INT bits_right(VEC_INT a, uint32_t count)
{
    return count == 0 ? a : _mm256_srli_epi16(a, (int)count);
}

SIMD_INLINE VEC_INT bits_left(VEC_INT a, uint32_t count)
{
    return count == 0 ? a : _mm256_slli_epi16(a, (int)count);
}

SIMD_INLINE VEC_INT bits_and(VEC_INT a, int mask)
{
    return _mm256_and_si256(a, _mm256_set1_epi8((char)mask));
}

SIMD_INLINE VEC_INT bits_join(VEC_INT a, VEC_INT b, int mask)
{
    return _mm256_or_si256(a, bits_and(b, mask));
}

SIMD_INLINE VEC bytes_unsigned(const uint8_t *from, int shift, int mask)
{
    __m128i bytes = _mm_loadl_epi64((const void *)from);
    if (shift > 0)
        bytes = _mm_srli_epi16(bytes, shift);
    if (mask < 255)
        bytes = _mm_and_si128(bytes, _mm_set1_epi8((char)mask));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

SIMD_INLINE VEC bytes_signed(const uint8_t *from)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)from)));
}

/* Products of the last quads, in pairs of 16 bits. */
struct pairs {
    VEC_INT sum;
};

/* Additions stay a chain: as the tree that compilers like to make of them, they would need more
 * registers than there are. */
SIMD_INLINE VEC_INT in_chain(VEC_INT sum)
{
    __asm__("" : "+x"(sum));
    return sum;
}

/* How many quads fit: 2 * 127 * (2^bits - 1) each, below 2^15 together. */
SIMD_INLINE uint32_t pairs_max(enum tensor_type type)
{
    const uint32_t bits = cpu_format_bits(type);
    return bits == 8 ? 1 : bits == 6 ? 2 : bits == 5 ? 4 : 8;
}

SIMD_INLINE VEC_INT quads_dot(VEC_INT sum, struct pairs *pairs, VEC_INT quad, VEC_INT value,
                              uint32_t i, uint32_t quads, enum tensor_type type)
{
    const uint32_t most = pairs_max(type);
    if (cpu_format_bits(type) == 8)
        pairs->sum = _mm256_maddubs_epi16(_mm256_abs_epi8(quad), _mm256_sign_epi8(value, quad));
    else if (i % most == 0)
        pairs->sum = _mm256_maddubs_epi16(quad, value);
    else
        pairs->sum = in_chain(_mm256_add_epi16(pairs->sum, _mm256_maddubs_epi16(quad, value)));
    if ((i + 1) % most != 0 && i + 1 != quads)
        return sum;
    return in_chain(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs->sum, _mm256_set1_epi16(1))));
}

#include "kernels/cpu/simd_quant.inc"

/* Panels differ in the bits that go into a product, in how many groups of columns a block has and
 * in whether there are minimums. */
#define PANEL_TILES(type)                                                                          \
    PANEL_TILE(type, 1, 2)                                                                         \
    PANEL_TILE(type, 1, 3)                                                                         \
    PANEL_TILE(type, 1, 4)
PANEL_TILES(Q4_0)
PANEL_TILES(Q4_1)
PANEL_TILES(Q5_0)
PANEL_TILES(Q5_1)
PANEL_TILES(Q8_0)
PANEL_TILES(Q2_K)
PANEL_TILES(Q3_K)
PANEL_TILES(Q6_K)

#define TILES(type, panel_type)                                                                    \
    DIRECT_TILE(type, 1)                                                                           \
    DIRECT_TILE(type, 2)                                                                           \
    DIRECT_TILE(type, 3)                                                                           \
    DIRECT_TILE(type, 4)                                                                           \
    PANEL_FILL(type)                                                                               \
    static const struct quant_tiles tiles_##type = {                                               \
        {direct_##type##_1, direct_##type##_2, direct_##type##_3, direct_##type##_4},              \
        {{NULL, panel_##panel_type##_1_2, panel_##panel_type##_1_3, panel_##panel_type##_1_4}},    \
        fill_##type};
TILES(Q4_0, Q4_0)
TILES(Q4_1, Q4_1)
TILES(Q5_0, Q5_0)
TILES(Q5_1, Q5_1)
TILES(Q8_0, Q8_0)
TILES(Q2_K, Q2_K)
TILES(Q3_K, Q3_K)
TILES(Q4_K, Q4_1)
TILES(Q5_K, Q5_1)
TILES(Q6_K, Q6_K)

QUANT_MATMUL

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

void avx2_quantize(const struct cpu_quants *to, uint32_t row, const float *x, uint32_t cols)
{
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (uint32_t b = 0; b < cols / OPS_BLOCK; b++) {
        const size_t at = (size_t)b * to->stride + row;
        VEC value[4];
        SIMD_UNROLL
        for (uint32_t i = 0; i < 4; i++)
            value[i] = vec_load(x + (size_t)b * OPS_BLOCK + i * VEC_LANES);
        const float amax = largest_magnitude(value);
        __m256i bytes = _mm256_setzero_si256();
        if (!det_finite(amax) || amax < amax_min) {
            to->scales[at] = det_finite(amax) ? 0.0f : det_from_bits(0x7fc00000u);
        } else {
            const VEC inverse = vec_set1(127.0f / amax);
            to->scales[at] = amax / 127.0f;
            __m256i whole[4];
            SIMD_UNROLL
            for (uint32_t i = 0; i < 4; i++)
                whole[i] = _mm256_cvtps_epi32(vec_mul(value[i], inverse));
            const __m256i low = _mm256_packs_epi32(whole[0], whole[1]);
            const __m256i high = _mm256_packs_epi32(whole[2], whole[3]);
            bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
        }
        _mm256_storeu_si256((void *)(to->q + at * OPS_BLOCK), bytes);
        quants_sums(to, b, row, bytes);
    }
}
