/* A GGUF file (version 2 or 3), read through mmap: the key-value metadata and where each tensor
 * lies. Knows nothing about architectures.
 *
 * Every length, count, type and offset is checked against the file before it is used; nothing is
 * allocated for a count that the rest of the file could not hold; keys and tensor names are
 * unique, tensors do not overlap. Tensor data are not touched.
 * Integers: a value of any integer type is accepted where it fits; f64 where f32 is asked for.
 * Threads: open and close by one owner; reading from any thread. */
#ifndef ODSI_WORKER_MODEL_GGUF_H
#define ODSI_WORKER_MODEL_GGUF_H
#include "common/base/err.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

struct gguf;
struct gguf_value;

#define GGUF_KEYS_MAX 65536u

/* Bytes inside the mapped file; not NUL-terminated. Keys and tensor names are printable ASCII
 * without spaces, so they may be printed as they are; values may hold anything. */
struct gguf_text {
    const char *data;
    size_t size;
};

int gguf_text_is(struct gguf_text text, const char *wanted);

/* An array value. type is the GGUF element type; strings are walked with gguf_array_text. */
struct gguf_array {
    uint32_t type;
    uint64_t count;
    const uint8_t *data;
    size_t size; /* bytes of data */
};

struct gguf_tensor {
    struct gguf_text name;
    uint32_t ggml_type; /* as in the file; check against enum tensor_type before use */
    uint32_t dim_count;
    uint64_t dims[4];    /* fastest first, as in the file; unused ones are 1 */
    const uint8_t *data; /* in the mapping */
    uint64_t offset;     /* of data from the start of the file */
    uint64_t size;       /* bytes */
};

/* Errors: ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_CORRUPT (not a GGUF file, truncated, a count
 * or offset that lies), ODSI_ERR_UNSUPPORTED (version, tensor type). The text names path and field.
 * Owned: by the caller, ended with gguf_close. */
ODSI_MUST_USE enum odsi_err gguf_open(struct gguf **out, const char *path);
/* The same over bytes in memory, which must outlive the object; for tests and the fuzzer. */
ODSI_MUST_USE enum odsi_err gguf_open_memory(struct gguf **out, const uint8_t *data, size_t size);
void gguf_close(struct gguf **self);

/* Copies size bytes from offset of the file by read(2), not through the mapping: hashing a file
 * this way leaves no pages behind in the process, and a file that shrinks meanwhile is an error
 * instead of a signal. Errors: ODSI_ERR_CORRUPT (it ends before that), ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err gguf_read(const struct gguf *self, uint64_t offset, void *out,
                                      size_t size);
/* The open file, for fstat(2) and advice; stays the object's. -1 for bytes in memory. */
int gguf_fd(const struct gguf *self);

/* Metadata by key. Errors: ODSI_ERR_NOT_FOUND (no such key), ODSI_ERR_CORRUPT (another type). */
ODSI_MUST_USE enum odsi_err gguf_get_u32(const struct gguf *self, const char *key, uint32_t *out);
ODSI_MUST_USE enum odsi_err gguf_get_f32(const struct gguf *self, const char *key, float *out);
ODSI_MUST_USE enum odsi_err gguf_get_bool(const struct gguf *self, const char *key, int *out);
ODSI_MUST_USE enum odsi_err gguf_get_text(const struct gguf *self, const char *key,
                                          struct gguf_text *out);
ODSI_MUST_USE enum odsi_err gguf_get_array(const struct gguf *self, const char *key,
                                           struct gguf_array *out);
/* The next string of a string array; *cursor starts at 0 and moves on. Returns 0 at the end. */
int gguf_array_text(const struct gguf_array *array, size_t *cursor, struct gguf_text *out);

uint64_t gguf_tensor_count(const struct gguf *self);
const struct gguf_tensor *gguf_tensor_at(const struct gguf *self, uint64_t index);
/* The same tensors in ascending byte order of their names. */
const struct gguf_tensor *gguf_tensor_by_name_at(const struct gguf *self, uint64_t index);
/* NULL when there is none of that name. */
const struct gguf_tensor *gguf_tensor_find(const struct gguf *self, const char *name);
/* Bytes of a tensor of these dimensions; returns 0 when the type is unknown, a row is no whole
 * number of its blocks, or the size passes 2^64. */
int gguf_tensor_size(uint32_t ggml_type, const uint64_t dims[4], uint64_t *out);
/* "q8_0"; "unknown type" for a number that this build has no name for. */
const char *gguf_type_name(uint32_t ggml_type);

/* The key at index in file order; NULL data behind the last one. */
struct gguf_text gguf_key_at(const struct gguf *self, uint64_t index);
/* Its value, as worker/model/gguf_value.h reads it; returns 0 behind the last one. */
int gguf_key_value(const struct gguf *self, uint64_t index, struct gguf_value *out);

/* For `odsi model inspect`: calls visit for every key in file order with its value as text (long
 * texts and arrays shortened, control characters escaped). */
void gguf_visit_metadata(const struct gguf *self,
                         void (*visit)(void *context, struct gguf_text key, const char *value),
                         void *context);
#endif
