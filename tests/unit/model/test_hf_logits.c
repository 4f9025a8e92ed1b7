#include "common/base/alloc.h"
#include "kernels/det.h"
#include "tests/unit/model/hf_fixture.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/engine/engine.h"
#include "worker/model/gguf_writer.h"
#include "worker/model/source.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define TOKENS 41u /* beyond the windows of 24 of the fixtures */

/* ---- the same model as GGUF ------------------------------------------------------------------ */

/* What a GGUF file calls the family, and the metadata that not all have. */
struct form {
    const char *architecture; /* of the folder */
    const char *name;
    void (*keys)(struct gguf_writer *writer, const struct model_params *p);
};

static void put_mistral(struct gguf_writer *writer, const struct model_params *p)
{
    gguf_writer_u32(writer, "llama.attention.sliding_window", p->window);
}

static void put_mixtral(struct gguf_writer *writer, const struct model_params *p)
{
    gguf_writer_u32(writer, "llama.expert_count", p->expert_count);
    gguf_writer_u32(writer, "llama.expert_used_count", p->expert_used_count);
}

static void put_qwen3_moe(struct gguf_writer *writer, const struct model_params *p)
{
    gguf_writer_u32(writer, "qwen3moe.expert_count", p->expert_count);
    gguf_writer_u32(writer, "qwen3moe.expert_used_count", p->expert_used_count);
    gguf_writer_u32(writer, "qwen3moe.expert_feed_forward_length", p->ffn_dim);
}

static void put_gemma2(struct gguf_writer *writer, const struct model_params *p)
{
    gguf_writer_u32(writer, "gemma2.attention.sliding_window", p->window);
    gguf_writer_f32(writer, "gemma2.attn_logit_softcapping", p->attention_softcap);
    gguf_writer_f32(writer, "gemma2.final_logit_softcapping", p->logit_softcap);
}

static void put_gemma3(struct gguf_writer *writer, const struct model_params *p)
{
    gguf_writer_u32(writer, "gemma3.attention.sliding_window", p->window);
    gguf_writer_u32(writer, "gemma3.attention.sliding_window_pattern",
                    p->window_period ? p->window_period : 6);
    gguf_writer_text(writer, "gemma3.rope.scaling.type", "linear");
    gguf_writer_f32(writer, "gemma3.rope.scaling.factor", p->rope_linear);
}

static void put_phi3(struct gguf_writer *writer, const struct model_params *p)
{
    gguf_writer_u32(writer, "phi3.rope.scaling.original_context_length", 32);
    gguf_writer_text(writer, "phi3.rope.scaling.type", "longrope");
    gguf_writer_f32(writer, "phi3.rope.scaling.attn_factor", p->rope_amplitude);
}

static const struct form forms[] = {
    {"LlamaForCausalLM", "llama", NULL},
    {"MistralForCausalLM", "llama", put_mistral},
    {"MixtralForCausalLM", "llama", put_mixtral},
    {"Qwen2ForCausalLM", "qwen2", NULL},
    {"Qwen3ForCausalLM", "qwen3", NULL},
    {"Qwen3MoeForCausalLM", "qwen3moe", put_qwen3_moe},
    {"Gemma2ForCausalLM", "gemma2", put_gemma2},
    {"Gemma3ForCausalLM", "gemma3", put_gemma3},
    {"Gemma3ForConditionalGeneration", "gemma3", put_gemma3},
    {"Phi3ForCausalLM", "phi3", put_phi3},
};

static void put_u32(struct gguf_writer *writer, const char *name, const char *key, uint32_t value)
{
    char whole[96];
    snprintf(whole, sizeof whole, "%s.%s", name, key);
    gguf_writer_u32(writer, whole, value);
}

static void put_f32(struct gguf_writer *writer, const char *name, const char *key, float value)
{
    char whole[96];
    snprintf(whole, sizeof whole, "%s.%s", name, key);
    gguf_writer_f32(writer, whole, value);
}

static void put_keys(struct gguf_writer *writer, const struct form *form,
                     const struct model_params *p)
{
    gguf_writer_text(writer, "general.architecture", form->name);
    put_u32(writer, form->name, "context_length", p->context_length);
    put_u32(writer, form->name, "embedding_length", p->dim);
    put_u32(writer, form->name, "block_count", p->layer_count);
    put_u32(writer, form->name, "feed_forward_length", HF_FIXTURE_FFN);
    put_u32(writer, form->name, "attention.head_count", p->head_count);
    put_u32(writer, form->name, "attention.head_count_kv", p->kv_head_count);
    put_u32(writer, form->name, "attention.key_length", p->head_dim);
    put_u32(writer, form->name, "attention.value_length", p->head_dim);
    put_u32(writer, form->name, "rope.dimension_count", p->rope_dim);
    put_f32(writer, form->name, "attention.layer_norm_rms_epsilon", p->rms_eps);
    put_f32(writer, form->name, "rope.freq_base", p->rope_base);
    if (form->keys)
        form->keys(writer, p);
}

/* <unk>, <s>, </s>, the bytes, and padding. */
static void put_tokens(struct gguf_writer *writer)
{
    gguf_writer_text(writer, "tokenizer.ggml.model", "llama");
    gguf_writer_array(writer, "tokenizer.ggml.tokens", GGUF_TEXT, HF_FIXTURE_VOCAB);
    for (uint32_t id = 0; id < HF_FIXTURE_VOCAB; id++) {
        char piece[16];
        if (id < 3)
            snprintf(piece, sizeof piece, "%s", id == 0 ? "<unk>" : id == 1 ? "<s>" : "</s>");
        else if (id < 259)
            snprintf(piece, sizeof piece, "<0x%02X>", id - 3);
        else
            snprintf(piece, sizeof piece, "<unused%u>", id);
        gguf_writer_item_text(writer, piece, strlen(piece));
    }
    gguf_writer_array(writer, "tokenizer.ggml.scores", GGUF_F32, HF_FIXTURE_VOCAB);
    for (uint32_t id = 0; id < HF_FIXTURE_VOCAB; id++)
        gguf_writer_item_u32(writer, 0);
    gguf_writer_array(writer, "tokenizer.ggml.token_type", GGUF_I32, HF_FIXTURE_VOCAB);
    for (uint32_t id = 0; id < HF_FIXTURE_VOCAB; id++)
        gguf_writer_item_u32(writer, id == 0 ? 2 : id < 3 ? 3 : id < 259 ? 6 : 5);
}

/* Which row of the folder's matrix is row `row` of the file's: neighbours turn together in the
 * files of llama, halves in the folder. */
static uint64_t row_from(const struct hf_fixture_family *family,
                         const struct hf_fixture_tensor *tensor, uint64_t row)
{
    const uint64_t half = HF_FIXTURE_HEAD_DIM / 2;
    const uint64_t in_head = row % HF_FIXTURE_HEAD_DIM;
    const int turns =
        strstr(tensor->canonical, "attn_q.weight") || strstr(tensor->canonical, "attn_k.weight");
    if (!family->permutes || !turns)
        return row;
    return row - in_head + in_head % 2 * half + in_head / 2;
}

static void write_data(struct gguf_writer *writer, const struct hf_fixture_family *family,
                       const struct hf_fixture_tensor *tensor, enum tensor_type type)
{
    const uint64_t rows = tensor->rows ? tensor->rows : 1;
    const int adds_one = family->is_gemma && !tensor->rows;
    struct buf data;
    buf_init(&data, 1u << 20);
    for (uint64_t row = 0; row < rows; row++)
        for (uint64_t col = 0; col < tensor->cols; col++) {
            const uint64_t at = row_from(family, tensor, row) * tensor->cols + col;
            const uint32_t bits = det_bits(hf_fixture_value(tensor, at) + (adds_one ? 1.0f : 0.0f));
            if (!tensor->rows || type == TENSOR_F32)
                (void)buf_append_u32(&data, bits);
            else
                (void)buf_append(&data, (const uint8_t[]){(uint8_t)(bits >> 16), bits >> 24}, 2);
        }
    cr_assert_eq(buf_status(&data), ODSI_OK);
    cr_assert_eq(gguf_writer_data(writer, data.data, data.size), ODSI_OK, "%s", odsi_err_text());
    buf_free(&data);
}

/* The factors of the rotation, which the folder's config says. */
static const struct source_tensor *factors_of(const struct source *source)
{
    for (uint32_t i = 0; i < source->tensor_count; i++)
        if (strcmp(source->tensors[i].name, "rope_freqs.weight") == 0)
            return &source->tensors[i];
    return NULL;
}

static void write_gguf(const char *path, const struct form *form,
                       const struct hf_fixture_family *family, const char *folder,
                       enum tensor_type type)
{
    struct hf_fixture_tensor tensors[HF_FIXTURE_TENSORS_MAX];
    const uint32_t count = hf_fixture_tensors(family, tensors);
    struct gguf_writer *writer = NULL;
    struct source *source = NULL;
    cr_assert_eq(source_open(&source, folder), ODSI_OK, "%s", odsi_err_text());
    const struct source_tensor *factors = factors_of(source);
    cr_assert_eq(gguf_writer_open(&writer, path, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    put_keys(writer, form, &source->params);
    put_tokens(writer);
    if (factors)
        gguf_writer_tensor(writer,
                           family->is_fused ? "rope_factors_long.weight" : "rope_freqs.weight",
                           TENSOR_F32, 1, factors->dims);
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t dims[4] = {tensors[i].cols, tensors[i].rows, 1, 1};
        gguf_writer_tensor(writer, tensors[i].canonical, tensors[i].rows ? type : TENSOR_F32,
                           tensors[i].rows ? 2 : 1, dims);
    }
    cr_assert_eq(gguf_writer_begin(writer), ODSI_OK, "%s", odsi_err_text());
    if (factors) {
        uint8_t bytes[256];
        cr_assert(factors->size <= sizeof bytes);
        cr_assert_eq(source_read(source, factors, 0, bytes, factors->size), ODSI_OK);
        cr_assert_eq(gguf_writer_data(writer, bytes, factors->size), ODSI_OK);
    }
    for (uint32_t i = 0; i < count; i++)
        write_data(writer, family, &tensors[i], type);
    cr_assert_eq(gguf_writer_finish(writer), ODSI_OK, "%s", odsi_err_text());
    gguf_writer_close(&writer);
    source_close(&source);
}

/* ---- running --------------------------------------------------------------------------------- */

static void run_model(const char *path, float logits[HF_FIXTURE_VOCAB])
{
    struct model *model = NULL;
    struct model_span *span = NULL;
    struct engine *engine = NULL;
    struct engine_session *session = NULL;
    struct backend *backend = fixture_backend();
    const struct engine_config config = {.kv_size = 1};
    uint32_t tokens[TOKENS];
    uint64_t seed = 5;
    cr_assert_eq(model_open(&model, path, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(model_span_open(&span, model, backend, 0, HF_FIXTURE_LAYERS, HF_FIXTURE_CONTEXT,
                                 NULL, NULL),
                 ODSI_OK, "%s: %s", path, odsi_err_text());
    cr_assert_eq(engine_open(&engine, span, &config), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(engine_session_open(&session, engine, 0, HF_FIXTURE_LAYERS, TOKENS), ODSI_OK, "%s",
                 odsi_err_text());
    for (uint32_t i = 0; i < TOKENS; i++)
        tokens[i] = (uint32_t)(fixture_random(&seed) % HF_FIXTURE_VOCAB);
    struct engine_step step = {
        .session = session, .token_count = TOKENS, .tokens = tokens, .logits = logits};
    cr_assert_eq(engine_run(engine, &step, 1), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(step.status, ODSI_OK, "%s", path);
    engine_session_close(&session);
    engine_close(&engine);
    model_span_close(&span);
    model_close(&model);
    backend_close(&backend);
}

static void run_folder(const struct hf_fixture_family *family, enum hf_fixture_dtype dtype,
                       uint32_t part_count, float logits[HF_FIXTURE_VOCAB])
{
    const struct hf_fixture_recipe recipe = {.dtype = dtype, .part_count = part_count};
    char *folder = fixture_folder();
    hf_fixture_write(folder, family, &recipe);
    run_model(folder, logits);
    fixture_folder_remove(folder);
}

static const struct hf_fixture_family *family_of(const struct form *form)
{
    const struct hf_fixture_family *family = hf_fixture_families;
    while (strcmp(family->architecture, form->architecture) != 0)
        family++;
    return family;
}

static float spread_of(const float logits[HF_FIXTURE_VOCAB])
{
    float low = logits[0], high = logits[0];
    for (uint32_t i = 1; i < HF_FIXTURE_VOCAB; i++) {
        low = logits[i] < low ? logits[i] : low;
        high = logits[i] > high ? logits[i] : high;
    }
    return high - low;
}

/* ---- claims ---------------------------------------------------------------------------------- */

/* Goal: a folder and the GGUF file made of the same weights are one model.
 * How: every family in F32 and in BF16, 41 tokens through all layers. Bit for bit, but for the
 * families whose GGUF files have the rows of q and k in another order: there the sum of a score is
 * another sum of the same terms. */
Test(hf_logits, are_those_of_the_same_weights_in_gguf)
{
    for (size_t i = 0; i < 2 * (sizeof forms / sizeof forms[0]); i++) {
        const struct form *form = &forms[i / 2];
        const struct hf_fixture_family *family = family_of(form);
        const struct hf_fixture_recipe recipe = {.dtype = i % 2 ? HF_FIXTURE_BF16 : HF_FIXTURE_F32};
        float from_folder[HF_FIXTURE_VOCAB], from_file[HF_FIXTURE_VOCAB];
        char *folder = fixture_folder(), *other = fixture_folder();
        hf_fixture_write(folder, family, &recipe);
        write_gguf(fixture_path(other, "a.gguf"), form, family, folder,
                   i % 2 ? TENSOR_BF16 : TENSOR_F32);
        run_model(folder, from_folder);
        run_model(fixture_path(other, "a.gguf"), from_file);
        const float spread = spread_of(from_folder);
        cr_expect(spread > 0.1f, "%s: logits that hardly differ show nothing", form->architecture);
        if (!family->permutes)
            cr_expect_arr_eq(from_folder, from_file, sizeof from_folder, "%s", form->architecture);
        for (uint32_t id = 0; id < HF_FIXTURE_VOCAB; id++)
            cr_expect(fabsf(from_folder[id] - from_file[id]) <= 1e-4f * spread, "%s: %u: %g, %g",
                      form->architecture, id, (double)from_folder[id], (double)from_file[id]);
        fixture_folder_remove(folder);
        fixture_folder_remove(other);
    }
}

/* Goal: the type of the weights changes nothing where they hold the same numbers, nor do parts. */
Test(hf_logits, are_the_same_for_the_same_numbers_in_every_type)
{
    for (const struct hf_fixture_family *family = hf_fixture_families; family->architecture;
         family++) {
        float f32[HF_FIXTURE_VOCAB], f16[HF_FIXTURE_VOCAB], bf16[HF_FIXTURE_VOCAB];
        run_folder(family, HF_FIXTURE_F32, 0, f32);
        run_folder(family, HF_FIXTURE_F16, 0, f16);
        run_folder(family, HF_FIXTURE_BF16, 3, bf16);
        cr_expect_arr_eq(f32, f16, sizeof f32, "%s", family->architecture);
        cr_expect_arr_eq(f32, bf16, sizeof f32, "%s", family->architecture);
    }
}

/* Goal: every member that should change what is computed does.
 * How: one change to a family's config, and other logits. */
Test(hf_logits, depend_on_what_the_config_says)
{
    static const struct {
        const char *architecture;
        const char *config;
    } changes[] = {
        {"Qwen3ForCausalLM", "\"rms_norm_eps\": 0.1"},
        {"Qwen3ForCausalLM", "\"tie_word_embeddings\": true"},
        {"Qwen3MoeForCausalLM", "\"rope_theta\": 20.0"},
        {"MistralForCausalLM", "\"rope_theta\": 20.0"},
        {"MixtralForCausalLM", "\"sliding_window\": 9"},
        {"Phi3ForCausalLM", "\"rope_theta\": 20.0"},
    };
    for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
        const struct form form = {.architecture = changes[i].architecture};
        const struct hf_fixture_recipe changed = {.config = changes[i].config};
        float plain[HF_FIXTURE_VOCAB], other[HF_FIXTURE_VOCAB];
        char *folder = fixture_folder();
        run_folder(family_of(&form), HF_FIXTURE_F32, 0, plain);
        hf_fixture_write(folder, family_of(&form), &changed);
        run_model(folder, other);
        cr_expect_neq(memcmp(plain, other, sizeof plain), 0, "%s: %s", changes[i].architecture,
                      changes[i].config);
        fixture_folder_remove(folder);
    }
}
