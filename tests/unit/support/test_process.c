#include "tests/support/process.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define WAIT_US 5000000u

static char folder[PROCESS_PATH_SIZE];

static void make_folder(void)
{
    cr_assert_eq(process_folder_make(folder), ODSI_OK);
}

static void remove_folder(void)
{
    process_folder_remove(folder);
    cr_expect_eq(access(folder, F_OK), -1);
}

TestSuite(process, .init = make_folder, .fini = remove_folder, .timeout = 30);

static struct process_config shell(const char *const *args)
{
    return (struct process_config){
        .program = "/bin/sh", .args = args, .folder = folder, .name = "child"};
}

Test(process, tells_the_exit_code_and_keeps_both_outputs_apart)
{
    const char *args[] = {"-c", "echo out; echo log >&2; exit 7", NULL};
    const struct process_config config = shell(args);
    char path[PROCESS_PATH_SIZE];
    char *text = NULL;
    int code = 0;
    cr_assert_eq(process_run(&config, WAIT_US, &code), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(code, 7);
    cr_assert_eq(process_path(path, folder, "child.out"), ODSI_OK);
    cr_assert_eq(process_read_file(&text, path), ODSI_OK);
    cr_expect_str_eq(text, "out\n");
    alloc_free(text);
    cr_assert_eq(process_path(path, folder, "child.log"), ODSI_OK);
    cr_assert_eq(process_read_file(&text, path), ODSI_OK);
    cr_expect_str_eq(text, "log\n");
    alloc_free(text);
}

Test(process, adds_environment_over_its_own)
{
    const char *args[] = {"-c", "test \"$ODSI_TEST_A\" = new -a \"$ODSI_TEST_B\" = kept", NULL};
    const char *env[] = {"ODSI_TEST_A=new", NULL};
    struct process_config config = shell(args);
    int code = -1;
    config.env = env;
    setenv("ODSI_TEST_A", "old", 1);
    setenv("ODSI_TEST_B", "kept", 1);
    cr_assert_eq(process_run(&config, WAIT_US, &code), ODSI_OK);
    cr_expect_eq(code, 0);
}

Test(process, waits_for_a_whole_line_of_a_file)
{
    char path[PROCESS_PATH_SIZE];
    char command[2 * PROCESS_PATH_SIZE];
    char line[32];
    struct process *child = NULL;
    cr_assert_eq(process_path(path, folder, "ready"), ODSI_OK);
    snprintf(command, sizeof command, "printf half >%s; sleep 0.1; echo way >>%s; exec sleep 60",
             path, path);
    const char *args[] = {"-c", command, NULL};
    const struct process_config config = shell(args);
    cr_assert_eq(process_start(&child, &config), ODSI_OK);
    cr_assert_eq(process_wait_line(child, path, WAIT_US, line, sizeof line), ODSI_OK);
    cr_expect_str_eq(line, "halfway");
    cr_expect_eq(process_wait_line(child, path, WAIT_US, line, 4), ODSI_ERR_RANGE);
    process_close(&child);
}

Test(process, says_with_the_log_that_a_child_ended_before_it_was_ready)
{
    const char *args[] = {"-c", "echo no such luck >&2; exit 3", NULL};
    const struct process_config config = shell(args);
    char line[32];
    struct process *child = NULL;
    cr_assert_eq(process_start(&child, &config), ODSI_OK);
    cr_assert_eq(process_wait_line(child, "/nonexistent", WAIT_US, line, sizeof line),
                 ODSI_ERR_UNAVAILABLE);
    cr_expect(strstr(odsi_err_text(), "no such luck"), "%s", odsi_err_text());
    process_close(&child);
}

/* Goal: a signal reaches a child even though this thread has it blocked, as programs with an event
 * loop have. */
Test(process, passes_signals_on_and_names_the_one_that_ended_it)
{
    const char *args[] = {"-c", "exec sleep 60", NULL};
    const struct process_config config = shell(args);
    struct process *child = NULL;
    sigset_t blocked;
    int code = 0;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGTERM);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    cr_assert_eq(process_start(&child, &config), ODSI_OK);
    cr_expect_eq(process_wait(child, 20000, &code), ODSI_ERR_TIMEOUT);
    process_signal(child, SIGTERM);
    cr_assert_eq(process_wait(child, WAIT_US, &code), ODSI_OK);
    cr_expect_eq(code, 128 + SIGTERM);
    process_close(&child);
}

Test(process, kills_what_still_runs_when_closed)
{
    const char *args[] = {"-c", "exec sleep 60", NULL};
    const struct process_config config = shell(args);
    struct process *child = NULL;
    cr_assert_eq(process_start(&child, &config), ODSI_OK);
    const pid_t pid = process_pid(child);
    process_close(&child);
    cr_expect_null(child);
    cr_expect(kill(pid, 0) == -1 && errno == ESRCH);
    process_close(&child);
}

Test(process, names_a_program_that_is_not_built)
{
    const struct process_config config = {.program = "odsi-nothing", .folder = folder};
    struct process *child = NULL;
    cr_expect_eq(process_start(&child, &config), ODSI_ERR_NOT_FOUND);
    cr_expect_null(child);
    cr_expect(strstr(odsi_err_text(), "odsi-nothing"), "%s", odsi_err_text());
}

/* Method: refuse the first, second, third ... allocation until the start succeeds untouched; the
 * sanitizer build sees any leak. */
Test(process, starts_whole_or_not_at_all_when_memory_is_short)
{
    const char *args[] = {"-c", "exit 0", NULL};
    const struct process_config config = shell(args);
    struct process *child = NULL;
    long refused = 0;
    for (;; refused++) {
        alloc_fail_after(refused);
        const enum odsi_err err = process_start(&child, &config);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY);
        cr_assert_null(child);
    }
    cr_expect_geq(refused, 3);
    process_close(&child);
}
