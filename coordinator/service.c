#include "coordinator/service.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/net/rpc_pack.h"
#include "coordinator/directory_service.h"
#include "odsi/v1/coordinator.pb-c.h"

#include <string.h>

#define REQUEST_SIZE_MAX  8192u     /* bytes of any request here; the texts of a Join fit amply */
#define COMPLAIN_EVERY_US 10000000u /* a store that fails for long is not logged more often */
#define RECOVERED_US      5000000u

struct service {
    struct service_config config;
    struct rpc_service rpc;
    struct directory_service *directory;
    struct rpc_timer timer;
    int runs; /* between service_start and service_stop */
    struct members_listener listener;
    uint64_t tick_us;
    uint64_t sweep_us;
    uint64_t swept_at_us; /* monotonic */
    int healthy;
    uint64_t failed_at_us;     /* monotonic */
    uint64_t complained_at_us; /* monotonic; 0: not since it last worked */
};

/* ---- from the wire --------------------------------------------------------------------------- */

static enum odsi_err copy_text(char *out, size_t size, const char *text, const char *field)
{
    const size_t length = text ? strlen(text) : 0;
    if (length >= size)
        return odsi_fail(ODSI_ERR_INVALID, "%s is longer than %zu bytes", field, size - 1);
    memset(out, 0, size);
    if (length > 0)
        memcpy(out, text, length);
    return ODSI_OK;
}

static enum odsi_err read_model(struct members_model *out,
                                const Odsi__V1__ModelDescription *message)
{
    if (!message)
        return odsi_fail(ODSI_ERR_INVALID, "model is missing");
    if (message->model_id.len != DIGEST_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "model_id has %zu bytes, not %u", message->model_id.len,
                         DIGEST_SIZE);
    memcpy(out->id.bytes, message->model_id.data, DIGEST_SIZE);
    out->layer_count = message->layer_count;
    out->context_length = message->context_length;
    out->numerics_version = message->numerics_version;
    return copy_text(out->name, sizeof out->name, message->name, "model name");
}

static enum odsi_err read_capability(struct members_capability *out,
                                     const Odsi__V1__Capability *message)
{
    if (!message)
        return ODSI_OK; /* all of it is a hint, and zero means unknown */
    out->memory_size = message->memory_size;
    out->kv_token_capacity = message->kv_token_capacity;
    out->prefill_tokens_per_s = message->prefill_tokens_per_s;
    out->decode_tokens_per_s = message->decode_tokens_per_s;
    out->thread_count = message->thread_count;
    return copy_text(out->backend, sizeof out->backend, message->backend, "backend");
}

static enum odsi_err read_wish(struct members_wish *out, const Odsi__V1__JoinRequest *message)
{
    enum odsi_err err = copy_text(out->address, sizeof out->address, message->address, "address");
    if (err == ODSI_OK)
        err = read_model(&out->model, message->model);
    if (err == ODSI_OK)
        err = read_capability(&out->capability, message->capability);
    if (err != ODSI_OK)
        return err;
    if (message->layers) {
        out->layer_first = message->layers->first;
        out->layer_end = message->layers->end;
    }
    out->layer_capacity = message->layer_capacity;
    return members_check_wish(out);
}

static enum odsi_err read_beat(struct members_beat *out, const Odsi__V1__HeartbeatRequest *message)
{
    out->ready = message->ready != 0;
    if (message->load) {
        out->load.session_count = message->load->session_count;
        out->load.queued_step_count = message->load->queued_step_count;
        out->load.kv_tokens_free = message->load->kv_tokens_free;
    }
    out->has_capability = message->capability != NULL;
    const enum odsi_err err = read_capability(&out->capability, message->capability);
    return err == ODSI_OK ? members_check_beat(out) : err;
}

/* ---- what happens with the store ------------------------------------------------------------- */

static void set_health(struct service *self, int healthy)
{
    if (self->healthy == healthy)
        return;
    self->healthy = healthy;
    if (self->config.on_health)
        self->config.on_health(self->config.health_context, healthy);
}

/* Keeps account of failures of the store; refusals by a rule are none. */
static void note(struct service *self, enum odsi_err err)
{
    if (err != ODSI_ERR_IO && err != ODSI_ERR_CORRUPT && err != ODSI_ERR_INTERNAL &&
        err != ODSI_ERR_NO_MEMORY)
        return;
    const uint64_t now_us = clock_monotonic_us();
    self->failed_at_us = now_us;
    if (self->complained_at_us == 0 || now_us - self->complained_at_us > COMPLAIN_EVERY_US) {
        self->complained_at_us = now_us;
        log_line(LOG_ERROR, "%s", odsi_err_text());
    }
    set_health(self, 0);
}

/* One success proves little (a full disk can still be read); some time without failure does. */
static void recover(struct service *self)
{
    if (self->healthy || clock_monotonic_us() - self->failed_at_us < RECOVERED_US)
        return;
    self->complained_at_us = 0;
    log_line(LOG_INFO, "the store has stopped failing");
    set_health(self, 1);
}

/* After a change of our own. */
static void publish_change(struct service *self)
{
    note(self, directory_service_notice(self->directory));
}

static void log_join(const struct member *row)
{
    char id[DIGEST_HEX_SIZE];
    digest_to_hex(id, &row->worker_id);
    log_line(LOG_INFO, "member %.12s at %s joined with layers %u-%u of %s", id, row->address,
             row->layer_first, row->layer_end - 1, row->model.name);
}

static void sweep(struct service *self)
{
    const uint64_t now_us = clock_now_us(&self->config.clock);
    uint32_t removed = 0;
    const enum odsi_err err =
        store_expire(self->config.store, members_listen(&self->listener, now_us), now_us, &removed);
    note(self, err);
    if (err == ODSI_OK && removed > 0)
        log_line(LOG_INFO, "%u silent member(s) removed", removed);
}

static void tick(void *context)
{
    struct service *self = context;
    const uint64_t now_us = clock_monotonic_us();
    if (now_us - self->swept_at_us >= self->sweep_us) {
        self->swept_at_us = now_us;
        sweep(self);
    }
    note(self, directory_service_tick(self->directory));
    recover(self);
    if (service_start(self) != ODSI_OK) {
        /* Without its timer this instance serves ghosts; the next call starts it again. */
        self->failed_at_us = now_us;
        log_line(LOG_ERROR, "no memory for a timer");
        set_health(self, 0);
    }
}

/* ---- unary calls ----------------------------------------------------------------------------- */

/* One call of any method but WatchDirectory. */
struct unary {
    struct service *service;
    void (*answer)(struct service *self, struct rpc_call *call, const struct rpc_message *message);
    int answered;
};

/* Who calls, or the call is refused and 0 returned. */
static int identify(struct rpc_call *call, struct digest *out)
{
    if (rpc_call_peer(call, out))
        return 1;
    rpc_call_finish(call, RPC_PERMISSION_DENIED,
                    "members need an identity: connect with mutual TLS, not in plaintext");
    return 0;
}

static void answer_join(struct service *self, struct rpc_call *call,
                        const struct rpc_message *message)
{
    struct members_wish wish;
    struct member row;
    Odsi__V1__JoinRequest *request = NULL;
    memset(&wish, 0, sizeof wish);
    if (!identify(call, &wish.worker_id))
        return;
    enum odsi_err err = rpc_unpack(&request, &odsi__v1__join_request__descriptor, message);
    if (err == ODSI_OK)
        err = read_wish(&wish, request);
    rpc_unpack_free(request);
    if (err == ODSI_OK) {
        err = store_join(self->config.store, &wish, self->config.heartbeat_ms,
                         clock_now_us(&self->config.clock), &row);
        note(self, err);
    }
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return;
    }
    Odsi__V1__LayerRange layers = ODSI__V1__LAYER_RANGE__INIT;
    Odsi__V1__JoinReply reply = ODSI__V1__JOIN_REPLY__INIT;
    layers.first = row.layer_first;
    layers.end = row.layer_end;
    reply.layers = &layers;
    reply.heartbeat_ms = row.heartbeat_ms;
    rpc_reply(call, &reply.base);
    log_join(&row);
    publish_change(self);
}

static void answer_heartbeat(struct service *self, struct rpc_call *call,
                             const struct rpc_message *message)
{
    struct digest worker_id;
    struct members_beat beat;
    Odsi__V1__HeartbeatRequest *request = NULL;
    Odsi__V1__HeartbeatReply reply = ODSI__V1__HEARTBEAT_REPLY__INIT;
    int known = 0;
    memset(&beat, 0, sizeof beat);
    if (!identify(call, &worker_id))
        return;
    enum odsi_err err = rpc_unpack(&request, &odsi__v1__heartbeat_request__descriptor, message);
    if (err == ODSI_OK)
        err = read_beat(&beat, request);
    rpc_unpack_free(request);
    if (err == ODSI_OK) {
        err = store_heartbeat(self->config.store, &worker_id, &beat,
                              clock_now_us(&self->config.clock), &known);
        note(self, err);
    }
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return;
    }
    reply.known = known;
    rpc_reply(call, &reply.base);
    publish_change(self);
}

static void answer_leave(struct service *self, struct rpc_call *call,
                         const struct rpc_message *message)
{
    struct digest worker_id;
    Odsi__V1__LeaveReply reply = ODSI__V1__LEAVE_REPLY__INIT;
    int known = 0;
    (void)message; /* the request has no fields */
    if (!identify(call, &worker_id))
        return;
    const enum odsi_err err = store_leave(self->config.store, &worker_id, &known);
    note(self, err);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return;
    }
    rpc_reply(call, &reply.base);
    if (known) {
        char id[DIGEST_HEX_SIZE];
        digest_to_hex(id, &worker_id);
        log_line(LOG_INFO, "member %.12s left", id);
        publish_change(self);
    }
}

static void answer_get_directory(struct service *self, struct rpc_call *call,
                                 const struct rpc_message *message)
{
    (void)message; /* the request has no fields */
    directory_service_get(self->directory, call);
}

static void unary_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct unary *unary = user;
    if (unary->answered)
        return;
    unary->answered = 1;
    unary->answer(unary->service, call, message);
    /* A tick may have found no memory for the next one. */
    if (unary->service->runs && !unary->service->timer.state &&
        service_start(unary->service) != ODSI_OK)
        log_line(LOG_ERROR, "no memory for a timer");
}

static void unary_half_close(void *user, struct rpc_call *call)
{
    struct unary *unary = user;
    if (unary->answered)
        return;
    unary->answered = 1;
    rpc_call_finish(call, RPC_INVALID_ARGUMENT, "the request is missing");
}

static void unary_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    (void)call;
    (void)status;
    (void)text;
    alloc_free(user);
}

static void *open_unary(struct service *self, struct rpc_call *call,
                        const struct rpc_handler **handler,
                        void (*answer)(struct service *self, struct rpc_call *call,
                                       const struct rpc_message *message))
{
    static const struct rpc_handler unary_handler = {
        .on_message = unary_message,
        .on_half_close = unary_half_close,
        .on_done = unary_done,
    };
    struct unary *unary = NULL;
    const enum odsi_err err = alloc_zeroed(&unary, 1, sizeof *unary);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return NULL;
    }
    unary->service = self;
    unary->answer = answer;
    *handler = &unary_handler;
    return unary;
}

static void *open_join(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    return open_unary(service, call, handler, answer_join);
}

static void *open_heartbeat(void *service, struct rpc_call *call,
                            const struct rpc_handler **handler)
{
    return open_unary(service, call, handler, answer_heartbeat);
}

static void *open_leave(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    return open_unary(service, call, handler, answer_leave);
}

static void *open_get_directory(void *service, struct rpc_call *call,
                                const struct rpc_handler **handler)
{
    return open_unary(service, call, handler, answer_get_directory);
}

static void *open_watch_directory(void *service, struct rpc_call *call,
                                  const struct rpc_handler **handler)
{
    const struct service *self = service;
    return directory_service_watch(self->directory, call, handler);
}

static const struct rpc_method methods[] = {
    {"/odsi.v1.Coordinator/Join", open_join, REQUEST_SIZE_MAX},
    {"/odsi.v1.Coordinator/Heartbeat", open_heartbeat, REQUEST_SIZE_MAX},
    {"/odsi.v1.Coordinator/Leave", open_leave, REQUEST_SIZE_MAX},
    {"/odsi.v1.Coordinator/WatchDirectory", open_watch_directory, REQUEST_SIZE_MAX},
    {"/odsi.v1.Coordinator/GetDirectory", open_get_directory, REQUEST_SIZE_MAX},
};

/* ---- life ------------------------------------------------------------------------------------ */

enum odsi_err service_open(struct service **out, const struct service_config *config)
{
    struct service *self = NULL;
    *out = NULL;
    if (config->heartbeat_ms < MEMBERS_HEARTBEAT_MS_MIN ||
        config->heartbeat_ms > MEMBERS_HEARTBEAT_MS_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "heartbeat of %u ms: must be %u to %u",
                         config->heartbeat_ms, MEMBERS_HEARTBEAT_MS_MIN, MEMBERS_HEARTBEAT_MS_MAX);
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->config = *config;
    self->healthy = 1;
    self->sweep_us = (uint64_t)config->heartbeat_ms * 500;
    self->tick_us = self->sweep_us < SERVICE_POLL_US ? self->sweep_us : SERVICE_POLL_US;
    self->swept_at_us = clock_monotonic_us();
    members_listener_init(&self->listener, self->sweep_us + self->tick_us,
                          clock_now_us(&self->config.clock));
    self->rpc.name = "odsi.v1.Coordinator";
    self->rpc.methods = methods;
    self->rpc.method_count = sizeof methods / sizeof *methods;
    self->rpc.context = self;
    err =
        directory_service_open(&self->directory, config->loop, config->store, &self->config.clock);
    if (err != ODSI_OK) {
        alloc_free(self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void service_close(struct service **self)
{
    if (!*self)
        return;
    rpc_timer_cancel(&(*self)->timer);
    directory_service_close(&(*self)->directory);
    alloc_free(*self);
    *self = NULL;
}

enum odsi_err service_start(struct service *self)
{
    self->runs = 1;
    return rpc_timer_start(&self->timer, self->config.loop, self->tick_us, tick, self);
}

void service_stop(struct service *self)
{
    self->runs = 0;
    rpc_timer_cancel(&self->timer);
    directory_service_stop(self->directory);
}

const struct rpc_service *service_rpc_view(const struct service *self)
{
    return &self->rpc;
}
