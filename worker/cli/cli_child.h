/* Child processes that cannot outlive us: programs of a local swarm, and the command that uses it.
 *
 * A child starts as this very binary with CLI_CHILD_COMMAND, asks the kernel to be killed when its
 * parent dies (PR_SET_PDEATHSIG survives exec, but not the fork of posix_spawn), and then becomes
 * the program. Waiting is done by signal: cli_child_wait_setup blocks those that matter, and
 * cli_child_wait takes them one by one, so no handler runs. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_CHILD_H
#define ODSI_WORKER_CLI_CLI_CHILD_H
#include "common/base/err.h"

#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#define CLI_CHILD_COMMAND   "local-child"
#define CLI_CHILD_NAME_SIZE 32u
#define CLI_CHILD_PATH_SIZE 4096u

struct cli_child {
    char name[CLI_CHILD_NAME_SIZE];
    char log_path[CLI_CHILD_PATH_SIZE]; /* "": shares our standard streams */
    pid_t pid;                          /* 0: never started */
    int is_running;
    int wait_status; /* of waitpid, once it ended */
};

struct cli_child_config {
    const char *name;         /* "worker-0" */
    const char *dir;          /* gets NAME.pid and NAME.log, which takes the child's output; it is
                               * then in a process group of its own, out of the terminal's reach.
                               * NULL: our own streams and group */
    char *const *argv;        /* argv[0] is a path, or a name looked up in PATH */
    char *const *environment; /* NULL-terminated */
};

/* Errors: ODSI_ERR_IO. A program that cannot be executed ends at once with code 127. */
ODSI_MUST_USE enum odsi_err cli_child_start(struct cli_child *self,
                                            const struct cli_child_config *config);
/* 1 when it ended since the last call. */
int cli_child_ended(struct cli_child *self);
/* Harmless when it does not run. */
void cli_child_signal(struct cli_child *self, int signal_number);
/* The exit code, or 128 + the signal that ended it. Only after it ended. */
int cli_child_exit_code(const struct cli_child *self);
/* "worker-0 ended with code 1", "worker-0 was ended by signal 9 (Killed)". */
void cli_child_tell_end(const struct cli_child *self, char *out, size_t size);
/* The last lines of its log, indented. */
void cli_child_show_log(const struct cli_child *self, FILE *to);

/* Blocks SIGINT, SIGTERM, SIGHUP and SIGCHLD for this thread and those it starts; before any. */
ODSI_MUST_USE enum odsi_err cli_child_wait_setup(void);
/* Waits until a child's state changed, a signal came or the time is over. Returns the signal that
 * asks us to end, else 0. *is_terminal: it came from the terminal, so that our command has it
 * too. */
int cli_child_wait(uint32_t timeout_ms, int *is_terminal);

/* main of a child: argv is CLI_CHILD_COMMAND, the parent's pid, program, arguments. Returns only
 * an exit code, when the program cannot be executed. */
int cli_child_become(int argc, char **argv);
#endif
