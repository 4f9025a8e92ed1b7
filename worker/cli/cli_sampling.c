#include "worker/cli/cli_sampling.h"

#include "common/base/limits.h"

#include <string.h>

/* proto/odsi/v1/inference.proto, GenerateRequest.penalty_window. */
#define PENALTY_WINDOW_DEFAULT 64u

void cli_sampling_params(const struct cli_sampling *self, struct sampler_params *out)
{
    *out = (struct sampler_params){
        .temperature = self->temperature,
        .top_k = self->top_k,
        .top_p = self->top_p,
        .min_p = self->min_p,
        .repetition_penalty = self->repetition_penalty,
        .penalty_window = self->penalty_window ? self->penalty_window : PENALTY_WINDOW_DEFAULT,
        .seed = self->seed,
    };
}

enum odsi_err cli_sampling_stop(const struct cli_sampling *self, struct stop *out)
{
    memset(out, 0, sizeof *out);
    for (uint32_t i = 0; i < self->stop.count; i++) {
        const char *text = self->stop.items[i];
        const enum odsi_err err = stop_add(out, text, strlen(text));
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "--stop");
    }
    return ODSI_OK;
}

enum odsi_err cli_sampling_check(const struct cli_sampling *self)
{
    struct sampler_params params;
    struct stop stop;
    cli_sampling_params(self, &params);
    const enum odsi_err err = sampler_check(&params);
    return err == ODSI_OK ? cli_sampling_stop(self, &stop) : err;
}
