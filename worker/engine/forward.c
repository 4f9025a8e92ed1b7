#include "worker/engine/forward.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

/* What a pass works in, all parts of one allocation on the backend. Attention and feed-forward
 * never hold theirs at once, so those share their place. */
struct forward {
    const struct model_span *span;
    const struct model_params *params;
    struct backend *backend;
    void *memory_dev;
    uint32_t row_max;
    uint32_t logit_row_max;
    float *x;      /* [rows][dim] residual stream */
    float *normed; /* [rows][dim] input of a block, then what it adds to the stream */
    float *wanted; /* [logit rows][dim] */
    float *logits; /* [logit rows][vocab] */
    /* attention */
    float *q;     /* [rows][heads * head_dim] */
    float *k;     /* [rows][kv_heads * head_dim] */
    float *v;     /* [rows][kv_heads * head_dim] */
    float *heads; /* [rows][heads * head_dim] */
    /* feed-forward; a slot is one expert of one row, or the row itself when dense */
    float *gate;           /* [slots][ffn] */
    float *up;             /* [slots][ffn] */
    float *router;         /* [rows][experts] */
    float *expert_weights; /* [slots] */
    uint32_t *expert_ids;  /* [slots] */
    float *expert_out;     /* [slots][dim] */
};

/* ---- memory ---------------------------------------------------------------------------------- */

struct part {
    float **place;
    uint64_t rows;
    uint64_t cols;
};

/* Lays parts out from float `at` on; with memory, sets their places. Returns where they end. */
static uint64_t lay_out(const struct part *parts, size_t count, uint64_t at, float *memory)
{
    const uint64_t line = ALLOC_ALIGNMENT / sizeof(float);
    for (size_t i = 0; i < count; i++) {
        if (memory)
            *parts[i].place = memory + at;
        at += (parts[i].rows * parts[i].cols + line - 1) / line * line;
    }
    return at;
}

/* Sets all places when there is memory. Returns how many floats they take. */
static uint64_t lay_out_all(struct forward *self, float *memory)
{
    const struct model_params *p = self->params;
    const uint64_t rows = self->row_max;
    const uint64_t slots = p->expert_count ? rows * p->expert_used_count : rows;
    const uint64_t expert_slots = p->expert_count ? slots : 0;
    const uint64_t logit_rows = self->span->output ? self->logit_row_max : 0;
    const uint64_t q_cols = (uint64_t)p->head_count * p->head_dim;
    const uint64_t kv_cols = (uint64_t)p->kv_head_count * p->head_dim;
    float *ids = NULL;
    const struct part always[] = {{&self->x, rows, p->dim},
                                  {&self->normed, rows, p->dim},
                                  {&self->wanted, logit_rows, p->dim},
                                  {&self->logits, logit_rows, p->vocab_size}};
    const struct part attention[] = {{&self->q, rows, q_cols},
                                     {&self->k, rows, kv_cols},
                                     {&self->v, rows, kv_cols},
                                     {&self->heads, rows, q_cols}};
    const struct part ffn[] = {{&self->gate, slots, p->ffn_dim},
                               {&self->up, slots, p->ffn_dim},
                               {&self->router, rows, p->expert_count},
                               {&self->expert_weights, expert_slots, 1},
                               {&ids, expert_slots, 1},
                               {&self->expert_out, expert_slots, p->dim}};
    const uint64_t shared = lay_out(always, 4, 0, memory);
    const uint64_t attention_end = lay_out(attention, 4, shared, memory);
    const uint64_t ffn_end = lay_out(ffn, 6, shared, memory);
    self->expert_ids = (uint32_t *)(void *)ids; /* as wide as a float */
    return attention_end > ffn_end ? attention_end : ffn_end;
}

enum odsi_err forward_open(struct forward **out, const struct model_span *span, uint32_t row_max,
                           uint32_t logit_row_max)
{
    struct forward *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->span = span;
    self->params = model_params_view(span->model);
    self->backend = span->backend;
    self->row_max = row_max;
    self->logit_row_max = logit_row_max;
    const uint64_t size = lay_out_all(self, NULL) * sizeof(float);
    err = self->backend->ops->mem_alloc(self->backend, &self->memory_dev, size);
    if (err != ODSI_OK) {
        err = odsi_fail_prefix(err, "%llu MiB to compute %u positions at once in",
                               (unsigned long long)(size >> 20), row_max);
        forward_close(&self);
        return err;
    }
    (void)lay_out_all(self, self->memory_dev);
    *out = self;
    return ODSI_OK;
}

void forward_close(struct forward **self)
{
    if (!*self)
        return;
    if ((*self)->memory_dev)
        (*self)->backend->ops->mem_free((*self)->backend, (*self)->memory_dev);
    alloc_free(*self);
    *self = NULL;
}

float *forward_x_dev(struct forward *self)
{
    return self->x;
}

/* ---- a layer --------------------------------------------------------------------------------- */

static enum odsi_err norm(struct forward *self, float *out, const float *x, const float *weight,
                          uint32_t rows, uint32_t cols)
{
    return self->backend->ops->rmsnorm(self->backend, out, x, weight, rows, cols,
                                       self->params->rms_eps);
}

/* out = weight * normed (+ bias) for the heads of q, k or v, then the norm of each head. */
static enum odsi_err project(struct forward *self, float *out, const struct weight *weight,
                             const float *bias, const float *head_norm, uint32_t rows,
                             uint32_t heads)
{
    const struct backend_ops *ops = self->backend->ops;
    const uint32_t head_dim = self->params->head_dim;
    enum odsi_err err = ops->matmul(self->backend, out, weight, self->normed, rows);
    if (err == ODSI_OK && bias)
        err = ops->add_bias(self->backend, out, bias, rows, heads * head_dim);
    if (err == ODSI_OK && head_norm)
        err = norm(self, out, out, head_norm, rows * heads, head_dim);
    return err;
}

/* What a block gives is normed where the family does that, and added to the stream. */
static enum odsi_err add_to_stream(struct forward *self, const float *post_norm, uint32_t rows)
{
    const uint32_t dim = self->params->dim;
    enum odsi_err err = ODSI_OK;
    if (post_norm)
        err = norm(self, self->normed, self->normed, post_norm, rows, dim);
    if (err == ODSI_OK)
        err = self->backend->ops->add(self->backend, self->x, self->x, self->normed,
                                      (size_t)rows * dim);
    return err;
}

static enum odsi_err project_heads(struct forward *self, const struct model_layer *layer,
                                   const struct op_batch *batch)
{
    const struct backend_ops *ops = self->backend->ops;
    const struct model_params *p = self->params;
    const uint32_t rows = batch->rows;
    enum odsi_err err = norm(self, self->normed, self->x, layer->attn_norm_dev, rows, p->dim);
    if (err == ODSI_OK)
        err = project(self, self->q, layer->wq, layer->q_bias_dev, layer->q_norm_dev, rows,
                      p->head_count);
    if (err == ODSI_OK)
        err = project(self, self->k, layer->wk, layer->k_bias_dev, layer->k_norm_dev, rows,
                      p->kv_head_count);
    if (err == ODSI_OK)
        err = project(self, self->v, layer->wv, layer->v_bias_dev, NULL, rows, p->kv_head_count);
    if (err == ODSI_OK)
        err = ops->rope(self->backend, self->q, layer->rope, batch, p->head_count, p->head_dim);
    if (err == ODSI_OK)
        err = ops->rope(self->backend, self->k, layer->rope, batch, p->kv_head_count, p->head_dim);
    return err;
}

static enum odsi_err run_attention(struct forward *self, const struct model_layer *layer,
                                   uint32_t layer_index, const struct kv_pool *pool,
                                   const struct op_batch *batch)
{
    struct backend *backend = self->backend;
    const struct backend_ops *ops = backend->ops;
    const struct model_params *p = self->params;
    const struct attention_params attention = {.heads = p->head_count,
                                               .scale = p->attention_scale,
                                               .softcap = p->attention_softcap,
                                               .window = layer->window};
    enum odsi_err err = project_heads(self, layer, batch);
    if (err == ODSI_OK)
        err = ops->kv_write(backend, pool, layer_index, batch, self->k, self->v);
    if (err == ODSI_OK)
        err = ops->attention(backend, self->heads, self->q, pool, layer_index, batch, &attention);
    if (err == ODSI_OK)
        err = ops->matmul(backend, self->normed, layer->wo, self->heads, batch->rows);
    if (err == ODSI_OK)
        err = add_to_stream(self, layer->attn_post_norm_dev, batch->rows);
    return err;
}

static enum odsi_err run_dense(struct forward *self, const struct model_layer *layer, uint32_t rows)
{
    struct backend *backend = self->backend;
    const struct backend_ops *ops = backend->ops;
    const struct model_params *p = self->params;
    enum odsi_err err = ops->matmul(backend, self->gate, layer->w_gate, self->normed, rows);
    if (err == ODSI_OK)
        err = ops->matmul(backend, self->up, layer->w_up, self->normed, rows);
    if (err == ODSI_OK)
        err = ops->act_mul(backend, self->gate, self->gate, self->up, (size_t)rows * p->ffn_dim,
                           (enum act_kind)p->act);
    if (err == ODSI_OK)
        err = ops->matmul(backend, self->normed, layer->w_down, self->gate, rows);
    return err;
}

static enum odsi_err run_experts(struct forward *self, const struct model_layer *layer,
                                 uint32_t rows)
{
    struct backend *backend = self->backend;
    const struct backend_ops *ops = backend->ops;
    const struct model_params *p = self->params;
    const uint32_t used = p->expert_used_count;
    const uint32_t slots = rows * used;
    enum odsi_err err = ops->matmul(backend, self->router, layer->w_router, self->normed, rows);
    if (err == ODSI_OK)
        err = ops->route(backend, self->expert_ids, self->expert_weights, self->router, rows,
                         p->expert_count, used);
    if (err == ODSI_OK)
        err = ops->matmul_experts(backend, self->gate, layer->w_gate, self->normed,
                                  self->expert_ids, slots, used);
    if (err == ODSI_OK)
        err = ops->matmul_experts(backend, self->up, layer->w_up, self->normed, self->expert_ids,
                                  slots, used);
    if (err == ODSI_OK)
        err = ops->act_mul(backend, self->gate, self->gate, self->up, (size_t)slots * p->ffn_dim,
                           (enum act_kind)p->act);
    if (err == ODSI_OK)
        err = ops->matmul_experts(backend, self->expert_out, layer->w_down, self->gate,
                                  self->expert_ids, slots, 1);
    if (err == ODSI_OK)
        err = ops->combine(backend, self->normed, self->expert_out, self->expert_weights, rows,
                           used, p->dim);
    return err;
}

enum odsi_err forward_layer(struct forward *self, uint32_t layer_index, const struct kv_pool *pool,
                            const struct op_batch *batch)
{
    const struct model_layer *layer = &self->span->layers[layer_index];
    const uint32_t rows = batch->rows;
    ODSI_ASSERT(rows <= self->row_max);
    enum odsi_err err = run_attention(self, layer, layer_index, pool, batch);
    if (err == ODSI_OK)
        err = norm(self, self->normed, self->x, layer->ffn_norm_dev, rows, self->params->dim);
    if (err == ODSI_OK)
        err = layer->w_router ? run_experts(self, layer, rows) : run_dense(self, layer, rows);
    if (err == ODSI_OK)
        err = add_to_stream(self, layer->ffn_post_norm_dev, rows);
    return err;
}

/* ---- both ends ------------------------------------------------------------------------------- */

enum odsi_err forward_embed(struct forward *self, const uint32_t *tokens, uint32_t rows)
{
    const struct model_params *p = self->params;
    ODSI_ASSERT(rows <= self->row_max);
    enum odsi_err err =
        self->backend->ops->embed(self->backend, self->x, self->span->embed, tokens, rows);
    if (err == ODSI_OK && p->embed_scale != 1.0f)
        err = self->backend->ops->scale(self->backend, self->x, (size_t)rows * p->dim,
                                        p->embed_scale);
    return err;
}

enum odsi_err forward_want_logits(struct forward *self, uint32_t index, uint32_t row)
{
    const uint32_t dim = self->params->dim;
    ODSI_ASSERT(index < self->logit_row_max && row < self->row_max);
    return norm(self, self->wanted + (size_t)index * dim, self->x + (size_t)row * dim,
                self->span->output_norm_dev, 1, dim);
}

enum odsi_err forward_logits(struct forward *self, uint32_t count, const float **out_dev)
{
    const struct model_params *p = self->params;
    ODSI_ASSERT(count <= self->logit_row_max);
    enum odsi_err err = self->backend->ops->matmul(self->backend, self->logits, self->span->output,
                                                   self->wanted, count);
    if (err == ODSI_OK && p->logit_softcap > 0.0f)
        err = self->backend->ops->softcap(self->backend, self->logits,
                                          (size_t)count * p->vocab_size, p->logit_softcap);
    *out_dev = self->logits;
    return err;
}
