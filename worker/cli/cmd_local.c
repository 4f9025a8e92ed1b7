#include "worker/cli/cmd.h"

#include "common/base/args.h"
#include "common/base/clock.h"
#include "worker/cli/cli_child.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_swarm.h"

#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#define POLL_MS       200u
#define STOP_GRACE_US 3000000u

static const char command_name[] = "local";

/* Runs until a signal comes or nobody is left. */
static int run_until_told(struct cli_swarm *swarm)
{
    int is_terminal = 0;
    cli_swarm_show(swarm, stdout);
    while (!cli_child_wait(POLL_MS, &is_terminal))
        if (cli_swarm_watch(swarm) == 0) {
            fprintf(stderr, "odsi local: nobody of the swarm is left\n");
            return CMD_FAILED;
        }
    return CMD_OK;
}

/* Runs the user's command and returns its exit code. Ctrl-C reaches it from the terminal itself,
 * so it decides what to do; any other signal is passed on, and after 3 s it is killed. */
static int run_command(struct cli_swarm *swarm, char **argv, char *const *environment)
{
    const struct cli_child_config config = {
        .name = "command", .argv = argv, .environment = environment};
    struct cli_child child;
    uint64_t kill_us = UINT64_MAX;
    const enum odsi_err err = cli_child_start(&child, &config);
    if (err != ODSI_OK)
        return cli_input_failed(command_name, err);
    while (!cli_child_ended(&child)) {
        int is_terminal = 0;
        const int number = cli_child_wait(POLL_MS, &is_terminal);
        if (number != 0 && !is_terminal) {
            cli_child_signal(&child, number);
            if (kill_us == UINT64_MAX)
                kill_us = clock_monotonic_us() + STOP_GRACE_US;
        }
        if (clock_monotonic_us() > kill_us)
            cli_child_signal(&child, SIGKILL);
        cli_swarm_watch(swarm);
    }
    return cli_child_exit_code(&child);
}

static int run(const struct cli_swarm_config *config, char **command, int is_quiet)
{
    extern char **environ;
    struct cli_swarm *swarm = NULL;
    struct cli_env environment = {0};
    struct cli_progress progress;
    int code = CMD_OK;
    cli_progress_init(&progress, is_quiet ? NULL : stderr);
    enum odsi_err err = cli_child_wait_setup();
    if (err == ODSI_OK)
        err = cli_swarm_open(&swarm, config);
    if (err == ODSI_ERR_INVALID)
        return cli_input_usage(command_name, "%s", odsi_err_text());
    if (err == ODSI_OK)
        err = cli_swarm_start(swarm, &progress);
    if (err == ODSI_OK)
        err = cli_env_copy(&environment, environ, NULL);
    if (err == ODSI_OK)
        err = cli_swarm_environment(swarm, &environment);
    if (err != ODSI_OK)
        code = cli_input_failed(command_name, err);
    else if (command[0])
        code = run_command(swarm, command, environment.items);
    else
        code = run_until_told(swarm);
    cli_env_free(&environment);
    cli_swarm_close(&swarm);
    return code;
}

int cmd_local_run(int argc, char **argv)
{
    struct cli_swarm_config config = {
        .worker_count = 3, .thread_count = 1, .log_level = "info", .ready_timeout_s = 120};
    int is_quiet = 0;
    const struct args_option table[] = {
        {"model", 'm', ARGS_TEXT, &config.model_path, "FILE",
         "the model to serve (GGUF file or folder)", 0},
        {"workers", 'w', ARGS_U32, &config.worker_count, "N", "how many workers (3)", 0},
        {"shards", 's', ARGS_U32, &config.shard_count, "K",
         "pieces the model is cut into (one per worker); further workers are replicas", 0},
        {"layers", 0, ARGS_TEXT, &config.layers, "A-B,C-D,...",
         "where to cut, instead of pieces of equal size", 0},
        {"threads", 't', ARGS_U32, &config.thread_count, "N", "threads of each worker (1)", 0},
        {"timeout", 0, ARGS_U32, &config.ready_timeout_s, "S",
         "seconds until the swarm must be ready (120)", 0},
        {"log-level", 0, ARGS_TEXT, &config.log_level, "LEVEL", "error, warn, info or debug", 0},
        {"keep", 0, ARGS_FLAG, &config.is_kept, NULL, "leave the folder with logs and keys", 0},
        {"quiet", 'q', ARGS_FLAG, &is_quiet, NULL, "no progress", 0},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi local",
        .summary = "Runs a whole swarm on this machine: coordinator, gateway and workers as "
                   "processes.\nIt ends with COMMAND and with its exit code; without COMMAND it "
                   "runs until Ctrl-C.\nCOMMAND finds it by ODSI_GATEWAY, ODSI_INSECURE, "
                   "ODSI_COORDINATOR and ODSI_LOCAL_DIR\n(NAME.pid and NAME.log for coordinator, "
                   "gateway, worker-0, worker-1 ...).",
        .usage = "[options] --model FILE [-- COMMAND ...]",
        .examples =
            "  odsi local --model odsi-tiny-q8_0.gguf\n"
            "  odsi local --workers 6 --shards 3 --model F -- odsi generate -p \"One day\"\n"
            "  odsi local --workers 2 --layers 0-4,5-5 --model F -- ./my-test.sh\n",
        .options = table,
    };
    struct args *args = NULL;
    int rest = 0;
    int code = CMD_USAGE;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    if (outcome == ARGS_EXIT_OK)
        code = CMD_OK;
    else if (outcome == ARGS_RUN && !config.model_path)
        code = cli_input_usage(command_name, "which model? use --model FILE");
    else if (outcome == ARGS_RUN)
        code = run(&config, argv + rest, is_quiet);
    args_close(&args);
    return code;
}
