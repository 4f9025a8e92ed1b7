#include "worker/cli/cli_progress.h"

#include "worker/cli/cli_term.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

/* Both ends of a terminal that is 24 columns wide and passes bytes on unchanged. */
struct terminal {
    int outer; /* what a person would see */
    FILE *inner;
};

static void terminal_open(struct terminal *self)
{
    const struct winsize size = {.ws_row = 10, .ws_col = 24};
    self->outer = posix_openpt(O_RDWR | O_NOCTTY);
    cr_assert_geq(self->outer, 0);
    cr_assert_eq(grantpt(self->outer), 0);
    cr_assert_eq(unlockpt(self->outer), 0);
    self->inner = fopen(ptsname(self->outer), "w");
    cr_assert_not_null(self->inner);
    cr_assert_eq(ioctl(fileno(self->inner), TIOCSWINSZ, &size), 0);
    setenv("TERM", "xterm", 1);
    unsetenv("NO_COLOR");
}

/* What has arrived; valid until the next call. */
static const char *seen(struct terminal *self)
{
    static char text[1024];
    size_t size = 0;
    struct pollfd poller = {.fd = self->outer, .events = POLLIN};
    fflush(self->inner);
    while (size + 1 < sizeof text && poll(&poller, 1, 200) > 0) {
        const ssize_t got = read(self->outer, text + size, sizeof text - 1 - size);
        if (got <= 0)
            break;
        size += (size_t)got;
    }
    text[size] = '\0';
    return text;
}

static void terminal_close(struct terminal *self)
{
    fclose(self->inner);
    close(self->outer);
}

Test(cli_progress, rewrites_one_line_of_a_terminal_within_its_width)
{
    struct terminal terminal;
    struct cli_progress progress;
    terminal_open(&terminal);
    cli_progress_init(&progress, terminal.inner);
    cr_expect_eq(cli_term_width(terminal.inner), 24);
    cli_progress_show(&progress, "one");
    cr_expect_str_eq(seen(&terminal), "\r\033[Kone");
    cli_progress_show(&progress, "one");
    cr_expect_str_eq(seen(&terminal), "", "the same text needs no writing");
    cli_progress_show(&progress, "\xc3\xa4%s", "23456789012345678901234567890");
    cr_expect_str_eq(seen(&terminal), "\r\033[K\xc3\xa4"
                                      "2345678901234567890123");
    cli_progress_clear(&progress);
    cr_expect_str_eq(seen(&terminal), "\r\033[K");
    cli_progress_clear(&progress);
    cr_expect_str_eq(seen(&terminal), "", "nothing is left to take away");
    terminal_close(&terminal);
}

Test(cli_progress, shows_percentages_on_a_terminal_only)
{
    struct terminal terminal;
    struct cli_progress progress;
    char text[256] = "";
    terminal_open(&terminal);
    cli_progress_init(&progress, terminal.inner);
    cli_progress_bytes(&progress, "load", 512, 2048);
    cr_expect_str_eq(seen(&terminal), "\r\033[Kload  25% of 2.0 KiB");
    cli_progress_bytes(&progress, "load", 2048, 2048);
    cr_expect_str_eq(seen(&terminal), "\r\033[Kload  100% of 2.0 KiB");
    cli_progress_bytes(&progress, "load", 0, 0);
    cr_expect_str_eq(seen(&terminal), "", "no total, no share");
    terminal_close(&terminal);

    FILE *file = fmemopen(text, sizeof text, "w");
    cli_progress_init(&progress, file);
    cli_progress_bytes(&progress, "load", 512, 2048);
    fclose(file);
    cr_expect_str_eq(text, "");
}

Test(cli_progress, writes_a_line_for_each_new_text_elsewhere)
{
    struct cli_progress progress;
    char text[256] = "";
    FILE *file = fmemopen(text, sizeof text, "w");
    cli_progress_init(&progress, file);
    cli_progress_show(&progress, "one");
    cli_progress_show(&progress, "one");
    cli_progress_show(&progress, "two");
    cli_progress_clear(&progress);
    fclose(file);
    cr_expect_str_eq(text, "one\ntwo\n");
}

Test(cli_progress, shows_nothing_when_there_is_nowhere_to)
{
    struct cli_progress progress;
    cli_progress_init(&progress, NULL);
    cli_progress_show(&progress, "one");
    cli_progress_bytes(&progress, "load", 1, 2);
    cli_progress_clear(&progress);
    cr_expect_eq(progress.is_shown, 0);
}

Test(cli_progress, a_dumb_terminal_and_no_color_get_no_sequences)
{
    struct terminal terminal;
    terminal_open(&terminal);
    cr_expect_str_eq(cli_term_dim(terminal.inner), "\033[2m");
    setenv("NO_COLOR", "1", 1);
    cr_expect_str_eq(cli_term_dim(terminal.inner), "");
    unsetenv("NO_COLOR");
    setenv("TERM", "dumb", 1);
    cr_expect_eq(cli_term_is(terminal.inner), 0);
    cr_expect_str_eq(cli_term_dim(terminal.inner), "");
    terminal_close(&terminal);
}
