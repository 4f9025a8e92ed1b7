/* Small texts for people: durations, sizes, layer ranges, and text from strangers made safe to
 * show. Pure but for cli_text_show; any thread. */
#ifndef ODSI_WORKER_CLI_CLI_TEXT_H
#define ODSI_WORKER_CLI_CLI_TEXT_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define CLI_TEXT_SIZE 32u /* bytes of any short text below, with the NUL */

/* "850 us", "1.25 ms", "31.0 s"; negative ones with a minus sign. */
void cli_text_duration(char out[CLI_TEXT_SIZE], int64_t duration_us);
/* "512 B", "1.5 MiB". */
void cli_text_bytes(char out[CLI_TEXT_SIZE], uint64_t size);
/* Layers [first, end) as flags and tables write them, both ends counted in: "0-11"; "-" for
 * none. */
void cli_text_layers(char out[CLI_TEXT_SIZE], uint32_t first, uint32_t end);

/* Reads "A-B" or "A", both ends counted in, as [*first, *end). *text moves behind it.
 * Errors: ODSI_ERR_INVALID. */
ODSI_MUST_USE enum odsi_err cli_text_read_layers(const char **text, uint32_t *first, uint32_t *end);
/* Reads up to *count ids "1,5,7" into ids; *count is the number written. An empty text is no ids.
 * Errors: ODSI_ERR_INVALID (another character, above u32), ODSI_ERR_RANGE (more than *count). */
ODSI_MUST_USE enum odsi_err cli_text_read_ids(const char *text, uint32_t *ids, uint32_t *count);

/* Slips of the keyboard between two short words: letters added, left out, changed, or two
 * neighbours swapped. Words above 31 bytes are as far as can be. */
unsigned cli_text_distance(const char *a, const char *b);

/* Bytes of text from text[at] on that make one valid UTF-8 character; 0: none does. */
size_t cli_text_utf8(const char *text, size_t size, size_t at);

/* Writes text that came from elsewhere. On a terminal control characters other than newline and
 * tab, which could move the cursor or worse, and bytes that are not UTF-8 become U+FFFD; a pipe
 * gets the bytes as they are. */
void cli_text_show(FILE *to, int is_terminal, const char *text, size_t size);
#endif
