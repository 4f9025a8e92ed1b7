#include "worker/model/quant_mix.h"

#include "kernels/quant.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

/* How many tensors of each type a model gets. */
struct counts {
    uint32_t of[64];
};

static void count(struct counts *out, const struct quant_mix *mix,
                  const struct quant_mix_model *model, const char *name, uint64_t rows,
                  uint64_t cols)
{
    const uint64_t dims[] = {cols, rows};
    const enum tensor_type type = quant_mix_type(mix, model, name, rows > 1 ? 2 : 1, dims);
    cr_assert((unsigned)type < 64);
    out->of[type]++;
}

static struct counts llama_7b(const char *name)
{
    static const char *const stems[] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                        "ffn_gate", "ffn_up", "ffn_down"};
    const struct quant_mix_model model = {.layer_count = 32, .head_count = 32, .kv_head_count = 32};
    const struct quant_mix *mix = quant_mix_find(name);
    struct counts out = {{0}};
    cr_assert_not_null(mix, "%s", name);
    count(&out, mix, &model, "token_embd.weight", 32000, 4096);
    count(&out, mix, &model, "output.weight", 32000, 4096);
    count(&out, mix, &model, "output_norm.weight", 1, 4096);
    for (uint32_t layer = 0; layer < 32; layer++) {
        char text[64];
        for (size_t i = 0; i < sizeof stems / sizeof stems[0]; i++) {
            snprintf(text, sizeof text, "blk.%u.%s.weight", layer, stems[i]);
            count(&out, mix, &model, text, 4096, i == 6 ? 11008 : 4096);
        }
        snprintf(text, sizeof text, "blk.%u.attn_norm.weight", layer);
        count(&out, mix, &model, text, 1, 4096);
        snprintf(text, sizeof text, "blk.%u.ffn_norm.weight", layer);
        count(&out, mix, &model, text, 1, 4096);
    }
    return out;
}

/* Goal: a "q4_k_m" is what people know by that name. How: the counts that llama.cpp prints for its
 * files of Llama 2 7B. */
Test(quant_mix, gives_llama_2_7b_the_types_of_the_known_files)
{
    static const struct {
        const char *name;
        struct {
            enum tensor_type type;
            uint32_t count;
        } wanted[4];
    } cases[] = {
        {"f16", {{TENSOR_F16, 226}}},
        {"q8_0", {{TENSOR_Q8_0, 226}}},
        {"q4_0", {{TENSOR_Q4_0, 225}, {TENSOR_Q6_K, 1}}},
        {"q2_k", {{TENSOR_Q2_K, 129}, {TENSOR_Q3_K, 96}, {TENSOR_Q6_K, 1}}},
        {"q3_k_m", {{TENSOR_Q3_K, 129}, {TENSOR_Q4_K, 92}, {TENSOR_Q5_K, 4}, {TENSOR_Q6_K, 1}}},
        {"q4_k_s", {{TENSOR_Q4_K, 217}, {TENSOR_Q5_K, 8}, {TENSOR_Q6_K, 1}}},
        {"q4_k_m", {{TENSOR_Q4_K, 193}, {TENSOR_Q6_K, 33}}},
        {"q5_k_m", {{TENSOR_Q5_K, 193}, {TENSOR_Q6_K, 33}}},
        {"q6_k", {{TENSOR_Q6_K, 226}}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const struct counts got = llama_7b(cases[i].name);
        cr_expect_eq(got.of[TENSOR_F32], 65, "%s", cases[i].name);
        for (size_t k = 0; k < 4 && cases[i].wanted[k].count > 0; k++)
            cr_expect_eq(got.of[cases[i].wanted[k].type], cases[i].wanted[k].count, "%s: %u %s",
                         cases[i].name, got.of[cases[i].wanted[k].type],
                         quant_name((uint32_t)cases[i].wanted[k].type));
    }
}

static enum tensor_type one(const char *mix, const struct quant_mix_model *model, const char *name,
                            uint64_t cols)
{
    const uint64_t dims[] = {cols, 512, 8};
    return quant_mix_type(quant_mix_find(mix), model, name, strstr(name, "exps") ? 3 : 2, dims);
}

Test(quant_mix, knows_experts_shared_values_and_tied_outputs)
{
    const struct quant_mix_model mixtral = {
        .layer_count = 32, .head_count = 32, .kv_head_count = 8, .expert_count = 8};
    const struct quant_mix_model tied = {
        .layer_count = 24, .head_count = 16, .kv_head_count = 4, .is_tied = 1};
    cr_expect_eq(one("q4_k_m", &mixtral, "blk.9.attn_v.weight", 4096), TENSOR_Q8_0);
    cr_expect_eq(one("q4_k_m", &mixtral, "blk.9.attn_k.weight", 4096), TENSOR_Q8_0);
    cr_expect_eq(one("q4_k_m", &mixtral, "blk.9.attn_output.weight", 4096), TENSOR_Q5_K);
    cr_expect_eq(one("q4_k_m", &mixtral, "blk.9.ffn_gate_inp.weight", 4096), TENSOR_F32);
    cr_expect_eq(one("q4_k_m", &mixtral, "blk.9.ffn_gate_exps.weight", 4096), TENSOR_Q4_K);
    cr_expect_eq(one("q4_k_m", &mixtral, "blk.0.ffn_down_exps.weight", 4096), TENSOR_Q6_K);
    cr_expect_eq(one("q2_k", &tied, "blk.5.attn_v.weight", 1024), TENSOR_Q4_K);
    cr_expect_eq(one("q4_k_m", &tied, "token_embd.weight", 1024), TENSOR_Q6_K);
    cr_expect_eq(one("q4_k_m", &mixtral, "token_embd.weight", 1024), TENSOR_Q4_K);
    cr_expect_eq(one("q4_k_m", &tied, "blk.5.attn_qkv.weight", 1024), TENSOR_Q6_K);
    cr_expect_eq(one("q4_k_m", &tied, "blk.4.attn_qkv.weight", 1024), TENSOR_Q4_K);
}

Test(quant_mix, gives_way_where_rows_are_no_whole_blocks)
{
    static const struct {
        const char *mix;
        enum tensor_type of_704, of_100; /* columns */
    } cases[] = {{"q3_k_s", TENSOR_Q4_0, TENSOR_F16}, {"q4_k_m", TENSOR_Q5_0, TENSOR_F16},
                 {"q5_k_m", TENSOR_Q5_1, TENSOR_F16}, {"q6_k", TENSOR_Q8_0, TENSOR_F16},
                 {"q8_0", TENSOR_Q8_0, TENSOR_F16},   {"q4_1", TENSOR_Q4_1, TENSOR_F16},
                 {"f32", TENSOR_F32, TENSOR_F32},     {"bf16", TENSOR_BF16, TENSOR_BF16}};
    const struct quant_mix_model model = {.layer_count = 8, .head_count = 8, .kv_head_count = 8};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        cr_expect_eq(one(cases[i].mix, &model, "blk.1.ffn_gate.weight", 704), cases[i].of_704, "%s",
                     cases[i].mix);
        cr_expect_eq(one(cases[i].mix, &model, "blk.1.ffn_gate.weight", 100), cases[i].of_100, "%s",
                     cases[i].mix);
    }
}

Test(quant_mix, finds_mixes_and_pure_types_by_name)
{
    static const struct {
        enum tensor_type type;
        uint32_t file_type;
    } pure[] = {{TENSOR_F32, 0},   {TENSOR_F16, 1},   {TENSOR_BF16, 32}, {TENSOR_Q4_0, 2},
                {TENSOR_Q4_1, 3},  {TENSOR_Q5_0, 8},  {TENSOR_Q5_1, 9},  {TENSOR_Q8_0, 7},
                {TENSOR_Q2_K, 10}, {TENSOR_Q3_K, 11}, {TENSOR_Q4_K, 14}, {TENSOR_Q5_K, 16},
                {TENSOR_Q6_K, 18}};
    const uint64_t dims[] = {256, 256};
    const struct quant_mix_model model = {.layer_count = 1, .head_count = 1, .kv_head_count = 1};
    for (const struct quant_mix *mix = quant_mix_table(); mix->name; mix++)
        cr_expect_eq(quant_mix_find(mix->name), mix);
    cr_expect_eq(quant_mix_find("Q4_K"), quant_mix_find("q4_k_m"));
    cr_expect_null(quant_mix_find("q4"));
    cr_expect_null(quant_mix_find("iq4_xs"));
    for (size_t i = 0; i < sizeof pure / sizeof pure[0]; i++) {
        const struct quant_mix mix = quant_mix_pure(pure[i].type);
        cr_expect_eq(mix.file_type, pure[i].file_type, "%s", mix.name);
        cr_expect_eq(quant_mix_type(&mix, &model, "output.weight", 2, dims), pure[i].type);
        cr_expect_eq(quant_mix_type(&mix, &model, "blk.0.attn_v.weight", 2, dims), pure[i].type);
        cr_expect_eq(quant_mix_type(&mix, &model, "blk.0.attn_v.bias", 2, dims), TENSOR_F32);
        cr_expect_eq(quant_mix_type(&mix, &model, "blk.0.attn_norm.weight", 1, dims), TENSOR_F32);
    }
}
