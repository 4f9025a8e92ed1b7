/* The commands of `odsi`: one function per file cmd_NAME.c, and the table that main looks them up
 * in. Main thread only. */
#ifndef ODSI_WORKER_CLI_CMD_H
#define ODSI_WORKER_CLI_CMD_H

/* Exit codes of every command. `odsi local -- COMMAND` ends with the code of COMMAND instead. */
enum cmd_exit { CMD_OK = 0, CMD_FAILED = 1, CMD_USAGE = 2 };

struct cmd {
    const char *name;
    const char *summary; /* one line for `odsi --help` */
    /* argv[0] is the command's name; returns the exit code of the program. */
    int (*run)(int argc, char **argv);
};

/* In the order of `odsi --help`; the last one has no name. */
const struct cmd *cmd_table(void);
/* NULL when there is none of that name. */
const struct cmd *cmd_find(const char *name);
/* The command that name was most likely meant to be; NULL when nothing is near. */
const struct cmd *cmd_nearest(const char *name);

int cmd_bench_run(int argc, char **argv);
int cmd_chat_run(int argc, char **argv);
int cmd_generate_run(int argc, char **argv);
int cmd_identity_run(int argc, char **argv);
int cmd_local_run(int argc, char **argv);
int cmd_model_run(int argc, char **argv);
int cmd_status_run(int argc, char **argv);
int cmd_trace_run(int argc, char **argv);
#endif
