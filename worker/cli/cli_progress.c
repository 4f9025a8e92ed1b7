#include "worker/cli/cli_progress.h"

#include "common/base/clock.h"
#include "worker/cli/cli_term.h"
#include "worker/cli/cli_text.h"

#include <stdarg.h>
#include <string.h>

#define RENEW_US 100000u

void cli_progress_init(struct cli_progress *self, FILE *to)
{
    memset(self, 0, sizeof *self);
    self->to = to;
    self->is_terminal = to && cli_term_is(to);
}

void cli_progress_show(struct cli_progress *self, const char *format, ...)
{
    char text[sizeof self->text];
    va_list args;
    if (!self->to)
        return;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (strcmp(text, self->text) == 0 && self->is_shown)
        return;
    memcpy(self->text, text, sizeof text);
    self->is_shown = 1;
    self->shown_us = clock_monotonic_us();
    if (!self->is_terminal) {
        fprintf(self->to, "%s\n", text);
        return;
    }
    /* One column stays free: a cursor behind the last one would wrap the line. */
    const unsigned width = cli_term_width(self->to) - 1;
    fputs("\r\033[K", self->to);
    const size_t size = strlen(text);
    size_t end = 0;
    for (unsigned column = 0; end < size && column < width; column++) {
        const size_t length = cli_text_utf8(text, size, end);
        end += length ? length : 1;
    }
    cli_text_show(self->to, 1, text, end);
    fflush(self->to);
}

void cli_progress_bytes(struct cli_progress *self, const char *label, uint64_t done, uint64_t total)
{
    char size[CLI_TEXT_SIZE];
    if (!self->to || !self->is_terminal || total == 0)
        return;
    if (self->is_shown && done < total && clock_monotonic_us() - self->shown_us < RENEW_US)
        return;
    cli_text_bytes(size, total);
    const unsigned percent = (unsigned)((double)done * 100 / (double)total);
    cli_progress_show(self, "%s  %u%% of %s", label, percent, size);
}

void cli_progress_clear(struct cli_progress *self)
{
    if (self->is_shown && self->is_terminal) {
        fputs("\r\033[K", self->to);
        fflush(self->to);
    }
    self->is_shown = 0;
}
