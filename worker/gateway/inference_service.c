#include "worker/gateway/inference_service.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/inference.pb-c.h"
#include "worker/gateway/text_stream.h"

#include <string.h>

/* The largest prompt, and room for the other fields. */
#define GENERATE_SIZE_MAX (LIMIT_PROMPT_SIZE + 65536u)
/* Numbers of fields, in GenerateRequest and in ChatMessage. */
#define PROMPT_FIELD   2u
#define MESSAGES_FIELD 15u
#define CONTENT_FIELD  2u

struct inference_service {
    struct gateway *gateway;
    struct rpc_method methods[2];
    struct rpc_service rpc;
    int stopped;
};

/* One Generate call. */
struct generate_call {
    struct inference_service *service;
    struct rpc_call *call;
    struct answer *answer; /* NULL before the request, and after the end */
    int requested;
    int finished; /* we ended the call; on_done is still to come */
};

/* ---- the request ----------------------------------------------------------------------------- */

static int read_varint(const uint8_t *data, size_t size, size_t *at, uint64_t *out)
{
    *out = 0;
    for (unsigned shift = 0; shift < 64 && *at < size; shift += 7) {
        const uint8_t byte = data[(*at)++];
        *out |= (uint64_t)(byte & 0x7F) << shift;
        if (byte < 0x80)
            return 1;
    }
    return 0;
}

/* A field of a message on the wire; data[size] is what a string or message holds. */
struct wire_field {
    uint32_t number;
    const uint8_t *data; /* NULL: another kind of field */
    size_t size;
};

/* The next field of data from *at on. Returns 0 at the end. */
static int next_field(const uint8_t *data, size_t size, size_t *at, struct wire_field *out)
{
    uint64_t key = 0;
    uint64_t value = 0;
    *out = (struct wire_field){0};
    if (!read_varint(data, size, at, &key))
        return 0;
    out->number = (uint32_t)(key >> 3);
    switch (key & 7) {
    case 0:
        return read_varint(data, size, at, &value);
    case 1:
        value = 8;
        break;
    case 2:
        if (!read_varint(data, size, at, &value) || value > size - *at)
            return 0;
        out->data = data + *at;
        out->size = (size_t)value;
        break;
    case 5:
        value = 4;
        break;
    default:
        return 0;
    }
    if (value > size - *at)
        return 0;
    *at += (size_t)value;
    return 1;
}

/* protobuf-c hands strings out as C strings, so one with a NUL inside would be cut there without a
 * word. The length on the wire tells; the message is known to be well formed. The last one of
 * that number counts. */
static size_t size_on_wire(const uint8_t *data, size_t size, uint32_t number)
{
    struct wire_field field;
    size_t found = 0;
    for (size_t at = 0; next_field(data, size, &at, &field);)
        if (field.number == number && field.data)
            found = field.size;
    return found;
}

static enum odsi_err read_prompt_tokens(struct request *out, const Odsi__V1__GenerateRequest *from)
{
    if (from->n_prompt_tokens == 0)
        return ODSI_OK;
    if (from->n_prompt_tokens > LIMIT_CONTEXT_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "prompt_tokens: %zu tokens; at most %u are allowed",
                         from->n_prompt_tokens, LIMIT_CONTEXT_MAX);
    const enum odsi_err err =
        alloc_zeroed(&out->prompt_tokens, from->n_prompt_tokens, sizeof(uint32_t));
    if (err != ODSI_OK)
        return err;
    memcpy(out->prompt_tokens, from->prompt_tokens, from->n_prompt_tokens * sizeof(uint32_t));
    out->prompt_token_count = (uint32_t)from->n_prompt_tokens;
    return ODSI_OK;
}

/* message_text has room for all contents. */
static enum odsi_err copy_messages(struct request *out, const Odsi__V1__GenerateRequest *from,
                                   const uint8_t *data, size_t size)
{
    struct wire_field field;
    char *text = out->message_text;
    size_t at = 0;
    for (uint32_t i = 0; i < from->n_messages; i++) {
        const Odsi__V1__ChatMessage *message = from->messages[i];
        const size_t content_size = strlen(message->content);
        do {
            if (!next_field(data, size, &at, &field))
                return odsi_fail(ODSI_ERR_INVALID, "messages: entry %u cannot be read", i);
        } while (field.number != MESSAGES_FIELD || !field.data);
        if (size_on_wire(field.data, field.size, CONTENT_FIELD) != content_size)
            return odsi_fail(ODSI_ERR_INVALID, "messages: entry %u has a NUL character at byte %zu",
                             i, content_size);
        const enum odsi_err err = chat_template_role(message->role, &out->messages[i].role);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "messages: entry %u", i);
        memcpy(text, message->content, content_size);
        out->messages[i].content = text;
        out->messages[i].size = content_size;
        text += content_size;
    }
    out->message_count = (uint32_t)from->n_messages;
    return ODSI_OK;
}

static enum odsi_err read_messages(struct request *out, const Odsi__V1__GenerateRequest *from,
                                   const uint8_t *data, size_t size)
{
    size_t text_size = 0;
    if (from->n_messages == 0)
        return ODSI_OK;
    if (from->n_messages > LIMIT_CHAT_MESSAGES)
        return odsi_fail(ODSI_ERR_INVALID, "messages: %zu of them; at most %u are allowed",
                         from->n_messages, LIMIT_CHAT_MESSAGES);
    for (size_t i = 0; i < from->n_messages; i++)
        text_size += strlen(from->messages[i]->content);
    enum odsi_err err = alloc_zeroed(&out->messages, from->n_messages, sizeof *out->messages);
    if (err == ODSI_OK)
        err = alloc_zeroed(&out->message_text, text_size, 1);
    return err == ODSI_OK ? copy_messages(out, from, data, size) : err;
}

static enum odsi_err read_prompt(struct request *out, const Odsi__V1__GenerateRequest *from,
                                 const struct rpc_message *message)
{
    const uint8_t *data = rpc_message_flat(message);
    if (!data)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for the request");
    out->prompt_size = strlen(from->prompt);
    if (size_on_wire(data, message->size, PROMPT_FIELD) != out->prompt_size)
        return odsi_fail(ODSI_ERR_INVALID, "prompt: it has a NUL character at byte %zu",
                         out->prompt_size);
    enum odsi_err err = alloc_text(&out->prompt, from->prompt, out->prompt_size);
    if (err == ODSI_OK)
        err = read_prompt_tokens(out, from);
    return err == ODSI_OK ? read_messages(out, from, data, message->size) : err;
}

static enum odsi_err read_request(struct request *out, const Odsi__V1__GenerateRequest *from,
                                  const struct rpc_message *message, const struct rpc_call *call)
{
    out->max_tokens = from->max_tokens;
    out->ignore_end = from->ignore_end;
    out->sampling = (struct sampler_params){
        .temperature = from->temperature,
        .top_k = from->top_k,
        .top_p = from->top_p,
        .min_p = from->min_p,
        .repetition_penalty = from->repetition_penalty,
        .penalty_window = from->penalty_window,
        .seed = from->seed,
    };
    const uint64_t call_us = rpc_call_time_left_us(call);
    out->deadline_us = (uint64_t)from->deadline_ms * 1000;
    if (call_us != UINT64_MAX && (out->deadline_us == 0 || call_us < out->deadline_us))
        out->deadline_us = call_us ? call_us : 1;
    enum odsi_err err = read_prompt(out, from, message);
    if (err == ODSI_OK)
        err = alloc_text(&out->model, from->model, strlen(from->model));
    if (err == ODSI_OK && !text_stream_is_utf8(from->model, strlen(from->model)))
        err = odsi_fail(ODSI_ERR_INVALID, "model: not valid UTF-8");
    for (size_t i = 0; i < from->n_stop && err == ODSI_OK; i++)
        err = request_add_stop(out, from->stop[i], strlen(from->stop[i]));
    return err;
}

/* ---- the answer ------------------------------------------------------------------------------ */

static void fail_call(struct generate_call *self, enum odsi_err err)
{
    self->finished = 1;
    rpc_call_fail(self->call, err);
}

static void on_piece(void *user, const struct answer_piece *piece)
{
    struct generate_call *self = user;
    char text[GENERATE_EMIT_TEXT_SIZE + 1];
    Odsi__V1__GenerateResponse response = ODSI__V1__GENERATE_RESPONSE__INIT;
    response.session_id.data = (uint8_t *)(uintptr_t)piece->session_id->bytes;
    response.session_id.len = sizeof piece->session_id->bytes;
    response.n_tokens = piece->token_count;
    response.tokens = (uint32_t *)(uintptr_t)piece->tokens;
    response.n_logprobs = piece->token_count;
    response.logprobs = (float *)(uintptr_t)piece->logprobs;
    memcpy(text, piece->text, piece->text_size);
    text[piece->text_size] = '\0';
    response.text = text;
    /* When the client is gone already, on_done comes and cancels the answer. */
    (void)!rpc_send(self->call, &response.base);
}

/* A Summary and what it points to. */
struct packed_summary {
    Odsi__V1__GenerateResponse response;
    Odsi__V1__Summary summary;
    Odsi__V1__HopSummary hops[LIMIT_STAGES_MAX];
    Odsi__V1__HopSummary *hop_pointers[LIMIT_STAGES_MAX];
    Odsi__V1__Stage stages[LIMIT_STAGES_MAX];
    Odsi__V1__LayerRange ranges[LIMIT_STAGES_MAX];
};

static void pack_hops(struct packed_summary *packed, const struct answer_end *end)
{
    for (uint32_t i = 0; i < end->summary->hop_count; i++) {
        const struct generate_hop *hop = &end->summary->hops[i];
        const struct hop_stage *stage = &end->stages[i];
        odsi__v1__layer_range__init(&packed->ranges[i]);
        packed->ranges[i].first = stage->layer_first;
        packed->ranges[i].end = stage->layer_end;
        odsi__v1__stage__init(&packed->stages[i]);
        packed->stages[i].worker_id.data = (uint8_t *)(uintptr_t)stage->worker_id.bytes;
        packed->stages[i].worker_id.len = DIGEST_SIZE;
        packed->stages[i].address = (char *)(uintptr_t)stage->address;
        packed->stages[i].layers = &packed->ranges[i];
        odsi__v1__hop_summary__init(&packed->hops[i]);
        packed->hops[i].stage = &packed->stages[i];
        packed->hops[i].queue_us = hop->queue_us;
        packed->hops[i].compute_us = hop->compute_us;
        packed->hops[i].network_us = hop->network_us;
        packed->hops[i].slack_us = hop->slack_us;
        packed->hops[i].step_count = hop->step_count;
        packed->hop_pointers[i] = &packed->hops[i];
    }
    packed->summary.n_hops = end->summary->hop_count;
    packed->summary.hops = packed->hop_pointers;
}

static enum odsi_err send_summary(struct generate_call *self, const struct answer_end *end)
{
    struct packed_summary *packed = NULL;
    enum odsi_err err = alloc_zeroed(&packed, 1, sizeof *packed);
    if (err != ODSI_OK)
        return err;
    odsi__v1__generate_response__init(&packed->response);
    odsi__v1__summary__init(&packed->summary);
    packed->response.session_id.data = (uint8_t *)(uintptr_t)end->session_id->bytes;
    packed->response.session_id.len = sizeof end->session_id->bytes;
    packed->response.summary = &packed->summary;
    packed->summary.finish = (Odsi__V1__FinishReason)end->summary->finish;
    packed->summary.prompt_token_count = end->summary->prompt_count;
    packed->summary.reused_token_count = end->summary->reused_count;
    packed->summary.new_token_count = end->summary->new_count;
    packed->summary.seed = end->seed;
    packed->summary.first_token_us = end->summary->first_token_us;
    packed->summary.total_us = end->summary->total_us;
    packed->summary.model_id.data = (uint8_t *)(uintptr_t)end->model_id->bytes;
    packed->summary.model_id.len = DIGEST_SIZE;
    packed->summary.numerics_version = end->numerics_version;
    pack_hops(packed, end);
    err = rpc_send(self->call, &packed->response.base);
    alloc_free(packed);
    return err;
}

static void on_end(void *user, const struct answer_end *end)
{
    struct generate_call *self = user;
    self->answer = NULL;
    if (end->err != ODSI_OK) {
        fail_call(self, odsi_fail(end->err, "%s", end->text));
        return;
    }
    const enum odsi_err err = send_summary(self, end);
    if (err != ODSI_OK) {
        fail_call(self, err);
        return;
    }
    self->finished = 1;
    rpc_call_finish(self->call, RPC_OK, NULL);
}

static const struct answer_handler answer_handler = {on_piece, on_end};

/* ---- Generate -------------------------------------------------------------------------------- */

static void on_request(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct generate_call *self = user;
    Odsi__V1__GenerateRequest *packed = NULL;
    struct request request = {0};
    if (self->requested || self->finished)
        return;
    self->requested = 1;
    enum odsi_err err = rpc_unpack(&packed, &odsi__v1__generate_request__descriptor, message);
    if (err == ODSI_OK)
        err = read_request(&request, packed, message, call);
    rpc_unpack_free(packed);
    if (err == ODSI_OK && self->service->stopped)
        err = odsi_fail(ODSI_ERR_UNAVAILABLE, "the gateway is stopping");
    if (err != ODSI_OK)
        request_free(&request);
    else
        err = answer_start(&self->answer, gateway_answers(self->service->gateway), &request,
                           &answer_handler, self);
    if (err == ODSI_ERR_UNAVAILABLE && *gateway_trouble_view(self->service->gateway))
        odsi_fail(err, "%.250s; %.250s", odsi_err_text(),
                  gateway_trouble_view(self->service->gateway));
    if (err != ODSI_OK)
        fail_call(self, err);
}

static void on_half_close(void *user, struct rpc_call *call)
{
    struct generate_call *self = user;
    (void)call;
    if (!self->requested && !self->finished)
        fail_call(self, odsi_fail(ODSI_ERR_INVALID, "no request was sent"));
}

static void on_sent(void *user, struct rpc_call *call)
{
    struct generate_call *self = user;
    (void)call;
    if (self->answer)
        answer_client_ready(self->answer);
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct generate_call *self = user;
    (void)call;
    (void)status;
    (void)text;
    answer_cancel(&self->answer);
    alloc_free(self);
}

static void *generate_on_open(void *service, struct rpc_call *call,
                              const struct rpc_handler **handler)
{
    static const struct rpc_handler generate_handler = {.on_message = on_request,
                                                        .on_half_close = on_half_close,
                                                        .on_sent = on_sent,
                                                        .on_done = on_done};
    struct generate_call *self = NULL;
    const enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return NULL;
    }
    self->service = service;
    self->call = call;
    *handler = &generate_handler;
    return self;
}

/* ---- ListModels ------------------------------------------------------------------------------ */

static enum odsi_err reply_models(struct rpc_call *call, const struct directory_model *models,
                                  uint32_t count)
{
    Odsi__V1__ListModelsReply reply = ODSI__V1__LIST_MODELS_REPLY__INIT;
    Odsi__V1__ModelInfo *infos = NULL;
    Odsi__V1__ModelInfo **pointers = NULL;
    enum odsi_err err = alloc_zeroed(&infos, count, sizeof *infos);
    if (err == ODSI_OK)
        err = alloc_zeroed(&pointers, count, sizeof(void *));
    for (uint32_t i = 0; i < count && err == ODSI_OK; i++) {
        odsi__v1__model_info__init(&infos[i]);
        infos[i].model_id.data = (uint8_t *)(uintptr_t)models[i].model_id.bytes;
        infos[i].model_id.len = DIGEST_SIZE;
        infos[i].name = (char *)(uintptr_t)models[i].name;
        infos[i].layer_count = models[i].layer_count;
        infos[i].context_length = models[i].context_length;
        infos[i].worker_count = models[i].worker_count;
        infos[i].complete = models[i].complete;
        pointers[i] = &infos[i];
    }
    if (err == ODSI_OK) {
        reply.n_models = count;
        reply.models = pointers;
        rpc_reply(call, &reply.base);
    }
    alloc_free(pointers);
    alloc_free(infos);
    return err;
}

static void on_list_request(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct inference_service *self = user;
    struct directory_model *models = NULL;
    Odsi__V1__ListModelsRequest *request = NULL;
    uint32_t count = 0;
    enum odsi_err err = rpc_unpack(&request, &odsi__v1__list_models_request__descriptor, message);
    rpc_unpack_free(request);
    if (err == ODSI_OK && self->stopped)
        err = odsi_fail(ODSI_ERR_UNAVAILABLE, "the gateway is stopping");
    if (err == ODSI_OK)
        err = directory_models(gateway_directory_view(self->gateway), &models, &count);
    if (err == ODSI_OK)
        err = reply_models(call, models, count);
    alloc_free(models);
    if (err != ODSI_OK)
        rpc_call_fail(call, err);
}

static void *list_on_open(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler list_handler = {.on_message = on_list_request};
    (void)call;
    *handler = &list_handler;
    return service;
}

/* ---- opening and closing --------------------------------------------------------------------- */

enum odsi_err inference_service_open(struct inference_service **out, struct gateway *gateway)
{
    struct inference_service *self = NULL;
    *out = NULL;
    const enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->gateway = gateway;
    self->methods[0] =
        (struct rpc_method){"/odsi.v1.Inference/Generate", generate_on_open, GENERATE_SIZE_MAX};
    self->methods[1] = (struct rpc_method){"/odsi.v1.Inference/ListModels", list_on_open, 1024};
    self->rpc = (struct rpc_service){"odsi.v1.Inference", self->methods, 2, self};
    *out = self;
    return ODSI_OK;
}

void inference_service_close(struct inference_service **self)
{
    alloc_free(*self);
    *self = NULL;
}

void inference_service_stop(struct inference_service *self)
{
    self->stopped = 1;
}

const struct rpc_service *inference_service_rpc_view(const struct inference_service *self)
{
    return &self->rpc;
}
