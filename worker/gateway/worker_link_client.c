#include "worker/gateway/worker_link_client.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/hop.pb-c.h"

#include <stdio.h>
#include <string.h>

#define CONTROL_PATH   "/odsi.v1.Hop/Control"
#define GET_MODEL_PATH "/odsi.v1.Hop/GetModel"
#define IDLE_CLOSE_US  300000000u /* a connection without sessions is kept this long */

struct worker_link {
    struct worker_link_client *client;
    struct digest worker_id;
    char address[LIMIT_ADDRESS_SIZE];
    struct rpc_channel *channel;
    struct rpc_call *call; /* until its on_done */
    int call_broken;       /* cancelled by us; on_done is still to come */
    struct worker_link_sessions *sessions;
    uint64_t idle_since_us; /* when the last session left */
    int calling; /* sessions are being told; what they do must not close the link under us */
    int closing; /* out of the list; freed in on_done */
};

struct worker_link_client {
    struct rpc_loop *loop;
    const struct identity *identity;
    struct worker_link *links[WORKER_LINK_CLIENT_MAX];
    uint32_t link_count;
    uint32_t ending_count; /* links that wait for their on_done, and GetModel for its reply */
    int closing;
    void (*on_closed)(void *context);
    void *closed_context;
};

enum odsi_err worker_link_client_open(struct worker_link_client **out, struct rpc_loop *loop,
                                      const struct identity *identity)
{
    const enum odsi_err err = alloc_zeroed(out, 1, sizeof **out);
    if (err != ODSI_OK)
        return err;
    (*out)->loop = loop;
    (*out)->identity = identity;
    return ODSI_OK;
}

static void finish_close(struct worker_link_client *self)
{
    if (!self->closing || self->link_count > 0 || self->ending_count > 0)
        return;
    void (*on_closed)(void *context) = self->on_closed;
    void *context = self->closed_context;
    alloc_free(self);
    if (on_closed)
        on_closed(context);
}

static void link_free(struct worker_link *link)
{
    worker_link_close(&link->sessions);
    alloc_free(link);
}

/* Takes a link without sessions out of the list; its memory goes when its stream has ended. */
static void link_close(struct worker_link *link)
{
    struct worker_link_client *client = link->client;
    for (uint32_t i = 0; i < client->link_count; i++) {
        if (client->links[i] == link) {
            client->links[i] = client->links[--client->link_count];
            break;
        }
    }
    link->closing = 1;
    rpc_channel_close(&link->channel);
    if (link->call)
        client->ending_count++;
    else
        link_free(link);
}

void worker_link_client_close(struct worker_link_client **self_pointer,
                              void (*on_closed)(void *context), void *context)
{
    struct worker_link_client *self = *self_pointer;
    *self_pointer = NULL;
    if (!self)
        return;
    while (self->link_count > 0)
        link_close(self->links[self->link_count - 1]);
    self->closing = 1;
    self->on_closed = on_closed;
    self->closed_context = context;
    finish_close(self);
}

/* ---- events ---------------------------------------------------------------------------------- */

static int read_session_id(struct worker_link_event *out, const ProtobufCBinaryData *bytes)
{
    if (bytes->len != HOP_SESSION_ID_SIZE)
        return 0;
    memcpy(out->session_id.bytes, bytes->data, HOP_SESSION_ID_SIZE);
    return 1;
}

static int read_token(struct worker_link_event *out, const Odsi__V1__SessionToken *from,
                      struct hop_timing *timings)
{
    if (from->n_timings > LIMIT_STAGES_MAX)
        return 0;
    for (size_t i = 0; i < from->n_timings; i++) {
        const Odsi__V1__HopTiming *timing = from->timings[i];
        timings[i] = (struct hop_timing){timing->stage, timing->queue_us, timing->compute_us,
                                         timing->network_us, timing->slack_us};
    }
    out->kind = WORKER_LINK_TOKEN;
    out->epoch = from->epoch;
    out->token = (struct generate_token){
        .epoch = from->epoch,
        .position = from->position,
        .token = from->token,
        .logprob = from->logprob,
        .finish = (enum generate_finish)from->finish,
        .timings = timings,
        .timing_count = (uint32_t)from->n_timings,
    };
    return read_session_id(out, &from->session_id);
}

static int read_event(struct worker_link_event *out, const Odsi__V1__ControlEvent *event,
                      struct hop_timing *timings)
{
    switch (event->kind_case) {
    case ODSI__V1__CONTROL_EVENT__KIND_OPENED:
        out->kind = WORKER_LINK_OPENED;
        out->epoch = event->opened->epoch;
        out->held_count = event->opened->held_token_count;
        return read_session_id(out, &event->opened->session_id);
    case ODSI__V1__CONTROL_EVENT__KIND_TOKEN:
        return read_token(out, event->token, timings);
    case ODSI__V1__CONTROL_EVENT__KIND_FAILED:
        out->kind = WORKER_LINK_FAILED;
        out->epoch = event->failed->epoch;
        out->position = event->failed->position;
        out->err = event->failed->error > 0 && event->failed->error < ODSI_ERR_COUNT
                       ? (enum odsi_err)event->failed->error
                       : ODSI_ERR_INTERNAL;
        out->text = event->failed->text;
        return read_session_id(out, &event->failed->session_id);
    default:
        return 0;
    }
}

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct worker_link *link = user;
    Odsi__V1__ControlEvent *packed = NULL;
    struct worker_link_event event = {0};
    struct hop_timing timings[LIMIT_STAGES_MAX];
    if (link->closing || link->call_broken)
        return;
    link->calling = 1;
    const enum odsi_err err = rpc_unpack(&packed, &odsi__v1__control_event__descriptor, message);
    if (err != ODSI_OK || !read_event(&event, packed, timings)) {
        /* It breaks the protocol: nothing else it says can be trusted either. */
        link->call_broken = 1;
        rpc_call_cancel(call);
        worker_link_break_all(link->sessions, "it sent an event that breaks the protocol");
    } else if (!worker_link_dispatch(link->sessions, &event)) {
        log_line(LOG_DEBUG, "%s: an event for a session that is closed", link->address);
    }
    link->calling = 0;
    rpc_unpack_free(packed);
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct worker_link *link = user;
    struct worker_link_client *client = link->client;
    char cause[ODSI_ERR_TEXT_SIZE];
    (void)call;
    link->call = NULL;
    link->call_broken = 0;
    if (link->closing) {
        link_free(link);
        client->ending_count--;
        finish_close(client);
        return;
    }
    snprintf(cause, sizeof cause, "the connection was lost: %s (status %d)",
             text && *text ? text : "the worker ended it", (int)status);
    link->calling = 1;
    worker_link_break_all(link->sessions, cause);
    link->calling = 0;
    link->idle_since_us = clock_monotonic_us();
}

static const struct rpc_handler control_handler = {.on_message = on_message, .on_done = on_done};

/* ---- links ----------------------------------------------------------------------------------- */

static void close_idle(struct worker_link_client *self, uint64_t idle_us)
{
    const uint64_t now_us = clock_monotonic_us();
    for (uint32_t i = self->link_count; i-- > 0;)
        if (worker_link_count(self->links[i]->sessions) == 0 && !self->links[i]->calling &&
            now_us - self->links[i]->idle_since_us >= idle_us)
            link_close(self->links[i]);
}

static enum odsi_err open_channel(struct worker_link *link, const char *address)
{
    const struct rpc_channel_config config = {
        .address = address,
        .identity = link->client->identity,
        .peer_id = &link->worker_id,
        .receive_size_max = LIMIT_UNPACK_SIZE, /* for GetModel: a tokenizer can be large */
    };
    if (strlen(address) >= sizeof link->address)
        return odsi_fail(ODSI_ERR_INVALID, "a worker's address is longer than %zu bytes",
                         sizeof link->address - 1);
    rpc_channel_close(&link->channel);
    const enum odsi_err err = rpc_channel_open(&link->channel, link->client->loop, &config);
    if (err == ODSI_OK)
        memcpy(link->address, address, strlen(address) + 1);
    return err;
}

static enum odsi_err make_link(struct worker_link_client *self, struct worker_link **out,
                               const struct digest *worker_id)
{
    struct worker_link *link = NULL;
    if (self->link_count == WORKER_LINK_CLIENT_MAX)
        close_idle(self, 0);
    if (self->link_count == WORKER_LINK_CLIENT_MAX)
        return odsi_fail(ODSI_ERR_BUSY, "all %u connections to workers are in use",
                         WORKER_LINK_CLIENT_MAX);
    enum odsi_err err = alloc_zeroed(&link, 1, sizeof *link);
    if (err != ODSI_OK)
        return err;
    link->client = self;
    link->worker_id = *worker_id;
    link->idle_since_us = clock_monotonic_us();
    err = worker_link_open(&link->sessions);
    if (err != ODSI_OK) {
        alloc_free(link);
        return err;
    }
    self->links[self->link_count++] = link;
    *out = link;
    return ODSI_OK;
}

static struct worker_link *find_link(struct worker_link_client *self,
                                     const struct digest *worker_id)
{
    for (uint32_t i = 0; i < self->link_count; i++)
        if (digest_equal(&self->links[i]->worker_id, worker_id))
            return self->links[i];
    return NULL;
}

/* The link to a worker, with a channel to the address that the directory has for it now. */
static enum odsi_err get_link(struct worker_link_client *self, struct worker_link **out,
                              const struct digest *worker_id, const char *address)
{
    close_idle(self, IDLE_CLOSE_US);
    *out = find_link(self, worker_id);
    enum odsi_err err = *out ? ODSI_OK : make_link(self, out, worker_id);
    if (err != ODSI_OK)
        return err;
    struct worker_link *link = *out;
    /* It moved: the old connection serves those who use it, the next one goes to the new place. */
    const int moved = !link->call && strcmp(link->address, address) != 0;
    if (!link->channel || moved)
        err = open_channel(link, address);
    if (err != ODSI_OK && worker_link_count(link->sessions) == 0 && !link->calling)
        link_close(link);
    return err;
}

enum odsi_err worker_link_client_join(struct worker_link_client *self, struct worker_link **out,
                                      const struct digest *worker_id, const char *address,
                                      const struct hop_session_id *session_id,
                                      const struct worker_link_handler *handler, void *user)
{
    struct worker_link *link = NULL;
    *out = NULL;
    enum odsi_err err = get_link(self, &link, worker_id, address);
    if (err != ODSI_OK)
        return err;
    if (link->call_broken)
        return odsi_fail(ODSI_ERR_UNAVAILABLE, "its last connection is still being closed");
    if (!link->call)
        err = rpc_call_open(&link->call, link->channel, CONTROL_PATH, 0, 0, &control_handler, link);
    if (err == ODSI_OK)
        err = worker_link_join(link->sessions, session_id, handler, user);
    if (err == ODSI_OK)
        *out = link;
    return err;
}

static enum odsi_err send_request(struct worker_link *link, Odsi__V1__ControlRequest *request)
{
    if (!link->call || link->call_broken)
        return odsi_fail(ODSI_ERR_UNAVAILABLE, "the connection was lost");
    return rpc_send(link->call, &request->base);
}

void worker_link_client_leave(struct worker_link *link, const struct hop_session_id *session_id)
{
    Odsi__V1__CloseSession message = ODSI__V1__CLOSE_SESSION__INIT;
    Odsi__V1__ControlRequest request = ODSI__V1__CONTROL_REQUEST__INIT;
    message.session_id.data = (uint8_t *)(uintptr_t)session_id->bytes;
    message.session_id.len = HOP_SESSION_ID_SIZE;
    request.kind_case = ODSI__V1__CONTROL_REQUEST__KIND_CLOSE;
    request.close = &message;
    const enum odsi_err err = send_request(link, &request);
    /* A worker that cannot be told would keep the session; the end of the stream ends it too. */
    if (err != ODSI_OK && link->call && !link->call_broken) {
        link->call_broken = 1;
        rpc_call_cancel(link->call);
    }
    worker_link_leave(link->sessions, session_id);
    link->idle_since_us = clock_monotonic_us();
}

/* ---- requests -------------------------------------------------------------------------------- */

/* An OpenSession and what it points to; too large for the stack of every caller. */
struct packed_spec {
    Odsi__V1__OpenSession open;
    Odsi__V1__Contract contract;
    Odsi__V1__Sampling sampling;
    Odsi__V1__Stage stages[LIMIT_STAGES_MAX];
    Odsi__V1__Stage *stage_pointers[LIMIT_STAGES_MAX];
    Odsi__V1__LayerRange ranges[LIMIT_STAGES_MAX];
    int64_t budgets[LIMIT_STAGES_MAX];
    ProtobufCBinaryData stops[LIMIT_STOP_COUNT];
};

static void pack_path(struct packed_spec *packed, const struct worker_link_spec *spec)
{
    for (uint32_t i = 0; i < spec->stage_count; i++) {
        const struct hop_stage *stage = &spec->stages[i];
        odsi__v1__layer_range__init(&packed->ranges[i]);
        packed->ranges[i].first = stage->layer_first;
        packed->ranges[i].end = stage->layer_end;
        odsi__v1__stage__init(&packed->stages[i]);
        packed->stages[i].worker_id.data = (uint8_t *)(uintptr_t)stage->worker_id.bytes;
        packed->stages[i].worker_id.len = DIGEST_SIZE;
        packed->stages[i].address = (char *)(uintptr_t)stage->address;
        packed->stages[i].layers = &packed->ranges[i];
        packed->stage_pointers[i] = &packed->stages[i];
        packed->budgets[i] = stage->budget_us;
    }
    packed->open.n_path = spec->stage_count;
    packed->open.path = packed->stage_pointers;
    if (spec->step_budget_us > 0) {
        packed->open.step_budget_us = (int64_t)spec->step_budget_us;
        packed->open.n_stage_budget_us = spec->stage_count;
        packed->open.stage_budget_us = packed->budgets;
    }
}

static void pack_sampling(struct packed_spec *packed, const struct worker_link_spec *spec)
{
    Odsi__V1__Sampling *sampling = &packed->sampling;
    odsi__v1__sampling__init(sampling);
    sampling->temperature = spec->sampling.temperature;
    sampling->top_k = spec->sampling.top_k;
    sampling->top_p = spec->sampling.top_p;
    sampling->min_p = spec->sampling.min_p;
    sampling->repetition_penalty = spec->sampling.repetition_penalty;
    sampling->penalty_window = spec->sampling.penalty_window;
    sampling->seed = spec->sampling.seed;
    sampling->ignore_end = spec->ignore_end;
    sampling->new_tokens_max = spec->new_tokens_max;
    sampling->n_penalty_tokens = spec->penalty_count;
    sampling->penalty_tokens = (uint32_t *)(uintptr_t)spec->penalty_tokens;
    for (uint32_t i = 0; i < spec->stop_count; i++)
        packed->stops[i] =
            (ProtobufCBinaryData){spec->stops[i].size, (uint8_t *)(uintptr_t)spec->stops[i].data};
    sampling->n_stop = spec->stop_count;
    sampling->stop = packed->stops;
    packed->open.sampling = sampling;
}

enum odsi_err worker_link_client_send_open(struct worker_link *link,
                                           const struct worker_link_spec *spec)
{
    ODSI_ASSERT(spec->stage_count <= LIMIT_STAGES_MAX && spec->stop_count <= LIMIT_STOP_COUNT);
    struct packed_spec *packed = NULL;
    Odsi__V1__ControlRequest request = ODSI__V1__CONTROL_REQUEST__INIT;
    enum odsi_err err = alloc_zeroed(&packed, 1, sizeof *packed);
    if (err != ODSI_OK)
        return err;
    odsi__v1__open_session__init(&packed->open);
    odsi__v1__contract__init(&packed->contract);
    packed->contract.model_id.data = (uint8_t *)(uintptr_t)spec->model_id.bytes;
    packed->contract.model_id.len = DIGEST_SIZE;
    packed->contract.numerics_version = spec->numerics_version;
    packed->contract.codec = ODSI__V1__ACTIVATION_CODEC__ACTIVATION_F32;
    packed->contract.kv_type = ODSI__V1__KV_TYPE__KV_F16;
    packed->open.session_id.data = (uint8_t *)(uintptr_t)spec->session_id.bytes;
    packed->open.session_id.len = HOP_SESSION_ID_SIZE;
    packed->open.epoch = spec->epoch;
    packed->open.contract = &packed->contract;
    packed->open.stage = spec->stage;
    packed->open.token_limit = spec->token_limit;
    packed->open.prompt_token_count = spec->prompt_count;
    packed->open.prefix_keys.len = (size_t)spec->prefix_count * DIGEST_SIZE;
    packed->open.prefix_keys.data = (uint8_t *)(uintptr_t)spec->prefix_keys;
    pack_path(packed, spec);
    if (spec->stage + 1 == spec->stage_count)
        pack_sampling(packed, spec);
    request.kind_case = ODSI__V1__CONTROL_REQUEST__KIND_OPEN;
    request.open = &packed->open;
    err = send_request(link, &request);
    alloc_free(packed);
    return err;
}

enum odsi_err worker_link_client_send_step(struct worker_link *link,
                                           const struct hop_header *header, const uint32_t *tokens)
{
    ODSI_ASSERT(header->token_count <= LIMIT_STEP_TOKENS && header->timing_count == 0);
    Odsi__V1__ControlRequest request = ODSI__V1__CONTROL_REQUEST__INIT;
    Odsi__V1__StepFrame frame = ODSI__V1__STEP_FRAME__INIT;
    Odsi__V1__StepHeader packed = ODSI__V1__STEP_HEADER__INIT;
    uint8_t payload[LIMIT_STEP_TOKENS * 4];
    for (uint32_t i = 0; i < header->token_count; i++)
        for (uint32_t byte = 0; byte < 4; byte++)
            payload[4 * i + byte] = (uint8_t)(tokens[i] >> (8 * byte));
    packed.session_id.data = (uint8_t *)(uintptr_t)header->id.bytes;
    packed.session_id.len = HOP_SESSION_ID_SIZE;
    packed.epoch = header->epoch;
    packed.stage = header->stage;
    packed.position = header->position;
    packed.token_count = header->token_count;
    packed.kind = ODSI__V1__STEP_KIND__STEP_TOKENS;
    packed.sample = header->sample;
    packed.budget_us = header->budget_us;
    packed.stage_budget_us = header->stage_budget_us;
    packed.network_us = header->network_us;
    frame.header = &packed;
    frame.payload.data = payload;
    frame.payload.len = 4 * (size_t)header->token_count;
    request.kind_case = ODSI__V1__CONTROL_REQUEST__KIND_STEP;
    request.step = &frame;
    return send_request(link, &request);
}

/* ---- the model ------------------------------------------------------------------------------- */

struct get_model {
    struct worker_link_client *client;
    void (*on_reply)(void *context, enum odsi_err err, const char *text, const uint8_t *manifest,
                     size_t manifest_size, const uint8_t *tokenizer, size_t tokenizer_size);
    void *context;
};

static void model_replied(void *context, enum rpc_status status, const char *text,
                          const struct rpc_message *message)
{
    const struct get_model get = *(struct get_model *)context;
    Odsi__V1__GetModelReply *reply = NULL;
    alloc_free(context);
    if (status != RPC_OK)
        get.on_reply(get.context, rpc_err_of_status(status), text ? text : "", NULL, 0, NULL, 0);
    else if (rpc_unpack(&reply, &odsi__v1__get_model_reply__descriptor, message) != ODSI_OK)
        get.on_reply(get.context, ODSI_ERR_CORRUPT, "its reply is malformed", NULL, 0, NULL, 0);
    else
        get.on_reply(get.context, ODSI_OK, "", reply->manifest.data, reply->manifest.len,
                     reply->tokenizer.data, reply->tokenizer.len);
    rpc_unpack_free(reply);
    get.client->ending_count--;
    finish_close(get.client);
}

enum odsi_err worker_link_client_get_model(
    struct worker_link_client *self, const struct digest *worker_id, const char *address,
    const struct digest *model_id, uint64_t timeout_us,
    void (*on_reply)(void *context, enum odsi_err err, const char *text, const uint8_t *manifest,
                     size_t manifest_size, const uint8_t *tokenizer, size_t tokenizer_size),
    void *context)
{
    struct worker_link *link = NULL;
    struct get_model *get = NULL;
    struct buf packed;
    Odsi__V1__GetModelRequest request = ODSI__V1__GET_MODEL_REQUEST__INIT;
    request.model_id.data = (uint8_t *)(uintptr_t)model_id->bytes;
    request.model_id.len = DIGEST_SIZE;
    buf_init(&packed, 256);
    enum odsi_err err = get_link(self, &link, worker_id, address);
    if (err == ODSI_OK)
        err = rpc_pack(&packed, &request.base);
    if (err == ODSI_OK)
        err = alloc_zeroed(&get, 1, sizeof *get);
    if (err == ODSI_OK) {
        *get = (struct get_model){self, on_reply, context};
        err = rpc_unary(link->channel, GET_MODEL_PATH, timeout_us, 0, packed.data, packed.size,
                        model_replied, get);
    }
    if (err == ODSI_OK)
        self->ending_count++;
    else
        alloc_free(get);
    buf_free(&packed);
    return err;
}
