#include "worker/model/manifest_cache.h"

#include "common/base/io.h"
#include "common/crypto/digest.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static enum odsi_err append_facts(struct buf *out, const struct source_file *file)
{
    struct stat status;
    char real[PATH_MAX];
    if (!realpath(file->path, real) || fstat(file->fd, &status) != 0)
        return odsi_fail(ODSI_ERR_IO, "cannot tell where %s lies: %s", file->path, strerror(errno));
    (void)buf_append(out, real, strlen(real) + 1);
    (void)buf_append_u64(out, (uint64_t)status.st_size);
    (void)buf_append_u64(out, (uint64_t)status.st_mtim.tv_sec);
    (void)buf_append_u64(out, (uint64_t)status.st_mtim.tv_nsec);
    (void)buf_append_u64(out, (uint64_t)status.st_ino);
    return buf_append_u64(out, (uint64_t)status.st_dev);
}

enum odsi_err manifest_cache_path(struct buf *out, const char *cache_dir,
                                  const struct source *source)
{
    char name[DIGEST_HEX_SIZE];
    struct digest digest;
    struct buf facts;
    enum odsi_err err = ODSI_OK;
    buf_init(&facts, (size_t)SOURCE_FILES_MAX * (PATH_MAX + 64));
    for (uint32_t i = 0; i < source->file_count && err == ODSI_OK; i++)
        err = append_facts(&facts, &source->files[i]);
    if (err == ODSI_OK)
        digest_of(&digest, facts.data, facts.size);
    buf_free(&facts);
    if (err != ODSI_OK)
        return err;
    digest_to_hex(name, &digest);
    return buf_printf(out, "%s/%s.manifest", cache_dir, name);
}

enum odsi_err manifest_cache_load(const char *cache_path, struct buf *out)
{
    struct digest digest;
    const enum odsi_err err = io_read_file(cache_path, out);
    if (err != ODSI_OK)
        return err == ODSI_ERR_NO_MEMORY ? err : ODSI_ERR_NOT_FOUND;
    if (out->size >= DIGEST_SIZE) {
        out->size -= DIGEST_SIZE;
        digest_of(&digest, out->data, out->size);
        if (memcmp(digest.bytes, out->data + out->size, DIGEST_SIZE) == 0)
            return ODSI_OK;
    }
    return odsi_fail(ODSI_ERR_NOT_FOUND, "%s is damaged", cache_path);
}

enum odsi_err manifest_cache_store(const char *cache_dir, const char *cache_path,
                                   const struct buf *manifest)
{
    struct buf content;
    struct digest digest;
    buf_init(&content, manifest->size + DIGEST_SIZE);
    digest_of(&digest, manifest->data, manifest->size);
    (void)buf_append(&content, manifest->data, manifest->size);
    enum odsi_err err = buf_append(&content, digest.bytes, DIGEST_SIZE);
    if (err == ODSI_OK)
        err = io_make_folders(cache_dir, 0700);
    /* No sync: after a crash the digest tells a torn one from a whole one. */
    if (err == ODSI_OK)
        err = io_write_file(cache_path, content.data, content.size, 0600, 0);
    buf_free(&content);
    return err;
}
