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

/* Which family a model is of; what it computes is said by the other members alone. */
enum model_arch {
    MODEL_ARCH_LLAMA = 1, /* Llama 2/3, Mistral, SmolLM, Mixtral */
    MODEL_ARCH_QWEN2 = 2,
    MODEL_ARCH_QWEN3 = 3, /* and its MoE */
    MODEL_ARCH_GEMMA2 = 4,
    MODEL_ARCH_GEMMA3 = 5,
    MODEL_ARCH_PHI3 = 6,
};

/* Which optional tensors a layer has, and what is done to some. */
enum model_feature {
    MODEL_QKV_BIAS = 1,      /* added to q, k and v */
    MODEL_QK_NORM = 2,       /* RMSNorm over each head of q and k, before they turn */
    MODEL_POST_NORMS = 4,    /* RMSNorm of what attention and feed-forward add to the stream */
    MODEL_NORM_PLUS_ONE = 8, /* every norm's weight is 1 + what is in the file */
    MODEL_ROPE_FACTORS = 16, /* a tensor that divides the frequencies of the rotation */
};

struct model_params {
    enum model_arch arch;
    char name[128]; /* general.name, NUL-terminated, printable; file name without it */
    uint32_t dim;
    uint32_t layer_count;
    uint32_t head_count;
    uint32_t kv_head_count;
    uint32_t head_dim;
    uint32_t ffn_dim; /* of an expert, where there are some */
    uint32_t vocab_size;
    uint32_t context_length;
    uint32_t expert_count;      /* 0: a dense feed-forward block */
    uint32_t expert_used_count; /* of each token; 0 when dense */
    uint32_t features;          /* of enum model_feature */
    uint32_t act;               /* enum act_kind */
    uint32_t rope_style;        /* enum rope_style */
    uint32_t rope_dim;          /* dims of a head that turn, even */
    uint32_t window;            /* positions that a windowed layer looks at; 0: no layer has one */
    uint32_t window_period;     /* layer l looks at everything when l % period == period - 1; 0: all
                                 * layers have the window */
    float rms_eps;
    float rope_base;
    float rope_base_windowed; /* of windowed layers; equal to rope_base where nothing is said */
    float rope_linear;        /* divides the frequencies of layers without a window; 1: nothing */
    float rope_amplitude;     /* factor of cosine and sine; 1: nothing */
    float embed_scale;        /* factor of the embedding; 1: nothing */
    float attention_scale;    /* factor of the scores: 1 / sqrt(head_dim) unless the file differs */
    float attention_softcap;  /* 0: none */
    float logit_softcap;      /* 0: none */
    uint64_t weight_size;     /* bytes of all tensors in the file */
};

/* Whether layer has the window. */
static inline int model_layer_is_windowed(const struct model_params *params, uint32_t layer)
{
    return params->window > 0 && (params->window_period == 0 ||
                                  layer % params->window_period != params->window_period - 1);
}

/* Reads and checks the file's header; no weights. The model id (protocol.md, "Session") is the
 * SHA-256 over the manifest (worker/model/manifest.h), which hashes every tensor once; the
 * manifest is kept in cache_dir (NULL: not kept) so that a later start reads only its own layers.
 * progress may be NULL; it is called with done and total bytes while hashing, by one thread at a
 * time but not always the same.
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

/* One transformer layer: the one description that drives all families. What is NULL is left out.
 * Shapes [rows][cols] with cols the input; norms and biases are f32. */
struct model_layer {
    uint32_t window;               /* 0: looks at all positions */
    const struct rope_table *rope; /* of struct model_span */
    float *attn_norm_dev;          /* [dim] */
    struct weight *wq;             /* [head_count * head_dim][dim] */
    struct weight *wk;             /* [kv_head_count * head_dim][dim] */
    struct weight *wv;             /* [kv_head_count * head_dim][dim] */
    float *q_bias_dev;             /* [head_count * head_dim] or NULL */
    float *k_bias_dev;             /* [kv_head_count * head_dim] or NULL */
    float *v_bias_dev;             /* [kv_head_count * head_dim] or NULL */
    float *q_norm_dev;             /* [head_dim] or NULL */
    float *k_norm_dev;             /* [head_dim] or NULL */
    struct weight *wo;             /* [dim][head_count * head_dim] */
    float *attn_post_norm_dev;     /* [dim] or NULL */
    float *ffn_norm_dev;           /* [dim] */
    struct weight *w_router;       /* [expert_count][dim]; NULL: dense */
    struct weight *w_gate;         /* [ffn_dim][dim], as many matrices as there are experts */
    struct weight *w_up;           /* as w_gate */
    struct weight *w_down;         /* [dim][ffn_dim], as many matrices as there are experts */
    float *ffn_post_norm_dev;      /* [dim] or NULL */
};

struct model_span {
    struct backend *backend;
    const struct model *model;
    uint32_t layer_first;
    uint32_t layer_end;
    uint32_t position_count;         /* that the rotation tables cover */
    struct weight *embed;            /* [vocab][dim]; only when layer_first is 0, else NULL */
    struct weight *output;           /* [vocab][dim]; only when layer_end is layer_count (may be the
                                 * embedding's data when the file ties them), else NULL */
    float *output_norm_dev;          /* [dim]; as output */
    struct model_layer *layers;      /* [layer_end - layer_first] */
    struct rope_table rope;          /* of layers that look at everything */
    struct rope_table rope_windowed; /* of layers with a window */
};

/* Loads the weights of [layer_first, layer_end) onto backend, checking each tensor's SHA-256
 * against the manifest, with as many threads as the backend has. positions: how many positions the
 * rotation tables cover (at most the model's context_length). progress as in model_open. model and
 * backend must outlive the span.
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
