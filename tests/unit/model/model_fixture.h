/* What the tests of this folder share: GGUF files built piece by piece, right or wrong; a small
 * whole model; files and folders that go away. Failing calls fail the test. */
#ifndef ODSI_TESTS_UNIT_MODEL_MODEL_FIXTURE_H
#define ODSI_TESTS_UNIT_MODEL_MODEL_FIXTURE_H
#include "common/base/buf.h"
#include "kernels/backend.h"
#include "worker/model/gguf_value.h"
#include "worker/model/synth.h"

#include <stddef.h>
#include <stdint.h>

#define FIXTURE_DEMO     "deploy/demo/odsi-tiny-q8_0.gguf"
#define FIXTURE_DEMO_F32 "deploy/demo/odsi-tiny-f32.gguf"

/* ---- pieces of GGUF: each appends to out ---- */
void fixture_text(struct buf *out, const char *text);
void fixture_head(struct buf *out, uint32_t version, uint64_t tensor_count, uint64_t key_count);
void fixture_key(struct buf *out, const char *key, uint32_t type);
void fixture_u32(struct buf *out, const char *key, uint32_t value);
void fixture_f32(struct buf *out, const char *key, float value);
void fixture_bool(struct buf *out, const char *key, int value);
void fixture_string(struct buf *out, const char *key, const char *value);
void fixture_tensor(struct buf *out, const char *name, uint32_t dim_count, const uint64_t *dims,
                    uint32_t type, uint64_t offset);
/* Zeros up to the next multiple of 32. */
void fixture_pad(struct buf *out);
/* The tokenizer.ggml.* keys of a SentencePiece vocabulary of FIXTURE_VOCABULARY tokens. */
#define FIXTURE_VOCABULARY 264u
void fixture_vocabulary(struct buf *out, uint32_t *key_count);
void fixture_zeros(struct buf *out, size_t size);

/* ---- a whole model: 2 layers, dim 32, 2 heads of 16, 1 KV head, ffn 64, 259 + 5 tokens ---- */
struct fixture_recipe {
    const char *skip_key;     /* left out */
    const char *skip_tensor;  /* left out */
    const char *extra_tensor; /* a vector of 32 more */
    const char *wide_tensor;  /* this one gets 32 columns too many */
    const char *typed_tensor; /* this one is of type tensor_type */
    uint32_t tensor_type;
    void (*more_keys)(struct buf *out, uint32_t *key_count); /* NULL: none */
    int weight_type; /* enum tensor_type of the matrices; 0 is F32 */
};
/* Appends the model file that the recipe makes. The byte at position i of the tensor data depends
 * on i, so that no two tensors are equal. */
void fixture_model(struct buf *out, const struct fixture_recipe *recipe);

/* ---- files ---- */
/* A new folder; removed with all its files by fixture_folder_remove. */
char *fixture_folder(void);
void fixture_folder_remove(char *folder);
/* folder/name in static memory of one of four buffers, in turn. */
const char *fixture_path(const char *folder, const char *name);
void fixture_write(const char *path, const struct buf *content);
void fixture_read(const char *path, struct buf *out);
/* XORs the byte at offset; keeps the file's times, as a disk that rots would. */
void fixture_flip(const char *path, uint64_t offset, uint8_t mask);

struct backend *fixture_backend(void);
/* A tiny shape for synth_write. */
extern const struct synth_shape fixture_shape;

/* Random numbers that a printed seed brings back. */
uint64_t fixture_random(uint64_t *state);
#endif
