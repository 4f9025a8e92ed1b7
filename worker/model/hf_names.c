#include "worker/model/hf_names.h"

#include <stdio.h>
#include <string.h>

#define NUMBERS_MAX 2u     /* a layer and an expert */
#define NUMBER_MAX  99999u /* above every limit of limits.h on layers and experts */

#define GEMMA  (HF_GEMMA2 | HF_GEMMA3)
#define SPLIT  (HF_FAMILIES_ALL & ~HF_PHI3)
#define DENSE  (HF_FAMILIES_ALL & ~(HF_MIXTRAL | HF_QWEN3_MOE))
#define PLAIN  (HF_FAMILIES_ALL & ~(HF_MIXTRAL | HF_QWEN3_MOE | HF_PHI3))
#define NORMED (HF_QWEN3 | HF_QWEN3_MOE | HF_GEMMA3)

/* A star is a number. */
static const struct {
    const char *name;
    const char *canonical; /* NULL: ignored */
    unsigned families;
} table[] = {
    {"lm_head.weight", "output.weight", HF_FAMILIES_ALL},
    {"model.embed_tokens.weight", "token_embd.weight", HF_FAMILIES_ALL},
    {"model.norm.weight", "output_norm.weight", HF_FAMILIES_ALL},
    {"model.layers.*.input_layernorm.weight", "blk.*.attn_norm.weight", HF_FAMILIES_ALL},
    {"model.layers.*.self_attn.q_proj.weight", "blk.*.attn_q.weight", SPLIT},
    {"model.layers.*.self_attn.k_proj.weight", "blk.*.attn_k.weight", SPLIT},
    {"model.layers.*.self_attn.v_proj.weight", "blk.*.attn_v.weight", SPLIT},
    {"model.layers.*.self_attn.q_proj.bias", "blk.*.attn_q.bias", HF_QWEN2},
    {"model.layers.*.self_attn.k_proj.bias", "blk.*.attn_k.bias", HF_QWEN2},
    {"model.layers.*.self_attn.v_proj.bias", "blk.*.attn_v.bias", HF_QWEN2},
    {"model.layers.*.self_attn.qkv_proj.weight", "blk.*.attn_qkv.weight", HF_PHI3},
    {"model.layers.*.self_attn.q_norm.weight", "blk.*.attn_q_norm.weight", NORMED},
    {"model.layers.*.self_attn.k_norm.weight", "blk.*.attn_k_norm.weight", NORMED},
    {"model.layers.*.self_attn.o_proj.weight", "blk.*.attn_output.weight", HF_FAMILIES_ALL},
    /* The same name is the norm before the feed-forward block, or for Gemma the one behind
     * attention. */
    {"model.layers.*.post_attention_layernorm.weight", "blk.*.ffn_norm.weight",
     HF_FAMILIES_ALL & ~GEMMA},
    {"model.layers.*.post_attention_layernorm.weight", "blk.*.post_attention_norm.weight", GEMMA},
    {"model.layers.*.pre_feedforward_layernorm.weight", "blk.*.ffn_norm.weight", GEMMA},
    {"model.layers.*.post_feedforward_layernorm.weight", "blk.*.post_ffw_norm.weight", GEMMA},
    {"model.layers.*.mlp.gate_proj.weight", "blk.*.ffn_gate.weight", PLAIN},
    {"model.layers.*.mlp.up_proj.weight", "blk.*.ffn_up.weight", PLAIN},
    {"model.layers.*.mlp.gate_up_proj.weight", "blk.*.ffn_up.weight", HF_PHI3}, /* gate first */
    {"model.layers.*.mlp.down_proj.weight", "blk.*.ffn_down.weight", DENSE},
    {"model.layers.*.block_sparse_moe.gate.weight", "blk.*.ffn_gate_inp.weight", HF_MIXTRAL},
    {"model.layers.*.block_sparse_moe.experts.*.w1.weight", "blk.*.ffn_gate.*.weight", HF_MIXTRAL},
    {"model.layers.*.block_sparse_moe.experts.*.w3.weight", "blk.*.ffn_up.*.weight", HF_MIXTRAL},
    {"model.layers.*.block_sparse_moe.experts.*.w2.weight", "blk.*.ffn_down.*.weight", HF_MIXTRAL},
    {"model.layers.*.mlp.gate.weight", "blk.*.ffn_gate_inp.weight", HF_QWEN3_MOE},
    {"model.layers.*.mlp.experts.*.gate_proj.weight", "blk.*.ffn_gate.*.weight", HF_QWEN3_MOE},
    {"model.layers.*.mlp.experts.*.up_proj.weight", "blk.*.ffn_up.*.weight", HF_QWEN3_MOE},
    {"model.layers.*.mlp.experts.*.down_proj.weight", "blk.*.ffn_down.*.weight", HF_QWEN3_MOE},
    /* Frequencies that old files carry; config.json says them. */
    {"model.layers.*.self_attn.rotary_emb.inv_freq", NULL, HF_FAMILIES_ALL},
    {"model.rotary_emb.inv_freq", NULL, HF_FAMILIES_ALL},
};

/* A decimal number in its one spelling. Returns how many bytes it takes; 0: there is none. */
static size_t read_number(const char *text, uint32_t *out)
{
    size_t size = 0;
    uint32_t value = 0;
    while (text[size] >= '0' && text[size] <= '9') {
        value = value * 10 + (uint32_t)(text[size++] - '0');
        if (value > NUMBER_MAX || (size > 1 && text[0] == '0'))
            return 0;
    }
    *out = value;
    return size;
}

static int match(const char *pattern, const char *name, uint32_t numbers[NUMBERS_MAX])
{
    uint32_t count = 0;
    for (; *pattern; pattern++) {
        if (*pattern == '*') {
            const size_t size = read_number(name, &numbers[count++]);
            if (size == 0)
                return 0;
            name += size;
        } else if (*pattern != *name++) {
            return 0;
        }
    }
    return *name == '\0';
}

/* The patterns are ours and with two numbers of five digits far below the limit. */
static void expand(const char *pattern, const uint32_t numbers[NUMBERS_MAX], char *out)
{
    uint32_t count = 0;
    size_t used = 0;
    for (; *pattern; pattern++) {
        if (*pattern == '*')
            used += (size_t)snprintf(out + used, LIMIT_TENSOR_NAME_SIZE + 1 - used, "%u",
                                     numbers[count++]);
        else
            out[used++] = *pattern;
    }
    out[used] = '\0';
}

static int begins(const char *text, const char *start)
{
    return strncmp(text, start, strlen(start)) == 0;
}

/* A model that sees keeps the text model behind a prefix, which has been in two places. plain has
 * room for name. */
static enum hf_names_kind take_text_part(const char *name, char *plain, size_t plain_size)
{
    static const char *const seeing[] = {"vision_tower.", "multi_modal_projector.",
                                         "model.vision_tower.", "model.multi_modal_projector."};
    for (size_t i = 0; i < sizeof seeing / sizeof seeing[0]; i++)
        if (begins(name, seeing[i]))
            return HF_NAMES_IGNORED;
    if (begins(name, "language_model."))
        snprintf(plain, plain_size, "%s", name + strlen("language_model."));
    else if (begins(name, "model.language_model."))
        snprintf(plain, plain_size, "model.%s", name + strlen("model.language_model."));
    else if (begins(name, "lm_head."))
        snprintf(plain, plain_size, "%s", name);
    else
        return HF_NAMES_UNKNOWN;
    return HF_NAMES_TENSOR;
}

enum hf_names_kind hf_names_canonical(const struct hf_config *config, const char *name, char *out)
{
    char plain[LIMIT_TENSOR_NAME_SIZE + 1];
    uint32_t numbers[NUMBERS_MAX] = {0};
    if (strlen(name) >= sizeof plain)
        return HF_NAMES_UNKNOWN;
    snprintf(plain, sizeof plain, "%s", name);
    if (config->has_vision) {
        const enum hf_names_kind kind = take_text_part(name, plain, sizeof plain);
        if (kind != HF_NAMES_TENSOR)
            return kind;
    }
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if ((table[i].families & config->family) != 0 && match(table[i].name, plain, numbers)) {
            if (!table[i].canonical)
                return HF_NAMES_IGNORED;
            expand(table[i].canonical, numbers, out);
            return HF_NAMES_TENSOR;
        }
    return HF_NAMES_UNKNOWN;
}
