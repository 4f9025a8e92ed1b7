#include "worker/hop/coordinator_client.h"

#include "common/base/alloc.h"
#include "common/base/buf.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/coordinator.pb-c.h"

#include <stdio.h>
#include <string.h>

#define JOIN_TIMEOUT_US    5000000u
#define LEAVE_TIMEOUT_US   1000000u
#define HEARTBEAT_WAIT_US  250000u /* an answer may take this long, or one interval */
#define HEARTBEAT_WAIT_MAX 5000000u
#define BACKOFF_MIN_US     100000u
#define BACKOFF_MAX_US     2000000u
#define MISSED_MAX         3u
#define HEARTBEAT_MS_MIN   10u
#define HEARTBEAT_MS_MAX   600000u
#define BACKEND_SIZE       32u
#define REQUEST_SIZE_MAX   4096u

enum state { JOINING, WAITING, JOINED, GIVEN_UP, LEAVING, LEFT };

struct coordinator_client {
    struct coordinator_client_config config; /* its texts are the copies below */
    char address[LIMIT_ADDRESS_SIZE];
    char model_name[LIMIT_NAME_SIZE];
    char backend[BACKEND_SIZE];
    struct rpc_channel *channels[COORDINATOR_ADDRESSES_MAX];
    uint32_t channel_count;
    uint32_t channel_index; /* the one in use */

    enum state state;
    struct rpc_timer timer; /* the next join or heartbeat */
    int waits_for_reply;    /* of a join or heartbeat */
    uint32_t heartbeat_ms;
    uint32_t failure_count; /* in a row */
    uint64_t sent_at_us;    /* the last heartbeat */
    int is_assigned;        /* layer_first and layer_end of config are what we hold */
    int lost_told;
    int ready;
    void (*fill_load)(void *load_context, struct coordinator_load *out);
    void *load_context;
    void (*on_left)(void *done_context);
    void *left_context;

    uint64_t random; /* for jitter */
    uint32_t hold_count;
    int closed; /* by the owner; freed when nothing holds it any more */
};

static void join(struct coordinator_client *self);
static void beat(struct coordinator_client *self);

/* ---- life ------------------------------------------------------------------------------------ */

/* Calls under way and our own callbacks hold the object, so that the owner may close it in any. */
static void hold(struct coordinator_client *self)
{
    self->hold_count++;
}

static void release(struct coordinator_client *self)
{
    ODSI_ASSERT(self->hold_count > 0);
    self->hold_count--;
    if (self->closed && self->hold_count == 0)
        alloc_free(self);
}

void coordinator_client_close(struct coordinator_client **self)
{
    struct coordinator_client *client = *self;
    if (!client)
        return;
    *self = NULL;
    hold(client);
    client->closed = 1;
    rpc_timer_cancel(&client->timer);
    for (uint32_t i = 0; i < client->channel_count; i++)
        rpc_channel_close(&client->channels[i]);
    release(client);
}

static void use_next_address(struct coordinator_client *self)
{
    self->channel_index = (self->channel_index + 1) % self->channel_count;
}

/* delay_us, up to a quarter more or less, so that a swarm does not come back all at once. */
static uint64_t with_jitter(struct coordinator_client *self, uint64_t delay_us)
{
    self->random ^= self->random << 13;
    self->random ^= self->random >> 7;
    self->random ^= self->random << 17;
    return delay_us - delay_us / 4 + self->random % (delay_us / 2 + 1);
}

static uint64_t backoff_us(struct coordinator_client *self)
{
    const uint32_t doublings = self->failure_count < 6 ? self->failure_count : 6;
    const uint64_t delay_us = (uint64_t)BACKOFF_MIN_US << doublings;
    return with_jitter(self, delay_us < BACKOFF_MAX_US ? delay_us : BACKOFF_MAX_US);
}

static void tell_lost(struct coordinator_client *self, enum odsi_err err, int retrying)
{
    struct odsi_failure failure;
    odsi_failure_take(&failure, err);
    if (self->lost_told && retrying)
        return;
    self->lost_told = 1;
    if (self->config.on_lost)
        self->config.on_lost(self->config.context, &failure, retrying);
}

static void give_up(struct coordinator_client *self, enum odsi_err err)
{
    self->state = GIVEN_UP;
    rpc_timer_cancel(&self->timer);
    tell_lost(self, err, 0);
}

static void on_timer(void *context)
{
    struct coordinator_client *self = context;
    hold(self);
    if (self->state == WAITING)
        join(self);
    else if (self->state == JOINED && !self->waits_for_reply)
        beat(self);
    release(self);
}

static void wake_after(struct coordinator_client *self, uint64_t delay_us)
{
    const enum odsi_err err =
        rpc_timer_start(&self->timer, self->config.loop, delay_us, on_timer, self);
    if (err != ODSI_OK)
        give_up(self, err);
}

static void join_later(struct coordinator_client *self, enum odsi_err err)
{
    const uint64_t delay_us = backoff_us(self);
    self->state = WAITING;
    self->failure_count++;
    use_next_address(self);
    hold(self);
    tell_lost(self, err, 1);
    if (!self->closed && self->state == WAITING)
        wake_after(self, delay_us);
    release(self);
}

/* ---- requests -------------------------------------------------------------------------------- */

/* Packs and sends; on_reply comes once unless this returns an error. */
static enum odsi_err call(struct coordinator_client *self, const char *path, uint64_t timeout_us,
                          const ProtobufCMessage *request,
                          void (*on_reply)(void *context, enum rpc_status status, const char *text,
                                           const struct rpc_message *reply))
{
    struct buf packed;
    buf_init(&packed, REQUEST_SIZE_MAX);
    enum odsi_err err = rpc_pack(&packed, request);
    if (err == ODSI_OK)
        err = rpc_unary(self->channels[self->channel_index], path, timeout_us, 0, packed.data,
                        packed.size, on_reply, self);
    buf_free(&packed);
    if (err == ODSI_OK)
        hold(self);
    return err;
}

static void fill_capability(const struct coordinator_client *self, Odsi__V1__Capability *out)
{
    const struct coordinator_capability *capability = &self->config.capability;
    out->memory_size = capability->memory_size;
    out->kv_token_capacity = capability->kv_token_capacity;
    out->prefill_tokens_per_s = capability->prefill_tokens_per_s;
    out->decode_tokens_per_s = capability->decode_tokens_per_s;
    memcpy(&out->backend, &(const char *){self->backend}, sizeof out->backend);
    out->thread_count = capability->thread_count;
}

static enum odsi_err failed(const struct coordinator_client *self, const char *doing,
                            enum rpc_status status, const char *text)
{
    const enum odsi_err err = rpc_err_of_status(status);
    return odsi_fail(err, "coordinator %u of %u: %s: %s", self->channel_index + 1,
                     self->channel_count, doing, text && *text ? text : odsi_err_name(err));
}

/* ---- joining --------------------------------------------------------------------------------- */

static enum odsi_err take_assignment(struct coordinator_client *self,
                                     const struct rpc_message *message, int *out_changed)
{
    struct coordinator_client_config *config = &self->config;
    Odsi__V1__JoinReply *reply = NULL;
    enum odsi_err err = rpc_unpack(&reply, &odsi__v1__join_reply__descriptor, message);
    if (err != ODSI_OK)
        return err;
    const uint32_t first = reply->layers ? reply->layers->first : 0;
    const uint32_t end = reply->layers ? reply->layers->end : 0;
    const uint32_t heartbeat_ms = reply->heartbeat_ms;
    rpc_unpack_free(reply);
    const int asked = config->layer_first < config->layer_end;
    if (first >= end || end > config->layer_count ||
        (!asked && end - first > config->layer_capacity) ||
        (asked && (first != config->layer_first || end != config->layer_end)))
        return odsi_fail(ODSI_ERR_INVALID,
                         "coordinator: it assigned layers [%u, %u), which were "
                         "not asked for or do not fit",
                         first, end);
    if (heartbeat_ms < HEARTBEAT_MS_MIN || heartbeat_ms > HEARTBEAT_MS_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "coordinator: it wants a heartbeat every %u ms",
                         heartbeat_ms);
    self->heartbeat_ms = heartbeat_ms;
    *out_changed = !self->is_assigned;
    config->layer_first = first;
    config->layer_end = end;
    self->is_assigned = 1;
    return ODSI_OK;
}

static void joined(struct coordinator_client *self, const struct rpc_message *message)
{
    int changed = 0;
    const enum odsi_err err = take_assignment(self, message, &changed);
    if (err != ODSI_OK) {
        join_later(self, err);
        return;
    }
    log_line(LOG_INFO, "joined the swarm with layers %u-%u", self->config.layer_first,
             self->config.layer_end - 1);
    self->state = JOINED;
    self->failure_count = 0;
    self->lost_told = 0;
    self->sent_at_us = clock_monotonic_us();
    /* A row starts as not ready, so who is ready says so at once. */
    wake_after(self, self->ready ? 0 : (uint64_t)self->heartbeat_ms * 1000);
    if (changed && self->config.on_assigned)
        self->config.on_assigned(self->config.context, self->config.layer_first,
                                 self->config.layer_end);
}

static void join_reply(void *context, enum rpc_status status, const char *text,
                       const struct rpc_message *message)
{
    struct coordinator_client *self = context;
    self->waits_for_reply = 0;
    if (!self->closed && self->state == JOINING) {
        if (status == RPC_OK)
            joined(self, message);
        else if (status == RPC_INVALID_ARGUMENT || status == RPC_PERMISSION_DENIED)
            give_up(self, failed(self, "joining was refused", status, text));
        else
            join_later(self, failed(self, "joining", status, text));
    }
    release(self);
}

static void join(struct coordinator_client *self)
{
    const struct coordinator_client_config *config = &self->config;
    Odsi__V1__ModelDescription model = ODSI__V1__MODEL_DESCRIPTION__INIT;
    Odsi__V1__LayerRange layers = ODSI__V1__LAYER_RANGE__INIT;
    Odsi__V1__Capability capability = ODSI__V1__CAPABILITY__INIT;
    Odsi__V1__JoinRequest request = ODSI__V1__JOIN_REQUEST__INIT;
    uint8_t id[DIGEST_SIZE];
    memcpy(id, config->model_id.bytes, sizeof id);
    model.model_id = (ProtobufCBinaryData){.len = sizeof id, .data = id};
    model.name = self->model_name;
    model.layer_count = config->layer_count;
    model.context_length = config->context_length;
    model.numerics_version = config->numerics_version;
    layers.first = config->layer_first;
    layers.end = config->layer_end;
    fill_capability(self, &capability);
    request.address = self->address;
    request.model = &model;
    request.layers = config->layer_first < config->layer_end ? &layers : NULL;
    request.layer_capacity = config->layer_capacity;
    request.capability = &capability;
    self->state = JOINING;
    const enum odsi_err err =
        call(self, "/odsi.v1.Coordinator/Join", JOIN_TIMEOUT_US, &request.base, join_reply);
    if (err == ODSI_OK)
        self->waits_for_reply = 1;
    else
        join_later(self, err);
}

/* ---- heartbeats ------------------------------------------------------------------------------ */

/* Every heartbeat_ms counted from when they were sent, however long the answers took. */
static void beat_later(struct coordinator_client *self)
{
    const uint64_t interval_us = (uint64_t)self->heartbeat_ms * 1000;
    const uint64_t since_us = clock_monotonic_us() - self->sent_at_us;
    wake_after(self, since_us < interval_us ? interval_us - since_us : 0);
}

static void beat_failed(struct coordinator_client *self, enum odsi_err err)
{
    self->failure_count++;
    use_next_address(self);
    hold(self);
    if (self->failure_count >= MISSED_MAX)
        tell_lost(self, err, 1);
    /* No backoff: one try in an interval is no more than the usual load, and the coordinator that
     * comes back counts on hearing everyone within three. */
    if (!self->closed && self->state == JOINED)
        beat_later(self);
    release(self);
}

static void beat_answered(struct coordinator_client *self, const struct rpc_message *message)
{
    Odsi__V1__HeartbeatReply *reply = NULL;
    const enum odsi_err err = rpc_unpack(&reply, &odsi__v1__heartbeat_reply__descriptor, message);
    if (err != ODSI_OK) {
        beat_failed(self, err);
        return;
    }
    const int known = reply->known;
    rpc_unpack_free(reply);
    self->failure_count = 0;
    if (known) {
        self->lost_told = 0;
        beat_later(self);
        return;
    }
    hold(self);
    tell_lost(self, odsi_fail(ODSI_ERR_STATE, "coordinator: it does not know this worker any more"),
              1);
    if (!self->closed && self->state == JOINED)
        join(self);
    release(self);
}

static void beat_reply(void *context, enum rpc_status status, const char *text,
                       const struct rpc_message *message)
{
    struct coordinator_client *self = context;
    self->waits_for_reply = 0;
    if (!self->closed && self->state == JOINED) {
        if (status == RPC_OK)
            beat_answered(self, message);
        else
            beat_failed(self, failed(self, "heartbeat", status, text));
    }
    release(self);
}

static void beat(struct coordinator_client *self)
{
    Odsi__V1__Capability capability = ODSI__V1__CAPABILITY__INIT;
    Odsi__V1__Load load = ODSI__V1__LOAD__INIT;
    Odsi__V1__HeartbeatRequest request = ODSI__V1__HEARTBEAT_REQUEST__INIT;
    struct coordinator_load own = {0};
    const uint64_t interval_us = (uint64_t)self->heartbeat_ms * 1000;
    uint64_t timeout_us = interval_us > HEARTBEAT_WAIT_US ? interval_us : HEARTBEAT_WAIT_US;
    if (timeout_us > HEARTBEAT_WAIT_MAX)
        timeout_us = HEARTBEAT_WAIT_MAX;
    if (self->fill_load)
        self->fill_load(self->load_context, &own);
    if (self->closed || self->state != JOINED)
        return; /* the callback ended it */
    load.session_count = own.session_count;
    load.queued_step_count = own.queued_step_count;
    load.kv_tokens_free = own.kv_tokens_free;
    fill_capability(self, &capability);
    request.ready = self->ready;
    request.load = self->fill_load ? &load : NULL;
    request.capability = &capability;
    self->sent_at_us = clock_monotonic_us();
    const enum odsi_err err =
        call(self, "/odsi.v1.Coordinator/Heartbeat", timeout_us, &request.base, beat_reply);
    if (err == ODSI_OK)
        self->waits_for_reply = 1;
    else
        beat_failed(self, err);
}

static void set_capability(struct coordinator_client *self,
                           const struct coordinator_capability *capability)
{
    self->config.capability = *capability;
    self->config.capability.backend = self->backend;
    snprintf(self->backend, sizeof self->backend, "%s",
             capability->backend ? capability->backend : "");
}

void coordinator_client_set_ready(
    struct coordinator_client *self, const struct coordinator_capability *capability,
    void (*fill_load)(void *load_context, struct coordinator_load *out), void *load_context)
{
    self->ready = 1;
    self->fill_load = fill_load;
    self->load_context = load_context;
    if (capability)
        set_capability(self, capability);
    self->sent_at_us = 0; /* an answer under way does not put off the next one */
    if (self->state == JOINED && !self->waits_for_reply)
        wake_after(self, 0);
}

/* ---- leaving --------------------------------------------------------------------------------- */

static void left(struct coordinator_client *self)
{
    if (self->closed || self->state != LEAVING)
        return;
    self->state = LEFT;
    if (self->on_left)
        self->on_left(self->left_context);
}

static void leave_reply(void *context, enum rpc_status status, const char *text,
                        const struct rpc_message *message)
{
    struct coordinator_client *self = context;
    (void)message;
    if (status != RPC_OK && !self->closed)
        log_line(LOG_WARN, "%s; it will notice by the missing heartbeats",
                 (failed(self, "leaving", status, text), odsi_err_text()));
    left(self);
    release(self);
}

static void leave_unsaid(void *context)
{
    struct coordinator_client *self = context;
    left(self);
    release(self);
}

void coordinator_client_leave(struct coordinator_client *self, void (*on_done)(void *done_context),
                              void *done_context)
{
    const Odsi__V1__LeaveRequest request = ODSI__V1__LEAVE_REQUEST__INIT;
    const int may_be_member = self->state == JOINED || self->state == JOINING;
    ODSI_ASSERT(self->state != LEAVING && self->state != LEFT);
    rpc_timer_cancel(&self->timer);
    self->state = LEAVING;
    self->on_left = on_done;
    self->left_context = done_context;
    if (may_be_member && call(self, "/odsi.v1.Coordinator/Leave", LEAVE_TIMEOUT_US, &request.base,
                              leave_reply) == ODSI_OK)
        return;
    hold(self);
    if (rpc_loop_post(self->config.loop, leave_unsaid, self) != ODSI_OK)
        leave_unsaid(self); /* without memory there is no later */
}

/* ---- opening --------------------------------------------------------------------------------- */

/* One of the addresses, size bytes at text. */
static enum odsi_err add_channel(struct coordinator_client *self, const char *text, size_t size)
{
    char one[LIMIT_ADDRESS_SIZE + DIGEST_HEX_SIZE];
    char address[LIMIT_ADDRESS_SIZE];
    struct digest id;
    int has_id = 0;
    if (self->channel_count == COORDINATOR_ADDRESSES_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "coordinator: more than %u addresses",
                         COORDINATOR_ADDRESSES_MAX);
    if (size >= sizeof one)
        return odsi_fail(ODSI_ERR_INVALID, "coordinator: an address is longer than %zu bytes",
                         sizeof one - 1);
    memcpy(one, text, size);
    one[size] = '\0';
    enum odsi_err err = rpc_address_read(one, address, &id, &has_id);
    if (err != ODSI_OK)
        return odsi_fail_prefix(err, "coordinator '%s'", one);
    const struct rpc_channel_config config = {
        .address = address,
        .identity = self->config.identity,
        .peer_id = has_id ? &id : NULL,
    };
    err = rpc_channel_open(&self->channels[self->channel_count], self->config.loop, &config);
    if (err == ODSI_OK)
        self->channel_count++;
    return err;
}

static enum odsi_err add_channels(struct coordinator_client *self, const char *addresses)
{
    enum odsi_err err = ODSI_OK;
    for (const char *at = addresses; err == ODSI_OK; at++) {
        const size_t size = strcspn(at, ",");
        err = add_channel(self, at, size);
        at += size;
        if (!*at)
            break;
    }
    return err;
}

static enum odsi_err copy_texts(struct coordinator_client *self,
                                const struct coordinator_client_config *config)
{
    const char *backend = config->capability.backend ? config->capability.backend : "";
    if (strlen(config->address) >= sizeof self->address ||
        strlen(config->model_name) >= sizeof self->model_name ||
        strlen(backend) >= sizeof self->backend)
        return odsi_fail(ODSI_ERR_INVALID,
                         "joining: address '%s', model '%s' or backend '%s' is too long",
                         config->address, config->model_name, backend);
    snprintf(self->address, sizeof self->address, "%s", config->address);
    snprintf(self->model_name, sizeof self->model_name, "%s", config->model_name);
    set_capability(self, &config->capability);
    return ODSI_OK;
}

enum odsi_err coordinator_client_open(struct coordinator_client **out,
                                      const struct coordinator_client_config *config)
{
    struct coordinator_client *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->config = *config;
    memcpy(&self->random, identity_id_view(config->identity)->bytes, sizeof self->random);
    self->random = (self->random ^ clock_monotonic_us()) | 1;
    err = copy_texts(self, config);
    if (err != ODSI_OK)
        goto fail;
    err = add_channels(self, config->addresses);
    if (err != ODSI_OK)
        goto fail;
    self->state = WAITING;
    err = rpc_timer_start(&self->timer, config->loop, 0, on_timer, self);
    if (err != ODSI_OK)
        goto fail;
    *out = self;
    return ODSI_OK;
fail:
    coordinator_client_close(&self);
    return err;
}
