#include "tests/unit/model/tokenizer_fixture.h"

#include "common/base/alloc.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/hf_tokenizer.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

json_t *tokenizer_vector(const char *name)
{
    char path[256];
    json_error_t error;
    snprintf(path, sizeof path, TOKENIZER_VECTORS "/%s", name);
    json_t *json = json_load_file(path, JSON_ALLOW_NUL, &error);
    cr_assert_not_null(json, "%s: %s", path, error.text);
    return json;
}

json_t *tokenizer_pipeline(const char *name)
{
    json_t *cases = tokenizer_vector("cases.json");
    json_t *out = NULL;
    size_t index;
    json_t *one;
    json_array_foreach(json_object_get(cases, "pipelines"), index, one)
    {
        if (strcmp(json_string_value(json_object_get(one, "name")), name) != 0)
            continue;
        const int is_spm = strcmp(json_string_value(json_object_get(one, "base")), "spm") == 0;
        out = tokenizer_vector(is_spm ? "spm.json" : "bytes.json");
        cr_assert_eq(json_object_update(out, json_object_get(one, "change")), 0);
        if (json_is_true(json_object_get(one, "ignore_merges")))
            json_object_set_new(json_object_get(out, "model"), "ignore_merges", json_true());
    }
    json_decref(cases);
    cr_assert_not_null(out, "no pipeline %s", name);
    return out;
}

void tokenizer_write_json(const char *folder, const char *name, const json_t *json)
{
    struct buf text;
    char *dumped = json_dumps(json, JSON_COMPACT);
    cr_assert_not_null(dumped);
    buf_init(&text, 1u << 24);
    (void)buf_append_text(&text, dumped);
    fixture_write(fixture_path(folder, name), &text);
    buf_free(&text);
    json_free_t free_text;
    json_get_alloc_funcs(NULL, &free_text);
    free_text(dumped);
}

void tokenizer_canonical(struct buf *out, const json_t *json)
{
    char *folder = fixture_folder();
    uint32_t count;
    tokenizer_write_json(folder, "tokenizer.json", json);
    buf_init(out, TOKENIZER_CANONICAL_SIZE_MAX);
    cr_assert_eq(hf_tokenizer_canonical(folder, 0, out, &count), ODSI_OK, "%s", odsi_err_text());
    fixture_folder_remove(folder);
}

struct tokenizer *tokenizer_of_bytes(const struct buf *bytes)
{
    struct tokenizer *tokenizer = NULL;
    cr_assert_eq(buf_status(bytes), ODSI_OK);
    cr_assert_eq(tokenizer_open(&tokenizer, bytes->data, bytes->size), ODSI_OK, "%s",
                 odsi_err_text());
    return tokenizer;
}

struct tokenizer *tokenizer_of_pipeline(const char *name)
{
    struct buf bytes;
    json_t *json = tokenizer_pipeline(name);
    tokenizer_canonical(&bytes, json);
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    buf_free(&bytes);
    json_decref(json);
    return tokenizer;
}

/* ---- GGUF ----------------------------------------------------------------------------------- */

#define PIECES_MAX 2048u

struct piece {
    const char *text;
    uint32_t type;
};

static uint32_t list_pieces(const json_t *json, int is_spm, struct piece pieces[PIECES_MAX])
{
    const json_t *vocab = json_object_get(json_object_get(json, "model"), "vocab");
    uint32_t count = 0;
    const char *text;
    const json_t *value;
    size_t index;
    for (uint32_t id = 0; id < PIECES_MAX; id++)
        pieces[id] = (struct piece){"", 5};
    json_object_foreach((json_t *)vocab, text, value)
    {
        const uint32_t id = (uint32_t)json_integer_value(value);
        pieces[id] = (struct piece){text, is_spm && strncmp(text, "<0x", 3) == 0 ? 6 : 1};
        count = id >= count ? id + 1 : count;
    }
    json_array_foreach(json_object_get(json, "added_tokens"), index, value)
    {
        const uint32_t id = (uint32_t)json_integer_value(json_object_get(value, "id"));
        const int is_control = json_is_true(json_object_get(value, "special"));
        text = json_string_value(json_object_get(value, "content"));
        pieces[id] = (struct piece){text, strcmp(text, "<unk>") == 0 ? 2 : is_control ? 3 : 4};
        count = id >= count ? id + 1 : count;
    }
    cr_assert_leq(count, PIECES_MAX);
    return count;
}

static void put_array(struct buf *out, const char *key, uint32_t type, uint64_t count)
{
    fixture_key(out, key, GGUF_ARRAY);
    (void)buf_append_u32(out, type);
    (void)buf_append_u64(out, count);
}

static void put_merges(struct buf *out, const json_t *merges)
{
    size_t index;
    const json_t *merge;
    put_array(out, "tokenizer.ggml.merges", GGUF_TEXT, json_array_size(merges));
    json_array_foreach(merges, index, merge)
    {
        fixture_text(out, json_string_value(merge));
    }
}

void tokenizer_gguf(struct buf *out, const json_t *json, const char *pre,
                    void (*more)(struct buf *out, uint32_t *key_count))
{
    static struct piece pieces[PIECES_MAX];
    const json_t *model = json_object_get(json, "model");
    const int is_spm = json_is_true(json_object_get(model, "byte_fallback"));
    const uint32_t count = list_pieces(json, is_spm, pieces);
    uint32_t key_count = 4;
    struct buf keys;
    buf_init(&keys, 1u << 24);
    fixture_string(&keys, "tokenizer.ggml.model", is_spm ? "llama" : "gpt2");
    put_array(&keys, "tokenizer.ggml.tokens", GGUF_TEXT, count);
    for (uint32_t id = 0; id < count; id++)
        fixture_text(&keys, pieces[id].text);
    put_array(&keys, "tokenizer.ggml.token_type", GGUF_I32, count);
    for (uint32_t id = 0; id < count; id++)
        (void)buf_append_u32(&keys, pieces[id].type);
    if (is_spm) {
        put_array(&keys, "tokenizer.ggml.scores", GGUF_F32, count);
        for (uint32_t id = 0; id < count; id++) {
            const float score = -(float)id;
            uint32_t bits;
            memcpy(&bits, &score, sizeof bits);
            (void)buf_append_u32(&keys, bits);
        }
    } else {
        put_merges(&keys, json_object_get(model, "merges"));
    }
    if (pre) {
        fixture_string(&keys, "tokenizer.ggml.pre", pre);
        key_count++;
    }
    if (more)
        more(&keys, &key_count);
    fixture_head(out, 3, 0, key_count);
    (void)buf_append(out, keys.data, keys.size);
    cr_assert_eq(buf_status(out), ODSI_OK);
    buf_free(&keys);
}

/* ---- ids ------------------------------------------------------------------------------------ */

void tokenizer_expect_ids(const struct tokenizer *tokenizer, const char *text, size_t size,
                          unsigned flags, const uint32_t *wanted, uint32_t count)
{
    static uint32_t ids[65536];
    uint32_t got = 65536;
    cr_assert_eq(tokenizer_encode(tokenizer, text, size, flags, ids, &got), ODSI_OK, "%s",
                 odsi_err_text());
    cr_assert_eq(got, count, "\"%s\" gives %u ids, not %u", text, got, count);
    for (uint32_t i = 0; i < count; i++)
        cr_assert_eq(ids[i], wanted[i], "\"%s\": id %u is %u, not %u", text, i, ids[i], wanted[i]);
}

void tokenizer_expect_back(const struct tokenizer *tokenizer, const char *text, size_t size,
                           unsigned flags, uint64_t seed)
{
    uint32_t *ids = NULL;
    char *back = NULL;
    uint32_t count = (uint32_t)(3 * size + 4);
    size_t back_size = size + 1;
    cr_assert_eq(alloc_zeroed(&ids, count, sizeof *ids), ODSI_OK);
    cr_assert_eq(alloc_zeroed(&back, back_size, 1), ODSI_OK);
    cr_assert_eq(tokenizer_encode(tokenizer, text, size, flags, ids, &count), ODSI_OK, "%s",
                 odsi_err_text());
    cr_assert_eq(tokenizer_decode(tokenizer, ids, count, back, &back_size), ODSI_OK);
    cr_assert_eq(back_size, size, "seed %llu", (unsigned long long)seed);
    cr_assert_eq(memcmp(back, text, size), 0, "seed %llu", (unsigned long long)seed);
    alloc_free(ids);
    alloc_free(back);
}
