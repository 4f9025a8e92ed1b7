/* Measurements: the engine alone, and a swarm under load through its gateway. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_BENCH_H
#define ODSI_WORKER_CLI_CLI_BENCH_H
#include "common/base/err.h"
#include "worker/cli/cli_client.h"
#include "worker/cli/cli_engine.h"

#include <stddef.h>
#include <stdint.h>

struct cli_bench_config {
    uint32_t prompt_token_count; /* >= 1 */
    uint32_t gen_token_count;    /* >= 1 */
    uint32_t batch;              /* sequences side by side; sessions of a swarm */
    uint64_t weight_size;        /* bytes of weights that a decode step reads; engine only */
};

struct cli_bench {
    double prefill_tps; /* prompt tokens per second, all sequences together */
    double decode_tps;  /* new tokens per second, all sequences together */
    double ttft_ms;     /* from the request to the first token; the median of sessions */
    double ttft_p99_ms;
    double per_token_p50_ms; /* between two tokens of one sequence */
    double per_token_p99_ms;
    double mixed_tps;      /* positions per second while one sequence's prompt runs in pieces beside
                            * the others' next tokens, in the same batches; 0: one sequence */
    double mixed_token_ms; /* between two tokens of the others meanwhile, the median */
    double bytes_per_token; /* that decoding reads: weights, shared by the batch, and KV cache;
                              * engine only */
    double read_gbps;       /* bytes_per_token * decode_tps; engine only */
    uint64_t work_size;     /* the most bytes it had resident beside weights and KV cache, from the
                             * first prompt on; 0: the system does not tell. Engine only */
};

/* The engine must have room for batch sessions of prompt + gen positions.
 * Errors: those of the engine. */
ODSI_MUST_USE enum odsi_err cli_bench_engine(struct cli_bench *out, struct cli_engine *engine,
                                             const struct cli_bench_config *config);

/* Runs config->batch answers at once and waits for all of them. model may be NULL.
 * Errors: that of the first answer that failed. */
ODSI_MUST_USE enum odsi_err cli_bench_swarm(struct cli_bench *out, struct cli_client *client,
                                            const char *model,
                                            const struct cli_bench_config *config);

/* The value below which `share` (0 to 1) of the values lie (nearest rank); sorts them in place.
 * count >= 1. */
double cli_bench_percentile(double *values, size_t count, double share);
#endif
