/* Models a gateway knows: what they are and how they tokenize, without their weights.
 *
 * Manifest and tokenizer come from a worker, who may lie, so they are taken only when
 * SHA-256(manifest) is the model id and SHA-256(tokenizer) is the digest in the manifest. They stay
 * in memory while in use, and in the state folder for the next start, checked again when read.
 * Threads: one owner; a model's tokenizer may be read by any thread. */
#ifndef ODSI_WORKER_GATEWAY_MODEL_STORE_H
#define ODSI_WORKER_GATEWAY_MODEL_STORE_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "worker/model/model.h"
#include "worker/model/tokenizer.h"

#include <stddef.h>
#include <stdint.h>

#define MODEL_STORE_MAX 16u /* models in memory */

struct model_store;
struct model_card; /* one model, counted: valid until model_store_release */

/* folder (made when missing; NULL: nothing is kept) is copied.
 * Errors: ODSI_ERR_IO, ODSI_ERR_RANGE, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err model_store_open(struct model_store **out, const char *folder);
/* Every card must have been released. */
void model_store_close(struct model_store **self);

/* From memory or the state folder. Errors: ODSI_ERR_NOT_FOUND; ODSI_ERR_BUSY (MODEL_STORE_MAX
 * models are in use), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err model_store_get(struct model_store *self, const struct digest *model_id,
                                            struct model_card **out);
/* From a worker. Errors: ODSI_ERR_CORRUPT (not that model), and those of model_store_get. */
ODSI_MUST_USE enum odsi_err model_store_put(struct model_store *self, const struct digest *model_id,
                                            const uint8_t *manifest, size_t manifest_size,
                                            const uint8_t *tokenizer, size_t tokenizer_size,
                                            struct model_card **out);
/* Counts card once more, for another holder. */
struct model_card *model_store_share(struct model_card *card);
/* *card may be NULL; becomes NULL. */
void model_store_release(struct model_card **card);

const struct model_params *model_store_params_view(const struct model_card *card);
const struct tokenizer *model_store_tokenizer_view(const struct model_card *card);
#endif
