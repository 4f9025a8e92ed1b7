/* Every weight is a small integer q times a power of two that a block of 32 shares: F32, F16, BF16
 * and Q8_0 can hold that exactly. Random bits come from splitmix64 by position, never from the
 * state of a library. */
#include "worker/model/synth.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "kernels/cpu/pool.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "worker/model/gguf_writer.h"
#include "worker/model/quantizer.h"
#include "worker/model/synth_tensor.h"
#include "worker/model/synth_vocab.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define BLOCK       32u
#define CHUNK_COUNT (1u << 20) /* weights drawn at once, at least a row */

struct synth {
    const struct synth_shape *shape;
    const struct quant_mix *mix;
    uint64_t seed;
    struct gguf_writer *out;
    struct quantizer *quantizer;
    struct synth_tensor *tensors;
    uint32_t tensor_count;
    float *weights; /* [chunk] */
    uint8_t *bytes; /* [chunk] as they go into the file */
    uint64_t chunk; /* weights */
};

/* ---- checks ---------------------------------------------------------------------------------- */

static enum odsi_err check_range(const char *what, uint64_t value, uint64_t min, uint64_t max)
{
    if (value >= min && value <= max)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_INVALID,
                     "a model's %s cannot be %" PRIu64 ": it is within %" PRIu64 " to %" PRIu64,
                     what, value, min, max);
}

static enum odsi_err check_shape(const struct synth_shape *shape)
{
    const struct {
        const char *what;
        uint64_t value, min, max;
    } ranges[] = {
        {"dimension", shape->dim, 1, LIMIT_DIM_MAX},
        {"number of layers", shape->layer_count, 1, LIMIT_LAYERS_MAX},
        {"number of heads", shape->head_count, 1, LIMIT_HEADS_MAX},
        {"number of key-value heads", shape->kv_head_count, 1, shape->head_count},
        {"head size", shape->head_dim, 2, LIMIT_HEAD_DIM_MAX},
        {"feed-forward dimension", shape->ffn_dim, 1, LIMIT_FFN_MAX},
        {"vocabulary", shape->vocab_size, synth_vocab_size_min(shape->vocabulary), LIMIT_VOCAB_MAX},
        {"context length", shape->context_length, 1, LIMIT_CONTEXT_MAX},
        {"number of experts", shape->expert_count, 0, 1024},
        {"number of experts of a token", shape->expert_used_count, shape->expert_count > 0,
         shape->expert_count},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof ranges[0]; i++) {
        const enum odsi_err err =
            check_range(ranges[i].what, ranges[i].value, ranges[i].min, ranges[i].max);
        if (err != ODSI_OK)
            return err;
    }
    if (shape->head_dim % 2 != 0 || shape->head_count % shape->kv_head_count != 0)
        return odsi_fail(ODSI_ERR_INVALID,
                         "%" PRIu32 " heads of %" PRIu32 " cannot turn in pairs and share %" PRIu32
                         " key-value heads evenly",
                         shape->head_count, shape->head_dim, shape->kv_head_count);
    return ODSI_OK;
}

/* ---- metadata -------------------------------------------------------------------------------- */

static const char *architecture_of(const struct synth_shape *shape)
{
    switch (shape->family) {
    case SYNTH_QWEN2:
        return "qwen2";
    case SYNTH_QWEN3:
        return shape->expert_count > 0 ? "qwen3moe" : "qwen3";
    case SYNTH_GEMMA2:
        return "gemma2";
    case SYNTH_GEMMA3:
        return "gemma3";
    case SYNTH_PHI3:
        return "phi3";
    default:
        return "llama";
    }
}

struct key {
    char text[96];
};

static struct key key_of(const struct synth *self, const char *name)
{
    struct key key;
    snprintf(key.text, sizeof key.text, "%s.%s", architecture_of(self->shape), name);
    return key;
}

static void put_u32(struct synth *self, const char *name, uint32_t value)
{
    gguf_writer_u32(self->out, key_of(self, name).text, value);
}

static void put_f32(struct synth *self, const char *name, float value)
{
    gguf_writer_f32(self->out, key_of(self, name).text, value);
}

static void put_size_of_head(struct synth *self)
{
    const struct synth_shape *shape = self->shape;
    if (shape->family != SYNTH_QWEN2 && shape->family != SYNTH_PHI3) {
        put_u32(self, "attention.key_length", shape->head_dim);
        put_u32(self, "attention.value_length", shape->head_dim);
    }
    if (shape->family == SYNTH_LLAMA || shape->family == SYNTH_PHI3)
        put_u32(self, "rope.dimension_count", shape->head_dim);
}

/* Keys that only some families have, or that say something else than the default. */
static void put_special_keys(struct synth *self)
{
    const struct synth_shape *shape = self->shape;
    if (shape->expert_count > 0) {
        put_u32(self, "expert_count", shape->expert_count);
        put_u32(self, "expert_used_count", shape->expert_used_count);
        if (shape->family == SYNTH_QWEN3)
            put_u32(self, "expert_feed_forward_length", shape->ffn_dim);
    }
    if (shape->window > 0)
        put_u32(self, "attention.sliding_window", shape->window);
    if (shape->attention_softcap > 0.0f)
        put_f32(self, "attn_logit_softcapping", shape->attention_softcap);
    if (shape->logit_softcap > 0.0f)
        put_f32(self, "final_logit_softcapping", shape->logit_softcap);
    if (shape->rope_linear > 0.0f) {
        gguf_writer_text(self->out, key_of(self, "rope.scaling.type").text, "linear");
        put_f32(self, "rope.scaling.factor", shape->rope_linear);
    }
    if (shape->rope_original_length > 0) {
        put_u32(self, "rope.scaling.original_context_length", shape->rope_original_length);
        put_f32(self, "rope.scaling.attn_factor", 1.1875f);
    }
}

static void put_keys(struct synth *self)
{
    const struct synth_shape *shape = self->shape;
    char name[128];
    snprintf(name, sizeof name, "%s synthetic", shape->name);
    gguf_writer_text(self->out, "general.architecture", architecture_of(shape));
    gguf_writer_text(self->out, "general.name", name);
    gguf_writer_u32(self->out, "general.file_type", self->mix->file_type);
    if (quant_is_quantized(self->mix->type))
        gguf_writer_u32(self->out, "general.quantization_version", 2);
    put_u32(self, "context_length", shape->context_length);
    put_u32(self, "embedding_length", shape->dim);
    put_u32(self, "block_count", shape->layer_count);
    put_u32(self, "feed_forward_length", shape->ffn_dim);
    put_u32(self, "attention.head_count", shape->head_count);
    put_u32(self, "attention.head_count_kv", shape->kv_head_count);
    put_f32(self, "attention.layer_norm_rms_epsilon", shape->rms_eps);
    put_f32(self, "rope.freq_base", shape->rope_base);
    put_size_of_head(self);
    put_special_keys(self);
    synth_vocab_write(self->out, shape->vocabulary, shape->vocab_size);
}

/* ---- weights --------------------------------------------------------------------------------- */

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
    enum synth_draw draw;
    float gain;
    uint64_t count; /* of weights */
};

/* Such that the deviation is that of the tensor: q has one of 73.6 and the two scales average to
 * 0.79, together 58. Found in integers: 4^exponent is within a factor of two of the square. */
static uint32_t exponent_of(const struct synth_tensor *tensor)
{
    const uint64_t inverse = UINT64_C(58) * 58 * tensor->inverse;
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

/* The integers of the index-th block of 32 weights; returns the exponent of its scale. */
static uint32_t draw_block(const struct drawing *drawing, uint64_t index, int8_t q[BLOCK])
{
    for (uint32_t i = 0; i < BLOCK; i += 8) {
        const uint64_t bits = random_at(drawing->seed, 5 * index + 1 + i / 8);
        for (uint32_t k = 0; k < 8; k++) {
            const uint8_t byte = (uint8_t)(bits >> (8 * k));
            q[i + k] = (int8_t)(byte == 0x80 ? -127 : byte < 0x80 ? byte : byte - 256);
        }
    }
    return drawing->exponent + (uint32_t)(random_at(drawing->seed, 5 * index) & 1);
}

/* From 1 in the first third to gain in the last. */
static float factor_at(const struct drawing *drawing, uint64_t index)
{
    const float at = (float)(3 * index) / (float)drawing->count - 1.0f;
    const float part = at < 0.0f ? 0.0f : at > 1.0f ? 1.0f : at;
    return 1.0f + part * (drawing->gain - 1.0f);
}

/* Weights [first, first + count), first a multiple of 32. */
static void draw_floats(const struct drawing *drawing, uint64_t first, uint64_t count, float *out)
{
    for (uint64_t at = 0; at < count; at += BLOCK) {
        int8_t q[BLOCK];
        const uint32_t exponent = draw_block(drawing, (first + at) / BLOCK, q);
        const float scale = det_from_bits((127 - exponent) << 23);
        const uint64_t part = count - at < BLOCK ? count - at : BLOCK;
        for (uint64_t i = 0; i < part; i++) {
            switch (drawing->draw) {
            case SYNTH_MATRIX:
                out[at + i] = (float)q[i] * scale;
                break;
            case SYNTH_NORM:
                out[at + i] = drawing->gain * (1.0f + (float)q[i] / 512.0f);
                break;
            case SYNTH_BIAS:
                out[at + i] = (float)q[i] / 256.0f;
                break;
            case SYNTH_FACTORS:
                out[at + i] = factor_at(drawing, first + at + i);
                break;
            }
        }
    }
}

static void draw_q8(const struct drawing *drawing, uint64_t first, uint64_t count, uint8_t *out)
{
    for (uint64_t at = 0; at < count; at += BLOCK, out += BLOCK + 2) {
        int8_t q[BLOCK];
        const uint16_t scale = f16_of_power(draw_block(drawing, (first + at) / BLOCK, q));
        out[0] = (uint8_t)scale;
        out[1] = (uint8_t)(scale >> 8);
        memcpy(out + 2, q, BLOCK);
    }
}

/* ---- the file -------------------------------------------------------------------------------- */

static enum tensor_type type_of(const struct synth *self, const struct synth_tensor *tensor)
{
    const struct quant_mix_model model = {.layer_count = self->shape->layer_count,
                                          .head_count = self->shape->head_count,
                                          .kv_head_count = self->shape->kv_head_count,
                                          .expert_count = self->shape->expert_count,
                                          .is_tied = self->shape->is_tied};
    return quant_mix_type(self->mix, &model, tensor->name, tensor->dim_count, tensor->dims);
}

static enum odsi_err put_weights(struct synth *self, uint32_t index)
{
    const struct synth_tensor *tensor = &self->tensors[index];
    const enum tensor_type type = type_of(self, tensor);
    const uint64_t cols = tensor->dims[0];
    const uint64_t row_count = tensor->dims[1] * tensor->dims[2];
    const struct drawing drawing = {.seed = random_at(self->seed, index),
                                    .exponent = exponent_of(tensor),
                                    .draw = tensor->draw,
                                    .gain = tensor->gain,
                                    .count = row_count * cols};
    /* Whole rows, and whole blocks of 32: a row may end inside one. */
    const uint64_t rows_max = self->chunk / cols / BLOCK * BLOCK;
    enum odsi_err err = ODSI_OK;
    for (uint64_t row = 0; row < row_count && err == ODSI_OK; row += rows_max) {
        const uint64_t rows = row_count - row < rows_max ? row_count - row : rows_max;
        if (type == TENSOR_Q8_0) {
            draw_q8(&drawing, row * cols, rows * cols, self->bytes);
        } else {
            draw_floats(&drawing, row * cols, rows * cols, self->weights);
            err = quantizer_rows(self->quantizer, type, self->weights, rows, (uint32_t)cols,
                                 self->bytes);
        }
        if (err == ODSI_OK)
            err = gguf_writer_data(self->out, self->bytes,
                                   rows * quant_row_size(type, (uint32_t)cols));
    }
    return err;
}

static enum odsi_err write_all(struct synth *self)
{
    put_keys(self);
    for (uint32_t i = 0; i < self->tensor_count; i++)
        gguf_writer_tensor(self->out, self->tensors[i].name, type_of(self, &self->tensors[i]),
                           self->tensors[i].dim_count, self->tensors[i].dims);
    enum odsi_err err = gguf_writer_begin(self->out);
    for (uint32_t i = 0; i < self->tensor_count && err == ODSI_OK; i++)
        err = put_weights(self, i);
    return err == ODSI_OK ? gguf_writer_finish(self->out) : err;
}

/* Room for 32 of the longest rows, and for CHUNK_COUNT weights. */
static enum odsi_err make_room(struct synth *self)
{
    self->chunk = CHUNK_COUNT;
    for (uint32_t i = 0; i < self->tensor_count; i++)
        if (self->tensors[i].dims[0] * BLOCK > self->chunk)
            self->chunk = self->tensors[i].dims[0] * BLOCK;
    enum odsi_err err = alloc_zeroed(&self->weights, self->chunk, sizeof *self->weights);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->bytes, self->chunk, sizeof(float));
    return err;
}

enum odsi_err synth_write_mix(const char *path, const struct synth_shape *shape,
                              const struct quant_mix *mix, uint64_t seed,
                              void (*progress)(void *context, uint64_t done, uint64_t total),
                              void *context)
{
    struct synth self = {.shape = shape, .mix = mix, .seed = seed};
    enum odsi_err err = check_shape(shape);
    if (err == ODSI_OK)
        err = synth_tensor_list(&self.tensors, &self.tensor_count, shape);
    if (err == ODSI_OK)
        err = make_room(&self);
    if (err == ODSI_OK)
        err = quantizer_open(&self.quantizer, pool_cpu_count());
    if (err == ODSI_OK)
        err = gguf_writer_open(&self.out, path, progress, context);
    if (err == ODSI_OK)
        err = write_all(&self);
    gguf_writer_close(&self.out);
    quantizer_close(&self.quantizer);
    alloc_free(self.bytes);
    alloc_free(self.weights);
    alloc_free(self.tensors);
    return err;
}

enum odsi_err synth_write(const char *path, const struct synth_shape *shape, enum tensor_type type,
                          uint64_t seed,
                          void (*progress)(void *context, uint64_t done, uint64_t total),
                          void *context)
{
    if (!quant_is_known((uint32_t)type))
        return odsi_fail(ODSI_ERR_INVALID, "weights cannot be of type %u", (unsigned)type);
    const struct quant_mix mix = quant_mix_pure(type);
    return synth_write_mix(path, shape, &mix, seed, progress, context);
}
