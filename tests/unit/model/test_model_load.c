#include "common/base/alloc.h"
#include "kernels/rope_table.h"
#include "tests/unit/model/family_fixture.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/gguf_value.h"
#include "worker/model/model.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static const struct family_key experts_keys[] = {{"expert_count", GGUF_U32, 4, NULL},
                                                 {"expert_used_count", GGUF_U32, 2, NULL}};
static const struct family_recipe llama = {.arch = "llama"};
static const struct family_recipe phi3 = {.arch = "phi3"};

static struct family_recipe mixtral(void)
{
    struct family_recipe recipe = {.arch = "llama",
                                   .params = {.expert_count = 4, .expert_used_count = 2}};
    memcpy(recipe.keys, experts_keys, sizeof experts_keys);
    return recipe;
}

/* A model and all of its layers on a backend. */
struct loaded {
    char *folder;
    struct backend *backend;
    struct model *model;
    struct model_span *span;
};

static enum odsi_err load(struct loaded *self, const struct family_recipe *recipe,
                          uint32_t thread_count, uint32_t layer_first, uint32_t positions)
{
    const struct backend_config config = {.name = "scalar", .thread_count = thread_count};
    memset(self, 0, sizeof *self);
    self->folder = fixture_folder();
    cr_assert_eq(backend_open(&self->backend, &config), ODSI_OK);
    cr_assert_eq(model_open(&self->model, family_write(self->folder, recipe, 1), NULL, NULL, NULL),
                 ODSI_OK, "%s", odsi_err_text());
    return model_span_open(&self->span, self->model, self->backend, layer_first,
                           model_params_view(self->model)->layer_count, positions, NULL, NULL);
}

static void load_whole(struct loaded *self, const struct family_recipe *recipe)
{
    cr_assert_eq(load(self, recipe, 1, 0, 16), ODSI_OK, "%s", odsi_err_text());
}

static void unload(struct loaded *self)
{
    model_span_close(&self->span);
    model_close(&self->model);
    backend_close(&self->backend);
    fixture_folder_remove(self->folder);
}

/* The products of a weight with a row of random numbers: two weights that agree in them for each of
 * several rows are the same. ids: which matrices. */
static void products(struct loaded *self, float *out, const struct weight *weight, uint32_t rows,
                     uint32_t cols, uint32_t matrix_count)
{
    const struct backend_ops *ops = self->backend->ops;
    void *x_dev = NULL, *out_dev = NULL, *ids_dev = NULL;
    float x[256];
    uint32_t ids[8];
    uint64_t state = 7;
    cr_assert(cols <= 256 && matrix_count <= 8);
    for (uint32_t i = 0; i < cols; i++)
        x[i] = (float)(fixture_random(&state) >> 40) / 16777216.0f - 0.5f;
    for (uint32_t i = 0; i < matrix_count; i++)
        ids[i] = i;
    cr_assert_eq(ops->mem_alloc(self->backend, &x_dev, cols * 4), ODSI_OK);
    cr_assert_eq(ops->mem_alloc(self->backend, &ids_dev, sizeof ids), ODSI_OK);
    cr_assert_eq(ops->mem_alloc(self->backend, &out_dev, (size_t)matrix_count * rows * 4), ODSI_OK);
    cr_assert_eq(ops->upload(self->backend, x_dev, x, cols * 4), ODSI_OK);
    cr_assert_eq(ops->upload(self->backend, ids_dev, ids, sizeof ids), ODSI_OK);
    cr_assert_eq(ops->matmul_experts(self->backend, out_dev, weight, x_dev, ids_dev, matrix_count,
                                     matrix_count),
                 ODSI_OK);
    cr_assert_eq(ops->download(self->backend, out, out_dev, (size_t)matrix_count * rows * 4),
                 ODSI_OK);
    ops->mem_free(self->backend, x_dev);
    ops->mem_free(self->backend, ids_dev);
    ops->mem_free(self->backend, out_dev);
}

static void expect_same(struct loaded *a, const struct weight *of_a, struct loaded *b,
                        const struct weight *of_b, uint32_t rows, uint32_t cols,
                        uint32_t matrix_count, const char *what)
{
    float from_a[4096], from_b[4096];
    cr_assert((size_t)rows * matrix_count <= 4096);
    products(a, from_a, of_a, rows, cols, matrix_count);
    products(b, from_b, of_b, rows, cols, matrix_count);
    cr_expect_eq(memcmp(from_a, from_b, (size_t)rows * matrix_count * 4), 0, "%s", what);
    cr_expect_neq(from_a[0], from_a[rows - 1], "%s: all rows are alike", what);
}

static void expect_same_layers(struct loaded *a, struct loaded *b)
{
    const struct model_params *p = model_params_view(a->model);
    const uint32_t q_dim = p->head_count * p->head_dim;
    const uint32_t kv_dim = p->kv_head_count * p->head_dim;
    const uint32_t experts = p->expert_count ? p->expert_count : 1;
    for (uint32_t i = 0; i < p->layer_count; i++) {
        const struct model_layer *x = &a->span->layers[i];
        const struct model_layer *y = &b->span->layers[i];
        expect_same(a, x->wq, b, y->wq, q_dim, p->dim, 1, "q");
        expect_same(a, x->wk, b, y->wk, kv_dim, p->dim, 1, "k");
        expect_same(a, x->wv, b, y->wv, kv_dim, p->dim, 1, "v");
        expect_same(a, x->wo, b, y->wo, p->dim, q_dim, 1, "o");
        expect_same(a, x->w_gate, b, y->w_gate, p->ffn_dim, p->dim, experts, "gate");
        expect_same(a, x->w_up, b, y->w_up, p->ffn_dim, p->dim, experts, "up");
        expect_same(a, x->w_down, b, y->w_down, p->dim, p->ffn_dim, experts, "down");
        cr_expect_eq(x->w_router != NULL, p->expert_count > 0);
        if (x->w_router)
            expect_same(a, x->w_router, b, y->w_router, p->expert_count, p->dim, 1, "router");
    }
}

/* Goal: how a file cuts the weights does not matter to what is computed. How: the same numbers in
 * tensors of their own and fused. */
Test(model_load, fused_tensors_are_the_same_weights)
{
    struct loaded apart, fused;
    struct family_recipe recipe = phi3;
    recipe.fuses_qkv = 1;
    recipe.fuses_gate_up = 1;
    load_whole(&apart, &phi3);
    load_whole(&fused, &recipe);
    expect_same_layers(&apart, &fused);
    const uint64_t size = model_params_view(fused.model)->weight_size;
    cr_expect_eq(size, model_params_view(apart.model)->weight_size);
    cr_expect_eq(model_span_weight_size(fused.model, 0, 2), size, "each tensor counts once");
    unload(&apart);
    unload(&fused);
}

Test(model_load, a_tensor_for_each_expert_is_the_same_as_one_for_all)
{
    struct loaded stacked, split;
    struct family_recipe recipe = mixtral();
    load_whole(&stacked, &recipe);
    recipe.splits_experts = 1;
    cr_assert_eq(load(&split, &recipe, 4, 0, 16), ODSI_OK, "%s", odsi_err_text());
    expect_same_layers(&stacked, &split);
    cr_expect_eq(model_span_weight_size(split.model, 0, 2),
                 model_params_view(split.model)->weight_size);
    unload(&stacked);
    unload(&split);
}

/* Goal: which thread loads what does not show. How: 1, 2, 3 and 8 of them. */
Test(model_load, threads_change_nothing)
{
    struct family_recipe recipe = mixtral();
    struct loaded one;
    load_whole(&one, &recipe);
    for (uint32_t threads = 2; threads <= 8; threads = threads == 2 ? 3 : threads + 5) {
        struct loaded many;
        cr_assert_eq(load(&many, &recipe, threads, 0, 16), ODSI_OK, "%s", odsi_err_text());
        expect_same_layers(&one, &many);
        unload(&many);
    }
    unload(&one);
}

/* Goal: a vector may be of any float type. How: norms and biases in each, against the bits of the
 * file. */
Test(model_load, vectors_of_half_precision_become_f32)
{
    static const enum tensor_type types[] = {TENSOR_F32, TENSOR_F16, TENSOR_BF16};
    for (size_t t = 0; t < 3; t++) {
        struct loaded it;
        struct gguf *file = NULL;
        float got[32];
        char path[512];
        const struct family_recipe recipe = {.arch = "qwen2",
                                             .params = {.features = MODEL_QKV_BIAS},
                                             .other_tensor = "blk.1.attn_q.bias",
                                             .other_type = types[t]};
        load_whole(&it, &recipe);
        snprintf(path, sizeof path, "%s/m.gguf", it.folder);
        cr_assert_eq(gguf_open(&file, path), ODSI_OK);
        const uint8_t *bytes = gguf_tensor_find(file, "blk.1.attn_q.bias")->data;
        cr_assert_eq(
            it.backend->ops->download(it.backend, got, it.span->layers[1].q_bias_dev, sizeof got),
            ODSI_OK);
        for (uint32_t i = 0; i < 32; i++) {
            uint32_t bits = 0;
            float wanted = 0;
            const size_t size = types[t] == TENSOR_F32 ? 4 : 2;
            memcpy(&bits, bytes + i * size, size);
            if (types[t] == TENSOR_F16) /* all are from 1 to 2 */
                wanted = 1.0f + (float)(bits & 0x3ffu) / 1024.0f;
            if (types[t] == TENSOR_BF16)
                wanted = 1.0f + (float)(bits & 0x7fu) / 128.0f;
            if (types[t] == TENSOR_F32)
                memcpy(&wanted, &bits, sizeof wanted);
            cr_expect_eq(got[i], wanted, "type %zu, element %u", t, i);
        }
        gguf_close(&file);
        unload(&it);
    }
}

Test(model_load, layers_have_what_their_family_has)
{
    const struct family_recipe gemma3 = {
        .arch = "gemma3",
        .params = {.layer_count = 7, .features = MODEL_POST_NORMS | MODEL_QK_NORM},
        .keys = {{"attention.sliding_window", GGUF_U32, 16, NULL}}};
    struct loaded it;
    load_whole(&it, &gemma3);
    for (uint32_t i = 0; i < 7; i++) {
        const struct model_layer *layer = &it.span->layers[i];
        cr_expect(layer->q_norm_dev && layer->k_norm_dev && layer->attn_post_norm_dev &&
                  layer->ffn_post_norm_dev);
        cr_expect_null(layer->q_bias_dev);
        cr_expect_null(layer->w_router);
        cr_expect_eq(layer->window, i == 5 ? 0 : 16, "layer %u", i);
    }
    unload(&it);
    load_whole(&it, &llama);
    cr_expect_null(it.span->layers[0].q_norm_dev);
    cr_expect_null(it.span->layers[0].attn_post_norm_dev);
    cr_expect_eq(it.span->layers[1].window, 0);
    unload(&it);
}

/* ---- rotation tables ------------------------------------------------------------------------- */

static void expect_table(struct loaded *self, const struct rope_table *table, uint32_t positions,
                         uint32_t half_dim, double base, double linear, const float *factors,
                         double amplitude)
{
    static float cosines[64 * 1024], sines[64 * 1024], got[64 * 1024];
    double frequency[64];
    const size_t size = (size_t)positions * half_dim * sizeof(float);
    cr_assert(size <= sizeof got);
    cr_assert_eq(table->position_count, positions);
    cr_assert_eq(table->half_dim, half_dim);
    rope_table_frequencies(frequency, half_dim, base, linear, factors);
    rope_table_fill(cosines, sines, positions, half_dim, frequency, amplitude);
    cr_assert_eq(self->backend->ops->download(self->backend, got, table->cos_dev, size), ODSI_OK);
    cr_expect_eq(memcmp(got, cosines, size), 0);
    cr_assert_eq(self->backend->ops->download(self->backend, got, table->sin_dev, size), ODSI_OK);
    cr_expect_eq(memcmp(got, sines, size), 0);
}

/* Goal: layers with a window turn by their own base, the others by the linear scaling. */
Test(model_load, windowed_layers_have_a_table_of_their_own)
{
    const struct family_recipe gemma3 = {.arch = "gemma3",
                                         .params = {.layer_count = 6,
                                                    .context_length = 2048,
                                                    .features = MODEL_POST_NORMS | MODEL_QK_NORM},
                                         .keys = {{"attention.sliding_window", GGUF_U32, 16, NULL},
                                                  {"rope.freq_base", GGUF_F32, 1e6, NULL},
                                                  {"rope.scaling.factor", GGUF_F32, 8, NULL}}};
    struct loaded it;
    cr_assert_eq(load(&it, &gemma3, 3, 0, 2000), ODSI_OK, "%s", odsi_err_text());
    for (uint32_t i = 0; i < 6; i++)
        cr_expect_eq(it.span->layers[i].rope, i == 5 ? &it.span->rope : &it.span->rope_windowed);
    expect_table(&it, &it.span->rope, 2000, 4, 1e6, 8, NULL, 1);
    expect_table(&it, &it.span->rope_windowed, 2000, 4, 1e4, 1, NULL, 1);
    unload(&it);
    cr_assert_eq(load(&it, &gemma3, 1, 5, 16), ODSI_OK);
    cr_expect_null(it.span->rope_windowed.cos_dev, "no layer of this span has a window");
    expect_table(&it, &it.span->rope, 16, 4, 1e6, 8, NULL, 1);
    unload(&it);
}

Test(model_load, one_table_does_where_a_window_changes_nothing_else)
{
    const struct family_recipe mistral = {
        .arch = "llama", .keys = {{"attention.sliding_window", GGUF_U32, 16, NULL}}};
    struct loaded it;
    load_whole(&it, &mistral);
    cr_expect_eq(it.span->layers[0].window, 16);
    cr_expect_eq(it.span->layers[0].rope, &it.span->rope);
    cr_expect_null(it.span->rope_windowed.cos_dev);
    expect_table(&it, &it.span->rope, 16, 4, 1e4, 1, NULL, 1);
    unload(&it);
}

Test(model_load, factors_and_amplitude_of_the_file_are_in_the_table)
{
    struct loaded it;
    struct family_recipe recipe = {
        .arch = "phi3",
        .params = {.rope_dim = 6},
        .extra_tensors = {"rope_factors_long.weight", "rope_factors_short.weight"},
        .extra_cols = 3,
        .extra_value = 1.5f,
        .keys = {{"rope.dimension_count", GGUF_U32, 6, NULL},
                 {"rope.scaling.original_context_length", GGUF_U32, 16, NULL},
                 {"rope.scaling.attn_factor", GGUF_F32, 1.25, NULL}}};
    const float factors[] = {1.5f, 1.5f, 1.5f};
    load_whole(&it, &recipe);
    expect_table(&it, &it.span->rope, 16, 3, 1e4, 1, factors, 1.25);
    unload(&it);
    const float wrong[] = {0.5f, -1.0f, __builtin_nanf(""), __builtin_inff()};
    for (size_t i = 0; i < 4; i++) {
        recipe.extra_value = wrong[i];
        cr_expect_eq(load(&it, &recipe, 1, 0, 16), ODSI_ERR_CORRUPT, "%g", (double)wrong[i]);
        cr_expect_null(it.span);
        cr_expect_not_null(strstr(odsi_err_text(), "rope_freqs.weight has the factor"), "%s",
                           odsi_err_text());
        unload(&it);
    }
}

/* Goal: no failing allocation of any thread is lost. How: the number of the failing one goes up
 * until all of loading passes. */
Test(model_load, reports_every_allocation_that_fails_on_threads)
{
    struct family_recipe recipe = mixtral();
    struct loaded it;
    long failing = 0;
    load_whole(&it, &recipe);
    model_span_close(&it.span);
    backend_close(&it.backend);
    const struct backend_config config = {.name = "scalar", .thread_count = 3};
    cr_assert_eq(backend_open(&it.backend, &config), ODSI_OK);
    for (;; failing++) {
        alloc_fail_after(failing);
        const enum odsi_err err =
            model_span_open(&it.span, it.model, it.backend, 0, 2, 16, NULL, NULL);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        cr_assert_null(it.span);
    }
    cr_expect(failing > 40, "%ld", failing);
    unload(&it);
}
