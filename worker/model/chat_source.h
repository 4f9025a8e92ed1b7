/* The text of a chat template (Jinja) in one spelling, so that two templates that mean the same
 * and are written differently can be recognized by the same words:
 *   - comments are gone, and white space outside literals, but one space between two words;
 *   - the marks that strip white space around tags ("{{-", "-%}") are gone;
 *   - string literals stand in backticks with their escapes resolved, and neighbours that were
 *     added up are one: '<|im_end|>' + "\n" is `<|im_end|>` and a line end;
 *   - x['name'] is x.name, and x.strip() is x|trim;
 *   - text outside tags is a literal too; white space there is dropped, except that a line end
 *     which Jinja prints behind an output ("}}") is kept.
 * It is not a parser: whatever it does not know passes through. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_CHAT_SOURCE_H
#define ODSI_WORKER_MODEL_CHAT_SOURCE_H
#include "common/base/buf.h"
#include "common/base/err.h"

#include <stddef.h>

/* Appends the one spelling of text to out, at most twice as long as text.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_RANGE (more than out takes). */
ODSI_MUST_USE enum odsi_err chat_source_spell(const char *text, size_t size, struct buf *out);
#endif
