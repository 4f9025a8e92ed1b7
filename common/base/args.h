/* Flags, environment and config file of a program or command, from one table.
 *
 * A value is looked for as --name VALUE or --name=VALUE (or -n VALUE), then as the environment
 * variable ODSI_NAME (upper case, '-' as '_'), then as a line `name = value` of the file given by
 * --config (or ODSI_CONFIG), and stays as the caller set it otherwise. --help, --version and
 * --config are built in. Given twice on one of these levels, the later one holds; a list takes
 * both. An environment variable with an empty value counts as not set. In the file, blank lines and
 * lines that begin with '#' mean nothing, and a name that the program does not have is a mistake.
 * Main thread only. */
#ifndef ODSI_COMMON_BASE_ARGS_H
#define ODSI_COMMON_BASE_ARGS_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Larger config files are refused. */
#define ARGS_FILE_SIZE_MAX (1u << 20)

/* Values of one option of kind ARGS_TEXT_LIST. */
#define ARGS_LIST_MAX 16u

enum args_kind {
    ARGS_FLAG,      /* int *: set to 1; --no-name sets 0; environment and file: 1/0, true/false */
    ARGS_TEXT,      /* const char **: valid until args_close */
    ARGS_U32,       /* uint32_t * */
    ARGS_U64,       /* uint64_t *; a suffix K, M, G or T multiplies by 1024^n */
    ARGS_F32,       /* float *; finite */
    ARGS_TEXT_LIST, /* struct args_list *: each further --name adds one; texts as ARGS_TEXT */
};

struct args_list {
    const char *items[ARGS_LIST_MAX];
    uint32_t count;
};

struct args_option {
    const char *name; /* without "--"; NULL ends the table */
    char short_name;  /* 0: none */
    enum args_kind kind;
    void *out;
    const char *value_name; /* "FILE", "HOST:PORT"; NULL for flags */
    const char *help;       /* one line; may name the default */
    int no_environment;     /* 1: ODSI_NAME means something else, so it is not read */
};

struct args_program {
    const char *name;     /* "odsi-worker", "odsi generate" */
    const char *summary;  /* one sentence */
    const char *usage;    /* "[options] --model FILE" */
    const char *examples; /* lines for --help; NULL: none */
    const struct args_option *options;
};

struct args; /* owns the texts that came from a file */

enum args_outcome { ARGS_RUN, ARGS_EXIT_OK, ARGS_EXIT_USAGE };

/* Reads argv[1..]. On ARGS_RUN *rest is the index of the first argument that is not an option (or
 * the one after "--"). --help and --version print to standard output (ARGS_EXIT_OK); a mistake
 * prints one line with what to do to standard error (ARGS_EXIT_USAGE, exit code 2).
 * *out is always ended with args_close. */
enum args_outcome args_read(struct args **out, const struct args_program *program, int argc,
                            char **argv, int *rest);
void args_close(struct args **self);

/* "odsi 0.1.0 (abc1234)": what --version prints after the program's name. */
const char *args_version(void);

#ifdef __cplusplus
}
#endif
#endif
