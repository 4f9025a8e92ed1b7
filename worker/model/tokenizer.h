/* Text to token ids and back, from the tokenizer that the model file carries.
 *
 * SentencePiece BPE ("llama" in GGUF) with byte fallback: decode(encode(text)) is text, byte for
 * byte, whatever the bytes. Built from canonical bytes so that a gateway without the model file
 * can have it from a worker and check it:
 *   8 "ODSITOK1", 4 kind (1 = SPM), 4 bos id, 4 eos id, 4 unknown id (u32; 0xffffffff: none),
 *   1 add_bos, 1 add_eos, 1 add_space_prefix, 1 zero, 4 count, then per token:
 *   4 score (f32 bits), 1 type (GGUF token_type), 2+n piece (u16 length, bytes)
 *
 * Threads: immutable after open; any thread. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_H
#define ODSI_WORKER_MODEL_TOKENIZER_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

#define TOKENIZER_NONE               UINT32_MAX
#define TOKENIZER_PIECE_SIZE_MAX     65535u
#define TOKENIZER_CANONICAL_SIZE_MAX (32u << 20) /* of the canonical bytes */
#define TOKENIZER_TEXT_SIZE_MAX      (16u << 20) /* of one text to encode */

struct tokenizer;

/* Errors: ODSI_ERR_CORRUPT (with what and where), ODSI_ERR_UNSUPPORTED (kind), ODSI_ERR_NO_MEMORY.
 * data may be freed afterwards. */
ODSI_MUST_USE enum odsi_err tokenizer_open(struct tokenizer **out, const uint8_t *data,
                                           size_t size);
void tokenizer_close(struct tokenizer **self);

uint32_t tokenizer_vocab_size(const struct tokenizer *self);
uint32_t tokenizer_eos(const struct tokenizer *self);
uint32_t tokenizer_bos(const struct tokenizer *self);
/* Whether a generated id ends the answer (eos and its kin). */
int tokenizer_is_end(const struct tokenizer *self, uint32_t id);

/* Ids of text, with the model's bos in front when the model wants it. *count is capacity on
 * entry and the number written on return. Time is at most n log n in size.
 * Errors: ODSI_ERR_RANGE (more than *count tokens; *count then holds how many there are),
 * ODSI_ERR_INVALID (longer than TOKENIZER_TEXT_SIZE_MAX), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_encode(const struct tokenizer *self, const char *text,
                                             size_t size, uint32_t *tokens, uint32_t *count);

/* The bytes that id adds to a text: a control token adds none; the space that add_space_prefix
 * put in front of a prompt is the caller's to drop (tokenizer_decode does). Writes at most
 * TOKENIZER_PIECE_SIZE_MAX bytes and returns how many; 0 for an id outside the vocabulary. */
size_t tokenizer_piece(const struct tokenizer *self, uint32_t id, char *out);

/* The text of a whole sequence: bos, eos and the prefix space dropped. *size is capacity on entry
 * and the length on return. Errors: ODSI_ERR_RANGE (*size then holds the length). */
ODSI_MUST_USE enum odsi_err tokenizer_decode(const struct tokenizer *self, const uint32_t *tokens,
                                             uint32_t count, char *out, size_t *size);

/* Streaming: how many of the size bytes at text are whole UTF-8 characters, so that a stream never
 * splits one. Bytes that can never become valid UTF-8 count as whole. */
size_t tokenizer_utf8_whole(const char *text, size_t size);
#endif
