/* From generated tokens to text that may be shown at once: never half a character, never the
 * beginning of what may become a stop string.
 *
 * Stop strings are looked for in the bytes the tokens add, across token borders; the text ends
 * before the first one. What leaves is valid UTF-8 without NUL, because a protobuf string must be:
 * bytes that cannot be part of a character, and NUL, become U+FFFD.
 * Threads: one owner. Memory: bounded by TEXT_STREAM_SIZE_MAX. */
#ifndef ODSI_WORKER_GATEWAY_TEXT_STREAM_H
#define ODSI_WORKER_GATEWAY_TEXT_STREAM_H
#include "common/base/err.h"
#include "worker/engine/stop.h"
#include "worker/model/tokenizer.h"

#include <stddef.h>
#include <stdint.h>

/* Text that waits for a slow reader. */
#define TEXT_STREAM_SIZE_MAX (16u << 20)

struct text_stream;

/* stops are copied; tokenizer must outlive the stream. at_start: no text stands before the answer,
 * so the space that the tokenizer puts in front of a text is not part of it.
 * Errors: ODSI_ERR_INVALID (more than LIMIT_STOP_COUNT stops), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err text_stream_open(struct text_stream **out,
                                             const struct tokenizer *tokenizer,
                                             const struct stop_string *stops, uint32_t stop_count,
                                             int at_start);
void text_stream_close(struct text_stream **self);

/* Adds one token; *stopped is set when a stop string is complete, after which the stream has
 * ended. Errors: ODSI_ERR_RANGE (the reader is TEXT_STREAM_SIZE_MAX bytes behind),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err text_stream_push(struct text_stream *self, uint32_t token,
                                             int *stopped);
/* No token will follow: what was held back is text now. Harmless when already ended. */
ODSI_MUST_USE enum odsi_err text_stream_end(struct text_stream *self);

/* Hands out at most size_max (>= 4) bytes, cut between characters; *size is 0 when nothing is
 * ready. Valid until the next call on self. */
void text_stream_take(struct text_stream *self, size_t size_max, const char **text, size_t *size);
int text_stream_is_empty(const struct text_stream *self);

/* Whether text is valid UTF-8 without NUL. Any thread. */
int text_stream_is_utf8(const char *text, size_t size);
#endif
