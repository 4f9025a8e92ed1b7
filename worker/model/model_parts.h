/* The inside of struct model and the parts of loading a span, shared by model.c, model_span.c,
 * model_load.c and model_rope.c. */
#ifndef ODSI_WORKER_MODEL_MODEL_PARTS_H
#define ODSI_WORKER_MODEL_MODEL_PARTS_H
#include "common/base/buf.h"
#include "worker/model/arch.h"
#include "worker/model/manifest.h"
#include "worker/model/model.h"
#include "worker/model/parallel.h"
#include "worker/model/source.h"

struct model {
    struct model_params params; /* those of source, with weight_size and a name */
    struct digest id;
    struct source *source;
    char *path;
    struct buf manifest;
    struct buf cache_path;           /* empty: the manifest is not kept */
    struct manifest_digest *digests; /* [source->tensor_count] */
};

struct model_progress {
    void (*call)(void *context, uint64_t done, uint64_t total); /* may be NULL */
    void *context;
};

/* Whether the model has these layers. */
int model_has_layers(const struct model *model, uint32_t layer_first, uint32_t layer_end);

/* Calls visit for each role of the span with each layer that it is of (0 for those outside of
 * layers), each once: the embedding as the output only where it is not there anyway. Ends early,
 * with its answer, when visit does not return ODSI_OK. */
ODSI_MUST_USE enum odsi_err
model_visit_roles(const struct model *model, uint32_t layer_first, uint32_t layer_end,
                  enum odsi_err (*visit)(void *context, enum arch_role role, uint32_t layer),
                  void *context);

/* Opens and fills the span's weights and vectors; what was opened before an error is in the span.
 * Errors: those of model_span_open. */
ODSI_MUST_USE enum odsi_err model_load_weights(struct model_span *span, struct parallel *threads,
                                               const struct model_progress *progress);
/* Makes the span's rotation tables, those that its layers use, and sets the layers' rope and
 * window; likewise. */
ODSI_MUST_USE enum odsi_err model_rope_make(struct model_span *span, struct parallel *threads);
void model_rope_free(struct model_span *span);

/* The whole of a vector of a source as f32: floats of any of the three types. out: [dims[0]].
 * bytes: tensor->size of them. */
void model_vector_read(float *out, const struct source_tensor *tensor, const uint8_t *bytes);
/* Whether the bytes of a tensor are those of the manifest. Errors: ODSI_ERR_CORRUPT. */
ODSI_MUST_USE enum odsi_err model_check_digest(const struct model *model, uint32_t tensor,
                                               const struct digest *digest);
#endif
