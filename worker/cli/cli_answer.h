/* An answer as people and scripts read it: its text as it comes, a line of figures, JSON. Shared by
 * `odsi generate` and `odsi chat`. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_ANSWER_H
#define ODSI_WORKER_CLI_CLI_ANSWER_H
#include "common/base/err.h"
#include "worker/cli/cli_client.h"

#include <stddef.h>
#include <stdint.h>

/* For cli_answer_events.on_piece: shows the new text on standard output. context is an int, whether
 * that is a terminal (cli_term_is). */
void cli_answer_show_piece(void *context, const struct cli_answer *answer, uint32_t token_count,
                           size_t text_size);
/* Ends the text on standard output with a new line where it needs one. */
void cli_answer_end_text(const struct cli_answer *answer);

/* After the first token, whose time is the prompt's. */
double cli_answer_tokens_per_s(const struct cli_answer *answer);

/* The figures of a whole answer on standard error, dimmed; with_hops: and a table of its path.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err cli_answer_show_figures(const struct cli_answer *answer, int with_hops);
/* A whole answer as one object on standard output.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err cli_answer_print_json(struct cli_answer *answer);
#endif
