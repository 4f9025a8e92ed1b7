/* How tokens are picked, as flags: the same ones for `odsi generate`, which sends them to a swarm,
 * and `odsi trace --generate`, which applies them here. */
#ifndef ODSI_WORKER_CLI_CLI_SAMPLING_H
#define ODSI_WORKER_CLI_CLI_SAMPLING_H
#include "common/base/args.h"
#include "common/base/err.h"
#include "worker/engine/sampler.h"
#include "worker/engine/stop.h"

#include <stdint.h>

/* Zero-initialize. Zero means "off" in every field but seed. */
struct cli_sampling {
    float temperature;
    uint32_t top_k;
    float top_p;
    float min_p;
    float repetition_penalty;
    uint32_t penalty_window;
    uint64_t seed;
    int ignore_end;
    struct args_list stop;
};

/* Rows of a command's table of options; s is a struct cli_sampling that outlives it. */
#define CLI_SAMPLING_OPTIONS(s)                                                                    \
    {"temperature",    't', ARGS_F32,                                                              \
     &(s).temperature, "T", "0 (default): always the likeliest token; 0.8: lively"},               \
        {"top-k", 0, ARGS_U32, &(s).top_k, "K", "only among the K likeliest tokens"},              \
        {"top-p", 0, ARGS_F32, &(s).top_p, "P", "only among the likeliest with share P together"}, \
        {"min-p", 0, ARGS_F32, &(s).min_p, "P", "only tokens P times as likely as the best"},      \
        {"repetition-penalty",    0,   ARGS_F32,                                                   \
         &(s).repetition_penalty, "X", "above 1: recent tokens become less likely"},               \
        {"penalty-window",    0,   ARGS_U32,                                                       \
         &(s).penalty_window, "N", "how many tokens are recent (64)"},                             \
        {"seed", 's', ARGS_U64, &(s).seed, "N", "of the draw: same seed, same text"},              \
        {"stop", 0, ARGS_TEXT_LIST, &(s).stop, "TEXT", "stop when this text appears; repeatable"}, \
    {                                                                                              \
        "ignore-end", 0, ARGS_FLAG, &(s).ignore_end, NULL,                                         \
            "go on after the model's end-of-text token"                                            \
    }

/* Checks every field here, before anything is sent or loaded.
 * Errors: ODSI_ERR_INVALID, naming the flag. */
ODSI_MUST_USE enum odsi_err cli_sampling_check(const struct cli_sampling *self);
/* What a worker makes of them, the default penalty window included. */
void cli_sampling_params(const struct cli_sampling *self, struct sampler_params *out);
/* The stop strings; checked already. */
ODSI_MUST_USE enum odsi_err cli_sampling_stop(const struct cli_sampling *self, struct stop *out);
#endif
