/* config.json of a Hugging Face folder: what the model computes, as struct model_params.
 *
 * Each architecture's own code reads some of the members and ignores the others; a member that is
 * neither read here nor known to say nothing about the arithmetic is refused by name, since to
 * compute something else silently is worse than to refuse. Members that are missing have the
 * value that the architecture's configuration class gives them.
 *
 * Heads are stored as the model multiplies them, so rotation is in halves (ROPE_HALVES) for all
 * families; a GGUF file of a Llama has the rows of q and k in another order (ROPE_PAIRS) and gives
 * the same scores up to rounding.
 *
 * Threads: pure functions but for hf_config_load, which reads a file; any thread. */
#ifndef ODSI_WORKER_MODEL_HF_CONFIG_H
#define ODSI_WORKER_MODEL_HF_CONFIG_H
#include "common/base/err.h"
#include "common/base/limits.h"
#include "worker/model/model.h"

#include <stddef.h>
#include <stdint.h>

#define HF_CONFIG_SIZE_MAX        (4u << 20)
#define HF_CONFIG_ROPE_FACTOR_MAX (LIMIT_HEAD_DIM_MAX / 2u)

/* Bits, so that tables can name several. */
enum hf_family {
    HF_LLAMA = 1,   /* LlamaForCausalLM: Llama 2 and 3, SmolLM */
    HF_MISTRAL = 2, /* MistralForCausalLM */
    HF_MIXTRAL = 4, /* MixtralForCausalLM */
    HF_QWEN2 = 8,
    HF_QWEN3 = 16,
    HF_QWEN3_MOE = 32,
    HF_GEMMA2 = 64,
    HF_GEMMA3 = 128, /* Gemma3ForCausalLM, or the text part of Gemma3ForConditionalGeneration */
    HF_PHI3 = 256,
};
#define HF_FAMILIES_ALL 511u

struct hf_config {
    struct model_params params; /* all but name and weight_size */
    enum hf_family family;
    int tied;       /* the output matrix is the embedding */
    int has_vision; /* the text model is a part of one that also sees */
    /* What divides the frequencies of the rotation: rope_dim / 2 of them with
     * MODEL_ROPE_FACTORS, else none. */
    uint32_t rope_factor_count;
    float rope_factors[HF_CONFIG_ROPE_FACTOR_MAX];
};

/* Errors: ODSI_ERR_CORRUPT (not JSON, a member missing, of another type or out of limits),
 * ODSI_ERR_UNSUPPORTED (an architecture, setting, quantization or member that this build does not
 * do, by name), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err hf_config_parse(struct hf_config *out, const void *text, size_t size);
/* Reads folder/config.json. Errors: also ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_RANGE. */
ODSI_MUST_USE enum odsi_err hf_config_load(struct hf_config *out, const char *folder);
#endif
