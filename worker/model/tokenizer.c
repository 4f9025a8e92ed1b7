/* The match table holds normal pieces as the text they stand for, with U+2581 turned into the
 * space it means. So the text to encode needs no such replacement, and a U+2581 in it matches
 * nothing and is spelt in bytes, which is what brings it back unchanged. Control and user-defined
 * pieces are not in the table: text never becomes a command to the model. */
#include "worker/model/tokenizer.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"
#include "worker/model/reader.h"

#include <inttypes.h>

#define KIND_SPM       1u
#define SPACE_MARK     "\xe2\x96\x81" /* U+2581, a space in a piece */
#define UNKNOWN_TEXT   "\xef\xbf\xbd" /* U+FFFD, what an unknown token shows as */
#define UNKNOWN_SIZE   3u
#define TOKEN_SIZE_MIN 7u /* score, type, piece length */

/* Token types, as in GGUF. */
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_USER_DEFINED, TYPE_UNUSED, TYPE_BYTE };

struct token {
    uint32_t offset; /* of its text in texts */
    uint16_t size;   /* of its text: what it adds to an answer */
    uint8_t type;
    uint8_t is_end;
    float score;
};

struct tokenizer {
    uint32_t bos, eos, unknown; /* TOKENIZER_NONE: there is none */
    int add_bos, add_eos, add_space_prefix;
    uint32_t count;
    uint32_t text_size_max; /* of any text in the match table */
    uint32_t slot_mask;
    uint64_t hash_base;
    struct token *tokens;      /* [count] */
    char *texts;               /* of all tokens, one after the other */
    uint32_t *slots;           /* [slot_mask + 1], open addressing; TOKENIZER_NONE is empty */
    uint64_t *powers;          /* [text_size_max + 1] of hash_base */
    uint32_t byte_tokens[256]; /* TOKENIZER_NONE where the vocabulary has none */
};

/* ---- UTF-8 ---------------------------------------------------------------------------------- */

/* Length of the character at text; 0 when it is cut off by the end, -1 when no character starts
 * with these bytes (RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF). */
static int utf8_length(const uint8_t *text, size_t size)
{
    const uint8_t lead = text[0];
    if (lead < 0x80)
        return 1;
    if (lead < 0xc2 || lead > 0xf4)
        return -1;
    const int length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80; /* of the second byte only */
    uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == size)
            return 0;
        if (text[i] < low || text[i] > high)
            return -1;
        low = 0x80;
        high = 0xbf;
    }
    return length;
}

size_t tokenizer_utf8_whole(const char *text, size_t size)
{
    const uint8_t *bytes = (const uint8_t *)text;
    const size_t back_max = size < 3 ? size : 3; /* a cut character has at most 3 of its bytes */
    for (size_t back = 1; back <= back_max; back++)
        if (bytes[size - back] >= 0xc0)
            return utf8_length(bytes + size - back, back) == 0 ? size - back : size;
    return size;
}

/* ---- the match table ------------------------------------------------------------------------ */

/* Texts are hashed as polynomials modulo 2^61-1, so that the hash of two neighbours joined comes
 * from theirs without reading them again. The base comes from a digest of the whole vocabulary:
 * whoever makes a vocabulary cannot aim for collisions. */
#define HASH_PRIME ((UINT64_C(1) << 61) - 1)

static uint64_t hash_multiply_add(uint64_t a, uint64_t b, uint64_t c)
{
    const unsigned __int128 product = (unsigned __int128)a * b + c;
    const uint64_t folded = (uint64_t)(product & HASH_PRIME) + (uint64_t)(product >> 61);
    return folded >= HASH_PRIME ? folded - HASH_PRIME : folded;
}

static uint64_t hash_text(const struct tokenizer *self, const char *text, size_t size)
{
    uint64_t hash = 0;
    for (size_t i = 0; i < size; i++)
        hash = hash_multiply_add(hash, self->hash_base, (uint64_t)(uint8_t)text[i] + 1);
    return hash;
}

/* The slot that holds text, or the empty one where it would be. */
static uint32_t *slot_of(const struct tokenizer *self, uint64_t hash, const char *text, size_t size)
{
    uint32_t at = (uint32_t)(hash ^ hash >> 32) & self->slot_mask;
    for (;; at = (at + 1) & self->slot_mask) {
        uint32_t *slot = &self->slots[at];
        if (*slot == TOKENIZER_NONE)
            return slot;
        const struct token *token = &self->tokens[*slot];
        if (token->size == size && memcmp(self->texts + token->offset, text, size) == 0)
            return slot;
    }
}

/* The token whose text this is, or TOKENIZER_NONE. */
static uint32_t match(const struct tokenizer *self, uint64_t hash, const char *text, size_t size)
{
    return size > self->text_size_max ? TOKENIZER_NONE : *slot_of(self, hash, text, size);
}

static int is_special(const struct tokenizer *self, uint32_t id)
{
    return id == self->bos || id == self->eos || id == self->unknown;
}

/* ---- opening -------------------------------------------------------------------------------- */

static enum odsi_err corrupt(const char *what)
{
    return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: %s", what);
}

static enum odsi_err read_head(struct tokenizer *self, struct reader *reader)
{
    uint32_t kind;
    uint8_t flags[4];
    const uint8_t *magic = reader_take(reader, 8);
    if (!magic || memcmp(magic, "ODSITOK1", 8) != 0)
        return corrupt("these are no tokenizer bytes");
    if (!reader_u32(reader, &kind))
        return corrupt("its head is cut off");
    if (kind != KIND_SPM)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tokenizer: kind %" PRIu32 " is not supported",
                         kind);
    int whole = reader_u32(reader, &self->bos) && reader_u32(reader, &self->eos) &&
                reader_u32(reader, &self->unknown);
    for (int i = 0; i < 4; i++)
        whole = whole && reader_u8(reader, &flags[i]);
    if (!whole || !reader_u32(reader, &self->count))
        return corrupt("its head is cut off");
    if (flags[0] > 1 || flags[1] > 1 || flags[2] > 1 || flags[3] != 0)
        return corrupt("a flag is neither 0 nor 1");
    self->add_bos = flags[0];
    self->add_eos = flags[1];
    self->add_space_prefix = flags[2];
    if (self->count == 0 || self->count > LIMIT_VOCAB_MAX ||
        self->count > reader_left(reader) / TOKEN_SIZE_MIN)
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: %" PRIu32 " tokens cannot be in it",
                         self->count);
    const uint32_t ids[] = {self->bos, self->eos, self->unknown};
    for (size_t i = 0; i < 3; i++)
        if (ids[i] != TOKENIZER_NONE && ids[i] >= self->count)
            return corrupt("bos, eos or unknown is outside the vocabulary");
    if ((self->add_bos && self->bos == TOKENIZER_NONE) ||
        (self->add_eos && self->eos == TOKENIZER_NONE))
        return corrupt("it adds a bos or eos that it does not have");
    return ODSI_OK;
}

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

/* Whether a piece ends an answer though it is not the eos: chat models have several. */
static int piece_is_end(const char *piece, size_t size)
{
    static const char *const names[] = {
        "</s>",          "<|im_end|>",    "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>",
        "<|endoftext|>", "<end_of_turn>", "<|eot|>",    "<EOT>",      "<|end_of_turn|>",
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strlen(names[i]) == size && memcmp(names[i], piece, size) == 0)
            return 1;
    return 0;
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

/* Writes the text of token id to out and returns its size; -1 for a byte piece that names none. */
static int token_text(struct tokenizer *self, uint32_t id, const char *piece, size_t size,
                      char *out)
{
    const uint8_t type = self->tokens[id].type;
    if (id == self->bos || id == self->eos)
        return 0;
    if (type == TYPE_UNKNOWN || id == self->unknown) {
        memcpy(out, UNKNOWN_TEXT, UNKNOWN_SIZE);
        return UNKNOWN_SIZE;
    }
    if (type == TYPE_CONTROL)
        return 0;
    if (type == TYPE_BYTE) {
        const int byte = byte_of_piece(piece, size);
        if (byte < 0)
            return -1;
        out[0] = (char)byte;
        if (self->byte_tokens[byte] == TOKENIZER_NONE)
            self->byte_tokens[byte] = id;
        return 1;
    }
    return (int)unmark(out, piece, size);
}

/* Whether encoding may use token id: a normal piece with a text that a text can hold. A plain
 * space in a piece never matches, since spaces are marks there. */
static int is_matchable(const struct tokenizer *self, uint32_t id, const char *piece, size_t size)
{
    return self->tokens[id].type == TYPE_NORMAL && size > 0 && !is_special(self, id) &&
           memchr(piece, ' ', size) == NULL;
}

/* Reads every token and puts the matchable ones into the table, the lowest id of equal texts.
 * texts has room: no text is longer than its piece but that of an unknown token, which is counted
 * with its TOKEN_SIZE_MIN bytes. */
static enum odsi_err read_tokens(struct tokenizer *self, struct reader *reader)
{
    uint32_t offset = 0;
    for (uint32_t id = 0; id < self->count; id++) {
        struct token *token = &self->tokens[id];
        uint16_t size = 0;
        const uint8_t *bytes = NULL;
        if (reader_f32(reader, &token->score) && reader_u8(reader, &token->type) &&
            reader_u16(reader, &size))
            bytes = reader_take(reader, size);
        if (!bytes)
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " is cut off", id);
        if (token->type < TYPE_NORMAL || token->type > TYPE_BYTE)
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " has type %u", id,
                             token->type);
        if (!(token->score - token->score == 0.0f))
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " has no finite score",
                             id);
        const char *piece = (const char *)bytes;
        const int text_size = token_text(self, id, piece, size, self->texts + offset);
        if (text_size < 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer: token %" PRIu32 " is not a byte", id);
        token->offset = offset;
        token->size = (uint16_t)text_size;
        token->is_end =
            id == self->eos || ((token->type == TYPE_CONTROL || token->type == TYPE_USER_DEFINED) &&
                                piece_is_end(piece, size));
        offset += (uint32_t)text_size;
        if (!is_matchable(self, id, piece, size))
            continue;
        const char *text = self->texts + token->offset;
        uint32_t *slot = slot_of(self, hash_text(self, text, token->size), text, token->size);
        if (*slot == TOKENIZER_NONE)
            *slot = id;
        if (token->size > self->text_size_max)
            self->text_size_max = token->size;
    }
    return reader_left(reader) == 0 ? ODSI_OK : corrupt("bytes follow its last token");
}

/* A byte without a token needs an unknown token that shows itself: one that is also the bos or eos
 * would drop the byte silently. */
static enum odsi_err check_bytes(const struct tokenizer *self)
{
    if (self->unknown != TOKENIZER_NONE && self->tokens[self->unknown].size > 0)
        return ODSI_OK;
    for (uint32_t byte = 0; byte < 256; byte++)
        if (self->byte_tokens[byte] == TOKENIZER_NONE)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tokenizer: byte %" PRIu32 " has no token, and there is no unknown "
                             "token of its own to stand for it",
                             byte);
    return ODSI_OK;
}

static enum odsi_err make_tables(struct tokenizer *self, const uint8_t *data, size_t size)
{
    struct digest digest;
    digest_of(&digest, data, size);
    self->hash_base = 256 + bytes_load_u64(digest.bytes) % (HASH_PRIME - 256);
    uint32_t slot_count = 2;
    while (slot_count < 2 * self->count)
        slot_count *= 2;
    self->slot_mask = slot_count - 1;
    enum odsi_err err = alloc_zeroed(&self->slots, slot_count, sizeof *self->slots);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->tokens, self->count, sizeof *self->tokens);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->texts, size, 1);
    if (err != ODSI_OK)
        return err;
    memset(self->slots, 0xff, slot_count * sizeof *self->slots);
    memset(self->byte_tokens, 0xff, sizeof self->byte_tokens);
    return ODSI_OK;
}

enum odsi_err tokenizer_open(struct tokenizer **out, const uint8_t *data, size_t size)
{
    *out = NULL;
    struct reader reader = {.data = data, .size = size};
    struct tokenizer *self = NULL;
    if (size > TOKENIZER_CANONICAL_SIZE_MAX)
        return corrupt("it is larger than any we take");
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    err = read_head(self, &reader);
    if (err == ODSI_OK)
        err = make_tables(self, data, size);
    if (err == ODSI_OK)
        err = read_tokens(self, &reader);
    if (err == ODSI_OK)
        err = check_bytes(self);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->powers, self->text_size_max + 1, sizeof *self->powers);
    if (err != ODSI_OK)
        goto fail;
    self->powers[0] = 1;
    for (uint32_t i = 1; i <= self->text_size_max; i++)
        self->powers[i] = hash_multiply_add(self->powers[i - 1], self->hash_base, 0);
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
    alloc_free(tokenizer->tokens);
    alloc_free(tokenizer->texts);
    alloc_free(tokenizer->slots);
    alloc_free(tokenizer->powers);
    alloc_free(tokenizer);
    *self = NULL;
}

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

int tokenizer_is_end(const struct tokenizer *self, uint32_t id)
{
    return id < self->count && self->tokens[id].is_end;
}

/* ---- encoding ------------------------------------------------------------------------------- */

/* A piece of the text that is going to be one token; they form a list in text order. */
struct symbol {
    uint64_t hash;
    uint32_t start;
    uint32_t size; /* 0: joined to its left neighbour */
    uint32_t previous, next;
};

/* Two neighbours that make a token. It is out of date when their sizes no longer add up to size:
 * symbols only grow, so the sum never comes back. */
struct bigram {
    float score;
    uint32_t left;
    uint32_t size;
};

struct encoding {
    const struct tokenizer *tokenizer;
    char *text; /* with the prefix space */
    uint32_t text_size;
    struct symbol *symbols;
    uint32_t symbol_count;
    struct bigram *heap; /* the best one first; at most two per symbol: each join takes one out
                          * and puts at most two in */
    uint32_t heap_count;
};

/* The higher score first; among equals the leftmost. */
static int is_before(const struct bigram *a, const struct bigram *b)
{
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static void heap_push(struct encoding *self, struct bigram bigram)
{
    uint32_t at = self->heap_count++;
    while (at > 0 && is_before(&bigram, &self->heap[(at - 1) / 2])) {
        self->heap[at] = self->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    self->heap[at] = bigram;
}

static struct bigram heap_pop(struct encoding *self)
{
    const struct bigram first = self->heap[0];
    const struct bigram last = self->heap[--self->heap_count];
    uint32_t at = 0;
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= self->heap_count)
            break;
        if (child + 1 < self->heap_count && is_before(&self->heap[child + 1], &self->heap[child]))
            child++;
        if (!is_before(&self->heap[child], &last))
            break;
        self->heap[at] = self->heap[child];
        at = child;
    }
    self->heap[at] = last;
    return first;
}

static uint64_t joined_hash(const struct tokenizer *tokenizer, const struct symbol *left,
                            const struct symbol *right)
{
    return hash_multiply_add(left->hash, tokenizer->powers[right->size], right->hash);
}

/* Remembers left and its right neighbour when together they are a token. */
static void try_bigram(struct encoding *self, uint32_t left)
{
    const struct tokenizer *tokenizer = self->tokenizer;
    if (left == TOKENIZER_NONE || self->symbols[left].next == TOKENIZER_NONE)
        return;
    const struct symbol *a = &self->symbols[left];
    const struct symbol *b = &self->symbols[a->next];
    const uint32_t size = a->size + b->size;
    if (size > tokenizer->text_size_max)
        return;
    const uint32_t id = match(tokenizer, joined_hash(tokenizer, a, b), self->text + a->start, size);
    if (id != TOKENIZER_NONE)
        heap_push(self, (struct bigram){
                            .score = tokenizer->tokens[id].score, .left = left, .size = size});
}

/* One symbol per UTF-8 character; a byte that belongs to none is a symbol of its own. */
static void split(struct encoding *self)
{
    uint32_t count = 0;
    for (uint32_t at = 0; at < self->text_size;) {
        const int length = utf8_length((const uint8_t *)self->text + at, self->text_size - at);
        struct symbol *symbol = &self->symbols[count];
        symbol->start = at;
        symbol->size = length > 0 ? (uint32_t)length : 1;
        symbol->hash = hash_text(self->tokenizer, self->text + at, symbol->size);
        symbol->previous = count - 1; /* TOKENIZER_NONE for the first */
        symbol->next = count + 1;
        at += symbol->size;
        count++;
    }
    if (count > 0)
        self->symbols[count - 1].next = TOKENIZER_NONE;
    self->symbol_count = count;
}

static void join_all(struct encoding *self)
{
    for (uint32_t i = 0; i < self->symbol_count; i++)
        try_bigram(self, i);
    while (self->heap_count > 0) {
        const struct bigram bigram = heap_pop(self);
        struct symbol *left = &self->symbols[bigram.left];
        if (left->size == 0 || left->next == TOKENIZER_NONE)
            continue;
        struct symbol *right = &self->symbols[left->next];
        if (left->size + right->size != bigram.size)
            continue;
        left->hash = joined_hash(self->tokenizer, left, right);
        left->size = bigram.size;
        right->size = 0;
        left->next = right->next;
        if (left->next != TOKENIZER_NONE)
            self->symbols[left->next].previous = bigram.left;
        try_bigram(self, left->previous);
        try_bigram(self, bigram.left);
    }
}

/* Where ids go: counts on when there is no more room. */
struct id_list {
    uint32_t *ids;
    uint32_t capacity;
    uint32_t count;
};

static void id_add(struct id_list *self, uint32_t id)
{
    if (self->count < self->capacity)
        self->ids[self->count] = id;
    self->count++;
}

static void emit(const struct encoding *self, struct id_list *list)
{
    const struct tokenizer *tokenizer = self->tokenizer;
    for (uint32_t i = self->symbol_count ? 0 : TOKENIZER_NONE; i != TOKENIZER_NONE;
         i = self->symbols[i].next) {
        const struct symbol *symbol = &self->symbols[i];
        const char *text = self->text + symbol->start;
        const uint32_t id = match(tokenizer, symbol->hash, text, symbol->size);
        if (id != TOKENIZER_NONE) {
            id_add(list, id);
            continue;
        }
        for (uint32_t k = 0; k < symbol->size; k++) {
            const uint32_t byte_id = tokenizer->byte_tokens[(uint8_t)text[k]];
            id_add(list, byte_id != TOKENIZER_NONE ? byte_id : tokenizer->unknown);
        }
    }
}

static enum odsi_err encode_text(const struct tokenizer *self, const char *text, size_t size,
                                 struct id_list *list)
{
    const uint32_t prefix_size = self->add_space_prefix ? 1 : 0;
    struct encoding encoding = {.tokenizer = self, .text_size = (uint32_t)size + prefix_size};
    enum odsi_err err = alloc_zeroed(&encoding.text, encoding.text_size, 1);
    if (err == ODSI_OK)
        err = alloc_zeroed(&encoding.symbols, encoding.text_size, sizeof *encoding.symbols);
    if (err == ODSI_OK)
        err = alloc_zeroed(&encoding.heap, 2 * (size_t)encoding.text_size, sizeof *encoding.heap);
    if (err != ODSI_OK)
        goto fail;
    encoding.text[0] = ' ';
    memcpy(encoding.text + prefix_size, text, size);
    split(&encoding);
    join_all(&encoding);
    emit(&encoding, list);
fail:
    alloc_free(encoding.text);
    alloc_free(encoding.symbols);
    alloc_free(encoding.heap);
    return err;
}

enum odsi_err tokenizer_encode(const struct tokenizer *self, const char *text, size_t size,
                               uint32_t *tokens, uint32_t *count)
{
    struct id_list list = {.ids = tokens, .capacity = *count};
    if (size > TOKENIZER_TEXT_SIZE_MAX)
        return odsi_fail(ODSI_ERR_INVALID,
                         "a text of %zu bytes is too long to tokenize; %u is "
                         "the most",
                         size, TOKENIZER_TEXT_SIZE_MAX);
    if (self->add_bos)
        id_add(&list, self->bos);
    if (size > 0) {
        const enum odsi_err err = encode_text(self, text, size, &list);
        if (err != ODSI_OK)
            return err;
    }
    if (self->add_eos)
        id_add(&list, self->eos);
    *count = list.count;
    if (list.count > list.capacity)
        return odsi_fail(ODSI_ERR_RANGE,
                         "the text is %" PRIu32 " tokens long; %" PRIu32 " have room", list.count,
                         list.capacity);
    return ODSI_OK;
}

/* ---- decoding ------------------------------------------------------------------------------- */

size_t tokenizer_piece(const struct tokenizer *self, uint32_t id, char *out)
{
    if (id >= self->count)
        return 0;
    const struct token *token = &self->tokens[id];
    memcpy(out, self->texts + token->offset, token->size);
    return token->size;
}

enum odsi_err tokenizer_decode(const struct tokenizer *self, const uint32_t *tokens, uint32_t count,
                               char *out, size_t *size)
{
    const size_t capacity = *size;
    size_t written = 0;
    int at_prefix = self->add_space_prefix;
    for (uint32_t i = 0; i < count; i++) {
        if (tokens[i] >= self->count || self->tokens[tokens[i]].size == 0)
            continue;
        const char *text = self->texts + self->tokens[tokens[i]].offset;
        size_t text_size = self->tokens[tokens[i]].size;
        if (at_prefix && text[0] == ' ') {
            text++;
            text_size--;
        }
        at_prefix = 0;
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
