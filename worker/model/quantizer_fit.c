#include "worker/model/quantizer_fit.h"

#include "common/base/assert.h"
#include "kernels/det.h"

#define LINE_CANDIDATES  20
#define SCALE_CANDIDATES 17

/* The bodies below are compiled once for 16 and once for 32 columns, so that their loops have fixed
 * lengths and become vector instructions. Those change no result: no sum is reordered. */
#define INLINE static inline __attribute__((always_inline))

INLINE float tree_sum(float *values, uint32_t n)
{
    if (n == 32)
        for (uint32_t i = 0; i < 16; i++)
            values[i] = values[i] + values[i + 16];
    for (uint32_t i = 0; i < 8; i++)
        values[i] = values[i] + values[i + 8];
    for (uint32_t i = 0; i < 4; i++)
        values[i] = values[i] + values[i + 4];
    return (values[0] + values[2]) + (values[1] + values[3]);
}

INLINE void round_all(const float *restrict x, uint32_t n, float inverse, float min, float low,
                      float high, float *restrict q)
{
    for (uint32_t i = 0; i < n; i++) {
        const float value = (x[i] - min) * inverse;
        const float bounded = value < low ? low : value;
        q[i] = det_rint(bounded > high ? high : bounded);
    }
}

/* wx: importance * x. */
INLINE void sums_of(const float *importance, const float *wx, const float *q, uint32_t n,
                    struct quantizer_sums *out)
{
    float wq[QUANTIZER_FIT_COLS_MAX], wqq[QUANTIZER_FIT_COLS_MAX], wxq[QUANTIZER_FIT_COLS_MAX];
    for (uint32_t i = 0; i < n; i++) {
        wq[i] = importance[i] * q[i];
        wqq[i] = wq[i] * q[i];
        wxq[i] = wx[i] * q[i];
    }
    out->q = tree_sum(wq, n);
    out->qq = tree_sum(wqq, n);
    out->xq = tree_sum(wxq, n);
}

/* The largest magnitude with its sign. */
INLINE float extreme(const float *x, uint32_t n)
{
    float low = x[0], high = x[0];
    for (uint32_t i = 1; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    return -low > high ? low : high;
}

INLINE void importance_of(const float *x, uint32_t n, float *importance)
{
    float squares[QUANTIZER_FIT_COLS_MAX];
    for (uint32_t i = 0; i < n; i++)
        squares[i] = x[i] * x[i];
    const float deviation = det_sqrt(tree_sum(squares, n) / (float)n);
    for (uint32_t i = 0; i < n; i++)
        importance[i] = deviation + (x[i] < 0.0f ? -x[i] : x[i]);
}

INLINE void start_sums(const float *x, const float *importance, uint32_t n, float *wx,
                       struct quantizer_sums *out)
{
    float copy[QUANTIZER_FIT_COLS_MAX];
    for (uint32_t i = 0; i < n; i++)
        copy[i] = importance[i];
    out->w = tree_sum(copy, n);
    for (uint32_t i = 0; i < n; i++)
        copy[i] = wx[i] = importance[i] * x[i];
    out->x = tree_sum(copy, n);
}

/* ---- one scale ------------------------------------------------------------------------------- */

/* Candidates put the extreme weight onto low times something near 1: the fewer integers there are,
 * the more is gained by cutting it off, or by leaving room. */
INLINE float scale_of(const float *x, const float *importance, uint32_t n, int low)
{
    const float top = extreme(x, n);
    const float magnitude = top < 0.0f ? -top : top;
    if (magnitude < QUANTIZER_FIT_TINY)
        return 0.0f;
    float wx[QUANTIZER_FIT_COLS_MAX], q[QUANTIZER_FIT_COLS_MAX];
    struct quantizer_sums sums;
    start_sums(x, importance, n, wx, &sums);
    const float span = low >= -4 ? 0.32f : low >= -8 ? 0.24f : low >= -16 ? 0.12f : 0.06f;
    float best = 0.0f, scale = 0.0f;
    for (int k = 0; k < SCALE_CANDIDATES; k++) {
        const float near_one = 1.0f + span * ((float)(k - SCALE_CANDIDATES / 2) / 8.0f);
        const float inverse = (float)low * near_one / top;
        round_all(x, n, inverse, 0.0f, (float)low, (float)(-low - 1), q);
        sums_of(importance, wx, q, n, &sums);
        /* With scale xq / qq the error is the sum of w x x less xq xq / qq. */
        const float gain = sums.qq > 0.0f ? sums.xq * sums.xq / sums.qq : 0.0f;
        if (gain > best) {
            best = gain;
            scale = sums.xq / sums.qq;
        }
    }
    return scale;
}

/* ---- scale and minimum ----------------------------------------------------------------------- */

struct line {
    float scale, min;
    float gain; /* the sum of w x x less the error */
};

/* The least squares for these integers. Returns 0 when they do not say: all are equal. */
INLINE int line_through(const struct quantizer_sums *sums, int not_above_zero, struct line *out)
{
    const float determinant = sums->w * sums->qq - sums->q * sums->q;
    if (!(determinant > 0.0f) || !(sums->qq > 0.0f))
        return 0;
    out->scale = (sums->w * sums->xq - sums->x * sums->q) / determinant;
    out->min = (sums->qq * sums->x - sums->q * sums->xq) / determinant;
    if (not_above_zero && out->min > 0.0f) {
        out->min = 0.0f;
        out->scale = sums->xq / sums->qq;
    }
    out->gain = out->scale * sums->xq + out->min * sums->x;
    return out->scale > 0.0f;
}

INLINE void line_of(const float *x, const float *importance, uint32_t n, int high,
                    int not_above_zero, float *scale, float *min)
{
    float low = x[0], top = x[0];
    for (uint32_t i = 1; i < n; i++) {
        low = x[i] < low ? x[i] : low;
        top = x[i] > top ? x[i] : top;
    }
    if (not_above_zero && low > 0.0f)
        low = 0.0f;
    *scale = 0.0f;
    *min = low;
    if (top - low < QUANTIZER_FIT_TINY)
        return;
    float wx[QUANTIZER_FIT_COLS_MAX], q[QUANTIZER_FIT_COLS_MAX];
    struct quantizer_sums sums;
    struct line best = {.scale = (top - low) / (float)high, .min = low, .gain = -1.0f}, line;
    start_sums(x, importance, n, wx, &sums);
    for (int k = 0; k < LINE_CANDIDATES; k++) {
        /* The range takes high steps, or up to one more or less; fewer where that is a lot. */
        const float steps = (float)high + (high > 3 ? 0.1f : 0.07f) * (float)(k - 9);
        round_all(x, n, steps / (top - low), low, 0.0f, (float)high, q);
        sums_of(importance, wx, q, n, &sums);
        if (line_through(&sums, not_above_zero, &line) && line.gain > best.gain)
            best = line;
    }
    /* The integers nearest to that line are better ones, and have a better line yet. */
    round_all(x, n, 1.0f / best.scale, best.min, 0.0f, (float)high, q);
    sums_of(importance, wx, q, n, &sums);
    if (line_through(&sums, not_above_zero, &line) && line.gain > best.gain)
        best = line;
    *scale = best.scale;
    *min = best.min;
}

/* ---- for 16 and 32 columns ------------------------------------------------------------------- */

void quantizer_fit_importance(const float *x, uint32_t n, float *importance)
{
    ODSI_ASSERT(n == 16 || n == 32);
    if (n == 16)
        importance_of(x, 16, importance);
    else
        importance_of(x, 32, importance);
}

void quantizer_fit_round(const float *x, uint32_t n, float scale, float min, int low, int high,
                         float *q)
{
    ODSI_ASSERT(n == 16 || n == 32);
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    if (n == 16)
        round_all(x, 16, inverse, min, (float)low, (float)high, q);
    else
        round_all(x, 32, inverse, min, (float)low, (float)high, q);
}

void quantizer_fit_sums(const float *x, const float *importance, const float *q, uint32_t n,
                        struct quantizer_sums *out)
{
    float wx[QUANTIZER_FIT_COLS_MAX];
    ODSI_ASSERT(n == 16 || n == 32);
    if (n == 16) {
        start_sums(x, importance, 16, wx, out);
        sums_of(importance, wx, q, 16, out);
    } else {
        start_sums(x, importance, 32, wx, out);
        sums_of(importance, wx, q, 32, out);
    }
}

float quantizer_fit_scale(const float *x, const float *importance, uint32_t n, int low)
{
    ODSI_ASSERT(n == 16 || n == 32);
    return n == 16 ? scale_of(x, importance, 16, low) : scale_of(x, importance, 32, low);
}

void quantizer_fit_line(const float *x, const float *importance, uint32_t n, int high,
                        int not_above_zero, float *scale, float *min)
{
    ODSI_ASSERT(n == 16 || n == 32);
    if (n == 16)
        line_of(x, importance, 16, high, not_above_zero, scale, min);
    else
        line_of(x, importance, 32, high, not_above_zero, scale, min);
}
