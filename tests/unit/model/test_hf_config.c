#include "tests/unit/model/model_fixture.h"
#include "worker/model/hf_config.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define VECTORS "tests/vectors/hf/"

static void read_vector(const char *name, struct buf *out)
{
    char path[128];
    snprintf(path, sizeof path, VECTORS "%s.json", name);
    buf_init(out, HF_CONFIG_SIZE_MAX);
    fixture_read(path, out);
}

static void parse(struct hf_config *out, const char *name)
{
    struct buf text;
    read_vector(name, &text);
    cr_assert_eq(hf_config_parse(out, text.data, text.size), ODSI_OK, "%s: %s", name,
                 odsi_err_text());
    buf_free(&text);
}

/* ---- the families ---------------------------------------------------------------------------- */

static const struct {
    const char *name;
    enum hf_family family;
    int tied;
    int has_vision;
    struct model_params params; /* but attention_scale and embed_scale: see below */
    float query_scalar;
} published[] = {
    {"llama-2-7b",
     HF_LLAMA,
     0,
     0,
     {.arch = MODEL_ARCH_LLAMA,
      .dim = 4096,
      .layer_count = 32,
      .head_count = 32,
      .kv_head_count = 32,
      .head_dim = 128,
      .ffn_dim = 11008,
      .vocab_size = 32000,
      .context_length = 4096,
      .rope_dim = 128,
      .rms_eps = 1e-5f,
      .rope_base = 1e4f},
     128},
    {"llama-3.2-1b",
     HF_LLAMA,
     1,
     0,
     {.arch = MODEL_ARCH_LLAMA,
      .dim = 2048,
      .layer_count = 16,
      .head_count = 32,
      .kv_head_count = 8,
      .head_dim = 64,
      .ffn_dim = 8192,
      .vocab_size = 128256,
      .context_length = 131072,
      .features = MODEL_ROPE_FACTORS,
      .rope_dim = 64,
      .rms_eps = 1e-5f,
      .rope_base = 5e5f},
     64},
    {"smollm2-135m",
     HF_LLAMA,
     1,
     0,
     {.arch = MODEL_ARCH_LLAMA,
      .dim = 576,
      .layer_count = 30,
      .head_count = 9,
      .kv_head_count = 3,
      .head_dim = 64,
      .ffn_dim = 1536,
      .vocab_size = 49152,
      .context_length = 8192,
      .rope_dim = 64,
      .rms_eps = 1e-5f,
      .rope_base = 1e5f},
     64},
    {"mistral-7b-v0.1",
     HF_MISTRAL,
     0,
     0,
     {.arch = MODEL_ARCH_LLAMA,
      .dim = 4096,
      .layer_count = 32,
      .head_count = 32,
      .kv_head_count = 8,
      .head_dim = 128,
      .ffn_dim = 14336,
      .vocab_size = 32000,
      .context_length = 32768,
      .rope_dim = 128,
      .window = 4096,
      .rms_eps = 1e-5f,
      .rope_base = 1e4f},
     128},
    {"mistral-nemo",
     HF_MISTRAL,
     0,
     0,
     {.arch = MODEL_ARCH_LLAMA,
      .dim = 5120,
      .layer_count = 40,
      .head_count = 32,
      .kv_head_count = 8,
      .head_dim = 128,
      .ffn_dim = 14336,
      .vocab_size = 131072,
      .context_length = 131072,
      .rope_dim = 128,
      .rms_eps = 1e-5f,
      .rope_base = 1e6f},
     128},
    {"mixtral-8x7b",
     HF_MIXTRAL,
     0,
     0,
     {.arch = MODEL_ARCH_LLAMA,
      .dim = 4096,
      .layer_count = 32,
      .head_count = 32,
      .kv_head_count = 8,
      .head_dim = 128,
      .ffn_dim = 14336,
      .vocab_size = 32000,
      .context_length = 32768,
      .expert_count = 8,
      .expert_used_count = 2,
      .rope_dim = 128,
      .rms_eps = 1e-5f,
      .rope_base = 1e6f},
     128},
    {"qwen2.5-7b",
     HF_QWEN2,
     0,
     0,
     {.arch = MODEL_ARCH_QWEN2,
      .dim = 3584,
      .layer_count = 28,
      .head_count = 28,
      .kv_head_count = 4,
      .head_dim = 128,
      .ffn_dim = 18944,
      .vocab_size = 152064,
      .context_length = 32768,
      .features = MODEL_QKV_BIAS,
      .rope_dim = 128,
      .rms_eps = 1e-6f,
      .rope_base = 1e6f},
     128},
    {"qwen3-0.6b",
     HF_QWEN3,
     1,
     0,
     {.arch = MODEL_ARCH_QWEN3,
      .dim = 1024,
      .layer_count = 28,
      .head_count = 16,
      .kv_head_count = 8,
      .head_dim = 128,
      .ffn_dim = 3072,
      .vocab_size = 151936,
      .context_length = 40960,
      .features = MODEL_QK_NORM,
      .rope_dim = 128,
      .rms_eps = 1e-6f,
      .rope_base = 1e6f},
     128},
    {"qwen3-30b-a3b",
     HF_QWEN3_MOE,
     0,
     0,
     {.arch = MODEL_ARCH_QWEN3,
      .dim = 2048,
      .layer_count = 48,
      .head_count = 32,
      .kv_head_count = 4,
      .head_dim = 128,
      .ffn_dim = 768,
      .vocab_size = 151936,
      .context_length = 40960,
      .expert_count = 128,
      .expert_used_count = 8,
      .features = MODEL_QK_NORM,
      .rope_dim = 128,
      .rms_eps = 1e-6f,
      .rope_base = 1e6f},
     128},
    {"gemma-2-27b",
     HF_GEMMA2,
     1,
     0,
     {.arch = MODEL_ARCH_GEMMA2,
      .dim = 4608,
      .layer_count = 46,
      .head_count = 32,
      .kv_head_count = 16,
      .head_dim = 128,
      .ffn_dim = 36864,
      .vocab_size = 256000,
      .context_length = 8192,
      .features = MODEL_POST_NORMS | MODEL_NORM_PLUS_ONE,
      .act = ACT_GELU_TANH,
      .rope_dim = 128,
      .window = 4096,
      .window_period = 2,
      .rms_eps = 1e-6f,
      .rope_base = 1e4f,
      .attention_softcap = 50,
      .logit_softcap = 30},
     144},
    {"gemma-3-1b",
     HF_GEMMA3,
     1,
     0,
     {.arch = MODEL_ARCH_GEMMA3,
      .dim = 1152,
      .layer_count = 26,
      .head_count = 4,
      .kv_head_count = 1,
      .head_dim = 256,
      .ffn_dim = 6912,
      .vocab_size = 262144,
      .context_length = 32768,
      .features = MODEL_POST_NORMS | MODEL_NORM_PLUS_ONE | MODEL_QK_NORM,
      .act = ACT_GELU_TANH,
      .rope_dim = 256,
      .window = 512,
      .window_period = 6,
      .rms_eps = 1e-6f,
      .rope_base = 1e6f,
      .rope_base_windowed = 1e4f},
     256},
    {"gemma-3-4b",
     HF_GEMMA3,
     1,
     1,
     {.arch = MODEL_ARCH_GEMMA3,
      .dim = 2560,
      .layer_count = 34,
      .head_count = 8,
      .kv_head_count = 4,
      .head_dim = 256,
      .ffn_dim = 10240,
      .vocab_size = 262208,
      .context_length = 131072,
      .features = MODEL_POST_NORMS | MODEL_NORM_PLUS_ONE | MODEL_QK_NORM,
      .act = ACT_GELU_TANH,
      .rope_dim = 256,
      .window = 1024,
      .window_period = 6,
      .rms_eps = 1e-6f,
      .rope_base = 1e6f,
      .rope_base_windowed = 1e4f,
      .rope_linear = 8},
     256},
    {"phi-3-mini-4k",
     HF_PHI3,
     0,
     0,
     {.arch = MODEL_ARCH_PHI3,
      .dim = 3072,
      .layer_count = 32,
      .head_count = 32,
      .kv_head_count = 32,
      .head_dim = 96,
      .ffn_dim = 8192,
      .vocab_size = 32064,
      .context_length = 4096,
      .rope_dim = 96,
      .window = 2047,
      .rms_eps = 1e-5f,
      .rope_base = 1e4f},
     96},
    /* sqrt(1 + ln 32 / ln 4096) = sqrt(17 / 12) */
    {"phi-4-mini",
     HF_PHI3,
     1,
     0,
     {.arch = MODEL_ARCH_PHI3,
      .dim = 3072,
      .layer_count = 32,
      .head_count = 24,
      .kv_head_count = 8,
      .head_dim = 128,
      .ffn_dim = 8192,
      .vocab_size = 200064,
      .context_length = 131072,
      .features = MODEL_ROPE_FACTORS,
      .rope_dim = 96,
      .rms_eps = 1e-5f,
      .rope_base = 1e4f,
      .rope_amplitude = 1.19023807f},
     128},
};

static void expect_counts(const struct model_params *got, const struct model_params *want,
                          const char *name)
{
    cr_expect_eq(got->arch, want->arch, "%s", name);
    cr_expect_eq(got->dim, want->dim, "%s", name);
    cr_expect_eq(got->layer_count, want->layer_count, "%s", name);
    cr_expect_eq(got->head_count, want->head_count, "%s", name);
    cr_expect_eq(got->kv_head_count, want->kv_head_count, "%s", name);
    cr_expect_eq(got->head_dim, want->head_dim, "%s", name);
    cr_expect_eq(got->ffn_dim, want->ffn_dim, "%s", name);
    cr_expect_eq(got->vocab_size, want->vocab_size, "%s", name);
    cr_expect_eq(got->context_length, want->context_length, "%s", name);
    cr_expect_eq(got->expert_count, want->expert_count, "%s", name);
    cr_expect_eq(got->expert_used_count, want->expert_used_count, "%s", name);
    cr_expect_eq(got->features, want->features, "%s", name);
    cr_expect_eq(got->act, want->act, "%s", name);
    cr_expect_eq(got->rope_style, ROPE_HALVES, "%s", name);
    cr_expect_eq(got->rope_dim, want->rope_dim, "%s", name);
    cr_expect_eq(got->window, want->window, "%s", name);
    cr_expect_eq(got->window_period, want->window_period, "%s", name);
}

static void expect_factors(const struct model_params *got, const struct model_params *want,
                           float scalar, const char *name)
{
    const float windowed = want->rope_base_windowed;
    const int gemma = want->act == ACT_GELU_TANH;
    cr_expect_eq(got->rms_eps, want->rms_eps, "%s", name);
    cr_expect_eq(got->rope_base, want->rope_base, "%s", name);
    cr_expect_eq(got->rope_base_windowed, windowed > 0.0f ? windowed : want->rope_base, "%s", name);
    cr_expect_eq(got->rope_linear, want->rope_linear > 0.0f ? want->rope_linear : 1.0f, "%s", name);
    cr_expect_eq(got->rope_amplitude, want->rope_amplitude > 0.0f ? want->rope_amplitude : 1.0f,
                 "%s: %.9g", name, (double)got->rope_amplitude);
    cr_expect_eq(got->embed_scale, gemma ? sqrtf((float)want->dim) : 1.0f, "%s", name);
    cr_expect_eq(got->attention_scale, 1.0f / sqrtf(scalar), "%s", name);
    cr_expect_eq(got->attention_softcap, want->attention_softcap, "%s", name);
    cr_expect_eq(got->logit_softcap, want->logit_softcap, "%s", name);
}

Test(hf_config, reads_the_published_models_exactly)
{
    for (size_t i = 0; i < sizeof published / sizeof published[0]; i++) {
        struct hf_config got;
        const char *name = published[i].name;
        parse(&got, name);
        cr_expect_eq(got.family, published[i].family, "%s", name);
        cr_expect_eq(got.tied, published[i].tied, "%s", name);
        cr_expect_eq(got.has_vision, published[i].has_vision, "%s", name);
        cr_expect_eq(got.rope_factor_count,
                     got.params.features & MODEL_ROPE_FACTORS ? got.params.rope_dim / 2 : 0, "%s",
                     name);
        expect_counts(&got.params, &published[i].params, name);
        expect_factors(&got.params, &published[i].params, published[i].query_scalar, name);
    }
}

Test(hf_config, reads_the_newer_spelling_of_the_rotation_as_the_older_one)
{
    static const char *const pairs[][2] = {{"llama-3.2-1b", "llama-3.2-1b-v5"},
                                           {"gemma-3-1b", "gemma-3-1b-v5"}};
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) {
        struct hf_config older, newer;
        parse(&older, pairs[i][0]);
        parse(&newer, pairs[i][1]);
        cr_expect_eq(memcmp(&older, &newer, sizeof older), 0, "%s", pairs[i][1]);
    }
}

/* Goal: the factors of Llama 3 are those of its definition, which speaks of wavelengths.
 * How: the definition in the words of the paper's code, in long double with the library's maths,
 * and no rounding but the last. */
Test(hf_config, computes_the_factors_of_llama_3)
{
    struct hf_config got;
    uint32_t between = 0;
    parse(&got, "llama-3.2-1b");
    cr_assert_eq(got.rope_factor_count, 32);
    for (uint32_t i = 0; i < 32; i++) {
        const long double frequency = powl(500000.0L, -(long double)i / 32.0L);
        const long double wavelength = 2.0L * acosl(-1.0L) / frequency;
        long double want = 1.0L;
        if (wavelength > 8192.0L / 1.0L) {
            want = 32.0L;
        } else if (wavelength >= 8192.0L / 4.0L) {
            const long double smooth = (8192.0L / wavelength - 1.0L) / (4.0L - 1.0L);
            want = 1.0L / ((1.0L - smooth) / 32.0L + smooth);
            between++;
        }
        cr_expect_eq(got.rope_factors[i], (float)want, "%u: %.9g, not %.9Lg", i,
                     (double)got.rope_factors[i], want);
    }
    cr_expect(between > 0);
    cr_expect_eq(got.rope_factors[0], 1.0f);
    cr_expect_eq(got.rope_factors[31], 32.0f);
}

Test(hf_config, takes_the_long_factors_where_texts_may_be_longer_than_the_training)
{
    struct hf_config got;
    parse(&got, "phi-4-mini");
    cr_assert_eq(got.rope_factor_count, 48);
    cr_expect_eq(got.rope_factors[0], 1.0f);
    cr_expect_eq(got.rope_factors[47], 24.125f);
}

/* ---- one change to a published file ---------------------------------------------------------- */

struct change {
    const char *name; /* the vector */
    const char *from; /* part of its text, replaced once */
    const char *to;
    enum odsi_err err;
    const char *says; /* part of the sentence; for ODSI_OK nothing */
};

static enum odsi_err parse_changed(struct hf_config *out, const struct change *change)
{
    struct buf text, changed;
    read_vector(change->name, &text);
    buf_init(&changed, HF_CONFIG_SIZE_MAX);
    const char *all = buf_text_view(&text);
    const char *at = strstr(all, change->from);
    cr_assert_not_null(at, "%s has no %s", change->name, change->from);
    (void)buf_append(&changed, all, (size_t)(at - all));
    (void)buf_append_text(&changed, change->to);
    (void)buf_append_text(&changed, at + strlen(change->from));
    const enum odsi_err err = hf_config_parse(out, changed.data, changed.size);
    buf_free(&text);
    buf_free(&changed);
    return err;
}

static void expect_all(const struct change *changes, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct hf_config got;
        const enum odsi_err err = parse_changed(&got, &changes[i]);
        cr_expect_eq(err, changes[i].err, "%s, %s: %s", changes[i].name, changes[i].to,
                     err == ODSI_OK ? "taken" : odsi_err_text());
        if (err != ODSI_OK && changes[i].says)
            cr_expect_not_null(strstr(odsi_err_text(), changes[i].says), "%s: %s", changes[i].to,
                               odsi_err_text());
    }
}
#define EXPECT_ALL(changes) expect_all(changes, sizeof(changes) / sizeof(changes)[0])

Test(hf_config, refuses_by_name_what_it_does_not_do)
{
    static const struct change changes[] = {
        {"llama-2-7b", "LlamaForCausalLM", "MambaForCausalLM", ODSI_ERR_UNSUPPORTED, "MambaFor"},
        {"llama-2-7b", "\"use_cache\"", "\"use_nope\"", ODSI_ERR_UNSUPPORTED, "use_nope"},
        {"llama-2-7b", "\"use_cache\"", "\"logit_scale\"", ODSI_ERR_UNSUPPORTED, "logit_scale"},
        {"llama-2-7b", "silu", "relu", ODSI_ERR_UNSUPPORTED, "relu"},
        {"llama-3.2-1b", "\"attention_bias\": false", "\"attention_bias\": true",
         ODSI_ERR_UNSUPPORTED, "attention_bias"},
        {"llama-3.2-1b", "\"mlp_bias\": false", "\"mlp_bias\": true", ODSI_ERR_UNSUPPORTED,
         "mlp_bias"},
        {"llama-3.2-1b", "\"rope_type\": \"llama3\"", "\"rope_type\": \"yarn\"",
         ODSI_ERR_UNSUPPORTED, "yarn"},
        {"llama-3.2-1b", "\"rope_type\": \"llama3\"", "\"rope_type\": \"dynamic\"",
         ODSI_ERR_UNSUPPORTED, "dynamic"},
        {"llama-3.2-1b", "\"low_freq_factor\"", "\"mscale\": 2, \"low_freq_factor\"",
         ODSI_ERR_UNSUPPORTED, "mscale"},
        {"llama-2-7b", "\"use_cache\": true",
         "\"quantization_config\": {\"quant_method\": \"gptq\"}", ODSI_ERR_UNSUPPORTED, "gptq"},
        {"llama-2-7b", "\"use_cache\": true", "\"sliding_window\": 100", ODSI_ERR_UNSUPPORTED,
         "sliding_window"},
        {"llama-2-7b", "\"use_cache\": true", "\"partial_rotary_factor\": 0.5",
         ODSI_ERR_UNSUPPORTED, "partial_rotary_factor"},
        {"smollm2-135m", "\"rope_interleaved\": false", "\"rope_interleaved\": true",
         ODSI_ERR_UNSUPPORTED, "rope_interleaved"},
        {"qwen3-30b-a3b", "\"norm_topk_prob\": true", "\"norm_topk_prob\": false",
         ODSI_ERR_UNSUPPORTED, "norm_topk_prob"},
        {"qwen3-30b-a3b", "\"norm_topk_prob\": true", "\"use_cache\": true", ODSI_ERR_CORRUPT,
         NULL},
        {"qwen3-30b-a3b", "\"norm_topk_prob\": true,", "", ODSI_ERR_UNSUPPORTED, "norm_topk_prob"},
        {"qwen3-30b-a3b", "\"decoder_sparse_step\": 1", "\"decoder_sparse_step\": 2",
         ODSI_ERR_UNSUPPORTED, "decoder_sparse_step"},
        {"qwen3-30b-a3b", "\"mlp_only_layers\": []", "\"mlp_only_layers\": [3]",
         ODSI_ERR_UNSUPPORTED, "mlp_only_layers"},
        {"gemma-3-1b", "gelu_pytorch_tanh", "gelu", ODSI_ERR_UNSUPPORTED, "gelu"},
        {"gemma-3-1b-v5", "\"use_bidirectional_attention\": false",
         "\"use_bidirectional_attention\": true", ODSI_ERR_UNSUPPORTED,
         "use_bidirectional_attention"},
        {"gemma-3-4b", "\"rope_type\": \"linear\"", "\"rope_type\": \"llama3\"", ODSI_ERR_CORRUPT,
         "low_freq_factor"},
        {"phi-4-mini", "\"lm_head_bias\": false", "\"lm_head_bias\": true", ODSI_ERR_UNSUPPORTED,
         "lm_head_bias"},
        {"phi-3-mini-4k", "\"rope_scaling\": null",
         "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}", ODSI_ERR_UNSUPPORTED,
         "linear"},
        /* Scaled, and with windows: model.h has no such rotation. */
        {"mistral-7b-v0.1", "\"use_cache\": true",
         "\"rope_scaling\": {\"type\": \"linear\", \"factor\": 2.0}", ODSI_ERR_UNSUPPORTED,
         "window"},
    };
    EXPECT_ALL(changes);
}

Test(hf_config, refuses_what_cannot_be)
{
    static const struct change changes[] = {
        {"llama-2-7b", "\"hidden_size\": 4096", "\"hidden_size\": 0", ODSI_ERR_CORRUPT,
         "hidden_size"},
        {"llama-2-7b", "\"hidden_size\": 4096", "\"hidden_size\": -1", ODSI_ERR_CORRUPT,
         "hidden_size"},
        {"llama-2-7b", "\"hidden_size\": 4096", "\"hidden_size\": 1e300", ODSI_ERR_CORRUPT,
         "hidden_size"},
        {"llama-2-7b", "\"hidden_size\": 4096", "\"hidden_size\": \"4096\"", ODSI_ERR_CORRUPT,
         "hidden_size"},
        {"llama-2-7b", "\"hidden_size\": 4096,", "", ODSI_ERR_CORRUPT, "hidden_size"},
        {"llama-2-7b", "\"hidden_size\": 4096", "\"hidden_size\": 4095", ODSI_ERR_CORRUPT,
         "head_dim"},
        {"llama-2-7b", "\"num_attention_heads\": 32", "\"num_attention_heads\": 0",
         ODSI_ERR_CORRUPT, "num_attention_heads"},
        {"llama-2-7b", "\"num_hidden_layers\": 32", "\"num_hidden_layers\": 4294967295",
         ODSI_ERR_CORRUPT, "num_hidden_layers"},
        {"llama-2-7b", "\"num_hidden_layers\": 32", "\"num_hidden_layers\": 32.5", ODSI_ERR_CORRUPT,
         "num_hidden_layers"},
        {"llama-2-7b", "\"vocab_size\": 32000", "\"vocab_size\": 99999999", ODSI_ERR_CORRUPT,
         "vocab_size"},
        {"llama-2-7b", "\"vocab_size\": 32000", "\"hidden_size\": 4096", ODSI_ERR_CORRUPT,
         "duplicate"},
        {"llama-2-7b", "[\"LlamaForCausalLM\"]", "[]", ODSI_ERR_CORRUPT, "architectures"},
        {"llama-2-7b", "[\"LlamaForCausalLM\"]", "[\"LlamaForCausalLM\", \"X\"]", ODSI_ERR_CORRUPT,
         "architectures"},
        {"llama-2-7b", "[\"LlamaForCausalLM\"]", "[5]", ODSI_ERR_CORRUPT, "architectures"},
        {"llama-2-7b", "[\"LlamaForCausalLM\"]", "7", ODSI_ERR_CORRUPT, "architectures"},
        {"llama-3.2-1b", "500000.0", "0.5", ODSI_ERR_CORRUPT, "rope_theta"},
        {"llama-3.2-1b", "500000.0", "1e15", ODSI_ERR_CORRUPT, "rope_theta"},
        {"llama-3.2-1b", "\"factor\": 32.0", "\"factor\": 0.5", ODSI_ERR_CORRUPT, "factor"},
        {"llama-3.2-1b", "\"factor\": 32.0,", "", ODSI_ERR_CORRUPT, "factor"},
        {"llama-3.2-1b", "\"high_freq_factor\": 4.0", "\"high_freq_factor\": 1.0", ODSI_ERR_CORRUPT,
         "high_freq_factor"},
        {"llama-3.2-1b", "\"rope_type\": \"llama3\"",
         "\"rope_type\": \"llama3\", \"type\": \"linear\"", ODSI_ERR_CORRUPT, "rope_type"},
        {"llama-3.2-1b", "\"use_cache\": true", "\"rope_parameters\": {\"rope_theta\": 5e5}",
         ODSI_ERR_CORRUPT, "rope_parameters"},
        {"llama-3.2-1b-v5", "\"use_cache\": true", "\"rope_theta\": 10000.0", ODSI_ERR_CORRUPT,
         "rope_theta"},
        {"mixtral-8x7b", "\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 9",
         ODSI_ERR_CORRUPT, "num_experts_per_tok"},
        {"mixtral-8x7b", "\"num_local_experts\": 8", "\"num_local_experts\": 100000",
         ODSI_ERR_CORRUPT, "experts"},
        {"mistral-7b-v0.1", "\"num_key_value_heads\": 8,", "", ODSI_ERR_CORRUPT,
         "num_key_value_heads"},
        {"gemma-2-27b", "\"query_pre_attn_scalar\": 144", "\"query_pre_attn_scalar\": 0",
         ODSI_ERR_CORRUPT, "query_pre_attn_scalar"},
        {"gemma-2-27b", "\"sliding_window\": 4096", "\"sliding_window\": null", ODSI_ERR_CORRUPT,
         "sliding_window"},
        {"gemma-3-1b", "\"sliding_window_pattern\": 6", "\"sliding_window_pattern\": 0",
         ODSI_ERR_CORRUPT, "sliding_window_pattern"},
        {"gemma-3-1b-v5", "\"sliding_attention\",", "", ODSI_ERR_CORRUPT, "layer_types"},
        {"gemma-3-1b-v5", "\"sliding_attention\",", "\"chunked_attention\",", ODSI_ERR_UNSUPPORTED,
         "chunked_attention"},
        {"gemma-3-4b", "text_config", "text_konfig", ODSI_ERR_UNSUPPORTED, "text_konfig"},
        {"phi-4-mini", "\"long_factor\": [1,", "\"long_factor\": [1, 1,", ODSI_ERR_CORRUPT,
         "long_factor"},
        {"phi-4-mini", "\"long_factor\": [1,", "\"long_factor\": [0.5,", ODSI_ERR_CORRUPT,
         "long_factor"},
        {"phi-4-mini", "\"long_factor\": [1,", "\"long_factor\": [\"1\",", ODSI_ERR_CORRUPT,
         "long_factor"},
        {"phi-4-mini", "\"original_max_position_embeddings\": 4096",
         "\"original_max_position_embeddings\": 1", ODSI_ERR_CORRUPT, "original_max"},
        {"phi-4-mini", "\"partial_rotary_factor\": 0.75", "\"partial_rotary_factor\": 1.5",
         ODSI_ERR_CORRUPT, "partial_rotary_factor"},
    };
    EXPECT_ALL(changes);
}

Test(hf_config, takes_what_says_nothing_about_the_arithmetic)
{
    static const struct change changes[] = {
        {"llama-2-7b", "\"use_cache\": true", "\"unsloth_version\": \"2025.1\"", ODSI_OK, NULL},
        {"llama-2-7b", "\"use_cache\": true", "\"_private\": {\"a\": [1]}", ODSI_OK, NULL},
        {"llama-2-7b", "\"use_cache\": true", "\"some_new_feature\": null", ODSI_OK, NULL},
        {"llama-2-7b", "\"use_cache\": true", "\"temperature\": 0.6", ODSI_OK, NULL},
        {"llama-2-7b", "silu", "swish", ODSI_OK, NULL},
        {"llama-2-7b", "\"hidden_size\": 4096", "\"hidden_size\": 4096.0", ODSI_OK, NULL},
        {"llama-2-7b", "\"num_key_value_heads\": 32,", "", ODSI_OK, NULL},
        {"llama-2-7b", "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"default\"}",
         ODSI_OK, NULL},
        {"gemma-2-27b", "\"hidden_act\": \"gelu_pytorch_tanh\"", "\"hidden_act\": \"gelu\"",
         ODSI_OK, NULL},
        {"qwen3-30b-a3b", "\"num_experts\"", "\"num_local_experts\"", ODSI_OK, NULL},
        {"phi-4-mini", "\"sliding_window\": 262144", "\"sliding_window\": 4096", ODSI_OK, NULL},
    };
    EXPECT_ALL(changes);
}

/* Goal: the amplitude is right for every length, not only for the powers of two of real files.
 * How: against the library's logarithm, which is exact enough to round to the same binary32. */
Test(hf_config, computes_the_amplitude_of_longer_texts)
{
    for (uint32_t length = 4097; length <= 262144; length += length / 7 + 1) {
        char to[64];
        struct hf_config got;
        const struct change change = {"phi-4-mini", "\"max_position_embeddings\": 131072", to,
                                      ODSI_OK, NULL};
        snprintf(to, sizeof to, "\"max_position_embeddings\": %u", length);
        cr_assert_eq(parse_changed(&got, &change), ODSI_OK, "%u: %s", length, odsi_err_text());
        const double want = sqrt(1.0 + log((double)length / 4096.0) / log(4096.0));
        cr_expect_eq(got.params.rope_amplitude, (float)want, "%u", length);
    }
}

/* ---- windows --------------------------------------------------------------------------------- */

Test(hf_config, folds_the_windows_of_layers_into_a_period)
{
    static const struct {
        struct change change;
        uint32_t window;
        uint32_t period;
    } cases[] = {
        /* What the class says when the file does not: 4096, and for Mixtral none. */
        {{"mistral-7b-v0.1", "\"sliding_window\": 4096,", "", ODSI_OK, NULL}, 4096, 0},
        {{"mixtral-8x7b", "\"sliding_window\": null,", "", ODSI_OK, NULL}, 0, 0},
        {{"mistral-7b-v0.1", "\"sliding_window\": 4096", "\"sliding_window\": null", ODSI_OK, NULL},
         0,
         0},
        /* A window that no text reaches is none. */
        {{"mistral-7b-v0.1", "\"sliding_window\": 4096", "\"sliding_window\": 32768", ODSI_OK,
          NULL},
         0,
         0},
        {{"mistral-7b-v0.1", "\"sliding_window\": 4096", "\"sliding_window\": 32767", ODSI_OK,
          NULL},
         32767,
         0},
        {{"qwen2.5-7b", "\"sliding_window\": 131072", "\"sliding_window\": 1000", ODSI_OK, NULL},
         0,
         0},
        {{"gemma-3-1b", "\"sliding_window_pattern\": 6", "\"sliding_window_pattern\": 4", ODSI_OK,
          NULL},
         512,
         4},
        {{"gemma-3-1b", "\"sliding_window_pattern\": 6", "\"sliding_window_pattern\": 27", ODSI_OK,
          NULL},
         512,
         0},
        {{"gemma-3-1b", "\"sliding_window_pattern\": 6", "\"sliding_window_pattern\": 1", ODSI_OK,
          NULL},
         0,
         0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct hf_config got;
        const enum odsi_err err = parse_changed(&got, &cases[i].change);
        cr_expect_eq(err, cases[i].change.err, "%zu: %s", i, odsi_err_text());
        if (err != ODSI_OK)
            continue;
        cr_expect_eq(got.params.window, cases[i].window, "%zu: %u", i, got.params.window);
        cr_expect_eq(got.params.window_period, cases[i].period, "%zu: %u", i,
                     got.params.window_period);
    }
}

/* A Qwen2 of 8 layers; the rest of the object is given. */
static enum odsi_err parse_qwen2(struct hf_config *out, const char *rest)
{
    char text[2048];
    const int size = snprintf(
        text, sizeof text,
        "{\"architectures\": [\"Qwen2ForCausalLM\"], \"hidden_size\": 64, \"vocab_size\": 300,"
        "\"intermediate_size\": 96, \"num_hidden_layers\": 8, \"num_attention_heads\": 4,"
        "\"num_key_value_heads\": 2, \"max_position_embeddings\": 512, %s}",
        rest);
    cr_assert(size > 0 && (size_t)size < sizeof text);
    return hf_config_parse(out, text, (size_t)size);
}

Test(hf_config, reads_the_windows_of_qwen_2)
{
    static const struct {
        const char *rest;
        enum odsi_err err;
        uint32_t window;
        uint32_t period;
    } cases[] = {
        {"\"use_sliding_window\": true, \"sliding_window\": 100, \"max_window_layers\": 0", ODSI_OK,
         100, 0},
        {"\"use_sliding_window\": true, \"sliding_window\": 100, \"max_window_layers\": 8", ODSI_OK,
         0, 0},
        {"\"use_sliding_window\": true, \"sliding_window\": 100", ODSI_OK, 0, 0},
        {"\"use_sliding_window\": true, \"sliding_window\": 100, \"max_window_layers\": 4",
         ODSI_ERR_UNSUPPORTED, 0, 0},
        {"\"use_sliding_window\": true, \"sliding_window\": 100, \"layer_types\": ["
         "\"sliding_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\","
         "\"sliding_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\"]",
         ODSI_OK, 100, 2},
        {"\"use_sliding_window\": true, \"sliding_window\": 100, \"layer_types\": ["
         "\"full_attention\", \"sliding_attention\", \"full_attention\", \"full_attention\","
         "\"sliding_attention\", \"full_attention\", \"sliding_attention\", \"full_attention\"]",
         ODSI_ERR_UNSUPPORTED, 0, 0},
        {"\"use_sliding_window\": false, \"sliding_window\": 100, \"layer_types\": ["
         "\"sliding_attention\", \"full_attention\", \"full_attention\", \"full_attention\","
         "\"full_attention\", \"full_attention\", \"full_attention\", \"full_attention\"]",
         ODSI_ERR_CORRUPT, 0, 0},
        {"\"use_sliding_window\": true, \"layer_types\": 5", ODSI_ERR_CORRUPT, 0, 0},
        {"\"use_sliding_window\": 1", ODSI_ERR_CORRUPT, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct hf_config got;
        const enum odsi_err err = parse_qwen2(&got, cases[i].rest);
        cr_expect_eq(err, cases[i].err, "%zu: %s", i, odsi_err_text());
        if (err != ODSI_OK)
            continue;
        cr_expect_eq(got.params.window, cases[i].window, "%zu: %u", i, got.params.window);
        cr_expect_eq(got.params.window_period, cases[i].period, "%zu: %u", i,
                     got.params.window_period);
    }
}

/* ---- anything at all ------------------------------------------------------------------------- */

Test(hf_config, refuses_what_is_no_object)
{
    static const char *const texts[] = {"", "{", "[]", "7", "null", "{}x", "{\"a\": NaN}", "\xff"};
    for (size_t i = 0; i < sizeof texts / sizeof texts[0]; i++) {
        struct hf_config got;
        cr_expect_eq(hf_config_parse(&got, texts[i], strlen(texts[i])), ODSI_ERR_CORRUPT, "%s",
                     texts[i]);
    }
}

/* Goal: no file can crash, hang or ask for much memory.
 * How: published files with random bytes changed, cut out or doubled; whatever is taken is within
 * the limits that the rest computes with. */
Test(hf_config, survives_damage)
{
    uint64_t seed = 20260710;
    uint32_t taken = 0;
    for (uint32_t round = 0; round < 4000; round++) {
        struct hf_config got;
        struct buf text;
        read_vector(published[round % (sizeof published / sizeof published[0])].name, &text);
        for (uint32_t i = 0; i < 1 + round % 4; i++) {
            const size_t at = fixture_random(&seed) % text.size;
            const size_t cut = fixture_random(&seed) % 8;
            text.data[at] = (uint8_t)(fixture_random(&seed) % 2 ? fixture_random(&seed) : '0');
            if (round % 3 == 0 && at + cut < text.size) {
                memmove(text.data + at, text.data + at + cut, text.size - at - cut);
                text.size -= cut;
            }
        }
        if (hf_config_parse(&got, text.data, text.size) == ODSI_OK) {
            taken++;
            cr_expect(got.params.layer_count >= 1 && got.params.layer_count <= LIMIT_LAYERS_MAX);
            cr_expect(got.params.rope_dim >= 2 && got.params.rope_dim <= got.params.head_dim);
            cr_expect(got.rope_factor_count <= HF_CONFIG_ROPE_FACTOR_MAX);
            for (uint32_t i = 0; i < got.rope_factor_count; i++)
                cr_expect(got.rope_factors[i] >= 1.0f);
        }
        buf_free(&text);
    }
    cr_expect(taken > 0, "seed 20260710: every damaged file was refused");
}
