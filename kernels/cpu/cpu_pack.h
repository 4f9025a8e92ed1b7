/* Quantized rows from their source layout (kernels/quant.h) to the interleaved one (cpu_format.h)
 * and back.
 *
 * Pure but for the weight that is written; any thread. */
#ifndef ODSI_KERNELS_CPU_CPU_PACK_H
#define ODSI_KERNELS_CPU_CPU_PACK_H
#include "kernels/cpu/cpu_weight.h"

/* Rows lane_first ... of one group, `lanes` of them, from consecutive source rows. */
void cpu_pack_rows(struct weight *self, uint32_t group, uint32_t lane_first, const uint8_t *rows,
                   uint32_t lanes);

/* As quant_read, of an interleaved row. */
void cpu_pack_read(struct quant_group *out, const struct weight *self, uint32_t row,
                   uint32_t block);
#endif
