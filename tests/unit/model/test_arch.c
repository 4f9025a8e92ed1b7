#include "worker/model/arch.h"

#include "tests/unit/model/family_fixture.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/gguf_value.h"
#include "worker/model/manifest.h"
#include "worker/model/model.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- recipes: keys as the converters of llama.cpp write them --------------------------------- */

/* What the hyper-parameters of a family become, where these differ from family_params and
 * from what is neutral. */
static const struct family {
    struct family_recipe recipe;
    struct model_params wanted;
} families[] = {
    {{.arch = "llama",
      .params = {.layer_count = 2},
      .keys = {{"rope.dimension_count", GGUF_U32, 8, NULL},
               {"rope.freq_base", GGUF_F32, 5e5, NULL},
               {"vocab_size", GGUF_U32, FIXTURE_VOCABULARY, NULL}}},
     {.arch = MODEL_ARCH_LLAMA,
      .rope_style = ROPE_PAIRS,
      .rope_base = 5e5f,
      .rope_base_windowed = 5e5f}},
    {{.arch = "llama", /* Llama 3.1 and on: the factors are in a tensor */
      .params = {.features = MODEL_ROPE_FACTORS}},
     {.arch = MODEL_ARCH_LLAMA, .features = MODEL_ROPE_FACTORS, .rope_style = ROPE_PAIRS}},
    {{.arch = "llama", /* Mistral */
      .params = {.layer_count = 2},
      .keys = {{"attention.sliding_window", GGUF_U32, 24, NULL}}},
     {.arch = MODEL_ARCH_LLAMA, .rope_style = ROPE_PAIRS, .window = 24}},
    {{.arch = "llama", /* Mixtral */
      .params = {.expert_count = 4, .expert_used_count = 2},
      .keys = {{"expert_count", GGUF_U32, 4, NULL}, {"expert_used_count", GGUF_U32, 2, NULL}}},
     {.arch = MODEL_ARCH_LLAMA,
      .rope_style = ROPE_PAIRS,
      .expert_count = 4,
      .expert_used_count = 2}},
    {{.arch = "llama", /* with biases */
      .params = {.features = MODEL_QKV_BIAS}},
     {.arch = MODEL_ARCH_LLAMA, .rope_style = ROPE_PAIRS, .features = MODEL_QKV_BIAS}},
    {{.arch = "qwen2",
      .params = {.features = MODEL_QKV_BIAS},
      .keys = {{"rope.freq_base", GGUF_F32, 1e6, NULL}}},
     {.arch = MODEL_ARCH_QWEN2,
      .features = MODEL_QKV_BIAS,
      .rope_style = ROPE_HALVES,
      .rope_base = 1e6f,
      .rope_base_windowed = 1e6f}},
    {{.arch = "qwen3",
      .params = {.features = MODEL_QK_NORM, .head_dim = 16, .rope_dim = 16},
      .keys = {{"attention.key_length", GGUF_U32, 16, NULL},
               {"attention.value_length", GGUF_U32, 16, NULL}}},
     {.arch = MODEL_ARCH_QWEN3,
      .features = MODEL_QK_NORM,
      .rope_style = ROPE_HALVES,
      .head_dim = 16,
      .rope_dim = 16,
      .attention_scale = 0.25f}},
    {{.arch = "qwen3moe",
      .params =
          {.features = MODEL_QK_NORM, .ffn_dim = 32, .expert_count = 8, .expert_used_count = 3},
      .skip_key = "qwen3moe.feed_forward_length",
      .keys = {{"attention.key_length", GGUF_U32, 8, NULL},
               {"attention.value_length", GGUF_U32, 8, NULL},
               {"expert_count", GGUF_U32, 8, NULL},
               {"expert_used_count", GGUF_U32, 3, NULL},
               {"expert_feed_forward_length", GGUF_U32, 32, NULL}}},
     {.arch = MODEL_ARCH_QWEN3,
      .features = MODEL_QK_NORM,
      .rope_style = ROPE_HALVES,
      .ffn_dim = 32,
      .expert_count = 8,
      .expert_used_count = 3}},
    {{.arch = "gemma2",
      .params = {.layer_count = 3, .features = MODEL_POST_NORMS},
      .keys = {{"attention.key_length", GGUF_U32, 8, NULL},
               {"attention.value_length", GGUF_U32, 8, NULL},
               {"attn_logit_softcapping", GGUF_F32, 40, NULL},
               {"final_logit_softcapping", GGUF_F32, 20, NULL},
               {"attention.sliding_window", GGUF_U32, 16, NULL}}},
     {.arch = MODEL_ARCH_GEMMA2,
      .features = MODEL_POST_NORMS,
      .act = ACT_GELU_TANH,
      .rope_style = ROPE_HALVES,
      .layer_count = 3,
      .window = 16,
      .window_period = 2,
      .embed_scale = 5.65685424949238f,
      .attention_softcap = 40,
      .logit_softcap = 20}},
    {{.arch = "gemma2", /* the 27B model, and what files of old leave out */
      .params = {.layer_count = 46, .features = MODEL_POST_NORMS, .head_dim = 16, .rope_dim = 16},
      .keys = {{"attention.key_length", GGUF_U32, 16, NULL},
               {"attention.value_length", GGUF_U32, 16, NULL}}},
     {.arch = MODEL_ARCH_GEMMA2,
      .features = MODEL_POST_NORMS,
      .act = ACT_GELU_TANH,
      .rope_style = ROPE_HALVES,
      .layer_count = 46,
      .head_dim = 16,
      .rope_dim = 16,
      .window = 4096,
      .window_period = 2,
      .embed_scale = 5.65685424949238f,
      .attention_scale = 0.353553390593274f, /* of 32 / 4, not of 16 */
      .attention_softcap = 50,
      .logit_softcap = 30}},
    {{.arch = "gemma3",
      .params = {.layer_count = 7, .features = MODEL_POST_NORMS | MODEL_QK_NORM},
      .keys = {{"attention.key_length", GGUF_U32, 8, NULL},
               {"attention.value_length", GGUF_U32, 8, NULL},
               {"rope.freq_base", GGUF_F32, 1e6, NULL},
               {"attention.sliding_window", GGUF_U32, 16, NULL},
               {"rope.scaling.type", GGUF_TEXT, 0, "linear"},
               {"rope.scaling.factor", GGUF_F32, 8, NULL}}},
     {.arch = MODEL_ARCH_GEMMA3,
      .features = MODEL_POST_NORMS | MODEL_QK_NORM,
      .act = ACT_GELU_TANH,
      .rope_style = ROPE_HALVES,
      .layer_count = 7,
      .window = 16,
      .window_period = 6,
      .rope_base = 1e6f,
      .rope_base_windowed = 1e4f,
      .rope_linear = 8,
      .embed_scale = 5.65685424949238f}},
    {{.arch = "gemma3", /* all that a file may say itself */
      .params = {.features = MODEL_POST_NORMS | MODEL_QK_NORM},
      .keys = {{"attention.sliding_window", GGUF_U32, 16, NULL},
               {"attention.sliding_window_pattern", GGUF_U32, 2, NULL},
               {"rope.freq_base_swa", GGUF_F32, 2e4, NULL},
               {"final_logit_softcapping", GGUF_F32, 25, NULL}}},
     {.arch = MODEL_ARCH_GEMMA3,
      .features = MODEL_POST_NORMS | MODEL_QK_NORM,
      .act = ACT_GELU_TANH,
      .rope_style = ROPE_HALVES,
      .window = 16,
      .window_period = 2,
      .rope_base_windowed = 2e4f,
      .logit_softcap = 25,
      .embed_scale = 5.65685424949238f}},
    {{.arch = "phi3",
      .params = {.layer_count = 2},
      .fuses_qkv = 1,
      .fuses_gate_up = 1,
      .keys = {{"rope.dimension_count", GGUF_U32, 8, NULL},
               {"rope.scaling.original_context_length", GGUF_U32, 64, NULL},
               {"attention.sliding_window", GGUF_U32, 31, NULL}}},
     {.arch = MODEL_ARCH_PHI3, .rope_style = ROPE_HALVES, .window = 31}},
    {{.arch = "phi3", /* of the long context, and with heads that turn in part */
      .params = {.rope_dim = 6},
      .fuses_qkv = 1,
      .fuses_gate_up = 1,
      .extra_tensors = {"rope_factors_long.weight", "rope_factors_short.weight"},
      .extra_cols = 3,
      .keys = {{"rope.dimension_count", GGUF_U32, 6, NULL},
               {"rope.scaling.original_context_length", GGUF_U32, 16, NULL},
               {"rope.scaling.attn_factor", GGUF_F32, 1.25, NULL},
               {"attention.sliding_window", GGUF_U32, 0, NULL}}},
     {.arch = MODEL_ARCH_PHI3,
      .features = MODEL_ROPE_FACTORS,
      .rope_style = ROPE_HALVES,
      .rope_dim = 6,
      .rope_amplitude = 1.25f}},
};
#define FAMILY_COUNT (sizeof families / sizeof families[0])

static struct model *open_model(const char *path)
{
    struct model *model = NULL;
    cr_assert_eq(model_open(&model, path, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    return model;
}

#define EXPECT(member)                                                                             \
    cr_expect_eq(got->member, wanted.member, "case %zu, %s: " #member " is %g, not %g", i,         \
                 families[i].recipe.arch, (double)got->member, (double)wanted.member)

/* Goal: each family is read as it is meant. How: every hyper-parameter of hand-made files. */
Test(arch, reads_each_family_exactly)
{
    char *folder = fixture_folder();
    for (size_t i = 0; i < FAMILY_COUNT; i++) {
        struct model_params wanted = families[i].wanted;
        const struct model_params *shape = &family_params;
        struct model *model = open_model(family_write(folder, &families[i].recipe, 1));
        const struct model_params *got = model_params_view(model);
        family_complete(&wanted);
        wanted.rope_base = wanted.rope_base != 0 ? wanted.rope_base : 1e4f;
        if (wanted.rope_base_windowed == 0)
            wanted.rope_base_windowed = wanted.rope_base;
        wanted.rope_linear = wanted.rope_linear != 0 ? wanted.rope_linear : 1;
        wanted.rope_amplitude = wanted.rope_amplitude != 0 ? wanted.rope_amplitude : 1;
        wanted.embed_scale = wanted.embed_scale != 0 ? wanted.embed_scale : 1;
        if (wanted.attention_scale == 0)
            wanted.attention_scale = 0.353553390593274f;
        cr_expect_str_eq(arch_name(got), families[i].recipe.arch);
        cr_expect_str_eq(got->name, "family");
        cr_expect_eq(got->arch, wanted.arch);
        cr_expect_eq(got->dim, shape->dim);
        cr_expect_eq(got->head_count, shape->head_count);
        cr_expect_eq(got->kv_head_count, shape->kv_head_count);
        cr_expect_eq(got->context_length, shape->context_length);
        cr_expect_eq(got->vocab_size, FIXTURE_VOCABULARY);
        cr_expect_eq(got->rms_eps, 1e-6f);
        EXPECT(layer_count);
        EXPECT(head_dim);
        EXPECT(ffn_dim);
        EXPECT(expert_count);
        EXPECT(expert_used_count);
        EXPECT(features);
        EXPECT(act);
        EXPECT(rope_style);
        EXPECT(rope_dim);
        EXPECT(window);
        EXPECT(window_period);
        EXPECT(rope_base);
        EXPECT(rope_base_windowed);
        EXPECT(rope_linear);
        EXPECT(rope_amplitude);
        EXPECT(embed_scale);
        EXPECT(attention_scale);
        EXPECT(attention_softcap);
        EXPECT(logit_softcap);
        model_close(&model);
    }
    fixture_folder_remove(folder);
}

/* Goal: a peer's manifest says of a model what its own file said. */
Test(arch, manifests_carry_every_hyper_parameter)
{
    char *folder = fixture_folder();
    for (size_t i = 0; i < FAMILY_COUNT; i++) {
        struct model *model = open_model(family_write(folder, &families[i].recipe, 1));
        struct model_params read;
        struct digest tokenizer;
        const uint8_t *data;
        size_t size;
        model_manifest_view(model, &data, &size);
        cr_assert_eq(manifest_read(data, size, &read, &tokenizer), ODSI_OK, "%s", odsi_err_text());
        cr_expect_eq(memcmp(&read, model_params_view(model), sizeof read), 0, "case %zu", i);
        model_close(&model);
    }
    fixture_folder_remove(folder);
}

/* ---- refusals -------------------------------------------------------------------------------- */

#define CORRUPT     ODSI_ERR_CORRUPT
#define UNSUPPORTED ODSI_ERR_UNSUPPORTED

static const struct {
    struct family_recipe recipe;
    enum odsi_err err;
    const char *says;
} refused[] = {
    {{.arch = "gemma"}, UNSUPPORTED, "\"gemma\"; this build knows llama, qwen2"},
    {{.arch = "llama4"}, UNSUPPORTED, "\"llama4\""},
    {{.arch = "qwen2", .skip_tensor = "blk.1.attn_v.bias", .params = {.features = 1}},
     CORRUPT,
     "blk.1.attn_v.bias is missing"},
    {{.arch = "qwen2"}, CORRUPT, "blk.0.attn_q.bias is missing"},
    {{.arch = "qwen2",
      .params = {.features = MODEL_QKV_BIAS},
      .keys = {{"rope.scaling.type", GGUF_TEXT, 0, "yarn"}}},
     UNSUPPORTED,
     "qwen2.rope.scaling.type"},
    {{.arch = "qwen2",
      .params = {.features = MODEL_QKV_BIAS},
      .keys = {{"attention.sliding_window", GGUF_U32, 16, NULL}}},
     UNSUPPORTED,
     "qwen2.attention.sliding_window"},
    {{.arch = "llama", .keys = {{"rope.scaling.type", GGUF_TEXT, 0, "longrope"}}},
     UNSUPPORTED,
     "llama.rope.scaling.type"},
    {{.arch = "llama", .keys = {{"rope.dimension_count", GGUF_U32, 6, NULL}}},
     UNSUPPORTED,
     "llama.rope.dimension_count 6"},
    {{.arch = "llama",
      .keys = {{"attention.sliding_window", GGUF_U32, 16, NULL},
               {"rope.scaling.factor", GGUF_F32, 2, NULL}}},
     UNSUPPORTED,
     "a window in every layer"},
    {{.arch = "llama", .keys = {{"attention.sliding_window", GGUF_U32, 1048577, NULL}}},
     CORRUPT,
     "attention window is 1048577"},
    {{.arch = "llama", .keys = {{"logit_scale", GGUF_F32, 0.5, NULL}}},
     UNSUPPORTED,
     "llama.logit_scale"},
    {{.arch = "llama",
      .params = {.expert_count = 4},
      .keys = {{"expert_count", GGUF_U32, 4, NULL}}},
     CORRUPT,
     "experts used is 0, not within 1 to 4"},
    {{.arch = "llama",
      .params = {.expert_count = 4},
      .keys = {{"expert_count", GGUF_U32, 4, NULL}, {"expert_used_count", GGUF_U32, 5, NULL}}},
     CORRUPT,
     "experts used is 5, not within 1 to 4"},
    {{.arch = "llama",
      .keys = {{"expert_count", GGUF_U32, 1025, NULL}, {"expert_used_count", GGUF_U32, 2, NULL}}},
     CORRUPT,
     "number of experts is 1025"},
    {{.arch = "llama", .keys = {{"expert_used_count", GGUF_U32, 2, NULL}}},
     CORRUPT,
     "experts used is 2, not within 0 to 0"},
    {{.arch = "qwen3",
      .params = {.features = MODEL_QK_NORM},
      .skip_tensor = "blk.0.attn_k_norm.weight"},
     CORRUPT,
     "blk.0.attn_k_norm.weight is missing"},
    {{.arch = "qwen3", .keys = {{"expert_count", GGUF_U32, 4, NULL}}},
     UNSUPPORTED,
     "qwen3.expert_count"},
    {{.arch = "qwen3moe"}, CORRUPT, "qwen3moe.expert_count is missing"},
    {{.arch = "qwen3moe",
      .keys = {{"expert_count", GGUF_U32, 4, NULL}, {"expert_used_count", GGUF_U32, 2, NULL}}},
     CORRUPT,
     "qwen3moe.expert_feed_forward_length"},
    {{.arch = "qwen3moe",
      .keys = {{"expert_count", GGUF_U32, 4, NULL}, {"expert_shared_count", GGUF_U32, 1, NULL}}},
     UNSUPPORTED,
     "qwen3moe.expert_shared_count"},
    {{.arch = "gemma2", .keys = {{"attn_logit_softcapping", GGUF_F32, -1, NULL}}},
     CORRUPT,
     "softcap of the attention scores is -1"},
    {{.arch = "gemma2", .keys = {{"final_logit_softcapping", GGUF_F32, 1e-9, NULL}}},
     CORRUPT,
     "almost 0"},
    {{.arch = "gemma3", .keys = {{"attn_logit_softcapping", GGUF_F32, 50, NULL}}},
     UNSUPPORTED,
     "gemma3.attn_logit_softcapping"},
    {{.arch = "gemma3",
      .keys = {{"attention.sliding_window", GGUF_U32, 8, NULL},
               {"attention.sliding_window_pattern", GGUF_U32, 0, NULL}}},
     CORRUPT,
     "gemma3.attention.sliding_window_pattern is 0"},
    {{.arch = "gemma3", .keys = {{"rope.scaling.factor", GGUF_F32, __builtin_inf(), NULL}}},
     CORRUPT,
     "gemma3.rope.scaling.factor"},
    {{.arch = "gemma3", .keys = {{"mm.tokens_per_image", GGUF_U32, 256, NULL}}},
     UNSUPPORTED,
     "gemma3.mm.tokens_per_image"},
    {{.arch = "phi3", .keys = {{"rope.dimension_count", GGUF_U32, 7, NULL}}},
     CORRUPT,
     "7 dimensions cannot be rotated in pairs"},
    {{.arch = "phi3", .keys = {{"rope.dimension_count", GGUF_U32, 10, NULL}}},
     CORRUPT,
     "rotated dimensions is 10, not within 2 to 8"},
    {{.arch = "phi3", .keys = {{"rope.scaling.attn_factor", GGUF_F32, 0, NULL}}},
     CORRUPT,
     "amplitude is 0"},
    {{.arch = "phi3",
      .keys = {{"rope.scaling.original_context_length", GGUF_U32, 16, NULL}},
      .extra_tensors = {"rope_factors_short.weight"},
      .extra_cols = 4},
     CORRUPT,
     "rope_factors_long.weight is missing"},
    {{.arch = "phi3",
      .keys = {{"rope.scaling.original_context_length", GGUF_U32, 16, NULL}},
      .extra_tensors = {"rope_factors_long.weight"},
      .extra_cols = 3},
     CORRUPT,
     "rope_freqs.weight is [1][3], not [1][4]"},
    {{.arch = "phi3",
      .keys = {{"rope.scaling.original_context_length", GGUF_U32, 16, NULL}},
      .extra_tensors = {"rope_factors_long.weight", "rope_freqs.weight"},
      .extra_cols = 4},
     CORRUPT,
     "two tensors are named rope_freqs.weight"},
    {{.arch = "phi3", .fuses_qkv = 1, .extra_tensors = {"blk.0.attn_v.weight"}, .extra_cols = 32},
     CORRUPT,
     "blk.0.attn_q.weight is missing"},
    {{.arch = "phi3",
      .fuses_gate_up = 1,
      .extra_tensors = {"blk.0.ffn_gate.weight"},
      .extra_cols = 32},
     CORRUPT,
     "blk.0.ffn_gate.weight is [1][32], not [64][32]"},
    {{.arch = "phi3", .skip_tensor = "blk.1.ffn_gate.weight"},
     CORRUPT,
     "blk.1.ffn_gate.weight is missing"},
};

/* Goal: what this build would compute wrongly it refuses, and names it. */
Test(arch, refuses_what_it_does_not_do)
{
    char *folder = fixture_folder();
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        struct model *model = NULL;
        const char *path = family_write(folder, &refused[i].recipe, 1);
        cr_expect_eq(model_open(&model, path, NULL, NULL, NULL), refused[i].err, "%s: %s",
                     refused[i].says, odsi_err_text());
        cr_expect_null(model);
        cr_expect_not_null(strstr(odsi_err_text(), refused[i].says), "\"%s\" does not say \"%s\"",
                           odsi_err_text(), refused[i].says);
        cr_expect_not_null(strstr(odsi_err_text(), path), "\"%s\" does not name the file",
                           odsi_err_text());
    }
    fixture_folder_remove(folder);
}

static const struct family_recipe mixtral = {
    .arch = "llama",
    .params = {.expert_count = 4, .expert_used_count = 2},
    .keys = {{"expert_count", GGUF_U32, 4, NULL}, {"expert_used_count", GGUF_U32, 2, NULL}}};

/* Goal: experts that are cut apart must all be there and alike. */
Test(arch, refuses_experts_that_differ_or_lack)
{
    char *folder = fixture_folder();
    struct model *model = NULL;
    struct family_recipe recipe = mixtral;
    recipe.splits_experts = 1;
    recipe.skip_tensor = "blk.1.ffn_up.2.weight";
    cr_expect_eq(model_open(&model, family_write(folder, &recipe, 1), NULL, NULL, NULL), CORRUPT);
    cr_expect_not_null(strstr(odsi_err_text(), "blk.1.ffn_up.2.weight is missing"), "%s",
                       odsi_err_text());
    recipe.skip_tensor = "blk.1.ffn_up.0.weight";
    cr_expect_eq(model_open(&model, family_write(folder, &recipe, 1), NULL, NULL, NULL), CORRUPT);
    cr_expect_not_null(strstr(odsi_err_text(), "blk.1.ffn_up_exps.weight is missing"), "%s",
                       odsi_err_text());
    recipe.skip_tensor = NULL;
    recipe.other_tensor = "blk.0.ffn_down.3.weight";
    recipe.other_type = TENSOR_F16;
    cr_expect_eq(model_open(&model, family_write(folder, &recipe, 1), NULL, NULL, NULL),
                 UNSUPPORTED);
    cr_expect_not_null(strstr(odsi_err_text(), "must have one type"), "%s", odsi_err_text());
    fixture_folder_remove(folder);
}

/* Goal: no changed byte of any family's header brings opening or loading to misbehave. How: bytes
 * drawn at random, several at once, in a file in memory; what opens is loaded. */
Test(arch, survives_random_damage_to_any_header, .timeout = 600)
{
    struct backend *backend = fixture_backend();
    uint64_t state = 20261123;
    uint32_t opened = 0;
    for (size_t i = 0; i < FAMILY_COUNT; i++) {
        struct buf bytes;
        char path[64];
        buf_init(&bytes, 8u << 20);
        family_part(&bytes, &families[i].recipe, 0, 1);
        const size_t header = bytes.size < 16384 ? bytes.size : 16384;
        const int fd = memfd_create("model", MFD_CLOEXEC);
        cr_assert(fd >= 0 && write(fd, bytes.data, bytes.size) == (ssize_t)bytes.size);
        snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
        for (uint32_t round = 0; round < 150; round++) {
            struct model *model = NULL;
            struct model_span *span = NULL;
            const uint64_t at = fixture_random(&state) % header;
            const uint8_t other = (uint8_t)fixture_random(&state);
            cr_assert_eq(pwrite(fd, &other, 1, (off_t)at), 1);
            enum odsi_err err = model_open(&model, path, NULL, NULL, NULL);
            if (err == ODSI_OK) {
                const struct model_params *p = model_params_view(model);
                err = model_span_open(&span, model, backend, 0, p->layer_count, 1, NULL, NULL);
                opened += err == ODSI_OK;
            }
            cr_expect(err == ODSI_OK || err == CORRUPT || err == UNSUPPORTED ||
                          err == ODSI_ERR_INVALID,
                      "case %zu, seed 20261123, byte %" PRIu64 ": %s", i, at, odsi_err_text());
            model_span_close(&span);
            model_close(&model);
            cr_assert_eq(pwrite(fd, &bytes.data[at], 1, (off_t)at), 1);
        }
        close(fd);
        buf_free(&bytes);
    }
    cr_expect(opened > 100, "%" PRIu32, opened);
    backend_close(&backend);
}
