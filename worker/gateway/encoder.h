/* A thread that renders conversations and tokenizes, so that a prompt of megabytes does not hold
 * up the event loop and with it everybody else's tokens. All functions on the loop's thread. */
#ifndef ODSI_WORKER_GATEWAY_ENCODER_H
#define ODSI_WORKER_GATEWAY_ENCODER_H
#include "common/base/err.h"
#include "common/net/rpc_loop.h"
#include "worker/gateway/model_store.h"
#include "worker/model/chat_template.h"

#include <stddef.h>
#include <stdint.h>

#define ENCODER_QUEUE_SIZE (256u << 20) /* bytes of prompts that wait */

struct encoder;
struct encoder_job; /* one prompt; dead after on_encoded or cancel */

/* Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err encoder_open(struct encoder **out, struct rpc_loop *loop);
/* Ends the thread; on_encoded does not come for what is still waiting. The loop must run on until
 * what the thread posted before has run. */
void encoder_close(struct encoder **self);

/* Tokenizes text (copied) for the model of card (shared) into at most token_max ids.
 * on_encoded(user, err, tokens, count) comes once, later: tokens is then the receiver's, to be
 * ended with alloc_free; with ODSI_ERR_RANGE count tells how many there would have been; other
 * errors come with this thread's error text.
 * Errors: ODSI_ERR_BUSY (too much is waiting), ODSI_ERR_NO_MEMORY; on_encoded does not come. */
ODSI_MUST_USE enum odsi_err
encoder_start(struct encoder *self, struct encoder_job **out, struct model_card *card,
              const char *text, size_t size, uint32_t token_max,
              void (*on_encoded)(void *user, enum odsi_err err, uint32_t *tokens, uint32_t count),
              void *user);
/* The same for messages[message_count] (copied, with their contents), by the chat template of the
 * model; on_encoded's errors are those of chat_template_encode. */
ODSI_MUST_USE enum odsi_err encoder_start_chat(
    struct encoder *self, struct encoder_job **out, struct model_card *card,
    const struct chat_message *messages, uint32_t message_count, uint32_t token_max,
    void (*on_encoded)(void *user, enum odsi_err err, uint32_t *tokens, uint32_t count),
    void *user);
/* on_encoded will not come. *job may be NULL; becomes NULL. */
void encoder_cancel(struct encoder_job **job);
#endif
