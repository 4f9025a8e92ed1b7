/* How fast this worker is through the layers it holds, measured by running them once before it
 * offers them (draft 6.3, capability advertisement). */
#ifndef ODSI_WORKER_ENGINE_MEASURE_H
#define ODSI_WORKER_ENGINE_MEASURE_H
#include "common/base/err.h"
#include "worker/engine/engine.h"

struct measure {
    float prefill_tokens_per_s; /* chunks of up to 64 positions */
    float decode_tokens_per_s;  /* one position at a time, one session */
};

/* Takes about a fifth of a second for small models, a few steps for large ones. The engine's owner
 * thread; no session may be open. Errors: those of engine_session_open and engine_run. */
ODSI_MUST_USE enum odsi_err measure_engine(struct measure *out, struct engine *engine,
                                           const struct model_span *span);
#endif
