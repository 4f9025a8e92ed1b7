/* How a quantized type is held once its rows are interleaved (cpu_weight.h), and what its products
 * need. All of it is constant for a constant type: the loops are compiled once for each type.
 *
 * A block is 32 columns of group_rows weight rows; a quad is 4 consecutive columns of a row, which
 * stay together; a vector is one quad of each row, 4 * group_rows bytes, row by row. A block has
 * `bits` vectors, whatever the layout of its source:
 *
 *   low_bits 8   vector i is quad i
 *   low_bits 4   vector i holds quad 2i in the low and quad 2i + 1 in the high half of its bytes
 *   low_bits 2   bits 2k of the bytes of vector i belong to quad 4i + k
 *   high_bits 2  then two vectors more, as of low_bits 2: the upper bits
 *   high_bits 1  then one vector more: bit i of its bytes is the upper bit of quad i
 *
 * Values are unsigned, `bias` too large; with low_bits 8 they are bytes, xor weight.quant_flip.
 *
 * The scales of `parts` blocks, 1 or 8, stand together: f16 d[group_rows], with a minimum also
 * f16 m[group_rows], and where there are 8 parts, for each of them two bytes for each row,
 * [part][2][group_rows], from which the factor and the minimum of a group come:
 *
 *   32 columns, minimum   factor = d * byte 0, minimum = -(m * byte 1)             Q4_K Q5_K
 *   16 columns, minimum   of group g: d * (byte g & 15), -(m * (byte g >> 4))      Q2_K
 *   16 columns            of group g: d * byte g, which is signed                  Q3_K Q6_K
 *
 * Pure; any thread. */
#ifndef ODSI_KERNELS_CPU_CPU_FORMAT_H
#define ODSI_KERNELS_CPU_CPU_FORMAT_H
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

#define CPU_QUAD       4u
#define CPU_QUAD_COUNT (OPS_BLOCK / CPU_QUAD) /* of one row in a block */

struct cpu_format {
    uint32_t low_bits; /* 0: not a quantized type */
    uint32_t high_bits;
    uint32_t bias;
    uint32_t groups; /* of columns in a block: 1 or 2 */
    uint32_t has_min;
    uint32_t parts;
};

static inline __attribute__((always_inline)) struct cpu_format cpu_format_of(enum tensor_type type)
{
    switch (type) {
    case TENSOR_Q4_0:
        return (struct cpu_format){4, 0, 8, 1, 0, 1};
    case TENSOR_Q4_1:
        return (struct cpu_format){4, 0, 0, 1, 1, 1};
    case TENSOR_Q5_0:
        return (struct cpu_format){4, 1, 16, 1, 0, 1};
    case TENSOR_Q5_1:
        return (struct cpu_format){4, 1, 0, 1, 1, 1};
    case TENSOR_Q8_0:
        return (struct cpu_format){8, 0, 128, 1, 0, 1};
    case TENSOR_Q2_K:
        return (struct cpu_format){2, 0, 0, 2, 1, 8};
    case TENSOR_Q3_K:
        return (struct cpu_format){2, 1, 4, 2, 0, 8};
    case TENSOR_Q4_K:
        return (struct cpu_format){4, 0, 0, 1, 1, 8};
    case TENSOR_Q5_K:
        return (struct cpu_format){4, 1, 0, 1, 1, 8};
    case TENSOR_Q6_K:
        return (struct cpu_format){4, 2, 32, 2, 0, 8};
    default:
        return (struct cpu_format){0, 0, 0, 0, 0, 1};
    }
}

/* Vectors of a block. */
static inline __attribute__((always_inline)) uint32_t cpu_format_bits(enum tensor_type type)
{
    return cpu_format_of(type).low_bits + cpu_format_of(type).high_bits;
}

/* Bytes of the scales of `parts` blocks. */
static inline __attribute__((always_inline)) uint32_t cpu_format_scales_size(enum tensor_type type,
                                                                             uint32_t group_rows)
{
    const struct cpu_format format = cpu_format_of(type);
    const uint32_t heads = 2 * (1 + format.has_min);
    return group_rows * (format.parts == 1 ? heads : heads + 2 * format.parts);
}

/* Where the two bytes of each row of block b stand in the scales of a group; 8 parts only. */
static inline __attribute__((always_inline)) size_t
cpu_format_bytes_offset(enum tensor_type type, uint32_t group_rows, uint32_t block)
{
    const struct cpu_format format = cpu_format_of(type);
    return (size_t)(block / format.parts) * cpu_format_scales_size(type, group_rows) +
           (size_t)group_rows * (2 * (1 + format.has_min) + 2 * (block % format.parts));
}
#endif
