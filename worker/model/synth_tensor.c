#include "worker/model/synth_tensor.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

#include <inttypes.h>
#include <stdio.h>

#define FIRST_MAX 5u  /* tensors that a model has once */
#define LAYER_MAX 18u /* tensors of a layer */

/* Logits get a deviation of about 4, as those of trained models have. */
#define LOGIT_GAIN 4u

struct list {
    const struct synth_shape *shape;
    struct synth_tensor *tensors;
    uint32_t count;
    uint32_t capacity;
    uint32_t layer;
    int in_layer;
};

static struct synth_tensor *add(struct list *list, const char *stem, enum synth_draw draw,
                                uint64_t cols)
{
    ODSI_ASSERT(list->count < list->capacity);
    struct synth_tensor *out = &list->tensors[list->count++];
    *out = (struct synth_tensor){
        .dim_count = 1, .dims = {cols, 1, 1}, .draw = draw, .inverse = 1, .gain = 1.0f};
    if (list->in_layer)
        snprintf(out->name, sizeof out->name, "blk.%" PRIu32 ".%s", list->layer, stem);
    else
        snprintf(out->name, sizeof out->name, "%s", stem);
    return out;
}

/* Unit inputs come out near 1. */
static struct synth_tensor *add_matrix(struct list *list, const char *stem, uint64_t rows,
                                       uint64_t cols)
{
    struct synth_tensor *out = add(list, stem, SYNTH_MATRIX, cols);
    out->dim_count = 2;
    out->dims[1] = rows;
    out->inverse = cols;
    return out;
}

static void add_experts(struct list *list, const char *stem, uint64_t rows, uint64_t cols)
{
    struct synth_tensor *out = add_matrix(list, stem, rows, cols);
    out->dim_count = 3;
    out->dims[2] = list->shape->expert_count;
}

/* What is added to the residual stream is smaller by the number of such additions. */
static void make_addition(struct list *list)
{
    list->tensors[list->count - 1].inverse *= 2 * (uint64_t)list->shape->layer_count;
}

static int is_gemma(const struct synth_shape *shape)
{
    return shape->family == SYNTH_GEMMA2 || shape->family == SYNTH_GEMMA3;
}

/* The embedding comes out near 1 where it is one and no more. A tied one is the output matrix as
 * well: the norm before it makes its logits large, and it is so small that a token does not always
 * predict itself (Gemma multiplies it by sqrt(dim) as well). */
static void add_first(struct list *list)
{
    const struct synth_shape *shape = list->shape;
    struct synth_tensor *embed =
        add_matrix(list, "token_embd.weight", shape->vocab_size, shape->dim);
    struct synth_tensor *norm = add(list, "output_norm.weight", SYNTH_NORM, shape->dim);
    if (shape->is_tied) {
        embed->inverse = is_gemma(shape) ? 16 * (uint64_t)shape->dim : shape->dim;
        norm->gain = (float)(is_gemma(shape) ? 4 * LOGIT_GAIN : LOGIT_GAIN);
    } else {
        embed->inverse = 1;
        struct synth_tensor *output =
            add_matrix(list, "output.weight", shape->vocab_size, shape->dim);
        output->inverse /= (uint64_t)LOGIT_GAIN * LOGIT_GAIN;
        if (output->inverse == 0)
            output->inverse = 1;
    }
    if (shape->rope_factor <= 0.0f)
        return;
    const uint32_t half = shape->head_dim / 2;
    if (shape->family == SYNTH_PHI3) {
        add(list, "rope_factors_long.weight", SYNTH_FACTORS, half)->gain = shape->rope_factor;
        add(list, "rope_factors_short.weight", SYNTH_FACTORS, half)->gain = 1.25f;
    } else {
        add(list, "rope_freqs.weight", SYNTH_FACTORS, half)->gain = shape->rope_factor;
    }
}

static void add_attention(struct list *list)
{
    const struct synth_shape *shape = list->shape;
    const uint64_t dim = shape->dim;
    const uint64_t q = (uint64_t)shape->head_count * shape->head_dim;
    const uint64_t kv = (uint64_t)shape->kv_head_count * shape->head_dim;
    (void)add(list, "attn_norm.weight", SYNTH_NORM, dim);
    if (shape->family == SYNTH_PHI3) {
        (void)add_matrix(list, "attn_qkv.weight", q + 2 * kv, dim);
    } else {
        (void)add_matrix(list, "attn_q.weight", q, dim);
        (void)add_matrix(list, "attn_k.weight", kv, dim);
        (void)add_matrix(list, "attn_v.weight", kv, dim);
    }
    if (shape->family == SYNTH_QWEN2) {
        (void)add(list, "attn_q.bias", SYNTH_BIAS, q);
        (void)add(list, "attn_k.bias", SYNTH_BIAS, kv);
        (void)add(list, "attn_v.bias", SYNTH_BIAS, kv);
    }
    if (shape->family == SYNTH_QWEN3 || shape->family == SYNTH_GEMMA3) {
        (void)add(list, "attn_q_norm.weight", SYNTH_NORM, shape->head_dim);
        (void)add(list, "attn_k_norm.weight", SYNTH_NORM, shape->head_dim);
    }
    (void)add_matrix(list, "attn_output.weight", dim, q);
    make_addition(list);
    if (is_gemma(shape))
        (void)add(list, "post_attention_norm.weight", SYNTH_NORM, dim);
}

static void add_feed_forward(struct list *list)
{
    const struct synth_shape *shape = list->shape;
    const uint64_t dim = shape->dim, ffn = shape->ffn_dim;
    (void)add(list, "ffn_norm.weight", SYNTH_NORM, dim);
    if (shape->expert_count > 0) {
        /* Twice as large, so that the chosen experts' shares differ. */
        struct synth_tensor *router =
            add_matrix(list, "ffn_gate_inp.weight", shape->expert_count, dim);
        router->inverse = (router->inverse + 3) / 4;
        add_experts(list, "ffn_gate_exps.weight", ffn, dim);
        add_experts(list, "ffn_up_exps.weight", ffn, dim);
        add_experts(list, "ffn_down_exps.weight", dim, ffn);
    } else if (shape->family == SYNTH_PHI3) {
        (void)add_matrix(list, "ffn_up.weight", 2 * ffn, dim);
        (void)add_matrix(list, "ffn_down.weight", dim, ffn);
    } else {
        (void)add_matrix(list, "ffn_gate.weight", ffn, dim);
        (void)add_matrix(list, "ffn_up.weight", ffn, dim);
        (void)add_matrix(list, "ffn_down.weight", dim, ffn);
    }
    make_addition(list);
    if (is_gemma(shape))
        (void)add(list, "post_ffw_norm.weight", SYNTH_NORM, dim);
}

enum odsi_err synth_tensor_list(struct synth_tensor **out, uint32_t *count,
                                const struct synth_shape *shape)
{
    struct list list = {.shape = shape, .capacity = FIRST_MAX + shape->layer_count * LAYER_MAX};
    *out = NULL;
    *count = 0;
    const enum odsi_err err = alloc_zeroed(&list.tensors, list.capacity, sizeof *list.tensors);
    if (err != ODSI_OK)
        return err;
    add_first(&list);
    list.in_layer = 1;
    for (list.layer = 0; list.layer < shape->layer_count; list.layer++) {
        add_attention(&list);
        add_feed_forward(&list);
    }
    *out = list.tensors;
    *count = list.count;
    return ODSI_OK;
}
