/* From the tokenizer.ggml.* metadata of a GGUF file to the canonical bytes of tokenizer.h: models
 * "llama" (SentencePiece BPE with scores) and "gpt2" (byte-level BPE with merges and one of the
 * pre-tokenizers of tokenizer_split.h), with the defaults that llama.cpp has for missing keys.
 * An end of a turn such as <|im_end|> that is typed as a normal piece becomes a control token. */
#ifndef ODSI_WORKER_MODEL_VOCAB_H
#define ODSI_WORKER_MODEL_VOCAB_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "worker/model/gguf.h"

#include <stdint.h>

/* Appends the bytes to out and counts the tokens; tokenizer_open checks the rest.
 * Errors: ODSI_ERR_CORRUPT (something is missing or of another length), ODSI_ERR_UNSUPPORTED
 * (another kind of tokenizer or
 * pre-tokenizer, named, or one that rewrites texts), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err vocab_canonical(const struct gguf *gguf, struct buf *out,
                                            uint32_t *count);
#endif
