#include "tests/unit/model/family_fixture.h"

#include "kernels/quant.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/arch.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define TENSORS_MAX 1024u

const struct model_params family_params = {.arch = MODEL_ARCH_LLAMA,
                                           .dim = 32,
                                           .layer_count = 2,
                                           .head_count = 4,
                                           .kv_head_count = 2,
                                           .head_dim = 8,
                                           .ffn_dim = 64,
                                           .vocab_size = FIXTURE_VOCABULARY,
                                           .context_length = 64,
                                           .rope_dim = 8};

/* Rows of a weight that lie in a tensor. */
struct segment {
    uint64_t seed; /* of its first row; the next one's is one more */
    uint64_t rows;
};

struct made {
    char name[64];
    uint32_t dim_count;
    uint64_t dims[4];
    uint32_t type;
    uint64_t size;
    struct segment segments[3];
    float value; /* of all numbers; 0: random ones */
};

struct making {
    const struct family_recipe *recipe;
    struct model_params params;
    struct made tensors[TENSORS_MAX];
    uint32_t count;
};

static uint32_t or_default(uint32_t value, uint32_t fallback)
{
    return value ? value : fallback;
}

void family_complete(struct model_params *params)
{
    const struct model_params *d = &family_params;
    params->dim = or_default(params->dim, d->dim);
    params->layer_count = or_default(params->layer_count, d->layer_count);
    params->head_count = or_default(params->head_count, d->head_count);
    params->kv_head_count = or_default(params->kv_head_count, d->kv_head_count);
    params->head_dim = or_default(params->head_dim, d->head_dim);
    params->ffn_dim = or_default(params->ffn_dim, d->ffn_dim);
    params->vocab_size = or_default(params->vocab_size, d->vocab_size);
    params->context_length = or_default(params->context_length, d->context_length);
    params->rope_dim = or_default(params->rope_dim, params->head_dim);
}

/* ---- metadata -------------------------------------------------------------------------------- */

static int is(const char *a, const char *b)
{
    return b && strcmp(a, b) == 0;
}

static void put_key(struct buf *out, const struct family_recipe *recipe,
                    const struct family_key *key, uint32_t *count)
{
    char name[128];
    snprintf(name, sizeof name, "%s.%s", recipe->arch, key->key);
    if (is(name, recipe->skip_key))
        return;
    ++*count;
    if (key->type == GGUF_TEXT)
        fixture_string(out, name, key->text);
    else if (key->type == GGUF_F32)
        fixture_f32(out, name, (float)key->number);
    else
        fixture_u32(out, name, (uint32_t)key->number);
}

static void put_keys(struct buf *out, const struct making *making, uint32_t *count)
{
    const struct family_recipe *recipe = making->recipe;
    const struct model_params *p = &making->params;
    const struct family_key base[] = {
        {"context_length", GGUF_U32, p->context_length, NULL},
        {"embedding_length", GGUF_U32, p->dim, NULL},
        {"block_count", GGUF_U32, p->layer_count, NULL},
        {"feed_forward_length", GGUF_U32, p->ffn_dim, NULL},
        {"attention.head_count", GGUF_U32, p->head_count, NULL},
        {"attention.head_count_kv", GGUF_U32, p->kv_head_count, NULL},
        {"attention.layer_norm_rms_epsilon", GGUF_F32, 1e-6, NULL},
    };
    fixture_string(out, "general.architecture", recipe->arch);
    fixture_string(out, "general.name", "family");
    *count += 2;
    for (size_t i = 0; i < sizeof base / sizeof base[0]; i++)
        put_key(out, recipe, &base[i], count);
    for (size_t i = 0; i < sizeof recipe->keys / sizeof recipe->keys[0] && recipe->keys[i].key; i++)
        put_key(out, recipe, &recipe->keys[i], count);
    fixture_vocabulary(out, count);
}

/* ---- tensors --------------------------------------------------------------------------------- */

/* The seed of the first row of a matrix. */
static uint64_t seed_of(enum arch_role role, uint32_t layer, uint32_t matrix)
{
    return ((uint64_t)role * 1024 + layer) << 40 | (uint64_t)matrix << 28;
}

static struct made *add(struct making *self, const char *name, uint32_t dim_count, uint64_t cols,
                        uint64_t rows, uint64_t matrices)
{
    static struct made dropped;
    const struct family_recipe *recipe = self->recipe;
    cr_assert(self->count < TENSORS_MAX);
    struct made *made = is(name, recipe->skip_tensor) ? &dropped : &self->tensors[self->count++];
    *made = (struct made){.dim_count = dim_count, .dims = {cols, rows, matrices, 1}};
    snprintf(made->name, sizeof made->name, "%s", name);
    made->type = is(name, recipe->other_tensor) ? recipe->other_type : TENSOR_F32;
    cr_assert(gguf_tensor_size(made->type, made->dims, &made->size), "%s", name);
    return made;
}

/* One tensor for several roles, whose rows follow one another. */
static void add_fused(struct making *self, const char *stem, const enum arch_role *roles,
                      uint32_t count, uint32_t layer)
{
    struct segment segments[3] = {{0}};
    struct arch_tensor tensor;
    uint64_t rows = 0;
    char name[64];
    for (uint32_t i = 0; i < count; i++) {
        cr_assert(arch_tensor_of(&self->params, roles[i], layer, &tensor));
        segments[i] = (struct segment){seed_of(roles[i], layer, 0), tensor.rows};
        rows += tensor.rows;
    }
    snprintf(name, sizeof name, "blk.%" PRIu32 ".%s.weight", layer, stem);
    memcpy(add(self, name, 2, tensor.cols, rows, 1)->segments, segments, sizeof segments);
}

static void add_experts(struct making *self, const struct arch_tensor *tensor, enum arch_role role,
                        uint32_t layer)
{
    const char *end = strstr(tensor->name, "_exps");
    for (uint32_t e = 0; e < tensor->matrix_count; e++) {
        char name[64];
        snprintf(name, sizeof name, "%.*s.%" PRIu32 ".weight", (int)(end - tensor->name),
                 tensor->name, e);
        struct made *made = add(self, name, 2, tensor->cols, tensor->rows, 1);
        made->segments[0] =
            (struct segment){seed_of(role, layer, 0) + (uint64_t)e * tensor->rows, tensor->rows};
    }
}

static void add_role(struct making *self, enum arch_role role, uint32_t layer)
{
    static const enum arch_role qkv[] = {ARCH_Q, ARCH_K, ARCH_V};
    static const enum arch_role gate_up[] = {ARCH_GATE, ARCH_UP};
    const struct family_recipe *recipe = self->recipe;
    struct arch_tensor tensor;
    if (!arch_tensor_of(&self->params, role, layer, &tensor))
        return;
    if (recipe->fuses_qkv && (role == ARCH_Q || role == ARCH_K || role == ARCH_V)) {
        if (role == ARCH_Q)
            add_fused(self, "attn_qkv", qkv, 3, layer);
    } else if (recipe->fuses_gate_up && (role == ARCH_GATE || role == ARCH_UP)) {
        if (role == ARCH_UP)
            add_fused(self, "ffn_up", gate_up, 2, layer);
    } else if (recipe->splits_experts && tensor.matrix_count > 1) {
        add_experts(self, &tensor, role, layer);
    } else {
        struct made *made = add(self, tensor.name,
                                tensor.is_vector          ? 1
                                : tensor.matrix_count > 1 ? 3
                                                          : 2,
                                tensor.cols, tensor.rows, tensor.matrix_count);
        made->segments[0] =
            (struct segment){seed_of(role, layer, 0), (uint64_t)tensor.rows * tensor.matrix_count};
    }
}

static void make_tensors(struct making *self)
{
    for (uint32_t role = 0; role < ARCH_ROLE_COUNT; role++) {
        const uint32_t layers = role < ARCH_ROLE_LAYER_FIRST ? 1 : self->params.layer_count;
        for (uint32_t layer = 0; layer < layers; layer++)
            add_role(self, (enum arch_role)role, layer);
    }
    for (uint32_t i = 0; i < 4 && self->recipe->extra_tensors[i]; i++) {
        struct made *made =
            add(self, self->recipe->extra_tensors[i], 1, self->recipe->extra_cols, 1, 1);
        made->value = self->recipe->extra_value;
        made->segments[0] = (struct segment){seed_of(ARCH_ROLE_COUNT, i, 0), 1};
    }
}

static void put_number(struct buf *out, const struct made *made, uint64_t random)
{
    uint32_t bits = 0x3f800000u | (uint32_t)(random & 0x7fffffu);
    size_t size = 4;
    if (made->value != 0.0f)
        memcpy(&bits, &made->value, sizeof bits);
    if (made->type == TENSOR_F16 || made->type == TENSOR_BF16) {
        size = 2;
        bits = made->type == TENSOR_F16 ? 0x3c00u | (uint32_t)(random & 0x3ffu)
                                        : 0x3f80u | (uint32_t)(random & 0x7fu);
    } else if (made->type != TENSOR_F32) {
        size = 1;
    }
    (void)buf_append(out, &bits, size); /* this machine is little-endian, as files are */
}

/* Numbers from 1 to 2, so that they may also divide a frequency; of quantized types any bytes. */
static void put_data(struct buf *out, const struct made *made)
{
    const uint64_t row_count = made->dims[1] * made->dims[2];
    const uint64_t row_size = made->size / row_count;
    for (size_t i = 0; i < 3; i++)
        for (uint64_t row = 0; row < made->segments[i].rows; row++) {
            uint64_t state = made->segments[i].seed + row;
            for (const size_t end = out->size + row_size; out->size < end;)
                put_number(out, made, fixture_random(&state));
        }
}

/* ---- files ----------------------------------------------------------------------------------- */

void family_part(struct buf *out, const struct family_recipe *recipe, uint32_t index,
                 uint32_t part_count)
{
    static struct making making; /* tests run in processes of their own */
    struct buf keys, infos, data;
    uint32_t key_count = 0, tensor_count = 0;
    making = (struct making){.recipe = recipe, .params = recipe->params};
    family_complete(&making.params);
    make_tensors(&making);
    buf_init(&keys, 1u << 20);
    buf_init(&infos, 1u << 20);
    buf_init(&data, 4u << 20);
    if (part_count > 1) {
        fixture_u32(&keys, "split.no", index);
        fixture_u32(&keys, "split.count", part_count);
        fixture_u32(&keys, "split.tensors.count", making.count);
        key_count = 3;
    }
    if (index == 0)
        put_keys(&keys, &making, &key_count);
    for (uint32_t i = index; i < making.count; i += part_count) {
        const struct made *made = &making.tensors[i];
        fixture_tensor(&infos, made->name, made->dim_count, made->dims, made->type, data.size);
        put_data(&data, made);
        fixture_pad(&data);
        tensor_count++;
    }
    fixture_head(out, 3, tensor_count, key_count);
    (void)buf_append(out, keys.data, keys.size);
    (void)buf_append(out, infos.data, infos.size);
    fixture_pad(out);
    (void)buf_append(out, data.data, data.size);
    buf_free(&keys);
    buf_free(&infos);
    buf_free(&data);
}

const char *family_write(const char *folder, const struct family_recipe *recipe,
                         uint32_t part_count)
{
    const char *first = NULL;
    for (uint32_t i = part_count; i-- > 0;) {
        struct buf bytes;
        char name[64];
        buf_init(&bytes, 8u << 20);
        family_part(&bytes, recipe, i, part_count);
        if (part_count > 1)
            snprintf(name, sizeof name, "m-%05" PRIu32 "-of-%05" PRIu32 ".gguf", i + 1, part_count);
        else
            snprintf(name, sizeof name, "m.gguf");
        first = fixture_path(folder, name);
        fixture_write(first, &bytes);
        buf_free(&bytes);
    }
    return first;
}
