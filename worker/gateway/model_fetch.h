/* Gets a model's description: from the store, else from the workers that serve the model, one after
 * the other until one sends what matches the model id. Many may wait for the same model; it is
 * asked for once. Loop thread only. */
#ifndef ODSI_WORKER_GATEWAY_MODEL_FETCH_H
#define ODSI_WORKER_GATEWAY_MODEL_FETCH_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "worker/gateway/directory.h"
#include "worker/gateway/model_store.h"
#include "worker/gateway/worker_link_client.h"

struct model_fetch;

/* All must outlive it. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err model_fetch_open(struct model_fetch **out, struct model_store *store,
                                             const struct directory *directory,
                                             struct worker_link_client *links);
/* After the links are closed, when no reply can come any more; nobody may wait. */
void model_fetch_close(struct model_fetch **self);

/* on_model(user, ODSI_OK, card), to be released by the receiver, or on_model(user, err, NULL) with
 * this thread's error text: once, perhaps before this returns, unless cancelled before. */
void model_fetch_want(struct model_fetch *self, const struct digest *model_id,
                      void (*on_model)(void *user, enum odsi_err err, struct model_card *card),
                      void *user);
/* Takes back every wish of user. */
void model_fetch_cancel(struct model_fetch *self, const void *user);
#endif
