#include "common/base/buf.h"

#include "common/base/alloc.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void buf_init(struct buf *self, size_t size_max)
{
    memset(self, 0, sizeof *self);
    self->size_max = size_max;
}

void buf_free(struct buf *self)
{
    alloc_free(self->data);
    buf_init(self, self->size_max);
}

void buf_reset(struct buf *self)
{
    self->size = 0;
    self->status = ODSI_OK;
}

/* Room for size more bytes and one NUL. */
static enum odsi_err reserve(struct buf *self, size_t size)
{
    if (self->status != ODSI_OK)
        return self->status;
    if (size > self->size_max - self->size) {
        self->status = odsi_fail(ODSI_ERR_RANGE, "more than %zu bytes", self->size_max);
        return self->status;
    }
    if (size > SIZE_MAX - 1 - self->size) {
        self->status = odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for %zu bytes more", size);
        return self->status;
    }
    const size_t need = self->size + size + 1;
    if (need <= self->capacity)
        return ODSI_OK;
    size_t capacity = self->capacity > 32 ? self->capacity : 32;
    capacity = capacity <= SIZE_MAX / 2 ? 2 * capacity : SIZE_MAX;
    if (capacity > self->size_max && self->size_max < SIZE_MAX)
        capacity = self->size_max + 1; /* the ceiling bounds the memory as well */
    if (capacity < need)
        capacity = need;
    self->status = alloc_resize(&self->data, capacity, 1);
    if (self->status == ODSI_OK)
        self->capacity = capacity;
    return self->status;
}

enum odsi_err buf_append(struct buf *self, const void *data, size_t size)
{
    if (reserve(self, size) != ODSI_OK)
        return self->status;
    if (size > 0)
        memcpy(self->data + self->size, data, size);
    self->size += size;
    return ODSI_OK;
}

enum odsi_err buf_append_text(struct buf *self, const char *text)
{
    return buf_append(self, text, strlen(text));
}

enum odsi_err buf_append_u8(struct buf *self, uint8_t value)
{
    return buf_append(self, &value, 1);
}

enum odsi_err buf_append_u32(struct buf *self, uint32_t value)
{
    uint8_t bytes[4];
    for (int i = 0; i < 4; i++)
        bytes[i] = (uint8_t)(value >> (8 * i));
    return buf_append(self, bytes, sizeof bytes);
}

enum odsi_err buf_append_u64(struct buf *self, uint64_t value)
{
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++)
        bytes[i] = (uint8_t)(value >> (8 * i));
    return buf_append(self, bytes, sizeof bytes);
}

enum odsi_err buf_printf(struct buf *self, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    const int length = vsnprintf(NULL, 0, format, args);
    va_end(args);
    if (length < 0 && self->status == ODSI_OK)
        self->status = odsi_fail(ODSI_ERR_INTERNAL, "text '%s' cannot be formatted", format);
    if (length < 0 || reserve(self, (size_t)length) != ODSI_OK)
        return self->status;
    va_start(args, format);
    vsnprintf((char *)self->data + self->size, (size_t)length + 1, format, args);
    va_end(args);
    self->size += (size_t)length;
    return ODSI_OK;
}

const char *buf_text_view(struct buf *self)
{
    if (self->status != ODSI_OK || !self->data)
        return "";
    self->data[self->size] = '\0';
    return (const char *)self->data;
}

enum odsi_err buf_status(const struct buf *self)
{
    return self->status;
}
