#include "common/base/alloc.h"
#include "kernels/det.h"
#include "tests/unit/model/hf_fixture.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/source.h"
#include "worker/model/tokenizer.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const enum tensor_type types[] = {
    [HF_FIXTURE_F32] = TENSOR_F32, [HF_FIXTURE_F16] = TENSOR_F16, [HF_FIXTURE_BF16] = TENSOR_BF16};

static const struct hf_fixture_family *family_of(const char *architecture)
{
    const struct hf_fixture_family *family = hf_fixture_families;
    while (family->architecture && strcmp(family->architecture, architecture) != 0)
        family++;
    cr_assert_not_null(family->architecture, "%s", architecture);
    return family;
}

static const struct source_tensor *find(const struct source *source, const char *name)
{
    for (uint32_t i = 0; i < source->tensor_count; i++)
        if (strcmp(source->tensors[i].name, name) == 0)
            return &source->tensors[i];
    return NULL;
}

/* ---- what is read ---------------------------------------------------------------------------- */

static float value_at(const uint8_t *bytes, enum tensor_type type, uint64_t i)
{
    const uint64_t at = i * (type == TENSOR_F32 ? 4 : 2);
    const uint32_t low = (uint32_t)bytes[at] | (uint32_t)bytes[at + 1] << 8;
    if (type == TENSOR_F32)
        return det_from_bits(low | (uint32_t)bytes[at + 2] << 16 | (uint32_t)bytes[at + 3] << 24);
    return type == TENSOR_F16 ? det_f32_from_f16((uint16_t)low) : det_f32_from_bf16((uint16_t)low);
}

static void expect_tensor(const struct source *source, const struct hf_fixture_tensor *want,
                          enum tensor_type type)
{
    uint8_t bytes[65536];
    uint64_t differing = 0;
    const struct source_tensor *tensor = find(source, want->canonical);
    const uint64_t count = (uint64_t)(want->rows ? want->rows : 1) * want->cols;
    cr_assert_not_null(tensor, "%s", want->canonical);
    cr_expect_eq(tensor->type, type);
    cr_expect_eq(tensor->dim_count, want->rows ? 2 : 1, "%s", want->name);
    cr_expect_eq(tensor->dims[0], want->cols, "%s", want->name);
    cr_expect_eq(tensor->dims[1], want->rows ? want->rows : 1, "%s", want->name);
    cr_expect(tensor->dims[2] == 1 && tensor->dims[3] == 1);
    cr_assert_eq(tensor->size, count * (type == TENSOR_F32 ? 4 : 2), "%s", want->name);
    cr_assert(tensor->size <= sizeof bytes);
    cr_assert_eq(source_read(source, tensor, 0, bytes, tensor->size), ODSI_OK);
    for (uint64_t i = 0; i < count; i++)
        differing += value_at(bytes, type, i) != hf_fixture_value(want, i);
    cr_expect_eq(differing, 0, "%s: %llu of %llu numbers differ", want->name,
                 (unsigned long long)differing, (unsigned long long)count);
}

static void expect_factors(const struct source *source)
{
    const struct source_tensor *factors = find(source, "rope_freqs.weight");
    const uint32_t count = source->params.rope_dim / 2;
    uint8_t bytes[256];
    if (!(source->params.features & MODEL_ROPE_FACTORS)) {
        cr_expect_null(factors);
        return;
    }
    cr_assert_not_null(factors);
    cr_expect_eq(factors->file, SOURCE_IN_MEMORY);
    cr_expect_eq(factors->dims[0], count);
    cr_assert_eq(factors->size, count * sizeof(float));
    cr_assert_eq(source_read(source, factors, 0, bytes, factors->size), ODSI_OK);
    cr_expect_eq(value_at(bytes, TENSOR_F32, 0), 1.0f);
    cr_expect(value_at(bytes, TENSOR_F32, count - 1) > 1.0f);
}

static void expect_source(const struct source *source, const struct hf_fixture_family *family,
                          enum tensor_type type)
{
    struct hf_fixture_tensor tensors[HF_FIXTURE_TENSORS_MAX];
    struct tokenizer *tokenizer = NULL;
    const uint32_t count = hf_fixture_tensors(family, tensors);
    const int has_factors = (source->params.features & MODEL_ROPE_FACTORS) != 0;
    cr_expect_eq(source->tensor_count, count + (has_factors ? 1 : 0), "%s", family->architecture);
    for (uint32_t i = 0; i < count; i++)
        expect_tensor(source, &tensors[i], type);
    for (uint32_t i = 1; i < source->tensor_count; i++)
        cr_expect(strcmp(source->tensors[i - 1].name, source->tensors[i].name) < 0);
    expect_factors(source);
    cr_expect_eq(source->params.dim, HF_FIXTURE_DIM);
    cr_expect_eq(source->params.vocab_size, HF_FIXTURE_VOCAB);
    cr_expect_eq(source->params.name[0], '\0', "the folder's name is not the model's");
    cr_assert_eq(tokenizer_open(&tokenizer, source->tokenizer.data, source->tokenizer.size),
                 ODSI_OK, "%s", odsi_err_text());
    tokenizer_close(&tokenizer);
}

/* Goal: nothing that the files hold is lost, moved or mistaken.
 * How: every family in every type, whole and in three parts; every number is read back under the
 * canonical name of its tensor. */
Test(source_hf, reads_every_family_in_every_type_whole_and_in_parts)
{
    for (const struct hf_fixture_family *family = hf_fixture_families; family->architecture;
         family++) {
        for (uint32_t dtype = HF_FIXTURE_F32; dtype <= HF_FIXTURE_BF16; dtype++) {
            const struct hf_fixture_recipe recipe = {.dtype = (enum hf_fixture_dtype)dtype,
                                                     .part_count = dtype == HF_FIXTURE_F16 ? 3 : 0};
            struct source *source = NULL;
            char *folder = fixture_folder();
            hf_fixture_write(folder, family, &recipe);
            cr_assert_eq(source_open(&source, folder), ODSI_OK, "%s: %s", family->architecture,
                         odsi_err_text());
            cr_expect_eq(source->file_count, recipe.part_count ? 3 : 1);
            expect_source(source, family, types[dtype]);
            source_close(&source);
            fixture_folder_remove(folder);
        }
    }
}

/* ---- what is refused, and what is passed over ----------------------------------------------- */

struct attempt {
    const char *architecture;
    struct hf_fixture_recipe recipe;
    enum odsi_err err;
    const char *says;
};

static void try_all(const struct attempt *attempts, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        struct source *source = NULL;
        char *folder = fixture_folder();
        hf_fixture_write(folder, family_of(attempts[i].architecture), &attempts[i].recipe);
        const enum odsi_err err = source_open(&source, folder);
        cr_expect_eq(err, attempts[i].err, "%zu: %s", i,
                     err == ODSI_OK ? "taken" : odsi_err_text());
        cr_expect_eq(source == NULL, err != ODSI_OK);
        if (err != ODSI_OK && attempts[i].says)
            cr_expect_not_null(strstr(odsi_err_text(), attempts[i].says), "%zu: %s", i,
                               odsi_err_text());
        source_close(&source);
        fixture_folder_remove(folder);
    }
}
#define TRY_ALL(attempts) try_all(attempts, sizeof(attempts) / sizeof(attempts)[0])

Test(source_hf, refuses_tensors_that_do_not_belong_there)
{
    static const struct attempt attempts[] = {
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers.0.self_attn.q_proj.bias"},
         ODSI_ERR_UNSUPPORTED,
         "model.layers.0.self_attn.q_proj.bias"},
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers.0.self_attn.q_norm.weight"},
         ODSI_ERR_UNSUPPORTED,
         "q_norm"},
        {"LlamaForCausalLM",
         {.extra_tensor = "language_model.model.norm.weight"},
         ODSI_ERR_UNSUPPORTED,
         "language_model"},
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers.00.input_layernorm.weight"},
         ODSI_ERR_UNSUPPORTED,
         "layers.00"},
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers..input_layernorm.weight"},
         ODSI_ERR_UNSUPPORTED,
         "layers.."},
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers.4294967296.input_layernorm.weight"},
         ODSI_ERR_UNSUPPORTED,
         "4294967296"},
        {"LlamaForCausalLM", {.extra_tensor = "vision_tower.x"}, ODSI_ERR_UNSUPPORTED, "vision"},
        {"Qwen3MoeForCausalLM",
         {.extra_tensor = "model.layers.0.mlp.shared_expert_gate.weight"},
         ODSI_ERR_UNSUPPORTED,
         "shared_expert_gate"},
        {"Phi3ForCausalLM", {.extra_tensor = "lm_head.bias"}, ODSI_ERR_UNSUPPORTED, "lm_head.bias"},
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers.9.input_layernorm.weight", .extra_dtype = "F8_E4M3"},
         ODSI_ERR_UNSUPPORTED,
         "F8_E4M3"},
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers.9.input_layernorm.weight", .extra_dtype = "I8"},
         ODSI_ERR_UNSUPPORTED,
         "is I8"},
        {"LlamaForCausalLM", {.extra_tensor = "model.norm.weight"}, ODSI_ERR_CORRUPT, "duplicate"},
        {"Gemma3ForConditionalGeneration",
         {.extra_tensor = "model.language_model.norm.weight"},
         ODSI_ERR_CORRUPT,
         "twice"},
        {"Qwen3ForCausalLM", {.skip_tensor = "lm_head.weight"}, ODSI_ERR_CORRUPT, "lm_head.weight"},
    };
    TRY_ALL(attempts);
}

Test(source_hf, passes_over_what_the_model_does_not_compute_with)
{
    static const struct attempt attempts[] = {
        {"LlamaForCausalLM",
         {.extra_tensor = "model.layers.3.self_attn.rotary_emb.inv_freq"},
         ODSI_OK,
         NULL},
        {"Gemma3ForConditionalGeneration", {.extra_tensor = "vision_tower.x.y"}, ODSI_OK, NULL},
        {"Gemma3ForConditionalGeneration",
         {.extra_tensor = "model.multi_modal_projector.z", .extra_dtype = "I8"},
         ODSI_OK,
         NULL},
    };
    TRY_ALL(attempts);
}

/* A tied model's file may hold the output matrix too; Hugging Face's loader does not use it. */
Test(source_hf, drops_an_output_matrix_only_where_the_config_ties_it)
{
    const struct hf_fixture_family *family = family_of("Qwen3ForCausalLM");
    for (int tied = 0; tied < 2; tied++) {
        const struct hf_fixture_recipe recipe = {.config = tied ? "\"tie_word_embeddings\": true"
                                                                : "\"tie_word_embeddings\": false"};
        struct source *source = NULL;
        char *folder = fixture_folder();
        hf_fixture_write(folder, family, &recipe);
        cr_assert_eq(source_open(&source, folder), ODSI_OK, "%s", odsi_err_text());
        cr_expect_eq(find(source, "output.weight") == NULL, tied);
        source_close(&source);
        fixture_folder_remove(folder);
    }
}

Test(source_hf, refuses_an_index_that_the_files_do_not_match)
{
    static const struct attempt attempts[] = {
        {"Qwen2ForCausalLM",
         {.part_count = 2, .unlisted = "model.norm.weight"},
         ODSI_ERR_CORRUPT,
         "model.norm.weight"},
        {"Qwen2ForCausalLM",
         {.part_count = 2, .skip_tensor = "model.norm.weight"},
         ODSI_ERR_CORRUPT,
         "no file has tensor model.norm.weight"},
        {"Qwen2ForCausalLM",
         {.part_count = 2,
          .skip_tensor = "model.layers.3.mlp.down_proj.weight",
          .part_name = "model-00003-of-00002.safetensors"},
         ODSI_ERR_NOT_FOUND,
         "model-00003"},
        {"Qwen2ForCausalLM",
         {.part_count = 2, .part_name = "model-00001-of-00002.safetensors"},
         ODSI_ERR_CORRUPT,
         "not listed for this file"},
        {"Qwen2ForCausalLM",
         {.part_count = 2, .part_name = "../x.safetensors"},
         ODSI_ERR_CORRUPT,
         "of this folder"},
        {"Qwen2ForCausalLM",
         {.part_count = 2, .part_name = "/tmp/x.safetensors"},
         ODSI_ERR_CORRUPT,
         "of this folder"},
        {"Qwen2ForCausalLM",
         {.part_count = 2, .part_name = "a/x.safetensors"},
         ODSI_ERR_CORRUPT,
         "of this folder"},
        {"Qwen2ForCausalLM",
         {.part_count = 2, .part_name = ".safetensors"},
         ODSI_ERR_CORRUPT,
         "of this folder"},
        {"Qwen2ForCausalLM",
         {.part_count = 2, .part_name = "config.json"},
         ODSI_ERR_CORRUPT,
         "of this folder"},
        {"Qwen2ForCausalLM", {.part_count = 1}, ODSI_OK, NULL},
    };
    TRY_ALL(attempts);
}

static void put_file(const char *folder, const char *name, const char *content)
{
    struct buf bytes;
    buf_init(&bytes, 4096);
    (void)buf_append_text(&bytes, content);
    fixture_write(fixture_path(folder, name), &bytes);
    buf_free(&bytes);
}

Test(source_hf, says_which_file_is_missing_or_broken)
{
    static const struct {
        const char *remove;
        const char *name;
        const char *content;
        enum odsi_err err;
        const char *says;
    } cases[] = {
        {"config.json", NULL, NULL, ODSI_ERR_NOT_FOUND, "config.json"},
        {"tokenizer.json", NULL, NULL, ODSI_ERR_NOT_FOUND, "tokenizer.json"},
        {"model.safetensors", "pytorch_model.bin", "x", ODSI_ERR_NOT_FOUND, "pytorch_model.bin"},
        {NULL, "config.json", "{\"architectures\": [\"Mamba2\"]}", ODSI_ERR_UNSUPPORTED, "Mamba2"},
        {NULL, "config.json", "{", ODSI_ERR_CORRUPT, "config.json"},
        {NULL, "model.safetensors", "", ODSI_ERR_CORRUPT, "model.safetensors"},
        {NULL, "model.safetensors", "1234567", ODSI_ERR_CORRUPT, "model.safetensors"},
        {NULL, "model.safetensors", "version https://git-lfs.github.com/spec/v1\n",
         ODSI_ERR_CORRUPT, "no safetensors file"},
        {"model.safetensors", "model.safetensors.index.json", "{}", ODSI_ERR_CORRUPT, "weight_map"},
        {"model.safetensors", "model.safetensors.index.json", "{\"weight_map\": {\"a\": 5}}",
         ODSI_ERR_CORRUPT, "of this folder"},
        {"model.safetensors", "model.safetensors.index.json", "{\"weight_map\": []}",
         ODSI_ERR_CORRUPT, "weight_map"},
        /* The lone file counts where there are both. */
        {NULL, "model.safetensors.index.json", "{}", ODSI_OK, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct hf_fixture_recipe recipe = {.dtype = HF_FIXTURE_BF16};
        struct source *source = NULL;
        char *folder = fixture_folder();
        hf_fixture_write(folder, family_of("Qwen2ForCausalLM"), &recipe);
        if (cases[i].remove)
            cr_assert_eq(unlink(fixture_path(folder, cases[i].remove)), 0);
        if (cases[i].name)
            put_file(folder, cases[i].name, cases[i].content);
        const enum odsi_err err = source_open(&source, folder);
        cr_expect_eq(err, cases[i].err, "%zu: %s", i, err == ODSI_OK ? "taken" : odsi_err_text());
        if (err != ODSI_OK)
            cr_expect_not_null(strstr(odsi_err_text(), cases[i].says), "%zu: %s", i,
                               odsi_err_text());
        source_close(&source);
        fixture_folder_remove(folder);
    }
}

/* Goal: a machine without memory gets an error, never a crash or a leak (the sanitizers look).
 * How: the n-th allocation fails, for every n until none does. */
Test(source_hf, survives_every_allocation_that_fails)
{
    const struct hf_fixture_recipe recipe = {.part_count = 2};
    struct source *source = NULL;
    long n = 0;
    char *folder = fixture_folder();
    hf_fixture_write(folder, family_of("LlamaForCausalLM"), &recipe);
    for (enum odsi_err err = ODSI_ERR_NO_MEMORY; err != ODSI_OK; n++) {
        alloc_fail_after(n);
        err = source_open(&source, folder);
        alloc_fail_after(-1);
        cr_assert(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY, "%ld: %s", n, odsi_err_text());
        cr_assert(n < 10000);
    }
    cr_expect(n > 5);
    source_close(&source);
    fixture_folder_remove(folder);
}
