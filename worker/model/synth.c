/* Every weight is a small integer q times a power of two that a block of 32 shares, so F32, F16 and
 * Q8_0 files of one shape and seed hold exactly the same numbers. Random bits come from splitmix64
 * by position, never from the state of a library. */
#include "worker/model/synth.h"

#include "common/base/alloc.h"
#include "common/base/buf.h"
#include "kernels/det.h"
#include "worker/model/arch.h"
#include "worker/model/gguf_value.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define ALIGNMENT       32u
#define CHUNK_SIZE      (1u << 20)
#define HEADER_SIZE_MAX (64u << 20)
#define SPECIAL_COUNT   3u   /* <unk>, <s>, </s> */
#define FIRST_MADE_UP   259u /* behind the specials and the 256 bytes */
#define BLOCK           32u
#define BLOCK_SIZE_MAX  (BLOCK * 4u)

static const struct synth_shape shapes[] = {
    {"llama-tiny", 256, 4, 8, 4, 32, 704, 2048, 1024, 1e-5f, 1e4f},
    {"llama-160m", 768, 12, 12, 12, 64, 3072, 32000, 2048, 1e-6f, 1e4f},
    {"llama-1.1b", 2048, 22, 32, 4, 64, 5632, 32000, 2048, 1e-5f, 1e4f},
    {"llama-7b", 4096, 32, 32, 8, 128, 14336, 32000, 4096, 1e-5f, 1e4f},
    {NULL},
};

const struct synth_shape *synth_shapes(void)
{
    return shapes;
}

const struct synth_shape *synth_shape_find(const char *name)
{
    for (const struct synth_shape *shape = shapes; shape->name; shape++)
        if (strcmp(shape->name, name) == 0)
            return shape;
    return NULL;
}

/* ---- the header ----------------------------------------------------------------------------- */

static void put_text(struct buf *out, const char *text)
{
    (void)buf_append_u64(out, strlen(text));
    (void)buf_append_text(out, text);
}

static void put_key(struct buf *out, const char *key, enum gguf_value_type type)
{
    put_text(out, key);
    (void)buf_append_u32(out, type);
}

static void put_u32(struct buf *out, const char *key, uint32_t value)
{
    put_key(out, key, GGUF_U32);
    (void)buf_append_u32(out, value);
}

static void put_f32(struct buf *out, const char *key, float value)
{
    put_key(out, key, GGUF_F32);
    (void)buf_append_u32(out, det_bits(value));
}

static void put_array(struct buf *out, const char *key, enum gguf_value_type type, uint64_t count)
{
    put_key(out, key, GGUF_ARRAY);
    (void)buf_append_u32(out, type);
    (void)buf_append_u64(out, count);
}

/* Token id as text: beyond the bytes, all words over space and a to z, the short ones first, so
 * that every longer one can be joined from two that are there. */
static void put_piece(struct buf *out, uint32_t id)
{
    static const char *const specials[SPECIAL_COUNT] = {"<unk>", "<s>", "</s>"};
    char letters[8];
    char text[32] = "";
    if (id < SPECIAL_COUNT) {
        put_text(out, specials[id]);
        return;
    }
    if (id < FIRST_MADE_UP) {
        snprintf(text, sizeof text, "<0x%02X>", id - SPECIAL_COUNT);
        put_text(out, text);
        return;
    }
    uint32_t rest = id - FIRST_MADE_UP;
    uint32_t length = 1;
    for (uint32_t words = 27; rest >= words; words *= 27, length++)
        rest -= words;
    for (uint32_t i = length; i-- > 0; rest /= 27)
        letters[i] = (char)(rest % 27);
    for (uint32_t i = 0; i < length; i++) {
        const size_t size = strlen(text);
        if (letters[i] == 0)
            memcpy(text + size, "\xe2\x96\x81", 4); /* U+2581, a space */
        else
            text[size] = (char)('a' + letters[i] - 1);
    }
    put_text(out, text);
}

/* Returns the number of keys. */
static uint32_t put_vocabulary(struct buf *out, uint32_t count)
{
    put_key(out, "tokenizer.ggml.model", GGUF_TEXT);
    put_text(out, "llama");
    put_array(out, "tokenizer.ggml.tokens", GGUF_TEXT, count);
    for (uint32_t id = 0; id < count; id++)
        put_piece(out, id);
    put_array(out, "tokenizer.ggml.scores", GGUF_F32, count);
    for (uint32_t id = 0; id < count; id++)
        (void)buf_append_u32(out,
                             det_bits(id < FIRST_MADE_UP ? 0.0f : -(float)(id - FIRST_MADE_UP)));
    put_array(out, "tokenizer.ggml.token_type", GGUF_I32, count);
    for (uint32_t id = 0; id < count; id++)
        (void)buf_append_u32(out, id == 0              ? 2
                                  : id < SPECIAL_COUNT ? 3
                                  : id < FIRST_MADE_UP ? 6
                                                       : 1);
    put_u32(out, "tokenizer.ggml.bos_token_id", 1);
    put_u32(out, "tokenizer.ggml.eos_token_id", 2);
    put_u32(out, "tokenizer.ggml.unknown_token_id", 0);
    return 7;
}

static uint32_t put_keys(struct buf *out, const struct synth_shape *shape, enum tensor_type type)
{
    char name[128];
    snprintf(name, sizeof name, "%s synthetic", shape->name);
    put_key(out, "general.architecture", GGUF_TEXT);
    put_text(out, "llama");
    put_key(out, "general.name", GGUF_TEXT);
    put_text(out, name);
    put_u32(out, "general.alignment", ALIGNMENT);
    put_u32(out, "general.file_type", type == TENSOR_Q8_0 ? 7 : (uint32_t)type);
    put_u32(out, "llama.context_length", shape->context_length);
    put_u32(out, "llama.embedding_length", shape->dim);
    put_u32(out, "llama.block_count", shape->layer_count);
    put_u32(out, "llama.feed_forward_length", shape->ffn_dim);
    put_u32(out, "llama.attention.head_count", shape->head_count);
    put_u32(out, "llama.attention.head_count_kv", shape->kv_head_count);
    put_u32(out, "llama.attention.key_length", shape->head_dim);
    put_u32(out, "llama.attention.value_length", shape->head_dim);
    put_u32(out, "llama.rope.dimension_count", shape->head_dim);
    put_f32(out, "llama.attention.layer_norm_rms_epsilon", shape->rms_eps);
    put_f32(out, "llama.rope.freq_base", shape->rope_base);
    return 15 + put_vocabulary(out, shape->vocab_size);
}

/* ---- which tensors, and how large ----------------------------------------------------------- */

struct plan {
    struct model_params params;
    enum tensor_type type;
    uint64_t seed;
};

static uint32_t tensor_count(const struct plan *plan)
{
    return ARCH_ROLE_LAYER_FIRST +
           plan->params.layer_count * (ARCH_ROLE_COUNT - ARCH_ROLE_LAYER_FIRST);
}

/* The index-th tensor of the file: those that the model has once, then layer by layer. */
static enum arch_role tensor_role(uint32_t index, uint32_t *layer)
{
    const uint32_t per_layer = ARCH_ROLE_COUNT - ARCH_ROLE_LAYER_FIRST;
    *layer = 0;
    if (index < ARCH_ROLE_LAYER_FIRST)
        return (enum arch_role)index;
    *layer = (index - ARCH_ROLE_LAYER_FIRST) / per_layer;
    return (enum arch_role)(ARCH_ROLE_LAYER_FIRST + (index - ARCH_ROLE_LAYER_FIRST) % per_layer);
}

static enum tensor_type type_of(const struct plan *plan, const struct arch_tensor *tensor)
{
    return tensor->is_norm ? TENSOR_F32 : plan->type;
}

/* Bytes of a tensor; plan_check made sure that there is an answer. */
static uint64_t size_of(const struct plan *plan, const struct arch_tensor *tensor)
{
    const uint64_t dims[4] = {tensor->cols, tensor->rows, 1, 1};
    uint64_t size = 0;
    (void)gguf_tensor_size((uint32_t)type_of(plan, tensor), dims, &size);
    return size;
}

static uint64_t padded(uint64_t size)
{
    return (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

/* Appends the description of every tensor; *data_size is what they take. */
static void put_tensors(struct buf *out, const struct plan *plan, uint64_t *data_size)
{
    uint64_t offset = 0;
    for (uint32_t i = 0; i < tensor_count(plan); i++) {
        struct arch_tensor tensor;
        uint32_t layer;
        const enum arch_role role = tensor_role(i, &layer);
        arch_tensor_of(&plan->params, role, layer, &tensor);
        put_text(out, tensor.name);
        (void)buf_append_u32(out, tensor.is_norm ? 1 : 2);
        (void)buf_append_u64(out, tensor.cols);
        if (!tensor.is_norm)
            (void)buf_append_u64(out, tensor.rows);
        (void)buf_append_u32(out, (uint32_t)type_of(plan, &tensor));
        (void)buf_append_u64(out, offset);
        offset += padded(size_of(plan, &tensor));
    }
    *data_size = offset;
}

static enum odsi_err plan_make(struct plan *out, const struct synth_shape *shape,
                               enum tensor_type type, uint64_t seed)
{
    *out = (struct plan){.params = {.arch = MODEL_ARCH_LLAMA,
                                    .dim = shape->dim,
                                    .layer_count = shape->layer_count,
                                    .head_count = shape->head_count,
                                    .kv_head_count = shape->kv_head_count,
                                    .head_dim = shape->head_dim,
                                    .ffn_dim = shape->ffn_dim,
                                    .vocab_size = shape->vocab_size,
                                    .context_length = shape->context_length,
                                    .rms_eps = shape->rms_eps,
                                    .rope_base = shape->rope_base},
                         .type = type,
                         .seed = seed};
    if (type != TENSOR_F32 && type != TENSOR_F16 && type != TENSOR_Q8_0)
        return odsi_fail(ODSI_ERR_INVALID, "weights can be F32, F16 or Q8_0");
    if (arch_check(&out->params) != ODSI_OK)
        return ODSI_ERR_INVALID; /* the sentence is there */
    if (shape->vocab_size < FIRST_MADE_UP)
        return odsi_fail(ODSI_ERR_INVALID, "a vocabulary takes at least %u tokens", FIRST_MADE_UP);
    if (type == TENSOR_Q8_0 && (shape->dim % BLOCK != 0 || shape->ffn_dim % BLOCK != 0 ||
                                shape->head_count * shape->head_dim % BLOCK != 0))
        return odsi_fail(ODSI_ERR_INVALID, "Q8_0 takes dimensions that are multiples of %u", BLOCK);
    return ODSI_OK;
}

static enum odsi_err make_header(struct buf *out, const struct plan *plan,
                                 const struct synth_shape *shape, uint64_t *data_size)
{
    static const uint8_t zeros[ALIGNMENT];
    struct buf keys;
    buf_init(&keys, HEADER_SIZE_MAX);
    const uint32_t key_count = put_keys(&keys, shape, plan->type);
    (void)buf_append_text(out, "GGUF");
    (void)buf_append_u32(out, 3);
    (void)buf_append_u64(out, tensor_count(plan));
    (void)buf_append_u64(out, key_count);
    enum odsi_err err = buf_status(&keys);
    if (err == ODSI_OK)
        err = buf_append(out, keys.data, keys.size);
    buf_free(&keys);
    if (err != ODSI_OK)
        return err;
    put_tensors(out, plan, data_size);
    return buf_append(out, zeros, (size_t)(padded(out->size) - out->size));
}

/* ---- weights -------------------------------------------------------------------------------- */

/* splitmix64: the position-th output of the generator that starts at seed. */
static uint64_t random_at(uint64_t seed, uint64_t position)
{
    uint64_t bits = seed + (position + 1) * UINT64_C(0x9e3779b97f4a7c15);
    bits = (bits ^ bits >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    bits = (bits ^ bits >> 27) * UINT64_C(0x94d049bb133111eb);
    return bits ^ bits >> 31;
}

/* What the weights of one tensor have in common. */
struct drawing {
    uint64_t seed;
    uint32_t exponent; /* a block's scale is 2^-exponent or half of it */
    enum tensor_type type;
    int is_norm;
};

/* The scale that makes a product of unit inputs come out near 1: q has a deviation of 73.6 and the
 * two scales average to 0.79, together 58. What is added to the residual stream is smaller by the
 * number of such additions; an embedding is near 1 itself. Found in integers: 4^exponent is within
 * a factor of two of the squared inverse. */
static uint32_t exponent_of(const struct plan *plan, enum arch_role role, uint32_t cols)
{
    uint64_t inverse = UINT64_C(58) * 58;
    if (role != ARCH_EMBED)
        inverse *= cols;
    if (role == ARCH_O || role == ARCH_DOWN)
        inverse *= 2 * (uint64_t)plan->params.layer_count;
    uint32_t exponent = 0;
    while (UINT64_C(2) << (2 * exponent) < inverse)
        exponent++;
    return exponent;
}

/* f16 bits of 2^-exponent, exponent <= 24. */
static uint16_t f16_of_power(uint32_t exponent)
{
    return (uint16_t)(exponent < 15 ? (15 - exponent) << 10 : 1u << (24 - exponent));
}

static void store_u32(uint8_t *to, uint32_t value)
{
    for (int i = 0; i < 4; i++)
        to[i] = (uint8_t)(value >> (8 * i));
}

/* Writes the index-th block of 32 weights; returns its bytes. */
static size_t draw_block(const struct drawing *drawing, uint64_t index, uint8_t *out)
{
    int8_t q[BLOCK];
    for (uint32_t i = 0; i < BLOCK; i += 8) {
        const uint64_t bits = random_at(drawing->seed, 5 * index + 1 + i / 8);
        for (uint32_t k = 0; k < 8; k++) {
            const uint8_t byte = (uint8_t)(bits >> (8 * k));
            q[i + k] = (int8_t)(byte == 0x80 ? -127 : byte < 0x80 ? byte : byte - 256);
        }
    }
    const uint32_t exponent =
        drawing->exponent + (uint32_t)(random_at(drawing->seed, 5 * index) & 1);
    if (drawing->type == TENSOR_Q8_0) {
        const uint16_t scale = f16_of_power(exponent);
        out[0] = (uint8_t)scale;
        out[1] = (uint8_t)(scale >> 8);
        memcpy(out + 2, q, BLOCK);
        return BLOCK + 2;
    }
    const float scale = det_from_bits((127 - exponent) << 23);
    const size_t size = drawing->type == TENSOR_F16 ? 2 : 4;
    for (uint32_t i = 0; i < BLOCK; i++) {
        const float value = drawing->is_norm ? 1.0f + (float)q[i] / 512.0f : (float)q[i] * scale;
        if (drawing->type == TENSOR_F16) {
            const uint16_t half = det_f16_from_f32(value);
            out[2 * i] = (uint8_t)half;
            out[2 * i + 1] = (uint8_t)(half >> 8);
        } else {
            store_u32(out + 4 * i, det_bits(value));
        }
    }
    return size * BLOCK;
}

/* ---- writing -------------------------------------------------------------------------------- */

struct writer {
    int fd;
    const char *path;
    uint8_t *chunk;
    size_t used;
    uint64_t done, total;
    void (*progress)(void *context, uint64_t done, uint64_t total);
    void *context;
};

static enum odsi_err cannot_write(const char *path)
{
    return odsi_fail(ODSI_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

static enum odsi_err flush(struct writer *self)
{
    for (size_t at = 0; at < self->used;) {
        const ssize_t written = write(self->fd, self->chunk + at, self->used - at);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return cannot_write(self->path);
        at += (size_t)written;
    }
    if (self->used == 0)
        return ODSI_OK;
    self->done += self->used;
    self->used = 0;
    if (self->progress)
        self->progress(self->context, self->done, self->total);
    return ODSI_OK;
}

static enum odsi_err put(struct writer *self, const uint8_t *data, size_t size)
{
    while (size > 0) {
        const size_t room = CHUNK_SIZE - self->used;
        const size_t part = size < room ? size : room;
        memcpy(self->chunk + self->used, data, part);
        self->used += part;
        data += part;
        size -= part;
        if (self->used == CHUNK_SIZE) {
            const enum odsi_err err = flush(self);
            if (err != ODSI_OK)
                return err;
        }
    }
    return ODSI_OK;
}

static enum odsi_err put_weights(struct writer *self, const struct plan *plan, uint32_t index)
{
    static const uint8_t zeros[ALIGNMENT];
    struct arch_tensor tensor;
    uint32_t layer;
    const enum arch_role role = tensor_role(index, &layer);
    arch_tensor_of(&plan->params, role, layer, &tensor);
    const struct drawing drawing = {.seed = random_at(plan->seed, index),
                                    .exponent = exponent_of(plan, role, tensor.cols),
                                    .type = type_of(plan, &tensor),
                                    .is_norm = tensor.is_norm};
    const uint64_t size = size_of(plan, &tensor);
    uint64_t at = 0;
    for (uint64_t block = 0; at < size; block++) {
        uint8_t bytes[BLOCK_SIZE_MAX];
        size_t part = draw_block(&drawing, block, bytes);
        if (part > size - at)
            part = (size_t)(size - at); /* the last block of a vector may be cut */
        const enum odsi_err err = put(self, bytes, part);
        if (err != ODSI_OK)
            return err;
        at += part;
    }
    return put(self, zeros, (size_t)(padded(size) - size));
}

static enum odsi_err write_all(struct writer *self, const struct plan *plan,
                               const struct buf *header)
{
    enum odsi_err err = put(self, header->data, header->size);
    for (uint32_t i = 0; i < tensor_count(plan) && err == ODSI_OK; i++)
        err = put_weights(self, plan, i);
    return err == ODSI_OK ? flush(self) : err;
}

/* Writes part and gives it the name path; on any error neither is there. */
static enum odsi_err write_file(struct writer *self, const struct plan *plan,
                                const struct buf *header, const char *path)
{
    self->fd = open(self->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (self->fd < 0 && errno == EEXIST)
        return odsi_fail(ODSI_ERR_EXISTS,
                         "%s is there: another program writes it, or one that "
                         "did was stopped; delete it",
                         self->path);
    if (self->fd < 0)
        return cannot_write(self->path);
    enum odsi_err err = write_all(self, plan, header);
    if (close(self->fd) != 0 && err == ODSI_OK)
        err = cannot_write(self->path);
    if (err == ODSI_OK && rename(self->path, path) != 0)
        err = cannot_write(path);
    if (err != ODSI_OK)
        unlink(self->path);
    return err;
}

enum odsi_err synth_write(const char *path, const struct synth_shape *shape, enum tensor_type type,
                          uint64_t seed,
                          void (*progress)(void *context, uint64_t done, uint64_t total),
                          void *context)
{
    struct plan plan;
    struct buf header, part;
    struct writer writer = {.progress = progress, .context = context};
    buf_init(&header, 2 * (size_t)HEADER_SIZE_MAX);
    buf_init(&part, 65536);
    enum odsi_err err = plan_make(&plan, shape, type, seed);
    if (err == ODSI_OK && access(path, F_OK) == 0)
        err = odsi_fail(ODSI_ERR_EXISTS, "%s is there already", path);
    if (err == ODSI_OK)
        err = make_header(&header, &plan, shape, &writer.total);
    if (err == ODSI_OK)
        err = buf_printf(&part, "%s.part", path);
    if (err == ODSI_OK)
        err = alloc_zeroed(&writer.chunk, CHUNK_SIZE, 1);
    if (err == ODSI_OK) {
        writer.total += header.size;
        writer.path = buf_text_view(&part);
        err = write_file(&writer, &plan, &header, path);
    }
    alloc_free(writer.chunk);
    buf_free(&part);
    buf_free(&header);
    return err;
}
