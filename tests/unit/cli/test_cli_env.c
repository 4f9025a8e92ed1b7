#include "worker/cli/cli_env.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static char *const source[] = {(char[]){"PATH=/bin"},
                               (char[]){"ODSI_CPU=scalar"},
                               (char[]){"ODSI_INSECURE=1"},
                               (char[]){"ODSI_CPUS=x"},
                               (char[]){"EMPTY="},
                               (char[]){"broken"},
                               NULL};

/* Goal: a flag's variable of the user never reaches the servers of a local swarm. */
Test(cli_env, keeps_what_a_server_may_see)
{
    struct cli_env env = {0};
    cr_assert_eq(cli_env_copy(&env, source, cli_env_keep_for_server), ODSI_OK);
    cr_assert_eq(env.count, 3);
    cr_expect_str_eq(cli_env_get_view(&env, "PATH"), "/bin");
    cr_expect_str_eq(cli_env_get_view(&env, "ODSI_CPU"), "scalar");
    cr_expect_str_eq(cli_env_get_view(&env, "EMPTY"), "");
    cr_expect_null(cli_env_get_view(&env, "ODSI_INSECURE"));
    cr_expect_null(cli_env_get_view(&env, "ODSI_CPUS"));
    cr_expect_null(env.items[env.count]);
    cli_env_free(&env);
}

Test(cli_env, setting_replaces_the_same_name_only)
{
    struct cli_env env = {0};
    cr_assert_eq(cli_env_copy(&env, source, NULL), ODSI_OK);
    const size_t count = env.count;
    cr_assert_eq(cli_env_set(&env, "ODSI_CPU", "avx2"), ODSI_OK);
    cr_expect_eq(env.count, count);
    cr_expect_str_eq(cli_env_get_view(&env, "ODSI_CPU"), "avx2");
    cr_expect_str_eq(cli_env_get_view(&env, "ODSI_CPUS"), "x");
    cr_assert_eq(cli_env_set(&env, "ODSI_GATEWAY", "127.0.0.1:1"), ODSI_OK);
    cr_expect_eq(env.count, count + 1);
    cr_expect_null(env.items[env.count]);
    cli_env_free(&env);
}

Test(cli_env, holds_more_than_one_block_of_names)
{
    struct cli_env env = {0};
    char name[16];
    for (unsigned i = 0; i < 300; i++) {
        snprintf(name, sizeof name, "N%u", i);
        cr_assert_eq(cli_env_set(&env, name, name + 1), ODSI_OK);
    }
    cr_expect_eq(env.count, 300);
    cr_expect_str_eq(cli_env_get_view(&env, "N299"), "299");
    cr_expect_null(env.items[300]);
    cli_env_free(&env);
}

/* How: fail allocation 1, 2, 3 ... until a run passes untouched. */
Test(cli_env, survives_every_refused_allocation)
{
    enum odsi_err err = ODSI_ERR_NO_MEMORY;
    long count = 0;
    for (; err != ODSI_OK && count < 50; count++) {
        struct cli_env env = {0};
        alloc_fail_after(count);
        err = cli_env_copy(&env, source, NULL);
        if (err == ODSI_OK)
            err = cli_env_set(&env, "A", "b");
        alloc_fail_after(-1);
        cr_assert(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY);
        cli_env_free(&env);
    }
    cr_expect_eq(err, ODSI_OK);
    cr_expect_geq(count, 7);
}
