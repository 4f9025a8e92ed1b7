#include "worker/model/tokenizer.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"
#include "worker/model/reader.h"
#include "worker/model/tokenizer_parts.h"

#include <inttypes.h>

#define SPACE_MARK     "\xe2\x96\x81" /* U+2581, a space in a piece */
#define UNKNOWN_TEXT   "\xef\xbf\xbd" /* U+FFFD, what an unknown token shows as */
#define UNKNOWN_SIZE   3u
#define TOKEN_SIZE_MIN 7u /* score, type, piece length */
#define MERGE_SIZE     8u
#define STRIP_BITS     (TOKENIZER_STRIP_LEFT | TOKENIZER_STRIP_RIGHT)

size_t tokenizer_utf8_whole(const char *text, size_t size)
{
    const uint8_t *bytes = (const uint8_t *)text;
    const size_t back_max = size < 3 ? size : 3; /* a cut character has at most 3 of its bytes */
    for (size_t back = 1; back <= back_max; back++)
        if (bytes[size - back] >= 0xc0)
            return tokenizer_utf8_length(bytes + size - back, back) == 0 ? size - back : size;
    return size;
}

static enum odsi_err corrupt(const char *what)
{
    return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: %s", what);
}

static int is_special(const struct tokenizer *self, uint32_t id)
{
    return id == self->bos || id == self->eos || id == self->unknown;
}

/* ---- opening: the head ---------------------------------------------------------------------- */

static enum odsi_err read_ends(struct tokenizer *self, struct reader *reader)
{
    if (!reader_u32(reader, &self->end_count))
        return corrupt("its head is cut off");
    if (self->end_count > TOKENIZER_ENDS_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: %" PRIu32 " ends; %u is the most",
                         self->end_count, TOKENIZER_ENDS_MAX);
    for (uint32_t i = 0; i < self->end_count; i++) {
        if (!reader_u32(reader, &self->ends[i]))
            return corrupt("its head is cut off");
        if (i > 0 && self->ends[i] <= self->ends[i - 1])
            return corrupt("its ends do not ascend");
    }
    return ODSI_OK;
}

static enum odsi_err check_ids(const struct tokenizer *self)
{
    const uint32_t ids[] = {self->bos, self->eos, self->unknown};
    for (size_t i = 0; i < 3; i++)
        if (ids[i] != TOKENIZER_NONE && ids[i] >= self->count)
            return corrupt("bos, eos or unknown is outside the vocabulary");
    if (self->end_count > 0 && self->ends[self->end_count - 1] >= self->count)
        return corrupt("an end is outside the vocabulary");
    if ((self->add_bos && self->bos == TOKENIZER_NONE) ||
        (self->add_eos && self->eos == TOKENIZER_NONE))
        return corrupt("it adds a bos or eos that it does not have");
    return ODSI_OK;
}

static enum odsi_err check_kind(const struct tokenizer *self)
{
    if (self->kind < TOKENIZER_SPM || self->kind > TOKENIZER_SPM_MERGES)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tokenizer: kind %" PRIu32 " is not supported",
                         self->kind);
    if (self->kind == TOKENIZER_BYTE_BPE && self->add_space_prefix != TOKENIZER_PREFIX_NEVER)
        return corrupt("byte-level BPE puts no space in front");
    if (self->kind != TOKENIZER_BYTE_BPE &&
        (self->pre != TOKENIZER_PRE_NONE || self->ignore_merges))
        return corrupt("only byte-level BPE has a pre-tokenizer and words");
    return ODSI_OK;
}

static enum odsi_err read_head(struct tokenizer *self, struct reader *reader)
{
    uint8_t flags[4];
    const uint8_t *magic = reader_take(reader, 8);
    if (!magic || memcmp(magic, "ODSITOK2", 8) != 0)
        return corrupt("these are no tokenizer bytes of version 2");
    int whole = reader_u32(reader, &self->kind) && reader_u32(reader, &self->pre) &&
                reader_u32(reader, &self->bos) && reader_u32(reader, &self->eos) &&
                reader_u32(reader, &self->unknown);
    for (int i = 0; i < 4; i++)
        whole = whole && reader_u8(reader, &flags[i]);
    if (!whole)
        return corrupt("its head is cut off");
    if (flags[0] > 1 || flags[1] > 1 || flags[2] > TOKENIZER_PREFIX_START || flags[3] > 1)
        return corrupt("a flag has a value that it cannot have");
    self->add_bos = flags[0];
    self->add_eos = flags[1];
    self->add_space_prefix = flags[2];
    self->ignore_merges = flags[3];
    enum odsi_err err = check_kind(self);
    if (err == ODSI_OK)
        err = read_ends(self, reader);
    if (err != ODSI_OK)
        return err;
    if (!reader_u32(reader, &self->count))
        return corrupt("its head is cut off");
    if (self->count == 0 || self->count > LIMIT_VOCAB_MAX ||
        self->count > reader_left(reader) / TOKEN_SIZE_MIN)
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: %" PRIu32 " tokens cannot be in it",
                         self->count);
    return check_ids(self);
}

/* ---- opening: tokens ------------------------------------------------------------------------ */

/* The byte that a piece like <0x0A> stands for, or -1. */
static int byte_of_piece(const char *piece, size_t size)
{
    char digits[3] = {0};
    uint8_t byte;
    if (size != 6 || memcmp(piece, "<0x", 3) != 0 || piece[5] != '>')
        return -1;
    memcpy(digits, piece + 3, 2);
    return bytes_from_hex(&byte, 1, digits) ? byte : -1;
}

/* Copies a piece with every space mark as a space; returns the bytes written. */
static size_t unmark(char *out, const char *piece, size_t size)
{
    size_t written = 0;
    for (size_t i = 0; i < size;) {
        if (size - i >= 3 && memcmp(piece + i, SPACE_MARK, 3) == 0) {
            out[written++] = ' ';
            i += 3;
        } else {
            out[written++] = piece[i++];
        }
    }
    return written;
}

/* The number that sorts as the scores do, the highest first. */
static uint32_t priority_of(float score)
{
    uint32_t bits;
    score += 0.0f; /* -0.0 is no worse than 0.0 */
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? bits : ~(bits | UINT32_C(1) << 31);
}

/* Whether encoding may use token id: a normal piece with a text that a text can hold. A plain
 * space in a SentencePiece piece never matches, since spaces are marks there. */
static int is_matchable(const struct tokenizer *self, uint32_t id, const char *piece, size_t size)
{
    return self->tokens[id].type == TOKENIZER_NORMAL && size > 0 && !is_special(self, id) &&
           (self->kind == TOKENIZER_BYTE_BPE || memchr(piece, ' ', size) == NULL);
}

static void add_matchable(struct tokenizer *self, uint32_t id)
{
    const struct tokenizer_token *token = &self->tokens[id];
    const uint8_t *text = (const uint8_t *)self->texts + token->offset;
    tokenizer_table_add(&self->table, id, token->offset, token->size);
    for (uint32_t i = 1; i < token->size; i++) {
        const uint32_t bit = 256u * text[i - 1] + text[i];
        self->pairs[bit / 8] |= (uint8_t)(1u << bit % 8);
    }
    if (self->kind == TOKENIZER_BYTE_BPE && token->size == 1 &&
        self->byte_tokens[text[0]] == TOKENIZER_NONE)
        self->byte_tokens[text[0]] = id;
}

/* A token that a text may name: found by its piece, and user-defined ones by their text. */
static enum odsi_err add_special(struct tokenizer *self, uint32_t id, const char *text,
                                 uint32_t size)
{
    const int is_control = self->tokens[id].type != TOKENIZER_USER_DEFINED || is_special(self, id);
    if (size == 0)
        return ODSI_OK;
    if (size > TOKENIZER_SPECIAL_SIZE_MAX)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tokenizer: special token %" PRIu32 " has %" PRIu32 " bytes; %u is the "
                         "most",
                         id, size, TOKENIZER_SPECIAL_SIZE_MAX);
    const struct tokenizer_special_text one = {text, size, id, is_control};
    return tokenizer_special_add(&self->special, &one);
}

/* Puts the text of a token to *end of texts and into the tables. */
static enum odsi_err take_piece(struct tokenizer *self, uint32_t id, const char *piece,
                                uint32_t size, uint32_t *end)
{
    struct tokenizer_token *token = &self->tokens[id];
    char *out = self->texts + *end;
    const int is_named = token->type == TOKENIZER_CONTROL || token->type == TOKENIZER_UNKNOWN ||
                         token->type == TOKENIZER_USER_DEFINED || is_special(self, id);
    uint32_t written = size;
    token->is_shown = token->type != TOKENIZER_CONTROL && id != self->bos && id != self->eos;
    if (self->kind != TOKENIZER_BYTE_BPE && token->is_shown)
        written = (uint32_t)unmark(out, piece, size);
    else
        memcpy(out, piece, size);
    *end += written;
    token->offset = (uint32_t)(out - self->texts);
    token->size = (uint16_t)written;
    if (is_named) {
        const enum odsi_err err = add_special(self, id, out, written);
        if (err != ODSI_OK)
            return err;
    }
    if (token->is_shown && (token->type == TOKENIZER_UNKNOWN || id == self->unknown)) {
        token->offset = *end;
        token->size = UNKNOWN_SIZE;
        memcpy(self->texts + *end, UNKNOWN_TEXT, UNKNOWN_SIZE);
        *end += UNKNOWN_SIZE;
    } else if (token->is_shown && token->type == TOKENIZER_BYTE) {
        const int byte = byte_of_piece(piece, size);
        if (byte < 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " is not a byte", id);
        out[0] = (char)byte;
        token->size = 1;
        if (self->byte_tokens[byte] == TOKENIZER_NONE)
            self->byte_tokens[byte] = id;
    }
    if (is_matchable(self, id, piece, size))
        add_matchable(self, id);
    return ODSI_OK;
}

/* Reads every token. texts has room: no text is longer than its piece but that of an unknown
 * token, which is counted with its TOKEN_SIZE_MIN bytes. */
static enum odsi_err read_tokens(struct tokenizer *self, struct reader *reader)
{
    uint32_t end = 0;
    for (uint32_t id = 0; id < self->count; id++) {
        struct tokenizer_token *token = &self->tokens[id];
        uint16_t size = 0;
        float score = 0.0f;
        const uint8_t *piece = NULL;
        if (reader_f32(reader, &score) && reader_u8(reader, &token->type) &&
            reader_u16(reader, &size))
            piece = reader_take(reader, size);
        if (!piece)
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " is cut off", id);
        token->strip = token->type & STRIP_BITS;
        token->type &= (uint8_t)~STRIP_BITS;
        if (token->type < TOKENIZER_NORMAL || token->type > TOKENIZER_BYTE)
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " has type %u", id,
                             token->type);
        if (!(score - score == 0.0f))
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " has no finite score",
                             id);
        token->priority = priority_of(score);
        const enum odsi_err err = take_piece(self, id, (const char *)piece, size, &end);
        if (err != ODSI_OK)
            return err;
    }
    tokenizer_special_finish(&self->special);
    if (self->eos != TOKENIZER_NONE)
        self->tokens[self->eos].is_end = 1;
    for (uint32_t i = 0; i < self->end_count; i++)
        self->tokens[self->ends[i]].is_end = 1;
    return tokenizer_table_finish(&self->table);
}

/* A byte without a token needs something that shows itself to stand for it: an unknown token of
 * its own (one that is also the bos or eos would drop the byte silently), or U+FFFD in bytes. */
static enum odsi_err check_bytes(const struct tokenizer *self)
{
    if (self->unknown != TOKENIZER_NONE && self->tokens[self->unknown].is_shown)
        return ODSI_OK;
    int has_replacement = self->kind == TOKENIZER_BYTE_BPE;
    for (uint32_t i = 0; i < UNKNOWN_SIZE; i++)
        if (self->byte_tokens[(uint8_t)UNKNOWN_TEXT[i]] == TOKENIZER_NONE)
            has_replacement = 0;
    for (uint32_t byte = 0; byte < 256 && !has_replacement; byte++)
        if (self->byte_tokens[byte] == TOKENIZER_NONE)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tokenizer: byte %" PRIu32 " has no token, and there is no unknown "
                             "token of its own to stand for it",
                             byte);
    return ODSI_OK;
}

/* ---- opening: merges and the template ------------------------------------------------------- */

/* What the two of a merge make. hashes are those of all tokens' texts, so that a merge costs no
 * more than one comparison of bytes, however long the tokens are. */
static uint32_t merged_id(const struct tokenizer *self, const uint64_t *hashes, uint32_t left,
                          uint32_t right)
{
    const struct tokenizer_token *a = &self->tokens[left];
    const struct tokenizer_token *b = &self->tokens[right];
    const uint32_t size = (uint32_t)a->size + b->size;
    if (size > self->table.size_max)
        return TOKENIZER_NONE;
    const uint64_t hash =
        tokenizer_table_joined_hash(&self->table, hashes[left], hashes[right], b->size);
    return tokenizer_table_find_joined(&self->table, hash, self->texts + a->offset, a->size,
                                       self->texts + b->offset, b->size);
}

static enum odsi_err read_merge(struct tokenizer *self, struct reader *reader,
                                const uint64_t *hashes, uint32_t rank)
{
    struct tokenizer_merge merge = {.rank = rank};
    (void)reader_u32(reader, &merge.left); /* read_merges has counted the bytes */
    (void)reader_u32(reader, &merge.right);
    if (merge.left >= self->count || merge.right >= self->count)
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: merge %" PRIu32 " is outside the vocabulary",
                         rank);
    if (tokenizer_merges_find(&self->merges, merge.left, merge.right))
        return ODSI_OK; /* the better rank counts */
    merge.id = TOKENIZER_NONE;
    if (hashes[merge.left] != 0 && hashes[merge.right] != 0)
        merge.id = merged_id(self, hashes, merge.left, merge.right);
    if (merge.id == TOKENIZER_NONE)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tokenizer: merge %" PRIu32 " is not of two normal tokens that make a "
                         "third",
                         rank);
    tokenizer_merges_add(&self->merges, &merge);
    return ODSI_OK;
}

static enum odsi_err read_merges(struct tokenizer *self, struct reader *reader,
                                 const uint8_t seed[32])
{
    uint32_t count = 0;
    uint64_t *hashes = NULL; /* [count of tokens]; 0 where a token cannot be merged */
    if (!reader_u32(reader, &count) || count > reader_left(reader) / MERGE_SIZE)
        return corrupt("its merges are cut off");
    if (self->kind == TOKENIZER_SPM)
        return count == 0 ? ODSI_OK : corrupt("it has both scores and merges");
    enum odsi_err err = tokenizer_merges_open(&self->merges, seed, count);
    if (err == ODSI_OK)
        err = alloc_zeroed(&hashes, self->count, sizeof *hashes);
    for (uint32_t id = 0; err == ODSI_OK && id < self->count; id++) {
        const struct tokenizer_token *token = &self->tokens[id];
        const char *text = self->texts + token->offset;
        const uint64_t hash = tokenizer_table_hash(&self->table, text, token->size);
        if (tokenizer_table_find(&self->table, hash, text, token->size) == id)
            hashes[id] = hash;
    }
    for (uint32_t rank = 0; err == ODSI_OK && rank < count; rank++)
        err = read_merge(self, reader, hashes, rank);
    alloc_free(hashes);
    return err;
}

static enum odsi_err read_template(struct tokenizer *self, struct reader *reader)
{
    const uint8_t *bytes = NULL;
    if (reader_u32(reader, &self->template_size))
        bytes = reader_take(reader, self->template_size);
    if (!bytes)
        return corrupt("its chat template is cut off");
    if (self->template_size > TOKENIZER_TEMPLATE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tokenizer: a chat template of %" PRIu32 " bytes; %u is the most",
                         self->template_size, TOKENIZER_TEMPLATE_SIZE_MAX);
    if (reader_left(reader) != 0)
        return corrupt("bytes follow its end");
    return alloc_text(&self->chat_template, (const char *)bytes, self->template_size);
}

/* ---- opening and closing -------------------------------------------------------------------- */

static enum odsi_err make_tables(struct tokenizer *self, const uint8_t seed[32], size_t size)
{
    memset(self->byte_tokens, 0xff, sizeof self->byte_tokens);
    enum odsi_err err = alloc_zeroed(&self->tokens, self->count, sizeof *self->tokens);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->texts, size, 1);
    if (err == ODSI_OK)
        err = tokenizer_table_open(&self->table, seed, self->texts, self->count);
    if (err == ODSI_OK && self->kind == TOKENIZER_BYTE_BPE)
        err = tokenizer_split_open(&self->split, self->pre);
    return err;
}

enum odsi_err tokenizer_open(struct tokenizer **out, const uint8_t *data, size_t size)
{
    *out = NULL;
    struct reader reader = {.data = data, .size = size};
    struct tokenizer *self = NULL;
    struct digest seed;
    if (size > TOKENIZER_CANONICAL_SIZE_MAX)
        return corrupt("it is larger than any we take");
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    digest_of(&seed, data, size);
    err = read_head(self, &reader);
    if (err == ODSI_OK)
        err = make_tables(self, seed.bytes, size);
    if (err == ODSI_OK)
        err = read_tokens(self, &reader);
    if (err == ODSI_OK)
        err = check_bytes(self);
    if (err == ODSI_OK)
        err = read_merges(self, &reader, seed.bytes);
    if (err == ODSI_OK)
        err = read_template(self, &reader);
    if (err != ODSI_OK)
        goto fail;
    *out = self;
    return ODSI_OK;
fail:
    tokenizer_close(&self);
    return err;
}

void tokenizer_close(struct tokenizer **self)
{
    struct tokenizer *tokenizer = *self;
    if (!tokenizer)
        return;
    tokenizer_table_close(&tokenizer->table);
    tokenizer_merges_close(&tokenizer->merges);
    tokenizer_special_close(&tokenizer->special);
    tokenizer_split_close(&tokenizer->split);
    alloc_free(tokenizer->tokens);
    alloc_free(tokenizer->texts);
    alloc_free(tokenizer->chat_template);
    alloc_free(tokenizer);
    *self = NULL;
}

/* ---- asking --------------------------------------------------------------------------------- */

uint32_t tokenizer_vocab_size(const struct tokenizer *self)
{
    return self->count;
}

uint32_t tokenizer_eos(const struct tokenizer *self)
{
    return self->eos;
}

uint32_t tokenizer_bos(const struct tokenizer *self)
{
    return self->bos;
}

int tokenizer_adds_bos(const struct tokenizer *self)
{
    return self->add_bos;
}

int tokenizer_is_end(const struct tokenizer *self, uint32_t id)
{
    return id < self->count && self->tokens[id].is_end;
}

uint32_t tokenizer_find(const struct tokenizer *self, const char *piece, size_t size)
{
    const struct tokenizer_special_text *special =
        tokenizer_special_find(&self->special, piece, size);
    if (special)
        return special->id;
    if (size > self->table.size_max)
        return TOKENIZER_NONE;
    return tokenizer_table_find(&self->table, tokenizer_table_hash(&self->table, piece, size),
                                piece, size);
}

const char *tokenizer_template_view(const struct tokenizer *self, size_t *size)
{
    *size = self->template_size;
    return self->chat_template;
}

const char *tokenizer_text_view(const struct tokenizer *self, uint32_t id, size_t *size)
{
    *size = id < self->count ? self->tokens[id].size : 0;
    return *size > 0 ? self->texts + self->tokens[id].offset : "";
}

/* ---- decoding ------------------------------------------------------------------------------- */

size_t tokenizer_piece(const struct tokenizer *self, uint32_t id, char *out)
{
    if (id >= self->count || !self->tokens[id].is_shown)
        return 0;
    const struct tokenizer_token *token = &self->tokens[id];
    memcpy(out, self->texts + token->offset, token->size);
    return token->size;
}

/* Whether encoding puts its own space behind this token. */
static int is_before_prefix(const struct tokenizer *self, const struct tokenizer_token *token)
{
    return self->add_space_prefix == TOKENIZER_PREFIX_ALWAYS &&
           (!token->is_shown || token->type == TOKENIZER_USER_DEFINED);
}

enum odsi_err tokenizer_decode(const struct tokenizer *self, const uint32_t *tokens, uint32_t count,
                               char *out, size_t *size)
{
    const size_t capacity = *size;
    size_t written = 0;
    int at_prefix = self->add_space_prefix != TOKENIZER_PREFIX_NEVER;
    for (uint32_t i = 0; i < count; i++) {
        if (tokens[i] >= self->count)
            continue;
        const struct tokenizer_token *token = &self->tokens[tokens[i]];
        const char *text = self->texts + token->offset;
        size_t text_size = token->is_shown ? token->size : 0;
        if (at_prefix && text_size > 0 && text[0] == ' ' && token->type != TOKENIZER_USER_DEFINED) {
            text++;
            text_size--;
        }
        if (token->is_shown)
            at_prefix = 0;
        if (is_before_prefix(self, token))
            at_prefix = 1;
        if (written <= capacity && text_size <= capacity - written)
            memcpy(out + written, text, text_size);
        written += text_size;
    }
    *size = written;
    if (written > capacity)
        return odsi_fail(ODSI_ERR_RANGE, "the text is %zu bytes long; %zu have room", written,
                         capacity);
    return ODSI_OK;
}
