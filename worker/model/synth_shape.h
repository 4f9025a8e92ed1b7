/* The shapes of synthetic models: small ones of every family for tests, real sizes for benchmarks.
 * Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_SYNTH_SHAPE_H
#define ODSI_WORKER_MODEL_SYNTH_SHAPE_H
#include <stdint.h>

/* Which tensors and keys a model has; its name in GGUF's general.architecture. */
enum synth_family {
    SYNTH_LLAMA = 0, /* with experts: Mixtral */
    SYNTH_QWEN2,     /* biases */
    SYNTH_QWEN3,     /* norms of q and k; with experts: its MoE */
    SYNTH_GEMMA2,    /* norms behind attention and feed-forward, soft caps, every second layer
                      * has a window */
    SYNTH_GEMMA3,    /* and norms of q and k; five of six layers have a window */
    SYNTH_PHI3,      /* q, k and v in one tensor, gate and up in another */
};

/* Made-up vocabularies in the form of a known one: same kind, same special tokens. */
enum synth_vocabulary {
    SYNTH_VOCABULARY_LLAMA2 = 0, /* SentencePiece */
    SYNTH_VOCABULARY_MISTRAL,
    SYNTH_VOCABULARY_GEMMA,
    SYNTH_VOCABULARY_PHI3,
    SYNTH_VOCABULARY_LLAMA3, /* byte-level BPE */
    SYNTH_VOCABULARY_QWEN,
};

/* Members that are 0 where a family has no such thing stay 0. */
struct synth_shape {
    const char *name; /* "llama-1.1b", "llama-tiny" */
    uint32_t dim, layer_count, head_count, kv_head_count, head_dim, ffn_dim, vocab_size;
    uint32_t context_length;
    float rms_eps, rope_base;
    enum synth_family family;
    enum synth_vocabulary vocabulary;
    uint32_t expert_count;      /* ffn_dim is that of an expert then */
    uint32_t expert_used_count; /* of each token */
    uint32_t window;            /* positions that a windowed layer looks at */
    int is_tied;                /* the embedding is the output matrix */
    float attention_softcap, logit_softcap;
    float rope_linear;             /* divides the frequencies; 0: nothing */
    float rope_factor;             /* the largest factor of the frequency tensor; 0: no tensor */
    uint32_t rope_original_length; /* context before that tensor stretches it (Phi-3) */
};

/* NULL when there is none of that name. */
const struct synth_shape *synth_shape_find(const char *name);
/* All of them, ended by a NULL name. */
const struct synth_shape *synth_shapes(void);
#endif
