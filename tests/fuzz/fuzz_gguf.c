/* Everything of worker/model that reads bytes it did not write: GGUF files up to weights on a
 * backend, tokenizers and manifests. An input is tried as each of them. Whatever opens is used, and
 * a tokenizer must give a text back unless it has no token for some byte of it.
 *
 * Run by `make fuzz`; the seeds are in tests/vectors/fuzz_gguf. */
#include "common/base/assert.h"
#include "common/base/buf.h"
#include "worker/model/arch.h"
#include "worker/model/gguf.h"
#include "worker/model/manifest.h"
#include "worker/model/model.h"
#include "worker/model/tokenizer.h"

#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

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

static void try_header(const struct gguf *gguf)
{
    size_t sum = 0;
    gguf_visit_metadata(gguf, count_key, &sum);
    for (uint64_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        const volatile uint8_t *bytes = tensor->data;
        (void)bytes[0];
        (void)bytes[tensor->size - 1];
    }
}

static void try_weights(const struct model *model)
{
    const struct backend_config config = {.name = "scalar", .thread_count = 1};
    const struct model_params *params = model_params_view(model);
    struct backend *backend = NULL;
    struct model_span *span = NULL;
    enum odsi_err err = backend_open(&backend, &config);
    ODSI_ASSERT(err == ODSI_OK);
    err = model_span_open(&span, model, backend, 0, params->layer_count,
                          params->context_length < 16 ? params->context_length : 16, NULL, NULL);
    ODSI_ASSERT(err == ODSI_OK || err == ODSI_ERR_CORRUPT || err == ODSI_ERR_NO_MEMORY);
    model_span_close(&span);
    backend_close(&backend);
}

/* As a file, and as the only one of its model. */
static void try_model(const uint8_t *data, size_t size)
{
    struct model *model = NULL;
    char path[64];
    const int fd = memfd_create("fuzz", MFD_CLOEXEC);
    ODSI_ASSERT(fd >= 0);
    const ssize_t written = write(fd, data, size);
    ODSI_ASSERT(written == (ssize_t)size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (model_open(&model, path, NULL, NULL, NULL) == ODSI_OK) {
        const uint8_t *bytes;
        size_t bytes_size;
        struct model_params params;
        struct digest digest;
        model_tokenizer_view(model, &bytes, &bytes_size);
        try_tokenizer(bytes, bytes_size);
        model_manifest_view(model, &bytes, &bytes_size);
        const enum odsi_err err = manifest_read(bytes, bytes_size, &params, &digest);
        ODSI_ASSERT(err == ODSI_OK);
        try_weights(model);
    }
    model_close(&model);
    close(fd);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct gguf *gguf = NULL;
    struct model_params params;
    struct digest digest;
    if (gguf_open_memory(&gguf, data, size) == ODSI_OK)
        try_header(gguf);
    gguf_close(&gguf);
    try_model(data, size);
    try_tokenizer(data, size);
    if (manifest_read(data, size, &params, &digest) == ODSI_OK)
        ODSI_ASSERT(arch_check(&params) == ODSI_OK);
    return 0;
}
