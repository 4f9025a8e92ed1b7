/* The rotation of positions as config.json spells it: rope_theta and rope_scaling, or
 * rope_parameters, which newer files have instead of both (for Gemma 3 one for each kind of layer).
 * Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_HF_ROPE_H
#define ODSI_WORKER_MODEL_HF_ROPE_H
#include "common/base/err.h"
#include "worker/model/hf_config.h"
#include "worker/model/hf_json.h"

/* Sets rope_style, rope_dim, rope_base, rope_base_windowed, rope_linear, rope_amplitude, the
 * feature MODEL_ROPE_FACTORS and the factors, from family, head_dim, context_length and window,
 * which are set and within limits. base: what a missing rope_theta means.
 * Errors: ODSI_ERR_CORRUPT, ODSI_ERR_UNSUPPORTED; fields->err when that is set. */
ODSI_MUST_USE enum odsi_err hf_rope_read(struct hf_config *config, struct hf_json *fields,
                                         double base);
#endif
