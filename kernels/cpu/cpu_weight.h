/* A weight matrix as the CPU backends keep it: a copy, so the source (a mapped file) is not needed
 * once it was filled in.
 *
 * group_rows 1: the source layout, as all quantized types but Q8_0 on every level. Otherwise
 * group_rows consecutive rows are interleaved, so that one vector holds the same columns of all of
 * them and a dot product streams through memory:
 *   F32, F16  data[group][col][group_rows]
 *   Q8_0      data[group][block][8][group_rows][4] int8, each byte xor quant_flip
 *             scales[group][block][group_rows] f16
 * Missing rows of the last group are zero (xor quant_flip). */
#ifndef ODSI_KERNELS_CPU_CPU_WEIGHT_H
#define ODSI_KERNELS_CPU_CPU_WEIGHT_H
#include "common/base/err.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

struct weight {
    enum tensor_type type;
    uint32_t rows; /* of one matrix */
    uint32_t cols;
    uint32_t matrix_count;
    uint32_t group_rows;
    uint32_t group_count; /* of one matrix: rows / group_rows, rounded up */
    uint8_t quant_flip;
    void *data;
    uint16_t *scales; /* NULL where data has them or the type has none */
};

struct cpu_loops;

/* Memory for the matrices, packed as loops want it; rows are filled in by cpu_weight_pack.
 * Errors: ODSI_ERR_NO_MEMORY. Owned: by the caller, ended with cpu_weight_close. */
ODSI_MUST_USE enum odsi_err cpu_weight_open(struct weight **out, enum tensor_type type,
                                            uint32_t rows, uint32_t cols, uint32_t matrix_count,
                                            const struct cpu_loops *loops);
void cpu_weight_close(struct weight **self);

/* Packs rows row_first ... of all matrices, counted through, from their source layout. Different
 * weights may be packed by different threads at once. */
void cpu_weight_pack(struct weight *self, uint32_t row_first, const void *data, uint32_t rows);

/* Makes *out a view of one matrix of self; it owns nothing. */
void cpu_weight_matrix(struct weight *out, const struct weight *self, uint32_t matrix);

/* out[cols] = one row of the first matrix converted to f32, as op embed. */
void cpu_weight_row(float *out, const struct weight *self, uint32_t row);
#endif
