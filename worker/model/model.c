#include "worker/model/model.h"

#include "common/base/alloc.h"
#include "common/base/log.h"
#include "worker/model/manifest_cache.h"
#include "worker/model/model_parts.h"
#include "worker/model/tokenizer.h"
#include "worker/model/vocab.h"

#include <fcntl.h>
#include <limits.h>
#include <string.h>

#define CACHE_PATH_SIZE_MAX (PATH_MAX + 128u)

/* ---- what the file says --------------------------------------------------------------------- */

/* Copies a name for humans: printable ASCII, cut to fit. */
static void set_name(struct model_params *params, const char *text, size_t size)
{
    const size_t room = sizeof params->name - 1;
    if (size > room)
        size = room;
    for (size_t i = 0; i < size; i++)
        params->name[i] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
    params->name[size] = '\0';
}

static enum odsi_err read_name(struct model *self)
{
    struct gguf_text text = {.size = 0};
    const enum odsi_err err = gguf_get_text(self->gguf, "general.name", &text);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    set_name(&self->params, text.size ? text.data : "", text.size);
    return ODSI_OK;
}

/* The file's name without folder and ".gguf", for a model that has no name of its own. */
static void name_by_file(struct model *self)
{
    const char *slash = strrchr(self->path, '/');
    const char *name = slash ? slash + 1 : self->path;
    size_t size = strlen(name);
    if (size > 5 && strcmp(name + size - 5, ".gguf") == 0)
        size -= 5;
    set_name(&self->params, name, size);
}

/* The vocabulary in canonical bytes, and whether they make a tokenizer. */
static enum odsi_err read_tokenizer(struct model *self)
{
    struct tokenizer *tokenizer = NULL;
    enum odsi_err err = vocab_canonical(self->gguf, &self->tokenizer, &self->params.vocab_size);
    if (err == ODSI_OK)
        err = tokenizer_open(&tokenizer, self->tokenizer.data, self->tokenizer.size);
    tokenizer_close(&tokenizer);
    if (err != ODSI_OK)
        return err;
    uint32_t stated = self->params.vocab_size;
    err = gguf_get_u32(self->gguf, "llama.vocab_size", &stated);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    if (stated != self->params.vocab_size)
        return odsi_fail(ODSI_ERR_CORRUPT, "llama.vocab_size is %u, but there are %u tokens",
                         stated, self->params.vocab_size);
    return ODSI_OK;
}

static enum odsi_err list_tensors(struct model *self)
{
    self->tensor_count = (uint32_t)gguf_tensor_count(self->gguf);
    const enum odsi_err err =
        alloc_zeroed(&self->tensors, self->tensor_count, sizeof *self->tensors);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; i < self->tensor_count; i++) {
        const struct gguf_tensor *from = gguf_tensor_by_name_at(self->gguf, i);
        struct manifest_tensor *to = &self->tensors[i];
        memcpy(to->name, from->name.data, from->name.size); /* at most LIMIT_TENSOR_NAME_SIZE */
        to->type = (enum tensor_type)from->ggml_type;
        to->dim_count = from->dim_count;
        memcpy(to->dims, from->dims, sizeof to->dims);
        to->offset = from->offset;
        to->size = from->size;
        self->params.weight_size += from->size; /* they do not overlap in one file */
    }
    return ODSI_OK;
}

static enum odsi_err read_description(struct model *self)
{
    enum odsi_err err = arch_read(self->gguf, &self->params);
    if (err == ODSI_OK)
        err = read_tokenizer(self);
    if (err == ODSI_OK)
        err = arch_check(&self->params);
    if (err == ODSI_OK)
        err = arch_check_tensors(self->gguf, &self->params);
    if (err == ODSI_OK)
        err = read_name(self);
    if (err == ODSI_OK)
        err = list_tensors(self);
    return err;
}

/* ---- identity ------------------------------------------------------------------------------- */

static enum odsi_err write_manifest(struct model *self)
{
    struct digest tokenizer_digest;
    digest_of(&tokenizer_digest, self->tokenizer.data, self->tokenizer.size);
    buf_reset(&self->manifest);
    manifest_write(&self->manifest, &self->params, self->params.name, &tokenizer_digest,
                   self->tensors, self->tensor_count);
    return buf_status(&self->manifest);
}

static enum odsi_err hash_tensors(struct model *self, struct model_progress *progress)
{
    uint8_t *chunk = NULL;
    struct digest_stream *stream = NULL;
    enum odsi_err err = alloc_zeroed(&chunk, MODEL_CHUNK_SIZE, 1);
    if (err == ODSI_OK)
        err = digest_stream_open(&stream);
    for (uint32_t i = 0; i < self->tensor_count && err == ODSI_OK; i++) {
        struct manifest_tensor *tensor = &self->tensors[i];
        for (uint64_t at = 0; at < tensor->size && err == ODSI_OK;) {
            const uint64_t left = tensor->size - at;
            const size_t size = left < MODEL_CHUNK_SIZE ? (size_t)left : MODEL_CHUNK_SIZE;
            err = gguf_read(self->gguf, tensor->offset + at, chunk, size);
            if (err != ODSI_OK)
                break;
            digest_stream_add(stream, chunk, size);
            model_progress_add(progress, size);
            at += size;
        }
        if (err == ODSI_OK)
            digest_stream_finish(stream, &tensor->digest);
    }
    digest_stream_close(&stream);
    alloc_free(chunk);
    return err;
}

/* Takes the tensors' digests from a manifest that was kept. It must be what this file's header
 * gives in every other byte; otherwise it is as good as none. Errors: ODSI_ERR_NO_MEMORY. */
static enum odsi_err recall_digests(struct model *self, int *found)
{
    struct buf kept;
    *found = 0;
    buf_init(&kept, MANIFEST_SIZE_MAX + DIGEST_SIZE);
    enum odsi_err err = manifest_cache_load(buf_text_view(&self->cache_path), &kept);
    if (err == ODSI_OK && kept.size == self->manifest.size) {
        for (uint32_t i = 0; i < self->tensor_count; i++)
            memcpy(self->tensors[i].digest.bytes, kept.data + self->tensors[i].digest_at,
                   DIGEST_SIZE);
        err = write_manifest(self);
        *found = err == ODSI_OK && memcmp(kept.data, self->manifest.data, self->manifest.size) == 0;
    }
    buf_free(&kept);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

/* Writes the manifest, with digests from the cache or from hashing every tensor. */
static enum odsi_err make_manifest(struct model *self, const char *cache_dir,
                                   struct model_progress *progress)
{
    int found = 0;
    enum odsi_err err = write_manifest(self);
    if (err == ODSI_OK && cache_dir)
        err = recall_digests(self, &found);
    if (err != ODSI_OK || found)
        return err;
    err = hash_tensors(self, progress);
    if (err == ODSI_OK)
        err = write_manifest(self);
    if (err == ODSI_OK && cache_dir &&
        manifest_cache_store(cache_dir, buf_text_view(&self->cache_path), &self->manifest) !=
            ODSI_OK)
        log_line(LOG_WARN, "the model will be hashed again at the next start: %s", odsi_err_text());
    return err;
}

/* ---- opening and closing -------------------------------------------------------------------- */

static enum odsi_err open_file(struct model *self, const char *path, const char *cache_dir)
{
    enum odsi_err err = alloc_text(&self->path, path, strlen(path));
    if (err == ODSI_OK)
        err = gguf_open(&self->gguf, path);
    if (err == ODSI_OK && cache_dir)
        err = manifest_cache_path(&self->cache_path, cache_dir, path, gguf_fd(self->gguf));
    return err;
}

enum odsi_err model_open(struct model **out, const char *path, const char *cache_dir,
                         void (*progress)(void *context, uint64_t done, uint64_t total),
                         void *context)
{
    *out = NULL;
    struct model *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    buf_init(&self->manifest, MANIFEST_SIZE_MAX);
    buf_init(&self->tokenizer, TOKENIZER_CANONICAL_SIZE_MAX);
    buf_init(&self->cache_path, CACHE_PATH_SIZE_MAX);
    err = open_file(self, path, cache_dir);
    if (err != ODSI_OK)
        goto fail;
    err = read_description(self);
    if (err == ODSI_OK) {
        struct model_progress tell = {
            .call = progress, .context = context, .total = self->params.weight_size};
        err = make_manifest(self, cache_dir, &tell);
    }
    if (err != ODSI_OK) {
        err = odsi_fail_prefix(err, "%s", path);
        goto fail;
    }
    /* From here on tensors are read one by one; reading ahead would fetch a neighbour's pages. */
    (void)posix_fadvise(gguf_fd(self->gguf), 0, 0, POSIX_FADV_RANDOM);
    digest_of(&self->id, self->manifest.data, self->manifest.size);
    if (self->params.name[0] == '\0')
        name_by_file(self);
    *out = self;
    return ODSI_OK;
fail:
    model_close(&self);
    return err;
}

void model_close(struct model **self)
{
    struct model *model = *self;
    if (!model)
        return;
    gguf_close(&model->gguf);
    alloc_free(model->path);
    alloc_free(model->tensors);
    buf_free(&model->manifest);
    buf_free(&model->tokenizer);
    buf_free(&model->cache_path);
    alloc_free(model);
    *self = NULL;
}

const struct model_params *model_params_view(const struct model *self)
{
    return &self->params;
}

const struct digest *model_id_view(const struct model *self)
{
    return &self->id;
}

void model_manifest_view(const struct model *self, const uint8_t **data, size_t *size)
{
    *data = self->manifest.data;
    *size = self->manifest.size;
}

void model_tokenizer_view(const struct model *self, const uint8_t **data, size_t *size)
{
    *data = self->tokenizer.data;
    *size = self->tokenizer.size;
}
