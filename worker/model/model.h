/* A model: its hyper-parameters, its identity, and the weights of one span of layers on a backend.
 *
 * Two objects, because a gateway needs only the first and a worker opens the second for its own
 * layers: struct model describes the file; struct model_span holds weights. The span reads only
 * the pages of its own tensors. Layer numbers count from 0; a span is [layer_first, layer_end).
 *
 * Threads: one owner opens and closes; reading from any thread. */
#ifndef ODSI_WORKER_MODEL_MODEL_H
#define ODSI_WORKER_MODEL_MODEL_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "kernels/backend.h"

#include <stdint.h>

struct model;

enum model_arch { MODEL_ARCH_LLAMA = 1 };

struct model_params {
    enum model_arch arch;
    char name[128]; /* general.name, NUL-terminated, printable; file name without it */
    uint32_t dim;
    uint32_t layer_count;
    uint32_t head_count;
    uint32_t kv_head_count;
    uint32_t head_dim;
    uint32_t ffn_dim;
    uint32_t vocab_size;
    uint32_t context_length;
    float rms_eps;
    float rope_base;
    uint64_t weight_size; /* bytes of all tensors in the file */
};

/* Reads and checks the file's header; no weights. The model id (protocol.md, "Session") is the
 * SHA-256 over the manifest (worker/model/manifest.h), which hashes every tensor once; the
 * manifest is kept in cache_dir (NULL: not kept) so that a later start reads only its own layers.
 * progress may be NULL; it is called with done and total bytes while hashing.
 * Errors: those of gguf_open; ODSI_ERR_UNSUPPORTED (architecture, tensor type; named),
 * ODSI_ERR_CORRUPT (a tensor missing or of the wrong shape, a hyper-parameter out of limits). */
ODSI_MUST_USE enum odsi_err
model_open(struct model **out, const char *path, const char *cache_dir,
           void (*progress)(void *context, uint64_t done, uint64_t total), void *context);
void model_close(struct model **self);

const struct model_params *model_params_view(const struct model *self);
const struct digest *model_id_view(const struct model *self);
/* The canonical manifest bytes; valid until model_close. */
void model_manifest_view(const struct model *self, const uint8_t **data, size_t *size);
/* The tokenizer in its canonical bytes (worker/model/tokenizer.h reads them); valid until
 * model_close. A gateway gets them from a worker and checks their hash against the manifest. */
void model_tokenizer_view(const struct model *self, const uint8_t **data, size_t *size);

/* One transformer layer's weights; shapes [rows][cols] with cols the input. */
struct model_layer {
    float *attn_norm_dev;  /* [dim] */
    struct weight *wq;     /* [head_count * head_dim][dim] */
    struct weight *wk;     /* [kv_head_count * head_dim][dim] */
    struct weight *wv;     /* [kv_head_count * head_dim][dim] */
    struct weight *wo;     /* [dim][head_count * head_dim] */
    float *ffn_norm_dev;   /* [dim] */
    struct weight *w_gate; /* [ffn_dim][dim] */
    struct weight *w_up;   /* [ffn_dim][dim] */
    struct weight *w_down; /* [dim][ffn_dim] */
};

struct model_span {
    struct backend *backend;
    const struct model *model;
    uint32_t layer_first;
    uint32_t layer_end;
    struct weight *embed;       /* [vocab][dim]; only when layer_first is 0, else NULL */
    struct weight *output;      /* [vocab][dim]; only when layer_end is layer_count (may be the
                                * embedding's data when the file ties them), else NULL */
    float *output_norm_dev;     /* [dim]; as output */
    struct model_layer *layers; /* [layer_end - layer_first] */
    struct rope_table rope;
};

/* Loads the weights of [layer_first, layer_end) onto backend, checking each tensor's SHA-256
 * against the manifest. positions: how many positions the rotation tables cover (at most the
 * model's context_length). model and backend must outlive the span.
 * Errors: ODSI_ERR_RANGE (no such layers), ODSI_ERR_CORRUPT (bytes differ from the manifest),
 * ODSI_ERR_NO_MEMORY, and those of the backend. */
ODSI_MUST_USE enum odsi_err
model_span_open(struct model_span **out, const struct model *model, struct backend *backend,
                uint32_t layer_first, uint32_t layer_end, uint32_t positions,
                void (*progress)(void *context, uint64_t done, uint64_t total), void *context);
void model_span_close(struct model_span **self);
/* Bytes of weights that [layer_first, layer_end) has in the file, embedding and output included
 * where the span has them; for deciding how many layers fit. */
uint64_t model_span_weight_size(const struct model *model, uint32_t layer_first,
                                uint32_t layer_end);
#endif
