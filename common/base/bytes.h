/* Little-endian loads and stores on unaligned bytes, and lower-case hex. Any thread. */
#ifndef ODSI_COMMON_BASE_BYTES_H
#define ODSI_COMMON_BASE_BYTES_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

static inline uint32_t bytes_load_u32(const uint8_t *from)
{
    return (uint32_t)from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 |
           (uint32_t)from[3] << 24;
}

static inline uint64_t bytes_load_u64(const uint8_t *from)
{
    return (uint64_t)bytes_load_u32(from) | (uint64_t)bytes_load_u32(from + 4) << 32;
}

/* Appending to a block of canonical bytes: both return the place behind what they wrote. */
static inline uint8_t *bytes_put(uint8_t *to, const void *data, size_t size)
{
    memcpy(to, data, size);
    return to + size;
}

static inline uint8_t *bytes_put_u32(uint8_t *to, uint32_t value)
{
    for (uint32_t byte = 0; byte < 4; byte++)
        *to++ = (uint8_t)(value >> (8 * byte));
    return to;
}

/* out has 2 * size + 1 bytes. */
void bytes_to_hex(char *out, const uint8_t *data, size_t size);
/* Reads exactly 2 * size hex digits of text (then a NUL); returns 1, or 0 and leaves out
 * undefined. */
int bytes_from_hex(uint8_t *out, size_t size, const char *text);

#ifdef __cplusplus
}
#endif
#endif
