#include "worker/cli/cli_table.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <string.h>

static const struct cli_column columns[] = {{"name", 0}, {"count", 1}, {"state", 0}};

static const char *printed(struct cli_table *table, enum odsi_err *err)
{
    static char out[2048];
    FILE *file = fmemopen(out, sizeof out, "w");
    cr_assert_not_null(file);
    *err = cli_table_print(table, file);
    fclose(file);
    return out;
}

Test(cli_table, aligns_columns_and_numbers)
{
    struct cli_table table;
    enum odsi_err err = ODSI_OK;
    cli_table_init(&table, columns, 3);
    cli_table_cell(&table, "a");
    cli_table_cell(&table, "%d", 5);
    cli_table_cell(&table, "ready");
    cli_table_cell(&table, "longer name");
    cli_table_cell(&table, "%d", 123456);
    cli_table_cell(&table, "x");
    cr_expect_str_eq(printed(&table, &err), "name          count  state\n"
                                            "a                 5  ready\n"
                                            "longer name  123456  x\n");
    cr_expect_eq(err, ODSI_OK);
    cli_table_free(&table);
}

Test(cli_table, counts_characters_and_not_bytes)
{
    struct cli_table table;
    enum odsi_err err = ODSI_OK;
    cli_table_init(&table, columns, 2);
    cli_table_cell(&table, "\xc3\xa4\xc3\xb6\xc3\xbc\xc3\x9f");
    cli_table_cell(&table, "1");
    cr_expect_str_eq(printed(&table, &err),
                     "name  count\n\xc3\xa4\xc3\xb6\xc3\xbc\xc3\x9f      1\n");
    cli_table_free(&table);
}

/* Goal: a name that a stranger chose breaks neither line nor terminal. */
Test(cli_table, shows_hostile_names_harmlessly)
{
    struct cli_table table;
    enum odsi_err err = ODSI_OK;
    cli_table_init(&table, columns, 2);
    cli_table_cell(&table, "a\nb\x1b[2J");
    cli_table_cell(&table, "1");
    cr_expect_str_eq(printed(&table, &err), "name     count\na b\xef\xbf\xbd[2J      1\n");
    cli_table_free(&table);
}

Test(cli_table, prints_the_titles_when_there_are_no_rows)
{
    struct cli_table table;
    enum odsi_err err = ODSI_OK;
    cli_table_init(&table, columns, 3);
    cr_expect_str_eq(printed(&table, &err), "name  count  state\n");
    cr_expect_eq(err, ODSI_OK);
    cli_table_free(&table);
}

Test(cli_table, tells_when_a_cell_found_no_memory)
{
    struct cli_table table;
    enum odsi_err err = ODSI_OK;
    cli_table_init(&table, columns, 1);
    alloc_fail_after(0);
    cli_table_cell(&table, "a");
    alloc_fail_after(-1);
    cli_table_cell(&table, "b");
    printed(&table, &err);
    cr_expect_eq(err, ODSI_ERR_NO_MEMORY);
    cli_table_free(&table);
}
