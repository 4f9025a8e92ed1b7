/* Tokenizers for tests: the small vocabularies of tests/vectors/tokenizers, as they are or changed,
 * and canonical bytes put together by hand. Failing calls fail the test. */
#ifndef ODSI_TESTS_UNIT_MODEL_TOKENIZER_FIXTURE_H
#define ODSI_TESTS_UNIT_MODEL_TOKENIZER_FIXTURE_H
#include "common/base/buf.h"
#include "worker/model/tokenizer.h"

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

#define TOKENIZER_VECTORS "tests/vectors/tokenizers"

/* A file of that folder, "cases.json". */
json_t *tokenizer_vector(const char *name);
/* The tokenizer.json of a pipeline of cases.json, by its name; a new reference. */
json_t *tokenizer_pipeline(const char *name);

/* Writes json as folder/name. */
void tokenizer_write_json(const char *folder, const char *name, const json_t *json);
/* The canonical bytes of json as the tokenizer.json of a folder; buf_free ends them. */
void tokenizer_canonical(struct buf *out, const json_t *json);
struct tokenizer *tokenizer_of_bytes(const struct buf *bytes);
/* The tokenizer of a pipeline. */
struct tokenizer *tokenizer_of_pipeline(const char *name);

/* A GGUF file without tensors that says the same as json: kind "gpt2", or "llama" with scores in
 * the order of the pieces. pre: tokenizer.ggml.pre; NULL: no such key. more: keys, as
 * fixture_recipe. */
void tokenizer_gguf(struct buf *out, const json_t *json, const char *pre,
                    void (*more)(struct buf *out, uint32_t *key_count));

void tokenizer_expect_ids(const struct tokenizer *tokenizer, const char *text, size_t size,
                          unsigned flags, const uint32_t *wanted, uint32_t count);
/* decode(encode(text)) is text, with and without TOKENIZER_SPECIAL as flags say. */
void tokenizer_expect_back(const struct tokenizer *tokenizer, const char *text, size_t size,
                           unsigned flags, uint64_t seed);
#endif
