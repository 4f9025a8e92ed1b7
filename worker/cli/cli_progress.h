/* Progress that people can watch: on a terminal one line that renews itself, elsewhere one line
 * for each new text. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_PROGRESS_H
#define ODSI_WORKER_CLI_CLI_PROGRESS_H
#include "common/base/err.h"

#include <stdint.h>
#include <stdio.h>

struct cli_progress {
    FILE *to; /* NULL: show nothing */
    int is_terminal;
    int is_shown;
    uint64_t shown_us;
    char text[256]; /* the last one */
};

/* to may be NULL. */
void cli_progress_init(struct cli_progress *self, FILE *to);
void cli_progress_show(struct cli_progress *self, const char *format, ...) ODSI_PRINTF(2, 3);
/* "label  41% of 1.2 GiB", ten times a second at most, on a terminal only: a log needs no
 * percentages. */
void cli_progress_bytes(struct cli_progress *self, const char *label, uint64_t done,
                        uint64_t total);
/* Takes the line off the terminal, so that other output may follow. */
void cli_progress_clear(struct cli_progress *self);
#endif
