#include "worker/engine/stop.h"

#include <string.h>

enum odsi_err stop_add(struct stop *self, const void *data, size_t size)
{
    if (size == 0 || size > LIMIT_STOP_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "a stop string of %zu bytes: it must have 1 to %u", size,
                         LIMIT_STOP_SIZE);
    if (self->string_count == LIMIT_STOP_COUNT)
        return odsi_fail(ODSI_ERR_INVALID, "too many stop strings: at most %u", LIMIT_STOP_COUNT);
    struct stop_string *string = &self->strings[self->string_count++];
    memcpy(string->data, data, size);
    string->size = (uint32_t)size;
    return ODSI_OK;
}

/* One byte at a time: pieces are short, and a match may begin in any earlier piece. */
static int feed_byte(struct stop *self, uint8_t byte)
{
    if (self->tail_size == LIMIT_STOP_SIZE) {
        memmove(self->tail, self->tail + 1, LIMIT_STOP_SIZE - 1);
        self->tail_size--;
    }
    self->tail[self->tail_size++] = byte;
    for (uint32_t i = 0; i < self->string_count; i++) {
        const struct stop_string *string = &self->strings[i];
        if (string->size <= self->tail_size &&
            memcmp(self->tail + self->tail_size - string->size, string->data, string->size) == 0)
            return 1;
    }
    return 0;
}

int stop_feed(struct stop *self, const void *text, size_t size)
{
    const uint8_t *bytes = text;
    if (self->string_count == 0)
        return 0;
    for (size_t i = 0; i < size; i++)
        if (feed_byte(self, bytes[i]))
            return 1;
    return 0;
}
