#include "worker/model/safetensors.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/limits.h"
#include "kernels/ops.h"
#include "worker/model/hf_json.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct safetensors {
    json_t *root; /* owns the names */
    struct safetensors_tensor *tensors;
    uint32_t count;
};

static const struct {
    const char *name;
    uint32_t bits;
    int type;
} dtypes[] = {
    {"F32", 32, TENSOR_F32}, {"F16", 16, TENSOR_F16}, {"BF16", 16, TENSOR_BF16}, {"F64", 64, -1},
    {"C64", 64, -1},         {"I64", 64, -1},         {"U64", 64, -1},           {"I32", 32, -1},
    {"U32", 32, -1},         {"I16", 16, -1},         {"U16", 16, -1},           {"I8", 8, -1},
    {"U8", 8, -1},           {"BOOL", 8, -1},         {"F8_E4M3", 8, -1},        {"F8_E5M2", 8, -1},
    {"F8_E8M0", 8, -1},      {"F6_E2M3", 6, -1},      {"F6_E3M2", 6, -1},        {"F4", 4, -1},
};

enum odsi_err safetensors_header_size(const uint8_t *prefix, uint64_t file_size, size_t *out)
{
    const uint64_t size = bytes_load_u64(prefix);
    if (size < 2 || size > SAFETENSORS_HEADER_SIZE_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "a header of %" PRIu64 " bytes, not within 2 to %u: no safetensors file",
                         size, SAFETENSORS_HEADER_SIZE_MAX);
    if (file_size < SAFETENSORS_PREFIX_SIZE || size > file_size - SAFETENSORS_PREFIX_SIZE)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "the header of %" PRIu64 " bytes ends behind the file's %" PRIu64, size,
                         file_size);
    *out = (size_t)size;
    return ODSI_OK;
}

/* ---- one tensor ------------------------------------------------------------------------------ */

static enum odsi_err check_name(const char *name)
{
    const size_t size = strlen(name);
    int printable = size > 0;
    for (size_t i = 0; i < size; i++)
        printable = printable && name[i] > ' ' && name[i] <= '~';
    if (!printable)
        return odsi_fail(ODSI_ERR_CORRUPT, "a tensor's name is not printable");
    if (size > SAFETENSORS_NAME_SIZE_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "a tensor's name has %zu bytes, more than %u", size,
                         SAFETENSORS_NAME_SIZE_MAX);
    return ODSI_OK;
}

static enum odsi_err read_whole(const json_t *value, const char *name, uint64_t *out)
{
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s: a dimension or an offset is no whole number",
                         name);
    *out = (uint64_t)json_integer_value(value);
    return ODSI_OK;
}

/* Sets dtype, type and dims, and *size_out to the bytes that they take. */
static enum odsi_err read_shape(struct safetensors_tensor *tensor, const json_t *dtype,
                                const json_t *shape, uint64_t *size_out)
{
    char shown[HF_JSON_SHOWN_SIZE];
    uint64_t bits = 0;
    for (size_t i = 0; i < sizeof dtypes / sizeof dtypes[0]; i++)
        if (json_is_string(dtype) && strcmp(json_string_value(dtype), dtypes[i].name) == 0) {
            bits = dtypes[i].bits;
            tensor->dtype = dtypes[i].name;
            tensor->type = dtypes[i].type;
        }
    if (!json_is_string(dtype) || !json_is_array(shape))
        return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s has no dtype or no shape", tensor->name);
    if (bits == 0)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tensor %s is %s, which is not known to this build",
                         tensor->name, hf_json_shown(shown, json_string_value(dtype)));
    if (json_array_size(shape) > SAFETENSORS_DIMS_MAX)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tensor %s has %zu dimensions, more than %u",
                         tensor->name, json_array_size(shape), SAFETENSORS_DIMS_MAX);
    tensor->dim_count = (uint32_t)json_array_size(shape);
    for (uint32_t i = 0; i < tensor->dim_count; i++) {
        const enum odsi_err err =
            read_whole(json_array_get(shape, i), tensor->name, &tensor->dims[i]);
        if (err != ODSI_OK)
            return err;
        if (__builtin_mul_overflow(bits, tensor->dims[i], &bits))
            return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s has more than 2^64 bits", tensor->name);
    }
    if (bits % 8 != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s has no whole number of bytes", tensor->name);
    *size_out = bits / 8;
    return ODSI_OK;
}

static enum odsi_err read_tensor(struct safetensors_tensor *tensor, const char *name,
                                 const json_t *value, uint64_t data_at, uint64_t data_size)
{
    uint64_t begin = 0, end = 0, size = 0;
    const json_t *offsets = json_object_get(value, "data_offsets");
    enum odsi_err err = check_name(name);
    if (err != ODSI_OK)
        return err;
    tensor->name = name;
    if (json_object_size(value) != 3 || json_array_size(offsets) != 2)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tensor %s is not described by dtype, shape and two data_offsets", name);
    err =
        read_shape(tensor, json_object_get(value, "dtype"), json_object_get(value, "shape"), &size);
    if (err == ODSI_OK)
        err = read_whole(json_array_get(offsets, 0), name, &begin);
    if (err == ODSI_OK)
        err = read_whole(json_array_get(offsets, 1), name, &end);
    if (err != ODSI_OK)
        return err;
    if (begin > end || end > data_size)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tensor %s is at %" PRIu64 " to %" PRIu64 " of %" PRIu64 " bytes", name,
                         begin, end, data_size);
    if (end - begin != size)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tensor %s has %" PRIu64 " bytes, its shape takes %" PRIu64, name,
                         end - begin, size);
    tensor->offset = data_at + begin;
    tensor->size = size;
    return ODSI_OK;
}

/* ---- all of them ----------------------------------------------------------------------------- */

static int compare_places(const void *a_pointer, const void *b_pointer)
{
    const struct safetensors_tensor *a = a_pointer, *b = b_pointer;
    if (a->offset != b->offset)
        return a->offset < b->offset ? -1 : 1;
    return (a->size > b->size) - (a->size < b->size);
}

static int compare_names(const void *a_pointer, const void *b_pointer)
{
    const struct safetensors_tensor *a = a_pointer, *b = b_pointer;
    return strcmp(a->name, b->name);
}

/* Whether the tensors, in the order of their places, fill the file from data_at to its end. Bytes
 * that belong to none could hide something from who checks the tensors; two names for the same
 * bytes are a trick that no writer plays. */
static enum odsi_err check_places(const struct safetensors *self, uint64_t data_at,
                                  uint64_t file_size)
{
    uint64_t at = data_at;
    for (uint32_t i = 0; i < self->count; i++) {
        const struct safetensors_tensor *tensor = &self->tensors[i];
        if (tensor->offset != at)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tensor %s begins at %" PRIu64 ", the one before it ends at %" PRIu64,
                             tensor->name, tensor->offset - data_at, at - data_at);
        at += tensor->size;
    }
    if (at != file_size)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "the tensors end at byte %" PRIu64 " of a file of %" PRIu64, at,
                         file_size);
    return ODSI_OK;
}

static enum odsi_err read_tensors(struct safetensors *self, uint64_t data_at, uint64_t file_size)
{
    const char *name;
    json_t *value;
    const size_t count = json_object_size(self->root);
    if (count > LIMIT_TENSORS_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "%zu tensors, more than %u", count, LIMIT_TENSORS_MAX);
    enum odsi_err err = alloc_zeroed(&self->tensors, count, sizeof *self->tensors);
    json_object_foreach(self->root, name, value)
    {
        if (err != ODSI_OK)
            return err;
        if (strcmp(name, "__metadata__") != 0)
            err = read_tensor(&self->tensors[self->count++], name, value, data_at,
                              file_size - data_at);
    }
    if (err != ODSI_OK)
        return err;
    qsort(self->tensors, self->count, sizeof *self->tensors, compare_places);
    err = check_places(self, data_at, file_size);
    qsort(self->tensors, self->count, sizeof *self->tensors, compare_names);
    return err;
}

enum odsi_err safetensors_open(struct safetensors **out, const uint8_t *header, size_t header_size,
                               uint64_t file_size)
{
    struct safetensors *self = NULL;
    ODSI_ASSERT(file_size >= SAFETENSORS_PREFIX_SIZE &&
                header_size <= file_size - SAFETENSORS_PREFIX_SIZE);
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    err = hf_json_parse(&self->root, header, header_size);
    if (err == ODSI_OK)
        err = read_tensors(self, SAFETENSORS_PREFIX_SIZE + header_size, file_size);
    if (err != ODSI_OK) {
        err = odsi_fail_prefix(err, "the safetensors header");
        safetensors_close(&self);
    }
    *out = self;
    return err;
}

void safetensors_close(struct safetensors **self)
{
    if (!*self)
        return;
    json_decref((*self)->root);
    alloc_free((*self)->tensors);
    alloc_free(*self);
    *self = NULL;
}

uint32_t safetensors_count(const struct safetensors *self)
{
    return self->count;
}

const struct safetensors_tensor *safetensors_at(const struct safetensors *self, uint32_t index)
{
    ODSI_ASSERT(index < self->count);
    return &self->tensors[index];
}
