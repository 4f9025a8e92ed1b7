/* A Hugging Face folder as a struct source: config.json, the tokenizer's files, and one
 * model.safetensors or the parts that model.safetensors.index.json names. */
#include "common/base/alloc.h"
#include "common/base/io.h"
#include "kernels/det.h"
#include "worker/model/hf_config.h"
#include "worker/model/hf_json.h"
#include "worker/model/hf_names.h"
#include "worker/model/hf_tokenizer.h"
#include "worker/model/safetensors.h"
#include "worker/model/source.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LONE_FILE   "model.safetensors"
#define INDEX_FILE  "model.safetensors.index.json"
#define OUTPUT_NAME "output.weight"

struct reading {
    struct source *source;
    const char *folder;
    struct hf_config config;
    uint32_t capacity; /* of source->tensors */
    /* With an index: */
    json_t *index;
    const json_t *weight_map; /* name of a tensor: name of a file; of index */
    json_t *missing;          /* those of weight_map that no file showed yet */
    const char **parts;       /* names of files, each once; of index */
    uint32_t part_count;
};

/* ---- tensors --------------------------------------------------------------------------------- */

static enum odsi_err add_tensor(struct reading *self, const struct source_tensor *tensor)
{
    struct source *source = self->source;
    if (source->tensor_count >= LIMIT_TENSORS_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "more than %u tensors", LIMIT_TENSORS_MAX);
    if (source->tensor_count == self->capacity) {
        const uint32_t capacity = self->capacity ? 2 * self->capacity : 256;
        const enum odsi_err err = alloc_resize(&source->tensors, capacity, sizeof *source->tensors);
        if (err != ODSI_OK)
            return err;
        self->capacity = capacity;
    }
    source->tensors[source->tensor_count++] = *tensor;
    return ODSI_OK;
}

/* Takes what the model computes with. */
static enum odsi_err take_tensor(struct reading *self, uint32_t file,
                                 const struct safetensors_tensor *from)
{
    struct source_tensor tensor = {.file = file, .offset = from->offset, .size = from->size};
    const enum hf_names_kind kind = hf_names_canonical(&self->config, from->name, tensor.name);
    if (kind == HF_NAMES_UNKNOWN)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tensor %s is not part of this architecture as this build knows it",
                         from->name);
    if (kind == HF_NAMES_IGNORED)
        return ODSI_OK;
    if (self->config.tied && strcmp(tensor.name, OUTPUT_NAME) == 0)
        return ODSI_OK; /* a copy that config.json says not to use */
    if (from->type < 0)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tensor %s is %s; this build takes F32, F16 and BF16", from->name,
                         from->dtype);
    if (from->dim_count < 1 || from->dim_count > 2 || from->size == 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s is neither a vector nor a matrix",
                         from->name);
    tensor.type = (enum tensor_type)from->type;
    tensor.dim_count = from->dim_count;
    for (uint32_t i = 0; i < 4; i++)
        tensor.dims[i] = i < from->dim_count ? from->dims[from->dim_count - 1 - i] : 1;
    return add_tensor(self, &tensor);
}

/* The factors of the rotation, which config.json says in place of a tensor. */
static enum odsi_err add_rope_factors(struct reading *self)
{
    const struct hf_config *config = &self->config;
    struct buf *memory = &self->source->memory;
    struct source_tensor tensor = {.name = "rope_freqs.weight",
                                   .type = TENSOR_F32,
                                   .dim_count = 1,
                                   .dims = {config->rope_factor_count, 1, 1, 1},
                                   .file = SOURCE_IN_MEMORY,
                                   .offset = memory->size,
                                   .size = (uint64_t)config->rope_factor_count * sizeof(float)};
    if (config->rope_factor_count == 0)
        return ODSI_OK;
    for (uint32_t i = 0; i < config->rope_factor_count; i++)
        (void)buf_append_u32(memory, det_bits(config->rope_factors[i]));
    const enum odsi_err err = buf_status(memory);
    return err == ODSI_OK ? add_tensor(self, &tensor) : err;
}

static int compare_tensors(const void *a_pointer, const void *b_pointer)
{
    const struct source_tensor *a = a_pointer, *b = b_pointer;
    return strcmp(a->name, b->name);
}

/* Sorts, and checks what no single tensor shows. */
static enum odsi_err finish_tensors(struct reading *self)
{
    struct source *source = self->source;
    int has_output = 0;
    if (source->tensor_count > 0)
        qsort(source->tensors, source->tensor_count, sizeof *source->tensors, compare_tensors);
    for (uint32_t i = 0; i < source->tensor_count; i++) {
        const char *name = source->tensors[i].name;
        has_output = has_output || strcmp(name, OUTPUT_NAME) == 0;
        if (i > 0 && strcmp(name, source->tensors[i - 1].name) == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "the tensor that becomes %s is there twice", name);
    }
    /* Elsewhere a model without an output matrix uses the embedding, which this one does not say.
     */
    if (!has_output && !self->config.tied)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "lm_head.weight is missing, and config.json does not set "
                         "tie_word_embeddings");
    return ODSI_OK;
}

/* ---- one file -------------------------------------------------------------------------------- */

static enum odsi_err read_header(const struct source *source, uint32_t file,
                                 struct safetensors **out)
{
    const uint64_t file_size = source->files[file].size;
    const struct source_tensor whole = {.file = file, .size = file_size};
    uint8_t prefix[SAFETENSORS_PREFIX_SIZE] = {0};
    uint8_t *header = NULL;
    size_t size = 0;
    if (file_size < sizeof prefix)
        return odsi_fail(ODSI_ERR_CORRUPT, "%llu bytes are no safetensors file",
                         (unsigned long long)file_size);
    enum odsi_err err = source_read(source, &whole, 0, prefix, sizeof prefix);
    if (err == ODSI_OK)
        err = safetensors_header_size(prefix, file_size, &size);
    if (err == ODSI_OK)
        err = alloc_zeroed(&header, size, 1);
    if (err == ODSI_OK)
        err = source_read(source, &whole, sizeof prefix, header, size);
    if (err == ODSI_OK)
        err = safetensors_open(out, header, size, file_size);
    alloc_free(header);
    return err;
}

/* The index and the files must say the same: neither alone decides which tensor counts. */
static enum odsi_err check_indexed(struct reading *self, const char *name, const char *part)
{
    const char *listed = json_string_value(json_object_get(self->weight_map, name));
    if (!listed || strcmp(listed, part) != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s is not listed for this file in " INDEX_FILE,
                         name);
    (void)json_object_del(self->missing, name);
    return ODSI_OK;
}

static enum odsi_err read_file(struct reading *self, const char *name)
{
    char path[IO_PATH_SIZE];
    struct safetensors *header = NULL;
    uint32_t file = 0;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", self->folder, name) >= sizeof path)
        return odsi_fail(ODSI_ERR_RANGE, "a path of more than %u bytes", IO_PATH_SIZE - 1);
    enum odsi_err err = source_add_file(self->source, path, &file);
    if (err != ODSI_OK)
        return err;
    err = read_header(self->source, file, &header);
    for (uint32_t i = 0; err == ODSI_OK && i < safetensors_count(header); i++) {
        const struct safetensors_tensor *tensor = safetensors_at(header, i);
        if (self->weight_map)
            err = check_indexed(self, tensor->name, name);
        if (err == ODSI_OK)
            err = take_tensor(self, file, tensor);
    }
    safetensors_close(&header);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s", path);
}

/* ---- the index ------------------------------------------------------------------------------- */

/* A stranger's index must not make us open other files than those of the folder. */
static int is_part_name(const char *name)
{
    static const char end[] = ".safetensors";
    const size_t size = name ? strlen(name) : 0;
    if (size < sizeof end || size > 255 || name[0] == '.' ||
        strcmp(name + size - (sizeof end - 1), end) != 0)
        return 0;
    for (size_t i = 0; i < size; i++)
        if (name[i] == '/' || name[i] < ' ' || name[i] > '~')
            return 0;
    return 1;
}

static int compare_texts(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static enum odsi_err list_parts(struct reading *self)
{
    char shown[HF_JSON_SHOWN_SIZE];
    const size_t count = json_object_size(self->weight_map);
    uint32_t filled = 0;
    const char *key;
    json_t *value;
    if (count < 1 || count > LIMIT_TENSORS_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "weight_map has %zu tensors, not within 1 to %u", count,
                         LIMIT_TENSORS_MAX);
    enum odsi_err err = alloc_zeroed(&self->parts, count, sizeof *self->parts);
    if (err != ODSI_OK)
        return err;
    json_object_foreach((json_t *)self->weight_map, key, value)
    {
        const char *name = json_string_value(value);
        if (!is_part_name(name))
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tensor %s is not in a safetensors file of this folder",
                             hf_json_shown(shown, key));
        self->parts[filled++] = name;
    }
    qsort(self->parts, filled, sizeof *self->parts, compare_texts);
    for (uint32_t i = 0; i < filled; i++)
        if (i == 0 || strcmp(self->parts[i], self->parts[self->part_count - 1]) != 0)
            self->parts[self->part_count++] = self->parts[i];
    return ODSI_OK;
}

static enum odsi_err open_index(struct reading *self)
{
    enum odsi_err err =
        hf_json_load(&self->index, self->folder, INDEX_FILE, SAFETENSORS_HEADER_SIZE_MAX);
    if (err == ODSI_ERR_NOT_FOUND)
        return odsi_fail(err,
                         "%s has neither " LONE_FILE " nor " INDEX_FILE
                         "; weights in another format (pytorch_model.bin) have to be converted",
                         self->folder);
    if (err != ODSI_OK)
        return err;
    struct hf_json fields = {.object = self->index};
    self->weight_map = hf_json_object_view(&fields, "weight_map");
    err = fields.err;
    if (err == ODSI_OK)
        err = list_parts(self);
    if (err == ODSI_OK) {
        self->missing = json_copy((json_t *)self->weight_map);
        if (!self->missing)
            err = odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for a copy of the index");
    }
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s/" INDEX_FILE, self->folder);
}

static enum odsi_err read_parts(struct reading *self)
{
    char shown[HF_JSON_SHOWN_SIZE];
    enum odsi_err err = open_index(self);
    for (uint32_t i = 0; err == ODSI_OK && i < self->part_count; i++)
        err = read_file(self, self->parts[i]);
    if (err != ODSI_OK || json_object_size(self->missing) == 0)
        return err;
    return odsi_fail(ODSI_ERR_CORRUPT, "%s: no file has tensor %s, which " INDEX_FILE " lists",
                     self->folder,
                     hf_json_shown(shown, json_object_iter_key(json_object_iter(self->missing))));
}

/* ---- the folder ------------------------------------------------------------------------------ */

static enum odsi_err read_tensors(struct reading *self)
{
    enum odsi_err err = read_file(self, LONE_FILE);
    /* Where there are both, the lone file counts, as for the library that writes them. */
    if (err == ODSI_ERR_NOT_FOUND)
        err = read_parts(self);
    if (err == ODSI_OK)
        err = add_rope_factors(self);
    return err == ODSI_OK ? finish_tensors(self) : err;
}

static enum odsi_err read_tokenizer(struct reading *self)
{
    uint32_t count = 0;
    const uint32_t rows = self->config.params.vocab_size;
    const enum odsi_err err =
        hf_tokenizer_canonical(self->folder, rows, &self->source->tokenizer, &count);
    if (err == ODSI_OK && count != rows)
        return odsi_fail(ODSI_ERR_CORRUPT, "%s: %u tokens for an embedding of %u rows",
                         self->folder, count, rows);
    return err;
}

enum odsi_err source_hf_open(struct source *self, const char *folder)
{
    struct reading reading = {.source = self, .folder = folder};
    enum odsi_err err = hf_config_load(&reading.config, folder);
    if (err == ODSI_OK)
        err = read_tensors(&reading);
    if (err == ODSI_OK)
        err = read_tokenizer(&reading);
    if (err == ODSI_OK)
        self->params = reading.config.params;
    alloc_free(reading.parts);
    json_decref(reading.missing);
    json_decref(reading.index);
    return err;
}
