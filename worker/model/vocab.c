#include "worker/model/vocab.h"

#include "common/base/limits.h"
#include "worker/model/gguf_value.h"
#include "worker/model/tokenizer.h"

#include <inttypes.h>

#define KEY(name) "tokenizer.ggml." name

/* What the arrays of the vocabulary hold; all have one element per token. */
struct arrays {
    struct gguf_array pieces;
    struct gguf_array scores;
    struct gguf_array types;
};

static enum odsi_err required(enum odsi_err err)
{
    return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err; /* the sentence names the key */
}

/* Kinds of tokenizers other than SentencePiece BPE, and rewriting of texts before it. */
static enum odsi_err check_kind(const struct gguf *gguf)
{
    struct gguf_text kind;
    enum odsi_err err = required(gguf_get_text(gguf, KEY("model"), &kind));
    if (err != ODSI_OK)
        return err;
    if (!gguf_text_is(kind, "llama"))
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the tokenizer kind " KEY("model") " is not supported: only \"llama\" "
                                                            "(SentencePiece BPE) is");
    int rewrites = 0;
    err = gguf_get_bool(gguf, KEY("remove_extra_whitespaces"), &rewrites);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    struct gguf_array map = {.count = 0};
    err = gguf_get_array(gguf, KEY("precompiled_charsmap"), &map);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    if (rewrites || map.count > 0)
        return odsi_fail(
            ODSI_ERR_UNSUPPORTED,
            "the tokenizer rewrites texts before it encodes them (" KEY(
                "remove_extra_whitespaces") ", " KEY("precompiled_charsmap") "), which is not "
                                                                             "supported");
    return ODSI_OK;
}

static enum odsi_err get_arrays(const struct gguf *gguf, struct arrays *out)
{
    enum odsi_err err = required(gguf_get_array(gguf, KEY("tokens"), &out->pieces));
    if (err == ODSI_OK)
        err = required(gguf_get_array(gguf, KEY("scores"), &out->scores));
    if (err == ODSI_OK)
        err = required(gguf_get_array(gguf, KEY("token_type"), &out->types));
    if (err != ODSI_OK)
        return err;
    if (out->pieces.type != GGUF_TEXT || out->scores.type != GGUF_F32 ||
        (out->types.type != GGUF_I32 && out->types.type != GGUF_U32))
        return odsi_fail(
            ODSI_ERR_CORRUPT,
            KEY("tokens, scores or token_type") " is not an array of texts, f32 or i32");
    if (out->pieces.count == 0 || out->pieces.count > LIMIT_VOCAB_MAX ||
        out->scores.count != out->pieces.count || out->types.count != out->pieces.count)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "the vocabulary has %" PRIu64 " tokens, %" PRIu64 " scores and %" PRIu64
                         " types; it takes 1 to %u of each",
                         out->pieces.count, out->scores.count, out->types.count, LIMIT_VOCAB_MAX);
    return ODSI_OK;
}

/* An id with the default that SentencePiece models have; all ones say that there is none. */
static enum odsi_err append_id(const struct gguf *gguf, struct buf *out, const char *key,
                               uint32_t fallback, uint32_t count)
{
    uint32_t id = fallback < count ? fallback : TOKENIZER_NONE;
    const enum odsi_err err = gguf_get_u32(gguf, key, &id);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    return buf_append_u32(out, id);
}

static enum odsi_err append_flag(const struct gguf *gguf, struct buf *out, const char *key,
                                 int fallback)
{
    int flag = fallback;
    const enum odsi_err err = gguf_get_bool(gguf, key, &flag);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    return buf_append_u8(out, (uint8_t)flag);
}

static enum odsi_err append_head(const struct gguf *gguf, struct buf *out, uint32_t count)
{
    (void)buf_append(out, "ODSITOK1", 8);
    enum odsi_err err = buf_append_u32(out, 1);
    if (err == ODSI_OK)
        err = append_id(gguf, out, KEY("bos_token_id"), 1, count);
    if (err == ODSI_OK)
        err = append_id(gguf, out, KEY("eos_token_id"), 2, count);
    if (err == ODSI_OK)
        err = append_id(gguf, out, KEY("unknown_token_id"), 0, count);
    if (err == ODSI_OK)
        err = append_flag(gguf, out, KEY("add_bos_token"), 1);
    if (err == ODSI_OK)
        err = append_flag(gguf, out, KEY("add_eos_token"), 0);
    if (err == ODSI_OK)
        err = append_flag(gguf, out, KEY("add_space_prefix"), 1);
    if (err != ODSI_OK)
        return err;
    (void)buf_append_u8(out, 0);
    return buf_append_u32(out, count);
}

static enum odsi_err append_tokens(const struct arrays *arrays, struct buf *out)
{
    size_t cursor = 0;
    for (uint64_t i = 0; i < arrays->pieces.count; i++) {
        struct gguf_text piece = {.size = 0};
        const uint32_t type = bytes_load_u32(arrays->types.data + 4 * i);
        (void)gguf_array_text(&arrays->pieces, &cursor, &piece);
        if (piece.size > TOKENIZER_PIECE_SIZE_MAX)
            return odsi_fail(ODSI_ERR_CORRUPT, "token %" PRIu64 " is a text of %zu bytes", i,
                             piece.size);
        if (type > UINT8_MAX)
            return odsi_fail(ODSI_ERR_CORRUPT, "token %" PRIu64 " has type %" PRIu32, i, type);
        const uint8_t size[2] = {(uint8_t)piece.size, (uint8_t)(piece.size >> 8)};
        (void)buf_append(out, arrays->scores.data + 4 * i, 4);
        (void)buf_append_u8(out, (uint8_t)type);
        (void)buf_append(out, size, 2);
        if (buf_append(out, piece.data, piece.size) != ODSI_OK)
            break;
    }
    return buf_status(out);
}

enum odsi_err vocab_canonical(const struct gguf *gguf, struct buf *out, uint32_t *count)
{
    struct arrays arrays;
    enum odsi_err err = check_kind(gguf);
    if (err == ODSI_OK)
        err = get_arrays(gguf, &arrays);
    if (err != ODSI_OK)
        return err;
    *count = (uint32_t)arrays.pieces.count;
    err = append_head(gguf, out, *count);
    if (err == ODSI_OK)
        err = append_tokens(&arrays, out);
    if (err == ODSI_ERR_RANGE)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "the vocabulary takes more than %u bytes",
                         TOKENIZER_CANONICAL_SIZE_MAX);
    return err;
}
