#include "worker/model/gguf_writer.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/buf.h"
#include "common/base/io.h"
#include "kernels/det.h"
#include "worker/model/gguf.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define HEADER_SIZE_MAX (256u << 20)
#define CHUNK_SIZE      (1u << 20)

enum stage { STAGE_HEADER, STAGE_DATA, STAGE_FINISHED };

struct gguf_writer {
    char *path;
    char *part; /* what the file is called until it is whole */
    int fd;
    enum stage stage;
    struct buf keys; /* the metadata as in the file, without their count */
    struct buf infos;
    uint32_t key_count;
    uint32_t tensor_count;
    enum odsi_err status; /* the first failure before begin */
    struct odsi_failure failure;
    uint64_t *sizes;    /* [tensor_count] bytes of data */
    uint64_t data_size; /* of all tensors, each padded */
    uint32_t tensor_at; /* the tensor whose data come next */
    uint64_t tensor_done;
    uint8_t *chunk; /* [CHUNK_SIZE] */
    size_t used;
    uint64_t done, total; /* bytes of the file */
    void (*progress)(void *context, uint64_t done, uint64_t total);
    void *context;
};

static enum odsi_err cannot_write(const char *path)
{
    return odsi_fail(ODSI_ERR_IO, "cannot write %s: %s", path, strerror(errno));
}

static uint64_t padded(uint64_t size)
{
    return (size + GGUF_WRITER_ALIGNMENT - 1) / GGUF_WRITER_ALIGNMENT * GGUF_WRITER_ALIGNMENT;
}

/* ---- opening and closing --------------------------------------------------------------------- */

static enum odsi_err create_part(struct gguf_writer *self)
{
    if (access(self->path, F_OK) == 0)
        return odsi_fail(ODSI_ERR_EXISTS, "%s is there already", self->path);
    self->fd = open(self->part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (self->fd >= 0)
        return ODSI_OK;
    if (errno == EEXIST)
        return odsi_fail(ODSI_ERR_EXISTS,
                         "%s is there: another program writes it, or one that "
                         "did was stopped; delete it",
                         self->part);
    return cannot_write(self->part);
}

static enum odsi_err make_names(struct gguf_writer *self, const char *path)
{
    const size_t size = strlen(path);
    if (size >= IO_PATH_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "the path is longer than %u bytes: %.64s...",
                         IO_PATH_SIZE - 1, path);
    const size_t part_size = size + sizeof ".part";
    enum odsi_err err = alloc_text(&self->path, path, size);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->part, part_size, 1);
    if (err == ODSI_OK)
        snprintf(self->part, part_size, "%s.part", path);
    return err;
}

enum odsi_err gguf_writer_open(struct gguf_writer **out, const char *path,
                               void (*progress)(void *context, uint64_t done, uint64_t total),
                               void *context)
{
    struct gguf_writer *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->fd = -1;
    self->progress = progress;
    self->context = context;
    buf_init(&self->keys, HEADER_SIZE_MAX / 2);
    buf_init(&self->infos, HEADER_SIZE_MAX / 2);
    err = make_names(self, path);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->chunk, CHUNK_SIZE, 1);
    if (err == ODSI_OK)
        err = create_part(self);
    if (err != ODSI_OK)
        gguf_writer_close(&self);
    *out = self;
    return err;
}

void gguf_writer_close(struct gguf_writer **self_pointer)
{
    struct gguf_writer *self = *self_pointer;
    if (!self)
        return;
    if (self->fd >= 0) {
        (void)close(self->fd);
        (void)unlink(self->part);
    }
    buf_free(&self->keys);
    buf_free(&self->infos);
    alloc_free(self->sizes);
    alloc_free(self->chunk);
    alloc_free(self->part);
    alloc_free(self->path);
    alloc_free(self);
    *self_pointer = NULL;
}

/* ---- metadata -------------------------------------------------------------------------------- */

static void put_text(struct buf *out, const char *text, size_t size)
{
    (void)buf_append_u64(out, size);
    (void)buf_append(out, text, size);
}

static void put_key(struct gguf_writer *self, const char *key, size_t size,
                    enum gguf_value_type type)
{
    ODSI_ASSERT(self->stage == STAGE_HEADER);
    self->key_count++;
    put_text(&self->keys, key, size);
    (void)buf_append_u32(&self->keys, type);
}

void gguf_writer_u32(struct gguf_writer *self, const char *key, uint32_t value)
{
    put_key(self, key, strlen(key), GGUF_U32);
    (void)buf_append_u32(&self->keys, value);
}

void gguf_writer_f32(struct gguf_writer *self, const char *key, float value)
{
    put_key(self, key, strlen(key), GGUF_F32);
    (void)buf_append_u32(&self->keys, det_bits(value));
}

void gguf_writer_bool(struct gguf_writer *self, const char *key, int value)
{
    put_key(self, key, strlen(key), GGUF_BOOL);
    (void)buf_append_u8(&self->keys, value ? 1 : 0);
}

void gguf_writer_text(struct gguf_writer *self, const char *key, const char *value)
{
    put_key(self, key, strlen(key), GGUF_TEXT);
    put_text(&self->keys, value, strlen(value));
}

void gguf_writer_copy(struct gguf_writer *self, struct gguf_text key,
                      const struct gguf_value *value)
{
    put_key(self, key.data, key.size, (enum gguf_value_type)value->type);
    if (value->type == GGUF_TEXT)
        (void)buf_append_u64(&self->keys, value->size);
    if (value->type == GGUF_ARRAY) {
        (void)buf_append_u32(&self->keys, value->element_type);
        (void)buf_append_u64(&self->keys, value->count);
    }
    (void)buf_append(&self->keys, value->data, value->size);
}

void gguf_writer_array(struct gguf_writer *self, const char *key, enum gguf_value_type element,
                       uint64_t count)
{
    put_key(self, key, strlen(key), GGUF_ARRAY);
    (void)buf_append_u32(&self->keys, element);
    (void)buf_append_u64(&self->keys, count);
}

void gguf_writer_item_text(struct gguf_writer *self, const char *text, size_t size)
{
    put_text(&self->keys, text, size);
}

void gguf_writer_item_u32(struct gguf_writer *self, uint32_t bits)
{
    (void)buf_append_u32(&self->keys, bits);
}

/* ---- tensors --------------------------------------------------------------------------------- */

static void keep_failure(struct gguf_writer *self, enum odsi_err err)
{
    if (self->status != ODSI_OK || err == ODSI_OK)
        return;
    self->status = err;
    odsi_failure_take(&self->failure, err);
}

void gguf_writer_tensor(struct gguf_writer *self, const char *name, enum tensor_type type,
                        uint32_t dim_count, const uint64_t *dims)
{
    uint64_t all[4] = {1, 1, 1, 1};
    uint64_t size = 0;
    ODSI_ASSERT(self->stage == STAGE_HEADER);
    ODSI_ASSERT(dim_count >= 1 && dim_count <= 4);
    memcpy(all, dims, dim_count * sizeof *dims);
    if (!gguf_tensor_size((uint32_t)type, all, &size) || size == 0 ||
        size > UINT64_MAX / 4 - self->data_size) {
        keep_failure(self, odsi_fail(ODSI_ERR_INVALID,
                                     "%s: tensor %s cannot be of type %s with rows of %" PRIu64,
                                     self->path, name, gguf_type_name((uint32_t)type), all[0]));
        return;
    }
    const enum odsi_err err =
        alloc_resize(&self->sizes, (size_t)self->tensor_count + 1, sizeof *self->sizes);
    if (err != ODSI_OK) {
        keep_failure(self, err);
        return;
    }
    self->sizes[self->tensor_count++] = size;
    put_text(&self->infos, name, strlen(name));
    (void)buf_append_u32(&self->infos, dim_count);
    for (uint32_t i = 0; i < dim_count; i++)
        (void)buf_append_u64(&self->infos, dims[i]);
    (void)buf_append_u32(&self->infos, (uint32_t)type);
    (void)buf_append_u64(&self->infos, self->data_size);
    self->data_size += padded(size);
}

/* ---- the file -------------------------------------------------------------------------------- */

static enum odsi_err flush(struct gguf_writer *self)
{
    for (size_t at = 0; at < self->used;) {
        const ssize_t written = write(self->fd, self->chunk + at, self->used - at);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            return cannot_write(self->part);
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

static enum odsi_err put(struct gguf_writer *self, const uint8_t *data, size_t size)
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

/* Zeros from a length of size to the next multiple of the alignment. */
static enum odsi_err put_padding(struct gguf_writer *self, uint64_t size)
{
    static const uint8_t zeros[GGUF_WRITER_ALIGNMENT];
    return put(self, zeros, (size_t)(padded(size) - size));
}

enum odsi_err gguf_writer_begin(struct gguf_writer *self)
{
    ODSI_ASSERT(self->stage == STAGE_HEADER);
    self->stage = STAGE_DATA;
    enum odsi_err err = self->status;
    if (err != ODSI_OK)
        return odsi_fail(err, "%s", self->failure.text);
    err = buf_status(&self->keys);
    if (err == ODSI_OK)
        err = buf_status(&self->infos);
    if (err != ODSI_OK)
        return err;
    struct buf head;
    buf_init(&head, 64);
    (void)buf_append_text(&head, "GGUF");
    (void)buf_append_u32(&head, 3);
    (void)buf_append_u64(&head, self->tensor_count);
    (void)buf_append_u64(&head, self->key_count);
    const uint64_t size = head.size + self->keys.size + self->infos.size;
    self->total = padded(size) + self->data_size;
    err = buf_status(&head);
    if (err == ODSI_OK)
        err = put(self, head.data, head.size);
    if (err == ODSI_OK)
        err = put(self, self->keys.data, self->keys.size);
    if (err == ODSI_OK)
        err = put(self, self->infos.data, self->infos.size);
    if (err == ODSI_OK)
        err = put_padding(self, size);
    buf_free(&head);
    return err;
}

enum odsi_err gguf_writer_data(struct gguf_writer *self, const void *data, size_t size)
{
    const uint8_t *from = data;
    ODSI_ASSERT(self->stage == STAGE_DATA);
    while (size > 0) {
        ODSI_ASSERT(self->tensor_at < self->tensor_count);
        const uint64_t tensor_size = self->sizes[self->tensor_at];
        const uint64_t left = tensor_size - self->tensor_done;
        const size_t part = left < size ? (size_t)left : size;
        enum odsi_err err = put(self, from, part);
        from += part;
        size -= part;
        self->tensor_done += part;
        if (err == ODSI_OK && self->tensor_done == tensor_size) {
            err = put_padding(self, tensor_size);
            self->tensor_done = 0;
            self->tensor_at++;
        }
        if (err != ODSI_OK)
            return err;
    }
    return ODSI_OK;
}

enum odsi_err gguf_writer_finish(struct gguf_writer *self)
{
    ODSI_ASSERT(self->stage == STAGE_DATA);
    ODSI_ASSERT(self->tensor_at == self->tensor_count);
    enum odsi_err err = flush(self);
    if (close(self->fd) != 0 && err == ODSI_OK)
        err = cannot_write(self->part);
    self->fd = -1;
    if (err == ODSI_OK && rename(self->part, self->path) != 0)
        err = cannot_write(self->path);
    if (err != ODSI_OK)
        (void)unlink(self->part);
    self->stage = STAGE_FINISHED;
    return err;
}
