/* The rotation tables of a span: one for layers that look at everything and one for those with a
 * window, where these turn otherwise. */
#include "kernels/rope_table.h"

#include "common/base/alloc.h"
#include "worker/model/model_parts.h"

#include <string.h>

#define CHUNK_POSITIONS 512u /* that one job makes */

/* One table in the making. */
struct making {
    struct model_span *span;
    const double *frequency; /* [half_dim] */
    float *staging;          /* [thread][2][CHUNK_POSITIONS][half_dim] */
    float *cos_dev;
    float *sin_dev;
    uint32_t half_dim;
    double amplitude;
};

/* ---- the factors of the file ----------------------------------------------------------------- */

static enum odsi_err check_factors(const struct source_tensor *tensor, const float *factors)
{
    for (uint64_t i = 0; i < tensor->dims[0]; i++)
        if (!(factors[i] >= 1.0f && factors[i] <= 1e12f)) /* a NaN fails */
            return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s has the factor %g, not within 1 to 1e12",
                             tensor->name, (double)factors[i]);
    return ODSI_OK;
}

/* The factors that divide the frequencies, checked against the manifest; *out is NULL when the
 * model has none. The caller frees them. */
static enum odsi_err read_factors(const struct model *model, float **out)
{
    struct arch_piece piece;
    struct digest digest;
    uint8_t *bytes = NULL;
    *out = NULL;
    if (!arch_piece_at(model->source, ARCH_ROPE_FACTORS, 0, 0, &piece))
        return ODSI_OK;
    const struct source_tensor *tensor = piece.tensor;
    enum odsi_err err = alloc_zeroed(&bytes, (size_t)tensor->size, 1);
    if (err == ODSI_OK)
        err = alloc_zeroed(out, (size_t)tensor->dims[0], sizeof **out);
    if (err == ODSI_OK)
        err = source_read(model->source, tensor, 0, bytes, (size_t)tensor->size);
    if (err == ODSI_OK) {
        digest_of(&digest, bytes, (size_t)tensor->size);
        err = model_check_digest(model, (uint32_t)(tensor - model->source->tensors), &digest);
    }
    if (err == ODSI_OK) {
        model_vector_read(*out, tensor, bytes);
        err = check_factors(tensor, *out);
    }
    alloc_free(bytes);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s", model->path);
}

/* ---- one table ------------------------------------------------------------------------------- */

static enum odsi_err fill_chunk(void *context, uint32_t index, uint32_t thread)
{
    const struct making *self = context;
    struct backend *backend = self->span->backend;
    const uint32_t first = index * CHUNK_POSITIONS;
    const uint32_t left = self->span->position_count - first;
    const uint32_t count = left < CHUNK_POSITIONS ? left : CHUNK_POSITIONS;
    const size_t stride = (size_t)CHUNK_POSITIONS * self->half_dim;
    const size_t size = (size_t)count * self->half_dim * sizeof(float);
    float *cos_part = self->staging + 2 * stride * thread;
    float *sin_part = cos_part + stride;
    rope_table_fill_from(cos_part, sin_part, first, count, self->half_dim, self->frequency,
                         self->amplitude);
    const size_t at = (size_t)first * self->half_dim;
    enum odsi_err err = backend->ops->upload(backend, self->cos_dev + at, cos_part, size);
    if (err == ODSI_OK)
        err = backend->ops->upload(backend, self->sin_dev + at, sin_part, size);
    return err;
}

static enum odsi_err take_memory(struct making *self, struct rope_table *out)
{
    struct backend *backend = self->span->backend;
    const size_t size = (size_t)self->span->position_count * self->half_dim * sizeof(float);
    void *cos_dev = NULL;
    void *sin_dev = NULL;
    enum odsi_err err = backend->ops->mem_alloc(backend, &cos_dev, size);
    self->cos_dev = cos_dev;
    out->cos_dev = cos_dev;
    if (err == ODSI_OK)
        err = backend->ops->mem_alloc(backend, &sin_dev, size);
    self->sin_dev = sin_dev;
    out->sin_dev = sin_dev;
    return err;
}

static enum odsi_err make_table(struct model_span *span, struct parallel *threads,
                                struct rope_table *out, const float *factors, int is_windowed)
{
    const struct model_params *p = &span->model->params;
    struct making making = {
        .span = span, .half_dim = p->rope_dim / 2, .amplitude = (double)p->rope_amplitude};
    const size_t lane = 2 * (size_t)CHUNK_POSITIONS * making.half_dim;
    double *frequency = NULL;
    enum odsi_err err = alloc_zeroed(&frequency, making.half_dim, sizeof *frequency);
    if (err == ODSI_OK)
        err = alloc_aligned(&making.staging, parallel_thread_count(threads) * lane,
                            sizeof *making.staging);
    if (err == ODSI_OK)
        err = take_memory(&making, out);
    if (err == ODSI_OK) {
        rope_table_frequencies(frequency, making.half_dim,
                               (double)(is_windowed ? p->rope_base_windowed : p->rope_base),
                               is_windowed ? 1.0 : (double)p->rope_linear, factors);
        making.frequency = frequency;
        out->position_count = span->position_count;
        out->half_dim = making.half_dim;
        out->style = (enum rope_style)p->rope_style;
        err = parallel_run(threads, fill_chunk, &making,
                           (span->position_count + CHUNK_POSITIONS - 1) / CHUNK_POSITIONS);
    }
    if (err == ODSI_OK)
        err = span->backend->ops->sync(span->backend);
    alloc_free(making.staging);
    alloc_free(frequency);
    return err;
}

/* ---- the span -------------------------------------------------------------------------------- */

enum odsi_err model_rope_make(struct model_span *span, struct parallel *threads)
{
    const struct model_params *p = &span->model->params;
    const int differs = p->rope_base_windowed != p->rope_base || p->rope_linear != 1.0f;
    int needs_windowed = 0;
    int needs_other = 0;
    float *factors = NULL;
    for (uint32_t i = 0; i < span->layer_end - span->layer_first; i++) {
        struct model_layer *layer = &span->layers[i];
        const int is_windowed = model_layer_is_windowed(p, span->layer_first + i);
        layer->window = is_windowed ? p->window : 0;
        layer->rope = is_windowed && differs ? &span->rope_windowed : &span->rope;
        needs_windowed |= is_windowed && differs;
        needs_other |= !(is_windowed && differs);
    }
    enum odsi_err err = read_factors(span->model, &factors);
    if (err == ODSI_OK && needs_other)
        err = make_table(span, threads, &span->rope, factors, 0);
    if (err == ODSI_OK && needs_windowed)
        err = make_table(span, threads, &span->rope_windowed, factors, 1);
    alloc_free(factors);
    return err;
}

static void free_table(struct backend *backend, const struct rope_table *table)
{
    const float *const parts[] = {table->cos_dev, table->sin_dev};
    for (size_t i = 0; i < 2; i++)
        if (parts[i])
            backend->ops->mem_free(backend, (void *)(uintptr_t)parts[i]); /* ours, and not const */
}

void model_rope_free(struct model_span *span)
{
    free_table(span->backend, &span->rope);
    free_table(span->backend, &span->rope_windowed);
}
