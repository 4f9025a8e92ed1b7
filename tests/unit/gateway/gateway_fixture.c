#include "tests/unit/gateway/gateway_fixture.h"

#include "common/crypto/digest.h"

#include "worker/model/manifest.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN = 2, TYPE_CONTROL = 3, TYPE_BYTE = 6 };

static void add_token(struct buf *out, const char *piece, size_t size, uint8_t type)
{
    buf_append_u32(out, 0); /* score 0.0 */
    buf_append_u8(out, type);
    buf_append_u8(out, (uint8_t)size);
    buf_append_u8(out, (uint8_t)(size >> 8));
    buf_append(out, piece, size);
}

void fixture_tokenizer_bytes(struct buf *out)
{
    char piece[512];
    buf_append(out, "ODSITOK2", 8);
    buf_append_u32(out, TOKENIZER_SPM);
    buf_append_u32(out, TOKENIZER_PRE_NONE);
    buf_append_u32(out, FIXTURE_BOS);
    buf_append_u32(out, FIXTURE_EOS);
    buf_append_u32(out, 0);
    buf_append(out, "\1\0\1\0", 4); /* bos in front, no eos behind, a space in front */
    buf_append_u32(out, 0);         /* no ends but the eos */
    buf_append_u32(out, FIXTURE_VOCAB);
    add_token(out, "<unk>", 5, TYPE_UNKNOWN);
    add_token(out, "<s>", 3, TYPE_CONTROL);
    add_token(out, "</s>", 4, TYPE_CONTROL);
    for (unsigned byte = 0; byte < 256; byte++) {
        const int size = snprintf(piece, sizeof piece, "<0x%02X>", byte);
        add_token(out, piece, (size_t)size, TYPE_BYTE);
    }
    add_token(out, "\xE2\x96\x81hello", 8, TYPE_NORMAL);
    add_token(out, "\xE2\x96\x81world", 8, TYPE_NORMAL);
    add_token(out, "ST", 2, TYPE_NORMAL);
    add_token(out, "OP", 2, TYPE_NORMAL);
    add_token(out, "\xE2\x82\xAC", 3, TYPE_NORMAL);
    memset(piece, 'x', 300);
    add_token(out, piece, 300, TYPE_NORMAL);
    buf_append_u32(out, 0); /* no merges */
    buf_append_u32(out, sizeof FIXTURE_TEMPLATE - 1);
    buf_append(out, FIXTURE_TEMPLATE, sizeof FIXTURE_TEMPLATE - 1);
    cr_assert_eq(buf_status(out), ODSI_OK);
}

struct tokenizer *fixture_tokenizer(void)
{
    struct buf bytes;
    struct tokenizer *tokenizer = NULL;
    buf_init(&bytes, 1u << 16);
    fixture_tokenizer_bytes(&bytes);
    cr_assert_eq(tokenizer_open(&tokenizer, bytes.data, bytes.size), ODSI_OK, "%s",
                 odsi_err_text());
    buf_free(&bytes);
    return tokenizer;
}

void fixture_model(struct buf *manifest, struct buf *tokenizer, uint32_t seed, uint32_t vocab_size)
{
    const struct model_params params = {.arch = MODEL_ARCH_LLAMA,
                                        .dim = 64,
                                        .layer_count = 2,
                                        .head_count = 2,
                                        .kv_head_count = 2,
                                        .head_dim = 32,
                                        .ffn_dim = 64,
                                        .vocab_size = vocab_size,
                                        .context_length = 128 + seed,
                                        .act = ACT_SILU,
                                        .rope_style = ROPE_PAIRS,
                                        .rope_dim = 32,
                                        .rms_eps = 1e-5f,
                                        .rope_base = 1e4f,
                                        .rope_base_windowed = 1e4f,
                                        .rope_linear = 1.0f,
                                        .rope_amplitude = 1.0f,
                                        .embed_scale = 1.0f,
                                        .attention_scale = 0.176776692f};
    struct digest tokenizer_id;
    buf_init(tokenizer, 1u << 16);
    fixture_tokenizer_bytes(tokenizer);
    digest_of(&tokenizer_id, tokenizer->data, tokenizer->size);
    buf_init(manifest, 1u << 16);
    manifest_write(manifest, &params, "tiny", &tokenizer_id, NULL, NULL, 0);
    cr_assert_eq(buf_status(manifest), ODSI_OK);
}

uint32_t fixture_random_next(void *context)
{
    struct fixture_random *self = context;
    self->state ^= self->state << 13;
    self->state ^= self->state >> 7;
    self->state ^= self->state << 17;
    return (uint32_t)(self->state >> 32);
}

uint32_t fixture_random_below(struct fixture_random *self, uint32_t limit)
{
    return fixture_random_next(self) % limit;
}

void fixture_folder_make(char out[256])
{
    const char *base = getenv("TMPDIR");
    snprintf(out, 256, "%s/odsi-gateway-XXXXXX", base ? base : "/tmp");
    cr_assert_not_null(mkdtemp(out));
}

void fixture_folder_remove(const char *folder)
{
    DIR *entries = opendir(folder);
    cr_assert_not_null(entries);
    const struct dirent *entry;
    while ((entry = readdir(entries))) {
        char path[1024];
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (entry->d_name[0] != '.')
            unlink(path);
    }
    closedir(entries);
    cr_expect_eq(rmdir(folder), 0);
}

void fixture_path(char out[512], const char *folder, const char *name)
{
    snprintf(out, 512, "%s/%s", folder, name);
}
