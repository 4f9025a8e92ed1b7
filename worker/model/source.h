/* A model as it lies on disk, whatever the format: what it computes, how it tokenizes, and where
 * the bytes of each tensor are. A GGUF file, the parts of a split one, or a Hugging Face folder
 * (config.json, tokenizer.json, safetensors) become the same thing here; nothing behind this header
 * knows which it was.
 *
 * Everything read from the files is checked before it is used: lengths, counts, offsets against the
 * file's size, names, types, and that tensors do not overlap. Tensor data are not touched.
 *
 * Tensors have canonical names: those of GGUF ("blk.0.attn_q.weight"). What a format keeps apart or
 * together stays so (one tensor for each expert, "blk.0.ffn_gate.3.weight", or all in one,
 * "blk.0.ffn_gate_exps.weight"; q, k and v as one "blk.0.attn_qkv.weight"): worker/model/arch.h
 * says which pieces make up a weight.
 *
 * Threads: one owner opens and closes; reading from any thread. */
#ifndef ODSI_WORKER_MODEL_SOURCE_H
#define ODSI_WORKER_MODEL_SOURCE_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/base/limits.h"
#include "kernels/ops.h"
#include "worker/model/model.h"

#include <stddef.h>
#include <stdint.h>

#define SOURCE_FILES_MAX 1024u      /* parts of a split model */
#define SOURCE_IN_MEMORY UINT32_MAX /* instead of a file's index: the bytes are in memory */

struct source_tensor {
    char name[LIMIT_TENSOR_NAME_SIZE + 1]; /* canonical, printable, no spaces */
    enum tensor_type type;                 /* one that ops take */
    uint32_t dim_count;                    /* 1 to 3 */
    uint64_t dims[4];                      /* fastest first; unused ones are 1 */
    uint32_t file;                         /* index, or SOURCE_IN_MEMORY */
    uint64_t offset;                       /* from the start of the file or of memory */
    uint64_t size;                         /* bytes */
};

struct source_file {
    char *path;
    int fd;
    uint64_t size;
};

struct source {
    struct model_params params; /* all but weight_size; name is empty when the files give none */
    struct buf tokenizer;       /* canonical bytes, worker/model/tokenizer.h */
    struct source_file *files;
    uint32_t file_count;
    struct source_tensor *tensors; /* in ascending byte order of their names, which differ */
    uint32_t tensor_count;
    struct buf memory; /* tensors that no file holds, such as factors that config.json spells out */
};

/* path: a .gguf file (of a split model any of its parts: "NAME-00001-of-00003.gguf"), or a folder
 * with config.json. Errors: ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_CORRUPT, ODSI_ERR_UNSUPPORTED
 * (an architecture, tensor type, tokenizer or setting that this build does not do, by name),
 * ODSI_ERR_NO_MEMORY. Owned: by the caller, ended with source_close. */
ODSI_MUST_USE enum odsi_err source_open(struct source **out, const char *path);
void source_close(struct source **self);

/* Copies size bytes of tensor, from byte `at` of it, by pread(2): a file that shrinks meanwhile is
 * an error instead of a signal. Errors: ODSI_ERR_CORRUPT (it ends before that), ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err source_read(const struct source *self,
                                        const struct source_tensor *tensor, uint64_t at, void *out,
                                        size_t size);

/* The two formats; self is zeroed but for its bufs, which are initialized. On an error the caller
 * closes self. */
ODSI_MUST_USE enum odsi_err source_gguf_open(struct source *self, const char *path);
ODSI_MUST_USE enum odsi_err source_hf_open(struct source *self, const char *folder);
/* For both: appends an open file; *index_out is its place in files. The path is copied. */
ODSI_MUST_USE enum odsi_err source_add_file(struct source *self, const char *path,
                                            uint32_t *index_out);
#endif
