/* From the tokenizer.ggml.* metadata of a GGUF file to the canonical bytes of tokenizer.h. */
#ifndef ODSI_WORKER_MODEL_VOCAB_H
#define ODSI_WORKER_MODEL_VOCAB_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "worker/model/gguf.h"

#include <stdint.h>

/* Appends the bytes to out and counts the tokens; tokenizer_open checks the rest.
 * Errors: ODSI_ERR_CORRUPT (something is missing or of another length), ODSI_ERR_UNSUPPORTED
 * (another kind of tokenizer, named), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err vocab_canonical(const struct gguf *gguf, struct buf *out,
                                            uint32_t *count);
#endif
