/* A whole swarm on this machine: one coordinator, one gateway and some workers, each the real
 * program in a process of its own, with its own identity, in a fresh private folder. Between them
 * mutual TLS as anywhere; the gateway takes plaintext from this machine's clients.
 *
 * States: opened (folder and plan, nothing runs) -> started (every process runs) -> ready (the
 * gateway says that every layer is served) -> closed. Main thread only; cli_child_wait_setup must
 * have been called. */
#ifndef ODSI_WORKER_CLI_CLI_SWARM_H
#define ODSI_WORKER_CLI_CLI_SWARM_H
#include "common/base/err.h"
#include "worker/cli/cli_env.h"
#include "worker/cli/cli_progress.h"
#include "worker/cli/cli_split.h"

#include <stdint.h>
#include <stdio.h>

#define CLI_SWARM_WORKERS_MAX 64u

struct cli_swarm;

struct cli_swarm_config {
    const char *model_path;
    uint32_t worker_count; /* 1 to CLI_SWARM_WORKERS_MAX */
    uint32_t shard_count;  /* 0: one per worker */
    const char *layers;    /* "0-2,3-5", one range per shard; NULL: balanced */
    uint32_t thread_count; /* of each worker */
    const char *log_level;
    uint32_t ready_timeout_s;
    int is_kept; /* the folder stays */
};

/* Reads the model's layer count, finds the programs beside this binary, plans the layers and makes
 * the folder. Errors: ODSI_ERR_INVALID, ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, those of source_open. */
ODSI_MUST_USE enum odsi_err cli_swarm_open(struct cli_swarm **out,
                                           const struct cli_swarm_config *config);
/* Starts everything and waits until it is ready. When a process ends meanwhile, the last lines of
 * its log go to standard error.
 * Errors: ODSI_ERR_UNAVAILABLE (a process ended), ODSI_ERR_TIMEOUT, ODSI_ERR_CANCELLED (a signal
 * asked us to end), ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err cli_swarm_start(struct cli_swarm *self, struct cli_progress *progress);
/* Adds ODSI_GATEWAY, ODSI_INSECURE, ODSI_COORDINATOR, ODSI_LOCAL_DIR, and ODSI_HOME when it is not
 * set. Only when ready. */
ODSI_MUST_USE enum odsi_err cli_swarm_environment(const struct cli_swarm *self,
                                                  struct cli_env *environment);
/* Who serves what, and how to use it. Only when ready. */
void cli_swarm_show(const struct cli_swarm *self, FILE *to);
/* Tells about every process that ended since the last call, on standard error. Returns how many
 * of them still run. */
uint32_t cli_swarm_watch(struct cli_swarm *self);
/* Ends every process (SIGTERM, after 3 s or another signal SIGKILL) and removes the folder unless
 * it is kept. *self may be NULL. */
void cli_swarm_close(struct cli_swarm **self);
#endif
