#include "worker/gateway/model_store.h"

#include "common/base/buf.h"
#include "common/base/io.h"
#include "tests/unit/gateway/gateway_fixture.h"
#include "worker/model/manifest.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

/* A model as a worker would send it. */
struct sent {
    struct buf manifest;
    struct buf tokenizer;
    struct digest id;
};

static void seal(struct sent *self)
{
    digest_of(&self->id, self->manifest.data, self->manifest.size);
}

static void make_sent(struct sent *self, uint32_t seed, uint32_t vocab_size)
{
    fixture_model(&self->manifest, &self->tokenizer, seed, vocab_size);
    seal(self);
}

static void free_sent(struct sent *self)
{
    buf_free(&self->manifest);
    buf_free(&self->tokenizer);
}

static enum odsi_err put(struct model_store *store, const struct sent *sent,
                         struct model_card **card)
{
    return model_store_put(store, &sent->id, sent->manifest.data, sent->manifest.size,
                           sent->tokenizer.data, sent->tokenizer.size, card);
}

Test(model_store, takes_what_matches_the_model_id)
{
    struct model_store *store = NULL;
    struct model_card *card = NULL;
    struct model_card *again = NULL;
    struct sent sent;
    make_sent(&sent, 0, FIXTURE_VOCAB);
    cr_assert_eq(model_store_open(&store, NULL), ODSI_OK);
    cr_expect_eq(model_store_get(store, &sent.id, &card), ODSI_ERR_NOT_FOUND);
    cr_assert_eq(put(store, &sent, &card), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(model_store_params_view(card)->context_length, 128);
    cr_expect_eq(tokenizer_vocab_size(model_store_tokenizer_view(card)), FIXTURE_VOCAB);
    cr_assert_eq(model_store_get(store, &sent.id, &again), ODSI_OK);
    cr_expect_eq(again, card);
    model_store_release(&card);
    model_store_release(&again);
    cr_expect_null(again);
    model_store_close(&store);
    free_sent(&sent);
}

Test(model_store, refuses_what_does_not)
{
    struct model_store *store = NULL;
    struct model_card *card = NULL;
    struct sent sent;
    cr_assert_eq(model_store_open(&store, NULL), ODSI_OK);
    make_sent(&sent, 0, FIXTURE_VOCAB);
    sent.manifest.data[20] ^= 1;
    cr_expect_eq(put(store, &sent, &card), ODSI_ERR_CORRUPT, "another manifest");
    sent.manifest.data[20] ^= 1;
    sent.tokenizer.data[sent.tokenizer.size - 1] ^= 1;
    cr_expect_eq(put(store, &sent, &card), ODSI_ERR_CORRUPT, "another tokenizer");
    sent.tokenizer.data[sent.tokenizer.size - 1] ^= 1;
    sent.manifest.size--;
    seal(&sent);
    cr_expect_eq(put(store, &sent, &card), ODSI_ERR_CORRUPT, "a manifest cut short");
    free_sent(&sent);
    make_sent(&sent, 0, FIXTURE_VOCAB + 1);
    cr_expect_eq(put(store, &sent, &card), ODSI_ERR_CORRUPT, "another vocabulary");
    cr_expect_null(card);
    free_sent(&sent);
    model_store_close(&store);
}

Test(model_store, knows_models_again_after_a_restart_but_not_damaged_ones)
{
    char folder[256];
    char models[512];
    char path[1024];
    char hex[DIGEST_HEX_SIZE];
    struct model_store *store = NULL;
    struct model_card *card = NULL;
    struct sent sent;
    make_sent(&sent, 0, FIXTURE_VOCAB);
    fixture_folder_make(folder);
    fixture_path(models, folder, "models");
    cr_assert_eq(model_store_open(&store, models), ODSI_OK);
    cr_assert_eq(put(store, &sent, &card), ODSI_OK, "%s", odsi_err_text());
    model_store_release(&card);
    model_store_close(&store);
    cr_assert_eq(model_store_open(&store, models), ODSI_OK);
    cr_expect_eq(model_store_get(store, &sent.id, &card), ODSI_OK, "%s", odsi_err_text());
    model_store_release(&card);
    model_store_close(&store);

    digest_to_hex(hex, &sent.id);
    snprintf(path, sizeof path, "%s/%s.tokenizer", models, hex);
    cr_assert_eq(io_write_file(path, "broken", 6, 0600, 0), ODSI_OK);
    cr_assert_eq(model_store_open(&store, models), ODSI_OK);
    cr_expect_eq(model_store_get(store, &sent.id, &card), ODSI_ERR_NOT_FOUND);
    model_store_close(&store);
    fixture_folder_remove(models);
    fixture_folder_remove(folder);
    free_sent(&sent);
}

Test(model_store, keeps_a_bounded_number_and_forgets_the_longest_unused)
{
    struct model_store *store = NULL;
    struct model_card *cards[MODEL_STORE_MAX] = {NULL};
    struct model_card *card = NULL;
    struct sent sent[MODEL_STORE_MAX + 1];
    cr_assert_eq(model_store_open(&store, NULL), ODSI_OK);
    for (uint32_t i = 0; i <= MODEL_STORE_MAX; i++)
        make_sent(&sent[i], i, FIXTURE_VOCAB);
    for (uint32_t i = 0; i < MODEL_STORE_MAX; i++)
        cr_assert_eq(put(store, &sent[i], &cards[i]), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(put(store, &sent[MODEL_STORE_MAX], &card), ODSI_ERR_BUSY);
    model_store_release(&cards[5]);
    model_store_release(&cards[2]);
    cr_assert_eq(model_store_get(store, &sent[2].id, &card), ODSI_OK);
    model_store_release(&card);
    cr_expect_eq(put(store, &sent[MODEL_STORE_MAX], &card), ODSI_OK);
    model_store_release(&card);
    cr_expect_eq(model_store_get(store, &sent[5].id, &card), ODSI_ERR_NOT_FOUND);
    cr_assert_eq(model_store_get(store, &sent[2].id, &card), ODSI_OK);
    model_store_release(&card);
    for (uint32_t i = 0; i < MODEL_STORE_MAX; i++)
        model_store_release(&cards[i]);
    model_store_close(&store);
    for (uint32_t i = 0; i <= MODEL_STORE_MAX; i++)
        free_sent(&sent[i]);
}
