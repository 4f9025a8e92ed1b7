#include "worker/engine/startup.h"

#include "common/base/clock.h"
#include "common/base/log.h"
#include "worker/engine/kv_cache.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define DEFAULT_SESSIONS 16u

uint64_t startup_memory_free(void)
{
    unsigned long long kib = 0;
    char line[128];
    FILE *file = fopen("/proc/meminfo", "re"); /* counts what the page cache would give back */
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            break;
    if (file)
        fclose(file);
    if (kib > 0)
        return kib * 1024u;
    const long pages = sysconf(_SC_AVPHYS_PAGES);
    const long page_size = sysconf(_SC_PAGESIZE);
    return pages > 0 && page_size > 0 ? (uint64_t)pages * (uint64_t)page_size : 0;
}

uint64_t startup_kv_size_default(const struct model *model, uint32_t layer_first,
                                 uint32_t layer_end)
{
    const struct model_params *p = model_params_view(model);
    const uint64_t pages = (p->context_length + KV_PAGE_TOKENS - 1u) / KV_PAGE_TOKENS;
    const uint64_t wanted =
        DEFAULT_SESSIONS * pages *
        kv_cache_page_size(layer_end - layer_first, p->kv_head_count, p->head_dim);
    const uint64_t most = startup_memory_free() / 4;
    return wanted < most ? wanted : most;
}

uint32_t startup_layer_capacity(const struct model *model)
{
    const struct model_params *p = model_params_view(model);
    const uint64_t budget = startup_memory_free() / 10 * 6; /* the rest for KV and everyone else */
    uint32_t count = p->layer_count;
    while (count > 1 && model_span_weight_size(model, 0, count) > budget)
        count--;
    return count;
}

/* One line on how long the weights took, for people who wait for a worker. */
static void tell_ready(const struct model *model, const struct startup_config *config,
                       uint64_t started_us)
{
    const double seconds = (double)(clock_monotonic_us() - started_us + 1) / 1e6;
    const double gigabytes =
        (double)model_span_weight_size(model, config->layer_first, config->layer_end) / 1e9;
    log_line(LOG_INFO, "model ready in %.2f s (%.3g GB, %u layers, %.1f GB/s)", seconds, gigabytes,
             config->layer_end - config->layer_first, gigabytes / seconds);
}

enum odsi_err startup_open(struct startup *self, const struct model *model,
                           const struct startup_config *config)
{
    const uint64_t started_us = clock_monotonic_us();
    memset(self, 0, sizeof *self);
    enum odsi_err err = backend_open(&self->backend, &config->backend);
    if (err == ODSI_OK)
        err = model_span_open(&self->span, model, self->backend, config->layer_first,
                              config->layer_end, model_params_view(model)->context_length,
                              config->progress, config->context);
    if (err == ODSI_OK) {
        const struct engine_config engine_config = {
            .batch_tokens_max = config->tokens_max,
            .kv_size = config->kv_size
                           ? config->kv_size
                           : startup_kv_size_default(model, config->layer_first, config->layer_end),
        };
        err = engine_open(&self->engine, self->span, &engine_config);
    }
    if (err == ODSI_OK && config->announces)
        tell_ready(model, config, started_us);
    if (err == ODSI_OK && config->measure)
        err = measure_engine(&self->measure, self->engine, self->span);
    return err;
}

void startup_close(struct startup *self)
{
    engine_close(&self->engine);
    model_span_close(&self->span);
    backend_close(&self->backend);
}
