#include "worker/cli/cmd.h"

#include <criterion/criterion.h>
#include <string.h>

static const char *nearest(const char *name)
{
    const struct cmd *command = cmd_nearest(name);
    return command ? command->name : "none";
}

Test(cmd, finds_every_command_of_the_table_by_its_name)
{
    for (const struct cmd *at = cmd_table(); at->name; at++) {
        cr_expect_eq(cmd_find(at->name), at, "%s", at->name);
        cr_expect(at->summary && at->summary[0], "%s has no summary", at->name);
        cr_expect_not_null(at->run, "%s", at->name);
    }
    cr_expect_null(cmd_find(""));
    cr_expect_null(cmd_find("generat"));
}

Test(cmd, suggests_the_command_that_a_slip_was_meant_to_be)
{
    cr_expect_str_eq(nearest("genreate"), "generate");
    cr_expect_str_eq(nearest("generte"), "generate");
    cr_expect_str_eq(nearest("gen"), "generate");
    cr_expect_str_eq(nearest("lcoal"), "local");
    cr_expect_str_eq(nearest("locale"), "local");
    cr_expect_str_eq(nearest("stats"), "status");
    cr_expect_str_eq(nearest("modle"), "model");
    cr_expect_str_eq(nearest("benhc"), "bench");
    cr_expect_str_eq(nearest("identiy"), "identity");
}

/* Goal: no far-fetched advice. */
Test(cmd, suggests_nothing_when_nothing_is_near)
{
    cr_expect_str_eq(nearest("ledger"), "none");
    cr_expect_str_eq(nearest("install"), "none");
    cr_expect_str_eq(nearest(""), "none");
    cr_expect_str_eq(nearest("generate-a-very-long-name-of-a-command"), "none");
}
