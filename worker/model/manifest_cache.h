/* Manifests of models seen before, so that a model is hashed whole only once on a machine.
 *
 * A file of the cache is named by the SHA-256 of what the system says about each file that holds
 * tensors (its real path, size, modification time, inode and device), and holds the manifest and
 * its SHA-256.
 * It is a hint, not a proof: model_span_open still hashes what it loads. */
#ifndef ODSI_WORKER_MODEL_MANIFEST_CACHE_H
#define ODSI_WORKER_MODEL_MANIFEST_CACHE_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "worker/model/source.h"

/* Appends to out where in cache_dir the manifest of the source's files belongs.
 * Errors: ODSI_ERR_IO, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err manifest_cache_path(struct buf *out, const char *cache_dir,
                                                const struct source *source);
/* Appends the manifest kept at cache_path to out, whose ceiling must leave room for a digest.
 * Errors: ODSI_ERR_NOT_FOUND (none, or a damaged one), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err manifest_cache_load(const char *cache_path, struct buf *out);
/* Replaces cache_path by the manifest, whole or not at all; makes cache_dir when it is missing.
 * Errors: ODSI_ERR_IO, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err manifest_cache_store(const char *cache_dir, const char *cache_path,
                                                 const struct buf *manifest);
#endif
