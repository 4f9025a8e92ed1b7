#include "kernels/cpu/cpu_weight.h"

#include "common/base/alloc.h"
#include "kernels/cpu/cpu_loops.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"

#ifdef __linux__
#include <sys/mman.h>
/* Linux 6.1: collapse what is there into large pages, now. Older ones answer EINVAL. */
#define MADV_COLLAPSE_NOW 25
#define LARGE_PAGE_SIZE   ((uintptr_t)2 << 20)
#endif

#define Q8_BLOCK_SIZE 34u
#define QUAD          4u                 /* consecutive columns of a row that stay together */
#define QUAD_COUNT    (OPS_BLOCK / QUAD) /* of one block */

/* Asks for large pages where the memory spans some: a decode reads all of it once per token, and
 * the walks through page tables would cost several percent of that. Only a wish; the answer
 * changes nothing else. */
static void prefer_large_pages(void *memory, size_t size)
{
#ifdef MADV_COLLAPSE_NOW
    const uintptr_t mask = LARGE_PAGE_SIZE - 1;
    const uintptr_t first = ((uintptr_t)memory + mask) & ~mask;
    const uintptr_t end = ((uintptr_t)memory + size) & ~mask;
    if (first < end)
        (void)madvise((void *)first, end - first, MADV_COLLAPSE_NOW);
#else
    (void)memory;
    (void)size;
#endif
}

/* Bytes of one group's data. */
static size_t group_size(const struct weight *self)
{
    const int split = self->type == TENSOR_Q8_0 && self->group_rows > 1;
    return self->group_rows * (split ? self->cols : quant_row_size(self->type, self->cols));
}

static size_t group_scales(const struct weight *self)
{
    return (size_t)self->group_rows * (self->cols / OPS_BLOCK);
}

enum odsi_err cpu_weight_open(struct weight **out, enum tensor_type type, uint32_t rows,
                              uint32_t cols, uint32_t matrix_count, const struct cpu_loops *loops)
{
    *out = NULL;
    struct weight *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    const int packs = type == TENSOR_Q8_0 || !quant_is_quantized(type);
    self->type = type;
    self->rows = rows;
    self->cols = cols;
    self->matrix_count = matrix_count;
    self->group_rows = packs ? loops->group_rows : 1;
    self->group_count = (rows + self->group_rows - 1) / self->group_rows;
    self->quant_flip = loops->quant_flip;
    const size_t groups = (size_t)self->group_count * matrix_count;
    err = alloc_aligned(&self->data, groups, group_size(self));
    if (err == ODSI_OK)
        prefer_large_pages(self->data, groups * group_size(self));
    if (err == ODSI_OK && type == TENSOR_Q8_0 && self->group_rows > 1)
        err = alloc_aligned(&self->scales, groups, group_scales(self) * sizeof *self->scales);
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
    alloc_free((*self)->scales);
    alloc_free((*self)->data);
    alloc_free(*self);
    *self = NULL;
}

/* to[col][group_rows], the lane of one row; element_size 2 or 4. */
static void pack_float_row(struct weight *self, const uint8_t *row, uint32_t group, uint32_t lane)
{
    const size_t first = (size_t)group * self->cols * self->group_rows + lane;
    if (self->type == TENSOR_F32) {
        float *to = (float *)self->data + first;
        for (uint32_t c = 0; c < self->cols; c++)
            memcpy(to + (size_t)c * self->group_rows, row + c * sizeof *to, sizeof *to);
    } else {
        uint16_t *to = (uint16_t *)self->data + first;
        for (uint32_t c = 0; c < self->cols; c++)
            memcpy(to + (size_t)c * self->group_rows, row + c * sizeof *to, sizeof *to);
    }
}

static void pack_q8_row(struct weight *self, const uint8_t *row, uint32_t group, uint32_t lane)
{
    const uint32_t blocks = self->cols / OPS_BLOCK;
    const uint32_t flip = self->quant_flip * 0x01010101u;
    for (uint32_t b = 0; b < blocks; b++) {
        const uint8_t *block = row + (size_t)b * Q8_BLOCK_SIZE;
        const size_t index = (size_t)group * blocks + b;
        memcpy(&self->scales[index * self->group_rows + lane], block, sizeof *self->scales);
        uint32_t *to = (uint32_t *)self->data + index * QUAD_COUNT * self->group_rows + lane;
        for (uint32_t i = 0; i < QUAD_COUNT; i++) {
            uint32_t quad;
            memcpy(&quad, block + 2 + (size_t)i * QUAD, sizeof quad);
            to[(size_t)i * self->group_rows] = quad ^ flip;
        }
    }
}

void cpu_weight_pack(struct weight *self, uint32_t row_first, const void *data, uint32_t rows)
{
    const size_t row_size = quant_row_size(self->type, self->cols);
    for (uint32_t i = 0; i < rows; i++) {
        const uint32_t r = row_first + i;
        const uint32_t in_matrix = r % self->rows;
        const uint32_t group = r / self->rows * self->group_count + in_matrix / self->group_rows;
        const uint32_t lane = in_matrix % self->group_rows;
        const uint8_t *row = (const uint8_t *)data + i * row_size;
        if (self->group_rows == 1)
            memcpy((uint8_t *)self->data + group * row_size, row, row_size);
        else if (self->type == TENSOR_Q8_0)
            pack_q8_row(self, row, group, lane);
        else
            pack_float_row(self, row, group, lane);
    }
}

void cpu_weight_matrix(struct weight *out, const struct weight *self, uint32_t matrix)
{
    const size_t group = (size_t)matrix * self->group_count;
    *out = *self;
    out->matrix_count = 1;
    out->data = (uint8_t *)self->data + group * group_size(self);
    out->scales = self->scales ? self->scales + group * group_scales(self) : NULL;
}

static void row_of_q8(float *out, const struct weight *self, uint32_t group, uint32_t lane)
{
    const uint32_t blocks = self->cols / OPS_BLOCK;
    for (uint32_t c = 0; c < self->cols; c++) {
        const size_t index = (size_t)group * blocks + c / OPS_BLOCK;
        const size_t quad = index * QUAD_COUNT + c % OPS_BLOCK / QUAD;
        const uint8_t *at =
            (const uint8_t *)self->data + (quad * self->group_rows + lane) * QUAD + c % QUAD;
        const float scale = det_f32_from_f16(self->scales[index * self->group_rows + lane]);
        out[c] = det_fma(scale, (float)(int8_t)(*at ^ self->quant_flip), 0.0f);
    }
}

void cpu_weight_row(float *out, const struct weight *self, uint32_t row)
{
    if (self->group_rows == 1) {
        const size_t offset = row * quant_row_size(self->type, self->cols);
        ref_embed(out, self->type, (const uint8_t *)self->data + offset, self->cols);
        return;
    }
    const uint32_t group = row / self->group_rows;
    const uint32_t lane = row % self->group_rows;
    const size_t first = (size_t)group * self->cols * self->group_rows + lane;
    if (self->type == TENSOR_Q8_0) {
        row_of_q8(out, self, group, lane);
        return;
    }
    for (uint32_t c = 0; c < self->cols; c++) {
        const size_t index = first + (size_t)c * self->group_rows;
        const uint16_t half = self->type == TENSOR_F32 ? 0 : ((const uint16_t *)self->data)[index];
        if (self->type == TENSOR_F32)
            out[c] = ((const float *)self->data)[index];
        else
            out[c] = self->type == TENSOR_F16 ? det_f32_from_f16(half) : det_f32_from_bf16(half);
    }
}
