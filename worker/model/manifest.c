#include "worker/model/manifest.h"

#include "kernels/quant.h"
#include "worker/model/arch.h"
#include "worker/model/gguf.h"
#include "worker/model/reader.h"

#include <inttypes.h>
#include <string.h>

#define MAGIC           "ODSIMAN2"
#define TENSOR_SIZE_MIN 59u /* one byte of name and one dimension */

static void append_text(struct buf *out, const char *text)
{
    const size_t size = strlen(text);
    const uint8_t length[2] = {(uint8_t)size, (uint8_t)(size >> 8)};
    (void)buf_append(out, length, 2);
    (void)buf_append(out, text, size);
}

static void append_f32(struct buf *out, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    (void)buf_append_u32(out, bits);
}

void manifest_write(struct buf *out, const struct model_params *params, const char *name,
                    const struct digest *tokenizer_digest, const struct source_tensor *tensors,
                    struct manifest_digest *digests, uint32_t tensor_count)
{
    const uint32_t numbers[] = {(uint32_t)params->arch,
                                params->dim,
                                params->layer_count,
                                params->head_count,
                                params->kv_head_count,
                                params->head_dim,
                                params->ffn_dim,
                                params->vocab_size,
                                params->context_length,
                                params->expert_count,
                                params->expert_used_count,
                                params->features,
                                params->act,
                                params->rope_style,
                                params->rope_dim,
                                params->window,
                                params->window_period};
    const float factors[] = {
        params->rms_eps,         params->rope_base,         params->rope_base_windowed,
        params->rope_linear,     params->rope_amplitude,    params->embed_scale,
        params->attention_scale, params->attention_softcap, params->logit_softcap};
    (void)buf_append(out, MAGIC, 8);
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        (void)buf_append_u32(out, numbers[i]);
    for (size_t i = 0; i < sizeof factors / sizeof factors[0]; i++)
        append_f32(out, factors[i]);
    (void)buf_append(out, tokenizer_digest->bytes, DIGEST_SIZE);
    append_text(out, name);
    (void)buf_append_u32(out, tensor_count);
    for (uint32_t i = 0; i < tensor_count; i++) {
        const struct source_tensor *tensor = &tensors[i];
        append_text(out, tensor->name);
        (void)buf_append_u32(out, (uint32_t)tensor->type);
        (void)buf_append_u32(out, tensor->dim_count);
        for (uint32_t k = 0; k < tensor->dim_count; k++)
            (void)buf_append_u64(out, tensor->dims[k]);
        (void)buf_append_u64(out, tensor->size);
        digests[i].at = out->size;
        (void)buf_append(out, digests[i].digest.bytes, DIGEST_SIZE);
    }
}

static enum odsi_err corrupt(const char *what)
{
    return odsi_fail(ODSI_ERR_CORRUPT, "manifest: %s", what);
}

/* A text of 1 or min_size to max_size bytes from low to 0x7e; out has max_size + 1 bytes. */
static int take_text(struct reader *reader, char *out, size_t min_size, size_t max_size, char low)
{
    uint16_t size = 0;
    if (!reader_u16(reader, &size) || size < min_size || size > max_size)
        return 0;
    const uint8_t *text = reader_take(reader, size);
    if (!text)
        return 0;
    for (size_t i = 0; i < size; i++)
        if (text[i] < (uint8_t)low || text[i] > 0x7e)
            return 0;
    memcpy(out, text, size);
    out[size] = '\0';
    return 1;
}

/* One tensor: its name must come after before. */
static enum odsi_err read_tensor(struct reader *reader, char *before, uint64_t *size)
{
    char name[LIMIT_TENSOR_NAME_SIZE + 1];
    uint32_t type, dim_count;
    uint64_t dims[4] = {1, 1, 1, 1};
    uint64_t right_size;
    if (!take_text(reader, name, 1, LIMIT_TENSOR_NAME_SIZE, '!'))
        return corrupt("a tensor has no proper name");
    if (strcmp(before, name) >= 0)
        return corrupt("the tensors are not in the order of their names");
    if (!reader_u32(reader, &type) || !reader_u32(reader, &dim_count) || !quant_is_known(type) ||
        dim_count < 1 || dim_count > 3)
        return odsi_fail(ODSI_ERR_CORRUPT, "manifest: tensor %s: wrong type or dimensions", name);
    for (uint32_t i = 0; i < dim_count; i++)
        if (!reader_u64(reader, &dims[i]) || dims[i] == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "manifest: tensor %s: wrong dimensions", name);
    if (!reader_u64(reader, size) || !gguf_tensor_size(type, dims, &right_size) ||
        *size != right_size || !reader_take(reader, DIGEST_SIZE))
        return odsi_fail(ODSI_ERR_CORRUPT, "manifest: tensor %s: wrong size", name);
    memcpy(before, name, sizeof name);
    return ODSI_OK;
}

static enum odsi_err read_head(struct reader *reader, struct model_params *out,
                               struct digest *tokenizer_digest)
{
    uint32_t arch;
    const uint8_t *magic = reader_take(reader, 8);
    if (!magic || memcmp(magic, MAGIC, 8) != 0)
        return corrupt("these are no manifest bytes");
    uint32_t *const numbers[] = {&arch,
                                 &out->dim,
                                 &out->layer_count,
                                 &out->head_count,
                                 &out->kv_head_count,
                                 &out->head_dim,
                                 &out->ffn_dim,
                                 &out->vocab_size,
                                 &out->context_length,
                                 &out->expert_count,
                                 &out->expert_used_count,
                                 &out->features,
                                 &out->act,
                                 &out->rope_style,
                                 &out->rope_dim,
                                 &out->window,
                                 &out->window_period};
    float *const factors[] = {
        &out->rms_eps,         &out->rope_base,         &out->rope_base_windowed,
        &out->rope_linear,     &out->rope_amplitude,    &out->embed_scale,
        &out->attention_scale, &out->attention_softcap, &out->logit_softcap};
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (!reader_u32(reader, numbers[i]))
            return corrupt("its head is cut off");
    if (arch < MODEL_ARCH_LLAMA || arch > MODEL_ARCH_PHI3) /* no number but those is in the enum */
        return odsi_fail(ODSI_ERR_CORRUPT, "manifest: architecture %" PRIu32 " does not exist",
                         arch);
    out->arch = (enum model_arch)arch;
    for (size_t i = 0; i < sizeof factors / sizeof factors[0]; i++)
        if (!reader_f32(reader, factors[i]))
            return corrupt("its head is cut off");
    const uint8_t *digest = reader_take(reader, DIGEST_SIZE);
    if (!digest)
        return corrupt("its head is cut off");
    memcpy(tokenizer_digest->bytes, digest, DIGEST_SIZE);
    if (!take_text(reader, out->name, 0, sizeof out->name - 1, ' '))
        return corrupt("the model has no proper name");
    const enum odsi_err err = arch_check(out);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "manifest");
}

static enum odsi_err read_all(struct reader *reader, struct model_params *out,
                              struct digest *tokenizer_digest)
{
    char before[LIMIT_TENSOR_NAME_SIZE + 1] = "";
    uint32_t count = 0;
    enum odsi_err err = read_head(reader, out, tokenizer_digest);
    if (err != ODSI_OK)
        return err;
    if (!reader_u32(reader, &count) || count > LIMIT_TENSORS_MAX ||
        count > reader_left(reader) / TENSOR_SIZE_MIN)
        return odsi_fail(ODSI_ERR_CORRUPT, "manifest: %" PRIu32 " tensors cannot be in it", count);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t size = 0;
        err = read_tensor(reader, before, &size);
        if (err != ODSI_OK)
            return err;
        if (__builtin_add_overflow(out->weight_size, size, &out->weight_size))
            return corrupt("its tensors are larger than any file");
    }
    return reader_left(reader) == 0 ? ODSI_OK : corrupt("bytes follow its last tensor");
}

enum odsi_err manifest_read(const uint8_t *data, size_t size, struct model_params *params,
                            struct digest *tokenizer_digest)
{
    struct reader reader = {.data = data, .size = size};
    memset(params, 0, sizeof *params);
    if (size > MANIFEST_SIZE_MAX)
        return corrupt("it is larger than any we take");
    return read_all(&reader, params, tokenizer_digest);
}
