/* GGUF metadata values: taking one off the bytes of a file, reading it as a number, showing it.
 * The part of the format below gguf.h. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_GGUF_VALUE_H
#define ODSI_WORKER_MODEL_GGUF_VALUE_H
#include "common/base/err.h"
#include "worker/model/gguf.h"
#include "worker/model/reader.h"

#include <stddef.h>
#include <stdint.h>

/* Numbers are those of the GGUF specification. */
enum gguf_value_type {
    GGUF_U8 = 0,
    GGUF_I8 = 1,
    GGUF_U16 = 2,
    GGUF_I16 = 3,
    GGUF_U32 = 4,
    GGUF_I32 = 5,
    GGUF_F32 = 6,
    GGUF_BOOL = 7,
    GGUF_TEXT = 8,
    GGUF_ARRAY = 9,
    GGUF_U64 = 10,
    GGUF_I64 = 11,
    GGUF_F64 = 12,
};

/* A length and its bytes; returns 0, and nothing moves, when the file ends before. */
int gguf_value_take_text(struct reader *cursor, struct gguf_text *out);

struct gguf_value {
    uint32_t type;
    uint32_t element_type; /* of an array */
    uint64_t count;        /* of an array */
    const uint8_t *data;   /* of a text: its bytes; of an array: its first element */
    size_t size;           /* bytes of data */
};

/* A type and a value of it, checked to its last byte.
 * Errors: ODSI_ERR_CORRUPT, ODSI_ERR_UNSUPPORTED (arrays of arrays). */
ODSI_MUST_USE enum odsi_err gguf_value_take(struct reader *cursor, struct gguf_value *out);
/* These return 0 when the value is of another kind or does not fit. */
int gguf_value_u32(const struct gguf_value *self, uint32_t *out);
int gguf_value_f32(const struct gguf_value *self, float *out);

const char *gguf_value_type_name(uint32_t type);

#define GGUF_VALUE_TEXT_SIZE 1024u
/* The value for a human, on one line: long texts and arrays shortened, control bytes escaped. */
void gguf_value_show(const struct gguf_value *self, char out[GGUF_VALUE_TEXT_SIZE]);
#endif
