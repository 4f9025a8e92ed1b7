#include "worker/model/arch.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/limits.h"
#include "kernels/det.h"
#include "kernels/quant.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define FEATURES_ALL                                                                               \
    (MODEL_QKV_BIAS | MODEL_QK_NORM | MODEL_POST_NORMS | MODEL_NORM_PLUS_ONE | MODEL_ROPE_FACTORS)
#define FACTOR_MAX 1e6f /* of scalings: far from what any model has and from overflow */

const char *arch_name(const struct model_params *params)
{
    switch (params->arch) {
    case MODEL_ARCH_LLAMA:
        return "llama";
    case MODEL_ARCH_QWEN2:
        return "qwen2";
    case MODEL_ARCH_QWEN3:
        return params->expert_count ? "qwen3moe" : "qwen3";
    case MODEL_ARCH_GEMMA2:
        return "gemma2";
    case MODEL_ARCH_GEMMA3:
        return "gemma3";
    case MODEL_ARCH_PHI3:
        return "phi3";
    }
    return "unknown";
}

/* ---- hyper-parameters ----------------------------------------------------------------------- */

struct number {
    const char *what;
    uint32_t value;
    uint32_t min;
    uint32_t max;
};

static enum odsi_err check_numbers(const struct number *numbers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (numbers[i].value < numbers[i].min || numbers[i].value > numbers[i].max)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "the model's %s is %" PRIu32 ", not within %" PRIu32 " to %" PRIu32,
                             numbers[i].what, numbers[i].value, numbers[i].min, numbers[i].max);
    return ODSI_OK;
}

static enum odsi_err check_counts(const struct model_params *p)
{
    const struct number numbers[] = {
        {"architecture", (uint32_t)p->arch, MODEL_ARCH_LLAMA, MODEL_ARCH_PHI3},
        {"dimension", p->dim, 1, LIMIT_DIM_MAX},
        {"number of layers", p->layer_count, 1, LIMIT_LAYERS_MAX},
        {"number of heads", p->head_count, 1, LIMIT_HEADS_MAX},
        {"number of key-value heads", p->kv_head_count, 1, LIMIT_HEADS_MAX},
        {"head size", p->head_dim, 2, LIMIT_HEAD_DIM_MAX},
        {"feed-forward dimension", p->ffn_dim, 1, LIMIT_FFN_MAX},
        {"vocabulary", p->vocab_size, 1, LIMIT_VOCAB_MAX},
        {"context length", p->context_length, 1, LIMIT_CONTEXT_MAX},
        {"number of experts", p->expert_count, 0, LIMIT_EXPERTS_MAX},
        {"number of experts used", p->expert_used_count, p->expert_count ? 1 : 0,
         p->expert_count < LIMIT_EXPERTS_USED_MAX ? p->expert_count : LIMIT_EXPERTS_USED_MAX},
        {"set of features", p->features, 0, FEATURES_ALL},
        {"activation", p->act, ACT_SILU, ACT_GELU_TANH},
        {"rotation style", p->rope_style, ROPE_PAIRS, ROPE_HALVES},
        {"number of rotated dimensions", p->rope_dim, 2, p->head_dim},
        {"attention window", p->window, 0, LIMIT_CONTEXT_MAX},
        {"period of windowed layers", p->window_period, 0, LIMIT_LAYERS_MAX},
    };
    return check_numbers(numbers, sizeof numbers / sizeof numbers[0]);
}

static enum odsi_err check_fit(const struct model_params *p)
{
    if (p->rope_dim % 2 != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "%" PRIu32 " dimensions cannot be rotated in pairs",
                         p->rope_dim);
    if (p->head_count * p->head_dim > LIMIT_DIM_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "%" PRIu32 " heads of %" PRIu32 " are more than %u",
                         p->head_count, p->head_dim, LIMIT_DIM_MAX);
    if (p->head_count % p->kv_head_count != 0)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "%" PRIu32 " heads cannot share %" PRIu32 " key-value heads evenly",
                         p->head_count, p->kv_head_count);
    return ODSI_OK;
}

/* The comparisons are such that a NaN fails. */
static enum odsi_err check_factors(const struct model_params *p)
{
    const float tiny = 1.0f / FACTOR_MAX;
    const struct {
        const char *what;
        float value;
        float min;
        float max;
    } factors[] = {
        {"norm's epsilon", p->rms_eps, 1e-30f, 1.0f},
        {"rotation base", p->rope_base, 1.0f, 1e12f},
        {"rotation base of windowed layers", p->rope_base_windowed, 1.0f, 1e12f},
        {"rotation's linear factor", p->rope_linear, 1.0f, FACTOR_MAX},
        {"rotation's amplitude", p->rope_amplitude, tiny, FACTOR_MAX},
        {"factor of the embedding", p->embed_scale, tiny, FACTOR_MAX},
        {"factor of the attention scores", p->attention_scale, tiny, FACTOR_MAX},
        {"softcap of the attention scores", p->attention_softcap, 0.0f, FACTOR_MAX},
        {"softcap of the logits", p->logit_softcap, 0.0f, FACTOR_MAX},
    };
    for (size_t i = 0; i < sizeof factors / sizeof factors[0]; i++)
        if (!(factors[i].value >= factors[i].min && factors[i].value <= factors[i].max))
            return odsi_fail(ODSI_ERR_CORRUPT, "the model's %s is %g, not within %g to %g",
                             factors[i].what, (double)factors[i].value, (double)factors[i].min,
                             (double)factors[i].max);
    /* A cap so small that x / cap overflows would turn ordinary scores into errors. */
    if ((p->attention_softcap > 0.0f && p->attention_softcap < tiny) ||
        (p->logit_softcap > 0.0f && p->logit_softcap < tiny))
        return odsi_fail(ODSI_ERR_CORRUPT, "the model's softcap is almost 0");
    return ODSI_OK;
}

enum odsi_err arch_check(const struct model_params *params)
{
    enum odsi_err err = check_counts(params);
    if (err == ODSI_OK)
        err = check_fit(params);
    if (err == ODSI_OK)
        err = check_factors(params);
    return err;
}

/* ---- roles ---------------------------------------------------------------------------------- */

static const struct role {
    const char *stem; /* of the tensor's name */
    const char *kind;
    uint32_t features; /* that models with the role have; 0: all */
} roles[ARCH_ROLE_COUNT] = {
    [ARCH_EMBED] = {"token_embd", "weight", 0},
    [ARCH_OUTPUT_NORM] = {"output_norm", "weight", 0},
    [ARCH_OUTPUT] = {"output", "weight", 0},
    [ARCH_ROPE_FACTORS] = {"rope_freqs", "weight", MODEL_ROPE_FACTORS},
    [ARCH_ATTN_NORM] = {"attn_norm", "weight", 0},
    [ARCH_Q] = {"attn_q", "weight", 0},
    [ARCH_K] = {"attn_k", "weight", 0},
    [ARCH_V] = {"attn_v", "weight", 0},
    [ARCH_Q_BIAS] = {"attn_q", "bias", MODEL_QKV_BIAS},
    [ARCH_K_BIAS] = {"attn_k", "bias", MODEL_QKV_BIAS},
    [ARCH_V_BIAS] = {"attn_v", "bias", MODEL_QKV_BIAS},
    [ARCH_Q_NORM] = {"attn_q_norm", "weight", MODEL_QK_NORM},
    [ARCH_K_NORM] = {"attn_k_norm", "weight", MODEL_QK_NORM},
    [ARCH_O] = {"attn_output", "weight", 0},
    [ARCH_ATTN_POST_NORM] = {"post_attention_norm", "weight", MODEL_POST_NORMS},
    [ARCH_FFN_NORM] = {"ffn_norm", "weight", 0},
    [ARCH_ROUTER] = {"ffn_gate_inp", "weight", 0},
    [ARCH_GATE] = {"ffn_gate", "weight", 0},
    [ARCH_UP] = {"ffn_up", "weight", 0},
    [ARCH_DOWN] = {"ffn_down", "weight", 0},
    [ARCH_FFN_POST_NORM] = {"post_ffw_norm", "weight", MODEL_POST_NORMS},
};

static int is_expert_role(const struct model_params *p, enum arch_role role)
{
    return p->expert_count > 0 && (role == ARCH_GATE || role == ARCH_UP || role == ARCH_DOWN);
}

static void set_shape(const struct model_params *p, enum arch_role role, struct arch_tensor *out)
{
    const uint32_t q_dim = p->head_count * p->head_dim;
    const uint32_t kv_dim = p->kv_head_count * p->head_dim;
    /* rows 0: a vector */
    const uint32_t shapes[ARCH_ROLE_COUNT][2] = {
        [ARCH_EMBED] = {p->vocab_size, p->dim},
        [ARCH_OUTPUT_NORM] = {0, p->dim},
        [ARCH_OUTPUT] = {p->vocab_size, p->dim},
        [ARCH_ROPE_FACTORS] = {0, p->rope_dim / 2},
        [ARCH_ATTN_NORM] = {0, p->dim},
        [ARCH_Q] = {q_dim, p->dim},
        [ARCH_K] = {kv_dim, p->dim},
        [ARCH_V] = {kv_dim, p->dim},
        [ARCH_Q_BIAS] = {0, q_dim},
        [ARCH_K_BIAS] = {0, kv_dim},
        [ARCH_V_BIAS] = {0, kv_dim},
        [ARCH_Q_NORM] = {0, p->head_dim},
        [ARCH_K_NORM] = {0, p->head_dim},
        [ARCH_O] = {p->dim, q_dim},
        [ARCH_ATTN_POST_NORM] = {0, p->dim},
        [ARCH_FFN_NORM] = {0, p->dim},
        [ARCH_ROUTER] = {p->expert_count, p->dim},
        [ARCH_GATE] = {p->ffn_dim, p->dim},
        [ARCH_UP] = {p->ffn_dim, p->dim},
        [ARCH_DOWN] = {p->dim, p->ffn_dim},
        [ARCH_FFN_POST_NORM] = {0, p->dim},
    };
    out->is_vector = shapes[role][0] == 0;
    out->rows = out->is_vector ? 1 : shapes[role][0];
    out->cols = shapes[role][1];
    out->matrix_count = is_expert_role(p, role) ? p->expert_count : 1;
}

int arch_tensor_of(const struct model_params *params, enum arch_role role, uint32_t layer,
                   struct arch_tensor *out)
{
    if ((roles[role].features & params->features) != roles[role].features ||
        (role == ARCH_ROUTER && params->expert_count == 0))
        return 0;
    set_shape(params, role, out);
    const char *experts = out->matrix_count > 1 || is_expert_role(params, role) ? "_exps" : "";
    if (role < ARCH_ROLE_LAYER_FIRST)
        snprintf(out->name, sizeof out->name, "%s.%s", roles[role].stem, roles[role].kind);
    else
        snprintf(out->name, sizeof out->name, "blk.%" PRIu32 ".%s%s.%s", layer, roles[role].stem,
                 experts, roles[role].kind);
    return 1;
}

/* ---- pieces --------------------------------------------------------------------------------- */

const struct source_tensor *arch_find(const struct source *source, const char *name)
{
    uint32_t low = 0, high = source->tensor_count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        const int order = strcmp(name, source->tensors[middle].name);
        if (order == 0)
            return &source->tensors[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}

/* A tensor that a file should have, and which of its rows a role takes. */
struct want {
    char name[64];
    uint32_t dim_count;
    uint64_t dims[4];
    struct arch_piece piece;
};

static const struct source_tensor *find_in_layer(const struct source *source, uint32_t layer,
                                                 const char *stem, struct want *out)
{
    snprintf(out->name, sizeof out->name, "blk.%" PRIu32 ".%s.weight", layer, stem);
    return arch_find(source, out->name);
}

/* Whether the layer has a tensor for one of these roles alone. A tensor of several roles is only
 * taken where none of them has its own, so that all of its rows are used. */
static int has_own(const struct source *source, uint32_t layer, const enum arch_role *role,
                   size_t count)
{
    struct want unused;
    for (size_t i = 0; i < count; i++)
        if (find_in_layer(source, layer, roles[role[i]].stem, &unused))
            return 1;
    return 0;
}

/* q, k and v one behind another. */
static int want_of_qkv(const struct source *source, enum arch_role role, uint32_t layer,
                       struct want *out)
{
    static const enum arch_role parts[] = {ARCH_Q, ARCH_K, ARCH_V};
    const struct model_params *p = &source->params;
    const uint64_t q_dim = p->head_count * p->head_dim;
    const uint64_t kv_dim = p->kv_head_count * p->head_dim;
    struct want fused = *out;
    fused.piece.tensor = find_in_layer(source, layer, "attn_qkv", &fused);
    if (!fused.piece.tensor || has_own(source, layer, parts, 3))
        return 0;
    fused.dims[1] = q_dim + 2 * kv_dim;
    fused.piece.row_first = role == ARCH_Q ? 0 : role == ARCH_K ? q_dim : q_dim + kv_dim;
    *out = fused;
    return 1;
}

/* The gate and, behind it, up: ffn_up of twice the rows, as llama.cpp writes phi3. */
static int want_of_gate_up(const struct source *source, enum arch_role role, uint32_t layer,
                           struct want *out)
{
    static const enum arch_role gate = ARCH_GATE;
    const uint32_t ffn_dim = source->params.ffn_dim;
    struct want fused = *out;
    fused.piece.tensor = find_in_layer(source, layer, "ffn_up", &fused);
    if (!fused.piece.tensor || fused.piece.tensor->dims[1] != 2 * (uint64_t)ffn_dim ||
        has_own(source, layer, &gate, 1))
        return 0;
    fused.dims[1] = 2 * (uint64_t)ffn_dim;
    fused.piece.row_first = role == ARCH_GATE ? 0 : ffn_dim;
    *out = fused;
    return 1;
}

/* The tensor of one expert, where each has its own. */
static int want_expert(const struct source *source, enum arch_role role, uint32_t layer,
                       uint32_t expert, struct want *out)
{
    struct want own = *out;
    snprintf(own.name, sizeof own.name, "blk.%" PRIu32 ".%s.%" PRIu32 ".weight", layer,
             roles[role].stem, expert);
    own.piece.tensor = arch_find(source, own.name);
    if (!own.piece.tensor && expert == 0)
        return 0; /* then none has, and what is missing is the tensor of all */
    own.dim_count = 2;
    own.dims[2] = 1;
    own.piece.row_count = own.dims[1];
    own.piece.row_to = expert * own.dims[1];
    *out = own;
    return 1;
}

/* The index-th tensor of a role. Returns 0 behind the last one; piece.tensor is NULL when the
 * source does not have it. */
static int want_at(const struct source *source, enum arch_role role, uint32_t layer, uint32_t index,
                   struct want *out)
{
    struct arch_tensor plain;
    memset(out, 0, sizeof *out);
    if (!arch_tensor_of(&source->params, role, layer, &plain))
        return 0;
    const int has_experts = is_expert_role(&source->params, role);
    memcpy(out->name, plain.name, sizeof out->name);
    out->dim_count = plain.is_vector ? 1 : has_experts ? 3 : 2;
    out->dims[0] = plain.cols;
    out->dims[1] = plain.rows;
    out->dims[2] = plain.matrix_count;
    out->dims[3] = 1;
    out->piece.tensor = arch_find(source, plain.name);
    out->piece.row_count = (uint64_t)plain.rows * plain.matrix_count;
    if (!out->piece.tensor && has_experts && index < plain.matrix_count)
        return want_expert(source, role, layer, index, out) || index == 0;
    if (index > 0)
        return 0;
    if (role == ARCH_Q || role == ARCH_K || role == ARCH_V)
        (void)want_of_qkv(source, role, layer, out);
    if (!has_experts && (role == ARCH_GATE || role == ARCH_UP))
        (void)want_of_gate_up(source, role, layer, out);
    return 1;
}

int arch_piece_at(const struct source *source, enum arch_role role, uint32_t layer, uint32_t index,
                  struct arch_piece *out)
{
    struct want want;
    if (!want_at(source, role, layer, index, &want) || !want.piece.tensor)
        return 0;
    *out = want.piece;
    return 1;
}

/* ---- checking a source ---------------------------------------------------------------------- */

static enum odsi_err check_shape(const struct source_tensor *tensor, const struct want *want)
{
    if (tensor->dim_count == want->dim_count &&
        memcmp(tensor->dims, want->dims, sizeof want->dims) == 0)
        return ODSI_OK;
    if (want->dim_count == 3 || tensor->dim_count > 2)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tensor %s is [%" PRIu64 "][%" PRIu64 "][%" PRIu64 "], not [%" PRIu64
                         "][%" PRIu64 "][%" PRIu64 "]",
                         want->name, tensor->dims[2], tensor->dims[1], tensor->dims[0],
                         want->dims[2], want->dims[1], want->dims[0]);
    return odsi_fail(ODSI_ERR_CORRUPT,
                     "tensor %s is [%" PRIu64 "][%" PRIu64 "], not [%" PRIu64 "][%" PRIu64 "]",
                     want->name, tensor->dims[1], tensor->dims[0], want->dims[1], want->dims[0]);
}

static enum odsi_err check_type(const struct source_tensor *tensor, const struct want *want)
{
    if (!quant_is_known(tensor->type))
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tensor %s has a type that this build does not take",
                         want->name);
    if (want->dim_count > 1 || !quant_is_quantized(tensor->type))
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "tensor %s is %s; this build takes f32, f16 and bf16 for a vector", want->name,
                     quant_name(tensor->type));
}

/* Checks the tensors of one role and marks them as known. */
static enum odsi_err check_role(const struct source *source, enum arch_role role, uint32_t layer,
                                uint8_t *known)
{
    struct want want;
    const struct source_tensor *first = NULL;
    for (uint32_t index = 0; want_at(source, role, layer, index, &want); index++) {
        const struct source_tensor *tensor = want.piece.tensor;
        if (!tensor && role == ARCH_OUTPUT)
            return ODSI_OK;
        if (!tensor)
            return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s is missing", want.name);
        known[tensor - source->tensors] = 1;
        enum odsi_err err = check_shape(tensor, &want);
        if (err == ODSI_OK)
            err = check_type(tensor, &want);
        if (err != ODSI_OK)
            return err;
        if (first && tensor->type != first->type)
            return odsi_fail(ODSI_ERR_UNSUPPORTED,
                             "tensors %s and %s are %s and %s; the experts of a layer must have "
                             "one type",
                             first->name, tensor->name, quant_name(first->type),
                             quant_name(tensor->type));
        first = tensor;
    }
    return ODSI_OK;
}

/* A bias or a frequency table left out silently would give other answers than the model's. */
static enum odsi_err refuse_unknown(const struct source *source, const uint8_t *known)
{
    for (uint32_t i = 0; i < source->tensor_count; i++)
        if (!known[i])
            return odsi_fail(ODSI_ERR_UNSUPPORTED,
                             "tensor %s is not part of a %s model as this build knows it",
                             source->tensors[i].name, arch_name(&source->params));
    return ODSI_OK;
}

enum odsi_err arch_check_tensors(const struct source *source)
{
    uint8_t *known = NULL;
    enum odsi_err err = alloc_zeroed(&known, source->tensor_count, 1);
    if (err != ODSI_OK)
        return err;
    for (uint32_t role = 0; role < ARCH_ROLE_COUNT && err == ODSI_OK; role++) {
        const uint32_t layers = role < ARCH_ROLE_LAYER_FIRST ? 1 : source->params.layer_count;
        for (uint32_t layer = 0; layer < layers && err == ODSI_OK; layer++)
            err = check_role(source, (enum arch_role)role, layer, known);
    }
    if (err == ODSI_OK)
        err = refuse_unknown(source, known);
    alloc_free(known);
    return err;
}
