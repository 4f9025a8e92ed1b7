#include "worker/model/hf_config.h"

#include "kernels/det.h"
#include "kernels/ops.h"
#include "worker/model/hf_json.h"
#include "worker/model/hf_rope.h"

#include <stdio.h>
#include <string.h>

#define NO_WINDOW 0u

/* ---- the architectures ----------------------------------------------------------------------- */

struct facts {
    const char *architecture;
    enum hf_family family;
    enum model_arch arch;
    uint32_t features;
    uint32_t act; /* enum act_kind */
    int tied;     /* this and the following: what a missing member means */
    double rope_base;
    double rms_eps;
};

#define GEMMA_NORMS (MODEL_POST_NORMS | MODEL_NORM_PLUS_ONE)

static const struct facts families[] = {
    {"LlamaForCausalLM", HF_LLAMA, MODEL_ARCH_LLAMA, 0, ACT_SILU, 0, 1e4, 1e-6},
    {"MistralForCausalLM", HF_MISTRAL, MODEL_ARCH_LLAMA, 0, ACT_SILU, 0, 1e4, 1e-6},
    {"MixtralForCausalLM", HF_MIXTRAL, MODEL_ARCH_LLAMA, 0, ACT_SILU, 0, 1e6, 1e-5},
    {"Qwen2ForCausalLM", HF_QWEN2, MODEL_ARCH_QWEN2, MODEL_QKV_BIAS, ACT_SILU, 0, 1e4, 1e-6},
    {"Qwen3ForCausalLM", HF_QWEN3, MODEL_ARCH_QWEN3, MODEL_QK_NORM, ACT_SILU, 0, 1e4, 1e-6},
    {"Qwen3MoeForCausalLM", HF_QWEN3_MOE, MODEL_ARCH_QWEN3, MODEL_QK_NORM, ACT_SILU, 0, 1e4, 1e-6},
    {"Gemma2ForCausalLM", HF_GEMMA2, MODEL_ARCH_GEMMA2, GEMMA_NORMS, ACT_GELU_TANH, 1, 1e4, 1e-6},
    {"Gemma3ForCausalLM", HF_GEMMA3, MODEL_ARCH_GEMMA3, GEMMA_NORMS | MODEL_QK_NORM, ACT_GELU_TANH,
     1, 1e6, 1e-6},
    {"Gemma3ForConditionalGeneration", HF_GEMMA3, MODEL_ARCH_GEMMA3, GEMMA_NORMS | MODEL_QK_NORM,
     ACT_GELU_TANH, 1, 1e6, 1e-6},
    {"Phi3ForCausalLM", HF_PHI3, MODEL_ARCH_PHI3, 0, ACT_SILU, 0, 1e4, 1e-5},
};
#define FAMILY_COUNT (sizeof families / sizeof families[0])

static enum odsi_err refuse_architecture(const char *name)
{
    char known[ODSI_ERR_TEXT_SIZE] = "", shown[HF_JSON_SHOWN_SIZE];
    size_t used = 0;
    for (size_t i = 0; i < FAMILY_COUNT; i++)
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "",
                                 families[i].architecture);
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "the architecture %s is not known to this build, which knows %s",
                     hf_json_shown(shown, name), known);
}

/* NULL with the reason in fields->err. */
static const struct facts *find_facts(struct hf_json *fields)
{
    const json_t *names = hf_json_array_view(fields, "architectures");
    const char *name = json_string_value(json_array_get(names, 0));
    if (fields->err != ODSI_OK)
        return NULL;
    if (!name || json_array_size(names) != 1) {
        fields->err = odsi_fail(ODSI_ERR_CORRUPT, "architectures does not name one architecture");
        return NULL;
    }
    for (size_t i = 0; i < FAMILY_COUNT; i++)
        if (strcmp(name, families[i].architecture) == 0)
            return &families[i];
    fields->err = refuse_architecture(name);
    return NULL;
}

/* ---- which members are known ------------------------------------------------------------------
 */

enum rule {
    RULE_READ,   /* read below */
    RULE_IGNORE, /* the architecture's code does not compute with it when it infers */
    RULE_FALSE,  /* a feature that is off: false, 0, nothing in it */
    RULE_ONE,
};

#define WINDOWED  (HF_QWEN2 | HF_QWEN3 | HF_QWEN3_MOE)
#define GEMMA     (HF_GEMMA2 | HF_GEMMA3)
#define HF_VISION 1024u /* the outer object of a model that also sees */
#define EVERY     (HF_FAMILIES_ALL | HF_VISION)

/* null is fine for every member: it says what a missing one says, or is read below. */
static const struct {
    const char *key;
    unsigned families; /* whose it is; for others it is unknown */
    enum rule rule;
} rules[] = {
    {"architectures", EVERY, RULE_READ},
    {"vocab_size", HF_FAMILIES_ALL, RULE_READ},
    {"hidden_size", HF_FAMILIES_ALL, RULE_READ},
    {"intermediate_size", HF_FAMILIES_ALL, RULE_READ}, /* of Qwen3-MoE: of layers it has not */
    {"num_hidden_layers", HF_FAMILIES_ALL, RULE_READ},
    {"num_attention_heads", HF_FAMILIES_ALL, RULE_READ},
    {"num_key_value_heads", HF_FAMILIES_ALL, RULE_READ},
    {"head_dim", HF_FAMILIES_ALL, RULE_READ},
    {"max_position_embeddings", HF_FAMILIES_ALL, RULE_READ},
    {"rms_norm_eps", HF_FAMILIES_ALL, RULE_READ},
    {"rope_theta", HF_FAMILIES_ALL, RULE_READ},
    {"rope_scaling", HF_FAMILIES_ALL, RULE_READ},
    {"rope_parameters", HF_FAMILIES_ALL, RULE_READ},
    {"partial_rotary_factor", HF_FAMILIES_ALL, RULE_READ},
    {"tie_word_embeddings", EVERY, RULE_READ},
    {"hidden_act", HF_FAMILIES_ALL & ~GEMMA, RULE_READ},
    {"hidden_act", GEMMA, RULE_IGNORE}, /* left from Gemma 1; hidden_activation counts */
    {"hidden_activation", GEMMA, RULE_READ},
    {"sliding_window", HF_FAMILIES_ALL & ~HF_LLAMA, RULE_READ},
    {"layer_types", HF_FAMILIES_ALL, RULE_READ},
    {"sliding_window_size", HF_GEMMA2, RULE_IGNORE}, /* an older name that is not read */
    {"use_sliding_window", WINDOWED, RULE_READ},
    {"max_window_layers", WINDOWED, RULE_READ},
    {"sliding_window_pattern", HF_GEMMA3, RULE_READ},
    {"_sliding_window_pattern", HF_GEMMA3, RULE_READ},
    {"rope_local_base_freq", HF_GEMMA3, RULE_READ},
    {"query_pre_attn_scalar", GEMMA, RULE_READ},
    {"attn_logit_softcapping", GEMMA, RULE_READ},
    {"final_logit_softcapping", GEMMA, RULE_READ},
    {"original_max_position_embeddings", HF_PHI3, RULE_READ},
    {"num_local_experts", HF_MIXTRAL | HF_QWEN3_MOE, RULE_READ},
    {"num_experts", HF_QWEN3_MOE, RULE_READ},
    {"num_experts_per_tok", HF_MIXTRAL | HF_QWEN3_MOE, RULE_READ},
    {"moe_intermediate_size", HF_QWEN3_MOE, RULE_READ},
    {"norm_topk_prob", HF_QWEN3_MOE, RULE_READ},
    {"decoder_sparse_step", HF_QWEN3_MOE, RULE_ONE},
    {"mlp_only_layers", HF_QWEN3_MOE, RULE_FALSE},
    {"text_config", HF_VISION, RULE_READ},
    {"quantization_config", EVERY, RULE_READ},
    {"compression_config", EVERY, RULE_FALSE},

    {"attention_bias", HF_FAMILIES_ALL & ~HF_QWEN2, RULE_FALSE},
    {"attention_bias", HF_QWEN2, RULE_IGNORE}, /* q, k and v always have one */
    {"mlp_bias", HF_FAMILIES_ALL, RULE_FALSE},
    {"lm_head_bias", HF_PHI3, RULE_FALSE},
    {"rope_interleaved", HF_FAMILIES_ALL, RULE_FALSE},
    {"use_mrope", WINDOWED, RULE_FALSE},
    {"use_bidirectional_attention", HF_GEMMA3, RULE_FALSE},
    {"is_encoder_decoder", EVERY, RULE_FALSE},
    {"add_cross_attention", EVERY, RULE_FALSE},
    {"cross_attention_hidden_size", EVERY, RULE_FALSE},
    {"pruned_heads", EVERY, RULE_FALSE},
    {"full_attn_mod", HF_PHI3, RULE_ONE},
    {"interpolate_factor", HF_PHI3, RULE_ONE},

    {"model_type", EVERY, RULE_IGNORE},
    {"torch_dtype", EVERY, RULE_IGNORE},
    {"dtype", EVERY, RULE_IGNORE},
    {"transformers_version", EVERY, RULE_IGNORE},
    {"transformers.js_config", EVERY, RULE_IGNORE},
    {"auto_map", EVERY, RULE_IGNORE},
    {"tokenizer_class", EVERY, RULE_IGNORE},
    {"initializer_range", EVERY, RULE_IGNORE},
    {"use_cache", EVERY, RULE_IGNORE},
    {"cache_implementation", EVERY, RULE_IGNORE},
    {"keys_to_ignore_at_inference", EVERY, RULE_IGNORE},
    {"is_decoder", EVERY, RULE_IGNORE},
    {"is_llama_config", HF_LLAMA, RULE_IGNORE},
    {"max_sequence_length", HF_LLAMA, RULE_IGNORE}, /* of old tuned models */
    {"pretraining_tp", EVERY, RULE_IGNORE},         /* cuts products that give the same sums */
    {"chunk_size_feed_forward", EVERY, RULE_IGNORE},
    {"bos_token_id", EVERY, RULE_IGNORE}, /* tokens are the tokenizer's business */
    {"eos_token_id", EVERY, RULE_IGNORE},
    {"pad_token_id", EVERY, RULE_IGNORE},
    {"unk_token_id", EVERY, RULE_IGNORE},
    {"sep_token_id", EVERY, RULE_IGNORE},
    {"decoder_start_token_id", EVERY, RULE_IGNORE},
    {"forced_bos_token_id", EVERY, RULE_IGNORE},
    {"forced_eos_token_id", EVERY, RULE_IGNORE},
    {"attention_dropout", EVERY, RULE_IGNORE}, /* only when it is trained */
    {"hidden_dropout", EVERY, RULE_IGNORE},
    {"classifier_dropout", EVERY, RULE_IGNORE},
    {"embd_pdrop", EVERY, RULE_IGNORE},
    {"resid_pdrop", EVERY, RULE_IGNORE},
    {"output_router_logits", HF_MIXTRAL | HF_QWEN3_MOE, RULE_IGNORE},
    {"router_aux_loss_coef", HF_MIXTRAL | HF_QWEN3_MOE, RULE_IGNORE},
    {"router_jitter_noise", HF_MIXTRAL, RULE_IGNORE},
    {"gradient_checkpointing", EVERY, RULE_IGNORE},
    {"vision_config", HF_VISION, RULE_IGNORE},
    {"mm_tokens_per_image", HF_VISION, RULE_IGNORE},
    {"image_token_index", HF_VISION, RULE_IGNORE},
    {"image_token_id", HF_VISION, RULE_IGNORE},
    {"boi_token_index", HF_VISION, RULE_IGNORE},
    {"eoi_token_index", HF_VISION, RULE_IGNORE},

    {"return_dict", EVERY, RULE_IGNORE}, /* what a caller of the Python class gets back */
    {"return_dict_in_generate", EVERY, RULE_IGNORE},
    {"output_attentions", EVERY, RULE_IGNORE},
    {"output_hidden_states", EVERY, RULE_IGNORE},
    {"output_scores", EVERY, RULE_IGNORE},
    {"torchscript", EVERY, RULE_IGNORE},
    {"tf_legacy_loss", EVERY, RULE_IGNORE},
    {"use_bfloat16", EVERY, RULE_IGNORE},
    {"problem_type", EVERY, RULE_IGNORE},
    {"finetuning_task", EVERY, RULE_IGNORE},
    {"task_specific_params", EVERY, RULE_IGNORE},
    {"id2label", EVERY, RULE_IGNORE},
    {"label2id", EVERY, RULE_IGNORE},

    {"do_sample", EVERY, RULE_IGNORE}, /* how to generate: the request says that */
    {"max_length", EVERY, RULE_IGNORE},
    {"min_length", EVERY, RULE_IGNORE},
    {"early_stopping", EVERY, RULE_IGNORE},
    {"num_beams", EVERY, RULE_IGNORE},
    {"num_beam_groups", EVERY, RULE_IGNORE},
    {"num_return_sequences", EVERY, RULE_IGNORE},
    {"temperature", EVERY, RULE_IGNORE},
    {"top_k", EVERY, RULE_IGNORE},
    {"top_p", EVERY, RULE_IGNORE},
    {"typical_p", EVERY, RULE_IGNORE},
    {"prefix", EVERY, RULE_IGNORE},
    {"repetition_penalty", EVERY, RULE_IGNORE},
    {"length_penalty", EVERY, RULE_IGNORE},
    {"diversity_penalty", EVERY, RULE_IGNORE},
    {"exponential_decay_length_penalty", EVERY, RULE_IGNORE},
    {"no_repeat_ngram_size", EVERY, RULE_IGNORE},
    {"encoder_no_repeat_ngram_size", EVERY, RULE_IGNORE},
    {"bad_words_ids", EVERY, RULE_IGNORE},
    {"suppress_tokens", EVERY, RULE_IGNORE},
    {"begin_suppress_tokens", EVERY, RULE_IGNORE},
    {"remove_invalid_values", EVERY, RULE_IGNORE},
};

static int rule_holds(enum rule rule, const json_t *value)
{
    switch (rule) {
    case RULE_READ:
    case RULE_IGNORE:
        return 1;
    case RULE_FALSE:
        return json_is_false(value) || (json_is_number(value) && json_number_value(value) == 0.0) ||
               ((json_is_array(value) || json_is_object(value)) &&
                json_array_size(value) + json_object_size(value) == 0);
    case RULE_ONE:
        return json_is_number(value) && json_number_value(value) == 1.0;
    }
    return 0;
}

/* Names that only tools give: what begins with a line is what a Python object notes for itself. */
static int is_note(const char *key)
{
    return key[0] == '_' || strncmp(key, "unsloth_", 8) == 0;
}

static enum odsi_err check_member(const char *key, const json_t *value, unsigned family)
{
    char shown[HF_JSON_SHOWN_SIZE];
    for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
        if ((rules[i].families & family) == 0 || strcmp(key, rules[i].key) != 0)
            continue;
        if (json_is_null(value) || rule_holds(rules[i].rule, value))
            return ODSI_OK;
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "%s has a value that this build does not do", key);
    }
    if (json_is_null(value) || is_note(key))
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "%s is not known to this build and may change what the model computes",
                     hf_json_shown(shown, key));
}

static enum odsi_err check_members(struct hf_json *fields, unsigned family)
{
    json_t *object = (json_t *)fields->object;
    char shown[HF_JSON_SHOWN_SIZE];
    for (void *at = json_object_iter(object); at; at = json_object_iter_next(object, at)) {
        const enum odsi_err err =
            check_member(json_object_iter_key(at), json_object_iter_value(at), family);
        if (err != ODSI_OK)
            return err;
    }
    struct hf_json quantized = {.object = hf_json_object_view(fields, "quantization_config")};
    if (quantized.object)
        return odsi_fail(
            ODSI_ERR_UNSUPPORTED,
            "the weights are quantized (%s); this build takes F32, F16 and BF16, or a GGUF file",
            hf_json_shown(shown, hf_json_text_view(&quantized, "quant_method",
                                                   "quant_method not "
                                                   "given")));
    return fields->err;
}

/* ---- shape ----------------------------------------------------------------------------------- */

static enum odsi_err check_range(const char *what, uint32_t value, uint32_t max)
{
    if (value >= 1 && value <= max)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_CORRUPT, "%s is %u, not within 1 to %u", what, value, max);
}

/* What the rest of this file and of hf_rope.c computes with. */
static enum odsi_err check_shape(const struct model_params *p)
{
    const struct {
        const char *what;
        uint32_t value;
        uint32_t max;
    } ranges[] = {
        {"hidden_size", p->dim, LIMIT_DIM_MAX},
        {"num_hidden_layers", p->layer_count, LIMIT_LAYERS_MAX},
        {"num_attention_heads", p->head_count, LIMIT_HEADS_MAX},
        {"num_key_value_heads", p->kv_head_count, LIMIT_HEADS_MAX},
        {"head_dim", p->head_dim, LIMIT_HEAD_DIM_MAX},
        {"the size of the feed-forward block", p->ffn_dim, LIMIT_FFN_MAX},
        {"vocab_size", p->vocab_size, LIMIT_VOCAB_MAX},
        {"max_position_embeddings", p->context_length, LIMIT_CONTEXT_MAX},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        const enum odsi_err err = check_range(ranges[i].what, ranges[i].value, ranges[i].max);
        if (err != ODSI_OK)
            return err;
    }
    if (p->head_dim % 2 != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "a head of %u cannot be rotated in pairs", p->head_dim);
    return ODSI_OK;
}

static void read_heads(struct model_params *p, struct hf_json *fields, enum hf_family family)
{
    const int given = family != HF_GEMMA3;
    p->head_count = given ? hf_json_required_u32(fields, "num_attention_heads")
                          : hf_json_u32(fields, "num_attention_heads", 8);
    p->kv_head_count = given ? hf_json_u32(fields, "num_key_value_heads", p->head_count)
                             : hf_json_u32(fields, "num_key_value_heads", 4);
    /* Classes that do not default to as many as there are heads say another number: ask for it. */
    if (given && family != HF_LLAMA && family != HF_PHI3 &&
        !hf_json_has(fields, "num_key_value_heads"))
        (void)hf_json_required_u32(fields, "num_key_value_heads");
    const uint32_t even = p->head_count && p->dim % p->head_count == 0 ? p->dim / p->head_count : 0;
    const uint32_t by_class = family == HF_QWEN3                   ? 128
                              : (family & (HF_GEMMA2 | HF_GEMMA3)) ? 256
                                                                   : even;
    p->head_dim = hf_json_u32(fields, "head_dim", by_class);
}

static void read_experts(struct model_params *p, struct hf_json *fields, enum hf_family family)
{
    if (family == HF_QWEN3_MOE) {
        p->ffn_dim = hf_json_required_u32(fields, "moe_intermediate_size");
        p->expert_count = hf_json_u32(fields, "num_experts", 0);
        if (p->expert_count == 0)
            p->expert_count = hf_json_required_u32(fields, "num_local_experts");
        if (fields->err == ODSI_OK && !hf_json_bool(fields, "norm_topk_prob", 0))
            fields->err = odsi_fail(ODSI_ERR_UNSUPPORTED,
                                    "norm_topk_prob is not true: the weights of the experts are "
                                    "not made to add up to 1, which this build does");
    } else {
        p->expert_count = hf_json_required_u32(fields, "num_local_experts");
    }
    p->expert_used_count = hf_json_required_u32(fields, "num_experts_per_tok");
    if (fields->err == ODSI_OK)
        fields->err = check_range("the number of experts", p->expert_count, LIMIT_EXPERTS_MAX);
    if (fields->err == ODSI_OK)
        fields->err = check_range("num_experts_per_tok", p->expert_used_count, p->expert_count);
}

/* The text part of models that see leaves out what the class says by default. */
static enum odsi_err read_shape(struct hf_config *config, struct hf_json *fields,
                                const struct facts *facts)
{
    struct model_params *p = &config->params;
    const int gemma3 = facts->family == HF_GEMMA3;
    p->dim = hf_json_required_u32(fields, "hidden_size");
    p->ffn_dim = hf_json_required_u32(fields, "intermediate_size");
    p->layer_count = hf_json_required_u32(fields, "num_hidden_layers");
    p->vocab_size = gemma3 ? hf_json_u32(fields, "vocab_size", 262208)
                           : hf_json_required_u32(fields, "vocab_size");
    p->context_length = gemma3 ? hf_json_u32(fields, "max_position_embeddings", 131072)
                               : hf_json_required_u32(fields, "max_position_embeddings");
    read_heads(p, fields, facts->family);
    if (facts->family == HF_MIXTRAL || facts->family == HF_QWEN3_MOE)
        read_experts(p, fields, facts->family);
    p->rms_eps = (float)hf_json_f64(fields, "rms_norm_eps", facts->rms_eps);
    return fields->err != ODSI_OK ? fields->err : check_shape(p);
}

/* ---- activation and scales ------------------------------------------------------------------- */

static enum odsi_err read_act(struct hf_json *fields, const struct facts *facts)
{
    char shown[HF_JSON_SHOWN_SIZE];
    const int gelu = facts->act == ACT_GELU_TANH;
    const char *wanted = gelu ? "gelu_pytorch_tanh" : "silu";
    const char *key = gelu ? "hidden_activation" : "hidden_act";
    const char *name = hf_json_text_view(fields, key, wanted);
    if (fields->err != ODSI_OK)
        return fields->err;
    if (strcmp(name, wanted) == 0 || (!gelu && strcmp(name, "swish") == 0))
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_UNSUPPORTED, "%s is %s; this build does %s for this architecture",
                     key, hf_json_shown(shown, name), wanted);
}

/* null is no cap; a class may have one by default. */
static float read_cap(struct hf_json *fields, const char *key, double by_class)
{
    const double cap = hf_json_f64(fields, key, hf_json_has(fields, key) ? 0.0 : by_class);
    if (fields->err == ODSI_OK && !(cap >= 0.0 && cap <= 1e6))
        fields->err = odsi_fail(ODSI_ERR_CORRUPT, "%s is %g, not within 0 to 1e6", key, cap);
    return (float)cap;
}

static enum odsi_err read_scales(struct hf_config *config, struct hf_json *fields)
{
    struct model_params *p = &config->params;
    const int gemma2 = config->family == HF_GEMMA2;
    double scalar = (double)p->head_dim;
    p->embed_scale = 1.0f;
    if (config->family & (HF_GEMMA2 | HF_GEMMA3)) {
        scalar = hf_json_f64(fields, "query_pre_attn_scalar", 256.0);
        p->embed_scale = det_sqrt((float)p->dim);
        p->attention_softcap = read_cap(fields, "attn_logit_softcapping", gemma2 ? 50.0 : 0.0);
        p->logit_softcap = read_cap(fields, "final_logit_softcapping", gemma2 ? 30.0 : 0.0);
    }
    if (fields->err == ODSI_OK && !(scalar > 0.0 && scalar <= 1e9))
        fields->err = odsi_fail(ODSI_ERR_CORRUPT, "query_pre_attn_scalar is %g", scalar);
    p->attention_scale = 1.0f / det_sqrt((float)scalar);
    return fields->err;
}

/* ---- windows --------------------------------------------------------------------------------- */

/* The window that the layers of this family may have; NO_WINDOW: none has one. */
static uint32_t read_window(struct hf_json *fields, enum hf_family family)
{
    uint32_t by_class = NO_WINDOW;
    if (family == HF_MISTRAL || family == HF_GEMMA2 || family == HF_GEMMA3)
        by_class = 4096;
    if (family & WINDOWED) {
        if (!hf_json_bool(fields, "use_sliding_window", 0))
            return NO_WINDOW;
        by_class = 4096;
    }
    if (hf_json_has(fields, "sliding_window"))
        by_class = NO_WINDOW; /* what null says */
    const uint32_t window = hf_json_u32(fields, "sliding_window", by_class);
    if (fields->err == ODSI_OK && window == NO_WINDOW && (family & GEMMA))
        fields->err = odsi_fail(ODSI_ERR_CORRUPT, "sliding_window is null, but layers have one");
    return window;
}

/* Which layers have it by the family's rule; windowed: [layer_count]. */
static void mark_layers(const struct hf_config *config, struct hf_json *fields, uint8_t *windowed)
{
    const struct model_params *p = &config->params;
    uint32_t first = 0, period = 0;
    if (config->family == HF_QWEN2 || config->family == HF_QWEN3)
        first = hf_json_u32(fields, "max_window_layers", 28);
    if (config->family == HF_GEMMA2)
        period = 2;
    if (config->family == HF_GEMMA3) {
        period = hf_json_u32(fields, "_sliding_window_pattern", 6);
        period = hf_json_u32(fields, "sliding_window_pattern", period);
        if (fields->err == ODSI_OK)
            fields->err = check_range("sliding_window_pattern", period, LIMIT_LAYERS_MAX);
    }
    for (uint32_t i = 0; i < p->layer_count && fields->err == ODSI_OK; i++)
        windowed[i] =
            p->window != NO_WINDOW && i >= first && (period == 0 || (i + 1) % period != 0);
}

/* layer_types, where the file has it, counts instead of the rule in the families that read it and
 * says the same in the others. */
static enum odsi_err apply_layer_types(const struct hf_config *config, struct hf_json *fields,
                                       uint8_t *windowed)
{
    const struct model_params *p = &config->params;
    char shown[HF_JSON_SHOWN_SIZE];
    const json_t *types = hf_json_array_view(fields, "layer_types");
    const int counts = (config->family & (HF_QWEN2 | HF_QWEN3 | GEMMA)) != 0;
    if (!types)
        return fields->err;
    if (json_array_size(types) != p->layer_count)
        return odsi_fail(ODSI_ERR_CORRUPT, "layer_types has %zu entries for %u layers",
                         json_array_size(types), p->layer_count);
    for (uint32_t i = 0; i < p->layer_count; i++) {
        const char *type = json_string_value(json_array_get(types, i));
        const int slides = type && strcmp(type, "sliding_attention") == 0;
        if (!slides && (!type || strcmp(type, "full_attention") != 0))
            return odsi_fail(ODSI_ERR_UNSUPPORTED,
                             "layer %u is of type %s; this build does full_attention and "
                             "sliding_attention",
                             i, hf_json_shown(shown, type ? type : "(no text)"));
        if (slides && p->window == NO_WINDOW)
            return odsi_fail(ODSI_ERR_CORRUPT, "layer %u slides, but no window is set", i);
        if (!counts && slides != windowed[i])
            return odsi_fail(ODSI_ERR_UNSUPPORTED,
                             "layer_types says something of layer %u that this build does not do",
                             i);
        windowed[i] = (uint8_t)slides;
    }
    return ODSI_OK;
}

static int has_period(const uint8_t *windowed, uint32_t layer_count, uint32_t period)
{
    for (uint32_t i = 0; i < layer_count; i++)
        if (windowed[i] != (i % period != period - 1))
            return 0;
    return 1;
}

/* Says the same by window and window_period (model.h). */
static enum odsi_err fold_layers(struct model_params *p, const uint8_t *windowed)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < p->layer_count; i++)
        count += windowed[i];
    p->window_period = 0;
    if (count == 0)
        p->window = NO_WINDOW;
    if (count == 0 || count == p->layer_count)
        return ODSI_OK;
    for (uint32_t period = 2; period <= p->layer_count; period++)
        if (has_period(windowed, p->layer_count, period)) {
            p->window_period = period;
            return ODSI_OK;
        }
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "%u of %u layers have a window, in an order that this build does not do",
                     count, p->layer_count);
}

static enum odsi_err read_windows(struct hf_config *config, struct hf_json *fields)
{
    uint8_t windowed[LIMIT_LAYERS_MAX] = {0};
    struct model_params *p = &config->params;
    p->window = read_window(fields, config->family);
    mark_layers(config, fields, windowed);
    enum odsi_err err = fields->err;
    if (err == ODSI_OK)
        err = apply_layer_types(config, fields, windowed);
    if (err == ODSI_OK)
        err = fold_layers(p, windowed);
    /* A window that no text reaches is none. Gemma 3's also says how the layer's heads turn. */
    if (err == ODSI_OK && p->window >= p->context_length && config->family != HF_GEMMA3)
        p->window = p->window_period = 0;
    return err;
}

/* ---- the whole file -------------------------------------------------------------------------- */

static enum odsi_err read_config(struct hf_config *out, struct hf_json *fields,
                                 const struct facts *facts)
{
    out->params.arch = facts->arch;
    out->params.features = facts->features;
    out->params.act = facts->act;
    out->family = facts->family;
    out->tied = hf_json_bool(fields, "tie_word_embeddings", facts->tied);
    enum odsi_err err = check_members(fields, facts->family);
    if (err == ODSI_OK)
        err = read_shape(out, fields, facts);
    if (err == ODSI_OK)
        err = read_act(fields, facts);
    if (err == ODSI_OK)
        err = read_scales(out, fields);
    if (err == ODSI_OK)
        err = read_windows(out, fields);
    if (err == ODSI_OK)
        err = hf_rope_read(out, fields, facts->rope_base);
    return err;
}

/* The text model is described by an object of its own. */
static enum odsi_err read_vision_config(struct hf_config *out, struct hf_json *fields,
                                        const struct facts *facts)
{
    struct hf_json text = {.object = hf_json_object_view(fields, "text_config")};
    const int tied = hf_json_bool(fields, "tie_word_embeddings", facts->tied);
    enum odsi_err err = check_members(fields, HF_VISION);
    if (err != ODSI_OK)
        return err;
    if (!text.object)
        return odsi_fail(ODSI_ERR_CORRUPT, "text_config is missing");
    out->has_vision = 1;
    err = read_config(out, &text, facts);
    if (err == ODSI_OK && out->tied != tied)
        err = odsi_fail(ODSI_ERR_CORRUPT, "tie_word_embeddings is not what text_config says of it");
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "text_config");
}

static enum odsi_err read_root(struct hf_config *out, const json_t *root)
{
    struct hf_json fields = {.object = root};
    memset(out, 0, sizeof *out);
    const struct facts *facts = find_facts(&fields);
    if (!facts)
        return fields.err;
    if (strcmp(facts->architecture, "Gemma3ForConditionalGeneration") == 0)
        return read_vision_config(out, &fields, facts);
    return read_config(out, &fields, facts);
}

enum odsi_err hf_config_parse(struct hf_config *out, const void *text, size_t size)
{
    json_t *root = NULL;
    enum odsi_err err = hf_json_parse(&root, text, size);
    if (err == ODSI_OK)
        err = read_root(out, root);
    json_decref(root);
    return err;
}

enum odsi_err hf_config_load(struct hf_config *out, const char *folder)
{
    json_t *root = NULL;
    enum odsi_err err = hf_json_load(&root, folder, "config.json", HF_CONFIG_SIZE_MAX);
    if (err != ODSI_OK)
        return err;
    err = read_root(out, root);
    json_decref(root);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s/config.json", folder);
}
