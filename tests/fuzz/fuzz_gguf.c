/* Everything of worker/model that reads bytes it did not write: GGUF headers, the description of a
 * model in them, tokenizers and manifests. An input is tried as each of them. Whatever opens is
 * used, and a tokenizer must give a text back unless it has no token for some byte of it.
 *
 * Run by `make fuzz`; the seeds are in tests/vectors/fuzz_gguf. */
#include "common/base/assert.h"
#include "common/base/buf.h"
#include "worker/model/arch.h"
#include "worker/model/gguf.h"
#include "worker/model/manifest.h"
#include "worker/model/tokenizer.h"
#include "worker/model/vocab.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char sample[] = "Once  upon a time, \xe2\x96\x81 Zo\xc3\xab <s>\n\xff\x00 said";

static void try_tokenizer(const uint8_t *data, size_t size)
{
    struct tokenizer *tokenizer = NULL;
    uint32_t ids[256];
    char text[4096];
    uint32_t count = 256;
    size_t text_size = sizeof text;
    if (tokenizer_open(&tokenizer, data, size) != ODSI_OK)
        return;
    enum odsi_err err =
        tokenizer_encode(tokenizer, sample, sizeof sample - 1, TOKENIZER_BOS, ids, &count);
    ODSI_ASSERT(err == ODSI_OK);
    err = tokenizer_decode(tokenizer, ids, count, text, &text_size);
    ODSI_ASSERT(err == ODSI_OK);
    if (!memmem(text, text_size, "\xef\xbf\xbd", 3)) /* what an unknown token shows as */
        ODSI_ASSERT(text_size == sizeof sample - 1 && memcmp(text, sample, text_size) == 0);
    ODSI_ASSERT(tokenizer_utf8_whole(text, text_size) <= text_size);
    tokenizer_close(&tokenizer);
}

static void count_key(void *context, struct gguf_text key, const char *value)
{
    size_t *sum = context;
    *sum += key.size + strlen(value);
}

static void try_model(const struct gguf *gguf)
{
    struct model_params params = {.dim = 0};
    struct buf canonical;
    size_t sum = 0;
    gguf_visit_metadata(gguf, count_key, &sum);
    for (uint64_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        const volatile uint8_t *bytes = tensor->data;
        (void)bytes[0];
        (void)bytes[tensor->size - 1];
    }
    buf_init(&canonical, TOKENIZER_CANONICAL_SIZE_MAX);
    enum odsi_err err = vocab_canonical(gguf, &canonical, &params.vocab_size);
    if (err == ODSI_OK)
        try_tokenizer(canonical.data, canonical.size);
    if (err == ODSI_OK)
        err = arch_read(gguf, &params);
    if (err == ODSI_OK)
        err = arch_check(&params);
    if (err == ODSI_OK)
        err = arch_check_tensors(gguf, &params);
    (void)err;
    buf_free(&canonical);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *gguf = NULL;
    struct model_params params;
    struct digest digest;
    if (gguf_open_memory(&gguf, data, size) == ODSI_OK)
        try_model(gguf);
    gguf_close(&gguf);
    try_tokenizer(data, size);
    if (manifest_read(data, size, &params, &digest) == ODSI_OK)
        ODSI_ASSERT(arch_check(&params) == ODSI_OK);
    return 0;
}
