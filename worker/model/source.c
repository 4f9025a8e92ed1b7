#include "worker/model/source.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "worker/model/tokenizer.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MEMORY_SIZE_MAX (16u << 20)

enum odsi_err source_open(struct source **out, const char *path)
{
    struct source *self = NULL;
    struct stat status;
    *out = NULL;
    if (stat(path, &status) != 0)
        return odsi_fail(errno == ENOENT ? ODSI_ERR_NOT_FOUND : ODSI_ERR_IO, "%s: %s", path,
                         strerror(errno));
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    buf_init(&self->tokenizer, TOKENIZER_CANONICAL_SIZE_MAX);
    buf_init(&self->memory, MEMORY_SIZE_MAX);
    err = S_ISDIR(status.st_mode) ? source_hf_open(self, path) : source_gguf_open(self, path);
    if (err != ODSI_OK)
        source_close(&self);
    *out = self;
    return err;
}

void source_close(struct source **self_pointer)
{
    struct source *self = *self_pointer;
    if (!self)
        return;
    for (uint32_t i = 0; i < self->file_count; i++) {
        alloc_free(self->files[i].path);
        (void)close(self->files[i].fd); /* only read: nothing can be lost */
    }
    alloc_free(self->files);
    alloc_free(self->tensors);
    buf_free(&self->tokenizer);
    buf_free(&self->memory);
    alloc_free(self);
    *self_pointer = NULL;
}

static enum odsi_err open_regular(const char *path, int *fd, struct stat *status)
{
    enum odsi_err err = ODSI_OK;
    *fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* O_NONBLOCK: a FIFO must not hang us */
    if (*fd < 0 || fstat(*fd, status) != 0)
        err = odsi_fail(errno == ENOENT ? ODSI_ERR_NOT_FOUND : ODSI_ERR_IO, "%s: %s", path,
                        strerror(errno));
    else if (!S_ISREG(status->st_mode))
        err = odsi_fail(ODSI_ERR_IO, "%s is not a regular file", path);
    if (err != ODSI_OK && *fd >= 0)
        (void)close(*fd); /* nothing was written */
    return err;
}

enum odsi_err source_add_file(struct source *self, const char *path, uint32_t *index_out)
{
    struct source_file file = {.fd = -1};
    struct stat status;
    if (self->file_count >= SOURCE_FILES_MAX)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "%s: a model of more than %u files", path,
                         SOURCE_FILES_MAX);
    enum odsi_err err = alloc_resize(&self->files, self->file_count + 1, sizeof *self->files);
    if (err == ODSI_OK)
        err = alloc_text(&file.path, path, strlen(path));
    if (err != ODSI_OK)
        return err;
    err = open_regular(path, &file.fd, &status);
    if (err != ODSI_OK) {
        alloc_free(file.path);
        return err;
    }
    file.size = (uint64_t)status.st_size;
    *index_out = self->file_count;
    self->files[self->file_count++] = file;
    return ODSI_OK;
}

static enum odsi_err read_file(const struct source_file *file, uint64_t offset, uint8_t *out,
                               size_t size)
{
    for (size_t done = 0; done < size;) {
        const ssize_t got = pread(file->fd, out + done, size - done, (off_t)(offset + done));
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return odsi_fail(ODSI_ERR_IO, "%s: reading at %" PRIu64 ": %s", file->path,
                             offset + done, strerror(errno));
        if (got == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "%s: the file became shorter than %" PRIu64 " bytes",
                             file->path, offset + size);
        done += (size_t)got;
    }
    return ODSI_OK;
}

enum odsi_err source_read(const struct source *self, const struct source_tensor *tensor,
                          uint64_t at, void *out, size_t size)
{
    ODSI_ASSERT(at <= tensor->size && size <= tensor->size - at);
    if (tensor->file == SOURCE_IN_MEMORY) {
        ODSI_ASSERT(tensor->offset + tensor->size <= self->memory.size);
        memcpy(out, self->memory.data + tensor->offset + at, size);
        return ODSI_OK;
    }
    ODSI_ASSERT(tensor->file < self->file_count);
    return read_file(&self->files[tensor->file], tensor->offset + at, out, size);
}
