/* The match table holds normal pieces as the text they stand for, with U+2581 turned into the
 * space it means. So the text to encode needs no such replacement, and a U+2581 in it matches
 * nothing and is spelt in bytes, which is what brings it back unchanged. */
#include "common/base/alloc.h"
#include "worker/model/tokenizer.h"
#include "worker/model/tokenizer_join.h"
#include "worker/model/tokenizer_parts.h"

#include <inttypes.h>
#include <string.h>

struct encoder {
    const struct tokenizer *tokenizer;
    const struct tokenizer_segment *segments;
    size_t segment_count;
    size_t segment_index; /* of the one that holds the byte looked at */
    size_t segment_end;   /* where it ends in the text */
    char *buffer;         /* one byte of room, then the text */
    const char *text;     /* buffer + 1 */
    size_t size;
    struct tokenizer_join join;
    struct tokenizer_split_scratch *scratch; /* byte-level BPE only */
    struct tokenizer_ids list;
};

void tokenizer_spell(const struct tokenizer *self, const char *text, size_t size,
                     struct tokenizer_ids *list)
{
    static const uint8_t shown[] = {0xef, 0xbf, 0xbd}; /* U+FFFD */
    for (size_t i = 0; i < size; i++) {
        const uint32_t id = self->byte_tokens[(uint8_t)text[i]];
        if (id != TOKENIZER_NONE)
            tokenizer_ids_add(list, id);
        else if (self->unknown != TOKENIZER_NONE && self->tokens[self->unknown].is_shown)
            tokenizer_ids_add(list, self->unknown);
        else
            for (size_t k = 0; k < sizeof shown; k++)
                tokenizer_ids_add(list, self->byte_tokens[shown[k]]);
    }
}

/* ---- text between special tokens ------------------------------------------------------------ */

/* No token has the bytes on both sides of a cut behind each other, so nothing ever joins over it:
 * the words give the same ids as the whole, at the cost of many short ones. */
static enum odsi_err encode_characters(struct encoder *self, size_t start, size_t end)
{
    const uint8_t *text = (const uint8_t *)self->buffer;
    size_t word = start;
    enum odsi_err err = ODSI_OK;
    for (size_t at = start; err == ODSI_OK && at < end;) {
        const int length = tokenizer_utf8_length(text + at, end - at);
        at += length > 0 ? (size_t)length : 1;
        if (at < end && tokenizer_has_pair(self->tokenizer, text[at - 1], text[at]))
            continue;
        err = tokenizer_join_word(&self->join, (uint32_t)word, (uint32_t)(at - word), &self->list);
        word = at;
    }
    return err;
}

static enum odsi_err encode_one_word(void *context, const char *word, size_t size)
{
    struct encoder *self = context;
    return tokenizer_join_word(&self->join, (uint32_t)(word - self->buffer), (uint32_t)size,
                               &self->list);
}

/* The patterns take UTF-8 only: bytes that are none are spelt, and what is between them is cut. */
static enum odsi_err encode_words(struct encoder *self, size_t start, size_t end)
{
    const char *text = self->buffer;
    enum odsi_err err = ODSI_OK;
    for (size_t at = start; err == ODSI_OK && at < end; at++) {
        const size_t valid = at;
        int length = 1;
        while (at < end &&
               (length = tokenizer_utf8_length((const uint8_t *)text + at, end - at)) > 0)
            at += (size_t)length;
        err = tokenizer_split_words(self->tokenizer->split, self->scratch, text + valid, at - valid,
                                    encode_one_word, self);
        if (err == ODSI_OK && at < end)
            tokenizer_spell(self->tokenizer, text + at, 1, &self->list);
    }
    return err;
}

/* Bytes [start, end) of the text. */
static enum odsi_err encode_plain(struct encoder *self, size_t start, size_t end)
{
    const struct tokenizer *tokenizer = self->tokenizer;
    if (start >= end)
        return ODSI_OK;
    start++; /* to offsets of the buffer */
    end++;
    if (tokenizer->kind == TOKENIZER_BYTE_BPE)
        return encode_words(self, start, end);
    if (tokenizer->add_space_prefix == TOKENIZER_PREFIX_ALWAYS ||
        (tokenizer->add_space_prefix == TOKENIZER_PREFIX_START && start == 1)) {
        /* What stands there has been encoded, and no word that is remembered holds it. */
        self->buffer[--start] = ' ';
    }
    return encode_characters(self, start, end);
}

/* ---- special tokens ------------------------------------------------------------------------- */

static int is_space(char byte)
{
    return byte == ' ' || (byte >= '\t' && byte <= '\r');
}

/* How many bytes from at on may be a control token. */
static size_t control_size(struct encoder *self, size_t at)
{
    while (at >= self->segment_end)
        self->segment_end += self->segments[++self->segment_index].size;
    return self->segments[self->segment_index].is_special ? self->segment_end - at : 0;
}

static enum odsi_err encode_all(struct encoder *self)
{
    const struct tokenizer *tokenizer = self->tokenizer;
    const struct tokenizer_special *special = &tokenizer->special;
    size_t plain = 0; /* what is not encoded yet begins there */
    self->segment_end = self->segment_count ? self->segments[0].size : 0;
    for (size_t at = 0; at < self->size;) {
        const uint8_t first = (uint8_t)self->text[at];
        const struct tokenizer_special_text *found = NULL;
        if (special->first[first] < special->first[first + 1])
            found = tokenizer_special_at(special, self->text + at, self->size - at,
                                         control_size(self, at));
        if (!found) {
            at++;
            continue;
        }
        const uint8_t strip = tokenizer->tokens[found->id].strip;
        size_t end = at;
        while (strip & TOKENIZER_STRIP_LEFT && end > plain && is_space(self->text[end - 1]))
            end--;
        const enum odsi_err err = encode_plain(self, plain, end);
        if (err != ODSI_OK)
            return err;
        tokenizer_ids_add(&self->list, found->id);
        at += found->size;
        while (strip & TOKENIZER_STRIP_RIGHT && at < self->size && is_space(self->text[at]))
            at++;
        plain = at;
    }
    return encode_plain(self, plain, self->size);
}

/* ---- the whole ------------------------------------------------------------------------------ */

static enum odsi_err join_segments(struct encoder *self)
{
    for (size_t i = 0; i < self->segment_count; i++) {
        const size_t size = self->segments[i].size;
        if (size > TOKENIZER_TEXT_SIZE_MAX - self->size)
            return odsi_fail(ODSI_ERR_INVALID,
                             "a text of more than %u bytes is too long to tokenize",
                             TOKENIZER_TEXT_SIZE_MAX);
        self->size += size;
    }
    const enum odsi_err err = alloc_zeroed(&self->buffer, self->size + 1, 1);
    if (err != ODSI_OK)
        return err;
    self->text = self->buffer + 1;
    size_t at = 1;
    for (size_t i = 0; i < self->segment_count; i++) {
        if (self->segments[i].size > 0)
            memcpy(self->buffer + at, self->segments[i].text, self->segments[i].size);
        at += self->segments[i].size;
    }
    return ODSI_OK;
}

static enum odsi_err encode_segments(struct encoder *self)
{
    enum odsi_err err = join_segments(self);
    if (err == ODSI_OK)
        err = tokenizer_join_open(&self->join, self->tokenizer, self->buffer, self->size + 1);
    if (err == ODSI_OK && self->tokenizer->kind == TOKENIZER_BYTE_BPE)
        err = tokenizer_split_scratch_open(&self->scratch, self->size);
    if (err == ODSI_OK)
        err = encode_all(self);
    tokenizer_split_scratch_close(&self->scratch);
    tokenizer_join_close(&self->join);
    alloc_free(self->buffer);
    return err;
}

enum odsi_err tokenizer_encode_segments(const struct tokenizer *self,
                                        const struct tokenizer_segment *segments,
                                        size_t segment_count, unsigned flags, uint32_t *tokens,
                                        uint32_t *count)
{
    struct encoder encoder = {
        .tokenizer = self,
        .segments = segments,
        .segment_count = segment_count,
        .list = {.ids = tokens, .capacity = *count},
    };
    if (flags & TOKENIZER_BOS && self->add_bos)
        tokenizer_ids_add(&encoder.list, self->bos);
    const enum odsi_err err = encode_segments(&encoder);
    if (err != ODSI_OK)
        return err;
    if (flags & TOKENIZER_BOS && self->add_eos)
        tokenizer_ids_add(&encoder.list, self->eos);
    *count = encoder.list.count;
    if (encoder.list.count > encoder.list.capacity)
        return odsi_fail(ODSI_ERR_RANGE,
                         "the text is %" PRIu32 " tokens long; %" PRIu32 " have room",
                         encoder.list.count, encoder.list.capacity);
    return ODSI_OK;
}

enum odsi_err tokenizer_encode(const struct tokenizer *self, const char *text, size_t size,
                               unsigned flags, uint32_t *tokens, uint32_t *count)
{
    const struct tokenizer_segment segment = {text, size, (flags & TOKENIZER_SPECIAL) != 0};
    return tokenizer_encode_segments(self, &segment, 1, flags, tokens, count);
}
