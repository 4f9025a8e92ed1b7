/* What a command reads before it starts: the prompt, and where things are kept. Main thread. */
#ifndef ODSI_WORKER_CLI_CLI_INPUT_H
#define ODSI_WORKER_CLI_CLI_INPUT_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/base/limits.h"

#include <stddef.h>
#include <stdint.h>

#define CLI_INPUT_PATH_SIZE 4096u

/* Fills out (initialized here, ended with buf_free also on error) from one of: the text itself; a
 * file, "-" being standard input. Exactly one may be given, the other is NULL.
 * Errors: ODSI_ERR_INVALID (none or both, longer than LIMIT_PROMPT_SIZE, not UTF-8 or with a zero
 * byte, which the protocol's strings cannot carry), ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err cli_input_prompt(struct buf *out, const char *text, const char *path);

/* Reads at most size_max bytes of path ("-": standard input) into out, as above.
 * Errors: ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_RANGE (longer). */
ODSI_MUST_USE enum odsi_err cli_input_file(struct buf *out, const char *path, size_t size_max);

/* home/name, home being where programs keep their files (common/crypto/identity.h).
 * Errors: those of identity_home. */
ODSI_MUST_USE enum odsi_err cli_input_home(char out[CLI_INPUT_PATH_SIZE], const char *name);
/* A folder home/cache, made when missing; NULL when there can be none: caches are a convenience.
 * out holds the text. */
const char *cli_input_cache(char out[CLI_INPUT_PATH_SIZE]);

/* Prints "odsi COMMAND: sentence" for err and returns the exit code. */
int cli_input_failed(const char *command, enum odsi_err err);
/* The same for a mistake in the flags; the sentence is formatted here. */
int cli_input_usage(const char *command, const char *format, ...) ODSI_PRINTF(2, 3);
#endif
