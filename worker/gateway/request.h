/* A client's request in plain structs, and whether it makes sense. Pure; threads: one owner. */
#ifndef ODSI_WORKER_GATEWAY_REQUEST_H
#define ODSI_WORKER_GATEWAY_REQUEST_H
#include "common/base/err.h"
#include "common/base/limits.h"
#include "worker/engine/sampler.h"
#include "worker/engine/stop.h"
#include "worker/model/chat_template.h"

#include <stddef.h>
#include <stdint.h>

#define REQUEST_PENALTY_WINDOW 64u /* when the client does not say */

/* Zero-initialize; ended with request_free. */
struct request {
    char *model;  /* name or id; NULL or "": the only one served. Owned */
    char *prompt; /* owned; NULL or "": nothing but the model's bos */
    size_t prompt_size;
    uint32_t *prompt_tokens; /* [prompt_token_count], instead of prompt. Owned */
    uint32_t prompt_token_count;
    struct chat_message *messages; /* [message_count], instead of prompt. Owned */
    uint32_t message_count;
    char *message_text;  /* of all messages, where their contents point to. Owned */
    uint32_t max_tokens; /* 0: until the model ends or its context is full */
    struct sampler_params sampling;
    struct stop_string stops[LIMIT_STOP_COUNT];
    uint32_t stop_count;
    int ignore_end;
    uint64_t deadline_us; /* for the whole answer, from now; 0: none */
};

void request_free(struct request *self);

/* Errors: ODSI_ERR_INVALID (one too many, empty, too long, not UTF-8). */
ODSI_MUST_USE enum odsi_err request_add_stop(struct request *self, const char *text, size_t size);
/* Checks everything that can be checked without knowing the model, and fills in defaults.
 * Errors: ODSI_ERR_INVALID with the field's name and what is allowed. */
ODSI_MUST_USE enum odsi_err request_check(struct request *self);
#endif
