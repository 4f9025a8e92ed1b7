/* Writing the canonical bytes of tokenizer.h: what the readers of GGUF and of Hugging Face folders
 * share. The parts are written in the order of the functions here; struct buf keeps an error until
 * the end. tokenizer_open checks what was written.
 * Threads: none of its own. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_WRITE_H
#define ODSI_WORKER_MODEL_TOKENIZER_WRITE_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "worker/model/tokenizer.h"

#include <stddef.h>
#include <stdint.h>

struct tokenizer_head {
    uint32_t kind; /* enum tokenizer_kind */
    uint32_t pre;  /* enum tokenizer_pre */
    uint32_t bos, eos, unknown;
    uint8_t add_bos, add_eos, add_space_prefix, ignore_merges;
    uint32_t end_count;
    uint32_t ends[TOKENIZER_ENDS_MAX]; /* ascending; see tokenizer_write_add_end */
};

/* Whether a control or user-defined token of this name ends an answer in the families that have
 * it: chat models have several such tokens besides their eos. */
int tokenizer_write_is_end_name(const char *piece, size_t size);
/* Puts id among the ends; TOKENIZER_NONE is nothing to add.
 * Errors: ODSI_ERR_UNSUPPORTED (more than TOKENIZER_ENDS_MAX). */
ODSI_MUST_USE enum odsi_err tokenizer_write_add_end(struct tokenizer_head *head, uint32_t id);

/* token_count tokens follow. */
void tokenizer_write_head(struct buf *out, const struct tokenizer_head *head, uint32_t token_count);
/* type: with the strip bits. Errors: ODSI_ERR_CORRUPT (a piece of more than
 * TOKENIZER_PIECE_SIZE_MAX bytes), or the buffer's. */
ODSI_MUST_USE enum odsi_err tokenizer_write_token(struct buf *out, float score, uint8_t type,
                                                  const char *piece, size_t size);
/* merge_count calls of tokenizer_write_merge follow. */
void tokenizer_write_merge_count(struct buf *out, uint32_t merge_count);
void tokenizer_write_merge(struct buf *out, uint32_t left, uint32_t right);
/* The end. Errors: ODSI_ERR_UNSUPPORTED (more than TOKENIZER_TEMPLATE_SIZE_MAX bytes, or all of it
 * more than out takes), ODSI_ERR_NO_MEMORY; also those that out has met before. */
ODSI_MUST_USE enum odsi_err tokenizer_write_template(struct buf *out, const char *text,
                                                     size_t size);

/* Byte-level BPE writes its pieces in an alphabet where every byte is a printable character, the
 * same ones in all models (GPT-2's). Puts the bytes of piece into out, which has room for size
 * bytes, and their number into *out_size; returns 0 when a character is none of that alphabet. */
int tokenizer_write_undo_alphabet(char *out, size_t *out_size, const char *piece, size_t size);
#endif
