#include "worker/cli/cli_engine.h"

#include "worker/cli/cli_input.h"
#include "worker/cli/cli_progress.h"
#include "worker/engine/kv_cache.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct progress {
    struct cli_progress line;
    const char *label;
};

static void show_progress(void *context, uint64_t done, uint64_t total)
{
    struct progress *self = context;
    cli_progress_bytes(&self->line, self->label, done, total);
}

enum odsi_err cli_engine_describe(struct cli_engine *self, const char *path)
{
    char cache[CLI_INPUT_PATH_SIZE];
    struct progress progress = {.label = "hashing the model"};
    const uint8_t *data = NULL;
    size_t size = 0;
    cli_progress_init(&progress.line, stderr);
    enum odsi_err err =
        model_open(&self->model, path, cli_input_cache(cache), show_progress, &progress);
    cli_progress_clear(&progress.line);
    if (err != ODSI_OK)
        return err;
    model_tokenizer_view(self->model, &data, &size);
    return tokenizer_open(&self->tokenizer, data, size);
}

enum odsi_err cli_engine_load(struct cli_engine *self, const char *backend, uint32_t thread_count,
                              uint32_t session_count, uint32_t token_count)
{
    const struct model_params *params = model_params_view(self->model);
    struct progress progress = {.label = "loading the layers"};
    const uint64_t pages = ((uint64_t)token_count + KV_PAGE_TOKENS - 1) / KV_PAGE_TOKENS;
    if (token_count == 0 || token_count > params->context_length)
        return odsi_fail(ODSI_ERR_RANGE, "%u positions: this model has 1 to %u", token_count,
                         params->context_length);
    cli_progress_init(&progress.line, stderr);
    const struct startup_config config = {
        .backend = {.name = backend, .thread_count = thread_count},
        .layer_end = params->layer_count,
        .kv_size = pages * session_count *
                   kv_cache_page_size(params->layer_count, params->kv_head_count, params->head_dim),
        .announces = isatty(STDERR_FILENO), /* a script wants nothing there but what went wrong */
        .progress = show_progress,
        .context = &progress,
    };
    const enum odsi_err err = startup_open(&self->startup, self->model, &config);
    cli_progress_clear(&progress.line);
    return err;
}

void cli_engine_close(struct cli_engine *self)
{
    startup_close(&self->startup);
    tokenizer_close(&self->tokenizer);
    model_close(&self->model);
}

const char *cli_engine_backend_view(const struct cli_engine *self)
{
    return self->startup.backend->ops->name;
}

uint32_t cli_engine_thread_count(const struct cli_engine *self)
{
    return self->startup.backend->thread_count;
}

enum odsi_err cli_engine_step(struct cli_engine *self, struct engine_step *step)
{
    const enum odsi_err err = engine_run(self->startup.engine, step, 1);
    return err != ODSI_OK ? err : step->status;
}
