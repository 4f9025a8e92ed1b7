#include "worker/model/chat_template.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "worker/model/chat_source.h"

#include <string.h>

#define SHOWN_SIZE 80u /* of a template that is refused */
/* A template's own text: per message, and once. */
#define TURN_SIZE_MAX 256u
#define PROMPT_SIZE_MAX                                                                            \
    (LIMIT_PROMPT_SIZE + LIMIT_CHAT_MESSAGES * TURN_SIZE_MAX + 2 * TOKENIZER_TEMPLATE_SIZE_MAX)
#define MARKER_SIZE_MAX 64u

struct chat_template {
    const struct chat_layout *layout;
    const char *answer;   /* where the assistant begins */
    char *default_system; /* or the date; NULL: none */
    int prints_bos;
    int alternates;
    int drops_thoughts;         /* up to the last "</think>" of an answer */
    int trims_without_thoughts; /* line ends in front of an answer go in any case */
};

/* ---- recognizing ----------------------------------------------------------------------------- */

static enum odsi_err refuse(const char *text, size_t size)
{
    char shown[SHOWN_SIZE + 1];
    size_t count = 0;
    for (; count < SHOWN_SIZE && count < size; count++)
        shown[count] = text[count] >= ' ' && text[count] <= '~' ? text[count] : ' ';
    shown[count] = '\0';
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "the model's chat template is none that this build knows (it begins \"%s\"); "
                     "send a raw prompt instead",
                     shown);
}

/* What source has between from and to, the first place where it is not empty. */
static enum odsi_err take_between(char **out, const char *source, const char *from, const char *to)
{
    for (const char *at = strstr(source, from); at; at = strstr(at + 1, from)) {
        const char *first = at + strlen(from);
        const char *end = strchr(first, '`');
        const char *stop = strstr(first, to);
        /* to has the quote that ends the literal, so from and to are in the same one. */
        if (stop && stop > first && end && end >= stop && end < stop + strlen(to))
            return alloc_text(out, first, (size_t)(stop - first));
    }
    return ODSI_OK;
}

static enum odsi_err recognize(struct chat_template *self, const char *source)
{
    self->layout = chat_layout_find(source, &self->answer);
    if (!self->layout)
        return ODSI_ERR_UNSUPPORTED;
    self->prints_bos = strstr(source, "bos_token") != NULL;
    self->alternates = self->layout->flags & CHAT_ALTERNATES || strstr(source, "must alternate");
    self->drops_thoughts = strstr(source, "content.split(`</think>`)[-1].lstrip(`\n`)") != NULL;
    self->trims_without_thoughts = self->drops_thoughts &&
                                   !strstr(source, "{%if`</think>`in message.content%}") &&
                                   !strstr(source, "{%if`</think>`in content%}");
    /* Thoughts are left out in a way that we do not know. */
    if (!self->drops_thoughts && strstr(source, "`</think>`"))
        return ODSI_ERR_UNSUPPORTED;
    if (!self->layout->default_from)
        return ODSI_OK;
    const enum odsi_err err = take_between(&self->default_system, source,
                                           self->layout->default_from, self->layout->default_to);
    if (err == ODSI_OK && self->layout->flags & CHAT_DATED_SYSTEM && !self->default_system)
        return ODSI_ERR_UNSUPPORTED;
    return err;
}

enum odsi_err chat_template_open(struct chat_template **out, const char *text, size_t size)
{
    struct chat_template *self = NULL;
    struct buf source;
    *out = NULL;
    if (size == 0)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the model's file has no chat template; send a raw prompt instead");
    if (size > TOKENIZER_TEMPLATE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_RANGE, "a chat template of %zu bytes; at most %u are allowed",
                         size, TOKENIZER_TEMPLATE_SIZE_MAX);
    buf_init(&source, 2 * TOKENIZER_TEMPLATE_SIZE_MAX);
    enum odsi_err err = chat_source_spell(text, size, &source);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        goto fail;
    err = recognize(self, buf_text_view(&source));
    if (err == ODSI_ERR_UNSUPPORTED)
        err = refuse(text, size);
    if (err != ODSI_OK)
        goto fail;
    buf_free(&source);
    *out = self;
    return ODSI_OK;
fail:
    buf_free(&source);
    chat_template_close(&self);
    return err;
}

void chat_template_close(struct chat_template **self)
{
    if (!*self)
        return;
    alloc_free((*self)->default_system);
    alloc_free(*self);
    *self = NULL;
}

const char *chat_template_name(const struct chat_template *self)
{
    return self->layout->name;
}

/* ---- messages -------------------------------------------------------------------------------- */

static const char *const role_names[CHAT_ROLE_COUNT] = {"system", "user", "assistant"};

enum odsi_err chat_template_role(const char *name, enum chat_role *out)
{
    for (int role = 0; role < CHAT_ROLE_COUNT; role++)
        if (strcmp(name, role_names[role]) == 0) {
            *out = (enum chat_role)role;
            return ODSI_OK;
        }
    return odsi_fail(ODSI_ERR_INVALID, "a role is \"system\", \"user\" or \"assistant\"");
}

static enum odsi_err check_sizes(const struct chat_message *messages, uint32_t count)
{
    size_t size = 0;
    if (count == 0)
        return odsi_fail(ODSI_ERR_INVALID, "messages: there is none");
    if (count > LIMIT_CHAT_MESSAGES)
        return odsi_fail(ODSI_ERR_INVALID, "messages: %u of them; at most %u are allowed", count,
                         LIMIT_CHAT_MESSAGES);
    for (uint32_t i = 0; i < count; i++) {
        if (messages[i].size > LIMIT_PROMPT_SIZE - size)
            return odsi_fail(ODSI_ERR_INVALID,
                             "messages: they are longer than %u bytes in all, which is the most",
                             LIMIT_PROMPT_SIZE);
        size += messages[i].size;
    }
    return ODSI_OK;
}

static enum odsi_err check_roles(const struct chat_template *self,
                                 const struct chat_message *messages, uint32_t count)
{
    const struct chat_layout *layout = self->layout;
    const uint32_t first = messages[0].role == CHAT_SYSTEM;
    if (messages[count - 1].role != CHAT_USER)
        return odsi_fail(ODSI_ERR_INVALID,
                         "messages: the last one is the %s's; the model answers a user",
                         role_names[messages[count - 1].role]);
    for (uint32_t i = 0; i < count; i++) {
        const enum chat_role role = messages[i].role;
        if (role == CHAT_SYSTEM && layout->system == CHAT_SYSTEM_REFUSED)
            return odsi_fail(ODSI_ERR_INVALID,
                             "messages: entry %u is a system message, and this model's chat "
                             "template (%s) has no place for one",
                             i, layout->name);
        if (role == CHAT_SYSTEM && i > 0 && layout->system != CHAT_SYSTEM_TURN)
            return odsi_fail(ODSI_ERR_INVALID,
                             "messages: entry %u is a system message; this model's chat template "
                             "(%s) takes one only as the first",
                             i, layout->name);
        const enum chat_role turn = (i - first) % 2 == 0 ? CHAT_USER : CHAT_ASSISTANT;
        if (self->alternates && i >= first && role != turn)
            return odsi_fail(ODSI_ERR_INVALID,
                             "messages: entry %u is the %s's; with this model's chat template "
                             "(%s) user and assistant must take turns, the user first",
                             i, role_names[role], layout->name);
    }
    return ODSI_OK;
}

/* Bytes that one character of white space has at text, or 0; what Python's strip() takes. */
static size_t space_size(const char *text, size_t size)
{
    const uint8_t *at = (const uint8_t *)text;
    if (size >= 1 && ((at[0] >= 0x09 && at[0] <= 0x0d) || (at[0] >= 0x1c && at[0] <= 0x20)))
        return 1;
    if (size >= 2 && at[0] == 0xc2 && (at[1] == 0x85 || at[1] == 0xa0))
        return 2;
    if (size < 3)
        return 0;
    const uint32_t code =
        (uint32_t)(at[0] & 0x0f) << 12 | (uint32_t)(at[1] & 0x3f) << 6 | (uint32_t)(at[2] & 0x3f);
    if ((at[0] & 0xf0) != 0xe0 || (at[1] & 0xc0) != 0x80 || (at[2] & 0xc0) != 0x80)
        return 0;
    return code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
                   code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000
               ? 3
               : 0;
}

static void trim_left(const char **text, size_t *size)
{
    for (size_t step; (step = space_size(*text, *size)) > 0; *size -= step)
        *text += step;
}

static void trim_right(const char *text, size_t *size)
{
    for (size_t step = 1; step <= 3 && step <= *size; step++)
        if (space_size(text + *size - step, step) == step) {
            *size -= step;
            step = 0;
        }
}

static void drop_thoughts(const struct chat_template *self, const char **text, size_t *size)
{
    static const char mark[] = "</think>";
    const size_t mark_size = sizeof mark - 1;
    int found = 0;
    for (const char *at; (at = memmem(*text, *size, mark, mark_size)) != NULL; found = 1) {
        *size -= (size_t)(at - *text) + mark_size;
        *text = at + mark_size;
    }
    while ((found || self->trims_without_thoughts) && *size > 0 && **text == '\n') {
        ++*text;
        --*size;
    }
}

/* ---- rendering ------------------------------------------------------------------------------- */

struct rendering {
    const struct chat_template *self;
    const char *bos;
    const char *eos;
    struct chat_prompt *out;
    enum odsi_err status;
};

void chat_template_prompt_free(struct chat_prompt *prompt)
{
    buf_free(&prompt->text);
    alloc_free(prompt->segments);
    memset(prompt, 0, sizeof *prompt);
}

static void put(struct rendering *self, const char *text, size_t size, int is_special)
{
    struct chat_prompt *out = self->out;
    if (size == 0 || self->status != ODSI_OK)
        return;
    if (out->segment_count == 0 || out->segments[out->segment_count - 1].is_special != is_special) {
        if (out->segment_count == out->segment_capacity) {
            const uint32_t capacity = out->segment_capacity ? 2 * out->segment_capacity : 16;
            self->status = alloc_resize(&out->segments, capacity, sizeof *out->segments);
            if (self->status != ODSI_OK)
                return;
            out->segment_capacity = capacity;
        }
        out->segments[out->segment_count++] = (struct chat_segment){0, is_special};
    }
    out->segments[out->segment_count - 1].size += size;
    self->status = buf_append(&out->text, text, size);
}

/* A text of the layout, where {bos} and {eos} are tokens. */
static void put_layout(struct rendering *self, const char *text)
{
    for (const char *mark; (mark = strchr(text, '{')) != NULL; text = mark + strlen("{bos}")) {
        const int is_bos = strncmp(mark, "{bos}", strlen("{bos}")) == 0;
        const char *token = is_bos ? self->bos : self->eos;
        /* The first turn may begin with the token that stands in front of all already. */
        const int is_there = is_bos && self->out->text.size == strlen(self->bos);
        put(self, text, (size_t)(mark - text), 1);
        if (!is_there)
            put(self, token, strlen(token), 1);
    }
    put(self, text, strlen(text), 1);
}

/* A user message with the system message in front of it. */
static void put_folded(struct rendering *self, const struct chat_message *message,
                       const struct chat_message *folded)
{
    const struct chat_layout *layout = self->self->layout;
    const char *text = message->content;
    size_t size = message->size;
    size_t after_size = strlen(layout->fold_after);
    if (layout->flags & CHAT_TRIMS)
        trim_left(&text, &size);
    if (layout->flags & (CHAT_TRIMS | CHAT_TRIMS_FOLDED))
        trim_right(text, &size);
    if (layout->flags & CHAT_TRIMS_FOLDED && size == 0)
        trim_right(layout->fold_after, &after_size);
    put(self, layout->fold_before, strlen(layout->fold_before), 1);
    put(self, folded->content, folded->size, 0);
    put(self, layout->fold_after, after_size, 1);
    put(self, text, size, 0);
}

static void put_content(struct rendering *self, const struct chat_message *message)
{
    const unsigned flags = self->self->layout->flags;
    const char *text = message->content;
    size_t size = message->size;
    const int is_answer = message->role == CHAT_ASSISTANT;
    if (is_answer && self->self->drops_thoughts)
        drop_thoughts(self->self, &text, &size);
    if (flags & (CHAT_TRIMS | CHAT_TRIMS_FOLDED) || (flags & CHAT_TRIMS_ANSWERS && is_answer)) {
        trim_left(&text, &size);
        trim_right(text, &size);
    }
    put(self, text, size, 0);
}

static void put_turn(struct rendering *self, const struct chat_message *message,
                     const struct chat_message *folded)
{
    const struct chat_layout *layout = self->self->layout;
    if (message->role == CHAT_SYSTEM && message->size == 0 && layout->flags & CHAT_SKIPS_EMPTY)
        return;
    put_layout(self, layout->before[message->role]);
    if (folded)
        put_folded(self, message, folded);
    else
        put_content(self, message);
    put_layout(self, layout->after[message->role]);
}

/* Llama 3.1: a system turn in any case. */
static void put_dated_system(struct rendering *self, const struct chat_message *message)
{
    const struct chat_layout *layout = self->self->layout;
    const char *date = self->self->default_system;
    put_layout(self, layout->before[CHAT_SYSTEM]);
    put_layout(self, "Cutting Knowledge Date: December 2023\nToday Date: ");
    put(self, date, strlen(date), 1);
    put_layout(self, "\n\n");
    if (message)
        put_content(self, message);
    put_layout(self, layout->after[CHAT_SYSTEM]);
}

/* The turns in front of what the roles' own order gives; returns how many messages they took. */
static uint32_t put_first_system(struct rendering *self, const struct chat_message *messages)
{
    const struct chat_template *own_template = self->self;
    const struct chat_message *system = messages[0].role == CHAT_SYSTEM ? messages : NULL;
    if (own_template->layout->flags & CHAT_DATED_SYSTEM) {
        put_dated_system(self, system);
    } else if (own_template->layout->system != CHAT_SYSTEM_TURN) {
        /* It goes into a user's turn. */
    } else if (system) {
        put_turn(self, system, NULL);
    } else if (own_template->default_system) {
        const char *text = own_template->default_system;
        put_layout(self, own_template->layout->before[CHAT_SYSTEM]);
        put(self, text, strlen(text), 1);
        put_layout(self, own_template->layout->after[CHAT_SYSTEM]);
    }
    return system ? 1 : 0;
}

enum odsi_err chat_template_render(const struct chat_template *self, const char *bos,
                                   const char *eos, const struct chat_message *messages,
                                   uint32_t count, struct chat_prompt *out)
{
    enum odsi_err err = check_sizes(messages, count);
    if (err == ODSI_OK)
        err = check_roles(self, messages, count);
    if (err != ODSI_OK)
        return err;
    struct rendering rendering = {self, bos, eos, out, ODSI_OK};
    buf_init(&out->text, PROMPT_SIZE_MAX);
    if (self->prints_bos)
        put(&rendering, bos, strlen(bos), 1);
    const uint32_t first = put_first_system(&rendering, messages);
    const enum chat_system place = self->layout->system;
    for (uint32_t i = first; i < count; i++) {
        const int is_folded = first == 1 && ((place == CHAT_SYSTEM_FIRST_USER && i == 1) ||
                                             (place == CHAT_SYSTEM_LAST_USER && i == count - 1));
        put_turn(&rendering, &messages[i], is_folded ? &messages[0] : NULL);
    }
    put_layout(&rendering, self->answer);
    return rendering.status;
}

/* ---- encoding -------------------------------------------------------------------------------- */

/* The text of a token as a prompt writes it; "" for TOKENIZER_NONE. */
static enum odsi_err token_text(char **out, const struct tokenizer *tokenizer, uint32_t id)
{
    size_t size = 0;
    const char *text = tokenizer_text_view(tokenizer, id, &size);
    return alloc_text(out, text, size);
}

static int holds(const struct chat_message *messages, uint32_t count, const char *marker,
                 size_t size)
{
    for (uint32_t i = 0; i < count; i++)
        if (messages[i].size >= size && memmem(messages[i].content, messages[i].size, marker, size))
            return 1;
    return 0;
}

/* Control tokens are no danger in a message, but a vocabulary may have the borders of its turns as
 * user-defined tokens, and those are taken out of any text. */
static enum odsi_err check_marker(const struct tokenizer *tokenizer,
                                  const struct chat_message *messages, uint32_t count,
                                  const char *marker, size_t size)
{
    uint32_t ids[3 * MARKER_SIZE_MAX + 4];
    uint32_t id_count = sizeof ids / sizeof *ids;
    if (size == 0 || size > MARKER_SIZE_MAX || !holds(messages, count, marker, size))
        return ODSI_OK;
    const uint32_t id = tokenizer_find(tokenizer, marker, size);
    const enum odsi_err err = tokenizer_encode(tokenizer, marker, size, 0, ids, &id_count);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; i < id_count; i++)
        if (ids[i] == id)
            return odsi_fail(ODSI_ERR_INVALID,
                             "messages: one holds \"%.*s\", and this model cannot tell that from "
                             "the border of a turn",
                             (int)size, marker);
    return ODSI_OK;
}

/* Every <...> and [...] of a text of the layout. (The bos and the eos are control tokens in any
 * vocabulary.) */
static enum odsi_err check_markers(const struct tokenizer *tokenizer,
                                   const struct chat_message *messages, uint32_t count,
                                   const char *text)
{
    while (text && (text = strpbrk(text, "<[")) != NULL) {
        const char *end = strchr(text, *text == '<' ? '>' : ']');
        if (!end)
            break;
        const size_t size = (size_t)(end + 1 - text);
        const enum odsi_err err = check_marker(tokenizer, messages, count, text, size);
        if (err != ODSI_OK)
            return err;
        text = end + 1;
    }
    return ODSI_OK;
}

static enum odsi_err check_contents(const struct chat_template *self,
                                    const struct tokenizer *tokenizer,
                                    const struct chat_message *messages, uint32_t count)
{
    enum odsi_err err = ODSI_OK;
    for (int role = 0; role < CHAT_ROLE_COUNT && err == ODSI_OK; role++) {
        err = check_markers(tokenizer, messages, count, self->layout->before[role]);
        if (err == ODSI_OK)
            err = check_markers(tokenizer, messages, count, self->layout->after[role]);
    }
    return err;
}

static enum odsi_err encode_prompt(const struct tokenizer *tokenizer,
                                   const struct chat_prompt *prompt, uint32_t *tokens,
                                   uint32_t *count)
{
    struct tokenizer_segment *segments = NULL;
    enum odsi_err err = alloc_zeroed(&segments, prompt->segment_count, sizeof *segments);
    if (err != ODSI_OK)
        return err;
    const char *text = (const char *)prompt->text.data;
    for (uint32_t i = 0; i < prompt->segment_count; i++) {
        const struct chat_segment *segment = &prompt->segments[i];
        segments[i] = (struct tokenizer_segment){text, segment->size, segment->is_special};
        text += segment->size;
    }
    err = tokenizer_encode_segments(tokenizer, segments, prompt->segment_count, 0, tokens, count);
    alloc_free(segments);
    return err;
}

enum odsi_err chat_template_encode(const struct tokenizer *tokenizer,
                                   const struct chat_message *messages, uint32_t message_count,
                                   uint32_t *tokens, uint32_t *count)
{
    size_t size = 0;
    const char *text = tokenizer_template_view(tokenizer, &size);
    struct chat_template *self = NULL;
    struct chat_prompt prompt = {0};
    char *bos = NULL;
    char *eos = NULL;
    enum odsi_err err = chat_template_open(&self, text, size);
    if (err == ODSI_OK)
        err = token_text(&bos, tokenizer, tokenizer_bos(tokenizer));
    if (err == ODSI_OK)
        err = token_text(&eos, tokenizer, tokenizer_eos(tokenizer));
    if (err != ODSI_OK)
        goto fail;
    self->prints_bos |= tokenizer_adds_bos(tokenizer);
    err = chat_template_render(self, bos, eos, messages, message_count, &prompt);
    if (err == ODSI_OK)
        err = check_contents(self, tokenizer, messages, message_count);
    if (err == ODSI_OK)
        err = encode_prompt(tokenizer, &prompt, tokens, count);
fail:
    chat_template_prompt_free(&prompt);
    alloc_free(bos);
    alloc_free(eos);
    chat_template_close(&self);
    return err;
}
