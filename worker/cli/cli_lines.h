/* Lines of a file descriptor, such as standard input, while another one may call away: a signalfd
 * for Ctrl-C. Blocks until either has something. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_LINES_H
#define ODSI_WORKER_CLI_CLI_LINES_H
#include "common/base/buf.h"
#include "common/base/err.h"

#include <stddef.h>

enum cli_lines_event {
    CLI_LINES_LINE,
    CLI_LINES_END,    /* no more lines */
    CLI_LINES_CALLED, /* the other descriptor is readable */
    CLI_LINES_FAILED, /* this thread's error text says why */
};

struct cli_lines {
    int fd;      /* the caller's */
    int call_fd; /* the caller's, not read here; negative: none */
    size_t line_size_max;
    struct buf text;
    size_t taken; /* bytes of text that were handed out */
    int is_ended;
};

/* line_size_max: a longer line fails with ODSI_ERR_RANGE. */
void cli_lines_init(struct cli_lines *self, int fd, int call_fd, size_t line_size_max);
void cli_lines_free(struct cli_lines *self);
/* The next line without its end ("\n" or "\r\n"), valid until the next call on self; the last one
 * may have none. */
enum cli_lines_event cli_lines_next(struct cli_lines *self, const char **line, size_t *size);
#endif
