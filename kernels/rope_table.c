#include "kernels/rope_table.h"

#include "common/base/assert.h"

#include <stddef.h>
#include <string.h>

/* Everything here is + - * / and fma of binary64 in the order written (NUMERICS.md, "RoPE
 * tables"), so every machine that rounds as IEEE 754 says makes the same table. A number that
 * needs more than 53 bits is a pair whose sum it is; low is below half a unit of high. */
struct pair {
    double high;
    double low;
};

#define POSITIONS_MAX (1u << 20)
#define ANGLE_MAX     1048576.0 /* so that a quadrant number has at most 20 bits */

/* pi/2 and ln 2 cut so that the first parts times an integer of 20 (11) bits are exact. */
#define TWO_OVER_PI   6.36619772367581382433e-01
#define HALF_PI_FIRST 1.57079632673412561417e+00 /* 33 bits */
#define HALF_PI_NEXT  6.07710050630396597660e-11 /* 33 more */
#define HALF_PI_REST  2.02226624879595063154e-21
#define ONE_OVER_LN2  1.44269504088896338700e+00
#define LN2_FIRST     6.93147180369123816490e-01 /* 33 bits */
#define LN2_REST      1.90821492927058770002e-10
#define SQRT2         1.41421356237309504880e+00

static struct pair sum_exact(double a, double b)
{
    struct pair sum = {a + b, 0.0};
    const double b_part = sum.high - a;
    sum.low = (a - (sum.high - b_part)) + (b - b_part);
    return sum;
}

/* Nearest even; |x| < 2^51. */
static double round_even(double x)
{
    const double magic = 6755399441055744.0; /* 1.5 * 2^52 */
    return (x + magic) - magic;
}

/* coefficients[0] + z * (coefficients[1] + z * ...), count of them. */
static double polynomial(double z, const double *coefficients, uint32_t count)
{
    double sum = coefficients[count - 1];
    for (uint32_t i = count - 1; i-- > 0;)
        sum = sum * z + coefficients[i];
    return sum;
}

/* sin(r) = r + r^3 * polynomial(r^2), |r| <= pi/4; the first term left out is below 2^-63. */
static double sin_near_zero(struct pair r)
{
    static const double inverse_factorials[] = {
        -1.0 / 6.0,        1.0 / 120.0,        -1.0 / 5040.0,          1.0 / 362880.0,
        -1.0 / 39916800.0, 1.0 / 6227020800.0, -1.0 / 1307674368000.0, 1.0 / 355687428096000.0};
    const double z = r.high * r.high;
    const double tail = r.high * z * polynomial(z, inverse_factorials, 8);
    return r.high + (tail + r.low * (1.0 - 0.5 * z));
}

/* cos(r) = 1 - r^2 / 2 + r^4 * polynomial(r^2). */
static double cos_near_zero(struct pair r)
{
    static const double inverse_factorials[] = {
        1.0 / 24.0,        -1.0 / 720.0,         1.0 / 40320.0,          -1.0 / 3628800.0,
        1.0 / 479001600.0, -1.0 / 87178291200.0, 1.0 / 20922789888000.0, -1.0 / 6402373705728000.0};
    const double z = r.high * r.high;
    const double half = 0.5 * z;
    const double head = 1.0 - half;
    const double tail = z * z * polynomial(z, inverse_factorials, 8) - r.high * r.low;
    return head + (((1.0 - head) - half) + tail);
}

/* x = *quadrant * pi/2 + the result, |result| <= pi/4. */
static struct pair reduce(double x, uint32_t *quadrant)
{
    ODSI_ASSERT(x >= 0.0 && x <= ANGLE_MAX);
    const double n = round_even(x * TWO_OVER_PI);
    const double rest = x - n * HALF_PI_FIRST; /* exact: both are within a factor 2 */
    struct pair r = sum_exact(rest, -(n * HALF_PI_NEXT));
    *quadrant = (uint32_t)n % 4u;
    return sum_exact(r.high, r.low - n * HALF_PI_REST);
}

/* The sine of quadrant * pi/2 + r. */
static double sin_in_quadrant(struct pair r, uint32_t quadrant)
{
    const double value = quadrant % 2u ? cos_near_zero(r) : sin_near_zero(r);
    return quadrant >= 2 ? -value : value;
}

double rope_table_sin(double x)
{
    uint32_t quadrant = 0;
    const struct pair r = reduce(x, &quadrant);
    return sin_in_quadrant(r, quadrant);
}

double rope_table_cos(double x)
{
    uint32_t quadrant = 0;
    const struct pair r = reduce(x, &quadrant);
    return sin_in_quadrant(r, (quadrant + 1) % 4u);
}

/* The natural logarithm of a normal x >= 1: exponent * ln 2 + log m with m in [sqrt 1/2, sqrt 2],
 * log m = 2 atanh(s), s = (m - 1) / (m + 1). */
static struct pair log_pair(double x)
{
    static const double odd_inverses[] = {1.0 / 3.0,  1.0 / 5.0,  1.0 / 7.0,  1.0 / 9.0,
                                          1.0 / 11.0, 1.0 / 13.0, 1.0 / 15.0, 1.0 / 17.0,
                                          1.0 / 19.0, 1.0 / 21.0, 1.0 / 23.0, 1.0 / 25.0};
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    double exponent = (double)((int32_t)(bits >> 52) - 1023);
    bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
    double m;
    memcpy(&m, &bits, sizeof m);
    if (m > SQRT2) {
        m *= 0.5;
        exponent += 1.0;
    }
    const double top = m - 1.0;
    const struct pair bottom = sum_exact(m, 1.0);
    const double s = top / bottom.high;
    const double s_rest = (__builtin_fma(-s, bottom.high, top) - s * bottom.low) / bottom.high;
    const double z = s * s;
    const double tail = s * z * polynomial(z, odd_inverses, 12);
    const struct pair sum = sum_exact(exponent * LN2_FIRST, 2.0 * s);
    return sum_exact(sum.high, sum.low + (exponent * LN2_REST + 2.0 * (s_rest + tail)));
}

/* e to the x for |x| <= 700: 2^n * e^r, |r| <= ln 2 / 2. */
static double exp_pair(struct pair x)
{
    static const double inverse_factorials[] = {
        1.0 / 2.0,          1.0 / 6.0,        1.0 / 24.0,        1.0 / 120.0,
        1.0 / 720.0,        1.0 / 5040.0,     1.0 / 40320.0,     1.0 / 362880.0,
        1.0 / 3628800.0,    1.0 / 39916800.0, 1.0 / 479001600.0, 1.0 / 6227020800.0,
        1.0 / 87178291200.0};
    const double n = round_even(x.high * ONE_OVER_LN2);
    const struct pair r = sum_exact(x.high - n * LN2_FIRST, x.low - n * LN2_REST);
    const double tail = r.high * r.high * polynomial(r.high, inverse_factorials, 13);
    const double value = 1.0 + (r.high + (tail + r.low * (1.0 + r.high)));
    const uint64_t power_bits = (uint64_t)((int64_t)n + 1023) << 52;
    double power;
    memcpy(&power, &power_bits, sizeof power);
    return value * power;
}

double rope_table_pow(double base, double exponent)
{
    ODSI_ASSERT(base >= 1.0 && base <= 1e39);
    ODSI_ASSERT(exponent >= -1.0 && exponent <= 1.0);
    const struct pair log = log_pair(base);
    struct pair product = {exponent * log.high, 0.0};
    product.low = __builtin_fma(exponent, log.high, -product.high) + exponent * log.low;
    return exp_pair(product);
}

void rope_table_frequencies(double *out, uint32_t half_dim, double base, double linear,
                            const float *factors)
{
    ODSI_ASSERT(linear >= 1.0);
    for (uint32_t i = 0; i < half_dim; i++) {
        out[i] = rope_table_pow(base, -((double)i / (double)half_dim)) / linear;
        if (factors) {
            ODSI_ASSERT(factors[i] >= 1.0f);
            out[i] = out[i] / (double)factors[i];
        }
    }
}

void rope_table_fill_from(float *cos_out, float *sin_out, uint32_t position_first,
                          uint32_t position_count, uint32_t half_dim, const double *frequency,
                          double amplitude)
{
    ODSI_ASSERT(position_first <= POSITIONS_MAX);
    ODSI_ASSERT(position_count <= POSITIONS_MAX - position_first);
    for (uint32_t p = 0; p < position_count; p++) {
        for (uint32_t i = 0; i < half_dim; i++) {
            uint32_t quadrant = 0;
            const struct pair r = reduce((double)(position_first + p) * frequency[i], &quadrant);
            const size_t at = (size_t)p * half_dim + i;
            sin_out[at] = (float)(sin_in_quadrant(r, quadrant) * amplitude);
            cos_out[at] = (float)(sin_in_quadrant(r, (quadrant + 1) % 4u) * amplitude);
        }
    }
}

void rope_table_fill(float *cos_out, float *sin_out, uint32_t position_count, uint32_t half_dim,
                     const double *frequency, double amplitude)
{
    rope_table_fill_from(cos_out, sin_out, 0, position_count, half_dim, frequency, amplitude);
}
