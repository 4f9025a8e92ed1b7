#include "common/net/rpc_client.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/net/rpc_private.h"

#include <grpc/support/time.h>
#include <stdio.h>
#include <string.h>

/* A peer that is silent for so long is asked whether it is there, and given up if it does not
 * answer. The answer waits behind the data on its way, so it needs longer on slow lines. */
#define KEEPALIVE_MS         1000
#define KEEPALIVE_TIMEOUT_MS 4000

/* Tries to connect: how long one may take (name, TCP and TLS across the world; gRPC calls it "min
 * reconnect backoff"), and the pause after the first and after later ones, from start to start. */
#define CONNECT_TIMEOUT_MS 5000
#define RECONNECT_FIRST_MS 100
#define RECONNECT_MAX_MS   500

struct rpc_channel {
    struct rpc_call_owner owner;
    grpc_channel *channel; /* NULL after close */
    uint32_t receive_size_max;
    char address[LIMIT_ADDRESS_SIZE];
};

static void free_channel(struct rpc_channel *self)
{
    rpc_tls_close(&self->owner.tls);
    alloc_free(self);
}

static void on_call_gone(struct rpc_call_owner *owner)
{
    struct rpc_channel *self = RPC_OWNER_OF(owner, struct rpc_channel, owner);
    if (!self->channel && owner->call_count == 0)
        free_channel(self);
}

static grpc_arg int_arg(const char *key, int value)
{
    return (grpc_arg){
        .type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key, .value.integer = value};
}

static grpc_channel *make_channel(struct rpc_channel *self, const char *target,
                                  const struct rpc_channel_config *config)
{
    const uint32_t timeout_ms =
        config->keepalive_timeout_us ? config->keepalive_timeout_us / 1000 : KEEPALIVE_TIMEOUT_MS;
    grpc_arg list[] = {
        int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)self->receive_size_max),
        int_arg(GRPC_ARG_ENABLE_HTTP_PROXY, 0),
        /* Connections are not shared between identities, nor between pins. */
        int_arg(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1),
        int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
        int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, (int)timeout_ms),
        int_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        int_arg(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, RECONNECT_FIRST_MS),
        int_arg(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, CONNECT_TIMEOUT_MS),
        int_arg(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, RECONNECT_MAX_MS),
        int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0),
        int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0),
        int_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1), /* identity */
        int_arg(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1),
        int_arg(GRPC_ARG_ENABLE_RETRIES, 0), /* the caller knows what may be repeated */
    };
    const grpc_channel_args args = {.num_args = sizeof list / sizeof *list, .args = list};
    grpc_channel_credentials *credentials =
        self->owner.tls ? rpc_tls_channel_credentials(self->owner.tls, config->identity)
                        : grpc_insecure_credentials_create();
    grpc_channel *channel = grpc_channel_create(target, credentials, &args);
    grpc_channel_credentials_release(credentials);
    return channel;
}

enum odsi_err rpc_channel_open(struct rpc_channel **out, struct rpc_loop *loop,
                               const struct rpc_channel_config *config)
{
    struct rpc_channel *self = NULL;
    char target[RPC_TARGET_SIZE];
    *out = NULL;
    enum odsi_err err = rpc_address_target(target, config->address);
    if (err != ODSI_OK)
        return err;
    if (!config->identity && !rpc_address_is_loopback(config->address))
        return odsi_fail(ODSI_ERR_DENIED,
                         "%s: connections without an identity are for this machine only; give an "
                         "identity",
                         config->address);
    err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    snprintf(self->address, sizeof self->address, "%s", config->address);
    self->owner.loop = loop;
    self->owner.address = self->address;
    self->owner.on_call_gone = on_call_gone;
    self->receive_size_max =
        config->receive_size_max ? config->receive_size_max : LIMIT_CONTROL_MESSAGE_SIZE;
    if (config->identity)
        err = rpc_tls_open(&self->owner.tls, &(struct rpc_tls_config){
                                                 .loop = loop,
                                                 .identity = config->identity,
                                                 .pin = config->peer_id,
                                                 .admit = config->accept_peer,
                                                 .context = config->accept_context,
                                             });
    if (err == ODSI_OK) {
        self->channel = make_channel(self, target, config);
        if (!self->channel)
            err = odsi_fail(ODSI_ERR_NO_MEMORY, "%s: gRPC makes no channel", config->address);
    }
    if (err != ODSI_OK) {
        free_channel(self);
        return err;
    }
    rpc_loop_attach(loop);
    *out = self;
    return ODSI_OK;
}

void rpc_channel_close(struct rpc_channel **self)
{
    struct rpc_channel *channel = *self;
    if (!channel)
        return;
    *self = NULL;
    rpc_loop_detach(channel->owner.loop);
    rpc_call_cancel_all(&channel->owner);
    grpc_channel_destroy(channel->channel); /* calls keep what they need of it */
    channel->channel = NULL;
    if (channel->owner.call_count == 0)
        free_channel(channel);
}

static gpr_timespec deadline_after(uint64_t timeout_us)
{
    if (timeout_us == 0 || timeout_us > INT64_MAX)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    return gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                        gpr_time_from_micros((int64_t)timeout_us, GPR_TIMESPAN));
}

/* A call that has not begun: rpc_call_begin sends what was queued until then in one batch. */
static enum odsi_err make_call(struct rpc_call **out, struct rpc_channel *channel, const char *path,
                               uint64_t timeout_us, int wait_for_ready,
                               const struct rpc_handler *handler, void *user)
{
    *out = NULL;
    if (!channel->channel)
        return odsi_fail(ODSI_ERR_STATE, "%s: the channel is closed", channel->address);
    grpc_slice method = grpc_slice_from_copied_string(path);
    grpc_call *call = grpc_channel_create_call(channel->channel, NULL, GRPC_PROPAGATE_DEFAULTS,
                                               rpc_loop_queue(channel->owner.loop), method, NULL,
                                               deadline_after(timeout_us), NULL);
    grpc_slice_unref(method);
    if (!call)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "%s: gRPC makes no call", channel->address);
    return rpc_call_make(out, &channel->owner,
                         &(struct rpc_call_setup){
                             .call = call,
                             .is_client = 1,
                             .wait_for_ready = wait_for_ready,
                             .receive_size_max = channel->receive_size_max,
                             .time_left_us = timeout_us ? timeout_us : UINT64_MAX,
                             .handler = handler,
                             .user = user,
                         });
}

enum odsi_err rpc_call_open(struct rpc_call **out, struct rpc_channel *channel, const char *path,
                            uint64_t timeout_us, int wait_for_ready,
                            const struct rpc_handler *handler, void *user)
{
    enum odsi_err err = make_call(out, channel, path, timeout_us, wait_for_ready, handler, user);
    if (err == ODSI_OK)
        rpc_call_begin(*out);
    return err;
}

/* ---- one request, one reply ------------------------------------------------------------------ */

struct unary {
    void (*on_reply)(void *context, enum rpc_status status, const char *text,
                     const struct rpc_message *reply);
    void *context;
    grpc_byte_buffer *reply; /* kept until the status says that it counts */
};

static void on_unary_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct unary *self = user;
    (void)message;
    if (self->reply)
        rpc_call_cancel(call); /* one reply was promised */
    else
        self->reply = rpc_call_take_message(call);
}

static void on_unary_done(void *user, struct rpc_call *call, enum rpc_status status,
                          const char *text)
{
    struct unary *self = user;
    struct rpc_message_reader reader = {.piece_capacity = 0};
    (void)call;
    if (status == RPC_OK && !self->reply) {
        status = RPC_INTERNAL;
        text = "the peer said OK without a reply";
    } else if (status == RPC_OK && rpc_message_read(&reader, self->reply) != ODSI_OK) {
        status = RPC_RESOURCE_EXHAUSTED;
        text = odsi_err_text();
    }
    self->on_reply(self->context, status, text, status == RPC_OK ? &reader.message : NULL);
    rpc_message_free(&reader);
    if (self->reply)
        grpc_byte_buffer_destroy(self->reply);
    alloc_free(self);
}

enum odsi_err rpc_unary(struct rpc_channel *channel, const char *path, uint64_t timeout_us,
                        int wait_for_ready, const void *request, size_t request_size,
                        void (*on_reply)(void *context, enum rpc_status status, const char *text,
                                         const struct rpc_message *reply),
                        void *context)
{
    static const struct rpc_handler handler = {.on_message = on_unary_message,
                                               .on_done = on_unary_done};
    static const struct rpc_handler nobody;
    struct rpc_call *call = NULL;
    struct unary *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->on_reply = on_reply;
    self->context = context;
    err = make_call(&call, channel, path, timeout_us, wait_for_ready, &handler, self);
    if (err == ODSI_OK) {
        err = rpc_call_send_last(call, request, request_size, RPC_OK);
        if (err != ODSI_OK) { /* no memory: nobody will be told */
            rpc_call_set_handler(call, &nobody, NULL);
            rpc_call_cancel(call);
        }
        rpc_call_begin(call);
    }
    if (err != ODSI_OK)
        alloc_free(self);
    return err;
}
