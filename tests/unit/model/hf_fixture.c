#include "tests/unit/model/hf_fixture.h"

#include "kernels/det.h"
#include "tests/unit/model/model_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#define FOLDER_SIZE_MAX (8u << 20)

const struct hf_fixture_family hf_fixture_families[] = {
    {.architecture = "LlamaForCausalLM",
     .config = "\"rope_theta\": 5e5, \"rope_scaling\": {\"rope_type\": \"llama3\", \"factor\": 8.0,"
               "\"low_freq_factor\": 1.0, \"high_freq_factor\": 4.0,"
               "\"original_max_position_embeddings\": 64}, \"tie_word_embeddings\": true",
     .permutes = 1},
    {.architecture = "MistralForCausalLM",
     .config = "\"sliding_window\": 24",
     .has_output = 1,
     .permutes = 1},
    {.architecture = "MixtralForCausalLM",
     .config = "\"num_local_experts\": 4, \"num_experts_per_tok\": 2",
     .experts = "block_sparse_moe",
     .has_output = 1,
     .permutes = 1},
    {.architecture = "Qwen2ForCausalLM",
     .config = "\"use_sliding_window\": false, \"sliding_window\": 32, \"max_window_layers\": 2,"
               "\"tie_word_embeddings\": true",
     .has_bias = 1},
    {.architecture = "Qwen3ForCausalLM",
     .config = "\"rope_theta\": 1e6",
     .has_qk_norm = 1,
     .has_output = 1},
    {.architecture = "Qwen3MoeForCausalLM",
     .config = "\"num_experts\": 4, \"num_experts_per_tok\": 2, \"norm_topk_prob\": true,"
               "\"moe_intermediate_size\": 64, \"decoder_sparse_step\": 1, \"mlp_only_layers\": []",
     .has_qk_norm = 1,
     .experts = "mlp",
     .has_output = 1},
    {.architecture = "Gemma2ForCausalLM",
     .config = "\"sliding_window\": 24, \"query_pre_attn_scalar\": 16,"
               "\"attn_logit_softcapping\": 20.0, \"final_logit_softcapping\": 10.0",
     .is_gemma = 1},
    {.architecture = "Gemma3ForCausalLM",
     .config = "\"sliding_window\": 24, \"sliding_window_pattern\": 3, \"rope_theta\": 1e6,"
               "\"rope_local_base_freq\": 1e4, \"query_pre_attn_scalar\": 16,"
               "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 8.0}",
     .is_gemma = 1,
     .has_qk_norm = 1},
    {.architecture = "Gemma3ForConditionalGeneration",
     .config = "\"sliding_window\": 24, \"query_pre_attn_scalar\": 16",
     .is_gemma = 1,
     .has_qk_norm = 1,
     .in_vision = 1},
    {.architecture = "Phi3ForCausalLM",
     .config = "\"partial_rotary_factor\": 0.5, \"original_max_position_embeddings\": 32,"
               "\"rope_scaling\": {\"type\": \"longrope\", \"short_factor\": [1, 1, 1, 1],"
               "\"long_factor\": [1, 1.5, 2.25, 3.375]}, \"sliding_window\": null",
     .is_fused = 1,
     .has_output = 1},
    {.architecture = NULL},
};

/* ---- tensors --------------------------------------------------------------------------------- */

struct list {
    const struct hf_fixture_family *family;
    struct hf_fixture_tensor *tensors;
    uint32_t count;
};

/* rows 0: a vector. */
static void put(struct list *list, const char *name, const char *canonical, uint32_t rows,
                uint32_t cols)
{
    cr_assert(list->count < HF_FIXTURE_TENSORS_MAX);
    struct hf_fixture_tensor *tensor = &list->tensors[list->count];
    snprintf(tensor->name, sizeof tensor->name, "%s%s",
             list->family->in_vision ? "language_model." : "", name);
    snprintf(tensor->canonical, sizeof tensor->canonical, "%s", canonical);
    tensor->rows = rows;
    tensor->cols = cols;
    tensor->seed = UINT64_C(1000000) * ++list->count;
    /* A norm; Gemma's files have what is added to 1. */
    tensor->base = strstr(name, "norm") && !list->family->is_gemma ? 1.0f : 0.0f;
}

static void put_in_layer(struct list *list, uint32_t layer, const char *name, const char *canonical,
                         uint32_t rows, uint32_t cols)
{
    char full[96], full_canonical[80];
    snprintf(full, sizeof full, "model.layers.%u.%s", layer, name);
    snprintf(full_canonical, sizeof full_canonical, "blk.%u.%s", layer, canonical);
    put(list, full, full_canonical, rows, cols);
}

static void put_attention(struct list *list, uint32_t layer)
{
    const uint32_t dim = HF_FIXTURE_DIM;
    const uint32_t q_dim = HF_FIXTURE_HEADS * HF_FIXTURE_HEAD_DIM;
    const uint32_t kv_dim = HF_FIXTURE_KV_HEADS * HF_FIXTURE_HEAD_DIM;
    if (list->family->is_fused) {
        put_in_layer(list, layer, "self_attn.qkv_proj.weight", "attn_qkv.weight",
                     q_dim + 2 * kv_dim, dim);
    } else {
        put_in_layer(list, layer, "self_attn.q_proj.weight", "attn_q.weight", q_dim, dim);
        put_in_layer(list, layer, "self_attn.k_proj.weight", "attn_k.weight", kv_dim, dim);
        put_in_layer(list, layer, "self_attn.v_proj.weight", "attn_v.weight", kv_dim, dim);
    }
    put_in_layer(list, layer, "self_attn.o_proj.weight", "attn_output.weight", dim, q_dim);
    if (list->family->has_bias) {
        put_in_layer(list, layer, "self_attn.q_proj.bias", "attn_q.bias", 0, q_dim);
        put_in_layer(list, layer, "self_attn.k_proj.bias", "attn_k.bias", 0, kv_dim);
        put_in_layer(list, layer, "self_attn.v_proj.bias", "attn_v.bias", 0, kv_dim);
    }
    if (list->family->has_qk_norm) {
        put_in_layer(list, layer, "self_attn.q_norm.weight", "attn_q_norm.weight", 0,
                     HF_FIXTURE_HEAD_DIM);
        put_in_layer(list, layer, "self_attn.k_norm.weight", "attn_k_norm.weight", 0,
                     HF_FIXTURE_HEAD_DIM);
    }
}

static void put_norms(struct list *list, uint32_t layer)
{
    const uint32_t dim = HF_FIXTURE_DIM;
    put_in_layer(list, layer, "input_layernorm.weight", "attn_norm.weight", 0, dim);
    if (!list->family->is_gemma) {
        put_in_layer(list, layer, "post_attention_layernorm.weight", "ffn_norm.weight", 0, dim);
        return;
    }
    put_in_layer(list, layer, "post_attention_layernorm.weight", "post_attention_norm.weight", 0,
                 dim);
    put_in_layer(list, layer, "pre_feedforward_layernorm.weight", "ffn_norm.weight", 0, dim);
    put_in_layer(list, layer, "post_feedforward_layernorm.weight", "post_ffw_norm.weight", 0, dim);
}

static void put_experts(struct list *list, uint32_t layer)
{
    const char *where = list->family->experts;
    const int mixtral = strcmp(where, "block_sparse_moe") == 0;
    char name[64], canonical[64];
    snprintf(name, sizeof name, "%s.gate.weight", where);
    put_in_layer(list, layer, name, "ffn_gate_inp.weight", HF_FIXTURE_EXPERTS, HF_FIXTURE_DIM);
    for (uint32_t i = 0; i < HF_FIXTURE_EXPERTS; i++) {
        snprintf(name, sizeof name, "%s.experts.%u.%s.weight", where, i,
                 mixtral ? "w1" : "gate_proj");
        snprintf(canonical, sizeof canonical, "ffn_gate.%u.weight", i);
        put_in_layer(list, layer, name, canonical, HF_FIXTURE_FFN, HF_FIXTURE_DIM);
        snprintf(name, sizeof name, "%s.experts.%u.%s.weight", where, i,
                 mixtral ? "w3" : "up_proj");
        snprintf(canonical, sizeof canonical, "ffn_up.%u.weight", i);
        put_in_layer(list, layer, name, canonical, HF_FIXTURE_FFN, HF_FIXTURE_DIM);
        snprintf(name, sizeof name, "%s.experts.%u.%s.weight", where, i,
                 mixtral ? "w2" : "down_proj");
        snprintf(canonical, sizeof canonical, "ffn_down.%u.weight", i);
        put_in_layer(list, layer, name, canonical, HF_FIXTURE_DIM, HF_FIXTURE_FFN);
    }
}

static void put_ffn(struct list *list, uint32_t layer)
{
    const uint32_t dim = HF_FIXTURE_DIM, ffn = HF_FIXTURE_FFN;
    if (list->family->is_fused) {
        put_in_layer(list, layer, "mlp.gate_up_proj.weight", "ffn_up.weight", 2 * ffn, dim);
    } else {
        put_in_layer(list, layer, "mlp.gate_proj.weight", "ffn_gate.weight", ffn, dim);
        put_in_layer(list, layer, "mlp.up_proj.weight", "ffn_up.weight", ffn, dim);
    }
    put_in_layer(list, layer, "mlp.down_proj.weight", "ffn_down.weight", dim, ffn);
}

uint32_t hf_fixture_tensors(const struct hf_fixture_family *family, struct hf_fixture_tensor *out)
{
    struct list list = {.family = family, .tensors = out};
    put(&list, "model.embed_tokens.weight", "token_embd.weight", HF_FIXTURE_VOCAB, HF_FIXTURE_DIM);
    put(&list, "model.norm.weight", "output_norm.weight", 0, HF_FIXTURE_DIM);
    if (family->has_output)
        put(&list, "lm_head.weight", "output.weight", HF_FIXTURE_VOCAB, HF_FIXTURE_DIM);
    for (uint32_t layer = 0; layer < HF_FIXTURE_LAYERS; layer++) {
        put_norms(&list, layer);
        put_attention(&list, layer);
        if (family->experts)
            put_experts(&list, layer);
        else
            put_ffn(&list, layer);
    }
    return list.count;
}

float hf_fixture_value(const struct hf_fixture_tensor *tensor, uint64_t i)
{
    uint64_t state = tensor->seed + i;
    const int32_t drawn = (int32_t)(fixture_random(&state) % 255) - 127;
    if (tensor->base == 1.0f)
        return 1.0f + (float)(drawn / 2) / 128.0f;
    return (float)drawn / (tensor->rows ? 256.0f : 1024.0f);
}

/* ---- files ----------------------------------------------------------------------------------- */

static const char *dtype_name(enum hf_fixture_dtype dtype)
{
    return dtype == HF_FIXTURE_F32 ? "F32" : dtype == HF_FIXTURE_F16 ? "F16" : "BF16";
}

static void put_value(struct buf *out, enum hf_fixture_dtype dtype, float value)
{
    if (dtype == HF_FIXTURE_F32) {
        (void)buf_append_u32(out, det_bits(value));
        return;
    }
    const uint32_t bits = dtype == HF_FIXTURE_F16 ? det_f16_from_f32(value) : det_bits(value) >> 16;
    const uint8_t bytes[2] = {(uint8_t)bits, (uint8_t)(bits >> 8)};
    (void)buf_append(out, bytes, sizeof bytes);
}

static int is(const char *a, const char *b)
{
    return b && strcmp(a, b) == 0;
}

static void put_description(struct buf *header, const char *name, const char *dtype, uint32_t rows,
                            uint32_t cols, size_t begin, size_t end)
{
    (void)buf_printf(header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[", header->size > 1 ? "," : "",
                     name, dtype);
    if (rows)
        (void)buf_printf(header, "%u,", rows);
    (void)buf_printf(header, "%u],\"data_offsets\":[%zu,%zu]}", cols, begin, end);
}

/* Part `part` of part_count: every part_count-th tensor. */
static void put_part(struct buf *out, const struct hf_fixture_family *family,
                     const struct hf_fixture_recipe *recipe, uint32_t part, uint32_t part_count)
{
    struct hf_fixture_tensor tensors[HF_FIXTURE_TENSORS_MAX];
    struct buf header, data;
    const uint32_t count = hf_fixture_tensors(family, tensors);
    buf_init(&header, FOLDER_SIZE_MAX);
    buf_init(&data, FOLDER_SIZE_MAX);
    (void)buf_append_text(&header, "{");
    for (uint32_t i = part; i < count; i += part_count) {
        const uint64_t size = (uint64_t)(tensors[i].rows ? tensors[i].rows : 1) * tensors[i].cols;
        const size_t begin = data.size;
        if (is(tensors[i].name, recipe->skip_tensor))
            continue;
        for (uint64_t at = 0; at < size; at++)
            put_value(&data, recipe->dtype, hf_fixture_value(&tensors[i], at));
        put_description(&header, tensors[i].name, dtype_name(recipe->dtype), tensors[i].rows,
                        tensors[i].cols, begin, data.size);
    }
    if (recipe->extra_tensor && part == 0) {
        const char *dtype = recipe->extra_dtype ? recipe->extra_dtype : "F32";
        const size_t begin = data.size;
        fixture_zeros(&data, HF_FIXTURE_DIM * (strcmp(dtype, "F32") == 0 ? 4 : 1));
        put_description(&header, recipe->extra_tensor, dtype, 0, HF_FIXTURE_DIM, begin, data.size);
    }
    (void)buf_append_text(&header, ",\"__metadata__\":{\"format\":\"pt\"}}");
    while (header.size % 8 != 0)
        (void)buf_append_text(&header, " ");
    (void)buf_append_u64(out, header.size);
    (void)buf_append(out, header.data, header.size);
    (void)buf_append(out, data.data, data.size);
    cr_assert_eq(buf_status(out), ODSI_OK);
    buf_free(&header);
    buf_free(&data);
}

static void part_name(char out[64], uint32_t part, uint32_t part_count)
{
    snprintf(out, 64, "model-%05u-of-%05u.safetensors", part + 1, part_count);
}

static void put_index(struct buf *out, const struct hf_fixture_family *family,
                      const struct hf_fixture_recipe *recipe)
{
    struct hf_fixture_tensor tensors[HF_FIXTURE_TENSORS_MAX];
    const uint32_t count = hf_fixture_tensors(family, tensors);
    int first = 1;
    (void)buf_append_text(out, "{\"metadata\":{\"total_size\":1},\"weight_map\":{");
    for (uint32_t i = 0; i < count; i++) {
        char name[64];
        part_name(name, i % recipe->part_count, recipe->part_count);
        if (is(tensors[i].name, recipe->unlisted))
            continue;
        (void)buf_printf(out, "%s\"%s\":\"%s\"", first ? "" : ",", tensors[i].name,
                         recipe->part_name && i + 1 == count ? recipe->part_name : name);
        first = 0;
    }
    (void)buf_append_text(out, "}}");
}

static void write_weights(const char *folder, const struct hf_fixture_family *family,
                          const struct hf_fixture_recipe *recipe)
{
    const uint32_t part_count = recipe->part_count > 1 ? recipe->part_count : 1;
    struct buf file;
    buf_init(&file, FOLDER_SIZE_MAX);
    for (uint32_t part = 0; part < part_count; part++) {
        char name[64] = "model.safetensors";
        if (recipe->part_count > 0)
            part_name(name, part, part_count);
        buf_reset(&file);
        put_part(&file, family, recipe, part, part_count);
        fixture_write(fixture_path(folder, name), &file);
    }
    if (recipe->part_count > 0) {
        buf_reset(&file);
        put_index(&file, family, recipe);
        fixture_write(fixture_path(folder, "model.safetensors.index.json"), &file);
    }
    buf_free(&file);
}

void hf_fixture_config(struct buf *out, const struct hf_fixture_family *family, const char *more)
{
    (void)buf_printf(out, "{\"architectures\": [\"%s\"], ", family->architecture);
    if (family->in_vision)
        (void)buf_append_text(out, "\"image_token_index\": 5, \"vision_config\": {}, "
                                   "\"text_config\": {");
    (void)buf_printf(out,
                     "\"vocab_size\": %u, \"hidden_size\": %u, \"num_hidden_layers\": %u, "
                     "\"num_attention_heads\": %u, \"num_key_value_heads\": %u, \"head_dim\": %u, "
                     "\"intermediate_size\": %u, \"max_position_embeddings\": %u, %s",
                     HF_FIXTURE_VOCAB, HF_FIXTURE_DIM, HF_FIXTURE_LAYERS, HF_FIXTURE_HEADS,
                     HF_FIXTURE_KV_HEADS, HF_FIXTURE_HEAD_DIM, HF_FIXTURE_FFN, HF_FIXTURE_CONTEXT,
                     family->config);
    if (more)
        (void)buf_printf(out, ", %s", more);
    (void)buf_append_text(out, family->in_vision ? "}}" : "}");
}

/* The character that stands for a byte: itself when it is printable, else one from U+0100 on. */
static void put_byte_character(struct buf *out, uint32_t byte, uint32_t *next)
{
    const int shown = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte != 0xad);
    const uint32_t code = shown ? byte : 0x100 + (*next)++;
    if (code == '"' || code == '\\')
        (void)buf_printf(out, "\\%c", (char)code);
    else
        (void)buf_printf(out, "\\u%04x", code);
}

void hf_fixture_tokenizer(struct buf *out)
{
    uint32_t next = 0;
    (void)buf_append_text(
        out, "{\"added_tokens\": [{\"id\": 259, \"content\": \"<s>\", \"special\": true}],"
             "\"normalizer\": null, \"post_processor\": null,"
             "\"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false,"
             "\"trim_offsets\": true, \"use_regex\": true}, \"decoder\": {\"type\": \"ByteLevel\"},"
             "\"model\": {\"type\": \"BPE\", \"merges\": [\"a b\", [\"c\", \"d\"], \"ab cd\"],"
             "\"vocab\": {");
    for (uint32_t byte = 0; byte < 256; byte++) {
        (void)buf_append_text(out, byte ? ",\"" : "\"");
        put_byte_character(out, byte, &next);
        (void)buf_printf(out, "\": %u", byte);
    }
    (void)buf_append_text(out, ",\"ab\": 256, \"cd\": 257, \"abcd\": 258}}}");
}

void hf_fixture_write(const char *folder, const struct hf_fixture_family *family,
                      const struct hf_fixture_recipe *recipe)
{
    struct buf text;
    buf_init(&text, FOLDER_SIZE_MAX);
    hf_fixture_config(&text, family, recipe->config);
    fixture_write(fixture_path(folder, "config.json"), &text);
    buf_reset(&text);
    hf_fixture_tokenizer(&text);
    fixture_write(fixture_path(folder, "tokenizer.json"), &text);
    buf_free(&text);
    write_weights(folder, family, recipe);
}
