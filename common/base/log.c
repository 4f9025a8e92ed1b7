#include "common/base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static const char *log_program = "odsi";
static enum log_level log_max = LOG_INFO;

enum odsi_err log_setup(const char *program, const char *level_name)
{
    for (unsigned i = 0; i < sizeof level_names / sizeof *level_names; i++) {
        if (strcmp(level_name, level_names[i]) == 0) {
            log_program = program;
            log_max = (enum log_level)i;
            return ODSI_OK;
        }
    }
    return odsi_fail(ODSI_ERR_INVALID, "log level '%s': use error, warn, info or debug",
                     level_name);
}

int log_enabled(enum log_level level)
{
    return level <= log_max;
}

void log_line(enum log_level level, const char *format, ...)
{
    if (!log_enabled(level))
        return;
    const int saved_errno = errno;
    char line[1024];
    struct timespec now;
    struct tm utc;
    clock_gettime(CLOCK_REALTIME, &now);
    gmtime_r(&now.tv_sec, &utc);
    size_t size = strftime(line, sizeof line, "%Y-%m-%dT%H:%M:%S", &utc);
    size += (size_t)snprintf(line + size, sizeof line - size,
                             ".%03ldZ %-5s %.64s: ", now.tv_nsec / 1000000, level_names[level],
                             log_program);
    va_list args;
    va_start(args, format);
    const int length = vsnprintf(line + size, sizeof line - size - 1, format, args);
    va_end(args);
    if (length > 0)
        size += (size_t)length;
    if (size > sizeof line - 2)
        size = sizeof line - 2;
    for (size_t i = 0; i < size; i++)
        if ((unsigned char)line[i] < ' ' || line[i] == 0x7f)
            line[i] = ' '; /* text from a peer may neither forge a line nor steer a terminal */
    line[size++] = '\n';
    const ssize_t written = write(STDERR_FILENO, line, size);
    (void)written; /* when this fails there is nowhere left to say so */
    errno = saved_errno;
}
