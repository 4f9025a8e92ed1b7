/* The one error type of the project, and the text that goes with it.
 *
 * A function that can fail returns enum odsi_err and nothing else; results go through out
 * pointers. The place where something went wrong calls odsi_fail with a sentence that says what
 * happened, to what, and what to do; everyone above only passes the code on. The boundary that
 * answers for the call (main, a service, a command) reads the sentence with odsi_err_text and logs
 * it, prints it, or sends it as a status message: a hostile peer must not be able to fill a log
 * with one line per byte, so the origin itself writes no log.
 *
 * Threads: the text is per thread, like errno. A code that crosses threads carries its text in a
 * struct odsi_failure. */
#ifndef ODSI_COMMON_BASE_ERR_H
#define ODSI_COMMON_BASE_ERR_H

#ifdef __cplusplus
extern "C" {
#endif

#define ODSI_MUST_USE __attribute__((warn_unused_result))
#define ODSI_PRINTF(format_index, first_index)                                                     \
    __attribute__((format(printf, format_index, first_index)))

/* Stable numbers: they travel as odsi.v1.ErrorCode (proto/odsi/v1/types.proto). */
enum odsi_err {
    ODSI_OK = 0,
    ODSI_ERR_INVALID = 1,      /* an argument, flag, field or file breaks a rule */
    ODSI_ERR_NOT_FOUND = 2,    /* no such file, model, session, peer */
    ODSI_ERR_EXISTS = 3,       /* it is there already */
    ODSI_ERR_NO_MEMORY = 4,    /* this machine has no room left */
    ODSI_ERR_BUSY = 5,         /* full for now; the same call may work later */
    ODSI_ERR_IO = 6,           /* the operating system refused: disk, socket */
    ODSI_ERR_CORRUPT = 7,      /* bytes that are not what they claim to be */
    ODSI_ERR_UNSUPPORTED = 8,  /* well formed, but not something this build can do */
    ODSI_ERR_DENIED = 9,       /* this identity may not do that */
    ODSI_ERR_TIMEOUT = 10,     /* a deadline or budget ran out */
    ODSI_ERR_CANCELLED = 11,   /* the caller went away or asked to stop */
    ODSI_ERR_UNAVAILABLE = 12, /* a peer cannot be reached or left */
    ODSI_ERR_STATE = 13,       /* right call, wrong moment: out of order, closed, stale */
    ODSI_ERR_RANGE = 14,       /* beyond the end: position, layer, context */
    ODSI_ERR_NUMERIC = 15,     /* a NaN or infinity in a residual stream or in logits */
    ODSI_ERR_INTERNAL = 16,    /* our own fault */
};
#define ODSI_ERR_COUNT 17

#define ODSI_ERR_TEXT_SIZE 512

/* A failure that outlives its call or changes threads. */
struct odsi_failure {
    enum odsi_err err;
    char text[ODSI_ERR_TEXT_SIZE];
};

/* Records the sentence for this thread and returns err, so that an origin can write
 * `return odsi_fail(ODSI_ERR_RANGE, "layers %u-%u: the model has %u", ...)`. */
enum odsi_err odsi_fail(enum odsi_err err, const char *format, ...) ODSI_PRINTF(2, 3);

#ifdef __clang_analyzer__
/* Static analysis sees one file at a time and would think that this may return ODSI_OK. */
#define odsi_fail(err, ...) ((void)(odsi_fail)((err), __VA_ARGS__), (err))
#endif

/* Puts "prefix: " before this thread's sentence; for a layer that knows the file or peer name.
 * Returns err. */
enum odsi_err odsi_fail_prefix(enum odsi_err err, const char *format, ...) ODSI_PRINTF(2, 3);

/* The last sentence recorded by this thread; never NULL. Valid until the next odsi_fail here. */
const char *odsi_err_text(void);

/* A short lower-case name such as "not found"; "unknown error" for numbers outside the enum. */
const char *odsi_err_name(enum odsi_err err);

/* Fills out from err and this thread's sentence. */
void odsi_failure_take(struct odsi_failure *out, enum odsi_err err);

#ifdef __cplusplus
}
#endif
#endif
