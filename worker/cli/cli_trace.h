/* A trace: what a model computes on the way through some tokens, as hashes that do not depend on
 * the backend, the threads, how the tokens were cut into chunks or what else was in the batches
 * (kernels/NUMERICS.md), and the tokens that follow. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_TRACE_H
#define ODSI_WORKER_CLI_CLI_TRACE_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "worker/cli/cli_engine.h"
#include "worker/cli/cli_sampling.h"

#include <stdint.h>

struct cli_trace {
    struct digest *layers;   /* [layer_count]: SHA-256 of the residual stream after each layer,
                              * little-endian f32, [position][dim] over all tokens */
    struct digest logits_id; /* SHA-256 of logits */
    float *logits;           /* [vocab_size] at the last token */
    uint32_t *new_tokens;    /* [new_token_count] */
    uint32_t new_token_count;
    const char *finish_reason; /* "end", "stop", "length" */
    struct buf text;           /* of the new tokens */
};

#define CLI_TRACE_NEIGHBOURS_MAX 31u

struct cli_trace_config {
    const uint32_t *tokens; /* [token_count], token_count >= 1 */
    uint32_t token_count;
    uint32_t chunk;           /* positions per step; 0: as many as the engine takes */
    uint32_t neighbour_count; /* sessions of other content and lengths in the same batches */
    uint32_t new_tokens_max;  /* tokens to generate; 0: none */
    const struct cli_sampling *sampling;
    /* Called with the logits [vocab_size] of each of the tokens in turn, which then run one by one;
     * NULL: not. An error ends the trace. */
    enum odsi_err (*each_position)(void *context, const float *logits);
    void *context;
};

/* Positions that the engine must have room for in each session of that trace: its own, and one for
 * each neighbour. */
uint32_t cli_trace_positions(const struct cli_trace_config *config,
                             const struct model_params *params);

/* Runs the trace on a loaded engine. self is the caller's memory; ended with cli_trace_free, also
 * after an error.
 * Errors: ODSI_ERR_INVALID (a token outside the vocabulary), ODSI_ERR_RANGE (beyond the positions
 * the engine was loaded for), ODSI_ERR_NO_MEMORY, those of the engine and the sampler. */
ODSI_MUST_USE enum odsi_err cli_trace_run(struct cli_trace *self, struct cli_engine *engine,
                                          const struct cli_trace_config *config);
void cli_trace_free(struct cli_trace *self);
#endif
