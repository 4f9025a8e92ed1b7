/* Everything a machine needs to run a span of layers, opened and closed together: backend,
 * weights, engine, and how fast it turned out to be.
 *
 * Threads: opened and closed by one thread at a time; the engine inside has one owner thread. */
#ifndef ODSI_WORKER_ENGINE_STARTUP_H
#define ODSI_WORKER_ENGINE_STARTUP_H
#include "common/base/err.h"
#include "worker/engine/engine.h"
#include "worker/engine/measure.h"
#include "worker/model/model.h"

#include <stdint.h>

struct startup_config {
    struct backend_config backend;
    uint32_t layer_first;
    uint32_t layer_end;
    uint64_t kv_size;    /* bytes for the KV cache; 0: startup_kv_size_default */
    uint32_t tokens_max; /* positions of a batch; 0: the engine's default */
    int measure;         /* whether to run the layers once for their speed */
    int announces;       /* whether to log how long it took until they could run */
    void (*progress)(void *context, uint64_t done, uint64_t total); /* bytes; NULL: none */
    void *context;
};

struct startup {
    struct backend *backend;
    struct model_span *span;
    struct engine *engine;
    struct measure measure; /* zero unless asked for */
};

/* model must outlive it. self is the caller's memory; ended with startup_close, also after an
 * error. Errors: those of backend_open, model_span_open, engine_open and measure_engine. */
ODSI_MUST_USE enum odsi_err startup_open(struct startup *self, const struct model *model,
                                         const struct startup_config *config);
void startup_close(struct startup *self);

/* Room for 16 sessions of the whole context on those layers, but at most a quarter of the memory
 * that is free now. */
uint64_t startup_kv_size_default(const struct model *model, uint32_t layer_first,
                                 uint32_t layer_end);
/* How many layers of model this machine can hold, by the memory that is free now: at least 1. */
uint32_t startup_layer_capacity(const struct model *model);
/* Bytes of memory that are free now. */
uint64_t startup_memory_free(void);
#endif
