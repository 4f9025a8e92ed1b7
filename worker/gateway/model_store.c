#include "worker/gateway/model_store.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/buf.h"
#include "common/base/io.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "worker/model/manifest.h"

#include <stdio.h>
#include <string.h>

#define TOKENIZER_SIZE_MAX (64u << 20)

struct model_card {
    struct digest id;
    struct model_params params;
    struct tokenizer *tokenizer;
    uint32_t use_count;
    uint64_t last_use; /* on the store's counter */
};

struct model_store {
    char folder[IO_PATH_SIZE]; /* "": nothing is kept */
    struct model_card *cards[MODEL_STORE_MAX];
    uint64_t uses;
};

enum odsi_err model_store_open(struct model_store **out, const char *folder)
{
    struct model_store *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err == ODSI_OK && folder)
        err = io_make_folders(folder, 0700);
    if (err != ODSI_OK) {
        alloc_free(self);
        return err;
    }
    snprintf(self->folder, sizeof self->folder, "%s", folder ? folder : "");
    *out = self;
    return ODSI_OK;
}

static void card_free(struct model_card **card)
{
    if (!*card)
        return;
    ODSI_ASSERT((*card)->use_count == 0);
    tokenizer_close(&(*card)->tokenizer);
    alloc_free(*card);
    *card = NULL;
}

void model_store_close(struct model_store **self)
{
    if (!*self)
        return;
    for (uint32_t i = 0; i < MODEL_STORE_MAX; i++)
        card_free(&(*self)->cards[i]);
    alloc_free(*self);
    *self = NULL;
}

static struct model_card *use(struct model_store *self, struct model_card *card)
{
    card->use_count++;
    card->last_use = ++self->uses;
    return card;
}

static struct model_card *find(struct model_store *self, const struct digest *model_id)
{
    for (uint32_t i = 0; i < MODEL_STORE_MAX; i++)
        if (self->cards[i] && digest_equal(&self->cards[i]->id, model_id))
            return self->cards[i];
    return NULL;
}

/* A free place, or that of the model that nobody has used for longest; NULL when all are in use. */
static struct model_card **find_place(struct model_store *self)
{
    struct model_card **oldest = NULL;
    for (uint32_t i = 0; i < MODEL_STORE_MAX; i++) {
        struct model_card **place = &self->cards[i];
        if (!*place)
            return place;
        if ((*place)->use_count == 0 && (!oldest || (*place)->last_use < (*oldest)->last_use))
            oldest = place;
    }
    return oldest;
}

static enum odsi_err check(struct model_card *card, const struct digest *model_id,
                           const uint8_t *manifest, size_t manifest_size, const uint8_t *tokenizer,
                           size_t tokenizer_size)
{
    struct digest digest;
    struct digest tokenizer_digest;
    if (manifest_size > MANIFEST_SIZE_MAX || tokenizer_size > TOKENIZER_SIZE_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "a manifest of %zu and a tokenizer of %zu bytes",
                         manifest_size, tokenizer_size);
    digest_of(&digest, manifest, manifest_size);
    if (!digest_equal(&digest, model_id))
        return odsi_fail(ODSI_ERR_CORRUPT, "the manifest is that of another model");
    enum odsi_err err = manifest_read(manifest, manifest_size, &card->params, &tokenizer_digest);
    if (err != ODSI_OK)
        return err;
    digest_of(&digest, tokenizer, tokenizer_size);
    if (!digest_equal(&digest, &tokenizer_digest))
        return odsi_fail(ODSI_ERR_CORRUPT, "the tokenizer is not the one in the manifest");
    err = tokenizer_open(&card->tokenizer, tokenizer, tokenizer_size);
    if (err != ODSI_OK)
        return err;
    if (tokenizer_vocab_size(card->tokenizer) != card->params.vocab_size)
        return odsi_fail(ODSI_ERR_CORRUPT, "the tokenizer has %u tokens, the model %u",
                         tokenizer_vocab_size(card->tokenizer), card->params.vocab_size);
    return ODSI_OK;
}

static enum odsi_err add(struct model_store *self, const struct digest *model_id,
                         const uint8_t *manifest, size_t manifest_size, const uint8_t *tokenizer,
                         size_t tokenizer_size, struct model_card **out)
{
    struct model_card *card = NULL;
    struct model_card **place = find_place(self);
    if (!place)
        return odsi_fail(ODSI_ERR_BUSY, "%u other models are in use; try again later",
                         MODEL_STORE_MAX);
    enum odsi_err err = alloc_zeroed(&card, 1, sizeof *card);
    if (err == ODSI_OK)
        err = check(card, model_id, manifest, manifest_size, tokenizer, tokenizer_size);
    if (err != ODSI_OK) {
        card_free(&card);
        return err;
    }
    card->id = *model_id;
    card_free(place);
    *place = card;
    *out = use(self, card);
    return ODSI_OK;
}

static enum odsi_err file_path(const struct model_store *self, char *out,
                               const struct digest *model_id, const char *what)
{
    char hex[DIGEST_HEX_SIZE];
    digest_to_hex(hex, model_id);
    const int size = snprintf(out, IO_PATH_SIZE, "%s/%s.%s", self->folder, hex, what);
    return size > 0 && (unsigned)size < IO_PATH_SIZE
               ? ODSI_OK
               : odsi_fail(ODSI_ERR_RANGE, "the folder's name is too long");
}

static enum odsi_err load(struct model_store *self, const struct digest *model_id,
                          struct model_card **out)
{
    char path[IO_PATH_SIZE];
    struct buf manifest;
    struct buf tokenizer;
    buf_init(&manifest, MANIFEST_SIZE_MAX);
    buf_init(&tokenizer, TOKENIZER_SIZE_MAX);
    enum odsi_err err = file_path(self, path, model_id, "manifest");
    if (err == ODSI_OK)
        err = io_read_file(path, &manifest);
    if (err == ODSI_OK)
        err = file_path(self, path, model_id, "tokenizer");
    if (err == ODSI_OK)
        err = io_read_file(path, &tokenizer);
    if (err == ODSI_OK)
        err =
            add(self, model_id, manifest.data, manifest.size, tokenizer.data, tokenizer.size, out);
    buf_free(&manifest);
    buf_free(&tokenizer);
    return err;
}

enum odsi_err model_store_get(struct model_store *self, const struct digest *model_id,
                              struct model_card **out)
{
    *out = NULL;
    struct model_card *card = find(self, model_id);
    if (card) {
        *out = use(self, card);
        return ODSI_OK;
    }
    const enum odsi_err err = self->folder[0] ? load(self, model_id, out) : ODSI_ERR_NOT_FOUND;
    if (err == ODSI_OK || err == ODSI_ERR_BUSY || err == ODSI_ERR_NO_MEMORY)
        return err;
    if (err != ODSI_ERR_NOT_FOUND)
        log_line(LOG_WARN, "a kept model is asked for again: %s", odsi_err_text());
    return odsi_fail(ODSI_ERR_NOT_FOUND, "the model is not known here yet");
}

/* Only saves the next start a request, so trouble with it is told and passed over. */
static void keep(const struct model_store *self, const struct digest *model_id, const char *what,
                 const uint8_t *data, size_t size)
{
    char path[IO_PATH_SIZE];
    enum odsi_err err = file_path(self, path, model_id, what);
    if (err == ODSI_OK)
        err = io_write_file(path, data, size, 0600, 0);
    if (err != ODSI_OK)
        log_line(LOG_WARN, "a model's %s could not be kept: %s", what, odsi_err_text());
}

enum odsi_err model_store_put(struct model_store *self, const struct digest *model_id,
                              const uint8_t *manifest, size_t manifest_size,
                              const uint8_t *tokenizer, size_t tokenizer_size,
                              struct model_card **out)
{
    *out = NULL;
    struct model_card *card = find(self, model_id);
    if (card) {
        *out = use(self, card);
        return ODSI_OK;
    }
    const enum odsi_err err =
        add(self, model_id, manifest, manifest_size, tokenizer, tokenizer_size, out);
    if (err == ODSI_OK && self->folder[0]) {
        keep(self, model_id, "manifest", manifest, manifest_size);
        keep(self, model_id, "tokenizer", tokenizer, tokenizer_size);
    }
    return err;
}

struct model_card *model_store_share(struct model_card *card)
{
    card->use_count++;
    return card;
}

void model_store_release(struct model_card **card)
{
    if (!*card)
        return;
    ODSI_ASSERT((*card)->use_count > 0);
    (*card)->use_count--;
    *card = NULL;
}

const struct model_params *model_store_params_view(const struct model_card *card)
{
    return &card->params;
}

const struct tokenizer *model_store_tokenizer_view(const struct model_card *card)
{
    return card->tokenizer;
}
