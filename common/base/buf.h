/* A growing byte buffer that is born with a ceiling.
 *
 * An append that would pass size_max, or finds no memory, changes nothing, marks the buffer
 * failed and returns the error; later appends return it again, so a series of appends needs one
 * check at its end (buf_status). Threads: one owner at a time. */
#ifndef ODSI_COMMON_BASE_BUF_H
#define ODSI_COMMON_BASE_BUF_H
#include "common/base/err.h"
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct buf {
    uint8_t *data; /* NULL until the first append */
    size_t size;
    size_t capacity;
    size_t size_max;
    enum odsi_err status;
};

void buf_init(struct buf *self, size_t size_max);
/* Gives the memory back; the buffer is empty and usable again. */
void buf_free(struct buf *self);
/* Empties it and clears a failure; keeps the memory. */
void buf_reset(struct buf *self);
enum odsi_err buf_append(struct buf *self, const void *data, size_t size);
enum odsi_err buf_append_text(struct buf *self, const char *text);
enum odsi_err buf_append_u8(struct buf *self, uint8_t value);
/* Little-endian. */
enum odsi_err buf_append_u32(struct buf *self, uint32_t value);
enum odsi_err buf_append_u64(struct buf *self, uint64_t value);
enum odsi_err buf_printf(struct buf *self, const char *format, ...) ODSI_PRINTF(2, 3);
/* The content as a C string (a NUL is kept behind the end); "" when empty or failed.
 * Valid until the next call on self. */
const char *buf_text_view(struct buf *self);
ODSI_MUST_USE enum odsi_err buf_status(const struct buf *self);

#ifdef __cplusplus
}
#endif
#endif
