#include "worker/model/hf_tokenizer.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "tests/unit/model/model_fixture.h"
#include "tests/unit/model/tokenizer_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

/* ---- ids ------------------------------------------------------------------------------------ */

static void expect_case(const struct tokenizer *tokenizer, const json_t *text, const json_t *ids,
                        const char *pipeline)
{
    uint32_t wanted[512];
    const size_t count = json_array_size(ids);
    cr_assert_leq(count, 512);
    for (size_t i = 0; i < count; i++)
        wanted[i] = (uint32_t)json_integer_value(json_array_get(ids, i));
    cr_log_info("%s: \"%s\"", pipeline, json_string_value(text));
    tokenizer_expect_ids(tokenizer, json_string_value(text), json_string_length(text),
                         TOKENIZER_BOS | TOKENIZER_SPECIAL, wanted, (uint32_t)count);
}

/* Goal: ids are those of Hugging Face's tokenizers. How: the pipelines of eight families over two
 * small vocabularies; tests/vectors/tokenizers/make.mjs says how the ids came about. */
Test(hf_tokenizer, gives_the_ids_of_the_reference)
{
    json_t *cases = tokenizer_vector("cases.json");
    const json_t *texts = json_object_get(cases, "texts");
    size_t index, text_index;
    json_t *pipeline, *text;
    size_t compared = 0;
    json_array_foreach(json_object_get(cases, "pipelines"), index, pipeline)
    {
        const char *name = json_string_value(json_object_get(pipeline, "name"));
        const int skips = json_is_true(json_object_get(pipeline, "skips_leading_space"));
        struct tokenizer *tokenizer = tokenizer_of_pipeline(name);
        json_array_foreach(texts, text_index, text)
        {
            if (skips && json_string_value(text)[0] == ' ')
                continue;
            expect_case(tokenizer, text,
                        json_array_get(json_object_get(pipeline, "ids"), text_index), name);
            compared++;
        }
        tokenizer_close(&tokenizer);
    }
    cr_expect_gt(compared, 500);
    json_decref(cases);
}

/* ---- what the files say --------------------------------------------------------------------- */

static uint32_t id_of(const struct tokenizer *tokenizer, const char *piece)
{
    const uint32_t id = tokenizer_find(tokenizer, piece, strlen(piece));
    cr_assert_neq(id, TOKENIZER_NONE, "%s", piece);
    return id;
}

static struct tokenizer *open_folder(const char *folder, uint32_t row_count)
{
    struct buf bytes;
    uint32_t count = 0;
    buf_init(&bytes, TOKENIZER_CANONICAL_SIZE_MAX);
    cr_assert_eq(hf_tokenizer_canonical(folder, row_count, &bytes, &count), ODSI_OK, "%s",
                 odsi_err_text());
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    cr_expect_eq(tokenizer_vocab_size(tokenizer), count);
    buf_free(&bytes);
    return tokenizer;
}

Test(hf_tokenizer, takes_bos_and_ends_from_the_configuration)
{
    char *folder = fixture_folder();
    json_t *json = tokenizer_pipeline("qwen2");
    tokenizer_write_json(folder, "tokenizer.json", json);
    json_t *config = json_pack("{s:{s:s}, s:s, s:b, s:n}", "bos_token", "content", "<s>",
                               "eos_token", "</s>", "add_bos_token", 1, "pad_token");
    tokenizer_write_json(folder, "tokenizer_config.json", config);
    struct tokenizer *tokenizer = open_folder(folder, 0);
    const uint32_t bos = id_of(tokenizer, "<s>");
    cr_expect_eq(tokenizer_bos(tokenizer), bos);
    cr_expect_eq(tokenizer_eos(tokenizer), id_of(tokenizer, "</s>"));
    cr_expect(tokenizer_adds_bos(tokenizer));
    cr_expect(tokenizer_is_end(tokenizer, id_of(tokenizer, "<|end|>")), "a known name");
    cr_expect_not(tokenizer_is_end(tokenizer, id_of(tokenizer, "[X]")));
    tokenizer_close(&tokenizer);

    json_t *generation = json_pack("{s:[i,i]}", "eos_token_id", (int)bos, 5);
    tokenizer_write_json(folder, "generation_config.json", generation);
    tokenizer = open_folder(folder, 0);
    cr_expect(tokenizer_is_end(tokenizer, bos));
    cr_expect(tokenizer_is_end(tokenizer, 5));
    cr_expect_eq(tokenizer_eos(tokenizer), id_of(tokenizer, "</s>"), "the name comes first");
    tokenizer_close(&tokenizer);
    json_decref(generation);
    json_decref(config);
    json_decref(json);
    fixture_folder_remove(folder);
}

/* Goal: what is in the last file that can say it counts. How: no tokenizer_config.json. */
Test(hf_tokenizer, takes_ids_from_the_model_when_nobody_names_them)
{
    char *folder = fixture_folder();
    json_t *json = tokenizer_pipeline("qwen2");
    json_t *model = json_pack("{s:i, s:i, s:s}", "bos_token_id", 3, "eos_token_id", 4, "x", "y");
    tokenizer_write_json(folder, "tokenizer.json", json);
    tokenizer_write_json(folder, "config.json", model);
    struct tokenizer *tokenizer = open_folder(folder, 0);
    cr_expect_eq(tokenizer_bos(tokenizer), 3);
    cr_expect_eq(tokenizer_eos(tokenizer), 4);
    cr_expect_not(tokenizer_adds_bos(tokenizer));
    tokenizer_close(&tokenizer);
    json_decref(model);
    json_decref(json);
    fixture_folder_remove(folder);
}

static void expect_template(const char *folder, const char *wanted)
{
    size_t size = 0;
    struct tokenizer *tokenizer = open_folder(folder, 0);
    const char *text = tokenizer_template_view(tokenizer, &size);
    cr_expect_eq(size, strlen(wanted), "%s", wanted);
    cr_expect_eq(memcmp(text, wanted, size), 0, "%s", wanted);
    tokenizer_close(&tokenizer);
}

Test(hf_tokenizer, finds_the_chat_template_wherever_it_is)
{
    char *folder = fixture_folder();
    json_t *json = tokenizer_pipeline("gemma");
    tokenizer_write_json(folder, "tokenizer.json", json);
    expect_template(folder, "");
    json_t *config = json_pack("{s:s}", "chat_template", "{{ one }}");
    tokenizer_write_json(folder, "tokenizer_config.json", config);
    expect_template(folder, "{{ one }}");
    json_object_set_new(config, "chat_template",
                        json_pack("[{s:s,s:s},{s:s,s:s}]", "name", "tool_use", "template",
                                  "{{ t }}", "name", "default", "template", "{{ two }}"));
    tokenizer_write_json(folder, "tokenizer_config.json", config);
    expect_template(folder, "{{ two }}");
    struct buf jinja;
    buf_init(&jinja, 1u << 20);
    (void)buf_append_text(&jinja, "{{ three }}\n");
    fixture_write(fixture_path(folder, "chat_template.jinja"), &jinja);
    expect_template(folder, "{{ three }}\n");
    while (jinja.size <= TOKENIZER_TEMPLATE_SIZE_MAX)
        (void)buf_append_text(&jinja, "{{ three }}\n");
    fixture_write(fixture_path(folder, "chat_template.jinja"), &jinja);
    struct buf bytes;
    uint32_t count;
    buf_init(&bytes, TOKENIZER_CANONICAL_SIZE_MAX);
    cr_expect_eq(hf_tokenizer_canonical(folder, 0, &bytes, &count), ODSI_ERR_UNSUPPORTED);
    cr_expect_not_null(strstr(odsi_err_text(), "chat template"));
    buf_free(&bytes);
    buf_free(&jinja);
    json_decref(config);
    json_decref(json);
    fixture_folder_remove(folder);
}

Test(hf_tokenizer, fills_up_to_the_rows_of_the_model)
{
    char *folder = fixture_folder();
    char piece[64];
    json_t *json = tokenizer_pipeline("llama2");
    tokenizer_write_json(folder, "tokenizer.json", json);
    struct tokenizer *whole = open_folder(folder, 0);
    const uint32_t count = tokenizer_vocab_size(whole);
    const uint32_t added = id_of(whole, "[X]");
    cr_assert_eq(added, count - 1);

    struct tokenizer *tokenizer = open_folder(folder, count + 30);
    cr_expect_eq(tokenizer_vocab_size(tokenizer), count + 30);
    cr_expect_eq(tokenizer_piece(tokenizer, count + 29, piece), 0);
    cr_expect_eq(id_of(tokenizer, "[X]"), added);
    tokenizer_close(&tokenizer);

    tokenizer = open_folder(folder, count - 2);
    cr_expect_eq(tokenizer_vocab_size(tokenizer), count - 2);
    cr_expect_eq(tokenizer_find(tokenizer, "[X]", 3), TOKENIZER_NONE, "an added token may go");
    tokenizer_expect_back(tokenizer, "a[X]", 4, TOKENIZER_SPECIAL, 0);
    tokenizer_close(&tokenizer);

    const struct {
        uint32_t row_count;
        enum odsi_err err;
        const char *says;
    } cases[] = {
        {count - 3, ODSI_ERR_CORRUPT, "is behind the"},
        {1, ODSI_ERR_CORRUPT, "is behind the 1 rows"},
        {LIMIT_VOCAB_MAX + 1, ODSI_ERR_UNSUPPORTED, "1048577"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct buf bytes;
        uint32_t got;
        buf_init(&bytes, TOKENIZER_CANONICAL_SIZE_MAX);
        cr_expect_eq(hf_tokenizer_canonical(folder, cases[i].row_count, &bytes, &got),
                     cases[i].err);
        cr_expect_not_null(strstr(odsi_err_text(), cases[i].says), "%s", odsi_err_text());
        buf_free(&bytes);
    }
    tokenizer_close(&whole);
    json_decref(json);
    fixture_folder_remove(folder);
}

/* Goal: both ways to write merges mean the same. */
Test(hf_tokenizer, reads_merges_as_texts_and_as_pairs)
{
    static const char *const names[] = {"llama3", "gemma"};
    for (size_t i = 0; i < 2; i++) {
        struct buf texts, pairs;
        size_t index;
        json_t *merge;
        json_t *json = tokenizer_pipeline(names[i]);
        json_t *model = json_object_get(json, "model");
        tokenizer_canonical(&pairs, json);
        json_t *other = json_array();
        json_array_foreach(json_object_get(model, "merges"), index, merge)
        {
            const char *text = json_string_value(merge);
            const char *space = text ? strchr(text, ' ') : NULL;
            json_array_append_new(
                other, text ? json_pack("[s#,s]", text, (int)(space - text), space + 1)
                            : json_sprintf("%s %s", json_string_value(json_array_get(merge, 0)),
                                           json_string_value(json_array_get(merge, 1))));
        }
        json_object_set_new(model, "merges", other);
        tokenizer_canonical(&texts, json);
        cr_assert_eq(texts.size, pairs.size);
        cr_expect_eq(memcmp(texts.data, pairs.data, texts.size), 0);
        buf_free(&texts);
        buf_free(&pairs);
        json_decref(json);
    }
}

/* Goal: a name that looks like a command is one, whatever the file says about it. */
Test(hf_tokenizer, makes_control_tokens_of_names_that_look_like_them)
{
    static const char *const names[] = {"<|fim_prefix|>", "<unused7>", "<pad>",
                                        "<\xef\xbd\x9c"
                                        "x\xef\xbd\x9c>"};
    static const char *const plain[] = {"<think>", "[X]", "|>"};
    json_t *json = tokenizer_pipeline("qwen2");
    json_t *added = json_object_get(json, "added_tokens");
    int id = 2000;
    for (size_t i = 0; i < 4; i++)
        json_array_append_new(
            added, json_pack("{s:i,s:s,s:b}", "id", id++, "content", names[i], "special", 0));
    for (size_t i = 0; i < 3; i++)
        json_array_append_new(
            added, json_pack("{s:i,s:s,s:b}", "id", id++, "content", plain[i], "special", 0));
    struct buf bytes;
    tokenizer_canonical(&bytes, json);
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    for (size_t i = 0; i < 4; i++) {
        uint32_t ids[64];
        uint32_t count = 64;
        const size_t size = strlen(names[i]);
        cr_assert_eq(tokenizer_encode(tokenizer, names[i], size, 0, ids, &count), ODSI_OK);
        cr_expect_gt(count, 1, "%s", names[i]);
        count = 64;
        cr_assert_eq(tokenizer_encode(tokenizer, names[i], size, TOKENIZER_SPECIAL, ids, &count),
                     ODSI_OK);
        cr_expect_eq(count, 1, "%s", names[i]);
    }
    for (size_t i = 0; i < 3; i++) {
        const uint32_t wanted = id_of(tokenizer, plain[i]);
        tokenizer_expect_ids(tokenizer, plain[i], strlen(plain[i]), 0, &wanted, 1);
        tokenizer_expect_back(tokenizer, plain[i], strlen(plain[i]), 0, 0);
    }
    tokenizer_close(&tokenizer);
    buf_free(&bytes);
    json_decref(json);
}

/* ---- what is refused ------------------------------------------------------------------------ */

/* Sets what is at a dotted path, such as "model.vocab"; NULL value: takes it away. */
static void change(json_t *json, const char *path, const char *value)
{
    char key[64];
    json_error_t error;
    for (const char *dot; (dot = strchr(path, '.')) != NULL; path = dot + 1) {
        snprintf(key, sizeof key, "%.*s", (int)(dot - path), path);
        json = json_object_get(json, key);
        cr_assert(json_is_object(json), "%s", key);
    }
    if (!value) {
        cr_assert_eq(json_object_del(json, path), 0);
        return;
    }
    json_t *parsed = json_loads(value, JSON_DECODE_ANY, &error);
    cr_assert_not_null(parsed, "%s: %s", value, error.text);
    cr_assert_eq(json_object_set_new(json, path, parsed), 0);
}

/* Goal: a tokenizer that would get other ids than its model was trained with is refused, and the
 * sentence names what is in the way. */
Test(hf_tokenizer, refuses_what_it_does_not_do)
{
    enum { C = ODSI_ERR_CORRUPT, U = ODSI_ERR_UNSUPPORTED };
    static const struct {
        const char *pipeline, *path, *value;
        int err;
        const char *says;
    } cases[] = {
        {"qwen2", "model", NULL, C, "no model"},
        {"qwen2", "model.type", "\"Unigram\"", U, "\"Unigram\""},
        {"qwen2", "model.type", NULL, U, "only BPE"},
        {"qwen2", "model.dropout", "0.1", U, "dropout"},
        {"qwen2", "model.continuing_subword_prefix", "\"##\"", U, "continuing_subword_prefix"},
        {"qwen2", "model.end_of_word_suffix", "\"</w>\"", U, "end_of_word_suffix"},
        {"qwen2", "model.vocab", "{}", C, "no vocab"},
        {"qwen2", "model.vocab", "{\"a\": 1048576}", C, "\"a\" is no number below"},
        {"qwen2", "model.vocab", "{\"a\": -1}", C, "\"a\" is no number below"},
        {"qwen2", "model.vocab", "{\"a\": 0.5}", C, "\"a\" is no number below"},
        {"qwen2", "model.vocab", "{\"a\": 0, \"b\": 0}", C, "have the same id"},
        {"qwen2", "model.merges", NULL, C, "no merges"},
        {"qwen2", "model.merges", "[\"ab\"]", C, "merge 0 is not two pieces"},
        {"qwen2", "model.merges", "[\"a b\", 7]", C, "merge 0 is not of two pieces of the vocab"},
        {"qwen2", "model.merges", "[[\"a\"]]", C, "merge 0 is not two pieces"},
        {"qwen2", "model.merges", "[[\"a\", 1]]", C, "merge 0 is not two pieces"},
        {"qwen2", "normalizer", "{\"type\": \"Lowercase\"}", U, "{\"type\":\"Lowercase\"}"},
        {"qwen2", "normalizer", "{\"type\": \"NFKC\"}", U, "NFKC"},
        {"qwen2", "normalizer", "{\"type\": \"Sequence\"}", C, "Sequence without normalizers"},
        {"qwen2", "pre_tokenizer", "null", U, "neither byte-level BPE nor"},
        {"qwen2", "pre_tokenizer", "{\"type\": \"Whitespace\"}", U, "Whitespace"},
        {"qwen2", "pre_tokenizer", "{\"type\": \"ByteLevel\"}", U, "ByteLevel"},
        {"qwen2", "pre_tokenizer", "{\"type\": \"Split\", \"pattern\": {\"Regex\": \"x+\"}}", U,
         "x+"},
        {"qwen2", "post_processor", "{\"type\": \"BertProcessing\"}", U, "BertProcessing"},
        {"qwen2", "post_processor", "{\"type\": \"TemplateProcessing\", \"single\": []}", U,
         "post-processor"},
        {"qwen2", "added_tokens", "[{\"id\": 1}]", C, "added token 0"},
        {"qwen2", "added_tokens", "[{\"id\": 1e9, \"content\": \"x\"}]", C, "added token 0"},
        {"qwen2", "added_tokens", "[{\"id\": 1, \"content\": \"x\", \"single_word\": true}]", U,
         "single_word"},
        {"gemma", "model.ignore_merges", "true", U, "neither byte-level BPE nor"},
        {"gemma", "normalizer", "null", U, "Split"},
        {"mistral", "pre_tokenizer.split", "true", U, "Metaspace"},
        {"mistral", "pre_tokenizer.prepend_scheme", "\"often\"", U, "often"},
        {"mistral", "pre_tokenizer.replacement", "\"_\"", U, "Metaspace"},
    };
    char *folder = fixture_folder();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct buf bytes;
        uint32_t count;
        json_t *json = tokenizer_pipeline(cases[i].pipeline);
        change(json, cases[i].path, cases[i].value);
        tokenizer_write_json(folder, "tokenizer.json", json);
        buf_init(&bytes, TOKENIZER_CANONICAL_SIZE_MAX);
        const enum odsi_err err = hf_tokenizer_canonical(folder, 0, &bytes, &count);
        cr_expect_eq(err, (enum odsi_err)cases[i].err, "%s = %s: %d", cases[i].path, cases[i].value,
                     err);
        if (err != ODSI_OK)
            cr_expect_not_null(strstr(odsi_err_text(), cases[i].says), "\"%s\" does not say \"%s\"",
                               odsi_err_text(), cases[i].says);
        buf_free(&bytes);
        json_decref(json);
    }
    fixture_folder_remove(folder);
}

static void expect_file_error(const char *folder, enum odsi_err err, const char *says)
{
    struct buf bytes;
    uint32_t count;
    buf_init(&bytes, TOKENIZER_CANONICAL_SIZE_MAX);
    cr_expect_eq(hf_tokenizer_canonical(folder, 0, &bytes, &count), err);
    cr_expect_not_null(strstr(odsi_err_text(), says), "%s", odsi_err_text());
    buf_free(&bytes);
}

Test(hf_tokenizer, refuses_files_that_are_broken)
{
    char *folder = fixture_folder();
    json_t *json = tokenizer_pipeline("gpt-2");
    struct buf text;
    buf_init(&text, HF_TOKENIZER_CONFIG_SIZE_MAX + 1);
    expect_file_error(folder, ODSI_ERR_NOT_FOUND, "tokenizer.json");
    (void)buf_append_text(&text, "{\"model\": ");
    fixture_write(fixture_path(folder, "tokenizer.json"), &text);
    expect_file_error(folder, ODSI_ERR_CORRUPT, "tokenizer.json: line 1");
    buf_reset(&text);
    (void)buf_append_text(&text, "[]");
    fixture_write(fixture_path(folder, "tokenizer.json"), &text);
    expect_file_error(folder, ODSI_ERR_CORRUPT, "no JSON object");
    buf_reset(&text);
    (void)buf_append_text(&text, "{\"a\": 1, \"a\": 2}");
    fixture_write(fixture_path(folder, "tokenizer.json"), &text);
    expect_file_error(folder, ODSI_ERR_CORRUPT, "duplicate");
    tokenizer_write_json(folder, "tokenizer.json", json);
    buf_reset(&text);
    while (text.size <= HF_TOKENIZER_CONFIG_SIZE_MAX)
        cr_assert_eq(buf_append_text(&text, " "), ODSI_OK);
    fixture_write(fixture_path(folder, "config.json"), &text);
    expect_file_error(folder, ODSI_ERR_RANGE, "config.json");
    buf_free(&text);
    json_decref(json);
    fixture_folder_remove(folder);
}

Test(hf_tokenizer, reports_every_allocation_that_fails)
{
    char *folder = fixture_folder();
    json_t *json = tokenizer_pipeline("llama3");
    tokenizer_write_json(folder, "tokenizer.json", json);
    long failing = 0;
    for (enum odsi_err err = ODSI_ERR_NO_MEMORY; err != ODSI_OK; failing++) {
        struct buf bytes;
        uint32_t count;
        buf_init(&bytes, TOKENIZER_CANONICAL_SIZE_MAX);
        alloc_fail_after(failing);
        err = hf_tokenizer_canonical(folder, 3000, &bytes, &count);
        alloc_fail_after(-1);
        cr_assert(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY, "%s", odsi_err_text());
        buf_free(&bytes);
    }
    cr_expect_gt(failing, 4);
    json_decref(json);
    fixture_folder_remove(folder);
}
