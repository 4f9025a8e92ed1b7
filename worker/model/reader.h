/* A place in some bytes that only moves forward and never behind the end: how the formats of this
 * folder are read. The functions return 1, or 0 (reader_take: NULL) when the bytes end before;
 * then nothing moves. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_READER_H
#define ODSI_WORKER_MODEL_READER_H
#include "common/base/bytes.h"

#include <stddef.h>
#include <stdint.h>

struct reader {
    const uint8_t *data;
    size_t size;
    size_t at; /* <= size */
};

static inline size_t reader_left(const struct reader *self)
{
    return self->size - self->at;
}

static inline const uint8_t *reader_take(struct reader *self, uint64_t size)
{
    if (size > reader_left(self))
        return NULL;
    const uint8_t *from = self->data + self->at;
    self->at += (size_t)size;
    return from;
}

static inline int reader_u8(struct reader *self, uint8_t *out)
{
    const uint8_t *from = reader_take(self, 1);
    if (from)
        *out = from[0];
    return from != NULL;
}

static inline int reader_u16(struct reader *self, uint16_t *out)
{
    const uint8_t *from = reader_take(self, 2);
    if (from)
        *out = (uint16_t)(from[0] | from[1] << 8);
    return from != NULL;
}

static inline int reader_u32(struct reader *self, uint32_t *out)
{
    const uint8_t *from = reader_take(self, 4);
    if (from)
        *out = bytes_load_u32(from);
    return from != NULL;
}

static inline int reader_u64(struct reader *self, uint64_t *out)
{
    const uint8_t *from = reader_take(self, 8);
    if (from)
        *out = bytes_load_u64(from);
    return from != NULL;
}

static inline int reader_f32(struct reader *self, float *out)
{
    uint32_t bits = 0;
    const int ok = reader_u32(self, &bits);
    if (ok)
        memcpy(out, &bits, sizeof *out);
    return ok;
}
#endif
