#include "worker/model/synth_shape.h"

#include <string.h>

/* Tiny shapes: rows of 256 columns or a multiple, so that K types fit (llama-tiny's 704 are there
 * to show what happens when they do not), windows and caps that a short text reaches. */
static const struct synth_shape shapes[] = {
    {"llama-tiny", 256, 4, 8, 4, 32, 704, 2048, 1024, 1e-5f, 1e4f},
    {"llama-160m", 768, 12, 12, 12, 64, 3072, 32000, 2048, 1e-6f, 1e4f},
    {"llama-1.1b", 2048, 22, 32, 4, 64, 5632, 32000, 2048, 1e-5f, 1e4f},
    {"llama-1.1b-32k", 2048, 22, 32, 4, 64, 5632, 32000, 32768, 1e-5f, 1e4f},
    {"llama-7b", 4096, 32, 32, 8, 128, 14336, 32000, 4096, 1e-5f, 1e4f},
    {"mistral-tiny", 256, 3, 8, 2, 32, 512, 1024, 1024, 1e-5f, 1e4f,
     .vocabulary = SYNTH_VOCABULARY_MISTRAL, .window = 48},
    {"llama3-tiny", 256, 3, 8, 2, 32, 512, 1280, 1024, 1e-5f, 5e5f,
     .vocabulary = SYNTH_VOCABULARY_LLAMA3, .rope_factor = 8.0f},
    {"qwen2-tiny", 256, 3, 8, 2, 32, 512, 1280, 1024, 1e-6f, 1e6f, .family = SYNTH_QWEN2,
     .vocabulary = SYNTH_VOCABULARY_QWEN, .is_tied = 1},
    {"qwen3-tiny", 256, 3, 4, 2, 128, 512, 1280, 1024, 1e-6f, 1e6f, .family = SYNTH_QWEN3,
     .vocabulary = SYNTH_VOCABULARY_QWEN, .is_tied = 1},
    {"qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151936, 40960, 1e-6f, 1e6f, .family = SYNTH_QWEN3,
     .vocabulary = SYNTH_VOCABULARY_QWEN, .is_tied = 1},
    {"qwen3moe-tiny", 256, 2, 8, 2, 32, 256, 1280, 1024, 1e-6f, 1e6f, .family = SYNTH_QWEN3,
     .vocabulary = SYNTH_VOCABULARY_QWEN, .expert_count = 8, .expert_used_count = 3},
    {"qwen3moe-1b", 1024, 16, 16, 4, 64, 512, 151936, 40960, 1e-6f, 1e6f, .family = SYNTH_QWEN3,
     .vocabulary = SYNTH_VOCABULARY_QWEN, .expert_count = 32, .expert_used_count = 4, .is_tied = 1},
    {"mixtral-tiny", 256, 2, 8, 4, 32, 256, 1024, 1024, 1e-5f, 1e6f, .expert_count = 4,
     .expert_used_count = 2},
    {"gemma2-tiny", 256, 4, 4, 2, 64, 512, 1024, 1024, 1e-6f, 1e4f, .family = SYNTH_GEMMA2,
     .vocabulary = SYNTH_VOCABULARY_GEMMA, .window = 24, .is_tied = 1, .attention_softcap = 4.0f,
     .logit_softcap = 12.0f},
    {"gemma3-tiny", 256, 7, 4, 1, 64, 256, 1024, 1024, 1e-6f, 1e6f, .family = SYNTH_GEMMA3,
     .vocabulary = SYNTH_VOCABULARY_GEMMA, .window = 24, .is_tied = 1, .rope_linear = 8.0f},
    {"gemma3-1b", 1152, 26, 4, 1, 256, 6912, 262144, 32768, 1e-6f, 1e6f, .family = SYNTH_GEMMA3,
     .vocabulary = SYNTH_VOCABULARY_GEMMA, .window = 512, .is_tied = 1},
    {"phi3-tiny", 256, 3, 8, 8, 32, 512, 1024, 1024, 1e-5f, 1e4f, .family = SYNTH_PHI3,
     .vocabulary = SYNTH_VOCABULARY_PHI3, .window = 47},
    {"phi3-long-tiny", 256, 3, 8, 8, 32, 512, 1024, 2048, 1e-5f, 1e4f, .family = SYNTH_PHI3,
     .vocabulary = SYNTH_VOCABULARY_PHI3, .rope_factor = 16.0f, .rope_original_length = 64},
    {NULL},
};

const struct synth_shape *synth_shapes(void)
{
    return shapes;
}

const struct synth_shape *synth_shape_find(const char *name)
{
    for (const struct synth_shape *shape = shapes; shape->name; shape++)
        if (strcmp(shape->name, name) == 0)
            return shape;
    return NULL;
}
