/* kernels/det.h and the rotation tables against the C library, which tests may use. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/ref/ref.h"
#include "kernels/rope_table.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <math.h>

/* Distance in units in the last place of a binary32 number of that size. */
static double ulps_f32(float got, double want)
{
    int exponent;
    frexp(want, &exponent);
    return fabs((double)got - want) / ldexp(1.0, exponent - 24);
}

/* Goal: det_exp is right to one unit in the last place over its whole range (measured 0.9).
 * How: every 97th binary32 number between the bounds, of both signs. */
Test(det, exp_is_within_one_unit_in_the_last_place)
{
    double worst = 0.0;
    float worst_at = 0.0f;
    for (uint32_t bits = 0x30000000u; bits < 0x42b20000u; bits += 97) {
        const float x = det_from_bits(bits);
        for (int sign = 0; sign < 2; sign++) {
            const float signed_x = sign ? -x : x;
            if (signed_x > DET_EXP_MAX || signed_x < DET_EXP_MIN)
                continue;
            const double ulps = ulps_f32(det_exp(signed_x), exp((double)signed_x));
            if (ulps > worst) {
                worst = ulps;
                worst_at = signed_x;
            }
        }
    }
    cr_log_info("det_exp: worst %.3f units at %a", worst, (double)worst_at);
    cr_expect(worst < 1.0, "%.3f units in the last place at %a", worst, (double)worst_at);
}

Test(det, exp_keeps_its_promises_at_the_edges)
{
    cr_expect_eq(det_exp(0.0f), 1.0f);
    cr_expect_eq(det_exp(-0.0f), 1.0f);
    cr_expect_eq(det_exp(-1e-30f), 1.0f);
    cr_expect(det_finite(det_exp(DET_EXP_MAX)));
    cr_expect_eq(det_bits(det_exp(nextafterf(DET_EXP_MAX, 100.0f))), 0x7f800000u);
    cr_expect_eq(det_bits(det_exp(INFINITY)), 0x7f800000u);
    cr_expect_geq(det_exp(DET_EXP_MIN), 0x1p-126f, "a subnormal result");
    cr_expect_eq(det_bits(det_exp(nextafterf(DET_EXP_MIN, -100.0f))), 0u);
    cr_expect_eq(det_bits(det_exp(-INFINITY)), 0u);
    cr_expect(isnan(det_exp(NAN)));
}

/* Goal: det_tanh is right to two units in the last place (measured 1.371 over all numbers, next to
 * where its polynomial ends). How: every 1009th number of both signs, and all around that place. */
Test(det, tanh_is_within_two_units_in_the_last_place)
{
    const uint32_t edge = det_bits(DET_TANH_SMALL);
    double worst = 0.0;
    float worst_at = 0.0f;
    for (uint32_t bits = 0x00800000u; bits < 0x41200000u;) {
        const float x = det_from_bits(bits);
        const double ulps = ulps_f32(det_tanh(x), tanh((double)x));
        if (ulps > worst) {
            worst = ulps;
            worst_at = x;
        }
        cr_assert_eq(det_bits(det_tanh(-x)), det_bits(det_tanh(x)) | 0x80000000u, "at %a",
                     (double)x);
        bits += bits > edge - 50000 && bits < edge + 200000 ? 1 : 1009;
    }
    cr_log_info("det_tanh: worst %.3f units at %a", worst, (double)worst_at);
    cr_expect(worst < 1.4, "%.3f units in the last place at %a", worst, (double)worst_at);
}

Test(det, tanh_keeps_its_promises_at_the_edges)
{
    cr_expect_eq(det_tanh(0.0f), 0.0f);
    cr_expect_eq(det_tanh(-0.0f), 0.0f);
    cr_expect_eq(det_bits(det_tanh(0x1p-149f)), 1u);
    cr_expect_eq(det_tanh(9.1f), 1.0f);
    cr_expect_eq(det_tanh(-3e38f), -1.0f);
    cr_expect_eq(det_tanh(INFINITY), 1.0f);
    cr_expect_eq(det_tanh(-INFINITY), -1.0f);
    cr_expect(isnan(det_tanh(NAN)));
    cr_expect(isnan(det_softcap(INFINITY, 30.0f)));
    cr_expect(isnan(det_softcap(NAN, 30.0f)));
    cr_expect_eq(det_softcap(1e30f, 30.0f), 30.0f);
}

/* Goal: GELU is what its formula means, to three roundings of its argument's size: where 1 + tanh
 * cancels, what is left is small against x. How: every 2003rd number against binary64. */
Test(det, gelu_is_right_against_the_size_of_its_argument)
{
    const float one = 1.0f;
    double worst = 0.0;
    for (uint32_t bits = 0x00800000u; bits < 0x42c80000u; bits += 2003)
        for (int sign = 0; sign < 2; sign++) {
            const float x = sign ? -det_from_bits(bits) : det_from_bits(bits);
            const double angle =
                0.79788456080286536 * (double)x * (1.0 + 0.044715 * (double)x * (double)x);
            const double want = 0.5 * (double)x * (1.0 + tanh(angle));
            float got;
            ref_act_mul(&got, &x, &one, 1, ACT_GELU_TANH);
            const double error = fabs((double)got - want) / fabs((double)x);
            worst = error > worst ? error : worst;
        }
    cr_log_info("gelu: worst error %.3g of its argument", worst);
    cr_expect(worst < 3.0 * 0x1p-24, "%.3g", worst);
}

/* What the bits of a finite binary16 mean. */
static double f16_value(uint16_t half)
{
    const int exponent = (half >> 10) & 31;
    const int mantissa = half & 1023;
    const double magnitude =
        exponent == 0 ? ldexp(mantissa, -24) : ldexp(mantissa + 1024, exponent - 25);
    return half & 0x8000u ? -magnitude : magnitude;
}

Test(det, f16_to_f32_is_exact_for_all_65536)
{
    for (uint32_t half = 0; half < 65536; half++) {
        const float got = det_f32_from_f16((uint16_t)half);
        if ((half & 0x7fffu) > 0x7c00u) {
            cr_assert(got != got, "%04x", half);
        } else if ((half & 0x7fffu) == 0x7c00u) {
            cr_assert_eq(got, half & 0x8000u ? -INFINITY : INFINITY);
        } else {
            cr_assert_eq((double)got, f16_value((uint16_t)half), "%04x", half);
            cr_assert_eq(det_bits(got) >> 31, half >> 15, "sign of %04x", half);
        }
    }
}

/* value rounded to 11 significant bits, or to the unit of the subnormals, in exact arithmetic. */
static double f16_round(double value)
{
    int exponent;
    frexp(value, &exponent);
    const double unit = ldexp(1.0, exponent < -13 ? -24 : exponent - 11);
    const double rounded = nearbyint(value / unit) * unit;
    return fabs(rounded) >= 65536.0 ? copysign(INFINITY, value) : rounded;
}

static void f16_expect(uint32_t bits)
{
    const float value = det_from_bits(bits);
    const uint16_t got = det_f16_from_f32(value);
    if (value != value) {
        cr_assert_eq(got, 0x7e00u, "%08x", bits);
        return;
    }
    const double want = f16_round((double)value);
    if (isinf(want))
        cr_assert_eq(got, value < 0.0f ? 0xfc00u : 0x7c00u, "%08x gives %04x", bits, got);
    else
        cr_assert_eq(f16_value(got), want, "%08x gives %04x", bits, got);
    cr_assert_eq(got >> 15, bits >> 31, "sign of %08x", bits);
}

/* Goal: rounding to binary16 is to nearest even everywhere. How: every binary16 number and the
 * midpoint above it with the binary32 numbers beside them, and a walk through all bit patterns. */
Test(det, f32_to_f16_rounds_to_nearest_even)
{
    for (uint32_t half = 0; half < 0x7c00u; half++) {
        const float low = det_f32_from_f16((uint16_t)half);
        const float high = half == 0x7bffu ? 65536.0f : det_f32_from_f16((uint16_t)(half + 1));
        const uint32_t at = det_bits(low);
        const uint32_t middle = det_bits((low + high) * 0.5f);
        for (uint32_t offset = 0; offset < 5; offset++) {
            f16_expect((middle + offset - 2) & 0x7fffffffu);
            f16_expect(((middle + offset - 2) & 0x7fffffffu) | 0x80000000u);
            if (at + offset >= 2)
                f16_expect(at + offset - 2);
        }
    }
    for (uint64_t bits = 0; bits < UINT64_C(1) << 32; bits += 1009)
        f16_expect((uint32_t)bits);
    f16_expect(0x7f800000u);
    f16_expect(0xff800000u);
    f16_expect(0x7f800001u);
}

Test(det, rint_rounds_ties_to_even)
{
    for (int32_t twice = -2000; twice <= 2000; twice++)
        cr_assert_eq(det_rint((float)twice * 0.5f), nearbyintf((float)twice * 0.5f));
}

/* ---- rotation tables ---- */

static double ulps_f64(double got, long double want)
{
    int exponent;
    frexpl(want, &exponent);
    return (double)(fabsl((long double)got - want) / ldexpl(1.0L, exponent - 53));
}

/* Goal: sine and cosine in binary64 are right to one unit in the last place, next to multiples of
 * pi/2 as well. */
Test(rope_table, sine_and_cosine_agree_with_the_c_library)
{
    struct rng rng = rng_make("rope_table");
    for (uint32_t i = 0; i < 500000; i++) {
        double x = ldexp((double)(rng_u64(&rng) >> 11), -53);
        x *= ldexp(1.0, (int)rng_range(&rng, 0, 20));
        if (i % 4 == 0)
            x = (double)(float)(rng_range(&rng, 0, 600000) * 1.5707963267948966);
        cr_assert(ulps_f64(rope_table_sin(x), sinl(x)) < 1.0, "sin %a, seed %" PRIu64, x, rng.seed);
        cr_assert(ulps_f64(rope_table_cos(x), cosl(x)) < 1.0, "cos %a, seed %" PRIu64, x, rng.seed);
    }
    cr_expect_eq(rope_table_sin(0.0), 0.0);
    cr_expect_eq(rope_table_cos(0.0), 1.0);
}

Test(rope_table, power_agrees_with_the_c_library)
{
    static const double bases[] = {1.0, 10000.0, 500000.0, 1000000.0, 1e38, 1.0000000000000002};
    struct rng rng = rng_make("rope_table power");
    for (uint32_t i = 0; i < 300000; i++) {
        const double base = i % 2 ? bases[rng_range(&rng, 0, 5)]
                                  : 1.0 + ldexp((double)(rng_u64(&rng) >> 11), -53 + 30);
        const double exponent = ldexp((double)(rng_u64(&rng) >> 11), -53) * (i % 3 ? -1.0 : 1.0);
        const double got = rope_table_pow(base, exponent);
        cr_assert(ulps_f64(got, powl(base, exponent)) < 1.0, "%a to the %a, seed %" PRIu64, base,
                  exponent, rng.seed);
    }
    cr_expect_eq(rope_table_pow(10000.0, 0.0), 1.0);
    cr_expect_eq(rope_table_pow(1.0, -0.5), 1.0);
}

/* Goal: the table is what its header says, at the far end too: the angle is a product in binary64,
 * so it is computed the same way here and only then handed to the C library. */
Test(rope_table, holds_rounded_sines_and_cosines)
{
    const uint32_t half_dims[] = {1, 3, 32, 64};
    for (uint32_t h = 0; h < 4; h++) {
        const uint32_t half_dim = half_dims[h];
        const uint32_t positions = 5000;
        float *cos_table = test_memory((size_t)positions * half_dim * sizeof(float));
        float *sin_table = test_memory((size_t)positions * half_dim * sizeof(float));
        double frequency[64];
        rope_table_frequencies(frequency, half_dim, 10000.0, 1.0, NULL);
        rope_table_fill(cos_table, sin_table, positions, half_dim, frequency, 1.0);
        for (uint32_t p = 0; p < positions; p++)
            for (uint32_t i = 0; i < half_dim; i++) {
                const size_t at = (size_t)p * half_dim + i;
                const long double step = powl(10000.0L, -(long double)i / half_dim);
                cr_assert(fabsl((long double)sin_table[at] - sinl(p * step)) < 6.1e-8L);
                cr_assert(fabsl((long double)cos_table[at] - cosl(p * step)) < 6.1e-8L);
            }
        cr_expect_eq(cos_table[0], 1.0f);
        cr_expect_eq(sin_table[0], 0.0f);
        alloc_free(sin_table);
        alloc_free(cos_table);
    }
}

/* Goal: the bits themselves are version 1 of the numerics. How: a digest of a whole table, made
 * once; another number means that a session with an older build would be refuted. */
Test(rope_table, has_the_bits_of_numerics_version_1)
{
    const uint32_t positions = 4096;
    const uint32_t half_dim = 32;
    float *tables = test_memory((size_t)2 * positions * half_dim * sizeof(float));
    double frequency[32];
    rope_table_frequencies(frequency, half_dim, 10000.0, 1.0, NULL);
    rope_table_fill(tables, tables + (size_t)positions * half_dim, positions, half_dim, frequency,
                    1.0);
    uint64_t hash = 0xcbf29ce484222325u; /* FNV-1a over the bit patterns */
    for (size_t i = 0; i < (size_t)2 * positions * half_dim; i++)
        hash = (hash ^ det_bits(tables[i])) * 0x100000001b3u;
    cr_expect_eq(hash, UINT64_C(0xf87922ed22f00c82), "%016" PRIx64, hash);
    alloc_free(tables);
}
