#include "worker/model/arch_gguf.h"

#include "kernels/det.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define KEY_SIZE 96u

/* Bits of families, for the keys. */
enum { LLAMA = 1, QWEN2 = 2, QWEN3 = 4, QWEN3_MOE = 8, GEMMA2 = 16, GEMMA3 = 32, PHI3 = 64 };
#define GEMMAS   (GEMMA2 | GEMMA3)
#define MOES     (LLAMA | QWEN3_MOE)
#define WINDOWED (LLAMA | GEMMAS | PHI3)
#define ALL      (LLAMA | QWEN2 | QWEN3 | QWEN3_MOE | GEMMAS | PHI3)

static const struct family {
    const char *name; /* general.architecture, and the prefix of its keys */
    uint32_t bit;
    enum model_arch arch;
    enum rope_style rope_style;
    enum act_kind act;
    uint32_t features;
} families[] = {
    /* The files of llama have q and k reordered so that neighbours turn together. */
    {"llama", LLAMA, MODEL_ARCH_LLAMA, ROPE_PAIRS, ACT_SILU, 0},
    {"qwen2", QWEN2, MODEL_ARCH_QWEN2, ROPE_HALVES, ACT_SILU, MODEL_QKV_BIAS},
    {"qwen3", QWEN3, MODEL_ARCH_QWEN3, ROPE_HALVES, ACT_SILU, MODEL_QK_NORM},
    {"qwen3moe", QWEN3_MOE, MODEL_ARCH_QWEN3, ROPE_HALVES, ACT_SILU, MODEL_QK_NORM},
    /* The norms of Gemma's files have the 1 added already. */
    {"gemma2", GEMMA2, MODEL_ARCH_GEMMA2, ROPE_HALVES, ACT_GELU_TANH, MODEL_POST_NORMS},
    {"gemma3", GEMMA3, MODEL_ARCH_GEMMA3, ROPE_HALVES, ACT_GELU_TANH,
     MODEL_POST_NORMS | MODEL_QK_NORM},
    {"phi3", PHI3, MODEL_ARCH_PHI3, ROPE_HALVES, ACT_SILU, 0},
};

/* What to do about each metadata key of the architecture. One that is not in this table may change
 * what the model computes, and computing something else silently is worse than refusing. */
enum rule {
    RULE_READ,   /* read below */
    RULE_IGNORE, /* says nothing about the arithmetic of this build */
    RULE_ZERO,   /* a feature that is off when 0 */
    RULE_ONE,    /* a factor that changes nothing when 1 (or 0: not set) */
    RULE_TRUE,
    RULE_SCALING, /* the name of a scaling of the rotation */
};

static const struct {
    const char *key; /* behind "llama." */
    enum rule rule;
    uint32_t families; /* that the rule is of */
} rules[] = {
    {"vocab_size", RULE_READ, ALL},
    {"context_length", RULE_READ, ALL},
    {"embedding_length", RULE_READ, ALL},
    {"block_count", RULE_READ, ALL},
    {"feed_forward_length", RULE_READ, ALL},
    {"attention.head_count", RULE_READ, ALL},
    {"attention.head_count_kv", RULE_READ, ALL},
    {"attention.key_length", RULE_READ, ALL},
    {"attention.value_length", RULE_READ, ALL},
    {"attention.layer_norm_rms_epsilon", RULE_READ, ALL},
    {"attention.causal", RULE_TRUE, ALL},
    {"attention.sliding_window", RULE_READ, WINDOWED},
    {"attention.sliding_window", RULE_ZERO, ALL & ~WINDOWED},
    {"attention.sliding_window_pattern", RULE_READ, GEMMA3},
    {"attn_logit_softcapping", RULE_READ, GEMMA2},
    {"attn_logit_softcapping", RULE_ZERO, ALL & ~GEMMA2},
    {"final_logit_softcapping", RULE_READ, GEMMAS},
    {"final_logit_softcapping", RULE_ZERO, ALL & ~GEMMAS},
    {"expert_count", RULE_READ, MOES},
    {"expert_count", RULE_ZERO, ALL & ~MOES},
    {"expert_used_count", RULE_READ, MOES},
    {"expert_used_count", RULE_ZERO, ALL & ~MOES},
    {"expert_feed_forward_length", RULE_READ, QWEN3_MOE},
    {"expert_shared_count", RULE_ZERO, ALL},
    {"expert_weights_scale", RULE_ONE, ALL},
    {"expert_weights_norm", RULE_TRUE, ALL},
    {"rope.dimension_count", RULE_READ, ALL},
    {"rope.freq_base", RULE_READ, ALL},
    {"rope.freq_base_swa", RULE_READ, GEMMA3},
    {"rope.scaling.type", RULE_SCALING, ALL},
    {"rope.scaling.factor", RULE_READ, ALL},
    {"rope.scale_linear", RULE_READ, ALL},
    {"rope.scaling.attn_factor", RULE_READ, PHI3},
    {"rope.scaling.attn_factor", RULE_ONE, ALL & ~PHI3},
    {"rope.scaling.original_context_length", RULE_READ, PHI3},
    {"rope.scaling.original_context_length", RULE_IGNORE, ALL & ~PHI3},
    {"rope.scaling.finetuned", RULE_IGNORE, ALL},
    {"tensor_data_layout", RULE_IGNORE, ALL},
    {"embedding_scale", RULE_ONE, ALL},
    {"residual_scale", RULE_ONE, ALL},
    {"logit_scale", RULE_ONE, ALL},
};

/* A file and the family it is of. */
struct reading {
    const struct gguf *gguf;
    const struct family *family;
};

/* The whole key in static storage of the caller. */
static const char *key_of(const struct reading *self, const char *key, char out[KEY_SIZE])
{
    snprintf(out, KEY_SIZE, "%s.%s", self->family->name, key);
    return out;
}

/* ---- what is refused ------------------------------------------------------------------------- */

/* A number of whatever type; NaN when it is none. */
static float number_of(const struct gguf *gguf, const char *key)
{
    float value;
    uint32_t whole;
    if (gguf_get_f32(gguf, key, &value) == ODSI_OK)
        return value;
    return gguf_get_u32(gguf, key, &whole) == ODSI_OK ? (float)whole : __builtin_nanf("");
}

static int rule_holds(const struct reading *self, const char *key, enum rule rule)
{
    struct gguf_text text;
    int flag = 0;
    switch (rule) {
    case RULE_READ:
    case RULE_IGNORE:
        return 1;
    case RULE_ZERO:
        return number_of(self->gguf, key) == 0.0f;
    case RULE_ONE:
        return number_of(self->gguf, key) == 1.0f || number_of(self->gguf, key) == 0.0f;
    case RULE_TRUE:
        return gguf_get_bool(self->gguf, key, &flag) == ODSI_OK && flag;
    case RULE_SCALING:
        return gguf_get_text(self->gguf, key, &text) == ODSI_OK &&
               (gguf_text_is(text, "none") || gguf_text_is(text, "linear") ||
                (self->family->bit == PHI3 && gguf_text_is(text, "longrope")));
    }
    return 0;
}

static enum odsi_err check_key(const struct reading *self, struct gguf_text key)
{
    char whole[KEY_SIZE];
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
        if (!(rules[i].families & self->family->bit) ||
            !gguf_text_is(key, key_of(self, rules[i].key, whole)))
            continue;
        if (rule_holds(self, whole, rules[i].rule))
            return ODSI_OK;
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "%s has a value that is not supported", whole);
    }
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "%.*s is not known to this build and may change what the model computes",
                     (int)(key.size < 200 ? key.size : 200), key.data);
}

static enum odsi_err check_keys(const struct reading *self)
{
    char prefix[KEY_SIZE];
    (void)key_of(self, "", prefix);
    const size_t prefix_size = strlen(prefix);
    for (uint64_t i = 0;; i++) {
        const struct gguf_text key = gguf_key_at(self->gguf, i);
        if (!key.data)
            return ODSI_OK;
        if (key.size < prefix_size || memcmp(key.data, prefix, prefix_size) != 0)
            continue;
        const enum odsi_err err = check_key(self, key);
        if (err != ODSI_OK)
            return err;
    }
}

static enum odsi_err find_family(const struct gguf *gguf, const struct family **out)
{
    struct gguf_text text;
    enum odsi_err err = gguf_get_text(gguf, "general.architecture", &text);
    if (err != ODSI_OK)
        return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err;
    for (size_t i = 0; i < sizeof families / sizeof families[0]; i++)
        if (gguf_text_is(text, families[i].name)) {
            *out = &families[i];
            if (gguf_get_text(gguf, "general.type", &text) == ODSI_OK &&
                !gguf_text_is(text, "model"))
                return odsi_fail(ODSI_ERR_UNSUPPORTED,
                                 "general.type says that this is not a model");
            return ODSI_OK;
        }
    char shown[64];
    for (size_t i = 0; i < sizeof shown; i++) /* the file may hold anything */
        shown[i] = i >= text.size                              ? '\0'
                   : text.data[i] > ' ' && text.data[i] <= '~' ? text.data[i]
                                                               : '?';
    shown[sizeof shown - 1] = '\0';
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "general.architecture is \"%s\"; this build knows llama, qwen2, qwen3, "
                     "qwen3moe, gemma2, gemma3 and phi3",
                     shown);
}

/* ---- what is read ---------------------------------------------------------------------------- */

/* *out keeps its value when there is no such key. */
static enum odsi_err optional_u32(const struct reading *self, const char *key, uint32_t *out)
{
    char whole[KEY_SIZE];
    const enum odsi_err err = gguf_get_u32(self->gguf, key_of(self, key, whole), out);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

static enum odsi_err optional_f32(const struct reading *self, const char *key, float *out)
{
    char whole[KEY_SIZE];
    const enum odsi_err err = gguf_get_f32(self->gguf, key_of(self, key, whole), out);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

static enum odsi_err required_u32(const struct reading *self, const char *key, uint32_t *out)
{
    char whole[KEY_SIZE];
    const enum odsi_err err = gguf_get_u32(self->gguf, key_of(self, key, whole), out);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err; /* the sentence names the key */
}

static enum odsi_err required_f32(const struct reading *self, const char *key, float *out)
{
    char whole[KEY_SIZE];
    const enum odsi_err err = gguf_get_f32(self->gguf, key_of(self, key, whole), out);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err;
}

static enum odsi_err read_counts(const struct reading *self, struct model_params *out)
{
    enum odsi_err err = required_u32(self, "context_length", &out->context_length);
    if (err == ODSI_OK)
        err = required_u32(self, "embedding_length", &out->dim);
    if (err == ODSI_OK)
        err = required_u32(self, "block_count", &out->layer_count);
    if (err == ODSI_OK && self->family->bit != QWEN3_MOE) /* which has another key for it */
        err = required_u32(self, "feed_forward_length", &out->ffn_dim);
    if (err == ODSI_OK)
        err = required_u32(self, "attention.head_count", &out->head_count);
    if (err != ODSI_OK)
        return err;
    out->kv_head_count = out->head_count;
    err = optional_u32(self, "attention.head_count_kv", &out->kv_head_count);
    if (err == ODSI_OK)
        err = required_f32(self, "attention.layer_norm_rms_epsilon", &out->rms_eps);
    return err;
}

static enum odsi_err read_experts(const struct reading *self, struct model_params *out)
{
    enum odsi_err err = ODSI_OK;
    if (self->family->bit & MOES)
        err = optional_u32(self, "expert_count", &out->expert_count);
    if (err == ODSI_OK && (self->family->bit & MOES))
        err = optional_u32(self, "expert_used_count", &out->expert_used_count);
    if (err != ODSI_OK || self->family->bit != QWEN3_MOE)
        return err;
    if (out->expert_count == 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "qwen3moe.expert_count is missing or 0");
    return required_u32(self, "expert_feed_forward_length", &out->ffn_dim);
}

/* Three keys speak of the size of a head; what is there must fit together. */
static enum odsi_err read_head_dim(const struct reading *self, struct model_params *out)
{
    const char *name = self->family->name;
    if (out->head_count == 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "%s.attention.head_count is 0", name);
    out->head_dim = out->dim % out->head_count == 0 ? out->dim / out->head_count : 0;
    enum odsi_err err = optional_u32(self, "attention.key_length", &out->head_dim);
    uint32_t value_length = out->head_dim;
    out->rope_dim = out->head_dim;
    if (err == ODSI_OK)
        err = optional_u32(self, "attention.value_length", &value_length);
    if (err == ODSI_OK)
        err = optional_u32(self, "rope.dimension_count", &out->rope_dim);
    if (err != ODSI_OK)
        return err;
    if (out->head_dim == 0)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "%" PRIu32 " heads do not divide a dimension of %" PRIu32, out->head_count,
                         out->dim);
    if (value_length != out->head_dim)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "%s.attention.value_length %" PRIu32 " is not the key length %" PRIu32,
                         name, value_length, out->head_dim);
    /* Files of llama are reordered as if the whole head turned. */
    if (self->family->bit == LLAMA && out->rope_dim != out->head_dim)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "llama.rope.dimension_count %" PRIu32 " is not the whole head of %" PRIu32,
                         out->rope_dim, out->head_dim);
    return ODSI_OK;
}

/* Mistral and Phi-3 have the window in every layer, Gemma 2 in every other, Gemma 3 in five of
 * six. Gemma 2's files may leave its width out. */
static enum odsi_err read_window(const struct reading *self, struct model_params *out)
{
    enum odsi_err err = ODSI_OK;
    out->window = self->family->bit == GEMMA2 ? 4096 : 0;
    out->window_period = self->family->bit == GEMMA2 ? 2 : self->family->bit == GEMMA3 ? 6 : 0;
    if (self->family->bit & WINDOWED)
        err = optional_u32(self, "attention.sliding_window", &out->window);
    if (err == ODSI_OK && self->family->bit == GEMMA3)
        err = optional_u32(self, "attention.sliding_window_pattern", &out->window_period);
    if (err == ODSI_OK && out->window_period == 0 && self->family->bit == GEMMA3)
        err = odsi_fail(ODSI_ERR_CORRUPT, "gemma3.attention.sliding_window_pattern is 0");
    if (out->window == 0)
        out->window_period = 0; /* one way to say that there is none */
    return err;
}

/* The factor of a linear scaling; 0 and "none" mean 1. */
static enum odsi_err read_linear(const struct reading *self, struct model_params *out)
{
    struct gguf_text type = {.size = 0};
    char whole[KEY_SIZE];
    float factor = 0.0f;
    out->rope_linear = 1.0f;
    enum odsi_err err = gguf_get_text(self->gguf, key_of(self, "rope.scaling.type", whole), &type);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    const int is_linear = err == ODSI_ERR_NOT_FOUND || gguf_text_is(type, "linear");
    err = optional_f32(self, "rope.scale_linear", &factor); /* what old files called it */
    if (err == ODSI_OK)
        err = optional_f32(self, "rope.scaling.factor", &factor);
    if (err != ODSI_OK)
        return err;
    if (is_linear && factor != 0.0f)
        out->rope_linear = factor;
    if (out->window > 0 && out->window_period == 0 && out->rope_linear != 1.0f)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "%s: a linear scaling of the rotation together with a window in every "
                         "layer is not supported",
                         whole);
    return ODSI_OK;
}

static enum odsi_err read_rotation(const struct reading *self, struct model_params *out,
                                   struct arch_gguf_facts *facts)
{
    out->rope_base = 10000.0f; /* what files without the key mean */
    out->rope_amplitude = 1.0f;
    enum odsi_err err = optional_f32(self, "rope.freq_base", &out->rope_base);
    out->rope_base_windowed = self->family->bit == GEMMA3 ? 10000.0f : out->rope_base;
    if (err == ODSI_OK && self->family->bit == GEMMA3)
        err = optional_f32(self, "rope.freq_base_swa", &out->rope_base_windowed);
    if (err == ODSI_OK)
        err = read_linear(self, out);
    if (out->window == 0)
        out->rope_base_windowed = out->rope_base;
    if (err == ODSI_OK && self->family->bit == PHI3)
        err = optional_f32(self, "rope.scaling.attn_factor", &out->rope_amplitude);
    if (err == ODSI_OK && self->family->bit == PHI3)
        err = optional_u32(self, "rope.scaling.original_context_length",
                           &facts->original_context_length);
    return err;
}

/* Scales and caps of Gemma; what the others do is said first. */
static enum odsi_err read_scales(const struct reading *self, struct model_params *out)
{
    enum odsi_err err = ODSI_OK;
    uint32_t query_dim = out->head_dim;
    out->embed_scale = 1.0f;
    if (self->family->bit & GEMMAS) {
        out->embed_scale = det_sqrt((float)out->dim);
        /* The 27B models, which no key tells apart, scale by another size than the head's. */
        if (out->layer_count == (self->family->bit == GEMMA2 ? 46u : 62u))
            query_dim = out->dim / out->head_count;
        out->logit_softcap = self->family->bit == GEMMA2 ? 30.0f : 0.0f;
        err = optional_f32(self, "final_logit_softcapping", &out->logit_softcap);
    }
    if (err == ODSI_OK && self->family->bit == GEMMA2) {
        out->attention_softcap = 50.0f;
        err = optional_f32(self, "attn_logit_softcapping", &out->attention_softcap);
    }
    out->attention_scale = 1.0f / det_sqrt((float)query_dim);
    return err;
}

enum odsi_err arch_gguf_read(const struct gguf *gguf, struct model_params *out,
                             struct arch_gguf_facts *facts)
{
    struct reading reading = {.gguf = gguf};
    enum odsi_err err = find_family(gguf, &reading.family);
    if (err == ODSI_OK)
        err = check_keys(&reading);
    if (err != ODSI_OK)
        return err;
    *facts = (struct arch_gguf_facts){.vocab_size = 0};
    out->arch = reading.family->arch;
    out->act = reading.family->act;
    out->rope_style = reading.family->rope_style;
    out->features = reading.family->features;
    err = read_counts(&reading, out);
    if (err == ODSI_OK)
        err = read_experts(&reading, out);
    if (err == ODSI_OK)
        err = read_head_dim(&reading, out);
    if (err == ODSI_OK)
        err = read_window(&reading, out);
    if (err == ODSI_OK)
        err = read_rotation(&reading, out, facts);
    if (err == ODSI_OK)
        err = read_scales(&reading, out);
    if (err == ODSI_OK)
        err = optional_u32(&reading, "vocab_size", &facts->vocab_size);
    return err;
}
