#include "worker/gateway/request.h"

#include "common/base/alloc.h"
#include "worker/gateway/text_stream.h"

#include <string.h>

void request_free(struct request *self)
{
    alloc_free(self->model);
    alloc_free(self->prompt);
    alloc_free(self->prompt_tokens);
    alloc_free(self->messages);
    alloc_free(self->message_text);
    memset(self, 0, sizeof *self);
}

enum odsi_err request_add_stop(struct request *self, const char *text, size_t size)
{
    if (self->stop_count == LIMIT_STOP_COUNT)
        return odsi_fail(ODSI_ERR_INVALID, "stop: more than %u stop strings", LIMIT_STOP_COUNT);
    if (size == 0 || size > LIMIT_STOP_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "stop: a stop string of %zu bytes; 1 to %u are allowed",
                         size, LIMIT_STOP_SIZE);
    if (!text_stream_is_utf8(text, size))
        return odsi_fail(ODSI_ERR_INVALID, "stop: a stop string is not valid UTF-8");
    struct stop_string *stop = &self->stops[self->stop_count++];
    memcpy(stop->data, text, size);
    stop->size = (uint32_t)size;
    return ODSI_OK;
}

enum odsi_err request_check(struct request *self)
{
    struct sampler_params *sampling = &self->sampling;
    if ((self->prompt_size > 0) + (self->prompt_token_count > 0) + (self->message_count > 0) > 1)
        return odsi_fail(ODSI_ERR_INVALID,
                         "prompt, prompt_tokens and messages: more than one is given; give one of "
                         "them");
    if (self->prompt_size > LIMIT_PROMPT_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "prompt: %zu bytes; at most %u are allowed",
                         self->prompt_size, LIMIT_PROMPT_SIZE);
    if (self->prompt_token_count > LIMIT_CONTEXT_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "prompt_tokens: %u tokens; at most %u are allowed",
                         self->prompt_token_count, LIMIT_CONTEXT_MAX);
    if (self->model && strlen(self->model) >= LIMIT_NAME_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "model: a name of %zu bytes; at most %u are allowed",
                         strlen(self->model), LIMIT_NAME_SIZE - 1);
    const enum odsi_err err = sampler_check(sampling);
    if (err != ODSI_OK)
        return err;
    if (sampling->repetition_penalty == 0.0f || sampling->repetition_penalty == 1.0f) {
        sampling->repetition_penalty = 0.0f;
        sampling->penalty_window = 0;
    } else if (sampling->penalty_window == 0) {
        sampling->penalty_window = REQUEST_PENALTY_WINDOW;
    }
    return ODSI_OK;
}
