/* Which of the served models a client means. Pure; any thread. */
#ifndef ODSI_WORKER_GATEWAY_MODEL_CHOICE_H
#define ODSI_WORKER_GATEWAY_MODEL_CHOICE_H
#include "common/base/err.h"
#include "worker/gateway/directory.h"

/* wanted: a name, an id in 64 hex digits, or NULL or "" for the only one. Of several with one name
 * the one that is complete is meant, then the one with the most workers.
 * Errors: ODSI_ERR_UNAVAILABLE (nothing is served), ODSI_ERR_NOT_FOUND (not served; the sentence
 * names those that are), ODSI_ERR_INVALID (several could be meant). */
ODSI_MUST_USE enum odsi_err model_choice_find(const struct directory_model *models, uint32_t count,
                                              const char *wanted,
                                              const struct directory_model **out);
#endif
