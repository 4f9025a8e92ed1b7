/* The pre-tokenizers of byte-level BPE: a text is cut into words, and merges stay inside them.
 *
 * The patterns are those that the models were trained with. They run on PCRE2 with white space
 * spelt out, so that \s means Unicode's White_Space in every version of it; which characters are
 * letters and numbers is that version's.
 * Threads: immutable after open; any thread, each with a scratch of its own. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_SPLIT_H
#define ODSI_WORKER_MODEL_TOKENIZER_SPLIT_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

struct tokenizer_split;
struct tokenizer_split_scratch;

/* pre is an enum tokenizer_pre.
 * Errors: ODSI_ERR_UNSUPPORTED (it is none that cuts), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_split_open(struct tokenizer_split **out, uint32_t pre);
void tokenizer_split_close(struct tokenizer_split **self);

/* The number of the pre-tokenizer that tokenizer.ggml.pre calls this; TOKENIZER_PRE_NONE: unknown.
 * ignore_merges and add_bos: what models of that name mean when their file does not say. */
uint32_t tokenizer_split_by_name(const char *name, size_t size, int *ignore_merges, int *add_bos);

/* What matching needs besides the patterns; for texts of at most size_max bytes.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_split_scratch_open(struct tokenizer_split_scratch **out,
                                                         size_t size_max);
void tokenizer_split_scratch_close(struct tokenizer_split_scratch **self);

/* Calls on_word for every word of text in order; they follow one another without a gap. text is
 * valid UTF-8. Time is linear in size.
 * Errors: those of on_word, which end it; ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err
tokenizer_split_words(const struct tokenizer_split *self, struct tokenizer_split_scratch *scratch,
                      const char *text, size_t size,
                      enum odsi_err (*on_word)(void *context, const char *word, size_t size),
                      void *context);
#endif
