/* Reads tensors of a source, each from its first byte to its last and only once, on several
 * threads; hashes them on the way and hands out their rows while these are still in the cache.
 * Whole tensors are what threads share, the largest first, so that all end together. */
#ifndef ODSI_WORKER_MODEL_TENSOR_SCAN_H
#define ODSI_WORKER_MODEL_TENSOR_SCAN_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "worker/model/parallel.h"
#include "worker/model/source.h"

#include <stddef.h>
#include <stdint.h>

struct tensor_scan {
    const struct source *source; /* passed arch_check_tensors */
    const uint32_t *tensors;     /* which ones to read: indices in the source, all different */
    uint32_t tensor_count;
    void *context; /* of the next two, which are called on any thread, for one tensor in order */
    /* row_count whole rows from row_first on, counted through all matrices. data is dropped when it
     * returns. NULL: nothing to do with them. */
    enum odsi_err (*rows)(void *context, uint32_t tensor, uint64_t row_first, uint64_t row_count,
                          const uint8_t *data);
    /* The SHA-256 of all bytes of a tensor, after its last row. */
    enum odsi_err (*digest)(void *context, uint32_t tensor, const struct digest *digest);
    /* May be NULL; bytes that are done, of those of all these tensors. Called by one thread at a
     * time, not always the same. */
    void (*progress)(void *context, uint64_t done, uint64_t total);
    void *progress_context;
};

/* Errors: those of source_read and of the callbacks, after which nothing more is read;
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tensor_scan_run(const struct tensor_scan *self,
                                            struct parallel *threads);
#endif
