/* The block formats of quantized weights (those of GGUF), and what a block means.
 *
 * A row is cut into blocks; a block holds 32 columns, of the K types 256. Whatever the type, 32
 * consecutive columns are one or two groups with, for each column, an integer q, and per group a
 * factor and a minimum: the weight is factor * q + min. d, m, dmin are f16; factor and min are
 * exact in f32 (at most 11 + 8 bits).
 *
 *   type  bytes  layout                                q                     factor  min
 *   Q4_0     18  d, qs[16]                             nibble - 8            d       -
 *   Q4_1     20  d, m, qs[16]                          nibble                d       m
 *   Q5_0     22  d, qh[4], qs[16]                      nibble + 16 bit - 16  d       -
 *   Q5_1     24  d, m, qh[4], qs[16]                   nibble + 16 bit       d       m
 *   Q8_0     34  d, int8 qs[32]                        qs                    d       -
 *   Q2_K     84  scales[16], qs[64], d, dmin           2 bits                d*sc    -dmin*mn
 *   Q3_K    110  qh[32], qs[64], scales[12], d         2 bits + 4 bit - 4    d*sc    -
 *   Q4_K    144  d, dmin, scales[12], qs[128]          nibble                d*sc    -dmin*mn
 *   Q5_K    176  d, dmin, scales[12], qh[32], qs[128]  nibble + 16 bit       d*sc    -dmin*mn
 *   Q6_K    210  ql[128], qh[64], int8 scales[16], d   6 bits - 32           d*sc    -
 *
 * Nibbles of the first five: byte i holds column i low and column i + 16 high; bit i of qh, little
 * endian, belongs to column i. K types: see quant.c. Groups have 32 columns, in Q2_K, Q3_K and
 * Q6_K 16.
 *
 * Pure; any thread. */
#ifndef ODSI_KERNELS_QUANT_H
#define ODSI_KERNELS_QUANT_H
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Columns of the largest block. */
#define QUANT_BLOCK_COLS_MAX 256u
#define QUANT_BLOCK_SIZE_MAX 210u

/* Whether ops take weights of this type; type may be any number. */
int quant_is_known(uint32_t type);
/* Whether activations are quantized for it: all but F32, F16 and BF16. */
int quant_is_quantized(enum tensor_type type);
/* Columns and bytes of one block; 1 and the size of an element for the float types. */
uint32_t quant_block_cols(enum tensor_type type);
uint32_t quant_block_size(enum tensor_type type);
/* Bytes of a row; cols is a multiple of quant_block_cols. */
size_t quant_row_size(enum tensor_type type, uint32_t cols);
/* "q4_k"; NULL for a number that is none. */
const char *quant_name(uint32_t type);
/* The type of that name, upper or lower case. Returns 0 when there is none. */
int quant_find(const char *name, enum tensor_type *out);

/* 32 columns of a row. */
struct quant_group {
    int8_t q[OPS_BLOCK];
    uint32_t group_cols; /* 32, or 16: then two groups */
    int has_min;
    float scale[2];
    float min[2];
};

/* Columns [32 * index, 32 * index + 32) of a quantized row. */
void quant_read(struct quant_group *out, enum tensor_type type, const void *row, uint32_t index);

#ifdef __cplusplus
}
#endif
#endif
