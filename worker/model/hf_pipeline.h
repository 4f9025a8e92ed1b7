/* The pipeline of a tokenizer.json: what its normalizer, pre-tokenizer and post-processor do to a
 * text, as far as the tokenizers of tokenizer.h do the same. Whatever else stands there is refused
 * by name, since a model would get ids that it was not trained with.
 * Threads: none of its own. */
#ifndef ODSI_WORKER_MODEL_HF_PIPELINE_H
#define ODSI_WORKER_MODEL_HF_PIPELINE_H
#include "common/base/err.h"
#include "worker/model/tokenizer_write.h"

#include <jansson.h>
#include <stddef.h>

/* What the post-processor puts around a text; NULL: nothing. Valid as long as the JSON. */
struct hf_pipeline_ends {
    const char *first;
    const char *last;
};

/* Reads root, the whole of tokenizer.json, into kind, pre, add_space_prefix and ignore_merges.
 * Unicode normalization to NFC is accepted and not done: no text is rewritten here, and texts that
 * are in NFC, which is nearly all there are, get the same ids.
 * Errors: ODSI_ERR_CORRUPT (no tokenizer), ODSI_ERR_UNSUPPORTED (a step that is not known). */
ODSI_MUST_USE enum odsi_err hf_pipeline_read(const json_t *root, struct tokenizer_head *head,
                                             struct hf_pipeline_ends *ends);
#endif
