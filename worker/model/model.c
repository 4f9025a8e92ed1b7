#include "worker/model/model.h"

#include "common/base/alloc.h"
#include "common/base/log.h"
#include "worker/model/manifest_cache.h"
#include "worker/model/model_parts.h"
#include "worker/model/tensor_scan.h"
#include "worker/model/tokenizer.h"

#include <fcntl.h>
#include <limits.h>
#include <string.h>

#define CACHE_PATH_SIZE_MAX (PATH_MAX + 128u)

/* ---- what the files say ---------------------------------------------------------------------- */

/* The file's name without folder and ".gguf", or the folder's, for a model without one of its own.
 * Printable ASCII, cut to fit. */
static void name_by_path(struct model *self)
{
    char *name = self->params.name;
    size_t end = strlen(self->path);
    while (end > 1 && self->path[end - 1] == '/')
        end--;
    size_t start = end;
    while (start > 0 && self->path[start - 1] != '/')
        start--;
    if (end - start > 5 && memcmp(self->path + end - 5, ".gguf", 5) == 0)
        end -= 5;
    size_t size = end - start;
    if (size > sizeof self->params.name - 1)
        size = sizeof self->params.name - 1;
    for (size_t i = 0; i < size; i++) {
        const char c = self->path[start + i];
        name[i] = c >= ' ' && c <= '~' ? c : '?';
    }
    name[size] = '\0';
}

/* Whether the tokenizer's bytes make one, with a token for each row of the embedding. */
static enum odsi_err check_tokenizer(const struct source *source)
{
    struct tokenizer *tokenizer = NULL;
    enum odsi_err err = tokenizer_open(&tokenizer, source->tokenizer.data, source->tokenizer.size);
    if (err == ODSI_OK && tokenizer_vocab_size(tokenizer) != source->params.vocab_size)
        err = odsi_fail(ODSI_ERR_CORRUPT, "the tokenizer has %u tokens, the model %u",
                        tokenizer_vocab_size(tokenizer), source->params.vocab_size);
    tokenizer_close(&tokenizer);
    return err;
}

static enum odsi_err check_description(struct model *self)
{
    const struct source *source = self->source;
    enum odsi_err err = check_tokenizer(source);
    if (err == ODSI_OK)
        err = arch_check(&source->params);
    if (err == ODSI_OK)
        err = arch_check_tensors(source);
    self->params = source->params;
    for (uint32_t i = 0; i < source->tensor_count; i++)
        self->params.weight_size += source->tensors[i].size; /* they do not overlap in a file */
    return err;
}

/* ---- identity ------------------------------------------------------------------------------- */

static enum odsi_err write_manifest(struct model *self)
{
    struct digest tokenizer_digest;
    const struct source *source = self->source;
    digest_of(&tokenizer_digest, source->tokenizer.data, source->tokenizer.size);
    buf_reset(&self->manifest);
    manifest_write(&self->manifest, &self->params, self->params.name, &tokenizer_digest,
                   source->tensors, self->digests, source->tensor_count);
    return buf_status(&self->manifest);
}

static enum odsi_err keep_digest(void *context, uint32_t tensor, const struct digest *digest)
{
    struct model *self = context;
    self->digests[tensor].digest = *digest;
    return ODSI_OK;
}

/* Hashes the tensors in files, or those in memory. */
static enum odsi_err hash_tensors(struct model *self, int in_memory,
                                  const struct model_progress *progress)
{
    const struct source *source = self->source;
    struct parallel *threads = NULL;
    uint32_t *tensors = NULL;
    uint32_t count = 0;
    enum odsi_err err = alloc_zeroed(&tensors, source->tensor_count, sizeof *tensors);
    for (uint32_t i = 0; i < source->tensor_count && err == ODSI_OK; i++)
        if ((source->tensors[i].file == SOURCE_IN_MEMORY) == in_memory)
            tensors[count++] = i;
    if (err == ODSI_OK && count > 0)
        err = parallel_open(&threads, in_memory ? 1 : 0);
    if (err == ODSI_OK && count > 0) {
        const struct tensor_scan scan = {.source = source,
                                         .tensors = tensors,
                                         .tensor_count = count,
                                         .context = self,
                                         .digest = keep_digest,
                                         .progress = progress ? progress->call : NULL,
                                         .progress_context = progress ? progress->context : NULL};
        err = tensor_scan_run(&scan, threads);
    }
    parallel_close(&threads);
    alloc_free(tensors);
    return err;
}

/* Takes the digests of the tensors in files from a manifest that was kept. It must be what the
 * files' headers give in every other byte; otherwise it is as good as none.
 * Errors: ODSI_ERR_NO_MEMORY. */
static enum odsi_err recall_digests(struct model *self, int *found)
{
    struct buf kept;
    *found = 0;
    buf_init(&kept, MANIFEST_SIZE_MAX + DIGEST_SIZE);
    enum odsi_err err = manifest_cache_load(buf_text_view(&self->cache_path), &kept);
    if (err == ODSI_OK && kept.size == self->manifest.size) {
        for (uint32_t i = 0; i < self->source->tensor_count; i++)
            if (self->source->tensors[i].file != SOURCE_IN_MEMORY)
                memcpy(self->digests[i].digest.bytes, kept.data + self->digests[i].at, DIGEST_SIZE);
        err = write_manifest(self);
        *found = err == ODSI_OK && memcmp(kept.data, self->manifest.data, self->manifest.size) == 0;
    }
    buf_free(&kept);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

/* Writes the manifest, with digests from the cache or from hashing every tensor. */
static enum odsi_err make_manifest(struct model *self, const char *cache_dir,
                                   const struct model_progress *progress)
{
    int found = 0;
    enum odsi_err err = hash_tensors(self, 1, NULL);
    if (err == ODSI_OK)
        err = write_manifest(self);
    if (err == ODSI_OK && cache_dir)
        err = recall_digests(self, &found);
    if (err != ODSI_OK || found)
        return err;
    err = hash_tensors(self, 0, progress);
    if (err == ODSI_OK)
        err = write_manifest(self);
    if (err == ODSI_OK && cache_dir &&
        manifest_cache_store(cache_dir, buf_text_view(&self->cache_path), &self->manifest) !=
            ODSI_OK)
        log_line(LOG_WARN, "the model will be hashed again at the next start: %s", odsi_err_text());
    return err;
}

/* ---- opening and closing -------------------------------------------------------------------- */

/* From here on tensors are read one by one; reading ahead would fetch a neighbour's pages. */
static void expect_random_reads(const struct source *source)
{
    for (uint32_t i = 0; i < source->file_count; i++)
        (void)posix_fadvise(source->files[i].fd, 0, 0, POSIX_FADV_RANDOM);
}

static enum odsi_err identify(struct model *self, const char *cache_dir,
                              const struct model_progress *progress)
{
    enum odsi_err err = check_description(self);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->digests, self->source->tensor_count, sizeof *self->digests);
    if (err == ODSI_OK && cache_dir)
        err = manifest_cache_path(&self->cache_path, cache_dir, self->source);
    if (err == ODSI_OK)
        err = make_manifest(self, cache_dir, progress);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s", self->path);
}

enum odsi_err model_open(struct model **out, const char *path, const char *cache_dir,
                         void (*progress)(void *context, uint64_t done, uint64_t total),
                         void *context)
{
    const struct model_progress tell = {.call = progress, .context = context};
    struct model *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    buf_init(&self->manifest, MANIFEST_SIZE_MAX);
    buf_init(&self->cache_path, CACHE_PATH_SIZE_MAX);
    err = alloc_text(&self->path, path, strlen(path));
    if (err == ODSI_OK)
        err = source_open(&self->source, path);
    if (err == ODSI_OK)
        err = identify(self, cache_dir, &tell);
    if (err != ODSI_OK)
        goto fail;
    expect_random_reads(self->source);
    digest_of(&self->id, self->manifest.data, self->manifest.size);
    if (self->params.name[0] == '\0')
        name_by_path(self);
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
    source_close(&model->source);
    alloc_free(model->path);
    alloc_free(model->digests);
    buf_free(&model->manifest);
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
    *data = self->source->tokenizer.data;
    *size = self->source->tokenizer.size;
}

enum odsi_err model_check_digest(const struct model *model, uint32_t tensor,
                                 const struct digest *digest)
{
    const char *name = model->source->tensors[tensor].name;
    if (digest_equal(digest, &model->digests[tensor].digest))
        return ODSI_OK;
    if (model->cache_path.size == 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "tensor %s changed since the model was opened", name);
    return odsi_fail(ODSI_ERR_CORRUPT,
                     "tensor %s is not what it was when the model was hashed; if the file was "
                     "replaced on purpose, delete %.*s",
                     name, (int)model->cache_path.size, (const char *)model->cache_path.data);
}
