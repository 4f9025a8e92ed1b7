/* Finds stop strings in a text that arrives in pieces, also across their borders.
 * Threads: one owner at a time. */
#ifndef ODSI_WORKER_ENGINE_STOP_H
#define ODSI_WORKER_ENGINE_STOP_H
#include "common/base/err.h"
#include "common/base/limits.h"

#include <stddef.h>
#include <stdint.h>

struct stop_string {
    uint8_t data[LIMIT_STOP_SIZE];
    uint32_t size; /* 1 .. LIMIT_STOP_SIZE */
};

/* Zero-initialize for "no stop strings". */
struct stop {
    struct stop_string strings[LIMIT_STOP_COUNT];
    uint32_t string_count;
    uint8_t tail[LIMIT_STOP_SIZE]; /* the last bytes of the text */
    uint32_t tail_size;
};

/* Errors: ODSI_ERR_INVALID (empty, longer than LIMIT_STOP_SIZE, or one too many). */
ODSI_MUST_USE enum odsi_err stop_add(struct stop *self, const void *data, size_t size);

/* Adds the next piece of text; 1 when a stop string ends in it. */
int stop_feed(struct stop *self, const void *text, size_t size);
#endif
