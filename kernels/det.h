/* Arithmetic with one meaning for C and CUDA: the functions that a maths library would answer
 * differently on every machine (NUMERICS.md, "Functions"). Pure; any thread. */
#ifndef ODSI_KERNELS_DET_H
#define ODSI_KERNELS_DET_H
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define DET_INLINE static __host__ __device__ inline
#else
#define DET_INLINE static inline
#endif

/* Fused multiply-add, rounded once. */
DET_INLINE float det_fma(float a, float b, float c)
{
    return __builtin_fmaf(a, b, c);
}

/* Rounded once. A negative argument is answered with a NaN. */
DET_INLINE float det_sqrt(float value)
{
    return __builtin_sqrtf(value);
}

DET_INLINE uint32_t det_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

DET_INLINE float det_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* 0 for NaN and infinities. */
DET_INLINE int det_finite(float value)
{
    return (det_bits(value) & 0x7f800000u) != 0x7f800000u;
}

/* Rounds to the nearest integer, ties to even; exact for |value| < 2^22. */
DET_INLINE float det_rint(float value)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23 */
    return (value + magic) - magic;
}

/* The constants of det_exp, for the vector versions of it as well. C2 to C6 were fitted by least
 * relative error over |r| <= 0.3467 and are off by 3.7e-9 there (Taylor's are by 1.6e-7). */
#define DET_EXP_MAX  88.72f
#define DET_EXP_MIN  (-87.33f)
#define DET_LOG2_E   1.44269502f
#define DET_LN2_HIGH 0.693145752f
#define DET_LN2_LOW  1.42860677e-6f
#define DET_EXP_C2   0.499999881f
#define DET_EXP_C3   0.166665182f
#define DET_EXP_C4   0.0416696519f
#define DET_EXP_C5   0.00836895127f
#define DET_EXP_C6   0.00137450406f

/* e to the x. Above 88.72 infinity, below -87.33 exactly 0 (no subnormal results), NaN stays NaN.
 * n = rint(x * log2 e); r = x - n * ln 2 in two fma steps; polynomial of degree 6 by fma;
 * scaled by 2^n through the exponent bits in two halves. Within 1 unit in the last place. */
DET_INLINE float det_exp(float x)
{
    if (x != x)
        return x;
    if (x > DET_EXP_MAX)
        return det_from_bits(0x7f800000u);
    if (x < DET_EXP_MIN)
        return 0.0f;
    const float n = det_rint(x * DET_LOG2_E);
    float r = det_fma(n, -DET_LN2_HIGH, x);
    r = det_fma(n, -DET_LN2_LOW, r);
    float p = DET_EXP_C6;
    p = det_fma(p, r, DET_EXP_C5);
    p = det_fma(p, r, DET_EXP_C4);
    p = det_fma(p, r, DET_EXP_C3);
    p = det_fma(p, r, DET_EXP_C2);
    p = det_fma(p, r, 1.0f);
    p = det_fma(p, r, 1.0f);
    const int32_t whole = (int32_t)n;
    const int32_t half = whole / 2;
    const float low = det_from_bits((uint32_t)(half + 127) << 23);
    const float high = det_from_bits((uint32_t)(whole - half + 127) << 23);
    return (p * low) * high;
}

/* The constants of det_tanh: tanh(x) = x + x * (z * Q(z)) with z = x * x, fitted by least greatest
 * relative error over |x| < 0.625, off by 4.4e-9 there. */
#define DET_TANH_SMALL 0.625f
#define DET_TANH_C0    (-0.333332807f)
#define DET_TANH_C1    0.133314416f
#define DET_TANH_C2    (-0.0537397042f)
#define DET_TANH_C3    0.0206390508f
#define DET_TANH_C4    (-0.00570495054f)

/* Hyperbolic tangent. Below 0.625 by the polynomial, else 1 - 2 / (e^(2|x|) + 1) with the sign of
 * x; a NaN stays one. Within 2 units in the last place (1.371 over all numbers). */
DET_INLINE float det_tanh(float x)
{
    const float magnitude = det_from_bits(det_bits(x) & 0x7fffffffu);
    if (magnitude < DET_TANH_SMALL) {
        const float z = x * x;
        float p = DET_TANH_C4;
        p = det_fma(p, z, DET_TANH_C3);
        p = det_fma(p, z, DET_TANH_C2);
        p = det_fma(p, z, DET_TANH_C1);
        p = det_fma(p, z, DET_TANH_C0);
        return det_fma(p * z, x, x);
    }
    const float large = 1.0f - 2.0f / (det_exp(magnitude + magnitude) + 1.0f);
    return det_from_bits(det_bits(large) | (det_bits(x) & 0x80000000u));
}

/* The constants of GELU by tanh: sqrt(2 / pi) and 0.044715. */
#define DET_GELU_SCALE 0.797884583f
#define DET_GELU_CUBE  0.0447149985f

/* cap * tanh(x / cap); a NaN or infinity gives a NaN, so that it cannot hide behind the cap. */
DET_INLINE float det_softcap(float x, float cap)
{
    return det_tanh(x / cap) * cap + (x - x);
}

/* binary16 bits of value, nearest even; overflow gives infinity, NaN a quiet NaN (0x7e00). */
DET_INLINE uint16_t det_f16_from_f32(float value)
{
    const uint32_t bits = det_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return 0x7e00u;
    if (magnitude >= 0x47800000u) /* 65536 and above */
        return (uint16_t)(sign | 0x7c00u);
    if (magnitude < 0x38800000u) { /* below 2^-14: a subnormal, the unit is 2^-24 */
        const float scaled = det_from_bits(magnitude) + 0.5f; /* the sum rounds to that unit */
        return (uint16_t)(sign | (det_bits(scaled) - 0x3f000000u));
    }
    const uint32_t odd = (magnitude >> 13) & 1u;
    return (uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + odd) >> 13));
}

/* What the KV cache stores for value: its binary16 bits, or the quiet NaN when binary16 has no
 * finite number for it. An infinite key would vanish as exp(-infinity) = 0; a NaN cannot. */
DET_INLINE uint16_t det_kv_from_f32(float value)
{
    const uint16_t half = det_f16_from_f32(value);
    return (half & 0x7c00u) == 0x7c00u ? (uint16_t)0x7e00u : half;
}

/* Exact. */
DET_INLINE float det_f32_from_bf16(uint16_t half)
{
    return det_from_bits((uint32_t)half << 16);
}

/* Exact; a NaN becomes a quiet NaN. */
DET_INLINE float det_f32_from_f16(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 31u;
    const uint32_t mantissa = half & 1023u;
    if (exponent == 31)
        return det_from_bits(sign | 0x7f800000u | (mantissa ? 0x400000u | mantissa << 13 : 0u));
    if (exponent == 0) {
        const float magnitude = (float)mantissa * 5.9604644775390625e-8f; /* 2^-24, exact */
        return det_from_bits(sign | det_bits(magnitude));
    }
    return det_from_bits(sign | (exponent + 112u) << 23 | mantissa << 13);
}
#endif
