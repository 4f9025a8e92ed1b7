/* One line per event on standard error: time, level, program, sentence.
 *
 * Never log prompt text, generated text, token ids or keys. Threads: log_setup once in main before
 * other threads start; the rest from anywhere, one write(2) per line. */
#ifndef ODSI_COMMON_BASE_LOG_H
#define ODSI_COMMON_BASE_LOG_H
#include "common/base/err.h"

#ifdef __cplusplus
extern "C" {
#endif

enum log_level { LOG_ERROR = 0, LOG_WARN = 1, LOG_INFO = 2, LOG_DEBUG = 3 };

/* program must stay valid; level_name is error, warn, info or debug.
 * Errors: ODSI_ERR_INVALID for another name. */
ODSI_MUST_USE enum odsi_err log_setup(const char *program, const char *level_name);
void log_line(enum log_level level, const char *format, ...) ODSI_PRINTF(2, 3);
/* Whether a line of this level would be written; to skip the work of making it. */
int log_enabled(enum log_level level);

#ifdef __cplusplus
}
#endif
#endif
