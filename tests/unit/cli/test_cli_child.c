#include "worker/cli/cli_child.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "tests/support/process.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* cli_child starts children as this very binary with CLI_CHILD_COMMAND, as odsi's main knows it.
 * The test program has Criterion's main, so this constructor takes its part. */
__attribute__((constructor)) static void become_child(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], CLI_CHILD_COMMAND) == 0)
        _exit(cli_child_become(argc - 1, argv + 1));
}

static char *const environment[] = {(char[]){"PATH=/usr/bin:/bin"}, NULL};
static char folder[PROCESS_PATH_SIZE];

static void setup(void)
{
    cr_assert_eq(process_folder_make(folder), ODSI_OK);
    cr_assert_eq(cli_child_wait_setup(), ODSI_OK);
}

static void teardown(void)
{
    process_folder_remove(folder);
}

TestSuite(cli_child, .init = setup, .fini = teardown);

/* Starts `sh -c script` as a server of a swarm. */
static void start_shell(struct cli_child *child, char *script, const char *name)
{
    char shell[] = "sh", flag[] = "-c";
    char *argv[] = {shell, flag, script, NULL};
    const struct cli_child_config config = {
        .name = name, .dir = folder, .argv = argv, .environment = environment};
    cr_assert_eq(cli_child_start(child, &config), ODSI_OK, "%s", odsi_err_text());
}

static void wait_for_end(struct cli_child *child)
{
    const uint64_t deadline_us = clock_monotonic_us() + 20000000;
    int is_terminal = 0;
    while (!cli_child_ended(child)) {
        cr_assert_lt(clock_monotonic_us(), deadline_us, "%s does not end", child->name);
        cli_child_wait(100, &is_terminal);
    }
}

static char *text_of(const char *name)
{
    char path[PROCESS_PATH_SIZE];
    char *text = NULL;
    cr_assert_eq(process_path(path, folder, name), ODSI_OK);
    cr_assert_eq(process_read_file(&text, path), ODSI_OK);
    return text;
}

Test(cli_child, tells_how_a_child_ended)
{
    struct cli_child child;
    char exits[] = "exit 7", dies[] = "kill -9 $$", text[128];
    start_shell(&child, exits, "a");
    wait_for_end(&child);
    cr_expect_eq(cli_child_exit_code(&child), 7);
    cli_child_tell_end(&child, text, sizeof text);
    cr_expect_str_eq(text, "a ended with code 7");

    start_shell(&child, dies, "b");
    wait_for_end(&child);
    cr_expect_eq(cli_child_exit_code(&child), 128 + SIGKILL);
    cli_child_tell_end(&child, text, sizeof text);
    cr_expect_str_eq(text, "b was ended by signal 9 (Killed)");
}

Test(cli_child, keeps_pid_and_output_in_the_folder)
{
    struct cli_child child;
    char script[] = "echo $$; echo wrong >&2";
    char expected[64];
    start_shell(&child, script, "worker-0");
    wait_for_end(&child);
    char *log = text_of("worker-0.log"), *pid = text_of("worker-0.pid");
    snprintf(expected, sizeof expected, "%ld\nwrong\n", (long)child.pid);
    cr_expect_str_eq(log, expected, "the pid must be that of the program itself");
    snprintf(expected, sizeof expected, "%ld\n", (long)child.pid);
    cr_expect_str_eq(pid, expected);
    alloc_free(log);
    alloc_free(pid);
}

Test(cli_child, a_program_that_is_not_there_ends_with_127_and_says_so)
{
    struct cli_child child;
    char program[] = "odsi-no-such-program";
    char *argv[] = {program, NULL};
    const struct cli_child_config config = {
        .name = "none", .dir = folder, .argv = argv, .environment = environment};
    cr_assert_eq(cli_child_start(&child, &config), ODSI_OK);
    wait_for_end(&child);
    cr_expect_eq(cli_child_exit_code(&child), 127);
    char *log = text_of("none.log");
    cr_expect(strstr(log, "odsi-no-such-program: No such file"), "%s", log);
    alloc_free(log);
}

/* Goal: children start with no signal blocked, though we block some. */
Test(cli_child, a_child_takes_signals_as_usual)
{
    struct cli_child child;
    char script[] = "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done";
    start_shell(&child, script, "a");
    char *log = text_of("a.log");
    const uint64_t deadline_us = clock_monotonic_us() + 20000000;
    while (strcmp(log, "up\n") != 0) {
        cr_assert_lt(clock_monotonic_us(), deadline_us);
        alloc_free(log);
        usleep(5000);
        log = text_of("a.log");
    }
    alloc_free(log);
    cli_child_signal(&child, SIGTERM);
    wait_for_end(&child);
    cr_expect_eq(cli_child_exit_code(&child), 5);
    cli_child_signal(&child, SIGTERM); /* harmless after the end */
}

Test(cli_child, shows_the_last_lines_of_a_log)
{
    struct cli_child child;
    char script[] = "for i in $(seq 1 400); do echo \"line $i of a log\"; done";
    char out[4096] = "";
    start_shell(&child, script, "a");
    wait_for_end(&child);
    FILE *file = fmemopen(out, sizeof out, "w");
    cli_child_show_log(&child, file);
    fclose(file);
    cr_expect_eq(strncmp(out, "    line 389 of a log\n", 22), 0, "%s", out);
    cr_expect(strstr(out, "    line 400 of a log\n"));
}

Test(cli_child, waiting_reports_signals_that_ask_us_to_end)
{
    int is_terminal = 1;
    kill(getpid(), SIGTERM);
    cr_expect_eq(cli_child_wait(1000, &is_terminal), SIGTERM);
    cr_expect_eq(is_terminal, 0);
    cr_expect_eq(cli_child_wait(1, &is_terminal), 0);
}

/* Goal: no orphans, even when we die without a chance to clean up.
 * How: a child (this binary in the part of a parent, by sh) starts a grandchild through the same
 * door and is killed; the grandchild must go too. */
Test(cli_child, a_child_dies_with_its_parent)
{
    struct cli_child parent;
    char script[512];
    char self[256];
    const ssize_t size = readlink("/proc/self/exe", self, sizeof self - 1);
    cr_assert_gt(size, 0);
    self[size] = '\0';
    snprintf(script, sizeof script, "%s %s $$ sleep 300 & echo $!; wait", self, CLI_CHILD_COMMAND);
    start_shell(&parent, script, "parent");

    const uint64_t deadline_us = clock_monotonic_us() + 20000000;
    long grandchild = 0;
    char path[64], text[64] = "";
    while (strncmp(text, "sleep", 5) != 0) { /* it has become the program */
        cr_assert_lt(clock_monotonic_us(), deadline_us);
        usleep(5000);
        char *log = text_of("parent.log");
        grandchild = strtol(log, NULL, 10);
        alloc_free(log);
        snprintf(path, sizeof path, "/proc/%ld/comm", grandchild);
        FILE *file = grandchild ? fopen(path, "r") : NULL;
        if (!file)
            continue;
        if (!fgets(text, sizeof text, file))
            text[0] = '\0';
        fclose(file);
    }
    cli_child_signal(&parent, SIGKILL);
    wait_for_end(&parent);
    while (kill((pid_t)grandchild, 0) == 0) {
        FILE *file = fopen(path, "r"); /* a zombie of init is as good as gone */
        if (!file)
            break;
        fclose(file);
        snprintf(path, sizeof path, "/proc/%ld/status", grandchild);
        file = fopen(path, "r");
        int is_zombie = 0;
        while (file && fgets(text, sizeof text, file))
            is_zombie |= strstr(text, "(zombie)") != NULL;
        if (file)
            fclose(file);
        if (is_zombie)
            break;
        cr_assert_lt(clock_monotonic_us(), deadline_us, "the grandchild lives on");
        usleep(5000);
    }
}
