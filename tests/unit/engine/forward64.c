#include "tests/unit/engine/forward64.h"

#include "common/base/alloc.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"
#include "worker/model/source.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* All vectors are [token][...]. */
struct pass {
    struct source *source;
    const struct model_params *p;
    const uint32_t *tokens;
    uint32_t count;
    double *x; /* [dim] */
};

static void *memory(size_t count, size_t size)
{
    void *out = NULL;
    cr_assert_eq(alloc_zeroed(&out, count ? count : 1, size), ODSI_OK);
    return out;
}

static double *doubles(size_t count)
{
    return memory(count, sizeof(double));
}

/* ---- tensors by name ------------------------------------------------------------------------- */

/* A tensor as numbers, [rows][cols] with rows over all its outer dimensions. */
struct matrix {
    double *data;
    size_t rows;
    size_t cols;
};

static const struct source_tensor *find(const struct pass *self, const char *name)
{
    for (uint32_t i = 0; i < self->source->tensor_count; i++)
        if (strcmp(self->source->tensors[i].name, name) == 0)
            return &self->source->tensors[i];
    return NULL;
}

/* 1 when there is one of that name. */
__attribute__((format(printf, 3, 4))) static int load(const struct pass *self, struct matrix *out,
                                                      const char *format, ...)
{
    char name[128];
    va_list list;
    va_start(list, format);
    vsnprintf(name, sizeof name, format, list);
    va_end(list);
    const struct source_tensor *tensor = find(self, name);
    if (!tensor)
        return 0;
    out->cols = tensor->dims[0];
    out->rows = tensor->dims[1] * tensor->dims[2] * tensor->dims[3];
    out->data = doubles(out->rows * out->cols);
    uint8_t *bytes = memory(tensor->size, 1);
    float *row = memory(out->cols, sizeof *row);
    cr_assert_eq(source_read(self->source, tensor, 0, bytes, tensor->size), ODSI_OK, "%s",
                 odsi_err_text());
    for (size_t r = 0; r < out->rows; r++) {
        const size_t row_size = quant_row_size(tensor->type, (uint32_t)out->cols);
        ref_embed(row, tensor->type, bytes + r * row_size, (uint32_t)out->cols);
        for (size_t c = 0; c < out->cols; c++)
            out->data[r * out->cols + c] = (double)row[c];
    }
    alloc_free(row);
    alloc_free(bytes);
    return 1;
}

static void unload(struct matrix *matrix)
{
    alloc_free(matrix->data);
    *matrix = (struct matrix){0};
}

/* Rows [first, first + count) of matrix times x[cols]. */
static void multiply(double *out, const struct matrix *matrix, size_t first, size_t count,
                     const double *x)
{
    cr_assert(first + count <= matrix->rows);
    for (size_t r = 0; r < count; r++) {
        const double *row = matrix->data + (first + r) * matrix->cols;
        double sum = 0;
        for (size_t c = 0; c < matrix->cols; c++)
            sum += row[c] * x[c];
        out[r] = sum;
    }
}

/* ---- pieces ---------------------------------------------------------------------------------- */

static void norm(const struct pass *self, double *out, const double *x, const struct matrix *weight,
                 size_t cols)
{
    const double one = self->p->features & MODEL_NORM_PLUS_ONE ? 1 : 0;
    double sum = 0;
    for (size_t c = 0; c < cols; c++)
        sum += x[c] * x[c];
    const double scale = 1 / sqrt(sum / (double)cols + (double)self->p->rms_eps);
    for (size_t c = 0; c < cols; c++)
        out[c] = x[c] * scale * (weight->data[c] + one);
}

/* Each of heads is normed where the layer has a tensor for it. */
static void norm_heads(const struct pass *self, double *x, uint32_t heads, const char *which,
                       uint32_t layer)
{
    struct matrix weight;
    if (!load(self, &weight, "blk.%u.attn_%s_norm.weight", layer, which))
        return;
    for (size_t i = 0; i < (size_t)self->count * heads; i++)
        norm(self, x + i * self->p->head_dim, x + i * self->p->head_dim, &weight,
             self->p->head_dim);
    unload(&weight);
}

static void rotate(const struct pass *self, double *x, uint32_t heads, uint32_t layer)
{
    const struct model_params *p = self->p;
    const int windowed = model_layer_is_windowed(p, layer);
    const uint32_t half = p->rope_dim / 2;
    const double base = (double)(windowed ? p->rope_base_windowed : p->rope_base);
    struct matrix factors = {0};
    if (p->features & MODEL_ROPE_FACTORS && !load(self, &factors, "rope_freqs.weight"))
        (void)load(self, &factors, "rope_factors_%s.weight",
                   p->rope_amplitude > 1.0f ? "long" : "short");
    for (uint32_t t = 0; t < self->count; t++)
        for (uint32_t i = 0; i < half; i++) {
            double angle = t * pow(base, -(double)i / half);
            if (!windowed)
                angle /= (double)p->rope_linear;
            if (factors.data)
                angle /= factors.data[i];
            const double c = cos(angle) * (double)p->rope_amplitude;
            const double s = sin(angle) * (double)p->rope_amplitude;
            for (uint32_t h = 0; h < heads; h++) {
                double *head = x + ((size_t)t * heads + h) * p->head_dim;
                double *a = p->rope_style == ROPE_PAIRS ? head + 2 * i : head + i;
                double *b = p->rope_style == ROPE_PAIRS ? a + 1 : a + half;
                const double was = *a;
                *a = was * c - *b * s;
                *b = was * s + *b * c;
            }
        }
    unload(&factors);
}

/* out[count][rows] = rows of the tensor, or of a part of the fused one, times x, plus a bias. */
static double *project(const struct pass *self, const double *x, uint32_t layer, const char *name,
                       size_t rows, const char *fused, size_t fused_first)
{
    struct matrix weight, bias;
    double *out = doubles(self->count * rows);
    const int is_whole = load(self, &weight, "blk.%u.%s.weight", layer, name);
    if (!is_whole)
        cr_assert(load(self, &weight, "blk.%u.%s.weight", layer, fused), "%s", name);
    for (size_t t = 0; t < self->count; t++)
        multiply(out + t * rows, &weight, is_whole ? 0 : fused_first, rows, x + t * weight.cols);
    unload(&weight);
    if (load(self, &bias, "blk.%u.%s.bias", layer, name)) {
        for (size_t i = 0; i < self->count * rows; i++)
            out[i] += bias.data[i % rows];
        unload(&bias);
    }
    return out;
}

static double softcap(double x, float cap)
{
    return cap > 0.0f ? tanh(x / (double)cap) * (double)cap : x;
}

/* One head of token t: out[head_dim]. */
static void attend(const struct pass *self, double *out, const double *q, const double *k,
                   const double *v, uint32_t t, uint32_t layer, uint32_t kv_head)
{
    const struct model_params *p = self->p;
    const size_t stride = (size_t)p->kv_head_count * p->head_dim;
    const int windowed = model_layer_is_windowed(p, layer);
    const uint32_t first = windowed && t >= p->window ? t - p->window + 1 : 0;
    double *score = doubles(t + 1);
    double top = -INFINITY, sum = 0;
    for (uint32_t i = first; i <= t; i++) {
        for (uint32_t d = 0; d < p->head_dim; d++)
            score[i] += q[d] * k[i * stride + (size_t)kv_head * p->head_dim + d];
        score[i] = softcap(score[i] * (double)p->attention_scale, p->attention_softcap);
        top = fmax(top, score[i]);
    }
    for (uint32_t i = first; i <= t; i++)
        sum += exp(score[i] - top);
    for (uint32_t d = 0; d < p->head_dim; d++) {
        out[d] = 0;
        for (uint32_t i = first; i <= t; i++)
            out[d] += exp(score[i] - top) / sum * v[i * stride + (size_t)kv_head * p->head_dim + d];
    }
    alloc_free(score);
}

/* delta[count][dim] goes through the norm that some families have there, into the stream. */
static void add(const struct pass *self, double *delta, const char *post_norm, uint32_t layer)
{
    struct matrix weight;
    const int is_normed = load(self, &weight, "blk.%u.%s.weight", layer, post_norm);
    for (size_t t = 0; t < self->count; t++) {
        double *row = delta + t * self->p->dim;
        if (is_normed)
            norm(self, row, row, &weight, self->p->dim);
        for (size_t c = 0; c < self->p->dim; c++)
            self->x[t * self->p->dim + c] += row[c];
    }
    if (is_normed)
        unload(&weight);
}

static double *normed(const struct pass *self, const char *name, uint32_t layer)
{
    struct matrix weight;
    double *out = doubles((size_t)self->count * self->p->dim);
    cr_assert(load(self, &weight, "blk.%u.%s.weight", layer, name), "%s", name);
    for (size_t t = 0; t < self->count; t++)
        norm(self, out + t * self->p->dim, self->x + t * self->p->dim, &weight, self->p->dim);
    unload(&weight);
    return out;
}

static void run_attention(const struct pass *self, uint32_t layer)
{
    const struct model_params *p = self->p;
    const size_t q_rows = (size_t)p->head_count * p->head_dim;
    const size_t kv_rows = (size_t)p->kv_head_count * p->head_dim;
    double *h = normed(self, "attn_norm", layer);
    double *q = project(self, h, layer, "attn_q", q_rows, "attn_qkv", 0);
    double *k = project(self, h, layer, "attn_k", kv_rows, "attn_qkv", q_rows);
    double *v = project(self, h, layer, "attn_v", kv_rows, "attn_qkv", q_rows + kv_rows);
    double *heads = doubles(self->count * q_rows);
    norm_heads(self, q, p->head_count, "q", layer);
    norm_heads(self, k, p->kv_head_count, "k", layer);
    rotate(self, q, p->head_count, layer);
    rotate(self, k, p->kv_head_count, layer);
    for (uint32_t t = 0; t < self->count; t++)
        for (uint32_t head = 0; head < p->head_count; head++) {
            const size_t at = t * q_rows + (size_t)head * p->head_dim;
            attend(self, heads + at, q + at, k, v, t, layer,
                   head / (p->head_count / p->kv_head_count));
        }
    double *delta = project(self, heads, layer, "attn_output", p->dim, "", 0);
    add(self, delta, "post_attention_norm", layer);
    double *const all[] = {h, q, k, v, heads, delta};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        alloc_free(all[i]);
}

static double act(const struct pass *self, double x)
{
    if (self->p->act == ACT_SILU)
        return x / (1 + exp(-x));
    return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

/* down(act(gate x) * up x) for one token, of expert e where there are some. */
static void ffn_one(const struct pass *self, double *out, const double *x,
                    const struct matrix *gate, const struct matrix *up, const struct matrix *down,
                    size_t e)
{
    const size_t ffn = self->p->ffn_dim;
    const size_t up_first = gate == up ? ffn : e * ffn; /* fused: gate's rows, then up's */
    double *g = doubles(ffn), *u = doubles(ffn);
    multiply(g, gate, e * ffn, ffn, x);
    multiply(u, up, up_first, ffn, x);
    for (size_t i = 0; i < ffn; i++)
        g[i] = act(self, g[i]) * u[i];
    multiply(out, down, e * self->p->dim, self->p->dim, g);
    alloc_free(g);
    alloc_free(u);
}

static void run_dense(const struct pass *self, double *delta, const double *h, uint32_t layer)
{
    struct matrix gate, up, down;
    cr_assert(load(self, &up, "blk.%u.ffn_up.weight", layer));
    cr_assert(load(self, &down, "blk.%u.ffn_down.weight", layer));
    const int has_gate = load(self, &gate, "blk.%u.ffn_gate.weight", layer);
    for (size_t t = 0; t < self->count; t++)
        ffn_one(self, delta + t * self->p->dim, h + t * self->p->dim, has_gate ? &gate : &up, &up,
                &down, 0);
    if (has_gate)
        unload(&gate);
    unload(&up);
    unload(&down);
}

/* Stacked experts only, as the synthetic models have them. */
static void run_experts(const struct pass *self, double *delta, const double *h, uint32_t layer)
{
    const struct model_params *p = self->p;
    struct matrix router, gate, up, down;
    double *logits = doubles(p->expert_count), *out = doubles(p->dim);
    cr_assert(load(self, &router, "blk.%u.ffn_gate_inp.weight", layer));
    cr_assert(load(self, &gate, "blk.%u.ffn_gate_exps.weight", layer));
    cr_assert(load(self, &up, "blk.%u.ffn_up_exps.weight", layer));
    cr_assert(load(self, &down, "blk.%u.ffn_down_exps.weight", layer));
    for (size_t t = 0; t < self->count; t++) {
        double sum = 0, top = -INFINITY;
        multiply(logits, &router, 0, p->expert_count, h + t * p->dim);
        for (uint32_t e = 0; e < p->expert_count; e++)
            top = fmax(top, logits[e]);
        for (int add_up = 0; add_up < 2; add_up++) /* first the sum, then the experts */
            for (uint32_t e = 0; e < p->expert_count; e++) {
                uint32_t better = 0;
                for (uint32_t other = 0; other < p->expert_count; other++)
                    better +=
                        logits[other] > logits[e] || (logits[other] == logits[e] && other < e);
                if (better >= p->expert_used_count)
                    continue;
                if (!add_up) {
                    sum += exp(logits[e] - top);
                    continue;
                }
                ffn_one(self, out, h + t * p->dim, &gate, &up, &down, e);
                for (size_t c = 0; c < p->dim; c++)
                    delta[t * p->dim + c] += exp(logits[e] - top) / sum * out[c];
            }
    }
    struct matrix *const all[] = {&router, &gate, &up, &down};
    for (size_t i = 0; i < 4; i++)
        unload(all[i]);
    alloc_free(logits);
    alloc_free(out);
}

static void run_ffn(const struct pass *self, uint32_t layer)
{
    double *h = normed(self, "ffn_norm", layer);
    double *delta = doubles((size_t)self->count * self->p->dim);
    if (self->p->expert_count > 0)
        run_experts(self, delta, h, layer);
    else
        run_dense(self, delta, h, layer);
    add(self, delta, "post_ffw_norm", layer);
    alloc_free(h);
    alloc_free(delta);
}

/* ---- the whole ------------------------------------------------------------------------------- */

static void run_ends(const struct pass *self, double *logits)
{
    const struct model_params *p = self->p;
    struct matrix weight, output;
    cr_assert(load(self, &weight, "output_norm.weight"));
    if (!load(self, &output, "output.weight"))
        cr_assert(load(self, &output, "token_embd.weight"));
    for (size_t t = 0; t < self->count; t++) {
        double *row = logits + t * p->vocab_size;
        norm(self, self->x + t * p->dim, self->x + t * p->dim, &weight, p->dim);
        multiply(row, &output, 0, p->vocab_size, self->x + t * p->dim);
        for (size_t i = 0; i < p->vocab_size; i++)
            row[i] = softcap(row[i], p->logit_softcap);
    }
    unload(&weight);
    unload(&output);
}

void forward64_run(double *logits, const char *path, const uint32_t *tokens, uint32_t count)
{
    struct pass self = {.tokens = tokens, .count = count};
    struct matrix embed;
    cr_assert_eq(source_open(&self.source, path), ODSI_OK, "%s", odsi_err_text());
    self.p = &self.source->params;
    self.x = doubles((size_t)count * self.p->dim);
    cr_assert(load(&self, &embed, "token_embd.weight"));
    for (size_t t = 0; t < count; t++)
        for (size_t c = 0; c < self.p->dim; c++)
            self.x[t * self.p->dim + c] =
                embed.data[tokens[t] * embed.cols + c] * (double)self.p->embed_scale;
    unload(&embed);
    for (uint32_t layer = 0; layer < self.p->layer_count; layer++) {
        run_attention(&self, layer);
        run_ffn(&self, layer);
    }
    run_ends(&self, logits);
    alloc_free(self.x);
    source_close(&self.source);
}
