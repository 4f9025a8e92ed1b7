#include "common/base/log.h"

#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* What was written to standard error so far, in text; the redirected stream is a pipe whose end
 * must be closed before reading. Returns its size. */
static size_t read_stderr(char *text, size_t size)
{
    fclose(stderr);
    close(STDERR_FILENO);
    FILE *stream = cr_get_redirected_stderr();
    const size_t got = fread(text, 1, size - 1, stream);
    text[got] = '\0';
    return got;
}

Test(log, writes_one_line_with_time_level_and_program, .init = cr_redirect_stderr)
{
    char text[4096];
    cr_assert_eq(log_setup("odsi-test", "info"), ODSI_OK);
    log_line(LOG_WARN, "peer %d left", 7);
    const size_t size = read_stderr(text, sizeof text);
    cr_assert_gt(size, 25);
    cr_expect_str_eq(text + 24, " warn  odsi-test: peer 7 left\n");
    int year, month, day, hour, minute, second, ms;
    char z;
    cr_expect_eq(sscanf(text, "%4d-%2d-%2dT%2d:%2d:%2d.%3d%c", &year, &month, &day, &hour, &minute,
                        &second, &ms, &z),
                 8);
    cr_expect_eq(z, 'Z');
}

Test(log, writes_only_up_to_its_level, .init = cr_redirect_stderr)
{
    char text[4096];
    cr_assert_eq(log_setup("p", "warn"), ODSI_OK);
    log_line(LOG_ERROR, "one");
    log_line(LOG_WARN, "two");
    log_line(LOG_INFO, "three");
    log_line(LOG_DEBUG, "four");
    cr_expect(log_enabled(LOG_WARN));
    cr_expect_not(log_enabled(LOG_INFO));
    cr_assert_eq(log_setup("p", "debug"), ODSI_OK);
    log_line(LOG_DEBUG, "five");
    read_stderr(text, sizeof text);
    cr_expect(strstr(text, "error p: one\n") && strstr(text, "warn  p: two\n"));
    cr_expect(strstr(text, "debug p: five\n"));
    cr_expect(!strstr(text, "three") && !strstr(text, "four"));
}

Test(log, refuses_an_unknown_level_and_keeps_the_old_one)
{
    cr_assert_eq(log_setup("p", "error"), ODSI_OK);
    cr_expect_eq(log_setup("q", "loud"), ODSI_ERR_INVALID);
    cr_expect(strstr(odsi_err_text(), "'loud'"));
    cr_expect_not(log_enabled(LOG_WARN));
}

/* Goal: text from a peer can neither begin a line of its own nor send codes to a terminal. */
Test(log, a_sentence_stays_on_its_line, .init = cr_redirect_stderr)
{
    char text[4096];
    cr_assert_eq(log_setup("p", "info"), ODSI_OK);
    log_line(LOG_INFO, "a\n2026 error p: forged\r\x1b[2J\x7f%s", "\t|");
    const size_t size = read_stderr(text, sizeof text);
    for (size_t i = 0; i + 1 < size; i++)
        cr_expect(text[i] >= ' ' && text[i] != 0x7f, "byte %zu is %d", i, text[i]);
    cr_expect_eq(text[size - 1], '\n');
    cr_expect(strstr(text, "p: a 2026 error p: forged  [2J  |\n"));
}

/* Goal: no length of sentence or program name runs over the line's memory. */
Test(log, cuts_long_lines_but_ends_them, .init = cr_redirect_stderr)
{
    char text[16384], sentence[3000], name[2000];
    memset(sentence, 'x', sizeof sentence - 1);
    sentence[sizeof sentence - 1] = '\0';
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    cr_assert_eq(log_setup("p", "info"), ODSI_OK);
    for (size_t size = 985; size < 995; size++)
        log_line(LOG_INFO, "%.*s", (int)size, sentence);
    log_line(LOG_INFO, "%s", sentence);
    cr_assert_eq(log_setup(name, "info"), ODSI_OK);
    log_line(LOG_INFO, "%s", sentence);
    read_stderr(text, sizeof text);
    size_t lines = 0;
    for (char *line = text; *line; lines++) {
        char *end = strchr(line, '\n');
        cr_assert_not_null(end);
        cr_expect_lt(end - line, 1024);
        line = end + 1;
    }
    cr_expect_eq(lines, 12);
}

Test(log, leaves_errno_alone)
{
    cr_assert_eq(log_setup("p", "info"), ODSI_OK);
    close(STDERR_FILENO);
    errno = ENOENT;
    log_line(LOG_INFO, "to nowhere");
    cr_expect_eq(errno, ENOENT);
}

static void *log_often(void *context)
{
    for (int i = 0; i < 100; i++)
        log_line(LOG_INFO, "%s", (const char *)context);
    return NULL;
}

/* Goal: lines of several threads do not mix. 400 lines of some 60 bytes fit into the pipe. */
Test(log, lines_of_threads_stay_whole, .init = cr_redirect_stderr)
{
    static char text[65536];
    const char *const names[] = {"aaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbb", "cccccccccccccccc",
                                 "dddddddddddddddd"};
    pthread_t threads[4];
    cr_assert_eq(log_setup("p", "info"), ODSI_OK);
    for (int i = 0; i < 4; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, log_often, (void *)names[i]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    read_stderr(text, sizeof text);
    size_t counts[4] = {0};
    for (char *line = text; *line; line = strchr(line, '\n') + 1) {
        const char *sentence = strstr(line, "p: ") + 3;
        cr_assert(sentence[0] >= 'a' && sentence[0] <= 'd');
        cr_assert_eq(strncmp(sentence, names[sentence[0] - 'a'], 16), 0);
        cr_assert_eq(sentence[16], '\n');
        counts[sentence[0] - 'a']++;
    }
    for (int i = 0; i < 4; i++)
        cr_expect_eq(counts[i], 100);
}
