/* From the tokenizer files of a Hugging Face folder to the canonical bytes of tokenizer.h:
 * tokenizer.json, and where they are there tokenizer_config.json, special_tokens_map.json,
 * generation_config.json, config.json (ids of bos and eos) and chat_template.jinja.
 *
 * Added tokens that are marked special, or whose name says that they are (<|...|>, <pad>,
 * <unused7>), are control tokens; the others are user-defined. A run of U+2581 among them stays a
 * normal piece, since in the text that Hugging Face's tokenizers look at it is no run of spaces. */
#ifndef ODSI_WORKER_MODEL_HF_TOKENIZER_H
#define ODSI_WORKER_MODEL_HF_TOKENIZER_H
#include "common/base/buf.h"
#include "common/base/err.h"

#include <stdint.h>

#define HF_TOKENIZER_FILE_SIZE_MAX   (64u << 20) /* of tokenizer.json */
#define HF_TOKENIZER_CONFIG_SIZE_MAX (4u << 20)  /* of each other file */

/* Appends the bytes to out and counts the tokens; tokenizer_open checks the rest. row_count: of the
 * model's embedding; unused tokens fill up to it, and added tokens behind it are left out. 0: as
 * many as there are tokens.
 * Errors: ODSI_ERR_NOT_FOUND (no tokenizer.json), ODSI_ERR_IO, ODSI_ERR_CORRUPT, ODSI_ERR_RANGE (a
 * file is too large), ODSI_ERR_UNSUPPORTED (a tokenizer that this build does not do, by name),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err hf_tokenizer_canonical(const char *folder, uint32_t row_count,
                                                   struct buf *out, uint32_t *count);
#endif
