/* A table of short texts in aligned columns. Cells may hold names that strangers chose: whatever
 * could move a cursor is replaced. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_TABLE_H
#define ODSI_WORKER_CLI_CLI_TABLE_H
#include "common/base/buf.h"
#include "common/base/err.h"

#include <stdint.h>
#include <stdio.h>

#define CLI_TABLE_COLUMNS_MAX 16u

struct cli_column {
    const char *title;
    int is_right; /* numbers */
};

/* Filled cell by cell, row after row; in the caller's memory. */
struct cli_table {
    const struct cli_column *columns;
    uint32_t column_count;
    uint32_t cell_count;
    struct buf cells; /* NUL-terminated texts one after the other */
};

/* columns stay valid; 1 to CLI_TABLE_COLUMNS_MAX. Ended with cli_table_free. */
void cli_table_init(struct cli_table *self, const struct cli_column *columns,
                    uint32_t column_count);
void cli_table_free(struct cli_table *self);
/* The next cell. Failures are kept and told by cli_table_print. */
void cli_table_cell(struct cli_table *self, const char *format, ...) ODSI_PRINTF(2, 3);
/* Title line and rows, columns two spaces apart; the last row must be complete.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_RANGE (above 16 MiB). */
ODSI_MUST_USE enum odsi_err cli_table_print(struct cli_table *self, FILE *to);
#endif
