/* Programs of this project as child processes of a test: started, waited for, and never left
 * behind.
 *
 * A child is killed when the thread that started it ends, however it ends (a failed assertion, a
 * crash), so start them from the test's main thread. Standard error of a child is kept in
 * FOLDER/NAME.log, standard output in FOLDER/NAME.out. One owner per object; no threads. */
#ifndef ODSI_TESTS_SUPPORT_PROCESS_H
#define ODSI_TESTS_SUPPORT_PROCESS_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define PROCESS_PATH_SIZE 512u

struct process;

/* Makes an empty folder below $TMPDIR (/tmp without it). Errors: ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err process_folder_make(char out[PROCESS_PATH_SIZE]);
/* Removes it with everything inside. Meant for folders of process_folder_make. */
void process_folder_remove(const char *path);
/* "FOLDER/NAME" in out. Errors: ODSI_ERR_RANGE. */
ODSI_MUST_USE enum odsi_err process_path(char out[PROCESS_PATH_SIZE], const char *folder,
                                         const char *name);

struct process_config {
    const char *program;     /* with a '/': a path; else a file in $ODSI_BIN (build/release/bin) */
    const char *const *args; /* what follows the program's name, NULL at the end; may be NULL */
    const char *const *env;  /* "NAME=VALUE" over our own environment, NULL at the end; or NULL */
    const char *folder;      /* where the two files go */
    const char *name;        /* their name; NULL: the program's */
};

/* Errors: ODSI_ERR_NOT_FOUND (no such program: build it first), ODSI_ERR_IO, ODSI_ERR_NO_MEMORY.
 * Owned: by the caller, ended with process_close. */
ODSI_MUST_USE enum odsi_err process_start(struct process **out,
                                          const struct process_config *config);
/* Kills it if it still runs (SIGKILL) and reaps it. *self may be NULL. */
void process_close(struct process **self);

pid_t process_pid(const struct process *self);
void process_signal(const struct process *self, int signal_number);

/* Waits until the file at path holds a whole line, such as a program's --ready-file, and copies
 * the line without its end. Errors: ODSI_ERR_UNAVAILABLE (the process ended first; the text has
 * the end of its log), ODSI_ERR_TIMEOUT, ODSI_ERR_RANGE (longer than size). */
ODSI_MUST_USE enum odsi_err process_wait_line(struct process *self, const char *path,
                                              uint64_t timeout_us, char *out, size_t size);
/* Waits for its end. *out_code is its exit code, or 128 plus the signal that ended it.
 * Errors: ODSI_ERR_TIMEOUT. */
ODSI_MUST_USE enum odsi_err process_wait(struct process *self, uint64_t timeout_us, int *out_code);

/* Starts, waits for the end and closes: for commands that answer and exit. What they wrote stays
 * in the two files. Errors: those of process_start and process_wait. */
ODSI_MUST_USE enum odsi_err process_run(const struct process_config *config, uint64_t timeout_us,
                                        int *out_code);

/* The whole of a small file (at most 16 MiB) as text, such as a log.
 * Errors: ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_RANGE. Owned: by the caller, alloc_free. */
ODSI_MUST_USE enum odsi_err process_read_file(char **out, const char *path);
/* The same for standard error and standard output of a process. */
ODSI_MUST_USE enum odsi_err process_read_log(char **out, const struct process *self);
ODSI_MUST_USE enum odsi_err process_read_output(char **out, const struct process *self);
#endif
