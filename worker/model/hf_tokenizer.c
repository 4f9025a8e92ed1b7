#include "worker/model/hf_tokenizer.h"

#include "common/base/alloc.h"
#include "common/base/bytes.h"
#include "common/base/io.h"
#include "common/base/limits.h"
#include "worker/model/hf_pipeline.h"
#include "worker/model/tokenizer_parts.h"
#include "worker/model/tokenizer_write.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#define SPACE_MARK "\xe2\x96\x81" /* U+2581 */

struct hf_token {
    const char *piece; /* in the JSON; NULL: no such id */
    size_t size;
    uint8_t type; /* without the strip bits */
    uint8_t strip;
};

struct files {
    json_t *tokenizer;
    json_t *config;      /* tokenizer_config.json; NULL: there is none, also below */
    json_t *special_map; /* special_tokens_map.json */
    json_t *generation;  /* generation_config.json */
    json_t *model;       /* config.json */
    struct buf chat_template;
};

struct hf_tokenizer {
    struct files files;
    const json_t *vocab; /* piece to id */
    const json_t *added;
    struct tokenizer_head head;
    struct hf_pipeline_ends ends;
    uint32_t count;
    struct hf_token *tokens; /* [count] */
    char *text;              /* [2 * TOKENIZER_PIECE_SIZE_MAX + 1] */
};

/* ---- files ---------------------------------------------------------------------------------- */

/* *out stays NULL when an optional file is not there. Integers become reals: some files have one
 * of 31 digits for "no limit", and ids are exact as reals too. */
static enum odsi_err read_json(const char *folder, const char *name, size_t size_max, json_t **out)
{
    char path[IO_PATH_SIZE];
    struct buf text;
    json_error_t error;
    if (snprintf(path, sizeof path, "%s/%s", folder, name) >= (int)sizeof path)
        return odsi_fail(ODSI_ERR_RANGE, "%s/%s: the path is too long", folder, name);
    buf_init(&text, size_max);
    enum odsi_err err = io_read_file(path, &text);
    if (err == ODSI_OK) {
        *out = json_loadb((const char *)text.data, text.size,
                          JSON_REJECT_DUPLICATES | JSON_DECODE_INT_AS_REAL, &error);
        if (!*out)
            err = odsi_fail(ODSI_ERR_CORRUPT, "%s: line %d: %s", path, error.line, error.text);
        else if (!json_is_object(*out))
            err = odsi_fail(ODSI_ERR_CORRUPT, "%s: it is no JSON object", path);
    }
    buf_free(&text);
    return err;
}

static enum odsi_err optional(enum odsi_err err)
{
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

static enum odsi_err read_files(struct files *self, const char *folder)
{
    const size_t size_max = HF_TOKENIZER_CONFIG_SIZE_MAX;
    char path[IO_PATH_SIZE];
    enum odsi_err err =
        read_json(folder, "tokenizer.json", HF_TOKENIZER_FILE_SIZE_MAX, &self->tokenizer);
    if (err == ODSI_OK)
        err = optional(read_json(folder, "tokenizer_config.json", size_max, &self->config));
    if (err == ODSI_OK)
        err = optional(read_json(folder, "special_tokens_map.json", size_max, &self->special_map));
    if (err == ODSI_OK)
        err = optional(read_json(folder, "generation_config.json", size_max, &self->generation));
    if (err == ODSI_OK)
        err = optional(read_json(folder, "config.json", size_max, &self->model));
    if (err != ODSI_OK)
        return err;
    (void)snprintf(path, sizeof path, "%s/chat_template.jinja", folder); /* shorter than above */
    return optional(io_read_file(path, &self->chat_template));
}

static void close_files(struct files *self)
{
    json_decref(self->tokenizer);
    json_decref(self->config);
    json_decref(self->special_map);
    json_decref(self->generation);
    json_decref(self->model);
    buf_free(&self->chat_template);
}

/* ---- tokens --------------------------------------------------------------------------------- */

/* An id below LIMIT_VOCAB_MAX. */
static int read_id(const json_t *value, uint32_t *out)
{
    const double id = json_real_value(value);
    if (!json_is_real(value) || !(id >= 0.0 && id < (double)LIMIT_VOCAB_MAX))
        return 0;
    *out = (uint32_t)id;
    return *out == id;
}

/* The greatest id there is, and one more. */
static enum odsi_err count_tokens(struct hf_tokenizer *self)
{
    const char *piece;
    const json_t *value;
    size_t index;
    uint32_t id;
    self->vocab = json_object_get(json_object_get(self->files.tokenizer, "model"), "vocab");
    self->added = json_object_get(self->files.tokenizer, "added_tokens");
    if (json_object_size(self->vocab) == 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer.json: the model has no vocab");
    json_object_foreach((json_t *)self->vocab, piece, value)
    {
        if (!read_id(value, &id))
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tokenizer.json: the id of \"%.60s\" is no number below %u", piece,
                             LIMIT_VOCAB_MAX);
        self->count = id >= self->count ? id + 1 : self->count;
    }
    json_array_foreach(self->added, index, value)
    {
        if (!read_id(json_object_get(value, "id"), &id) ||
            !json_is_string(json_object_get(value, "content")))
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tokenizer.json: added token %zu has no content, or no id below %u",
                             index, LIMIT_VOCAB_MAX);
        self->count = id >= self->count ? id + 1 : self->count;
    }
    return ODSI_OK;
}

static int is_byte_name(const char *piece, size_t size)
{
    uint8_t byte;
    char digits[3] = {0};
    if (size != 6 || memcmp(piece, "<0x", 3) != 0 || piece[5] != '>')
        return 0;
    memcpy(digits, piece + 3, 2);
    return bytes_from_hex(&byte, 1, digits);
}

static enum odsi_err take_vocab(struct hf_tokenizer *self)
{
    const json_t *model = json_object_get(self->files.tokenizer, "model");
    const int has_bytes = json_is_true(json_object_get(model, "byte_fallback"));
    const char *piece;
    const json_t *value;
    json_object_foreach((json_t *)self->vocab, piece, value)
    {
        struct hf_token *token = &self->tokens[(uint32_t)json_real_value(value)];
        if (token->piece)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tokenizer.json: \"%.60s\" and \"%.60s\" have the same id", piece,
                             token->piece);
        token->piece = piece;
        token->size = strlen(piece);
        token->type =
            has_bytes && self->head.kind != TOKENIZER_BYTE_BPE && is_byte_name(piece, token->size)
                ? TOKENIZER_BYTE
                : TOKENIZER_NORMAL;
    }
    return ODSI_OK;
}

static int begins_and_ends(const char *text, size_t size, const char *first, const char *last)
{
    const size_t first_size = strlen(first);
    const size_t last_size = strlen(last);
    return size >= first_size + last_size && memcmp(text, first, first_size) == 0 &&
           memcmp(text + size - last_size, last, last_size) == 0;
}

/* Files forget to mark tokens that no text should be able to name. */
static int looks_special(const char *text, size_t size)
{
    static const char *const names[] = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(names[i], text) == 0)
            return 1;
    return begins_and_ends(text, size, "<|", "|>") ||
           begins_and_ends(text, size, "<\xef\xbd\x9c", "\xef\xbd\x9c>") || /* full-width bars */
           begins_and_ends(text, size, "<unused", ">");
}

static enum odsi_err take_added_token(struct hf_tokenizer *self, const json_t *added)
{
    const json_t *content = json_object_get(added, "content");
    const char *piece = json_string_value(content);
    const size_t size = json_string_length(content);
    struct hf_token *token = &self->tokens[(uint32_t)json_real_value(json_object_get(added, "id"))];
    if (json_is_true(json_object_get(added, "single_word")))
        return odsi_fail(
            ODSI_ERR_UNSUPPORTED,
            "tokenizer.json: the added token \"%.60s\" is marked single_word, which is "
            "not supported",
            piece);
    const int is_special =
        json_is_true(json_object_get(added, "special")) || looks_special(piece, size);
    if (!is_special && token->piece && self->head.kind == TOKENIZER_SPM_MERGES &&
        strstr(piece, SPACE_MARK))
        return ODSI_OK;
    token->piece = piece;
    token->size = size;
    token->type = is_special ? TOKENIZER_CONTROL : TOKENIZER_USER_DEFINED;
    token->strip =
        (uint8_t)((json_is_true(json_object_get(added, "lstrip")) ? TOKENIZER_STRIP_LEFT : 0) |
                  (json_is_true(json_object_get(added, "rstrip")) ? TOKENIZER_STRIP_RIGHT : 0));
    return ODSI_OK;
}

static enum odsi_err take_tokens(struct hf_tokenizer *self)
{
    size_t index;
    const json_t *added;
    enum odsi_err err = alloc_zeroed(&self->tokens, self->count, sizeof *self->tokens);
    if (err == ODSI_OK)
        err = take_vocab(self);
    json_array_foreach(self->added, index, added)
    {
        if (err == ODSI_OK)
            err = take_added_token(self, added);
    }
    return err;
}

/* ---- ids ------------------------------------------------------------------------------------ */

/* The id of a token by its text; TOKENIZER_NONE for NULL and for what is not there. */
static uint32_t find_token(const struct hf_tokenizer *self, const char *text)
{
    size_t index;
    const json_t *added;
    uint32_t id = TOKENIZER_NONE;
    if (!text)
        return TOKENIZER_NONE;
    json_array_foreach(self->added, index, added)
    {
        if (strcmp(json_string_value(json_object_get(added, "content")), text) == 0)
            (void)read_id(json_object_get(added, "id"), &id);
    }
    if (id == TOKENIZER_NONE)
        (void)read_id(json_object_get(self->vocab, text), &id);
    return id;
}

/* A special token as the configuration files write it: a text, or an object with its content. */
static uint32_t named_id(const struct hf_tokenizer *self, const json_t *file, const char *key)
{
    const json_t *value = json_object_get(file, key);
    if (json_is_object(value))
        value = json_object_get(value, "content");
    return find_token(self, json_string_value(value));
}

/* Adds the ids under key, a number or a list of them, to the ends; *first is set to the first one
 * when it is none yet. */
static enum odsi_err take_end_ids(struct hf_tokenizer *self, const json_t *file, uint32_t *first)
{
    const json_t *value = json_object_get(file, "eos_token_id");
    const size_t count = json_is_array(value) ? json_array_size(value) : 1;
    enum odsi_err err = ODSI_OK;
    for (size_t i = 0; err == ODSI_OK && i < count; i++) {
        uint32_t id = TOKENIZER_NONE;
        const json_t *one = json_is_array(value) ? json_array_get(value, i) : value;
        if (!read_id(one, &id) || id >= self->count)
            continue;
        if (*first == TOKENIZER_NONE)
            *first = id;
        err = tokenizer_write_add_end(&self->head, id);
    }
    return err;
}

static enum odsi_err find_ends(struct hf_tokenizer *self)
{
    struct tokenizer_head *head = &self->head;
    enum odsi_err err = take_end_ids(self, self->files.generation, &head->eos);
    if (err == ODSI_OK)
        err = take_end_ids(self, self->files.model, &head->eos);
    for (uint32_t id = 0; err == ODSI_OK && id < self->count; id++) {
        const struct hf_token *token = &self->tokens[id];
        if ((token->type == TOKENIZER_CONTROL || token->type == TOKENIZER_USER_DEFINED) &&
            tokenizer_write_is_end_name(token->piece, token->size))
            err = tokenizer_write_add_end(head, id);
    }
    return err;
}

/* What surrounds a text: the post-processor says it, and the configuration has the last word. */
static enum odsi_err find_surroundings(struct hf_tokenizer *self)
{
    struct tokenizer_head *head = &self->head;
    const json_t *add_bos = json_object_get(self->files.config, "add_bos_token");
    const json_t *add_eos = json_object_get(self->files.config, "add_eos_token");
    const uint32_t first = find_token(self, self->ends.first);
    const uint32_t last = find_token(self, self->ends.last);
    if (head->bos == TOKENIZER_NONE)
        head->bos = first;
    if (head->eos == TOKENIZER_NONE)
        head->eos = last;
    if ((self->ends.first && first != head->bos) || (self->ends.last && last != head->eos))
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tokenizer.json: its post-processor puts other tokens around a text than "
                         "the bos and eos");
    head->add_bos = json_is_boolean(add_bos) ? json_is_true(add_bos) : self->ends.first != NULL;
    head->add_eos = json_is_boolean(add_eos) ? json_is_true(add_eos) : self->ends.last != NULL;
    if (head->bos == TOKENIZER_NONE)
        head->add_bos = 0;
    if (head->eos == TOKENIZER_NONE)
        head->add_eos = 0;
    return ODSI_OK;
}

static enum odsi_err find_ids(struct hf_tokenizer *self)
{
    struct tokenizer_head *head = &self->head;
    const struct files *files = &self->files;
    const json_t *model = json_object_get(files->tokenizer, "model");
    head->bos = named_id(self, files->config, "bos_token");
    head->eos = named_id(self, files->config, "eos_token");
    if (head->bos == TOKENIZER_NONE)
        head->bos = named_id(self, files->special_map, "bos_token");
    if (head->eos == TOKENIZER_NONE)
        head->eos = named_id(self, files->special_map, "eos_token");
    head->unknown = named_id(self, model, "unk_token");
    if (head->unknown != TOKENIZER_NONE && head->kind == TOKENIZER_SPM_MERGES)
        self->tokens[head->unknown].type = TOKENIZER_UNKNOWN;
    enum odsi_err err = find_ends(self);
    if (err == ODSI_OK)
        err = find_surroundings(self);
    const json_t *const others[] = {files->generation, files->model};
    for (size_t i = 0; i < 2 && head->bos == TOKENIZER_NONE; i++) {
        uint32_t id = TOKENIZER_NONE;
        if (read_id(json_object_get(others[i], "bos_token_id"), &id) && id < self->count)
            head->bos = id;
    }
    return err;
}

/* As many tokens as the model has rows. What goes must not be one that a text needs. */
static enum odsi_err fit_rows(struct hf_tokenizer *self, uint32_t row_count)
{
    struct tokenizer_head *head = &self->head;
    if (row_count == 0 || row_count == self->count)
        return ODSI_OK;
    if (row_count > LIMIT_VOCAB_MAX)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "a model of %" PRIu32 " tokens; %u is the most",
                         row_count, LIMIT_VOCAB_MAX);
    for (uint32_t id = row_count; id < self->count; id++) {
        const struct hf_token *token = &self->tokens[id];
        if (token->type == TOKENIZER_NORMAL || token->type == TOKENIZER_BYTE || id == head->bos ||
            id == head->eos || id == head->unknown)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "tokenizer.json: token %" PRIu32 " is behind the %" PRIu32
                             " rows of the model",
                             id, row_count);
    }
    while (head->end_count > 0 && head->ends[head->end_count - 1] >= row_count)
        head->end_count--;
    if (row_count > self->count) {
        const enum odsi_err err = alloc_resize(&self->tokens, row_count, sizeof *self->tokens);
        if (err != ODSI_OK)
            return err;
        memset(self->tokens + self->count, 0, (row_count - self->count) * sizeof *self->tokens);
    }
    self->count = row_count;
    return ODSI_OK;
}

/* ---- writing -------------------------------------------------------------------------------- */

static enum odsi_err write_tokens(struct hf_tokenizer *self, struct buf *out)
{
    enum odsi_err err = ODSI_OK;
    for (uint32_t id = 0; err == ODSI_OK && id < self->count; id++) {
        struct hf_token *token = &self->tokens[id];
        const char *piece = token->piece ? token->piece : "";
        size_t size = token->size;
        if (!token->piece)
            token->type = TOKENIZER_UNUSED;
        if (self->head.kind == TOKENIZER_BYTE_BPE && token->type == TOKENIZER_NORMAL &&
            size <= TOKENIZER_PIECE_SIZE_MAX) {
            if (tokenizer_write_undo_alphabet(self->text, &size, piece, size))
                piece = self->text;
            else
                token->type = TOKENIZER_UNUSED; /* no text can give such a piece */
        }
        err = tokenizer_write_token(out, 0.0f, token->type | token->strip, piece, size);
    }
    return err;
}

/* The two pieces of a merge, "left right" or ["left", "right"]. */
static int merge_pieces(const json_t *merge, const char *pieces[2], size_t sizes[2])
{
    if (json_is_array(merge) && json_array_size(merge) == 2) {
        for (size_t i = 0; i < 2; i++) {
            pieces[i] = json_string_value(json_array_get(merge, i));
            sizes[i] = json_string_length(json_array_get(merge, i));
        }
        return pieces[0] && pieces[1];
    }
    const char *text = json_string_value(merge);
    const char *space = text ? strchr(text, ' ') : NULL;
    if (!space)
        return 0;
    pieces[0] = text;
    sizes[0] = (size_t)(space - text);
    pieces[1] = space + 1;
    sizes[1] = json_string_length(merge) - sizes[0] - 1;
    return 1;
}

static int find_piece(const struct hf_tokenizer *self, const char *piece, size_t size, uint32_t *id)
{
    return read_id(json_object_getn(self->vocab, piece, size), id) && *id < self->count;
}

/* Counts the merge when it is one of normal tokens: the others join what is cut out of the text
 * before, as Gemma's runs of line ends are. */
static enum odsi_err write_merge(struct hf_tokenizer *self, const json_t *merge, size_t rank,
                                 struct buf *out, uint32_t *count)
{
    const char *pieces[2];
    size_t sizes[2];
    uint32_t ids[3];
    if (!merge_pieces(merge, pieces, sizes) || sizes[0] > TOKENIZER_PIECE_SIZE_MAX ||
        sizes[1] > TOKENIZER_PIECE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer.json: merge %zu is not two pieces", rank);
    memcpy(self->text, pieces[0], sizes[0]);
    memcpy(self->text + sizes[0], pieces[1], sizes[1]);
    if (!find_piece(self, pieces[0], sizes[0], &ids[0]) ||
        !find_piece(self, pieces[1], sizes[1], &ids[1]) ||
        !find_piece(self, self->text, sizes[0] + sizes[1], &ids[2]))
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "tokenizer.json: merge %zu is not of two pieces of the vocab that make a "
                         "third",
                         rank);
    for (size_t i = 0; i < 3; i++)
        if (self->tokens[ids[i]].type != TOKENIZER_NORMAL)
            return ODSI_OK;
    tokenizer_write_merge(out, ids[0], ids[1]);
    ++*count;
    return buf_status(out);
}

static enum odsi_err write_merges(struct hf_tokenizer *self, struct buf *out)
{
    const json_t *model = json_object_get(self->files.tokenizer, "model");
    const json_t *merges = json_object_get(model, "merges");
    const size_t count_at = out->size;
    uint32_t count = 0;
    size_t rank;
    const json_t *merge;
    if (!json_is_array(merges))
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer.json: the model has no merges");
    tokenizer_write_merge_count(out, 0); /* how many is known at the end */
    json_array_foreach(merges, rank, merge)
    {
        const enum odsi_err err = write_merge(self, merge, rank, out, &count);
        if (err != ODSI_OK)
            return err;
    }
    if (buf_status(out) == ODSI_OK)
        for (size_t i = 0; i < 4; i++)
            out->data[count_at + i] = (uint8_t)(count >> 8 * i);
    return buf_status(out);
}

/* The text of the chat template: a file of its own, or a text in tokenizer_config.json, or there
 * one of several with names. */
static void find_template(const struct files *files, const char **text, size_t *size)
{
    const json_t *value = json_object_get(files->config, "chat_template");
    const json_t *chosen = value;
    if (json_is_array(value)) {
        size_t index;
        const json_t *one;
        chosen = json_object_get(json_array_get(value, 0), "template");
        json_array_foreach(value, index, one)
        {
            const char *name = json_string_value(json_object_get(one, "name"));
            if (name && strcmp(name, "default") == 0)
                chosen = json_object_get(one, "template");
        }
    }
    *text = json_string_value(chosen);
    *size = json_string_length(chosen);
    if (files->chat_template.size > 0) {
        *text = (const char *)files->chat_template.data;
        *size = files->chat_template.size;
    }
}

static enum odsi_err write_all(struct hf_tokenizer *self, struct buf *out)
{
    const char *chat_template;
    size_t template_size;
    tokenizer_write_head(out, &self->head, self->count);
    enum odsi_err err = write_tokens(self, out);
    if (err == ODSI_OK)
        err = write_merges(self, out);
    find_template(&self->files, &chat_template, &template_size);
    /* A full buffer has refused what came before, too, and this says so. */
    if (err == ODSI_OK || err == ODSI_ERR_RANGE)
        err = tokenizer_write_template(out, chat_template, template_size);
    return err;
}

enum odsi_err hf_tokenizer_canonical(const char *folder, uint32_t row_count, struct buf *out,
                                     uint32_t *count)
{
    struct hf_tokenizer self = {.head = {.bos = TOKENIZER_NONE}};
    buf_init(&self.files.chat_template, HF_TOKENIZER_CONFIG_SIZE_MAX);
    enum odsi_err err = read_files(&self.files, folder);
    if (err == ODSI_OK)
        err = hf_pipeline_read(self.files.tokenizer, &self.head, &self.ends);
    if (err == ODSI_OK)
        err = count_tokens(&self);
    if (err == ODSI_OK)
        err = take_tokens(&self);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self.text, 2 * (size_t)TOKENIZER_PIECE_SIZE_MAX + 1, 1);
    if (err == ODSI_OK)
        err = find_ids(&self);
    if (err == ODSI_OK)
        err = fit_rows(&self, row_count);
    if (err == ODSI_OK)
        err = write_all(&self, out);
    *count = self.count;
    close_files(&self.files);
    alloc_free(self.tokens);
    alloc_free(self.text);
    return err;
}
