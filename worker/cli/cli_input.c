#include "worker/cli/cli_input.h"

#include "common/base/io.h"
#include "common/crypto/identity.h"
#include "worker/cli/cli_text.h"
#include "worker/cli/cmd.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum odsi_err cli_input_file(struct buf *out, const char *path, size_t size_max)
{
    char chunk[65536];
    const int is_stdin = strcmp(path, "-") == 0;
    const char *name = is_stdin ? "standard input" : path;
    buf_init(out, size_max);
    FILE *file = is_stdin ? stdin : fopen(path, "rbe");
    if (!file)
        return odsi_fail(errno == ENOENT ? ODSI_ERR_NOT_FOUND : ODSI_ERR_IO, "%s: %s", path,
                         strerror(errno));
    enum odsi_err err = ODSI_OK;
    while (err == ODSI_OK) {
        errno = 0;
        const size_t size = fread(chunk, 1, sizeof chunk, file);
        if (size == 0)
            break;
        err = buf_append(out, chunk, size);
    }
    if (err != ODSI_OK)
        err = odsi_fail_prefix(err, "%s", name);
    else if (ferror(file))
        err = odsi_fail(ODSI_ERR_IO, "%s: %s", name, strerror(errno));
    if (!is_stdin)
        fclose(file);
    return err;
}

enum odsi_err cli_input_prompt(struct buf *out, const char *text, const char *path)
{
    enum odsi_err err = ODSI_OK;
    buf_init(out, LIMIT_PROMPT_SIZE);
    if (!text == !path)
        return odsi_fail(ODSI_ERR_INVALID, "%s: use --prompt TEXT or --prompt-file FILE",
                         text ? "two prompts" : "no prompt");
    if (text)
        err = buf_append_text(out, text);
    else
        err = cli_input_file(out, path, LIMIT_PROMPT_SIZE);
    if (err == ODSI_ERR_RANGE)
        return odsi_fail(ODSI_ERR_INVALID, "the prompt is longer than %u bytes", LIMIT_PROMPT_SIZE);
    if (err != ODSI_OK)
        return err;
    const char *data = buf_text_view(out);
    for (size_t at = 0; at < out->size;) {
        const size_t length = cli_text_utf8(data, out->size, at);
        if (length == 0 || data[at] == '\0')
            return odsi_fail(ODSI_ERR_INVALID, "the prompt is not UTF-8 text: see its byte %zu",
                             at);
        at += length;
    }
    return ODSI_OK;
}

enum odsi_err cli_input_home(char out[CLI_INPUT_PATH_SIZE], const char *name)
{
    char home[CLI_INPUT_PATH_SIZE];
    const enum odsi_err err = identity_home(home, sizeof home);
    if (err != ODSI_OK)
        return err;
    const int length = snprintf(out, CLI_INPUT_PATH_SIZE, "%s/%s", home, name);
    if (length < 0 || (unsigned)length >= CLI_INPUT_PATH_SIZE)
        return odsi_fail(ODSI_ERR_RANGE, "%.64s...: this path is too long", home);
    return ODSI_OK;
}

const char *cli_input_cache(char out[CLI_INPUT_PATH_SIZE])
{
    if (cli_input_home(out, "cache") != ODSI_OK || io_make_folders(out, 0700) != ODSI_OK)
        return NULL;
    return out;
}

int cli_input_failed(const char *command, enum odsi_err err)
{
    const char *text = odsi_err_text();
    fprintf(stderr, "odsi %s: ", command);
    /* The sentence may hold a peer's words. */
    cli_text_show(stderr, 1, text, strlen(text));
    fputc('\n', stderr);
    return err == ODSI_OK ? CMD_OK : CMD_FAILED;
}

int cli_input_usage(const char *command, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "odsi %s: ", command);
    vfprintf(stderr, format, args);
    fprintf(stderr, "; see 'odsi %s --help'\n", command);
    va_end(args);
    return CMD_USAGE;
}
