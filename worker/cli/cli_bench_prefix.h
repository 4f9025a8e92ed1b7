/* Measures what a shared prefix saves: the time to the first token of one session, and of another
 * whose prompt begins as the first one's (worker/engine/prefix_key.h). Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_BENCH_PREFIX_H
#define ODSI_WORKER_CLI_CLI_BENCH_PREFIX_H
#include "common/base/err.h"
#include "worker/cli/cli_engine.h"

#include <stdint.h>

#define CLI_BENCH_PREFIX_SESSIONS 2u /* that the engine must have room for */

struct cli_bench_prefix_config {
    uint32_t shared_token_count; /* >= 1 */
    uint32_t prompt_token_count; /* of each session; above shared_token_count */
};

struct cli_bench_prefix {
    double first_ms;       /* from opening the session to the logits of its last prompt token */
    double second_ms;      /* the same of the second one */
    uint32_t reused_count; /* positions that the second one found */
};

/* The second session's logits are compared with those of a session that reuses nothing.
 * Errors: those of the engine, ODSI_ERR_INTERNAL (the logits differ), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err cli_bench_prefix_run(struct cli_bench_prefix *out,
                                                 struct cli_engine *engine,
                                                 const struct cli_bench_prefix_config *config);
#endif
