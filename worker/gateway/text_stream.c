#include "worker/gateway/text_stream.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/buf.h"

#include <string.h>

static const char REPLACEMENT[] = "\xEF\xBF\xBD"; /* U+FFFD */

struct text_stream {
    const struct tokenizer *tokenizer;
    struct stop_string stops[LIMIT_STOP_COUNT];
    uint32_t stop_count;
    int at_start;   /* until the first token with text */
    int drop_space; /* the first byte of raw is the tokenizer's, not the answer's */
    int ended;
    struct buf raw;   /* held back: may become part of a stop string or of a character */
    struct buf ready; /* valid UTF-8 */
    size_t taken;     /* of ready */
    char piece[TOKENIZER_PIECE_SIZE_MAX + 1];
};

enum odsi_err text_stream_open(struct text_stream **out, const struct tokenizer *tokenizer,
                               const struct stop_string *stops, uint32_t stop_count, int at_start)
{
    *out = NULL;
    if (stop_count > LIMIT_STOP_COUNT)
        return odsi_fail(ODSI_ERR_INVALID, "%u stop strings; at most %u are allowed", stop_count,
                         LIMIT_STOP_COUNT);
    struct text_stream *self = NULL;
    const enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->tokenizer = tokenizer;
    self->stop_count = stop_count;
    self->at_start = at_start;
    for (uint32_t i = 0; i < stop_count; i++) {
        ODSI_ASSERT(stops[i].size > 0 && stops[i].size <= LIMIT_STOP_SIZE);
        self->stops[i] = stops[i];
    }
    buf_init(&self->raw, TEXT_STREAM_SIZE_MAX);
    buf_init(&self->ready, TEXT_STREAM_SIZE_MAX);
    *out = self;
    return ODSI_OK;
}

void text_stream_close(struct text_stream **self)
{
    if (!*self)
        return;
    buf_free(&(*self)->raw);
    buf_free(&(*self)->ready);
    alloc_free(*self);
    *self = NULL;
}

/* The length of the well-formed character at text (RFC 3629), or 0; NUL is not one here.
 * *bad_size is then how many bytes to replace: the longest beginning of a character, at least 1. */
static size_t character(const uint8_t *text, size_t size, size_t *bad_size)
{
    const uint8_t lead = text[0];
    *bad_size = 1;
    if (lead < 0x80)
        return lead != 0;
    size_t length = 0;
    uint8_t low = 0x80;
    uint8_t high = 0xBF;
    if (lead >= 0xC2 && lead <= 0xDF) {
        length = 2;
    } else if (lead >= 0xE0 && lead <= 0xEF) {
        length = 3;
        low = lead == 0xE0 ? 0xA0 : 0x80;  /* no longer form than needed */
        high = lead == 0xED ? 0x9F : 0xBF; /* no surrogates */
    } else if (lead >= 0xF0 && lead <= 0xF4) {
        length = 4;
        low = lead == 0xF0 ? 0x90 : 0x80;
        high = lead == 0xF4 ? 0x8F : 0xBF; /* up to U+10FFFF */
    }
    for (size_t i = 1; i < length; i++) {
        if (i >= size || text[i] < low || text[i] > high) {
            *bad_size = i;
            return 0;
        }
        low = 0x80;
        high = 0xBF;
    }
    return length;
}

int text_stream_is_utf8(const char *text, size_t size)
{
    size_t bad_size = 0;
    for (size_t i = 0; i < size;) {
        const size_t length = character((const uint8_t *)text + i, size - i, &bad_size);
        if (length == 0)
            return 0;
        i += length;
    }
    return 1;
}

/* Forgets what was handed out, once that is most of it. */
static void compact(struct text_stream *self)
{
    if (self->taken == 0 || self->taken < self->ready.size / 2)
        return;
    memmove(self->ready.data, self->ready.data + self->taken, self->ready.size - self->taken);
    self->ready.size -= self->taken;
    self->taken = 0;
}

/* Moves the first size bytes of raw to ready. */
static enum odsi_err release(struct text_stream *self, size_t size)
{
    compact(self);
    const uint8_t *from = self->raw.data;
    const size_t dropped = self->drop_space && size > 0;
    self->drop_space -= (int)dropped;
    for (size_t i = dropped; i < size;) {
        size_t bad_size = 0;
        const size_t length = character(from + i, size - i, &bad_size);
        if (length > 0)
            buf_append(&self->ready, from + i, length);
        else
            buf_append(&self->ready, REPLACEMENT, sizeof REPLACEMENT - 1);
        i += length > 0 ? length : bad_size;
    }
    if (size > 0) {
        memmove(self->raw.data, self->raw.data + size, self->raw.size - size);
        self->raw.size -= size;
    }
    const enum odsi_err err = buf_status(&self->ready);
    if (err == ODSI_ERR_RANGE)
        return odsi_fail(err, "the client is more than %u bytes of text behind; read faster",
                         TEXT_STREAM_SIZE_MAX);
    return err;
}

/* Where the first stop string begins in raw; raw's size when there is none. */
static size_t find_stop(const struct text_stream *self)
{
    size_t first = self->raw.size;
    for (uint32_t i = 0; i < self->stop_count && self->raw.size > 0; i++) {
        const uint8_t *at =
            memmem(self->raw.data, self->raw.size, self->stops[i].data, self->stops[i].size);
        if (at && (size_t)(at - self->raw.data) < first)
            first = (size_t)(at - self->raw.data);
    }
    return first;
}

/* How many bytes at the end of raw may be the beginning of a stop string. */
static size_t held_size(const struct text_stream *self)
{
    size_t held = 0;
    for (uint32_t i = 0; i < self->stop_count; i++) {
        const struct stop_string *stop = &self->stops[i];
        size_t size = stop->size - 1 < self->raw.size ? stop->size - 1 : self->raw.size;
        for (; size > held; size--) {
            if (memcmp(self->raw.data + self->raw.size - size, stop->data, size) == 0)
                held = size;
        }
    }
    return held;
}

/* The first token with text of an answer that nothing stands before: whether it begins with the
 * space that the tokenizer itself put there. */
static int begins_with_own_space(struct text_stream *self, uint32_t token, size_t piece_size)
{
    char text[64];
    size_t size = sizeof text;
    if (piece_size > sizeof text || self->piece[0] != ' ')
        return 0;
    return tokenizer_decode(self->tokenizer, &token, 1, text, &size) == ODSI_OK &&
           size + 1 == piece_size;
}

enum odsi_err text_stream_push(struct text_stream *self, uint32_t token, int *stopped)
{
    *stopped = 0;
    ODSI_ASSERT(!self->ended);
    const size_t piece_size = tokenizer_piece(self->tokenizer, token, self->piece);
    if (self->at_start && piece_size > 0) {
        self->drop_space = begins_with_own_space(self, token, piece_size);
        self->at_start = 0;
    }
    enum odsi_err err = buf_append(&self->raw, self->piece, piece_size);
    if (err != ODSI_OK)
        return err;
    const size_t stop = find_stop(self);
    if (stop < self->raw.size) {
        self->ended = 1;
        *stopped = 1;
        err = release(self, stop);
        buf_reset(&self->raw);
        return err;
    }
    const size_t shown = self->raw.size - held_size(self);
    return release(self, shown ? tokenizer_utf8_whole((const char *)self->raw.data, shown) : 0);
}

enum odsi_err text_stream_end(struct text_stream *self)
{
    if (self->ended)
        return ODSI_OK;
    self->ended = 1;
    return release(self, self->raw.size);
}

void text_stream_take(struct text_stream *self, size_t size_max, const char **text, size_t *size)
{
    ODSI_ASSERT(size_max >= 4);
    size_t end = self->ready.size;
    if (end - self->taken > size_max) {
        end = self->taken + size_max;
        while ((self->ready.data[end] & 0xC0) == 0x80)
            end--;
    }
    *text = end > self->taken ? (const char *)self->ready.data + self->taken : "";
    *size = end - self->taken;
    self->taken = end;
}

int text_stream_is_empty(const struct text_stream *self)
{
    return self->taken == self->ready.size;
}
