#include "worker/cli/cli_client.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/coordinator.pb-c.h"
#include "odsi/v1/inference.pb-c.h"
#include "worker/cli/cli_input.h"
#include "worker/gateway/known_peers.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The largest prompt or conversation, and what stands around it. */
#define REQUEST_SIZE_MAX (LIMIT_CONTROL_MESSAGE_SIZE + 65536u)
#define TEXT_SIZE_MAX    (64u << 20)
/* The gateway ends an answer at its deadline and says why; the call itself waits a little longer
 * for that word. */
#define DEADLINE_GRACE_US 1000000u
#define SESSION_ID_SIZE   16u
/* How soon a readable descriptor is seen: no human notices, and it costs nothing. */
#define WATCH_US 20000u

/* One answer being generated. */
struct generation {
    struct generation *next;
    struct cli_client *client;
    struct cli_answer *answer;
    const struct cli_answer_events *events;
    void *context;
    struct rpc_call *call; /* NULL before it is open */
    int is_cancelled;
    uint64_t timeout_us;
    struct buf request;
};

struct cli_client {
    struct rpc_loop *loop;
    struct rpc_channel *channel;
    struct identity *identity; /* NULL: plaintext */
    char address[LIMIT_ADDRESS_SIZE];
    char known_path[CLI_INPUT_PATH_SIZE];
    char refused[ODSI_ERR_TEXT_SIZE]; /* why accept_peer said no */
    struct generation *running;
    int is_cancelled; /* for good, by a signal */
    struct rpc_timer watch;
    int watched_fd;
};

/* ---- errors ---------------------------------------------------------------------------------- */

static const char *const status_names[] = {
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
};
static const char *const status_meanings[] = {
    "ok",
    "the call was cancelled",
    "an error without a kind",
    "the request breaks a rule",
    "the time ran out",
    "there is no such thing",
    "it is there already",
    "this identity may not do that",
    "full for now",
    "not possible at this moment",
    "interrupted",
    "beyond the end",
    "the other side does not offer this",
    "a fault of the other side",
    "cannot be reached or served now",
    "damaged data",
    "the identity was not accepted",
};

static enum odsi_err fail_status(const struct cli_client *self, enum rpc_status status,
                                 const char *text)
{
    const unsigned count = sizeof status_names / sizeof *status_names;
    const unsigned index = (unsigned)status < count ? (unsigned)status : RPC_UNKNOWN;
    if (self->refused[0] != '\0')
        return odsi_fail(ODSI_ERR_DENIED, "%s", self->refused);
    return odsi_fail(rpc_err_of_status((enum rpc_status)index), "%s: %s (%s): %s", self->address,
                     status_names[index], status_meanings[index], text ? text : "");
}

/* ---- opening and closing --------------------------------------------------------------------- */

static int accept_peer(void *context, const struct digest *peer_id)
{
    struct cli_client *self = context;
    const enum odsi_err err = known_peers_check(self->known_path, self->address, peer_id);
    if (err == ODSI_OK)
        return 1;
    snprintf(self->refused, sizeof self->refused, "%s", odsi_err_text());
    return 0;
}

static void cancel_running(struct cli_client *self)
{
    for (struct generation *at = self->running; at; at = at->next) {
        at->is_cancelled = 1;
        if (at->call)
            rpc_call_cancel(at->call);
    }
}

static void cancel_all(void *context)
{
    struct cli_client *self = context;
    self->is_cancelled = 1;
    cancel_running(self);
}

static enum odsi_err open_identity(struct cli_client *self, const char *path)
{
    char home_path[CLI_INPUT_PATH_SIZE];
    enum odsi_err err = ODSI_OK;
    if (!path) {
        err = cli_input_home(home_path, "identity.pem");
        path = home_path;
    }
    if (err == ODSI_OK)
        err = identity_open(&self->identity, path, 1, getenv("ODSI_PASSPHRASE"));
    if (err == ODSI_OK)
        err = cli_input_home(self->known_path, "known_peers");
    return err;
}

enum odsi_err cli_client_open(struct cli_client **out, const struct cli_client_config *config)
{
    struct cli_client *self = NULL;
    struct digest id;
    int has_id = 0;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    err = rpc_address_read(config->peer, self->address, &id, &has_id);
    if (err == ODSI_OK && !config->is_insecure)
        err = open_identity(self, config->identity_path);
    if (err == ODSI_OK)
        err = rpc_loop_open(&self->loop);
    if (err == ODSI_OK && config->is_cancelled_by_signal)
        err = rpc_loop_on_terminate(self->loop, cancel_all, self);
    if (err == ODSI_OK) {
        const struct rpc_channel_config channel = {
            .address = self->address,
            .identity = self->identity,
            .peer_id = has_id && !config->is_insecure ? &id : NULL,
            .accept_peer = accept_peer,
            .accept_context = self,
        };
        err = rpc_channel_open(&self->channel, self->loop, &channel);
    }
    if (err != ODSI_OK) {
        cli_client_close(&self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void cli_client_close(struct cli_client **self)
{
    if (!*self)
        return;
    ODSI_ASSERT(!(*self)->running);
    rpc_channel_close(&(*self)->channel);
    rpc_loop_close(&(*self)->loop);
    identity_close(&(*self)->identity);
    alloc_free(*self);
    *self = NULL;
}

/* ---- one request, one reply ------------------------------------------------------------------ */

struct unary {
    struct cli_client *client;
    const char *path;
    uint64_t timeout_us;
    struct buf request;
    const ProtobufCMessageDescriptor *reply_type;
    void *reply;
    struct odsi_failure failure;
};

static void unary_replied(void *context, enum rpc_status status, const char *text,
                          const struct rpc_message *reply)
{
    struct unary *self = context;
    enum odsi_err err = ODSI_OK;
    if (status != RPC_OK)
        err = fail_status(self->client, status, text);
    else
        err = rpc_unpack(&self->reply, self->reply_type, reply);
    odsi_failure_take(&self->failure, err);
    rpc_loop_stop(self->client->loop);
}

static void unary_start(void *context)
{
    struct unary *self = context;
    const enum odsi_err err =
        rpc_unary(self->client->channel, self->path, self->timeout_us, 0, self->request.data,
                  self->request.size, unary_replied, self);
    if (err != ODSI_OK) {
        odsi_failure_take(&self->failure, err);
        rpc_loop_stop(self->client->loop);
    }
}

/* *reply is ended with rpc_unpack_free. */
static enum odsi_err call_unary(struct cli_client *client, const char *path, uint64_t timeout_us,
                                const ProtobufCMessage *request,
                                const ProtobufCMessageDescriptor *reply_type, void *out_reply)
{
    struct unary self = {
        .client = client, .path = path, .timeout_us = timeout_us, .reply_type = reply_type};
    void **reply = out_reply;
    *reply = NULL;
    client->refused[0] = '\0';
    buf_init(&self.request, REQUEST_SIZE_MAX);
    enum odsi_err err = rpc_pack(&self.request, request);
    if (err == ODSI_OK)
        err = rpc_loop_post(client->loop, unary_start, &self);
    if (err == ODSI_OK) {
        rpc_loop_run(client->loop);
        err = self.failure.err;
        if (err != ODSI_OK)
            odsi_fail(err, "%s", self.failure.text); /* the loop may have spoken since */
    }
    buf_free(&self.request);
    *reply = self.reply;
    return err;
}

static void copy_text(char *out, size_t size, const char *text)
{
    snprintf(out, size, "%s", text ? text : "");
}

/* Zeros for what is no digest; a display has no better use for it. */
static void copy_digest(struct digest *out, const ProtobufCBinaryData *from)
{
    memset(out, 0, sizeof *out);
    if (from->len == DIGEST_SIZE)
        memcpy(out->bytes, from->data, DIGEST_SIZE);
}

enum odsi_err cli_client_models(struct cli_client *self, uint64_t timeout_us,
                                struct cli_model_row **rows, uint32_t *row_count)
{
    Odsi__V1__ListModelsRequest request = ODSI__V1__LIST_MODELS_REQUEST__INIT;
    Odsi__V1__ListModelsReply *reply = NULL;
    *rows = NULL;
    *row_count = 0;
    enum odsi_err err = call_unary(self, "/odsi.v1.Inference/ListModels", timeout_us, &request.base,
                                   &odsi__v1__list_models_reply__descriptor, &reply);
    if (err == ODSI_OK)
        err = alloc_zeroed(rows, reply->n_models, sizeof **rows);
    for (size_t i = 0; err == ODSI_OK && i < reply->n_models; i++) {
        const Odsi__V1__ModelInfo *from = reply->models[i];
        struct cli_model_row *row = &(*rows)[i];
        copy_digest(&row->id, &from->model_id);
        copy_text(row->name, sizeof row->name, from->name);
        row->layer_count = from->layer_count;
        row->context_length = from->context_length;
        row->worker_count = from->worker_count;
        row->is_complete = from->complete;
        *row_count = (uint32_t)i + 1;
    }
    rpc_unpack_free(reply);
    return err;
}

static void read_member(struct cli_member_row *row, const Odsi__V1__Member *from)
{
    copy_digest(&row->worker_id, &from->worker_id);
    copy_text(row->address, sizeof row->address, from->address);
    row->is_ready = from->ready;
    row->silent_ms = from->silent_ms;
    if (from->model) {
        copy_digest(&row->model_id, &from->model->model_id);
        copy_text(row->model_name, sizeof row->model_name, from->model->name);
        row->model_layers = from->model->layer_count;
    }
    if (from->layers) {
        row->layer_first = from->layers->first;
        row->layer_end = from->layers->end;
    }
    if (from->capability) {
        copy_text(row->backend, sizeof row->backend, from->capability->backend);
        row->thread_count = from->capability->thread_count;
        row->memory_size = from->capability->memory_size;
        row->kv_tokens = from->capability->kv_token_capacity;
        row->prefill_tps = (double)from->capability->prefill_tokens_per_s;
        row->decode_tps = (double)from->capability->decode_tokens_per_s;
    }
    if (from->load) {
        row->session_count = from->load->session_count;
        row->queued_step_count = from->load->queued_step_count;
        row->kv_tokens_free = from->load->kv_tokens_free;
    }
}

static int compare_members(const void *left, const void *right)
{
    const struct cli_member_row *a = left, *b = right;
    int order = memcmp(a->model_id.bytes, b->model_id.bytes, DIGEST_SIZE);
    if (order == 0)
        order = (a->layer_first > b->layer_first) - (a->layer_first < b->layer_first);
    if (order == 0)
        order = memcmp(a->worker_id.bytes, b->worker_id.bytes, DIGEST_SIZE);
    return order;
}

enum odsi_err cli_client_members(struct cli_client *self, uint64_t timeout_us, uint64_t *version,
                                 struct cli_member_row **rows, uint32_t *row_count)
{
    Odsi__V1__GetDirectoryRequest request = ODSI__V1__GET_DIRECTORY_REQUEST__INIT;
    Odsi__V1__Directory *reply = NULL;
    *rows = NULL;
    *row_count = 0;
    *version = 0;
    enum odsi_err err = call_unary(self, "/odsi.v1.Coordinator/GetDirectory", timeout_us,
                                   &request.base, &odsi__v1__directory__descriptor, &reply);
    if (err == ODSI_OK)
        err = alloc_zeroed(rows, reply->n_members, sizeof **rows);
    if (err == ODSI_OK) {
        for (size_t i = 0; i < reply->n_members; i++)
            read_member(&(*rows)[i], reply->members[i]);
        *row_count = (uint32_t)reply->n_members;
        *version = reply->version;
        qsort(*rows, *row_count, sizeof **rows, compare_members);
    }
    rpc_unpack_free(reply);
    return err;
}

/* ---- generating ------------------------------------------------------------------------------ */

static void answer_fail(struct cli_answer *answer, enum odsi_err err)
{
    if (answer->err != ODSI_OK)
        return; /* the first cause counts */
    answer->err = err;
    snprintf(answer->err_text, sizeof answer->err_text, "%s", odsi_err_text());
}

static void generation_finish(struct generation *self)
{
    struct cli_client *client = self->client;
    struct generation **at = &client->running;
    while (*at != self)
        at = &(*at)->next;
    *at = self->next;
    if (self->events && self->events->on_done)
        self->events->on_done(self->context, self->answer);
    buf_free(&self->request);
    alloc_free(self);
    if (!client->running)
        rpc_loop_stop(client->loop);
}

static enum odsi_err add_tokens(struct cli_answer *answer, const Odsi__V1__GenerateResponse *from)
{
    const size_t need = answer->token_count + from->n_tokens;
    if (need > LIMIT_CONTEXT_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "the gateway sent more than %u tokens",
                         LIMIT_CONTEXT_MAX);
    if (need > answer->token_capacity) {
        const size_t capacity = need < 256 ? 256 : need * 2;
        enum odsi_err err = alloc_resize(&answer->tokens, capacity, sizeof *answer->tokens);
        if (err == ODSI_OK)
            err = alloc_resize(&answer->logprobs, capacity, sizeof *answer->logprobs);
        if (err != ODSI_OK)
            return err;
        answer->token_capacity = (uint32_t)capacity;
    }
    for (size_t i = 0; i < from->n_tokens; i++) {
        answer->tokens[answer->token_count] = from->tokens[i];
        answer->logprobs[answer->token_count] = i < from->n_logprobs ? from->logprobs[i] : 0;
        answer->token_count++;
    }
    return ODSI_OK;
}

static const char *finish_name(Odsi__V1__FinishReason reason)
{
    switch (reason) {
    case ODSI__V1__FINISH_REASON__FINISH_END:
        return "end";
    case ODSI__V1__FINISH_REASON__FINISH_STOP:
        return "stop";
    case ODSI__V1__FINISH_REASON__FINISH_LENGTH:
        return "length";
    case ODSI__V1__FINISH_REASON__FINISH_CANCELLED:
        return "cancelled";
    default:
        return "unknown";
    }
}

static void read_hop(struct cli_hop_row *row, const Odsi__V1__HopSummary *from)
{
    row->queue_us = from->queue_us;
    row->compute_us = from->compute_us;
    row->network_us = from->network_us;
    row->slack_us = from->slack_us;
    row->step_count = from->step_count;
    if (!from->stage)
        return;
    copy_digest(&row->worker_id, &from->stage->worker_id);
    copy_text(row->address, sizeof row->address, from->stage->address);
    if (from->stage->layers) {
        row->layer_first = from->stage->layers->first;
        row->layer_end = from->stage->layers->end;
    }
}

static enum odsi_err add_summary(struct cli_answer *answer, const Odsi__V1__Summary *from)
{
    if (answer->has_summary || from->n_hops > LIMIT_STAGES_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "the gateway sent %s",
                         answer->has_summary ? "two summaries" : "too many hops");
    const enum odsi_err err = alloc_zeroed(&answer->hops, from->n_hops, sizeof *answer->hops);
    if (err != ODSI_OK)
        return err;
    for (size_t i = 0; i < from->n_hops; i++)
        read_hop(&answer->hops[i], from->hops[i]);
    answer->hop_count = (uint32_t)from->n_hops;
    answer->has_summary = 1;
    answer->finish_reason = finish_name(from->finish);
    copy_digest(&answer->model_id, &from->model_id);
    answer->numerics_version = from->numerics_version;
    answer->prompt_token_count = from->prompt_token_count;
    answer->reused_token_count = from->reused_token_count;
    answer->new_token_count = from->new_token_count;
    answer->seed = from->seed;
    answer->first_token_us = from->first_token_us;
    answer->total_us = from->total_us;
    return ODSI_OK;
}

static void generation_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct generation *self = user;
    struct cli_answer *answer = self->answer;
    Odsi__V1__GenerateResponse *from = NULL;
    enum odsi_err err = rpc_unpack(&from, &odsi__v1__generate_response__descriptor, message);
    if (err == ODSI_OK)
        err = add_tokens(answer, from);
    if (err == ODSI_OK && from->text)
        err = buf_append_text(&answer->text, from->text);
    if (err == ODSI_OK && from->summary)
        err = add_summary(answer, from->summary);
    if (err == ODSI_OK) {
        if (from->session_id.len == SESSION_ID_SIZE)
            bytes_to_hex(answer->session, from->session_id.data, SESSION_ID_SIZE);
        if (self->events && self->events->on_piece)
            self->events->on_piece(self->context, answer, (uint32_t)from->n_tokens,
                                   from->text ? strlen(from->text) : 0);
    } else {
        answer_fail(answer, err);
        rpc_call_cancel(call);
    }
    rpc_unpack_free(from);
}

static void generation_done(void *user, struct rpc_call *call, enum rpc_status status,
                            const char *text)
{
    struct generation *self = user;
    struct cli_answer *answer = self->answer;
    (void)call;
    if (self->is_cancelled && status != RPC_OK)
        answer_fail(answer, odsi_fail(ODSI_ERR_CANCELLED, "cancelled"));
    else if (status != RPC_OK)
        answer_fail(answer, fail_status(self->client, status, text));
    else if (!answer->has_summary)
        answer_fail(answer, odsi_fail(ODSI_ERR_CORRUPT,
                                      "%s: the answer ended without a summary, so it may not be "
                                      "whole",
                                      self->client->address));
    generation_finish(self);
}

static const struct rpc_handler generation_handler = {
    .on_message = generation_message,
    .on_done = generation_done,
};

static void generation_start(void *context)
{
    struct generation *self = context;
    struct rpc_call *call = NULL;
    enum odsi_err err = ODSI_OK;
    if (self->client->is_cancelled || self->is_cancelled)
        err = odsi_fail(ODSI_ERR_CANCELLED, "cancelled");
    if (err == ODSI_OK)
        err = rpc_call_open(&call, self->client->channel, "/odsi.v1.Inference/Generate",
                            self->timeout_us, 0, &generation_handler, self);
    if (err != ODSI_OK) {
        answer_fail(self->answer, err);
        generation_finish(self);
        return;
    }
    self->call = call;
    err = rpc_call_send(call, self->request.data, self->request.size);
    if (err == ODSI_OK) {
        rpc_call_half_close(call);
    } else {
        answer_fail(self->answer, err);
        rpc_call_cancel(call);
    }
}

/* protobuf-c has no const members; nothing is written through them. */
static void *unconst(const void *pointer)
{
    union {
        const void *from;
        void *to;
    } cast = {pointer};
    return cast.to;
}

/* Packs request with these messages. */
static enum odsi_err pack_messages(struct buf *out, Odsi__V1__GenerateRequest *request,
                                   const struct cli_message *messages, uint32_t count)
{
    Odsi__V1__ChatMessage *packed = NULL;
    Odsi__V1__ChatMessage **pointers = NULL;
    enum odsi_err err = alloc_zeroed(&packed, count, sizeof *packed);
    if (err == ODSI_OK)
        err = alloc_zeroed(&pointers, count, sizeof(void *));
    for (uint32_t i = 0; i < count && err == ODSI_OK; i++) {
        odsi__v1__chat_message__init(&packed[i]);
        packed[i].role = unconst(messages[i].role);
        packed[i].content = messages[i].content;
        pointers[i] = &packed[i];
    }
    if (err == ODSI_OK) {
        request->n_messages = count;
        request->messages = pointers;
        err = rpc_pack(out, &request->base);
    }
    alloc_free(pointers);
    alloc_free(packed);
    return err;
}

static enum odsi_err pack_request(struct buf *out, const struct cli_request *from)
{
    const struct cli_sampling *sampling = from->sampling;
    char *stops[ARGS_LIST_MAX];
    Odsi__V1__GenerateRequest request = ODSI__V1__GENERATE_REQUEST__INIT;
    request.model = unconst(from->model ? from->model : "");
    request.prompt = unconst(from->prompt ? from->prompt : "");
    request.prompt_tokens = unconst(from->prompt_tokens);
    request.n_prompt_tokens = from->prompt_token_count;
    request.max_tokens = from->max_tokens;
    request.temperature = sampling->temperature;
    request.top_k = sampling->top_k;
    request.top_p = sampling->top_p;
    request.min_p = sampling->min_p;
    request.repetition_penalty = sampling->repetition_penalty;
    request.penalty_window = sampling->penalty_window;
    request.seed = sampling->seed;
    for (uint32_t i = 0; i < sampling->stop.count; i++)
        stops[i] = unconst(sampling->stop.items[i]);
    request.stop = stops;
    request.n_stop = sampling->stop.count;
    request.ignore_end = sampling->ignore_end;
    request.deadline_ms = from->deadline_ms;
    return pack_messages(out, &request, from->messages, from->message_count);
}

enum odsi_err cli_client_generate_start(struct cli_client *self, struct cli_answer *answer,
                                        const struct cli_request *request,
                                        const struct cli_answer_events *events, void *context)
{
    struct generation *generation = NULL;
    memset(answer, 0, sizeof *answer);
    buf_init(&answer->text, TEXT_SIZE_MAX);
    enum odsi_err err = alloc_zeroed(&generation, 1, sizeof *generation);
    if (err != ODSI_OK)
        goto fail;
    *generation =
        (struct generation){.client = self, .answer = answer, .events = events, .context = context};
    generation->timeout_us =
        request->deadline_ms ? (uint64_t)request->deadline_ms * 1000 + DEADLINE_GRACE_US : 0;
    buf_init(&generation->request, REQUEST_SIZE_MAX);
    err = pack_request(&generation->request, request);
    if (err == ODSI_OK)
        err = rpc_loop_post(self->loop, generation_start, generation);
    if (err != ODSI_OK)
        goto fail;
    generation->next = self->running;
    self->running = generation;
    return ODSI_OK;
fail:
    if (generation)
        buf_free(&generation->request);
    alloc_free(generation);
    answer_fail(answer, err);
    return err;
}

void cli_client_run(struct cli_client *self)
{
    if (self->running)
        rpc_loop_run(self->loop);
}

static void watch(void *context)
{
    struct cli_client *self = context;
    struct pollfd fd = {.fd = self->watched_fd, .events = POLLIN};
    if (poll(&fd, 1, 0) > 0)
        cancel_running(self);
    else if (rpc_timer_start(&self->watch, self->loop, WATCH_US, watch, self) != ODSI_OK)
        cancel_running(self); /* nobody could stop it any more */
}

void cli_client_run_until(struct cli_client *self, int fd)
{
    self->watched_fd = fd;
    watch(self);
    cli_client_run(self);
    rpc_timer_cancel(&self->watch);
}

void cli_client_answer_free(struct cli_answer *answer)
{
    alloc_free(answer->tokens);
    alloc_free(answer->logprobs);
    alloc_free(answer->hops);
    buf_free(&answer->text);
    memset(answer, 0, sizeof *answer);
}
