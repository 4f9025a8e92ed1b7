#include "worker/cli/cli_table.h"

#include "common/base/assert.h"
#include "worker/cli/cli_text.h"

#include <stdarg.h>
#include <string.h>

#define TABLE_SIZE_MAX (16u << 20)
#define CELL_SIZE_MAX  512u

void cli_table_init(struct cli_table *self, const struct cli_column *columns, uint32_t column_count)
{
    ODSI_ASSERT(column_count > 0 && column_count <= CLI_TABLE_COLUMNS_MAX);
    self->columns = columns;
    self->column_count = column_count;
    self->cell_count = 0;
    buf_init(&self->cells, TABLE_SIZE_MAX);
}

void cli_table_free(struct cli_table *self)
{
    buf_free(&self->cells);
}

void cli_table_cell(struct cli_table *self, const char *format, ...)
{
    char text[CELL_SIZE_MAX];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    for (char *at = text; *at; at++)
        if (*at == '\n' || *at == '\t')
            *at = ' ';
    if (buf_append(&self->cells, text, strlen(text) + 1) == ODSI_OK)
        self->cell_count++;
}

/* Characters, taking each for one column. */
static unsigned width_of(const char *text)
{
    const size_t size = strlen(text);
    unsigned width = 0;
    for (size_t at = 0; at < size; width++) {
        const size_t length = cli_text_utf8(text, size, at);
        at += length ? length : 1;
    }
    return width;
}

static void print_cell(FILE *to, const char *text, unsigned width, int is_right, int is_last)
{
    const unsigned own = width_of(text);
    const int padding = (int)(width > own ? width - own : 0);
    if (is_right)
        fprintf(to, "%*s", padding, "");
    cli_text_show(to, 1, text, strlen(text));
    if (!is_right && !is_last)
        fprintf(to, "%*s", padding, "");
    fputs(is_last ? "\n" : "  ", to);
}

enum odsi_err cli_table_print(struct cli_table *self, FILE *to)
{
    const enum odsi_err err = buf_status(&self->cells);
    unsigned widths[CLI_TABLE_COLUMNS_MAX];
    if (err != ODSI_OK)
        return err;
    ODSI_ASSERT(self->cell_count % self->column_count == 0);

    for (uint32_t i = 0; i < self->column_count; i++)
        widths[i] = width_of(self->columns[i].title);
    const char *cell = (const char *)self->cells.data;
    for (uint32_t i = 0; i < self->cell_count; i++) {
        unsigned *width = &widths[i % self->column_count];
        const unsigned own = width_of(cell);
        *width = own > *width ? own : *width;
        cell += strlen(cell) + 1;
    }

    for (uint32_t i = 0; i < self->column_count; i++)
        print_cell(to, self->columns[i].title, widths[i], self->columns[i].is_right,
                   i + 1 == self->column_count);
    cell = (const char *)self->cells.data;
    for (uint32_t i = 0; i < self->cell_count; i++) {
        const uint32_t column = i % self->column_count;
        print_cell(to, cell, widths[column], self->columns[column].is_right,
                   column + 1 == self->column_count);
        cell += strlen(cell) + 1;
    }
    return ODSI_OK;
}
