/* The rotation tables of RoPE, made on the host in binary64 by our own sine, cosine and power, so
 * that every machine uploads the same numbers (NUMERICS.md, "RoPE tables"). Any thread. */
#ifndef ODSI_KERNELS_ROPE_TABLE_H
#define ODSI_KERNELS_ROPE_TABLE_H
#include "common/base/err.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Radians per position of each pair: out[i] = base^(-i / half_dim), then divided by linear (unless
 * it is 1), then by factors[i] (unless factors is NULL), each step rounded to binary64.
 * base between 1 and 1e39; linear and all factors at least 1. */
void rope_table_frequencies(double *out, uint32_t half_dim, double base, double linear,
                            const float *factors);

/* Fills cos_out and sin_out, each [position_count][half_dim], with cosine and sine of position *
 * frequency[i], times amplitude, computed in binary64 and rounded once to binary32. frequency at
 * most 1; position_count <= 2^20. */
void rope_table_fill(float *cos_out, float *sin_out, uint32_t position_count, uint32_t half_dim,
                     const double *frequency, double amplitude);

/* The same for position_count positions from position_first on; all of them are below 2^20. */
void rope_table_fill_from(float *cos_out, float *sin_out, uint32_t position_first,
                          uint32_t position_count, uint32_t half_dim, const double *frequency,
                          double amplitude);

/* Exposed for tests: within a few units in the last place of binary64. x in [0, 2^20]; base in
 * [1, 1e39], exponent in [-1, 1]. */
double rope_table_sin(double x);
double rope_table_cos(double x);
double rope_table_pow(double base, double exponent);

#ifdef __cplusplus
}
#endif
#endif
