#include "common/base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#undef odsi_fail /* under static analysis it is a macro as well */

static _Thread_local char err_text[ODSI_ERR_TEXT_SIZE];

enum odsi_err odsi_fail(enum odsi_err err, const char *format, ...)
{
    char text[ODSI_ERR_TEXT_SIZE] = ""; /* the arguments may point into err_text */
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    memcpy(err_text, text, sizeof err_text);
    return err;
}

enum odsi_err odsi_fail_prefix(enum odsi_err err, const char *format, ...)
{
    char text[ODSI_ERR_TEXT_SIZE] = "";
    va_list args;
    va_start(args, format);
    const int length = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (length >= 0 && (size_t)length < sizeof text)
        snprintf(text + length, sizeof text - (size_t)length, ": %s", err_text);
    memcpy(err_text, text, sizeof err_text);
    return err;
}

const char *odsi_err_text(void)
{
    return err_text;
}

const char *odsi_err_name(enum odsi_err err)
{
    static const char *const names[ODSI_ERR_COUNT] = {
        "ok",          "invalid",     "not found",    "exists",       "no memory",      "busy",
        "i/o error",   "corrupt",     "unsupported",  "denied",       "timeout",        "cancelled",
        "unavailable", "wrong state", "out of range", "not a number", "internal error",
    };
    if ((unsigned)err >= ODSI_ERR_COUNT)
        return "unknown error";
    return names[err];
}

void odsi_failure_take(struct odsi_failure *out, enum odsi_err err)
{
    out->err = err;
    memcpy(out->text, err_text, sizeof out->text);
}
