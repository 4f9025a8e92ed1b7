/* Tensors are read into memory of ours, hashed there, and handed to the backend from there: what
 * was checked is what is used, even if somebody rewrites the file meanwhile (draft-wang-cats-odsi,
 * 8.2: an action is only verifiable when its inputs are). A span whose tensor turns out wrong is
 * thrown away whole, so it does no harm that its first rows were handed on before its last ones
 * were hashed. */
#include "common/base/alloc.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "worker/model/model_parts.h"
#include "worker/model/tensor_scan.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>

/* Rows of a tensor and where in the span they go. */
struct fill {
    uint32_t tensor; /* index in the source */
    struct arch_piece piece;
    struct weight *weight; /* or */
    float *vector_dev;
    int adds_one; /* to a norm that the file stores without it */
};

struct loader {
    struct model_span *span;
    const struct source *source;
    struct fill *fills; /* in ascending order of tensor when the plan is done */
    uint32_t fill_count;
    uint32_t fill_max;
    uint32_t *tensors; /* those of the fills, each once */
    uint32_t tensor_count;
};

/* ---- where a role stands in the span --------------------------------------------------------- */

/* A struct weight * or a float * of the span. */
static void *place_of(struct model_span *span, enum arch_role role, uint32_t layer)
{
    static const size_t in_layer[ARCH_ROLE_COUNT] = {
        [ARCH_ATTN_NORM] = offsetof(struct model_layer, attn_norm_dev),
        [ARCH_Q] = offsetof(struct model_layer, wq),
        [ARCH_K] = offsetof(struct model_layer, wk),
        [ARCH_V] = offsetof(struct model_layer, wv),
        [ARCH_Q_BIAS] = offsetof(struct model_layer, q_bias_dev),
        [ARCH_K_BIAS] = offsetof(struct model_layer, k_bias_dev),
        [ARCH_V_BIAS] = offsetof(struct model_layer, v_bias_dev),
        [ARCH_Q_NORM] = offsetof(struct model_layer, q_norm_dev),
        [ARCH_K_NORM] = offsetof(struct model_layer, k_norm_dev),
        [ARCH_O] = offsetof(struct model_layer, wo),
        [ARCH_ATTN_POST_NORM] = offsetof(struct model_layer, attn_post_norm_dev),
        [ARCH_FFN_NORM] = offsetof(struct model_layer, ffn_norm_dev),
        [ARCH_ROUTER] = offsetof(struct model_layer, w_router),
        [ARCH_GATE] = offsetof(struct model_layer, w_gate),
        [ARCH_UP] = offsetof(struct model_layer, w_up),
        [ARCH_DOWN] = offsetof(struct model_layer, w_down),
        [ARCH_FFN_POST_NORM] = offsetof(struct model_layer, ffn_post_norm_dev),
    };
    if (role >= ARCH_ROLE_LAYER_FIRST)
        return (uint8_t *)&span->layers[layer - span->layer_first] + in_layer[role];
    if (role == ARCH_OUTPUT_NORM)
        return &span->output_norm_dev;
    /* A span that has only the end of a tied model takes the embedding as its output. */
    return role == ARCH_EMBED && span->layer_first == 0 ? &span->embed : &span->output;
}

/* ---- the plan -------------------------------------------------------------------------------- */

static int is_norm(enum arch_role role)
{
    return role != ARCH_Q_BIAS && role != ARCH_K_BIAS && role != ARCH_V_BIAS;
}

/* Opens what the pieces of a role go into. One thread opens everything before the first is filled:
 * then a backend can lay one beside the other, and none waits for the filling of another. */
static enum odsi_err open_place(struct loader *self, enum arch_role role, uint32_t layer,
                                const struct arch_tensor *shape, struct fill *out)
{
    struct backend *backend = self->span->backend;
    void *place = place_of(self->span, role, layer);
    struct arch_piece first;
    if (!shape->is_vector) {
        struct weight **weight = place;
        (void)arch_piece_at(self->source, role, layer, 0, &first); /* it is there: was checked */
        const enum odsi_err err = backend->ops->weight_open(
            backend, weight, first.tensor->type, shape->rows, shape->cols, shape->matrix_count);
        out->weight = *weight;
        return err;
    }
    void *memory_dev = NULL;
    const enum odsi_err err =
        backend->ops->mem_alloc(backend, &memory_dev, shape->cols * sizeof(float));
    float **vector = place;
    *vector = memory_dev;
    out->vector_dev = memory_dev;
    out->adds_one = is_norm(role) && (self->source->params.features & MODEL_NORM_PLUS_ONE);
    return err;
}

static enum odsi_err plan_role(void *context, enum arch_role role, uint32_t layer)
{
    struct loader *self = context;
    struct arch_tensor shape;
    struct fill fill = {.weight = NULL};
    if (!arch_tensor_of(&self->source->params, role, layer, &shape))
        return ODSI_OK;
    const enum odsi_err err = open_place(self, role, layer, &shape, &fill);
    if (err != ODSI_OK)
        return odsi_fail_prefix(err, "tensor %s", shape.name);
    for (uint32_t i = 0; arch_piece_at(self->source, role, layer, i, &fill.piece); i++) {
        fill.tensor = (uint32_t)(fill.piece.tensor - self->source->tensors);
        self->fills[self->fill_count++] = fill;
    }
    return ODSI_OK;
}

static enum odsi_err count_role(void *context, enum arch_role role, uint32_t layer)
{
    struct loader *self = context;
    struct arch_piece piece;
    uint32_t count = 0;
    while (arch_piece_at(self->source, role, layer, count, &piece))
        count++;
    self->fill_max += count;
    return ODSI_OK;
}

static int compare_fills(const void *a, const void *b)
{
    const struct fill *left = a;
    const struct fill *right = b;
    return (left->tensor > right->tensor) - (left->tensor < right->tensor);
}

static enum odsi_err visit_roles(struct loader *self,
                                 enum odsi_err (*visit)(void *context, enum arch_role role,
                                                        uint32_t layer))
{
    const struct model_span *span = self->span;
    return model_visit_roles(span->model, span->layer_first, span->layer_end, visit, self);
}

static enum odsi_err make_plan(struct loader *self)
{
    enum odsi_err err = visit_roles(self, count_role);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->fills, self->fill_max, sizeof *self->fills);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->tensors, self->fill_max, sizeof *self->tensors);
    if (err == ODSI_OK)
        err = visit_roles(self, plan_role);
    if (err != ODSI_OK)
        return err;
    qsort(self->fills, self->fill_count, sizeof *self->fills, compare_fills);
    for (uint32_t i = 0; i < self->fill_count; i++)
        if (i == 0 || self->fills[i].tensor != self->fills[i - 1].tensor)
            self->tensors[self->tensor_count++] = self->fills[i].tensor;
    return ODSI_OK;
}

/* ---- carrying it out ------------------------------------------------------------------------- */

void model_vector_read(float *out, const struct source_tensor *tensor, const uint8_t *bytes)
{
    const size_t count = (size_t)tensor->dims[0];
    for (size_t i = 0; i < count; i++) {
        uint16_t half;
        if (tensor->type == TENSOR_F32) {
            memcpy(&out[i], bytes + i * sizeof *out, sizeof *out);
            continue;
        }
        memcpy(&half, bytes + i * sizeof half, sizeof half);
        out[i] = tensor->type == TENSOR_F16 ? det_f32_from_f16(half) : det_f32_from_bf16(half);
    }
}

static enum odsi_err fill_vector(struct loader *self, const struct fill *fill, const uint8_t *data)
{
    struct backend *backend = self->span->backend;
    const size_t count = (size_t)fill->piece.tensor->dims[0];
    float *values = NULL;
    enum odsi_err err = alloc_aligned(&values, count, sizeof *values);
    if (err != ODSI_OK)
        return err;
    model_vector_read(values, fill->piece.tensor, data);
    for (size_t i = 0; fill->adds_one && i < count; i++)
        values[i] = 1.0f + values[i];
    err = backend->ops->upload(backend, fill->vector_dev, values, count * sizeof *values);
    alloc_free(values);
    return err;
}

/* Those of the rows [row_first, row_first + row_count) at data that the fill takes. */
static enum odsi_err fill_weight(struct loader *self, const struct fill *fill, uint64_t row_first,
                                 uint64_t row_count, const uint8_t *data)
{
    struct backend *backend = self->span->backend;
    const struct arch_piece *piece = &fill->piece;
    const uint64_t row_end = row_first + row_count;
    const uint64_t piece_end = piece->row_first + piece->row_count;
    const uint64_t first = row_first > piece->row_first ? row_first : piece->row_first;
    const uint64_t end = row_end < piece_end ? row_end : piece_end;
    if (first >= end)
        return ODSI_OK;
    const size_t row_size = quant_row_size(piece->tensor->type, (uint32_t)piece->tensor->dims[0]);
    return backend->ops->weight_fill(
        backend, fill->weight, (uint32_t)(piece->row_to + (first - piece->row_first)),
        data + (first - row_first) * row_size, (uint32_t)(end - first));
}

static enum odsi_err take_rows(void *context, uint32_t tensor, uint64_t row_first,
                               uint64_t row_count, const uint8_t *data)
{
    struct loader *self = context;
    uint32_t low = 0, high = self->fill_count;
    while (low < high) { /* the first fill of the tensor */
        const uint32_t middle = low + (high - low) / 2;
        if (self->fills[middle].tensor < tensor)
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < self->fill_count && self->fills[low].tensor == tensor; low++) {
        const struct fill *fill = &self->fills[low];
        const enum odsi_err err = fill->weight ? fill_weight(self, fill, row_first, row_count, data)
                                               : fill_vector(self, fill, data);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "tensor %s", fill->piece.tensor->name);
    }
    return ODSI_OK;
}

static enum odsi_err take_digest(void *context, uint32_t tensor, const struct digest *digest)
{
    const struct loader *self = context;
    return model_check_digest(self->span->model, tensor, digest);
}

enum odsi_err model_load_weights(struct model_span *span, struct parallel *threads,
                                 const struct model_progress *progress)
{
    struct loader loader = {.span = span, .source = span->model->source};
    struct backend *backend = span->backend;
    struct arch_piece piece;
    enum odsi_err err = make_plan(&loader);
    if (err == ODSI_OK) {
        const struct tensor_scan scan = {.source = loader.source,
                                         .tensors = loader.tensors,
                                         .tensor_count = loader.tensor_count,
                                         .context = &loader,
                                         .rows = take_rows,
                                         .digest = take_digest,
                                         .progress = progress->call,
                                         .progress_context = progress->context};
        err = tensor_scan_run(&scan, threads);
    }
    if (err == ODSI_OK)
        err = backend->ops->sync(backend);
    if (span->embed && span->layer_end == span->model->params.layer_count &&
        !arch_piece_at(loader.source, ARCH_OUTPUT, 0, 0, &piece))
        span->output = span->embed;
    alloc_free(loader.fills);
    alloc_free(loader.tensors);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s", span->model->path);
}
