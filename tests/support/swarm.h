/* A whole swarm of real processes for a test: coordinator on SQLite, workers that hold equal
 * shares of a model's layers (several the same share when there are replicas), gateway with a
 * plaintext client side on loopback. Mutual TLS inside. Ends with swarm_close or with the test's
 * process, however that ends. */
#ifndef ODSI_TESTS_SUPPORT_SWARM_H
#define ODSI_TESTS_SUPPORT_SWARM_H
#include "tests/support/process.h"

#define SWARM_WORKERS_MAX 8u

struct swarm_config {
    const char *model;
    uint32_t layer_count;
    uint32_t worker_count;
    uint32_t shard_count;           /* 0: worker_count; worker i holds shard i % shard_count */
    const char *const *worker_args; /* added to every worker's, NULL-terminated; may be NULL */
};

struct swarm {
    char folder[PROCESS_PATH_SIZE];
    struct process *coordinator;
    struct process *gateway;
    struct process *workers[SWARM_WORKERS_MAX];
    uint32_t worker_count;
    char coordinator_address[512]; /* ID@host:port */
    char worker_addresses[SWARM_WORKERS_MAX][512];
    char gateway_address[512]; /* host:port */
    uint32_t call_count;       /* of swarm_generate; names its files */
};

/* Starts everything and waits until it serves; fails the test otherwise. */
void swarm_open(struct swarm *self, const struct swarm_config *config);
/* Asks every process to stop, and fails the test when one does not exit with 0 in 5 s (those that
 * were closed before are left out). */
void swarm_close(struct swarm *self);

/* Runs `odsi generate` with --json and these further arguments (NULL-terminated); returns its exit
 * code, *out_output is standard output and *out_log standard error (alloc_free; may be NULL). */
int swarm_generate(struct swarm *self, const char *const *args, char **out_output, char **out_log);
#endif
