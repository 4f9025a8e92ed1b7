#include "worker/model/chat_source.h"

#include <string.h>

#define QUOTE '`'

enum place { OUTSIDE, IN_OUTPUT, IN_STATEMENT };

struct spelling {
    const char *text;
    size_t size;
    size_t at;
    struct buf *out;
    enum place place;
    int keeps_line_end; /* the last tag was an output that does not strip what follows */
};

static int is_word(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

static int is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

static int begins(const struct spelling *self, size_t at, const char *word)
{
    const size_t size = strlen(word);
    return at <= self->size && size <= self->size - at && memcmp(self->text + at, word, size) == 0;
}

static int ends(const struct buf *out, const char *word)
{
    const size_t size = strlen(word);
    return size <= out->size && memcmp(out->data + out->size - size, word, size) == 0;
}

static void put(struct spelling *self, char c)
{
    (void)buf_append(self->out, &c, 1);
}

/* Begins a literal, or goes on with the one that it is added to. */
static void open_literal(struct spelling *self)
{
    if (self->place != OUTSIDE && ends(self->out, "`+"))
        self->out->size -= 2;
    else
        put(self, QUOTE);
}

static char unescaped(char c)
{
    return c == 'n' ? '\n' : c == 't' ? '\t' : c == 'r' ? '\r' : c;
}

/* Behind a literal and before a ']': [`name`] becomes .name. */
static void index_to_name(struct spelling *self)
{
    uint8_t *data = self->out->data;
    const size_t end = self->out->size - 1; /* of the name */
    size_t first = end;
    while (first > 0 && is_word((char)data[first - 1]))
        first--;
    if (first < 2 || first == end || data[first - 1] != QUOTE || data[first - 2] != '[')
        return;
    data[first - 2] = '.';
    memmove(data + first - 1, data + first, end - first);
    self->out->size = end - 1;
    self->at++;
}

static void spell_literal(struct spelling *self)
{
    const char quote = self->text[self->at++];
    open_literal(self);
    for (; self->at < self->size && self->text[self->at] != quote; self->at++) {
        char c = self->text[self->at];
        if (c == '\\' && self->at + 1 < self->size)
            c = unescaped(self->text[++self->at]);
        put(self, c);
    }
    self->at++;
    put(self, QUOTE);
    if (begins(self, self->at, "]") && buf_status(self->out) == ODSI_OK)
        index_to_name(self);
}

/* Text up to the next tag. */
static void spell_outside(struct spelling *self)
{
    const size_t first = self->at;
    int is_blank = 1;
    while (self->at < self->size && !begins(self, self->at, "{{") &&
           !begins(self, self->at, "{%") && !begins(self, self->at, "{#"))
        is_blank &= is_space(self->text[self->at++]);
    const size_t size = self->at - first;
    const int is_stripped = self->at + 2 < self->size && self->text[self->at + 2] == '-';
    if (is_blank &&
        (!self->keeps_line_end || is_stripped || !memchr(self->text + first, '\n', size)))
        return;
    open_literal(self);
    if (is_blank)
        put(self, '\n');
    else
        (void)buf_append(self->out, self->text + first, size);
    put(self, QUOTE);
    self->keeps_line_end = 0;
}

static void skip_comment(struct spelling *self)
{
    while (self->at < self->size && !begins(self, self->at, "#}"))
        self->at++;
    self->at += 2;
}

static void open_tag(struct spelling *self)
{
    if (begins(self, self->at, "{#")) {
        skip_comment(self);
        return;
    }
    self->place = begins(self, self->at, "{{") ? IN_OUTPUT : IN_STATEMENT;
    (void)buf_append(self->out, self->text + self->at, 2);
    self->at += 2;
    if (self->at < self->size && (self->text[self->at] == '-' || self->text[self->at] == '+'))
        self->at++;
}

/* Returns 1 when a tag ended here. */
static int close_tag(struct spelling *self)
{
    const char *mark = self->place == IN_OUTPUT ? "}}" : "%}";
    const size_t minus = begins(self, self->at, "-") ? 1 : 0;
    if (!begins(self, self->at + minus, mark))
        return 0;
    (void)buf_append(self->out, mark, 2);
    self->at += 2 + minus;
    self->keeps_line_end = self->place == IN_OUTPUT && !minus;
    self->place = OUTSIDE;
    return 1;
}

static void spell_space(struct spelling *self)
{
    while (self->at < self->size && is_space(self->text[self->at]))
        self->at++;
    if (self->at < self->size && self->out->size > 0 && is_word(self->text[self->at]) &&
        is_word((char)self->out->data[self->out->size - 1]))
        put(self, ' ');
}

static void spell_inside(struct spelling *self)
{
    const char c = self->text[self->at];
    if (close_tag(self))
        return;
    if (is_space(c)) {
        spell_space(self);
    } else if (c == '\'' || c == '"') {
        spell_literal(self);
    } else if (begins(self, self->at, ".strip()")) {
        (void)buf_append_text(self->out, "|trim");
        self->at += strlen(".strip()");
    } else {
        put(self, c);
        self->at++;
    }
}

enum odsi_err chat_source_spell(const char *text, size_t size, struct buf *out)
{
    struct spelling self = {.text = text, .size = size, .out = out};
    while (self.at < size && out->status == ODSI_OK) {
        if (self.place != OUTSIDE)
            spell_inside(&self);
        else if (begins(&self, self.at, "{{") || begins(&self, self.at, "{%") ||
                 begins(&self, self.at, "{#"))
            open_tag(&self);
        else
            spell_outside(&self);
    }
    return buf_status(out);
}
