#include "common/base/alloc.h"
#include "worker/model/model.h"
#include "worker/model/model_parts.h"

#include <inttypes.h>
#include <string.h>

/* ---- which roles a span has ------------------------------------------------------------------ */

int model_has_layers(const struct model *model, uint32_t layer_first, uint32_t layer_end)
{
    return layer_first < layer_end && layer_end <= model->params.layer_count;
}

enum odsi_err model_visit_roles(const struct model *model, uint32_t layer_first, uint32_t layer_end,
                                enum odsi_err (*visit)(void *context, enum arch_role role,
                                                       uint32_t layer),
                                void *context)
{
    struct arch_piece piece;
    const int is_last = layer_end == model->params.layer_count;
    const int is_tied = !arch_piece_at(model->source, ARCH_OUTPUT, 0, 0, &piece);
    enum odsi_err err = ODSI_OK;
    if (layer_first == 0 || (is_last && is_tied))
        err = visit(context, ARCH_EMBED, 0);
    for (uint32_t layer = layer_first; layer < layer_end; layer++)
        for (uint32_t role = ARCH_ROLE_LAYER_FIRST; role < ARCH_ROLE_COUNT && err == ODSI_OK;
             role++)
            err = visit(context, (enum arch_role)role, layer);
    if (err == ODSI_OK && is_last)
        err = visit(context, ARCH_OUTPUT_NORM, 0);
    if (err == ODSI_OK && is_last && !is_tied)
        err = visit(context, ARCH_OUTPUT, 0);
    return err;
}

struct sum {
    const struct source *source;
    uint64_t size;
};

static enum odsi_err add_size(void *context, enum arch_role role, uint32_t layer)
{
    struct sum *sum = context;
    struct arch_piece piece;
    for (uint32_t i = 0; arch_piece_at(sum->source, role, layer, i, &piece); i++)
        if (piece.row_first == 0) /* a tensor of several roles counts once */
            sum->size += piece.tensor->size;
    return ODSI_OK;
}

uint64_t model_span_weight_size(const struct model *model, uint32_t layer_first, uint32_t layer_end)
{
    struct sum sum = {.source = model->source};
    enum odsi_err err = ODSI_OK;
    if (model_has_layers(model, layer_first, layer_end))
        err = model_visit_roles(model, layer_first, layer_end, add_size, &sum);
    return err == ODSI_OK ? sum.size : 0; /* add_size does not fail */
}

/* ---- opening --------------------------------------------------------------------------------- */

static enum odsi_err fill_span(struct model_span *self, const struct model_progress *progress)
{
    struct parallel *threads = NULL;
    enum odsi_err err =
        alloc_zeroed(&self->layers, self->layer_end - self->layer_first, sizeof *self->layers);
    if (err == ODSI_OK)
        err = parallel_open(&threads, self->backend->thread_count);
    if (err == ODSI_OK)
        err = model_rope_make(self, threads);
    if (err == ODSI_OK)
        err = model_load_weights(self, threads, progress);
    parallel_close(&threads);
    return err;
}

enum odsi_err model_span_open(struct model_span **out, const struct model *model,
                              struct backend *backend, uint32_t layer_first, uint32_t layer_end,
                              uint32_t positions,
                              void (*progress)(void *context, uint64_t done, uint64_t total),
                              void *context)
{
    const struct model_progress tell = {.call = progress, .context = context};
    struct model_span *self = NULL;
    *out = NULL;
    if (!model_has_layers(model, layer_first, layer_end))
        return odsi_fail(ODSI_ERR_RANGE,
                         "layers %" PRIu32 " to %" PRIu32 ": the model has %" PRIu32, layer_first,
                         layer_end, model->params.layer_count);
    if (positions == 0 || positions > model->params.context_length)
        return odsi_fail(ODSI_ERR_RANGE,
                         "%" PRIu32 " positions: the model's context is 1 to %" PRIu32, positions,
                         model->params.context_length);
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->backend = backend;
    self->model = model;
    self->layer_first = layer_first;
    self->layer_end = layer_end;
    self->position_count = positions;
    err = fill_span(self, &tell);
    if (err != ODSI_OK)
        model_span_close(&self);
    *out = self;
    return err;
}

/* ---- closing --------------------------------------------------------------------------------- */

static void free_weight(struct backend *backend, struct weight *weight)
{
    if (weight)
        backend->ops->weight_free(backend, weight);
}

static void free_vector(struct backend *backend, float *vector_dev)
{
    if (vector_dev)
        backend->ops->mem_free(backend, vector_dev);
}

static void free_layer(struct backend *backend, struct model_layer *layer)
{
    struct weight *const weights[] = {layer->wq,     layer->wk,   layer->wv,     layer->wo,
                                      layer->w_gate, layer->w_up, layer->w_down, layer->w_router};
    float *const vectors[] = {
        layer->attn_norm_dev,      layer->q_bias_dev,   layer->k_bias_dev,
        layer->v_bias_dev,         layer->q_norm_dev,   layer->k_norm_dev,
        layer->attn_post_norm_dev, layer->ffn_norm_dev, layer->ffn_post_norm_dev};
    for (size_t i = 0; i < sizeof weights / sizeof weights[0]; i++)
        free_weight(backend, weights[i]);
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; i++)
        free_vector(backend, vectors[i]);
}

void model_span_close(struct model_span **self)
{
    struct model_span *span = *self;
    if (!span)
        return;
    struct backend *backend = span->backend;
    for (uint32_t i = 0; span->layers && i < span->layer_end - span->layer_first; i++)
        free_layer(backend, &span->layers[i]);
    if (span->output != span->embed)
        free_weight(backend, span->output);
    free_weight(backend, span->embed);
    free_vector(backend, span->output_norm_dev);
    model_rope_free(span);
    alloc_free(span->layers);
    alloc_free(span);
    *self = NULL;
}
