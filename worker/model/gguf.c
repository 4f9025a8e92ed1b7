#include "worker/model/gguf.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "kernels/quant.h"
#include "worker/model/gguf_value.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define KEY_SIZE_MAX      65535u /* what the GGUF specification allows */
#define ALIGNMENT_DEFAULT 32u
#define ALIGNMENT_MAX     (1u << 20)
#define KEY_SIZE_MIN      14u /* name length, one byte of name, type, one byte of value */
#define TENSOR_SIZE_MIN   33u /* name length, one byte, dim count, one dim, type, offset */

struct key {
    struct gguf_text name;
    struct gguf_value value;
};

/* One name and where it stands; an array of them, sorted, is an index. */
struct name_ref {
    struct gguf_text name;
    uint64_t index;
};

struct gguf {
    const uint8_t *data;
    size_t size;
    int fd;             /* -1: the bytes are the caller's */
    uint64_t key_count; /* all arrays below have these counts */
    uint64_t tensor_count;
    struct key *keys; /* file order */
    struct name_ref *keys_by_name;
    struct gguf_tensor *tensors; /* file order */
    struct name_ref *tensors_by_name;
};

/* Types that ops do not take (those they take are in kernels/quant.h): a file that has one can
 * still be described, and the refusal names it. */
static const struct other_type {
    uint32_t type;
    const char *name;
    uint32_t block; /* elements */
    uint32_t size;  /* bytes of one block */
} other_types[] = {
    {9, "q8_1", 32, 36},      {15, "q8_k", 256, 292},   {16, "iq2_xxs", 256, 66},
    {17, "iq2_xs", 256, 74},  {18, "iq3_xxs", 256, 98}, {19, "iq1_s", 256, 50},
    {20, "iq4_nl", 32, 18},   {21, "iq3_s", 256, 110},  {22, "iq2_s", 256, 82},
    {23, "iq4_xs", 256, 136}, {24, "i8", 1, 1},         {25, "i16", 1, 2},
    {26, "i32", 1, 4},        {27, "i64", 1, 8},        {28, "f64", 1, 8},
    {29, "iq1_m", 256, 56},   {34, "tq1_0", 256, 54},   {35, "tq2_0", 256, 66},
    {39, "mxfp4", 32, 17},
};

static const struct other_type *other_find(uint32_t ggml_type)
{
    for (size_t i = 0; i < sizeof other_types / sizeof other_types[0]; i++)
        if (other_types[i].type == ggml_type)
            return &other_types[i];
    return NULL;
}

/* Elements and bytes of a block; returns 0 for an unknown type. */
static int type_block(uint32_t ggml_type, uint32_t *block, uint32_t *size)
{
    const struct other_type *other = other_find(ggml_type);
    if (!other && !quant_is_known(ggml_type))
        return 0;
    *block = other ? other->block : quant_block_cols((enum tensor_type)ggml_type);
    *size = other ? other->size : quant_block_size((enum tensor_type)ggml_type);
    return 1;
}

const char *gguf_type_name(uint32_t ggml_type)
{
    const struct other_type *other = other_find(ggml_type);
    const char *name = other ? other->name : quant_name(ggml_type);
    return name ? name : "unknown type";
}

/* ---- names ---------------------------------------------------------------------------------- */

int gguf_text_is(struct gguf_text text, const char *wanted)
{
    return text.size == strlen(wanted) && memcmp(text.data, wanted, text.size) == 0;
}

static int text_compare(const struct gguf_text *a, const struct gguf_text *b)
{
    const size_t size = a->size < b->size ? a->size : b->size;
    const int order = memcmp(a->data, b->data, size);
    if (order != 0)
        return order;
    return (a->size > b->size) - (a->size < b->size);
}

static int ref_compare(const void *a, const void *b)
{
    const struct name_ref *left = a;
    const struct name_ref *right = b;
    return text_compare(&left->name, &right->name);
}

/* Names are printed in errors and logs, so they must not carry control characters. */
static int name_is_plain(struct gguf_text name)
{
    for (size_t i = 0; i < name.size; i++)
        if (name.data[i] < 0x21 || name.data[i] > 0x7e)
            return 0;
    return name.size > 0;
}

/* Sorting makes a look-up cheap and brings equal names together. */
static enum odsi_err index_finish(struct name_ref *refs, uint64_t count, const char *what)
{
    if (count > 1)
        qsort(refs, count, sizeof *refs, ref_compare);
    for (uint64_t i = 1; i < count; i++)
        if (text_compare(&refs[i - 1].name, &refs[i].name) == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "two %ss are named %.*s", what,
                             (int)refs[i].name.size, refs[i].name.data);
    return ODSI_OK;
}

static const struct name_ref *index_find(const struct name_ref *refs, uint64_t count,
                                         const char *name)
{
    const struct name_ref wanted = {.name = {.data = name, .size = strlen(name)}};
    return count ? bsearch(&wanted, refs, count, sizeof *refs, ref_compare) : NULL;
}

/* ---- reading the header --------------------------------------------------------------------- */

static enum odsi_err read_keys(struct gguf *self, struct reader *cursor)
{
    for (uint64_t i = 0; i < self->key_count; i++) {
        struct key *key = &self->keys[i];
        if (!gguf_value_take_text(cursor, &key->name) || key->name.size > KEY_SIZE_MAX ||
            !name_is_plain(key->name))
            return odsi_fail(ODSI_ERR_CORRUPT, "key %" PRIu64 " has no proper name at byte %zu", i,
                             cursor->at);
        const enum odsi_err err = gguf_value_take(cursor, &key->value);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "key %.*s", (int)key->name.size, key->name.data);
        self->keys_by_name[i] = (struct name_ref){.name = key->name, .index = i};
    }
    return index_finish(self->keys_by_name, self->key_count, "key");
}

int gguf_tensor_size(uint32_t ggml_type, const uint64_t dims[4], uint64_t *out)
{
    uint32_t block = 1, size = 0;
    if (!type_block(ggml_type, &block, &size) || dims[0] % block != 0)
        return 0;
    uint64_t blocks = dims[0] / block;
    for (uint32_t i = 1; i < 4; i++)
        if (__builtin_mul_overflow(blocks, dims[i], &blocks))
            return 0;
    return !__builtin_mul_overflow(blocks, (uint64_t)size, out);
}

static enum odsi_err tensor_measure(struct gguf_tensor *tensor)
{
    uint32_t block, size;
    if (!type_block(tensor->ggml_type, &block, &size))
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tensor %.*s has the unknown type %" PRIu32,
                         (int)tensor->name.size, tensor->name.data, tensor->ggml_type);
    if (!gguf_tensor_size(tensor->ggml_type, tensor->dims, &tensor->size))
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tensor %.*s: rows of %" PRIu64 " are no whole blocks of %s, or it is "
                         "larger than any file",
                         (int)tensor->name.size, tensor->name.data, tensor->dims[0],
                         gguf_type_name(tensor->ggml_type));
    return ODSI_OK;
}

static enum odsi_err read_tensor(struct reader *cursor, struct gguf_tensor *tensor)
{
    if (!gguf_value_take_text(cursor, &tensor->name) ||
        tensor->name.size > LIMIT_TENSOR_NAME_SIZE || !name_is_plain(tensor->name))
        return odsi_fail(ODSI_ERR_CORRUPT, "a tensor has no proper name at byte %zu", cursor->at);
    const int name_size = (int)tensor->name.size;
    if (!reader_u32(cursor, &tensor->dim_count) || tensor->dim_count < 1 || tensor->dim_count > 4)
        return odsi_fail(ODSI_ERR_CORRUPT, "tensor %.*s: not 1 to 4 dimensions", name_size,
                         tensor->name.data);
    for (uint32_t i = 0; i < 4; i++) {
        tensor->dims[i] = 1;
        if (i < tensor->dim_count && !reader_u64(cursor, &tensor->dims[i]))
            return odsi_fail(ODSI_ERR_CORRUPT, "the file ends inside tensor %.*s", name_size,
                             tensor->name.data);
        if (tensor->dims[i] == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "tensor %.*s has an empty dimension", name_size,
                             tensor->name.data);
    }
    if (!reader_u32(cursor, &tensor->ggml_type) || !reader_u64(cursor, &tensor->offset))
        return odsi_fail(ODSI_ERR_CORRUPT, "the file ends inside tensor %.*s", name_size,
                         tensor->name.data);
    return tensor_measure(tensor);
}

static enum odsi_err read_tensors(struct gguf *self, struct reader *cursor)
{
    for (uint64_t i = 0; i < self->tensor_count; i++) {
        const enum odsi_err err = read_tensor(cursor, &self->tensors[i]);
        if (err != ODSI_OK)
            return err;
        self->tensors_by_name[i] = (struct name_ref){.name = self->tensors[i].name, .index = i};
    }
    return index_finish(self->tensors_by_name, self->tensor_count, "tensor");
}

static enum odsi_err read_alignment(const struct gguf *self, uint32_t *out)
{
    *out = ALIGNMENT_DEFAULT;
    const enum odsi_err err = gguf_get_u32(self, "general.alignment", out);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    if (*out < 8 || *out > ALIGNMENT_MAX || (*out & (*out - 1)) != 0)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "general.alignment is %" PRIu32 ", not a power of two from 8 to %u", *out,
                         ALIGNMENT_MAX);
    return ODSI_OK;
}

/* Turns offsets into places in the file, all inside it. */
static enum odsi_err place_tensors(struct gguf *self, size_t header_size)
{
    uint32_t alignment;
    const enum odsi_err err = read_alignment(self, &alignment);
    if (err != ODSI_OK)
        return err;
    const uint64_t start = ((uint64_t)header_size + alignment - 1) / alignment * alignment;
    for (uint64_t i = 0; i < self->tensor_count; i++) {
        struct gguf_tensor *tensor = &self->tensors[i];
        uint64_t end = 0;
        if (tensor->offset % alignment != 0)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tensor %.*s: offset %" PRIu64 " is not aligned to %" PRIu32,
                             (int)tensor->name.size, tensor->name.data, tensor->offset, alignment);
        if (__builtin_add_overflow(start, tensor->offset, &tensor->offset) ||
            __builtin_add_overflow(tensor->offset, tensor->size, &end) || end > self->size)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tensor %.*s (%" PRIu64 " bytes) lies outside the file of %zu bytes; "
                             "was it copied whole?",
                             (int)tensor->name.size, tensor->name.data, tensor->size, self->size);
        tensor->data = self->data + tensor->offset;
    }
    return ODSI_OK;
}

static int place_compare(const void *a, const void *b)
{
    const struct gguf_tensor *const *left = a;
    const struct gguf_tensor *const *right = b;
    return ((*left)->offset > (*right)->offset) - ((*left)->offset < (*right)->offset);
}

static enum odsi_err check_overlaps(const struct gguf *self)
{
    const struct gguf_tensor **order = NULL;
    enum odsi_err err = alloc_zeroed(&order, self->tensor_count, sizeof *order);
    if (err != ODSI_OK)
        return err;
    for (uint64_t i = 0; i < self->tensor_count; i++)
        order[i] = &self->tensors[i];
    if (self->tensor_count > 1)
        qsort(order, self->tensor_count, sizeof *order, place_compare);
    for (uint64_t i = 1; i < self->tensor_count && err == ODSI_OK; i++) {
        const struct gguf_tensor *before = order[i - 1];
        if (before->offset + before->size > order[i]->offset)
            err =
                odsi_fail(ODSI_ERR_CORRUPT, "tensors %.*s and %.*s overlap", (int)before->name.size,
                          before->name.data, (int)order[i]->name.size, order[i]->name.data);
    }
    alloc_free(order);
    return err;
}

static enum odsi_err read_counts(struct gguf *self, struct reader *cursor)
{
    uint32_t version;
    const uint8_t *magic = reader_take(cursor, 4);
    if (!magic || memcmp(magic, "GGUF", 4) != 0 || !reader_u32(cursor, &version))
        return odsi_fail(ODSI_ERR_CORRUPT, "not a GGUF file");
    if (version != 2 && version != 3)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "GGUF version %" PRIu32 "%s; versions 2 and 3 are supported", version,
                         (version & 0xffff) == 0 ? " (big-endian)" : "");
    if (!reader_u64(cursor, &self->tensor_count) || !reader_u64(cursor, &self->key_count))
        return odsi_fail(ODSI_ERR_CORRUPT, "the file ends inside its header");
    const size_t left = reader_left(cursor);
    if (self->key_count > GGUF_KEYS_MAX || self->key_count > left / KEY_SIZE_MIN)
        return odsi_fail(ODSI_ERR_CORRUPT, "%" PRIu64 " keys cannot be in it", self->key_count);
    if (self->tensor_count > LIMIT_TENSORS_MAX || self->tensor_count > left / TENSOR_SIZE_MIN)
        return odsi_fail(ODSI_ERR_CORRUPT, "%" PRIu64 " tensors cannot be in it",
                         self->tensor_count);
    return ODSI_OK;
}

static enum odsi_err read_header(struct gguf *self)
{
    struct reader cursor = {.data = self->data, .size = self->size};
    enum odsi_err err = read_counts(self, &cursor);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->keys, self->key_count, sizeof *self->keys);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->keys_by_name, self->key_count, sizeof *self->keys_by_name);
    if (err == ODSI_OK)
        err = read_keys(self, &cursor);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->tensors, self->tensor_count, sizeof *self->tensors);
    if (err == ODSI_OK)
        err =
            alloc_zeroed(&self->tensors_by_name, self->tensor_count, sizeof *self->tensors_by_name);
    if (err == ODSI_OK)
        err = read_tensors(self, &cursor);
    if (err == ODSI_OK)
        err = place_tensors(self, cursor.at);
    if (err == ODSI_OK)
        err = check_overlaps(self);
    return err;
}

/* ---- opening and closing -------------------------------------------------------------------- */

enum odsi_err gguf_open_memory(struct gguf **out, const uint8_t *data, size_t size)
{
    *out = NULL;
    struct gguf *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->data = data;
    self->size = size;
    self->fd = -1;
    err = read_header(self);
    if (err != ODSI_OK)
        gguf_close(&self);
    *out = self;
    return err;
}

/* Maps the file at path; on success the caller owns *fd and the mapping. */
static enum odsi_err map_file(const char *path, int *fd, const uint8_t **data, size_t *size)
{
    struct stat status;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* O_NONBLOCK: a FIFO must not hang us */
    if (*fd < 0)
        return odsi_fail(errno == ENOENT ? ODSI_ERR_NOT_FOUND : ODSI_ERR_IO, "cannot open: %s",
                         strerror(errno));
    enum odsi_err err = ODSI_OK;
    void *map = MAP_FAILED;
    if (fstat(*fd, &status) != 0)
        err = odsi_fail(ODSI_ERR_IO, "cannot stat: %s", strerror(errno));
    else if (!S_ISREG(status.st_mode))
        err = odsi_fail(ODSI_ERR_IO, "not a regular file");
    else if (status.st_size == 0)
        err = odsi_fail(ODSI_ERR_CORRUPT, "the file is empty");
    else
        map = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, *fd, 0);
    if (err == ODSI_OK && map == MAP_FAILED)
        err = odsi_fail(ODSI_ERR_IO, "cannot map: %s", strerror(errno));
    if (err != ODSI_OK) {
        close(*fd);
        return err;
    }
    *data = map;
    *size = (size_t)status.st_size;
    return ODSI_OK;
}

enum odsi_err gguf_open(struct gguf **out, const char *path)
{
    *out = NULL;
    int fd = -1;
    const uint8_t *data = NULL;
    size_t size = 0;
    enum odsi_err err = map_file(path, &fd, &data, &size);
    if (err != ODSI_OK)
        return odsi_fail_prefix(err, "%s", path);
    err = gguf_open_memory(out, data, size);
    if (err != ODSI_OK) {
        munmap((void *)data, size);
        close(fd);
        return odsi_fail_prefix(err, "%s", path);
    }
    (*out)->fd = fd;
    return ODSI_OK;
}

void gguf_close(struct gguf **self)
{
    struct gguf *gguf = *self;
    if (!gguf)
        return;
    if (gguf->fd >= 0) {
        munmap((void *)gguf->data, gguf->size);
        close(gguf->fd);
    }
    alloc_free(gguf->keys);
    alloc_free(gguf->keys_by_name);
    alloc_free(gguf->tensors);
    alloc_free(gguf->tensors_by_name);
    alloc_free(gguf);
    *self = NULL;
}

enum odsi_err gguf_read(const struct gguf *self, uint64_t offset, void *out, size_t size)
{
    if (offset > self->size || size > self->size - offset)
        return odsi_fail(ODSI_ERR_CORRUPT, "%zu bytes at %" PRIu64 ": the file has %zu", size,
                         offset, self->size);
    if (self->fd < 0) {
        memcpy(out, self->data + offset, size);
        return ODSI_OK;
    }
    uint8_t *to = out;
    while (size > 0) {
        const ssize_t got = pread(self->fd, to, size, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return odsi_fail(ODSI_ERR_IO, "cannot read the model file: %s", strerror(errno));
        if (got == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "the model file became shorter while in use");
        to += got;
        offset += (uint64_t)got;
        size -= (size_t)got;
    }
    return ODSI_OK;
}

int gguf_fd(const struct gguf *self)
{
    return self->fd;
}

/* ---- metadata ------------------------------------------------------------------------------- */

/* NULL, and the sentence recorded, when there is no such key. */
static const struct gguf_value *value_find(const struct gguf *self, const char *key)
{
    const struct name_ref *ref = index_find(self->keys_by_name, self->key_count, key);
    if (ref)
        return &self->keys[ref->index].value;
    (void)odsi_fail(ODSI_ERR_NOT_FOUND, "the file has no key %s", key);
    return NULL;
}

static enum odsi_err wrong_type(const char *key, const struct gguf_value *value, const char *wanted)
{
    return odsi_fail(ODSI_ERR_CORRUPT, "key %s is %s, not %s", key,
                     gguf_value_type_name(value->type), wanted);
}

enum odsi_err gguf_get_u32(const struct gguf *self, const char *key, uint32_t *out)
{
    const struct gguf_value *value = value_find(self, key);
    if (!value)
        return ODSI_ERR_NOT_FOUND;
    if (!gguf_value_u32(value, out))
        return wrong_type(key, value, "an integer from 0 to 2^32-1");
    return ODSI_OK;
}

enum odsi_err gguf_get_f32(const struct gguf *self, const char *key, float *out)
{
    const struct gguf_value *value = value_find(self, key);
    if (!value)
        return ODSI_ERR_NOT_FOUND;
    if (!gguf_value_f32(value, out))
        return wrong_type(key, value, "a finite number");
    return ODSI_OK;
}

enum odsi_err gguf_get_bool(const struct gguf *self, const char *key, int *out)
{
    const struct gguf_value *value = value_find(self, key);
    if (!value)
        return ODSI_ERR_NOT_FOUND;
    if (value->type != GGUF_BOOL)
        return wrong_type(key, value, "a bool");
    *out = value->data[0];
    return ODSI_OK;
}

enum odsi_err gguf_get_text(const struct gguf *self, const char *key, struct gguf_text *out)
{
    const struct gguf_value *value = value_find(self, key);
    if (!value)
        return ODSI_ERR_NOT_FOUND;
    if (value->type != GGUF_TEXT)
        return wrong_type(key, value, "a text");
    *out = (struct gguf_text){.data = (const char *)value->data, .size = value->size};
    return ODSI_OK;
}

enum odsi_err gguf_get_array(const struct gguf *self, const char *key, struct gguf_array *out)
{
    const struct gguf_value *value = value_find(self, key);
    if (!value)
        return ODSI_ERR_NOT_FOUND;
    if (value->type != GGUF_ARRAY)
        return wrong_type(key, value, "an array");
    *out = (struct gguf_array){.type = value->element_type,
                               .count = value->count,
                               .data = value->data,
                               .size = value->size};
    return ODSI_OK;
}

int gguf_array_text(const struct gguf_array *array, size_t *cursor, struct gguf_text *out)
{
    if (array->type != GGUF_TEXT || *cursor >= array->size)
        return 0;
    struct reader walk = {.data = array->data, .size = array->size, .at = *cursor};
    if (!gguf_value_take_text(&walk, out))
        return 0;
    *cursor = walk.at;
    return 1;
}

struct gguf_text gguf_key_at(const struct gguf *self, uint64_t index)
{
    return index < self->key_count ? self->keys[index].name : (struct gguf_text){.data = NULL};
}

int gguf_key_value(const struct gguf *self, uint64_t index, struct gguf_value *out)
{
    if (index >= self->key_count)
        return 0;
    *out = self->keys[index].value;
    return 1;
}

void gguf_visit_metadata(const struct gguf *self,
                         void (*visit)(void *context, struct gguf_text key, const char *value),
                         void *context)
{
    for (uint64_t i = 0; i < self->key_count; i++) {
        char text[GGUF_VALUE_TEXT_SIZE];
        gguf_value_show(&self->keys[i].value, text);
        visit(context, self->keys[i].name, text);
    }
}

/* ---- tensors -------------------------------------------------------------------------------- */

uint64_t gguf_tensor_count(const struct gguf *self)
{
    return self->tensor_count;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *self, uint64_t index)
{
    return index < self->tensor_count ? &self->tensors[index] : NULL;
}

const struct gguf_tensor *gguf_tensor_by_name_at(const struct gguf *self, uint64_t index)
{
    return index < self->tensor_count ? &self->tensors[self->tensors_by_name[index].index] : NULL;
}

const struct gguf_tensor *gguf_tensor_find(const struct gguf *self, const char *name)
{
    const struct name_ref *ref = index_find(self->tensors_by_name, self->tensor_count, name);
    return ref ? &self->tensors[ref->index] : NULL;
}
