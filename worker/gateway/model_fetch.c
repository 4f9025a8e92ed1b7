#include "worker/gateway/model_fetch.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/log.h"

#include <stdio.h>
#include <string.h>

#define TRY_MAX    4u
#define TIMEOUT_US 20000000u

struct waiter {
    struct waiter *next;
    void (*on_model)(void *user, enum odsi_err err, struct model_card *card);
    void *user;
};

/* One model that is being asked for. */
struct fetch {
    struct model_fetch *owner;
    struct fetch *next;
    struct digest model_id;
    struct waiter *waiters;
    struct digest tried[TRY_MAX];
    uint32_t tried_count;
    struct odsi_failure failure; /* of the last try */
};

struct model_fetch {
    struct model_store *store;
    const struct directory *directory;
    struct worker_link_client *links;
    struct fetch *fetches;
};

enum odsi_err model_fetch_open(struct model_fetch **out, struct model_store *store,
                               const struct directory *directory, struct worker_link_client *links)
{
    const enum odsi_err err = alloc_zeroed(out, 1, sizeof **out);
    if (err != ODSI_OK)
        return err;
    (*out)->store = store;
    (*out)->directory = directory;
    (*out)->links = links;
    return ODSI_OK;
}

void model_fetch_close(struct model_fetch **self)
{
    if (!*self)
        return;
    ODSI_ASSERT(!(*self)->fetches);
    alloc_free(*self);
    *self = NULL;
}

/* Tells all who wait and forgets the fetch. With err ODSI_OK card is counted once, by the caller,
 * who keeps that count. */
static void finish(struct fetch *fetch, enum odsi_err err, const char *text)
{
    struct model_fetch *self = fetch->owner;
    struct fetch **at = &self->fetches;
    while (*at != fetch)
        at = &(*at)->next;
    *at = fetch->next;
    while (fetch->waiters) {
        struct waiter *waiter = fetch->waiters;
        struct model_card *card = NULL;
        fetch->waiters = waiter->next;
        enum odsi_err told = err == ODSI_OK ? model_store_get(self->store, &fetch->model_id, &card)
                                            : odsi_fail(err, "%s", text);
        waiter->on_model(waiter->user, told, card);
        alloc_free(waiter);
    }
    alloc_free(fetch);
}

static int was_tried(const struct fetch *fetch, const struct digest *worker_id)
{
    for (uint32_t i = 0; i < fetch->tried_count; i++)
        if (digest_equal(&fetch->tried[i], worker_id))
            return 1;
    return 0;
}

static void try_next(struct fetch *fetch);

static void on_reply(void *context, enum odsi_err err, const char *text, const uint8_t *manifest,
                     size_t manifest_size, const uint8_t *tokenizer, size_t tokenizer_size)
{
    struct fetch *fetch = context;
    struct model_card *card = NULL;
    char hex[DIGEST_HEX_SIZE];
    if (err == ODSI_OK)
        err = model_store_put(fetch->owner->store, &fetch->model_id, manifest, manifest_size,
                              tokenizer, tokenizer_size, &card);
    else
        odsi_fail(err, "%s", text);
    if (err == ODSI_OK) {
        finish(fetch, ODSI_OK, "");
        model_store_release(&card);
        return;
    }
    digest_to_hex(hex, &fetch->tried[fetch->tried_count - 1]);
    odsi_fail_prefix(err, "worker %.16s", hex);
    odsi_failure_take(&fetch->failure, ODSI_ERR_UNAVAILABLE);
    log_line(LOG_WARN, "a model could not be had: %s", odsi_err_text());
    try_next(fetch);
}

static void try_next(struct fetch *fetch)
{
    struct model_fetch *self = fetch->owner;
    uint32_t count = 0;
    const struct directory_member *members = directory_members_view(self->directory, &count);
    for (uint32_t i = 0; i < count && fetch->tried_count < TRY_MAX; i++) {
        if (!digest_equal(&members[i].model_id, &fetch->model_id) ||
            was_tried(fetch, &members[i].worker_id))
            continue;
        fetch->tried[fetch->tried_count++] = members[i].worker_id;
        if (worker_link_client_get_model(self->links, &members[i].worker_id, members[i].address,
                                         &fetch->model_id, TIMEOUT_US, on_reply, fetch) == ODSI_OK)
            return;
        odsi_failure_take(&fetch->failure, ODSI_ERR_UNAVAILABLE);
    }
    char text[ODSI_ERR_TEXT_SIZE];
    snprintf(text, sizeof text, "no worker could tell what the model is; %.400s",
             fetch->failure.text);
    finish(fetch, ODSI_ERR_UNAVAILABLE, text);
}

static enum odsi_err start(struct model_fetch *self, const struct digest *model_id,
                           struct fetch **out)
{
    for (*out = self->fetches; *out; *out = (*out)->next)
        if (digest_equal(&(*out)->model_id, model_id))
            return ODSI_OK;
    const enum odsi_err err = alloc_zeroed(out, 1, sizeof **out);
    if (err != ODSI_OK)
        return err;
    (*out)->owner = self;
    (*out)->model_id = *model_id;
    snprintf((*out)->failure.text, sizeof(*out)->failure.text, "none serves it now");
    (*out)->next = self->fetches;
    self->fetches = *out;
    return ODSI_OK;
}

void model_fetch_want(struct model_fetch *self, const struct digest *model_id,
                      void (*on_model)(void *user, enum odsi_err err, struct model_card *card),
                      void *user)
{
    struct model_card *card = NULL;
    struct waiter *waiter = NULL;
    struct fetch *fetch = NULL;
    enum odsi_err err = model_store_get(self->store, model_id, &card);
    if (err != ODSI_ERR_NOT_FOUND) {
        on_model(user, err, card);
        return;
    }
    err = alloc_zeroed(&waiter, 1, sizeof *waiter);
    if (err == ODSI_OK)
        err = start(self, model_id, &fetch);
    if (err != ODSI_OK) {
        alloc_free(waiter);
        on_model(user, err, NULL);
        return;
    }
    *waiter = (struct waiter){fetch->waiters, on_model, user};
    fetch->waiters = waiter;
    if (fetch->tried_count == 0)
        try_next(fetch);
}

void model_fetch_cancel(struct model_fetch *self, const void *user)
{
    for (struct fetch *fetch = self->fetches; fetch; fetch = fetch->next) {
        for (struct waiter **at = &fetch->waiters; *at;) {
            struct waiter *waiter = *at;
            if (waiter->user != user) {
                at = &waiter->next;
                continue;
            }
            *at = waiter->next;
            alloc_free(waiter);
        }
    }
}
