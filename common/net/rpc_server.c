/* Accepting calls. Each method keeps one accept in the completion queue and puts it back as soon as
 * it fired; one more accept takes every call that no method is registered for, because such a call
 * would otherwise hang until its client's deadline.
 *
 * Closing: no accept is put back; gRPC stops listening and ends every call, and says so through the
 * shutdown tag; the server is freed when that, all accepts and all calls are back. */
#include "common/net/rpc_server.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/net/rpc_private.h"

#include <grpc/support/time.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>

#define CALLS_MAX            16384u /* open at one time; each takes some 10 kB */
#define STREAMS_PER_PEER_MAX 1024
#define BUILT_IN_COUNT       3u  /* services that every server has */
#define PATH_TEXT_SIZE       128 /* bytes of an unknown method's name that are said back */
/* How long a peer may be silent before it is asked whether it is there. Servers ask less often
 * than clients: it is only so that sessions of a machine that lost its power end at all. */
#define KEEPALIVE_MS         10000
#define KEEPALIVE_TIMEOUT_MS 10000
#define PING_INTERVAL_MS     200 /* the least our clients may do; theirs is a second */
#define HANDSHAKE_TIMEOUT_MS 5000

struct accept {
    struct rpc_tag tag;
    struct rpc_server *server;
    const struct rpc_service *service;
    const struct rpc_method *method; /* NULL: the one for unknown methods */
    void *registered;
    grpc_call *call;
    gpr_timespec deadline;
    grpc_metadata_array metadata;
    grpc_call_details details;
};

struct rpc_server {
    struct rpc_call_owner owner;
    grpc_server *server;
    uint16_t port;
    char address[LIMIT_ADDRESS_SIZE];
    struct rpc_health *health;
    struct rpc_reflection *reflection;
    struct rpc_service *services; /* the caller's, then ours */
    size_t service_count;
    struct accept *accepts; /* one per method, then the one for unknown methods */
    size_t accept_count;
    size_t pending_count; /* accepts in the completion queue */
    int is_closing;
    int is_shut_down;
    struct rpc_tag shutdown_tag;
    void (*on_closed)(void *context);
    void *closed_context;
};

/* ---- closing ------------------------------------------------------------------------------ */

static void free_server(struct rpc_server *self)
{
    rpc_tls_close(&self->owner.tls);
    rpc_health_close(&self->health);
    rpc_reflection_close(&self->reflection);
    for (size_t i = 0; i < self->accept_count; i++) {
        grpc_metadata_array_destroy(&self->accepts[i].metadata);
        grpc_call_details_destroy(&self->accepts[i].details);
    }
    alloc_free(self->accepts);
    alloc_free(self->services);
    alloc_free(self);
}

static void maybe_closed(struct rpc_server *self)
{
    if (!self->is_closing || !self->is_shut_down || self->pending_count > 0 ||
        self->owner.call_count > 0)
        return;
    struct rpc_loop *loop = self->owner.loop;
    void (*on_closed)(void *context) = self->on_closed;
    void *context = self->closed_context;
    grpc_server_destroy(self->server);
    free_server(self);
    rpc_loop_release(loop);
    if (on_closed)
        on_closed(context);
}

static void on_call_gone(struct rpc_call_owner *owner)
{
    maybe_closed(RPC_OWNER_OF(owner, struct rpc_server, owner));
}

static void on_shut_down(struct rpc_tag *tag, int ok)
{
    (void)ok;
    struct rpc_server *self = RPC_OWNER_OF(tag, struct rpc_server, shutdown_tag);
    self->is_shut_down = 1;
    maybe_closed(self);
}

void rpc_server_close(struct rpc_server *self, void (*on_closed)(void *context), void *context)
{
    if (!self)
        return;
    ODSI_ASSERT(!self->is_closing);
    self->is_closing = 1;
    self->on_closed = on_closed;
    self->closed_context = context;
    rpc_loop_detach(self->owner.loop);
    grpc_server_shutdown_and_notify(self->server, rpc_loop_queue(self->owner.loop),
                                    &self->shutdown_tag);
    rpc_call_cancel_all(&self->owner);
    grpc_server_cancel_all_calls(self->server); /* without it open streams hold it up for ever */
}

/* ---- accepting ---------------------------------------------------------------------------- */

static void arm(struct accept *accept)
{
    struct rpc_server *self = accept->server;
    grpc_completion_queue *queue = rpc_loop_queue(self->owner.loop);
    accept->call = NULL;
    const grpc_call_error error =
        accept->method
            ? grpc_server_request_registered_call(self->server, accept->registered, &accept->call,
                                                  &accept->deadline, &accept->metadata, NULL, queue,
                                                  queue, &accept->tag)
            : grpc_server_request_call(self->server, &accept->call, &accept->details,
                                       &accept->metadata, queue, queue, &accept->tag);
    ODSI_ASSERT(error == GRPC_CALL_OK);
    self->pending_count++;
}

static uint64_t time_left(gpr_timespec deadline)
{
    const gpr_timespec left = gpr_time_sub(gpr_convert_clock_type(deadline, GPR_CLOCK_MONOTONIC),
                                           gpr_now(GPR_CLOCK_MONOTONIC));
    if (gpr_time_cmp(left, gpr_inf_future(GPR_TIMESPAN)) == 0)
        return UINT64_MAX;
    if (left.tv_sec < 0)
        return 0;
    return (uint64_t)left.tv_sec * 1000000u + (uint64_t)left.tv_nsec / 1000u;
}

/* What is wrong with a call before its method hears of it; RPC_OK if nothing. */
static enum rpc_status judge(struct rpc_server *self, const struct accept *accept,
                             const struct rpc_call *call, const char *path, char *text, size_t size)
{
    struct digest id;
    if (self->owner.call_count > CALLS_MAX) {
        snprintf(text, size, "%u calls are open here; try again later", CALLS_MAX);
        return RPC_RESOURCE_EXHAUSTED;
    }
    if (self->owner.tls && !rpc_call_peer(call, &id)) {
        snprintf(text, size, "the connection has not proved who the peer is");
        return RPC_UNAUTHENTICATED;
    }
    if (!accept->method) {
        snprintf(text, size, "method '%s' is not served here", path);
        return RPC_UNIMPLEMENTED;
    }
    return RPC_OK;
}

static void open_call(struct accept *accept, grpc_call *grpc, uint64_t time_left_us,
                      const char *path)
{
    struct rpc_server *self = accept->server;
    const struct rpc_method *method = accept->method;
    const struct rpc_handler *handler = NULL;
    const struct rpc_call_setup setup = {
        .call = grpc,
        .receive_size_max = method ? method->receive_size_max : 0,
        .time_left_us = time_left_us,
    };
    struct rpc_call *call = NULL;
    char text[256];
    if (rpc_call_make(&call, &self->owner, &setup) != ODSI_OK)
        return; /* refused for want of memory */
    const enum rpc_status status = judge(self, accept, call, path, text, sizeof text);
    if (status != RPC_OK) {
        rpc_call_finish(call, status, text);
    } else {
        void *user = method->on_open(accept->service->context, call, &handler);
        rpc_call_set_handler(call, handler, user);
        if (!handler && !rpc_call_is_finished(call))
            rpc_call_finish(call, RPC_INTERNAL, "the method did not take the call");
    }
    rpc_call_begin(call);
}

static void on_accept(struct rpc_tag *tag, int ok)
{
    struct accept *accept = RPC_OWNER_OF(tag, struct accept, tag);
    struct rpc_server *self = accept->server;
    char path[PATH_TEXT_SIZE] = "";
    self->pending_count--;
    if (!ok) { /* shutting down */
        maybe_closed(self);
        return;
    }
    grpc_call *call = accept->call;
    gpr_timespec deadline = accept->deadline;
    if (!accept->method) {
        deadline = accept->details.deadline;
        const size_t size = GRPC_SLICE_LENGTH(accept->details.method);
        snprintf(path, sizeof path, "%.*s", size < sizeof path ? (int)size : PATH_TEXT_SIZE - 1,
                 (const char *)GRPC_SLICE_START_PTR(accept->details.method));
        grpc_call_details_destroy(&accept->details);
        grpc_call_details_init(&accept->details);
    }
    grpc_metadata_array_destroy(&accept->metadata);
    grpc_metadata_array_init(&accept->metadata);
    if (self->is_closing) {
        grpc_call_cancel(call, NULL);
        grpc_call_unref(call);
        maybe_closed(self);
        return;
    }
    arm(accept);
    open_call(accept, call, time_left(deadline), path);
}

/* ---- opening ------------------------------------------------------------------------------ */

/* Each connection is a descriptor; gRPC 1.51 stops listening for good when it runs out of them. */
static void raise_file_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max)
        return;
    limit.rlim_cur = limit.rlim_max;
    (void)setrlimit(RLIMIT_NOFILE, &limit); /* as much as we are allowed to */
}

static grpc_arg int_arg(const char *key, int value)
{
    return (grpc_arg){
        .type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key, .value.integer = value};
}

static enum odsi_err make_server(struct rpc_server *self)
{
    uint32_t receive_size_max = 1;
    for (size_t i = 0; i < self->service_count; i++)
        for (size_t k = 0; k < self->services[i].method_count; k++)
            if (self->services[i].methods[k].receive_size_max > receive_size_max)
                receive_size_max = self->services[i].methods[k].receive_size_max;
    grpc_arg list[] = {
        /* gRPC knows one limit for all methods; rpc_call checks each method's own. */
        int_arg(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)receive_size_max),
        int_arg(GRPC_ARG_ALLOW_REUSEPORT, 0), /* or two servers share a port in silence */
        int_arg(GRPC_ARG_MAX_CONCURRENT_STREAMS, STREAMS_PER_PEER_MAX),
        int_arg(GRPC_ARG_KEEPALIVE_TIME_MS, KEEPALIVE_MS),
        int_arg(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, KEEPALIVE_TIMEOUT_MS),
        int_arg(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0),
        int_arg(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, PING_INTERVAL_MS),
        int_arg(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0),
        int_arg(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, HANDSHAKE_TIMEOUT_MS),
        /* A compressed message may be a thousand times larger than it looks. */
        int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0),
        int_arg(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0),
        int_arg(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1), /* identity */
    };
    const grpc_channel_args args = {.num_args = sizeof list / sizeof *list, .args = list};
    self->server = grpc_server_create(&args, NULL);
    if (!self->server)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "gRPC makes no server");
    grpc_server_register_completion_queue(self->server, rpc_loop_queue(self->owner.loop), NULL);
    return ODSI_OK;
}

static enum odsi_err add_services(struct rpc_server *self, const struct rpc_server_config *config)
{
    self->service_count = config->service_count + BUILT_IN_COUNT;
    enum odsi_err err = alloc_zeroed(&self->services, self->service_count, sizeof *self->services);
    if (err == ODSI_OK)
        err = rpc_health_open(&self->health);
    if (err == ODSI_OK)
        err = rpc_reflection_open(&self->reflection);
    if (err != ODSI_OK)
        return err;
    for (size_t i = 0; i < config->service_count; i++)
        self->services[i] = config->services[i];
    struct rpc_service *built_in = self->services + config->service_count;
    built_in[0] = rpc_health_service(self->health);
    built_in[1] = rpc_reflection_service(self->reflection, 1);
    built_in[2] = rpc_reflection_service(self->reflection, 0);
    rpc_reflection_set_services(self->reflection, self->services, self->service_count);
    rpc_health_set_services(self->health, self->services, self->service_count);
    size_t count = 1; /* for unknown methods */
    for (size_t i = 0; i < self->service_count; i++)
        count += self->services[i].method_count;
    err = alloc_zeroed(&self->accepts, count, sizeof *self->accepts);
    if (err == ODSI_OK)
        self->accept_count = count;
    return err;
}

static struct accept *init_accept(struct rpc_server *self, size_t index)
{
    struct accept *accept = &self->accepts[index];
    accept->server = self;
    accept->tag.fn = on_accept;
    grpc_metadata_array_init(&accept->metadata);
    grpc_call_details_init(&accept->details);
    return accept;
}

static enum odsi_err register_methods(struct rpc_server *self)
{
    size_t index = 0;
    enum odsi_err err = ODSI_OK;
    for (size_t i = 0; i < self->service_count; i++) {
        for (size_t k = 0; k < self->services[i].method_count; k++) {
            struct accept *accept = init_accept(self, index++);
            accept->service = &self->services[i];
            accept->method = &self->services[i].methods[k];
            accept->registered = grpc_server_register_method(self->server, accept->method->path,
                                                             NULL, GRPC_SRM_PAYLOAD_NONE, 0);
            if (!accept->registered && err == ODSI_OK)
                err = odsi_fail(ODSI_ERR_INVALID, "method %s stands twice in the tables",
                                accept->method->path);
        }
    }
    init_accept(self, index);
    return err;
}

static enum odsi_err bind_port(struct rpc_server *self, const struct rpc_server_config *config)
{
    char listen[RPC_TARGET_SIZE];
    enum odsi_err err = rpc_address_listen(listen, config->listen);
    if (err != ODSI_OK)
        return err;
    grpc_server_credentials *credentials =
        self->owner.tls ? rpc_tls_server_credentials(self->owner.tls, config->identity)
                        : grpc_insecure_server_credentials_create();
    const int port = grpc_server_add_http2_port(self->server, listen, credentials);
    grpc_server_credentials_release(credentials);
    if (port <= 0)
        return rpc_address_explain(config->listen);
    self->port = (uint16_t)port;
    return ODSI_OK;
}

static enum odsi_err check_config(const struct rpc_server_config *config)
{
    char host[LIMIT_ADDRESS_SIZE];
    uint16_t port = 0;
    enum odsi_err err = rpc_address_split(config->listen, host, &port);
    if (err != ODSI_OK)
        return err;
    if (!config->identity && (host[0] == '\0' || !rpc_address_is_loopback(config->listen)))
        return odsi_fail(ODSI_ERR_DENIED,
                         "cannot listen on %s: without an identity only this machine may connect; "
                         "give an identity or listen on 127.0.0.1",
                         config->listen);
    return ODSI_OK;
}

enum odsi_err rpc_server_open(struct rpc_server **out, struct rpc_loop *loop,
                              const struct rpc_server_config *config)
{
    struct rpc_server *self = NULL;
    *out = NULL;
    enum odsi_err err = check_config(config);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    snprintf(self->address, sizeof self->address, "%s", config->listen);
    self->owner.loop = loop;
    self->owner.address = self->address;
    self->owner.on_call_gone = on_call_gone;
    self->shutdown_tag.fn = on_shut_down;
    raise_file_limit();
    err = add_services(self, config);
    if (err == ODSI_OK && config->identity)
        err = rpc_tls_open(&self->owner.tls, &(struct rpc_tls_config){
                                                 .loop = loop,
                                                 .identity = config->identity,
                                                 .admit = config->admit,
                                                 .context = config->admit_context,
                                             });
    if (err == ODSI_OK)
        err = make_server(self);
    if (err != ODSI_OK) {
        self->accept_count = 0; /* nothing in them yet */
        free_server(self);
        return err;
    }
    rpc_loop_attach(loop);
    rpc_loop_hold(loop); /* from here on only the loop can end it */
    err = register_methods(self);
    if (err == ODSI_OK)
        err = bind_port(self, config);
    if (err != ODSI_OK) {
        rpc_server_close(self, NULL, NULL);
        return err;
    }
    grpc_server_start(self->server);
    for (size_t i = 0; i < self->accept_count; i++)
        arm(&self->accepts[i]);
    *out = self;
    return ODSI_OK;
}

uint16_t rpc_server_port(const struct rpc_server *self)
{
    return self->port;
}

void rpc_server_set_serving(struct rpc_server *self, int serving)
{
    rpc_health_set_serving(self->health, serving);
}
