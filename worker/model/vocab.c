#include "worker/model/vocab.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"
#include "worker/model/gguf_value.h"
#include "worker/model/tokenizer_split.h"
#include "worker/model/tokenizer_table.h"
#include "worker/model/tokenizer_write.h"

#include <inttypes.h>
#include <string.h>
#include <strings.h>

#define KEY(name) "tokenizer.ggml." name

enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_UNUSED };
#define STRIP_RIGHT 0x80u

struct vocab {
    const struct gguf *gguf;
    struct tokenizer_head head;
    uint32_t count;
    /* All three have one element per token. */
    struct gguf_array pieces;
    struct gguf_array scores; /* SPM only */
    struct gguf_array types;
    struct gguf_array merges; /* byte-level BPE only */
    int strips_right;         /* control tokens take the white space behind them */
    char *text;               /* [TOKENIZER_PIECE_SIZE_MAX] a piece out of its alphabet */
};

static enum odsi_err required(enum odsi_err err)
{
    return err == ODSI_ERR_NOT_FOUND ? ODSI_ERR_CORRUPT : err; /* the sentence names the key */
}

static enum odsi_err optional(enum odsi_err err)
{
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

/* ---- what kind of tokenizer it is ----------------------------------------------------------- */

static enum odsi_err check_rewrites(const struct gguf *gguf)
{
    int rewrites = 0;
    struct gguf_array map = {.count = 0};
    enum odsi_err err = optional(gguf_get_bool(gguf, KEY("remove_extra_whitespaces"), &rewrites));
    if (err == ODSI_OK)
        err = optional(gguf_get_array(gguf, KEY("precompiled_charsmap"), &map));
    if (err != ODSI_OK)
        return err;
    if (rewrites || map.count > 0)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the tokenizer rewrites texts before it encodes them (%s, %s), which is "
                         "not supported",
                         KEY("remove_extra_whitespaces"), KEY("precompiled_charsmap"));
    return ODSI_OK;
}

/* A text of the file as it may be shown: cut, and without what could confuse a terminal. */
static void show(char out[64], struct gguf_text text)
{
    size_t i = 0;
    for (; i < text.size && i < 63; i++)
        out[i] = text.data[i] >= ' ' && text.data[i] <= '~' ? text.data[i] : '?';
    out[i] = '\0';
}

static enum odsi_err read_pre(struct vocab *self)
{
    struct gguf_text name = {.data = "default", .size = 7};
    int ignore_merges = 0;
    int add_bos = 0;
    const enum odsi_err err = optional(gguf_get_text(self->gguf, KEY("pre"), &name));
    if (err != ODSI_OK)
        return err;
    self->head.pre = tokenizer_split_by_name(name.data, name.size, &ignore_merges, &add_bos);
    if (self->head.pre == TOKENIZER_PRE_NONE) {
        char shown[64];
        show(shown, name);
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the pre-tokenizer %s = \"%s\" is not supported by this build", KEY("pre"),
                         shown);
    }
    self->head.ignore_merges = (uint8_t)ignore_merges;
    self->head.add_bos = (uint8_t)add_bos;
    return ODSI_OK;
}

/* Sets the kind, and what models of that kind mean when their file does not say. */
static enum odsi_err read_kind(struct vocab *self)
{
    struct gguf_text kind;
    enum odsi_err err = required(gguf_get_text(self->gguf, KEY("model"), &kind));
    if (err == ODSI_OK)
        err = check_rewrites(self->gguf);
    if (err != ODSI_OK)
        return err;
    self->head = (struct tokenizer_head){
        .bos = TOKENIZER_NONE, .eos = TOKENIZER_NONE, .unknown = TOKENIZER_NONE};
    if (gguf_text_is(kind, "gpt2")) {
        self->head.kind = TOKENIZER_BYTE_BPE;
        return read_pre(self);
    }
    if (!gguf_text_is(kind, "llama")) {
        char shown[64];
        show(shown, kind);
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the tokenizer kind %s = \"%s\" is not supported: only \"llama\" "
                         "(SentencePiece BPE) and \"gpt2\" (byte-level BPE) are",
                         KEY("model"), shown);
    }
    self->head.kind = TOKENIZER_SPM;
    self->head.bos = 1;
    self->head.eos = 2;
    self->head.unknown = 0;
    self->head.add_bos = 1;
    self->head.add_space_prefix = TOKENIZER_PREFIX_ALWAYS;
    return ODSI_OK;
}

/* Phi-3's control tokens take the white space behind them, which GGUF has no key for. */
static enum odsi_err read_strips(struct vocab *self)
{
    struct gguf_text name = {.size = 0};
    struct gguf_text arch = {.size = 0};
    enum odsi_err err = optional(gguf_get_text(self->gguf, "general.name", &name));
    if (err == ODSI_OK)
        err = optional(gguf_get_text(self->gguf, "general.architecture", &arch));
    if (err != ODSI_OK || self->head.kind != TOKENIZER_SPM)
        return err;
    self->strips_right = gguf_text_is(arch, "phi3");
    for (size_t i = 0; i + 4 <= name.size; i++)
        if (strncasecmp(name.data + i, "phi3", 4) == 0 ||
            (i + 5 <= name.size && strncasecmp(name.data + i, "phi-3", 5) == 0))
            self->strips_right = 1;
    return ODSI_OK;
}

/* ---- its arrays ----------------------------------------------------------------------------- */

static enum odsi_err check_arrays(const struct vocab *self)
{
    const uint64_t count = self->pieces.count;
    const int is_spm = self->head.kind == TOKENIZER_SPM;
    if (self->pieces.type != GGUF_TEXT || (is_spm && self->scores.type != GGUF_F32) ||
        (!is_spm && self->merges.type != GGUF_TEXT) ||
        (self->types.type != GGUF_I32 && self->types.type != GGUF_U32))
        return odsi_fail(ODSI_ERR_CORRUPT,
                         KEY("tokens, scores, token_type or merges") " is not an array of texts, "
                                                                     "f32, i32 or texts");
    if (count == 0 || count > LIMIT_VOCAB_MAX || self->types.count != count ||
        (is_spm && self->scores.count != count))
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "the vocabulary has %" PRIu64 " tokens, %" PRIu64 " scores and %" PRIu64
                         " types; it takes 1 to %u of each",
                         count, self->scores.count, self->types.count, LIMIT_VOCAB_MAX);
    /* 8 bytes are the length of a text in GGUF; canonical bytes hold one merge in as many. */
    if (self->pieces.size > TOKENIZER_CANONICAL_SIZE_MAX + 8 * (size_t)count ||
        self->merges.count > TOKENIZER_CANONICAL_SIZE_MAX / 8)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "the vocabulary takes more than %u bytes",
                         TOKENIZER_CANONICAL_SIZE_MAX);
    return ODSI_OK;
}

static enum odsi_err read_arrays(struct vocab *self)
{
    enum odsi_err err = required(gguf_get_array(self->gguf, KEY("tokens"), &self->pieces));
    if (err == ODSI_OK)
        err = required(gguf_get_array(self->gguf, KEY("token_type"), &self->types));
    if (err == ODSI_OK && self->head.kind == TOKENIZER_SPM)
        err = required(gguf_get_array(self->gguf, KEY("scores"), &self->scores));
    if (err == ODSI_OK && self->head.kind == TOKENIZER_BYTE_BPE)
        err = required(gguf_get_array(self->gguf, KEY("merges"), &self->merges));
    if (err == ODSI_OK)
        err = check_arrays(self);
    self->count = (uint32_t)self->pieces.count;
    return err;
}

static uint32_t type_of(const struct vocab *self, uint32_t id, struct gguf_text piece)
{
    const uint32_t type = bytes_load_u32(self->types.data + 4 * (size_t)id);
    /* Some files call the ends of turns normal pieces, and then no prompt could name them; but a
     * piece like </s> may well be text there. */
    const int is_marked =
        piece.size > 2 && piece.data[0] == '<' && (piece.data[1] == '|' || piece.data[1] == 'e');
    if (type == TYPE_NORMAL && is_marked && tokenizer_write_is_end_name(piece.data, piece.size))
        return TYPE_CONTROL;
    return type;
}

/* ---- the head ------------------------------------------------------------------------------- */

static enum odsi_err read_id(const struct vocab *self, const char *key, uint32_t *id)
{
    if (*id >= self->count)
        *id = TOKENIZER_NONE; /* a default that this vocabulary does not reach */
    return optional(gguf_get_u32(self->gguf, key, id));
}

static enum odsi_err read_flag(const struct vocab *self, const char *key, uint8_t *flag)
{
    int value = *flag;
    const enum odsi_err err = optional(gguf_get_bool(self->gguf, key, &value));
    *flag = (uint8_t)value;
    return err;
}

static enum odsi_err read_ends(struct vocab *self)
{
    static const char *const keys[] = {KEY("eot_token_id"), KEY("eom_token_id")};
    size_t cursor = 0;
    enum odsi_err err = ODSI_OK;
    for (size_t i = 0; err == ODSI_OK && i < sizeof keys / sizeof keys[0]; i++) {
        uint32_t id = TOKENIZER_NONE;
        err = read_id(self, keys[i], &id);
        if (err == ODSI_OK)
            err = tokenizer_write_add_end(&self->head, id);
    }
    for (uint32_t id = 0; err == ODSI_OK && id < self->count; id++) {
        struct gguf_text piece = {.size = 0};
        (void)gguf_array_text(&self->pieces, &cursor, &piece);
        const uint32_t type = type_of(self, id, piece);
        if ((type == TYPE_CONTROL || type == TYPE_USER_DEFINED) &&
            tokenizer_write_is_end_name(piece.data, piece.size))
            err = tokenizer_write_add_end(&self->head, id);
    }
    return err;
}

static enum odsi_err read_head(struct vocab *self)
{
    struct tokenizer_head *head = &self->head;
    enum odsi_err err = read_id(self, KEY("bos_token_id"), &head->bos);
    if (err == ODSI_OK)
        err = read_id(self, KEY("eos_token_id"), &head->eos);
    if (err == ODSI_OK)
        err = read_id(self, KEY("unknown_token_id"), &head->unknown);
    if (head->bos == TOKENIZER_NONE)
        head->add_bos = 0; /* unless the file insists on it, which tokenizer_open refuses */
    if (err == ODSI_OK)
        err = read_flag(self, KEY("add_bos_token"), &head->add_bos);
    if (err == ODSI_OK)
        err = read_flag(self, KEY("add_eos_token"), &head->add_eos);
    if (err == ODSI_OK && head->kind == TOKENIZER_SPM)
        err = read_flag(self, KEY("add_space_prefix"), &head->add_space_prefix);
    if (err == ODSI_OK)
        err = read_ends(self);
    return err;
}

/* ---- the body ------------------------------------------------------------------------------- */

static enum odsi_err write_token(struct vocab *self, struct buf *out, uint32_t id,
                                 struct gguf_text piece)
{
    uint32_t type = type_of(self, id, piece);
    float score = 0.0f;
    if (type > TYPE_UNUSED + 1)
        return odsi_fail(ODSI_ERR_CORRUPT, "token %" PRIu32 " has type %" PRIu32, id, type);
    if (self->head.kind == TOKENIZER_SPM) {
        const uint32_t bits = bytes_load_u32(self->scores.data + 4 * (size_t)id);
        memcpy(&score, &bits, sizeof score);
    } else if (type == TYPE_NORMAL && piece.size <= TOKENIZER_PIECE_SIZE_MAX) {
        size_t size = 0;
        if (tokenizer_write_undo_alphabet(self->text, &size, piece.data, piece.size))
            piece = (struct gguf_text){.data = self->text, .size = size};
        else
            type = TYPE_UNUSED; /* no text can give such a piece: it only fills its row */
    }
    const int strips = self->strips_right && (type == TYPE_CONTROL || type == TYPE_USER_DEFINED) &&
                       id != self->head.bos && id != self->head.unknown &&
                       !gguf_text_is(piece, "<|endoftext|>");
    return tokenizer_write_token(out, score, (uint8_t)(type | (strips ? STRIP_RIGHT : 0)),
                                 piece.data, piece.size);
}

static enum odsi_err write_tokens(struct vocab *self, struct buf *out)
{
    size_t cursor = 0;
    enum odsi_err err = ODSI_OK;
    for (uint32_t id = 0; err == ODSI_OK && id < self->count; id++) {
        struct gguf_text piece = {.data = "", .size = 0};
        (void)gguf_array_text(&self->pieces, &cursor, &piece);
        err = write_token(self, out, id, piece);
    }
    return err;
}

static uint32_t find_piece(const struct tokenizer_table *table, const char *text, size_t size)
{
    return tokenizer_table_find(table, tokenizer_table_hash(table, text, size), text, size);
}

/* One merge, "left right": pieces in their alphabet, which has no space. */
static enum odsi_err write_merge(const struct tokenizer_table *table, struct buf *out,
                                 struct gguf_text text, uint64_t rank)
{
    uint32_t left = TOKENIZER_NONE;
    uint32_t right = TOKENIZER_NONE;
    const char *space = text.size > 1 ? memchr(text.data + 1, ' ', text.size - 1) : NULL;
    if (space && text.size <= 2 * TOKENIZER_PIECE_SIZE_MAX) {
        const size_t left_size = (size_t)(space - text.data);
        if (left_size <= table->size_max && text.size - left_size - 1 <= table->size_max) {
            left = find_piece(table, text.data, left_size);
            right = find_piece(table, space + 1, text.size - left_size - 1);
        }
    }
    if (left == TOKENIZER_NONE || right == TOKENIZER_NONE)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         KEY("merges") ": number %" PRIu64 " is not two pieces of the vocabulary",
                         rank);
    tokenizer_write_merge(out, left, right);
    return ODSI_OK;
}

static enum odsi_err write_merges(const struct vocab *self, struct buf *out)
{
    struct tokenizer_table table;
    struct digest seed;
    struct gguf_text text;
    size_t cursor = 0;
    const char *texts = (const char *)self->pieces.data;
    tokenizer_write_merge_count(out, (uint32_t)self->merges.count);
    if (self->head.kind != TOKENIZER_BYTE_BPE)
        return ODSI_OK;
    digest_of(&seed, self->pieces.data, self->pieces.size);
    enum odsi_err err = tokenizer_table_open(&table, seed.bytes, texts, self->count);
    for (uint32_t id = 0; err == ODSI_OK && id < self->count; id++) {
        if (gguf_array_text(&self->pieces, &cursor, &text))
            tokenizer_table_add(&table, id, (uint32_t)(text.data - texts), (uint32_t)text.size);
    }
    cursor = 0;
    for (uint64_t rank = 0; err == ODSI_OK && rank < self->merges.count; rank++) {
        (void)gguf_array_text(&self->merges, &cursor, &text);
        err = write_merge(&table, out, text, rank);
    }
    tokenizer_table_close(&table);
    return err;
}

enum odsi_err vocab_canonical(const struct gguf *gguf, struct buf *out, uint32_t *count)
{
    struct vocab self = {.gguf = gguf};
    struct gguf_text chat_template = {.size = 0};
    enum odsi_err err = read_kind(&self);
    if (err == ODSI_OK)
        err = read_strips(&self);
    if (err == ODSI_OK)
        err = read_arrays(&self);
    if (err == ODSI_OK)
        err = read_head(&self);
    if (err == ODSI_OK)
        err = optional(gguf_get_text(gguf, "tokenizer.chat_template", &chat_template));
    if (err == ODSI_OK)
        err = alloc_zeroed(&self.text, TOKENIZER_PIECE_SIZE_MAX, 1);
    if (err != ODSI_OK)
        return err;
    *count = self.count;
    tokenizer_write_head(out, &self.head, self.count);
    err = write_tokens(&self, out);
    if (err == ODSI_OK)
        err = write_merges(&self, out);
    /* A full buffer has refused what came before, too, and this says so. */
    if (err == ODSI_OK || err == ODSI_ERR_RANGE)
        err = tokenizer_write_template(out, chat_template.data, chat_template.size);
    alloc_free(self.text);
    return err;
}
