#include "worker/cli/cli_lines.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <string.h>
#include <unistd.h>

struct pipes {
    int text[2];
    int call[2];
    struct cli_lines lines;
};

static void open_pipes(struct pipes *self, size_t line_size_max)
{
    cr_assert_eq(pipe(self->text), 0);
    cr_assert_eq(pipe(self->call), 0);
    cli_lines_init(&self->lines, self->text[0], self->call[0], line_size_max);
}

static void close_pipes(struct pipes *self)
{
    cli_lines_free(&self->lines);
    close(self->text[0]);
    close(self->call[0]);
    close(self->call[1]);
}

static void send_text(const struct pipes *self, const char *text, size_t size)
{
    cr_assert_eq(write(self->text[1], text, size), (ssize_t)size);
}

static void expect_line(struct pipes *self, const char *wanted, size_t wanted_size)
{
    const char *line = NULL;
    size_t size = 0;
    cr_assert_eq(cli_lines_next(&self->lines, &line, &size), CLI_LINES_LINE, "%s", wanted);
    cr_assert_eq(size, wanted_size, "%zu bytes, not %s", size, wanted);
    cr_expect_eq(memcmp(line, wanted, size), 0, "%s", wanted);
}

static enum cli_lines_event next(struct pipes *self)
{
    const char *line = NULL;
    size_t size = 0;
    return cli_lines_next(&self->lines, &line, &size);
}

Test(cli_lines, cuts_text_at_line_ends, .timeout = 10)
{
    struct pipes pipes;
    open_pipes(&pipes, 100);
    send_text(&pipes, "one\n\ntwo\r\n\r\nthr", 15);
    expect_line(&pipes, "one", 3);
    expect_line(&pipes, "", 0);
    expect_line(&pipes, "two", 3);
    expect_line(&pipes, "", 0);
    send_text(&pipes, "ee\nz\0ro\nlast", 12);
    expect_line(&pipes, "three", 5);
    expect_line(&pipes, "z\0ro", 4);
    close(pipes.text[1]);
    expect_line(&pipes, "last", 4);
    cr_expect_eq(next(&pipes), CLI_LINES_END);
    cr_expect_eq(next(&pipes), CLI_LINES_END);
    close_pipes(&pipes);
}

Test(cli_lines, is_called_away_without_losing_a_byte, .timeout = 10)
{
    struct pipes pipes;
    char call = 0;
    open_pipes(&pipes, 100);
    send_text(&pipes, "begun", 5);
    cr_assert_eq(write(pipes.call[1], "!", 1), 1);
    cr_expect_eq(next(&pipes), CLI_LINES_CALLED);
    cr_expect_eq(next(&pipes), CLI_LINES_CALLED, "until the call is taken");
    cr_assert_eq(read(pipes.call[0], &call, 1), 1);
    send_text(&pipes, " and ended\n", 11);
    expect_line(&pipes, "begun and ended", 15);
    close(pipes.text[1]);
    cr_expect_eq(next(&pipes), CLI_LINES_END);
    close_pipes(&pipes);
}

Test(cli_lines, refuses_a_line_that_is_too_long, .timeout = 10)
{
    for (size_t size = 7; size <= 10; size++) {
        for (int is_ended = 0; is_ended < 2; is_ended++) {
            struct pipes pipes;
            open_pipes(&pipes, 8);
            send_text(&pipes, "0123456789", size);
            if (is_ended)
                send_text(&pipes, "\r\n", 2);
            close(pipes.text[1]);
            if (size <= 8) {
                expect_line(&pipes, "0123456789", size);
                cr_expect_eq(next(&pipes), CLI_LINES_END);
            } else {
                cr_expect_eq(next(&pipes), CLI_LINES_FAILED);
                cr_expect_str_eq(odsi_err_text(), "a line is longer than 8 bytes");
            }
            close_pipes(&pipes);
        }
    }
}

static void *write_much(void *context)
{
    const struct pipes *pipes = context;
    char line[3001];
    for (uint32_t i = 0; i < 200; i++) {
        memset(line, 'a' + (char)(i % 26), sizeof line - 1);
        line[i] = '\n';
        line[3000] = '\n';
        send_text(pipes, line, sizeof line);
    }
    close(pipes->text[1]);
    return NULL;
}

/* Lines that lie across the borders of what is read at once. */
Test(cli_lines, gives_back_long_texts, .timeout = 10)
{
    struct pipes pipes;
    pthread_t writer;
    char wanted[3001];
    open_pipes(&pipes, 3000);
    cr_assert_eq(pthread_create(&writer, NULL, write_much, &pipes), 0);
    for (uint32_t i = 0; i < 200; i++) {
        memset(wanted, 'a' + (char)(i % 26), sizeof wanted);
        expect_line(&pipes, wanted, i);
        expect_line(&pipes, wanted, 3000 - i - 1);
    }
    cr_expect_eq(next(&pipes), CLI_LINES_END);
    pthread_join(writer, NULL);
    close_pipes(&pipes);
}
