/* A weight matrix as the CPU backends keep it: a copy, so the source (a mapped file) is not needed
 * once it was filled in.
 *
 * group_rows 1: the source layout, as the scalar loops read it. Otherwise group_rows consecutive
 * rows are interleaved, so that one vector holds the same columns of all of them and a dot product
 * streams through memory:
 *   F32, F16, BF16  data[group][col][group_rows]
 *   quantized       data[group][block][bits][group_rows][4] bytes
 *                   scales[group][block / parts][...] bytes; both as cpu_format.h says
 * Missing rows of the last group are there too, of no defined content but that of finite scales. */
#ifndef ODSI_KERNELS_CPU_CPU_WEIGHT_H
#define ODSI_KERNELS_CPU_CPU_WEIGHT_H
#include "common/base/err.h"
#include "kernels/cpu/cpu_memory.h"
#include "kernels/ops.h"
#include "kernels/quant.h"

#include <stddef.h>
#include <stdint.h>

struct weight {
    struct cpu_memory *memory; /* that data and scales are of; the backend's */
    enum tensor_type type;
    uint32_t rows; /* of one matrix */
    uint32_t cols;
    uint32_t matrix_count;
    uint32_t group_rows;
    uint32_t group_count; /* of one matrix: rows / group_rows, rounded up */
    uint8_t quant_flip;   /* of types with 8 bits */
    uint8_t *data;
    uint8_t *scales;    /* NULL where data has them or the type has none */
    size_t data_size;   /* of one group */
    size_t scales_size; /* of one group */
};

struct cpu_loops;

/* Memory for the matrices, packed as loops want it; rows are filled in by cpu_weight_pack.
 * Errors: ODSI_ERR_NO_MEMORY. Owned: by the caller, ended with cpu_weight_close. */
ODSI_MUST_USE enum odsi_err cpu_weight_open(struct weight **out, enum tensor_type type,
                                            uint32_t rows, uint32_t cols, uint32_t matrix_count,
                                            const struct cpu_loops *loops,
                                            struct cpu_memory *memory);
void cpu_weight_close(struct weight **self);

/* Packs rows row_first ... of all matrices, counted through, from their source layout. Different
 * matrices may be packed by different threads at once. */
void cpu_weight_pack(struct weight *self, uint32_t row_first, const void *data, uint32_t rows);

/* Makes *out a view of one matrix of self; it owns nothing. */
void cpu_weight_matrix(struct weight *out, const struct weight *self, uint32_t matrix);

/* out[cols] = one row of the first matrix converted to f32, as op embed. */
void cpu_weight_row(float *out, const struct weight *self, uint32_t row);
#endif
