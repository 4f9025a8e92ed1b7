/* The terminal: whether there is one, how wide it is, dimmed text. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_TERM_H
#define ODSI_WORKER_CLI_CLI_TERM_H
#include "common/base/err.h"

#include <stdio.h>

/* Whether to is a terminal that understands escape sequences (TERM is set and not "dumb"). */
int cli_term_is(FILE *to);
/* Columns; 80 when unknown. */
unsigned cli_term_width(FILE *to);
/* Sequences around dimmed text; "" when to is no terminal or NO_COLOR is set. */
const char *cli_term_dim(FILE *to);
const char *cli_term_plain(FILE *to);

#endif
