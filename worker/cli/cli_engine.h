/* A whole model in this process, for the commands that need no swarm: opened and closed together,
 * with progress on standard error. Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_ENGINE_H
#define ODSI_WORKER_CLI_CLI_ENGINE_H
#include "common/base/err.h"
#include "worker/engine/startup.h"
#include "worker/model/model.h"
#include "worker/model/tokenizer.h"

#include <stdint.h>

struct cli_engine {
    struct model *model;
    struct tokenizer *tokenizer;
    struct startup startup;
};

/* Reads the model's description, not its weights. self is the caller's memory, zeroed; ended with
 * cli_engine_close, also after an error. Errors: those of model_open and tokenizer_open. */
ODSI_MUST_USE enum odsi_err cli_engine_describe(struct cli_engine *self, const char *path);
/* Loads all layers, with room for session_count sessions of token_count positions. backend NULL:
 * the fastest; thread_count 0: all. Errors: those of startup_open, ODSI_ERR_RANGE (more positions
 * than the model has). */
ODSI_MUST_USE enum odsi_err cli_engine_load(struct cli_engine *self, const char *backend,
                                            uint32_t thread_count, uint32_t session_count,
                                            uint32_t token_count);
void cli_engine_close(struct cli_engine *self);

/* "avx512", "cuda"; only when loaded. */
const char *cli_engine_backend_view(const struct cli_engine *self);
uint32_t cli_engine_thread_count(const struct cli_engine *self);
/* Runs one batch of one step. Errors: those of engine_run and of the step. */
ODSI_MUST_USE enum odsi_err cli_engine_step(struct cli_engine *self, struct engine_step *step);
#endif
