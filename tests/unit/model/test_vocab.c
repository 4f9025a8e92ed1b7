#include "worker/model/vocab.h"

#include "common/base/alloc.h"
#include "tests/unit/model/model_fixture.h"
#include "tests/unit/model/tokenizer_fixture.h"

#include <criterion/criterion.h>
#include <string.h>

/* The canonical bytes of the GGUF file that says what json says. */
static enum odsi_err canonical_of(struct buf *out, const json_t *json, const char *pre,
                                  void (*more)(struct buf *out, uint32_t *key_count))
{
    struct gguf *gguf = NULL;
    struct buf file;
    uint32_t count;
    buf_init(&file, 1u << 24);
    buf_init(out, TOKENIZER_CANONICAL_SIZE_MAX);
    tokenizer_gguf(&file, json, pre, more);
    cr_assert_eq(gguf_open_memory(&gguf, file.data, file.size), ODSI_OK, "%s", odsi_err_text());
    const enum odsi_err err = vocab_canonical(gguf, out, &count);
    gguf_close(&gguf);
    buf_free(&file);
    return err;
}

static struct tokenizer *open_gguf(const json_t *json, const char *pre,
                                   void (*more)(struct buf *out, uint32_t *key_count))
{
    struct buf bytes;
    cr_assert_eq(canonical_of(&bytes, json, pre, more), ODSI_OK, "%s", odsi_err_text());
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    buf_free(&bytes);
    return tokenizer;
}

static uint32_t id_of(const struct tokenizer *tokenizer, const char *piece)
{
    const uint32_t id = tokenizer_find(tokenizer, piece, strlen(piece));
    cr_assert_neq(id, TOKENIZER_NONE, "%s", piece);
    return id;
}

/* ---- byte-level BPE ------------------------------------------------------------------------- */

static void expect_cases(const struct tokenizer *tokenizer, const char *pipeline, unsigned flags)
{
    json_t *cases = tokenizer_vector("cases.json");
    size_t index, text_index, compared = 0;
    json_t *one, *text;
    json_array_foreach(json_object_get(cases, "pipelines"), index, one)
    {
        if (strcmp(json_string_value(json_object_get(one, "name")), pipeline) != 0)
            continue;
        json_array_foreach(json_object_get(cases, "texts"), text_index, text)
        {
            uint32_t wanted[512];
            const json_t *ids = json_array_get(json_object_get(one, "ids"), text_index);
            /* GGUF does not say that <|end|> takes the white space behind it. */
            if (strstr(json_string_value(text), "<|end|> "))
                continue;
            for (size_t i = 0; i < json_array_size(ids); i++)
                wanted[i] = (uint32_t)json_integer_value(json_array_get(ids, i));
            tokenizer_expect_ids(tokenizer, json_string_value(text), json_string_length(text),
                                 flags, wanted, (uint32_t)json_array_size(ids));
            compared++;
        }
    }
    cr_expect_gt(compared, 60);
    json_decref(cases);
}

static void more_llama3(struct buf *out, uint32_t *key_count)
{
    fixture_u32(out, "tokenizer.ggml.bos_token_id", 517);
    ++*key_count;
}

/* Goal: a GGUF file gives the ids that the Hugging Face folder it was made from gives. How: the
 * reference's ids for five pre-tokenizers, named as such files name them. */
Test(vocab, gives_the_ids_of_the_reference_for_each_pre_tokenizer)
{
    static const struct {
        const char *pipeline, *pre;
    } cases[] = {{"llama3", "llama-bpe"},
                 {"qwen2", "qwen2"},
                 {"smollm", "smollm"},
                 {"gpt-2", "gpt-2"},
                 {"tekken", "tekken"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        json_t *json = tokenizer_pipeline(cases[i].pipeline);
        const int is_llama = i == 0;
        struct tokenizer *tokenizer = open_gguf(json, cases[i].pre, is_llama ? more_llama3 : NULL);
        if (is_llama)
            cr_assert_eq(tokenizer_bos(tokenizer), id_of(tokenizer, "<s>"));
        expect_cases(tokenizer, cases[i].pipeline, TOKENIZER_BOS | TOKENIZER_SPECIAL);
        tokenizer_close(&tokenizer);
        json_decref(json);
    }
}

static void more_ends(struct buf *out, uint32_t *key_count)
{
    fixture_u32(out, "tokenizer.ggml.bos_token_id", 3);
    fixture_u32(out, "tokenizer.ggml.eos_token_id", 4);
    fixture_u32(out, "tokenizer.ggml.eot_token_id", 9);
    fixture_u32(out, "tokenizer.ggml.eom_token_id", 7);
    fixture_bool(out, "tokenizer.ggml.add_bos_token", 1);
    fixture_bool(out, "tokenizer.ggml.add_eos_token", 1);
    fixture_string(out, "tokenizer.chat_template", "{{ messages }}");
    *key_count += 7;
}

Test(vocab, takes_ids_flags_ends_and_the_template_from_the_keys)
{
    json_t *json = tokenizer_pipeline("qwen2");
    size_t size = 0;
    struct tokenizer *tokenizer = open_gguf(json, "qwen2", more_ends);
    cr_expect_eq(tokenizer_bos(tokenizer), 3);
    cr_expect_eq(tokenizer_eos(tokenizer), 4);
    for (uint32_t id = 0; id < tokenizer_vocab_size(tokenizer); id++) {
        const int wanted = id == 4 || id == 7 || id == 9 || id == id_of(tokenizer, "<|end|>") ||
                           id == id_of(tokenizer, "</s>");
        cr_expect_eq(tokenizer_is_end(tokenizer, id), wanted, "%u", id);
    }
    tokenizer_expect_ids(tokenizer, "", 0, TOKENIZER_BOS, (uint32_t[]){3, 4}, 2);
    const char *text = tokenizer_template_view(tokenizer, &size);
    cr_expect_eq(size, 14);
    cr_expect_eq(memcmp(text, "{{ messages }}", 14), 0);
    tokenizer_close(&tokenizer);

    tokenizer = open_gguf(json, "qwen2", NULL);
    cr_expect_eq(tokenizer_bos(tokenizer), TOKENIZER_NONE);
    cr_expect_eq(tokenizer_eos(tokenizer), TOKENIZER_NONE);
    tokenizer_expect_ids(tokenizer, "", 0, TOKENIZER_BOS, NULL, 0);
    (void)tokenizer_template_view(tokenizer, &size);
    cr_expect_eq(size, 0);
    tokenizer_close(&tokenizer);
    json_decref(json);
}

/* ---- SentencePiece -------------------------------------------------------------------------- */

static void more_spm(struct buf *out, uint32_t *key_count)
{
    fixture_bool(out, "tokenizer.ggml.add_space_prefix", 0);
    ++*key_count;
}

/* Goal: scores and merges in the same order are the same tokenizer. How: a vocabulary whose pieces
 * stand in the order of their merges, so that Hugging Face's ids hold for the scores, too. */
Test(vocab, gives_the_ids_of_the_reference_for_scores)
{
    static const char *const pipelines[] = {"llama2", "gemma"};
    for (size_t i = 0; i < 2; i++) {
        json_t *json = tokenizer_pipeline(pipelines[i]);
        struct tokenizer *tokenizer = open_gguf(json, NULL, i == 1 ? more_spm : NULL);
        expect_cases(tokenizer, pipelines[i], TOKENIZER_BOS | TOKENIZER_SPECIAL);
        tokenizer_close(&tokenizer);
        json_decref(json);
    }
}

static void more_phi(struct buf *out, uint32_t *key_count)
{
    fixture_string(out, "general.name", "A Phi-3 of ours");
    ++*key_count;
}

/* Goal: Phi-3's turns may end with white space, which its tokens take. */
Test(vocab, lets_the_tokens_of_phi_3_take_the_white_space_behind_them)
{
    json_t *json = tokenizer_pipeline("llama2");
    struct tokenizer *tokenizer = open_gguf(json, NULL, more_phi);
    const uint32_t end = id_of(tokenizer, "<|end|>");
    tokenizer_expect_ids(tokenizer, "<|end|> \n<|end|>", 16, TOKENIZER_SPECIAL,
                         (uint32_t[]){end, end}, 2);
    tokenizer_close(&tokenizer);
    tokenizer = open_gguf(json, NULL, NULL);
    uint32_t ids[16];
    uint32_t count = 16;
    cr_assert_eq(
        tokenizer_encode(tokenizer, "<|end|> \n<|end|>", 16, TOKENIZER_SPECIAL, ids, &count),
        ODSI_OK);
    cr_expect_gt(count, 2);
    tokenizer_close(&tokenizer);
    json_decref(json);
}

/* ---- what is refused ------------------------------------------------------------------------ */

static void expect_refused(const json_t *json, const char *pre, enum odsi_err err, const char *says)
{
    struct buf bytes;
    cr_expect_eq(canonical_of(&bytes, json, pre, NULL), err, "%s", says);
    cr_expect_not_null(strstr(odsi_err_text(), says), "\"%s\" does not say \"%s\"", odsi_err_text(),
                       says);
    buf_free(&bytes);
}

Test(vocab, refuses_what_it_does_not_do)
{
    json_t *json = tokenizer_pipeline("qwen2");
    json_t *model = json_object_get(json, "model");
    expect_refused(json, "deepseek-llm", ODSI_ERR_UNSUPPORTED, "\"deepseek-llm\" is not");
    expect_refused(json, "\x1b[2Jx", ODSI_ERR_UNSUPPORTED, "\"?[2Jx\"");
    static const char *const merges[] = {"ab", "a", " ", "a notapiece", "notapiece a"};
    for (size_t i = 0; i < sizeof merges / sizeof merges[0]; i++) {
        json_object_set_new(model, "merges", json_pack("[s,s]", "t h", merges[i]));
        expect_refused(json, "qwen2", ODSI_ERR_CORRUPT, "number 1 is not two pieces");
    }
    struct buf bytes;
    struct tokenizer *tokenizer = NULL;
    json_object_set_new(model, "merges", json_pack("[s]", "q q"));
    cr_assert_eq(canonical_of(&bytes, json, "qwen2", NULL), ODSI_OK);
    cr_expect_eq(tokenizer_open(&tokenizer, bytes.data, bytes.size), ODSI_ERR_CORRUPT);
    cr_expect_not_null(strstr(odsi_err_text(), "merge 0 is not of two normal tokens"));
    buf_free(&bytes);
    json_decref(json);
}

/* Goal: a piece that no text can give is kept as a row without a use. */
Test(vocab, keeps_pieces_outside_the_alphabet_unused)
{
    json_t *json = tokenizer_pipeline("qwen2");
    json_t *vocab = json_object_get(json_object_get(json, "model"), "vocab");
    char text[16];
    json_object_set_new(vocab, "\xe4\xbd\xa0", json_integer(1000));
    struct tokenizer *tokenizer = open_gguf(json, "qwen2", NULL);
    tokenizer_expect_back(tokenizer, "\xe4\xbd\xa0", 3, TOKENIZER_SPECIAL, 0);
    cr_expect_eq(tokenizer_find(tokenizer, "\xe4\xbd\xa0", 3), TOKENIZER_NONE);
    cr_expect_eq(tokenizer_piece(tokenizer, 1000, text), 3);
    tokenizer_close(&tokenizer);
    json_decref(json);
}

Test(vocab, reports_every_allocation_that_fails)
{
    json_t *json = tokenizer_pipeline("qwen2");
    struct gguf *gguf = NULL;
    struct buf file;
    long failing = 0;
    buf_init(&file, 1u << 24);
    tokenizer_gguf(&file, json, "qwen2", NULL);
    cr_assert_eq(gguf_open_memory(&gguf, file.data, file.size), ODSI_OK);
    for (enum odsi_err err = ODSI_ERR_NO_MEMORY; err != ODSI_OK; failing++) {
        struct buf bytes;
        uint32_t count;
        buf_init(&bytes, TOKENIZER_CANONICAL_SIZE_MAX);
        alloc_fail_after(failing);
        err = vocab_canonical(gguf, &bytes, &count);
        alloc_fail_after(-1);
        cr_assert(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY, "%s", odsi_err_text());
        buf_free(&bytes);
    }
    cr_expect_gt(failing, 3);
    gguf_close(&gguf);
    buf_free(&file);
    json_decref(json);
}
