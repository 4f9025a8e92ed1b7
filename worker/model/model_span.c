/* Tensors are read into memory of ours, hashed there, and handed to the backend from there: what
 * was checked is what is used, even if somebody rewrites the file meanwhile (draft-wang-cats-odsi,
 * 8.2: an action is only verifiable when its inputs are). */
#include "common/base/alloc.h"
#include "kernels/rope_table.h"
#include "worker/model/model.h"
#include "worker/model/model_parts.h"

#include <inttypes.h>
#include <string.h>

/* What loading needs besides the span itself. */
struct loader {
    struct model_span *span;
    uint8_t *bytes; /* of one tensor; as large as the largest */
    struct digest_stream *stream;
    struct model_progress progress;
};

/* ---- which tensors a span has --------------------------------------------------------------- */

static int is_in_model(const struct model *model, uint32_t layer_first, uint32_t layer_end)
{
    return layer_first < layer_end && layer_end <= model->params.layer_count;
}

/* Calls visit for every tensor of [layer_first, layer_end), each once. */
static void visit_tensors(const struct model *model, uint32_t layer_first, uint32_t layer_end,
                          void (*visit)(void *context, const struct manifest_tensor *tensor),
                          void *context)
{
    const struct manifest_tensor *output = model_tensor_of(model, ARCH_OUTPUT, 0);
    const int is_last = layer_end == model->params.layer_count;
    if (layer_first == 0 || (is_last && !output))
        visit(context, model_tensor_of(model, ARCH_EMBED, 0));
    for (uint32_t layer = layer_first; layer < layer_end; layer++)
        for (uint32_t role = ARCH_ROLE_LAYER_FIRST; role < ARCH_ROLE_COUNT; role++)
            visit(context, model_tensor_of(model, (enum arch_role)role, layer));
    if (is_last)
        visit(context, model_tensor_of(model, ARCH_OUTPUT_NORM, 0));
    if (is_last && output)
        visit(context, output);
}

static void add_size(void *context, const struct manifest_tensor *tensor)
{
    uint64_t *sum = context;
    *sum += tensor->size;
}

static void keep_largest(void *context, const struct manifest_tensor *tensor)
{
    uint64_t *largest = context;
    if (tensor->size > *largest)
        *largest = tensor->size;
}

uint64_t model_span_weight_size(const struct model *model, uint32_t layer_first, uint32_t layer_end)
{
    uint64_t sum = 0;
    if (is_in_model(model, layer_first, layer_end))
        visit_tensors(model, layer_first, layer_end, add_size, &sum);
    return sum;
}

/* ---- loading -------------------------------------------------------------------------------- */

/* Brings the tensor into loader->bytes and checks its digest. */
static enum odsi_err fetch(struct loader *loader, const struct manifest_tensor *tensor)
{
    const struct model *model = loader->span->model;
    for (uint64_t at = 0; at < tensor->size;) {
        const uint64_t left = tensor->size - at;
        const size_t size = left < MODEL_CHUNK_SIZE ? (size_t)left : MODEL_CHUNK_SIZE;
        const enum odsi_err err =
            gguf_read(model->gguf, tensor->offset + at, loader->bytes + at, size);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "%s: tensor %s", model->path, tensor->name);
        digest_stream_add(loader->stream, loader->bytes + at, size); /* while it is in cache */
        model_progress_add(&loader->progress, size);
        at += size;
    }
    struct digest digest;
    digest_stream_finish(loader->stream, &digest);
    if (digest_equal(&digest, &tensor->digest))
        return ODSI_OK;
    if (model->cache_path.size == 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "%s: tensor %s changed since the model was opened",
                         model->path, tensor->name);
    return odsi_fail(ODSI_ERR_CORRUPT,
                     "%s: tensor %s is not what it was when the model was hashed; if the file was "
                     "replaced on purpose, delete %.*s",
                     model->path, tensor->name, (int)model->cache_path.size,
                     (const char *)model->cache_path.data);
}

/* The backend may still be copying from loader->bytes when a call returns; wait before they are
 * used again. */
static enum odsi_err settle(struct loader *loader, const struct manifest_tensor *tensor,
                            enum odsi_err err)
{
    struct backend *backend = loader->span->backend;
    if (err == ODSI_OK)
        err = backend->ops->sync(backend);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "loading tensor %s", tensor->name);
}

static enum odsi_err load_weight(struct loader *loader, struct weight **out, enum arch_role role,
                                 uint32_t layer)
{
    struct backend *backend = loader->span->backend;
    const struct manifest_tensor *tensor = model_tensor_of(loader->span->model, role, layer);
    enum odsi_err err = fetch(loader, tensor);
    if (err != ODSI_OK)
        return err;
    const uint32_t rows = (uint32_t)tensor->dims[1];
    err = backend->ops->weight_open(backend, out, tensor->type, rows, (uint32_t)tensor->dims[0], 1);
    if (err == ODSI_OK)
        err = backend->ops->weight_fill(backend, *out, 0, loader->bytes, rows);
    return settle(loader, tensor, err);
}

static enum odsi_err upload_new(struct backend *backend, float **out_dev, const void *from,
                                size_t size)
{
    void *memory_dev = NULL;
    const enum odsi_err err = backend->ops->mem_alloc(backend, &memory_dev, size);
    if (err != ODSI_OK)
        return err;
    *out_dev = memory_dev;
    return backend->ops->upload(backend, memory_dev, from, size);
}

static enum odsi_err load_norm(struct loader *loader, float **out_dev, enum arch_role role,
                               uint32_t layer)
{
    const struct manifest_tensor *tensor = model_tensor_of(loader->span->model, role, layer);
    const enum odsi_err err = fetch(loader, tensor);
    if (err != ODSI_OK)
        return err;
    return settle(loader, tensor,
                  upload_new(loader->span->backend, out_dev, loader->bytes, tensor->size));
}

static enum odsi_err load_layer(struct loader *loader, struct model_layer *out, uint32_t layer)
{
    const struct {
        struct weight **weight;
        enum arch_role role;
    } weights[] = {
        {&out->wq, ARCH_Q},        {&out->wk, ARCH_K},    {&out->wv, ARCH_V},
        {&out->wo, ARCH_O},        {&out->w_up, ARCH_UP}, {&out->w_gate, ARCH_GATE},
        {&out->w_down, ARCH_DOWN},
    };
    enum odsi_err err = load_norm(loader, &out->attn_norm_dev, ARCH_ATTN_NORM, layer);
    if (err == ODSI_OK)
        err = load_norm(loader, &out->ffn_norm_dev, ARCH_FFN_NORM, layer);
    out->rope = &loader->span->rope;
    for (size_t i = 0; i < sizeof weights / sizeof weights[0] && err == ODSI_OK; i++)
        err = load_weight(loader, weights[i].weight, weights[i].role, layer);
    return err;
}

static enum odsi_err load_ends(struct loader *loader)
{
    struct model_span *span = loader->span;
    const struct model *model = span->model;
    const int is_tied = model_tensor_of(model, ARCH_OUTPUT, 0) == NULL;
    enum odsi_err err = ODSI_OK;
    if (span->layer_first == 0)
        err = load_weight(loader, &span->embed, ARCH_EMBED, 0);
    if (err != ODSI_OK || span->layer_end != model->params.layer_count)
        return err;
    err = load_norm(loader, &span->output_norm_dev, ARCH_OUTPUT_NORM, 0);
    if (err != ODSI_OK)
        return err;
    if (is_tied && span->embed)
        span->output = span->embed;
    else
        err = load_weight(loader, &span->output, is_tied ? ARCH_EMBED : ARCH_OUTPUT, 0);
    return err;
}

static enum odsi_err make_rope(struct model_span *span, uint32_t positions)
{
    const struct model_params *params = &span->model->params;
    struct backend *backend = span->backend;
    const uint32_t half_dim = params->head_dim / 2;
    const size_t count = (size_t)positions * half_dim;
    double *frequency = NULL;
    float *cos_table = NULL;
    float *sin_table = NULL;
    float *cos_dev = NULL;
    float *sin_dev = NULL;
    enum odsi_err err = alloc_aligned(&cos_table, count, sizeof *cos_table);
    if (err == ODSI_OK)
        err = alloc_aligned(&sin_table, count, sizeof *sin_table);
    if (err == ODSI_OK)
        err = alloc_zeroed(&frequency, half_dim, sizeof *frequency);
    if (err == ODSI_OK) {
        rope_table_frequencies(frequency, half_dim, (double)params->rope_base, 1.0, NULL);
        rope_table_fill(cos_table, sin_table, positions, half_dim, frequency, 1.0);
        err = upload_new(backend, &cos_dev, cos_table, count * sizeof *cos_table);
    }
    if (err == ODSI_OK)
        err = upload_new(backend, &sin_dev, sin_table, count * sizeof *sin_table);
    if (err == ODSI_OK)
        err = backend->ops->sync(backend);
    span->rope = (struct rope_table){.cos_dev = cos_dev,
                                     .sin_dev = sin_dev,
                                     .position_count = positions,
                                     .half_dim = half_dim,
                                     .style = (enum rope_style)params->rope_style};
    alloc_free(frequency);
    alloc_free(cos_table);
    alloc_free(sin_table);
    return err;
}

static enum odsi_err load_all(struct model_span *span, struct model_progress progress)
{
    struct loader loader = {.span = span, .progress = progress};
    const uint32_t layer_count = span->layer_end - span->layer_first;
    uint64_t largest = 0;
    visit_tensors(span->model, span->layer_first, span->layer_end, keep_largest, &largest);
    enum odsi_err err = alloc_aligned(&loader.bytes, largest, 1);
    if (err == ODSI_OK)
        err = digest_stream_open(&loader.stream);
    if (err == ODSI_OK)
        err = load_ends(&loader);
    for (uint32_t i = 0; i < layer_count && err == ODSI_OK; i++)
        err = load_layer(&loader, &span->layers[i], span->layer_first + i);
    digest_stream_close(&loader.stream);
    alloc_free(loader.bytes);
    return err;
}

enum odsi_err model_span_open(struct model_span **out, const struct model *model,
                              struct backend *backend, uint32_t layer_first, uint32_t layer_end,
                              uint32_t positions,
                              void (*progress)(void *context, uint64_t done, uint64_t total),
                              void *context)
{
    *out = NULL;
    if (!is_in_model(model, layer_first, layer_end))
        return odsi_fail(ODSI_ERR_RANGE,
                         "layers %" PRIu32 " to %" PRIu32 ": the model has %" PRIu32, layer_first,
                         layer_end, model->params.layer_count);
    if (positions == 0 || positions > model->params.context_length)
        return odsi_fail(ODSI_ERR_RANGE,
                         "%" PRIu32 " positions: the model's context is 1 to %" PRIu32, positions,
                         model->params.context_length);
    struct model_span *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->backend = backend;
    self->model = model;
    self->layer_first = layer_first;
    self->layer_end = layer_end;
    self->position_count = positions;
    err = alloc_zeroed(&self->layers, layer_end - layer_first, sizeof *self->layers);
    if (err == ODSI_OK)
        err = make_rope(self, positions);
    if (err == ODSI_OK)
        err = load_all(self, (struct model_progress){
                                 .call = progress,
                                 .context = context,
                                 .total = model_span_weight_size(model, layer_first, layer_end)});
    if (err != ODSI_OK)
        model_span_close(&self);
    *out = self;
    return err;
}

/* ---- closing -------------------------------------------------------------------------------- */

static void free_weight(struct backend *backend, struct weight *weight)
{
    if (weight)
        backend->ops->weight_free(backend, weight);
}

static void free_memory(struct backend *backend, const float *memory_dev)
{
    if (memory_dev)
        backend->ops->mem_free(backend, (void *)(uintptr_t)memory_dev);
}

static void free_layer(struct backend *backend, struct model_layer *layer)
{
    struct weight *const weights[] = {layer->wq,     layer->wk,   layer->wv,    layer->wo,
                                      layer->w_gate, layer->w_up, layer->w_down};
    for (size_t i = 0; i < sizeof weights / sizeof weights[0]; i++)
        free_weight(backend, weights[i]);
    free_memory(backend, layer->attn_norm_dev);
    free_memory(backend, layer->ffn_norm_dev);
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
    free_memory(backend, span->output_norm_dev);
    free_memory(backend, span->rope.cos_dev);
    free_memory(backend, span->rope.sin_dev);
    alloc_free(span->layers);
    alloc_free(span);
    *self = NULL;
}
