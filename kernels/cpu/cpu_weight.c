#include "kernels/cpu/cpu_weight.h"

#include "common/base/alloc.h"
#include "kernels/cpu/cpu_format.h"
#include "kernels/cpu/cpu_loops.h"
#include "kernels/cpu/cpu_pack.h"
#include "kernels/det.h"
#include "kernels/ref/ref.h"

#include <string.h>

enum odsi_err cpu_weight_open(struct weight **out, enum tensor_type type, uint32_t rows,
                              uint32_t cols, uint32_t matrix_count, const struct cpu_loops *loops,
                              struct cpu_memory *memory)
{
    *out = NULL;
    struct weight *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->memory = memory;
    self->type = type;
    self->rows = rows;
    self->cols = cols;
    self->matrix_count = matrix_count;
    self->group_rows = loops->group_rows;
    self->group_count = (rows + self->group_rows - 1) / self->group_rows;
    self->quant_flip = loops->quant_flip;
    self->data_size = self->group_rows * quant_row_size(type, cols);
    if (self->group_rows > 1 && quant_is_quantized(type)) {
        const uint32_t blocks = cols / OPS_BLOCK;
        self->data_size = (size_t)blocks * cpu_format_bits(type) * CPU_QUAD * self->group_rows;
        self->scales_size = (size_t)(blocks / cpu_format_of(type).parts) *
                            cpu_format_scales_size(type, self->group_rows);
    }
    const size_t groups = (size_t)self->group_count * self->matrix_count;
    err = cpu_memory_take(memory, &self->data, groups * self->data_size, 1);
    if (err == ODSI_OK && self->scales_size > 0)
        err = cpu_memory_take(memory, &self->scales, groups * self->scales_size, 1);
    if (err != ODSI_OK) {
        cpu_weight_close(&self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void cpu_weight_close(struct weight **self)
{
    if (!*self)
        return;
    cpu_memory_give_back((*self)->memory, (*self)->scales);
    cpu_memory_give_back((*self)->memory, (*self)->data);
    alloc_free(*self);
    *self = NULL;
}

#define FLOAT_COLS 64u /* of all rows of a group before the next ones: they stay in the cache */

/* to[col][group_rows] from rows one below the other; element is a constant, 2 or 4. */
static inline __attribute__((always_inline)) void pack_floats(const struct weight *self,
                                                              uint32_t group, uint32_t lane_first,
                                                              const uint8_t *rows, uint32_t lanes,
                                                              size_t element)
{
    uint8_t *data = self->data + group * self->data_size;
    for (uint32_t first = 0; first < self->cols; first += FLOAT_COLS) {
        const uint32_t end = self->cols - first < FLOAT_COLS ? self->cols : first + FLOAT_COLS;
        for (uint32_t i = 0; i < lanes; i++) {
            const uint8_t *row = rows + i * element * self->cols;
            for (uint32_t c = first; c < end; c++)
                memcpy(data + ((size_t)c * self->group_rows + lane_first + i) * element,
                       row + c * element, element);
        }
    }
}

void cpu_weight_pack(struct weight *self, uint32_t row_first, const void *data, uint32_t rows)
{
    const size_t row_size = quant_row_size(self->type, self->cols);
    uint32_t lanes = 0;
    for (uint32_t i = 0; i < rows; i += lanes) {
        const uint32_t in_matrix = (row_first + i) % self->rows;
        const uint32_t lane = in_matrix % self->group_rows;
        const uint32_t group =
            (row_first + i) / self->rows * self->group_count + in_matrix / self->group_rows;
        const uint8_t *from = (const uint8_t *)data + i * row_size;
        lanes = self->group_rows - lane;
        lanes = lanes < rows - i ? lanes : rows - i;
        lanes = lanes < self->rows - in_matrix ? lanes : self->rows - in_matrix;
        if (self->group_rows == 1)
            memcpy(self->data + group * row_size, from, row_size);
        else if (quant_is_quantized(self->type))
            cpu_pack_rows(self, group, lane, from, lanes);
        else if (self->type == TENSOR_F32)
            pack_floats(self, group, lane, from, lanes, 4);
        else
            pack_floats(self, group, lane, from, lanes, 2);
    }
}

void cpu_weight_matrix(struct weight *out, const struct weight *self, uint32_t matrix)
{
    const size_t group = (size_t)matrix * self->group_count;
    *out = *self;
    out->matrix_count = 1;
    out->data = self->data + group * self->data_size;
    out->scales = self->scales ? self->scales + group * self->scales_size : NULL;
}

static void row_of_blocks(float *out, const struct weight *self, uint32_t row)
{
    for (uint32_t b = 0; b < self->cols / OPS_BLOCK; b++) {
        struct quant_group block;
        cpu_pack_read(&block, self, row, b);
        for (uint32_t i = 0; i < OPS_BLOCK; i++) {
            const uint32_t g = i / block.group_cols;
            out[b * OPS_BLOCK + i] = det_fma(block.scale[g], (float)block.q[i], block.min[g]);
        }
    }
}

void cpu_weight_row(float *out, const struct weight *self, uint32_t row)
{
    if (self->group_rows == 1) {
        const size_t offset = row * quant_row_size(self->type, self->cols);
        ref_embed(out, self->type, self->data + offset, self->cols);
        return;
    }
    if (quant_is_quantized(self->type)) {
        row_of_blocks(out, self, row);
        return;
    }
    const uint8_t *data = self->data + row / self->group_rows * self->data_size;
    for (uint32_t c = 0; c < self->cols; c++) {
        const size_t index = (size_t)c * self->group_rows + row % self->group_rows;
        uint16_t half = 0;
        if (self->type == TENSOR_F32) {
            memcpy(&out[c], data + index * sizeof *out, sizeof *out);
            continue;
        }
        memcpy(&half, data + index * sizeof half, sizeof half);
        out[c] = self->type == TENSOR_F16 ? det_f32_from_f16(half) : det_f32_from_bf16(half);
    }
}
