#include "worker/cli/cli_lines.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

#define CHUNK_SIZE 4096u

void cli_lines_init(struct cli_lines *self, int fd, int call_fd, size_t line_size_max)
{
    *self = (struct cli_lines){.fd = fd, .call_fd = call_fd, .line_size_max = line_size_max};
    buf_init(&self->text, line_size_max + CHUNK_SIZE);
}

void cli_lines_free(struct cli_lines *self)
{
    buf_free(&self->text);
}

static enum cli_lines_event fail(const char *what)
{
    odsi_fail(ODSI_ERR_IO, "%s: %s", what, strerror(errno));
    return CLI_LINES_FAILED;
}

/* Reads some more. */
static enum cli_lines_event fill(struct cli_lines *self)
{
    char chunk[CHUNK_SIZE];
    struct pollfd fds[2] = {{.fd = self->fd, .events = POLLIN},
                            {.fd = self->call_fd, .events = POLLIN}};
    int ready;
    do
        ready = poll(fds, 2, -1);
    while (ready < 0 && errno == EINTR);
    if (ready < 0)
        return fail("waiting for a line");
    if (fds[1].revents)
        return CLI_LINES_CALLED;
    ssize_t got;
    do
        got = read(self->fd, chunk, sizeof chunk);
    while (got < 0 && errno == EINTR);
    if (got < 0)
        return fail("reading a line");
    self->is_ended = got == 0;
    return buf_append(&self->text, chunk, (size_t)got) == ODSI_OK ? CLI_LINES_LINE
                                                                  : CLI_LINES_FAILED;
}

static enum cli_lines_event too_long(const struct cli_lines *self)
{
    odsi_fail(ODSI_ERR_RANGE, "a line is longer than %zu bytes", self->line_size_max);
    return CLI_LINES_FAILED;
}

enum cli_lines_event cli_lines_next(struct cli_lines *self, const char **line, size_t *size)
{
    struct buf *text = &self->text;
    size_t searched = 0;
    text->size -= self->taken;
    if (self->taken > 0)
        memmove(text->data, text->data + self->taken, text->size);
    self->taken = 0;
    for (;;) {
        const char *data = (const char *)text->data;
        const char *end =
            text->size > searched ? memchr(data + searched, '\n', text->size - searched) : NULL;
        if (end || (self->is_ended && text->size > 0)) {
            *line = data;
            *size = end ? (size_t)(end - data) : text->size;
            self->taken = end ? *size + 1 : *size;
            if (*size > 0 && data[*size - 1] == '\r')
                --*size;
            return *size > self->line_size_max ? too_long(self) : CLI_LINES_LINE;
        }
        if (text->size > self->line_size_max + 1) /* not even with a '\r' */
            return too_long(self);
        searched = text->size;
        if (self->is_ended)
            return CLI_LINES_END;
        const enum cli_lines_event event = fill(self);
        if (event != CLI_LINES_LINE)
            return event;
    }
}
