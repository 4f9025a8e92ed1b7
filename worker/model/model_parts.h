/* The inside of struct model, shared by model.c and model_span.c. */
#ifndef ODSI_WORKER_MODEL_MODEL_PARTS_H
#define ODSI_WORKER_MODEL_MODEL_PARTS_H
#include "common/base/buf.h"
#include "worker/model/arch.h"
#include "worker/model/gguf.h"
#include "worker/model/manifest.h"
#include "worker/model/model.h"

#include <string.h>

struct model {
    struct model_params params;
    struct digest id;
    struct gguf *gguf;
    char *path;
    struct buf manifest;
    struct buf tokenizer;
    struct buf cache_path;           /* empty: the manifest is not kept */
    struct manifest_tensor *tensors; /* ascending names */
    uint32_t tensor_count;
};

#define MODEL_CHUNK_SIZE (1u << 20) /* what is read and hashed at once */

/* Counts bytes and tells a callback, which may be NULL. */
struct model_progress {
    void (*call)(void *context, uint64_t done, uint64_t total);
    void *context;
    uint64_t done;
    uint64_t total;
};

static inline void model_progress_add(struct model_progress *self, uint64_t size)
{
    self->done += size;
    if (self->call)
        self->call(self->context, self->done, self->total);
}

/* The tensor of this role; NULL when the file has none (the output, when it is the embedding). */
static inline const struct manifest_tensor *model_tensor_of(const struct model *self,
                                                            enum arch_role role, uint32_t layer)
{
    struct arch_tensor want;
    uint32_t low = 0, high = self->tensor_count;
    arch_tensor_of(&self->params, role, layer, &want);
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        const int order = strcmp(want.name, self->tensors[middle].name);
        if (order == 0)
            return &self->tensors[middle];
        if (order < 0)
            high = middle;
        else
            low = middle + 1;
    }
    return NULL;
}
#endif
