#include "worker/model/arch.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "kernels/det.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define PREFIX "llama."

/* What to do about each metadata key of the architecture. One that is not in this table may change
 * what the model computes, and computing something else silently is worse than refusing. */
enum rule {
    RULE_NUMBER, /* read below */
    RULE_IGNORE, /* says nothing about the arithmetic of this build */
    RULE_ZERO,   /* a feature that is off when 0 */
    RULE_ONE,    /* a factor that changes nothing when 1 (or 0: not set) */
    RULE_TRUE,
    RULE_SCALING, /* the name of a scaling: none, or linear, whose factor must be 1 */
};

static const struct {
    const char *key;
    enum rule rule;
} rules[] = {
    {PREFIX "vocab_size", RULE_NUMBER},
    {PREFIX "context_length", RULE_NUMBER},
    {PREFIX "embedding_length", RULE_NUMBER},
    {PREFIX "block_count", RULE_NUMBER},
    {PREFIX "feed_forward_length", RULE_NUMBER},
    {PREFIX "attention.head_count", RULE_NUMBER},
    {PREFIX "attention.head_count_kv", RULE_NUMBER},
    {PREFIX "attention.key_length", RULE_NUMBER},
    {PREFIX "attention.value_length", RULE_NUMBER},
    {PREFIX "attention.layer_norm_rms_epsilon", RULE_NUMBER},
    {PREFIX "rope.dimension_count", RULE_NUMBER},
    {PREFIX "rope.freq_base", RULE_NUMBER},
    {PREFIX "rope.scaling.original_context_length", RULE_IGNORE},
    {PREFIX "rope.scaling.finetuned", RULE_IGNORE},
    {PREFIX "tensor_data_layout", RULE_IGNORE},
    {PREFIX "attention.causal", RULE_TRUE},
    {PREFIX "attention.sliding_window", RULE_ZERO},
    {PREFIX "expert_count", RULE_ZERO},
    {PREFIX "expert_used_count", RULE_ZERO},
    {PREFIX "rope.scaling.type", RULE_SCALING},
    {PREFIX "rope.scaling.factor", RULE_ONE},
    {PREFIX "rope.scaling.attn_factor", RULE_ONE},
    {PREFIX "rope.scale_linear", RULE_ONE},
    {PREFIX "embedding_scale", RULE_ONE},
    {PREFIX "residual_scale", RULE_ONE},
    {PREFIX "logit_scale", RULE_ONE},
};

/* A number of whatever type; NaN when it is none. */
static float number_of(const struct gguf *gguf, const char *key)
{
    float value;
    uint32_t whole;
    if (gguf_get_f32(gguf, key, &value) == ODSI_OK)
        return value;
    if (gguf_get_u32(gguf, key, &whole) == ODSI_OK)
        return (float)whole;
    return __builtin_nanf("");
}

static int rule_holds(const struct gguf *gguf, const char *key, enum rule rule)
{
    struct gguf_text text;
    int flag;
    switch (rule) {
    case RULE_NUMBER:
    case RULE_IGNORE:
        return 1;
    case RULE_ZERO:
        return number_of(gguf, key) == 0.0f;
    case RULE_ONE:
        return number_of(gguf, key) == 1.0f || number_of(gguf, key) == 0.0f;
    case RULE_TRUE:
        return gguf_get_bool(gguf, key, &flag) == ODSI_OK && flag;
    case RULE_SCALING:
        return gguf_get_text(gguf, key, &text) == ODSI_OK &&
               (gguf_text_is(text, "none") || gguf_text_is(text, "linear"));
    }
    return 0;
}

static enum odsi_err check_key(const struct gguf *gguf, struct gguf_text key)
{
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++)
        if (gguf_text_is(key, rules[i].key)) {
            if (rule_holds(gguf, rules[i].key, rules[i].rule))
                return ODSI_OK;
            return odsi_fail(ODSI_ERR_UNSUPPORTED, "%s has a value that is not supported",
                             rules[i].key);
        }
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "%.*s is not known to this build and may change what the model computes",
                     (int)key.size, key.data);
}

static enum odsi_err check_keys(const struct gguf *gguf)
{
    struct gguf_text text;
    uint32_t parts;
    enum odsi_err err = gguf_get_text(gguf, "general.architecture", &text);
    if (err != ODSI_OK)
        return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err;
    if (!gguf_text_is(text, "llama"))
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "general.architecture is not \"llama\", the one that is supported");
    if (gguf_get_text(gguf, "general.type", &text) == ODSI_OK && !gguf_text_is(text, "model"))
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "general.type says that this is not a model");
    if (gguf_get_u32(gguf, "split.count", &parts) == ODSI_OK && parts > 1)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the model is split over %" PRIu32 " files; merge them first", parts);
    for (uint64_t i = 0;; i++) {
        const struct gguf_text key = gguf_key_at(gguf, i);
        if (!key.data)
            return ODSI_OK;
        if (key.size < sizeof PREFIX - 1 || memcmp(key.data, PREFIX, sizeof PREFIX - 1) != 0)
            continue;
        err = check_key(gguf, key);
        if (err != ODSI_OK)
            return err;
    }
}

static enum odsi_err required_u32(const struct gguf *gguf, const char *key, uint32_t *out)
{
    const enum odsi_err err = gguf_get_u32(gguf, key, out);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err; /* the sentence names the key */
}

/* *out keeps its value when there is no such key. */
static enum odsi_err optional_u32(const struct gguf *gguf, const char *key, uint32_t *out)
{
    const enum odsi_err err = gguf_get_u32(gguf, key, out);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

static enum odsi_err read_counts(const struct gguf *gguf, struct model_params *out)
{
    enum odsi_err err = required_u32(gguf, PREFIX "context_length", &out->context_length);
    if (err == ODSI_OK)
        err = required_u32(gguf, PREFIX "embedding_length", &out->dim);
    if (err == ODSI_OK)
        err = required_u32(gguf, PREFIX "block_count", &out->layer_count);
    if (err == ODSI_OK)
        err = required_u32(gguf, PREFIX "feed_forward_length", &out->ffn_dim);
    if (err == ODSI_OK)
        err = required_u32(gguf, PREFIX "attention.head_count", &out->head_count);
    if (err != ODSI_OK)
        return err;
    out->kv_head_count = out->head_count;
    return optional_u32(gguf, PREFIX "attention.head_count_kv", &out->kv_head_count);
}

/* Three keys speak of the size of a head; all that are there must agree. */
static enum odsi_err read_head_dim(const struct gguf *gguf, struct model_params *out)
{
    if (out->head_count == 0)
        return odsi_fail(ODSI_ERR_CORRUPT, PREFIX "attention.head_count is 0");
    out->head_dim = out->dim / out->head_count;
    const uint32_t from_dim = out->dim % out->head_count == 0 ? out->head_dim : 0;
    enum odsi_err err = optional_u32(gguf, PREFIX "attention.key_length", &out->head_dim);
    uint32_t value_length = out->head_dim;
    uint32_t rotated = out->head_dim;
    if (err == ODSI_OK)
        err = optional_u32(gguf, PREFIX "attention.value_length", &value_length);
    if (err == ODSI_OK)
        err = optional_u32(gguf, PREFIX "rope.dimension_count", &rotated);
    if (err != ODSI_OK)
        return err;
    uint32_t stated;
    if (from_dim == 0 && gguf_get_u32(gguf, PREFIX "attention.key_length", &stated) != ODSI_OK)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "%" PRIu32 " heads do not divide a dimension of %" PRIu32, out->head_count,
                         out->dim);
    if (value_length != out->head_dim)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         PREFIX "attention.value_length %" PRIu32 " is not the key length %" PRIu32,
                         value_length, out->head_dim);
    if (rotated != out->head_dim)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         PREFIX "rope.dimension_count %" PRIu32
                                " is not the whole head of %" PRIu32,
                         rotated, out->head_dim);
    return ODSI_OK;
}

enum odsi_err arch_read(const struct gguf *gguf, struct model_params *out)
{
    enum odsi_err err = check_keys(gguf);
    if (err != ODSI_OK)
        return err;
    out->arch = MODEL_ARCH_LLAMA;
    err = read_counts(gguf, out);
    if (err == ODSI_OK)
        err = read_head_dim(gguf, out);
    if (err != ODSI_OK)
        return err;
    err = gguf_get_f32(gguf, PREFIX "attention.layer_norm_rms_epsilon", &out->rms_eps);
    if (err != ODSI_OK)
        return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err;
    out->rope_base = 10000.0f; /* what llama files without the key mean */
    err = gguf_get_f32(gguf, PREFIX "rope.freq_base", &out->rope_base);
    out->act = ACT_SILU;
    out->rope_style = ROPE_PAIRS;
    out->rope_dim = out->head_dim;
    out->rope_base_windowed = out->rope_base;
    out->rope_linear = out->rope_amplitude = out->embed_scale = 1.0f;
    out->attention_scale = 1.0f / det_sqrt((float)out->head_dim);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

static enum odsi_err check_range(const char *what, uint32_t value, uint32_t max)
{
    if (value >= 1 && value <= max)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_CORRUPT, "the model's %s is %" PRIu32 ", not within 1 to %" PRIu32,
                     what, value, max);
}

enum odsi_err arch_check(const struct model_params *params)
{
    const struct {
        const char *what;
        uint32_t value;
        uint32_t max;
    } ranges[] = {
        {"dimension", params->dim, LIMIT_DIM_MAX},
        {"number of layers", params->layer_count, LIMIT_LAYERS_MAX},
        {"number of heads", params->head_count, LIMIT_HEADS_MAX},
        {"number of key-value heads", params->kv_head_count, LIMIT_HEADS_MAX},
        {"head size", params->head_dim, LIMIT_HEAD_DIM_MAX},
        {"feed-forward dimension", params->ffn_dim, LIMIT_FFN_MAX},
        {"vocabulary", params->vocab_size, LIMIT_VOCAB_MAX},
        {"context length", params->context_length, LIMIT_CONTEXT_MAX},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        const enum odsi_err err = check_range(ranges[i].what, ranges[i].value, ranges[i].max);
        if (err != ODSI_OK)
            return err;
    }
    if (params->arch != MODEL_ARCH_LLAMA)
        return odsi_fail(ODSI_ERR_CORRUPT, "architecture %d does not exist", (int)params->arch);
    if (params->head_dim % 2 != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "a head of %" PRIu32 " cannot be rotated in pairs",
                         params->head_dim);
    if (params->head_count * params->head_dim > LIMIT_DIM_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "%" PRIu32 " heads of %" PRIu32 " are more than %u",
                         params->head_count, params->head_dim, LIMIT_DIM_MAX);
    if (params->head_count % params->kv_head_count != 0)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "%" PRIu32 " heads cannot share %" PRIu32 " key-value heads evenly",
                         params->head_count, params->kv_head_count);
    if (!(params->rms_eps > 0.0f && params->rms_eps <= 1.0f))
        return odsi_fail(ODSI_ERR_CORRUPT, "the norm's epsilon is %g, not within 0 to 1",
                         (double)params->rms_eps);
    if (!(params->rope_base >= 1.0f && params->rope_base <= 1e12f))
        return odsi_fail(ODSI_ERR_CORRUPT, "the rotation base is %g, not within 1 to 1e12",
                         (double)params->rope_base);
    return ODSI_OK;
}

void arch_tensor_of(const struct model_params *params, enum arch_role role, uint32_t layer,
                    struct arch_tensor *out)
{
    static const char *const stems[ARCH_ROLE_COUNT] = {
        "token_embd", "output_norm", "output",   "attn_norm", "attn_q", "attn_k",
        "attn_v",     "attn_output", "ffn_norm", "ffn_gate",  "ffn_up", "ffn_down",
    };
    const uint32_t q_dim = params->head_count * params->head_dim;
    const uint32_t kv_dim = params->kv_head_count * params->head_dim;
    const uint32_t shapes[ARCH_ROLE_COUNT][2] = {
        [ARCH_EMBED] = {params->vocab_size, params->dim},
        [ARCH_OUTPUT_NORM] = {1, params->dim},
        [ARCH_OUTPUT] = {params->vocab_size, params->dim},
        [ARCH_ATTN_NORM] = {1, params->dim},
        [ARCH_Q] = {q_dim, params->dim},
        [ARCH_K] = {kv_dim, params->dim},
        [ARCH_V] = {kv_dim, params->dim},
        [ARCH_O] = {params->dim, q_dim},
        [ARCH_FFN_NORM] = {1, params->dim},
        [ARCH_GATE] = {params->ffn_dim, params->dim},
        [ARCH_UP] = {params->ffn_dim, params->dim},
        [ARCH_DOWN] = {params->dim, params->ffn_dim},
    };
    out->rows = shapes[role][0];
    out->cols = shapes[role][1];
    out->is_norm = role == ARCH_OUTPUT_NORM || role == ARCH_ATTN_NORM || role == ARCH_FFN_NORM;
    if (role < ARCH_ROLE_LAYER_FIRST)
        snprintf(out->name, sizeof out->name, "%s.weight", stems[role]);
    else
        snprintf(out->name, sizeof out->name, "blk.%" PRIu32 ".%s.weight", layer, stems[role]);
}

static enum odsi_err check_tensor(const struct gguf_tensor *tensor, const struct arch_tensor *want)
{
    const uint32_t dim_count = want->is_norm ? 1 : 2;
    if (tensor->dim_count != dim_count || tensor->dims[0] != want->cols ||
        tensor->dims[1] != want->rows)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tensor %s is [%" PRIu64 "][%" PRIu64 "], not [%" PRIu32 "][%" PRIu32 "]",
                         want->name, tensor->dims[1], tensor->dims[0], want->rows, want->cols);
    if (want->is_norm ? tensor->ggml_type == TENSOR_F32
                      : tensor->ggml_type == TENSOR_F32 || tensor->ggml_type == TENSOR_F16 ||
                            tensor->ggml_type == TENSOR_Q8_0)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_UNSUPPORTED, "tensor %s is %s; this build takes %s", want->name,
                     gguf_type_name(tensor->ggml_type),
                     want->is_norm ? "F32 for a norm" : "F32, F16 and Q8_0");
}

/* Checks the tensor of this role and marks it as known. */
static enum odsi_err find_tensor(const struct gguf *gguf, const struct model_params *params,
                                 enum arch_role role, uint32_t layer, uint8_t *known)
{
    struct arch_tensor want;
    arch_tensor_of(params, role, layer, &want);
    const struct gguf_tensor *tensor = gguf_tensor_find(gguf, want.name);
    if (tensor) {
        known[tensor - gguf_tensor_at(gguf, 0)] = 1;
        return check_tensor(tensor, &want);
    }
    if (role == ARCH_OUTPUT)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s is missing", want.name);
}

/* A bias or a frequency table left out silently would give other answers than the model's. */
static enum odsi_err refuse_unknown(const struct gguf *gguf, const uint8_t *known)
{
    for (uint64_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_text name = gguf_tensor_at(gguf, i)->name;
        if (!known[i])
            return odsi_fail(ODSI_ERR_UNSUPPORTED,
                             "tensor %.*s is not part of a llama model as this build knows it",
                             (int)name.size, name.data);
    }
    return ODSI_OK;
}

enum odsi_err arch_check_tensors(const struct gguf *gguf, const struct model_params *params)
{
    uint8_t *known = NULL;
    enum odsi_err err = alloc_zeroed(&known, gguf_tensor_count(gguf), 1);
    if (err != ODSI_OK)
        return err;
    for (uint32_t role = 0; role < ARCH_ROLE_COUNT && err == ODSI_OK; role++) {
        const uint32_t layers = role < ARCH_ROLE_LAYER_FIRST ? 1 : params->layer_count;
        for (uint32_t layer = 0; layer < layers && err == ODSI_OK; layer++)
            err = find_tensor(gguf, params, (enum arch_role)role, layer, known);
    }
    if (err == ODSI_OK)
        err = refuse_unknown(gguf, known);
    alloc_free(known);
    return err;
}
