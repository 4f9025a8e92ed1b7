#include "worker/model/quantize.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "kernels/quant.h"
#include "worker/model/gguf.h"
#include "worker/model/gguf_writer.h"
#include "worker/model/quantizer.h"
#include "worker/model/source.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#define CHUNK_COUNT (4u << 20) /* weights read and converted at once, at least one row */

struct quantize {
    const struct quantize_config *config;
    struct quantize_result *result;
    struct source *source; /* says which files there are, and that this build knows the model */
    struct gguf **parts;   /* [source->file_count] */
    struct quant_mix_model model;
    struct quantizer *quantizer;
    struct gguf_writer *out;
    uint8_t *in;    /* [chunk_size] */
    uint8_t *bytes; /* [chunk_size] */
    size_t chunk_size;
    uint64_t quantized_count; /* tensors of a quantized type in the new file */
};

/* ---- what comes in --------------------------------------------------------------------------- */

static enum odsi_err open_parts(struct quantize *self, const char *from)
{
    struct stat status;
    if (stat(from, &status) == 0 && S_ISDIR(status.st_mode))
        return odsi_fail(
            ODSI_ERR_UNSUPPORTED,
            "%s is a folder: only GGUF files can be quantized; convert it to one first", from);
    enum odsi_err err = source_open(&self->source, from);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->parts, self->source->file_count, sizeof *self->parts);
    for (uint32_t i = 0; err == ODSI_OK && i < self->source->file_count; i++)
        err = gguf_open(&self->parts[i], self->source->files[i].path);
    if (err != ODSI_OK)
        return err;
    const struct model_params *params = &self->source->params;
    self->model = (struct quant_mix_model){.layer_count = params->layer_count,
                                           .head_count = params->head_count,
                                           .kv_head_count = params->kv_head_count,
                                           .expert_count = params->expert_count,
                                           .is_tied = 1};
    for (uint32_t i = 0; i < self->source->file_count; i++)
        if (gguf_tensor_find(self->parts[i], "output.weight"))
            self->model.is_tied = 0;
    return ODSI_OK;
}

static enum tensor_type new_type(const struct quantize *self, const char *name,
                                 const struct gguf_tensor *tensor)
{
    return quant_mix_type(self->config->mix, &self->model, name, tensor->dim_count, tensor->dims);
}

static void name_of(const struct gguf_tensor *tensor, char out[LIMIT_TENSOR_NAME_SIZE + 1])
{
    snprintf(out, LIMIT_TENSOR_NAME_SIZE + 1, "%.*s", (int)tensor->name.size, tensor->name.data);
}

/* Calls visit for every tensor, part after part. */
static enum odsi_err each_tensor(struct quantize *self,
                                 enum odsi_err (*visit)(struct quantize *self,
                                                        const struct gguf *part, const char *name,
                                                        const struct gguf_tensor *tensor))
{
    for (uint32_t i = 0; i < self->source->file_count; i++)
        for (uint64_t t = 0; t < gguf_tensor_count(self->parts[i]); t++) {
            const struct gguf_tensor *tensor = gguf_tensor_at(self->parts[i], t);
            char name[LIMIT_TENSOR_NAME_SIZE + 1];
            name_of(tensor, name);
            const enum odsi_err err = visit(self, self->parts[i], name, tensor);
            if (err != ODSI_OK)
                return err;
        }
    return ODSI_OK;
}

/* ---- what goes out --------------------------------------------------------------------------- */

/* Keys that the new file has of its own, or not at all. */
static int is_replaced(struct gguf_text key)
{
    static const char *const replaced[] = {"general.file_type", "general.quantization_version",
                                           "general.alignment"};
    for (size_t i = 0; i < sizeof replaced / sizeof replaced[0]; i++)
        if (gguf_text_is(key, replaced[i]))
            return 1;
    return key.size > 6 && memcmp(key.data, "split.", 6) == 0;
}

static void put_keys(struct quantize *self)
{
    struct gguf_value value;
    for (uint64_t i = 0; gguf_key_value(self->parts[0], i, &value); i++)
        if (!is_replaced(gguf_key_at(self->parts[0], i)))
            gguf_writer_copy(self->out, gguf_key_at(self->parts[0], i), &value);
    gguf_writer_u32(self->out, "general.file_type", self->config->mix->file_type);
    if (self->quantized_count > 0)
        gguf_writer_u32(self->out, "general.quantization_version", 2);
}

static enum odsi_err plan_tensor(struct quantize *self, const struct gguf *part, const char *name,
                                 const struct gguf_tensor *tensor)
{
    const enum tensor_type type = new_type(self, name, tensor);
    const uint32_t cols = (uint32_t)tensor->dims[0];
    (void)part;
    if (!quant_is_known(tensor->ggml_type))
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tensor %s is %s, which this build cannot read",
                         name, gguf_type_name(tensor->ggml_type));
    const enum tensor_type from = (enum tensor_type)tensor->ggml_type;
    if (quant_is_quantized(from) && from != type && !self->config->may_requantize)
        return odsi_fail(ODSI_ERR_INVALID,
                         "tensor %s is %s already: from a file in f16 or f32 the result is better; "
                         "--allow-requantize makes it from this one",
                         name, quant_name((uint32_t)from));
    /* A row of the wider type, so that in and bytes take one of either. */
    const size_t wide = quant_row_size(from, cols) > quant_row_size(type, cols)
                            ? quant_row_size(from, cols)
                            : quant_row_size(type, cols);
    if (wide > self->chunk_size)
        self->chunk_size = wide;
    const uint64_t row_count = tensor->dims[1] * tensor->dims[2] * tensor->dims[3];
    self->quantized_count += quant_is_quantized(type) != 0;
    self->result->tensor_count++;
    self->result->weight_count += row_count * cols;
    self->result->size_before += tensor->size;
    self->result->size_after += row_count * quant_row_size(type, cols);
    gguf_writer_tensor(self->out, name, type, tensor->dim_count, tensor->dims);
    return ODSI_OK;
}

static enum odsi_err put_tensor(struct quantize *self, const struct gguf *part, const char *name,
                                const struct gguf_tensor *tensor)
{
    const enum tensor_type from = (enum tensor_type)tensor->ggml_type;
    const enum tensor_type type = new_type(self, name, tensor);
    const uint32_t cols = (uint32_t)tensor->dims[0];
    const uint64_t row_count = tensor->dims[1] * tensor->dims[2] * tensor->dims[3];
    const size_t in_size = quant_row_size(from, cols), out_size = quant_row_size(type, cols);
    const uint64_t rows_max = self->chunk_size / (in_size > out_size ? in_size : out_size);
    for (uint64_t row = 0; row < row_count; row += rows_max) {
        const uint64_t rows = row_count - row < rows_max ? row_count - row : rows_max;
        enum odsi_err err =
            gguf_read(part, tensor->offset + row * in_size, self->in, rows * in_size);
        if (err == ODSI_OK && from != type)
            err = quantizer_convert(self->quantizer, from, self->in, type, rows, cols, self->bytes);
        if (err == ODSI_ERR_NUMERIC)
            err = odsi_fail_prefix(err, "tensor %s, from row %" PRIu64 " on", name, row);
        if (err == ODSI_OK)
            err =
                gguf_writer_data(self->out, from == type ? self->in : self->bytes, rows * out_size);
        if (err != ODSI_OK)
            return err;
    }
    return ODSI_OK;
}

static enum odsi_err write_all(struct quantize *self)
{
    self->chunk_size = (size_t)CHUNK_COUNT * sizeof(float);
    enum odsi_err err = each_tensor(self, plan_tensor);
    if (err != ODSI_OK)
        return err;
    put_keys(self);
    err = alloc_zeroed(&self->in, self->chunk_size, 1);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->bytes, self->chunk_size, 1);
    if (err == ODSI_OK)
        err = gguf_writer_begin(self->out);
    if (err == ODSI_OK)
        err = each_tensor(self, put_tensor);
    return err == ODSI_OK ? gguf_writer_finish(self->out) : err;
}

enum odsi_err quantize_run(const char *from, const char *to, const struct quantize_config *config,
                           struct quantize_result *result)
{
    struct quantize self = {.config = config, .result = result};
    *result = (struct quantize_result){0};
    enum odsi_err err = open_parts(&self, from);
    if (err == ODSI_OK)
        err = quantizer_open(&self.quantizer, config->thread_count);
    if (err == ODSI_OK)
        err = gguf_writer_open(&self.out, to, config->progress, config->context);
    if (err == ODSI_OK)
        err = write_all(&self);
    gguf_writer_close(&self.out);
    quantizer_close(&self.quantizer);
    alloc_free(self.in);
    alloc_free(self.bytes);
    for (uint32_t i = 0; self.parts && i < self.source->file_count; i++)
        gguf_close(&self.parts[i]);
    alloc_free(self.parts);
    source_close(&self.source);
    return err;
}
