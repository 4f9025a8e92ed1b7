/* What of a Hugging Face folder says where and what the weights are: safetensors headers,
 * config.json, and the names of tensors. An input is tried as each of them; of a header the last
 * two bytes say how many bytes of data follow it. Whatever is taken must be within the limits that
 * the rest of the program computes with.
 *
 * Run by `make fuzz`; the seeds are in tests/vectors/fuzz_safetensors. */
#include "common/base/assert.h"
#include "worker/model/hf_config.h"
#include "worker/model/hf_names.h"
#include "worker/model/safetensors.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_config(const uint8_t *data, size_t size)
{
    struct hf_config config;
    if (hf_config_parse(&config, data, size) != ODSI_OK)
        return;
    const struct model_params *p = &config.params;
    ODSI_ASSERT(p->dim >= 1 && p->dim <= LIMIT_DIM_MAX);
    ODSI_ASSERT(p->layer_count >= 1 && p->layer_count <= LIMIT_LAYERS_MAX);
    ODSI_ASSERT(p->head_count >= 1 && p->head_dim >= 2 && p->head_dim <= LIMIT_HEAD_DIM_MAX);
    ODSI_ASSERT(p->rope_dim >= 2 && p->rope_dim <= p->head_dim && p->rope_dim % 2 == 0);
    ODSI_ASSERT(p->expert_used_count <= p->expert_count);
    ODSI_ASSERT(p->rope_base >= 1.0f && p->rope_base_windowed >= 1.0f && p->rope_linear >= 1.0f);
    ODSI_ASSERT(p->window_period <= p->layer_count);
    ODSI_ASSERT(config.rope_factor_count == 0 || config.rope_factor_count == p->rope_dim / 2);
    for (uint32_t i = 0; i < config.rope_factor_count; i++)
        ODSI_ASSERT(config.rope_factors[i] >= 1.0f);
}

static void try_name(const char *name)
{
    for (uint32_t bit = 0; (HF_FAMILIES_ALL >> bit & 1u) != 0; bit++)
        for (int has_vision = 0; has_vision < 2; has_vision++) {
            const struct hf_config config = {.family = (enum hf_family)(1u << bit),
                                             .has_vision = has_vision};
            char canonical[LIMIT_TENSOR_NAME_SIZE + 1] = "";
            if (hf_names_canonical(&config, name, canonical) == HF_NAMES_TENSOR)
                ODSI_ASSERT(canonical[0] != '\0' && strlen(canonical) <= strlen(name) + 16);
        }
}

static void try_header(const uint8_t *data, size_t size)
{
    struct safetensors *file = NULL;
    uint64_t sum = 0;
    if (size < 2)
        return;
    const uint64_t data_size = (uint64_t)(data[size - 1] << 8 | data[size - 2]);
    const uint64_t data_at = SAFETENSORS_PREFIX_SIZE + size - 2;
    if (safetensors_open(&file, data, size - 2, data_at + data_size) != ODSI_OK)
        return;
    for (uint32_t i = 0; i < safetensors_count(file); i++) {
        const struct safetensors_tensor *tensor = safetensors_at(file, i);
        ODSI_ASSERT(tensor->offset >= data_at && tensor->size <= data_size &&
                    tensor->offset - data_at <= data_size - tensor->size);
        sum += tensor->size;
        try_name(tensor->name);
    }
    ODSI_ASSERT(sum == data_size);
    safetensors_close(&file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    try_config(data, size);
    try_header(data, size);
    return 0;
}
