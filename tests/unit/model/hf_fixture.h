/* Tiny Hugging Face folders of every family, right or wrong in one way. Failing calls fail the
 * test. */
#ifndef ODSI_TESTS_UNIT_MODEL_HF_FIXTURE_H
#define ODSI_TESTS_UNIT_MODEL_HF_FIXTURE_H
#include "common/base/buf.h"

#include <stddef.h>
#include <stdint.h>

#define HF_FIXTURE_VOCAB       264u
#define HF_FIXTURE_DIM         32u
#define HF_FIXTURE_LAYERS      4u
#define HF_FIXTURE_HEADS       4u
#define HF_FIXTURE_KV_HEADS    2u
#define HF_FIXTURE_HEAD_DIM    16u
#define HF_FIXTURE_FFN         64u
#define HF_FIXTURE_EXPERTS     4u
#define HF_FIXTURE_CONTEXT     128u
#define HF_FIXTURE_TENSORS_MAX 128u

enum hf_fixture_dtype { HF_FIXTURE_F32 = 0, HF_FIXTURE_F16, HF_FIXTURE_BF16 };

/* What a family's model says of itself; NULL architecture behind the last one. */
struct hf_fixture_family {
    const char *architecture;
    const char *config; /* members, behind those of all families */
    int is_gemma;
    int has_qk_norm;
    int has_bias;
    int is_fused;        /* Phi-3's qkv_proj and gate_up_proj */
    const char *experts; /* where they are: "mlp" or "block_sparse_moe"; NULL: dense */
    int has_output;      /* lm_head.weight; else tied */
    int permutes;        /* a GGUF file has the rows of q and k in another order */
    int in_vision;       /* part of a model that sees */
};
extern const struct hf_fixture_family hf_fixture_families[];

/* One tensor, the same number in every dtype. */
struct hf_fixture_tensor {
    char name[128];
    char canonical[96];
    uint32_t rows; /* 0: a vector */
    uint32_t cols;
    uint64_t seed;
    float base; /* that the numbers are around */
};
/* All of a family. Returns how many. */
uint32_t hf_fixture_tensors(const struct hf_fixture_family *family, struct hf_fixture_tensor *out);
/* The number at row-major place i: exact in binary16 and bfloat16. */
float hf_fixture_value(const struct hf_fixture_tensor *tensor, uint64_t i);

struct hf_fixture_recipe {
    enum hf_fixture_dtype dtype;
    uint32_t part_count;      /* 0: model.safetensors alone; else with an index */
    const char *skip_tensor;  /* left out of the files, by its name there */
    const char *unlisted;     /* left out of the index */
    const char *extra_tensor; /* a vector of HF_FIXTURE_DIM more */
    const char *extra_dtype;  /* "F32" unless set */
    const char *config;       /* members besides the family's */
    const char *part_name;    /* in the index, instead of the last part's */
};
/* Writes config.json, tokenizer.json and the weights into folder, which exists. */
void hf_fixture_write(const char *folder, const struct hf_fixture_family *family,
                      const struct hf_fixture_recipe *recipe);
/* config.json alone. */
void hf_fixture_config(struct buf *out, const struct hf_fixture_family *family, const char *more);
/* A byte-level vocabulary of 256 tokens and a few more. */
void hf_fixture_tokenizer(struct buf *out);
#endif
