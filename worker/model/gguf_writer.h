/* Writes a GGUF file (version 3): metadata, then the list of tensors, then their data as a stream.
 * The one place that knows how such a file is laid out for writing.
 *
 * In this order: open; metadata and tensors in any number; begin, which writes everything before
 * the data; data, again and again, the bytes of the tensors one after the other in the order they
 * were added (what lies between two tensors is filled in here); finish, which gives the file its
 * name. Until then it is called PATH.part, so PATH is a whole file or not there. (After a power cut
 * as far as the file system keeps its order; nothing is synced.)
 *
 * Functions without a result keep their failure and begin returns it.
 * Threads: one owner at a time. */
#ifndef ODSI_WORKER_MODEL_GGUF_WRITER_H
#define ODSI_WORKER_MODEL_GGUF_WRITER_H
#include "common/base/err.h"
#include "kernels/ops.h"
#include "worker/model/gguf_value.h"

#include <stddef.h>
#include <stdint.h>

#define GGUF_WRITER_ALIGNMENT 32u

struct gguf_writer;

/* progress may be NULL; it is called on the owner's thread with the bytes written so far and in
 * the end. Errors: ODSI_ERR_EXISTS (path or path.part is there), ODSI_ERR_IO (the text names path
 * and cause), ODSI_ERR_NO_MEMORY. Owned: by the caller, ended with gguf_writer_close. */
ODSI_MUST_USE enum odsi_err
gguf_writer_open(struct gguf_writer **out, const char *path,
                 void (*progress)(void *context, uint64_t done, uint64_t total), void *context);
/* Before finish: leaves nothing behind. */
void gguf_writer_close(struct gguf_writer **self);

/* ---- metadata: keys are new ones ---- */
void gguf_writer_u32(struct gguf_writer *self, const char *key, uint32_t value);
void gguf_writer_f32(struct gguf_writer *self, const char *key, float value);
void gguf_writer_bool(struct gguf_writer *self, const char *key, int value);
void gguf_writer_text(struct gguf_writer *self, const char *key, const char *value);
/* A value as it was read from another file. */
void gguf_writer_copy(struct gguf_writer *self, struct gguf_text key,
                      const struct gguf_value *value);
/* An array; its count elements follow by gguf_writer_item_*. element: GGUF_TEXT, GGUF_U32, GGUF_I32
 * or GGUF_F32. */
void gguf_writer_array(struct gguf_writer *self, const char *key, enum gguf_value_type element,
                       uint64_t count);
void gguf_writer_item_text(struct gguf_writer *self, const char *text, size_t size);
/* The bits of the element. */
void gguf_writer_item_u32(struct gguf_writer *self, uint32_t bits);

/* ---- tensors ---- */
/* dims: dim_count of them, 1 to 4, fastest first; a row is a whole number of the type's blocks. */
void gguf_writer_tensor(struct gguf_writer *self, const char *name, enum tensor_type type,
                        uint32_t dim_count, const uint64_t *dims);

/* Writes all that lies before the data.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_RANGE (a header above 256 MiB), ODSI_ERR_INVALID (a tensor
 * whose size cannot be told), ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err gguf_writer_begin(struct gguf_writer *self);
/* Errors: ODSI_ERR_IO with path and cause (a full disk). */
ODSI_MUST_USE enum odsi_err gguf_writer_data(struct gguf_writer *self, const void *data,
                                             size_t size);
/* All data are there: writes the rest and renames. Errors: ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err gguf_writer_finish(struct gguf_writer *self);
#endif
