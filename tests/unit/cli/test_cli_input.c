#include "worker/cli/cli_input.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A file with these bytes; the caller unlinks it. */
static const char *file_of(const char *data, size_t size)
{
    static char path[] = "/tmp/odsi-test-input-XXXXXX";
    memcpy(path + sizeof path - 7, "XXXXXX", 6);
    const int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    for (size_t at = 0; at < size;) {
        const ssize_t written = write(fd, data + at, size - at);
        cr_assert_gt(written, 0);
        at += (size_t)written;
    }
    close(fd);
    return path;
}

static enum odsi_err read_prompt(const char *data, size_t size, struct buf *out)
{
    const char *path = file_of(data, size);
    const enum odsi_err err = cli_input_prompt(out, NULL, path);
    unlink(path);
    return err;
}

Test(cli_input, takes_a_prompt_from_a_text_or_a_file)
{
    struct buf prompt;
    cr_assert_eq(cli_input_prompt(&prompt, "Once", NULL), ODSI_OK);
    cr_expect_str_eq(buf_text_view(&prompt), "Once");
    buf_free(&prompt);
    cr_assert_eq(cli_input_prompt(&prompt, "", NULL), ODSI_OK);
    cr_expect_eq(prompt.size, 0);
    buf_free(&prompt);
    cr_assert_eq(read_prompt("zw\xc3\xb6lf\n", 7, &prompt), ODSI_OK);
    cr_expect_str_eq(buf_text_view(&prompt), "zw\xc3\xb6lf\n");
    buf_free(&prompt);
}

Test(cli_input, wants_exactly_one_prompt)
{
    struct buf prompt;
    cr_expect_eq(cli_input_prompt(&prompt, NULL, NULL), ODSI_ERR_INVALID);
    buf_free(&prompt);
    cr_expect_eq(cli_input_prompt(&prompt, "a", "b"), ODSI_ERR_INVALID);
    buf_free(&prompt);
}

Test(cli_input, refuses_a_prompt_that_a_protobuf_string_cannot_carry)
{
    struct buf prompt;
    cr_expect_eq(read_prompt("a\0b", 3, &prompt), ODSI_ERR_INVALID);
    buf_free(&prompt);
    cr_expect_eq(read_prompt("ab\xff", 3, &prompt), ODSI_ERR_INVALID);
    cr_expect(strstr(odsi_err_text(), "byte 2"), "%s", odsi_err_text());
    buf_free(&prompt);
}

Test(cli_input, refuses_a_prompt_beyond_the_limit_and_takes_one_at_it)
{
    char *text = NULL;
    struct buf prompt;
    cr_assert_eq(alloc_zeroed(&text, LIMIT_PROMPT_SIZE + 1, 1), ODSI_OK);
    memset(text, 'x', LIMIT_PROMPT_SIZE + 1);
    cr_expect_eq(read_prompt(text, LIMIT_PROMPT_SIZE, &prompt), ODSI_OK);
    cr_expect_eq(prompt.size, LIMIT_PROMPT_SIZE);
    buf_free(&prompt);
    cr_expect_eq(read_prompt(text, LIMIT_PROMPT_SIZE + 1, &prompt), ODSI_ERR_INVALID);
    buf_free(&prompt);
    alloc_free(text);
}

Test(cli_input, names_the_file_that_is_not_there_or_cannot_be_read)
{
    struct buf prompt;
    cr_expect_eq(cli_input_prompt(&prompt, NULL, "/nonexistent/p"), ODSI_ERR_NOT_FOUND);
    cr_expect(strstr(odsi_err_text(), "/nonexistent/p"));
    buf_free(&prompt);
    cr_expect_eq(cli_input_prompt(&prompt, NULL, "/tmp"), ODSI_ERR_IO);
    cr_expect(strstr(odsi_err_text(), "/tmp"));
    buf_free(&prompt);
}

Test(cli_input, prints_one_line_and_gives_the_exit_code, .init = cr_redirect_stderr)
{
    char text[512] = "";
    cr_expect_eq(cli_input_failed("generate", odsi_fail(ODSI_ERR_UNAVAILABLE, "nobody\x1b here")),
                 1);
    cr_expect_eq(cli_input_usage("generate", "--%s is odd", "seed"), 2);
    fflush(stderr);
    const size_t size = fread(text, 1, sizeof text - 1, cr_get_redirected_stderr());
    text[size] = '\0';
    cr_expect_str_eq(text, "odsi generate: nobody\xef\xbf\xbd here\n"
                           "odsi generate: --seed is odd; see 'odsi generate --help'\n");
}
