/* The scale, or scale and minimum, with which small integers come nearest to a group of weights:
 * the search inside worker/model/quantizer.h. Sums are added as a tree: elements i and i + n / 2,
 * then the same with the halves, down to one. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_QUANTIZER_FIT_H
#define ODSI_WORKER_MODEL_QUANTIZER_FIT_H
#include <stdint.h>

#define QUANTIZER_FIT_COLS_MAX 32u

/* A group whose largest weight is below this is all zeros: its scale would be 0 in f16. */
#define QUANTIZER_FIT_TINY 1e-12f

/* Weighted sums over a group and its integers. */
struct quantizer_sums {
    float w;  /* of the importances */
    float x;  /* importance * weight */
    float q;  /* importance * integer */
    float qq; /* importance * integer * integer */
    float xq; /* importance * weight * integer */
};

/* How much the error of each of n weights counts: its magnitude and the group's deviation. n is 16
 * or 32 here and below. */
void quantizer_fit_importance(const float *x, uint32_t n, float *importance);

/* q[i] = (x[i] - min) / scale, rounded to even and kept within low to high; scale 0: all are 0,
 * or high if that is below. scale is 0 or above 2^-25 in magnitude. */
void quantizer_fit_round(const float *x, uint32_t n, float scale, float min, int low, int high,
                         float *q);

void quantizer_fit_sums(const float *x, const float *importance, const float *q, uint32_t n,
                        struct quantizer_sums *out);

/* x ~ scale * q with q in low to high, -high - 1 == low. Returns the scale, 0 for all zeros. */
float quantizer_fit_scale(const float *x, const float *importance, uint32_t n, int low);

/* x ~ scale * q + min with q in 0 to high. not_above_zero: min is to be 0 or less. */
void quantizer_fit_line(const float *x, const float *importance, uint32_t n, int high,
                        int not_above_zero, float *scale, float *min);
#endif
