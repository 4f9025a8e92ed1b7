#include "tests/unit/net/net_fixture.h"

#include "common/base/alloc.h"
#include "common/base/bytes.h"
#include "common/base/limits.h"
#include "common/net/rpc_pack.h"
#include "grpc/health/v1/health.pb-c.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

void net_fill(uint8_t *out, size_t size, uint32_t seed)
{
    for (size_t i = 0; i < size; i++) {
        seed = seed * 1664525u + 1013904223u;
        out[i] = (uint8_t)(seed >> 24);
    }
}

/* ---- server -------------------------------------------------------------------------------- */

static void note_open(struct net *self, struct rpc_call *call)
{
    self->log.open_count++;
    self->log.last_call = call;
    self->log.time_left_us = rpc_call_time_left_us(call);
    self->log.has_peer = rpc_call_peer(call, &self->log.peer);
    if (self->log.on_open)
        self->log.on_open(self->log.context);
}

static void echo_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct net *self = user;
    (void)text;
    self->log.done_count++;
    self->log.last_status = status;
    if (self->log.last_call == call)
        self->log.last_call = NULL;
    if (self->log.on_done)
        self->log.on_done(self->log.context);
}

static void on_echo(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct net *self = user;
    self->log.message_count++;
    const uint8_t *data = rpc_message_flat(message);
    cr_assert_not_null(data);
    enum odsi_err err = rpc_call_send(call, data, message->size);
    cr_assert_eq(err, ODSI_OK, "%s", odsi_err_text());
}

static void on_echo_once(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    on_echo(user, call, message);
    rpc_call_finish(call, RPC_OK, NULL);
}

static void on_half_close(void *user, struct rpc_call *call)
{
    struct net *self = user;
    self->log.half_close_count++;
    rpc_call_finish(call, RPC_OK, NULL);
}

static void on_stream_request(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct net *self = user;
    self->log.message_count++;
    cr_assert_eq(message->size, 8);
    const uint8_t *request = rpc_message_flat(message);
    const uint32_t count = bytes_load_u32(request);
    const uint32_t size = bytes_load_u32(request + 4);
    uint8_t *data = NULL;
    cr_assert_eq(alloc_zeroed(&data, size, 1), ODSI_OK);
    for (uint32_t i = 0; i < count; i++) {
        net_fill(data, size, i);
        cr_assert_eq(rpc_call_send(call, data, size), ODSI_OK, "%s", odsi_err_text());
    }
    alloc_free(data);
    rpc_call_finish(call, RPC_OK, NULL);
}

static void on_count_only(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct net *self = user;
    (void)call;
    (void)message;
    self->log.message_count++;
}

static void on_half_close_note(void *user, struct rpc_call *call)
{
    struct net *self = user;
    (void)call;
    self->log.half_close_count++;
}

static void on_parse(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    Grpc__Health__V1__HealthCheckRequest *request = NULL;
    (void)user;
    enum odsi_err err =
        rpc_unpack(&request, &grpc__health__v1__health_check_request__descriptor, message);
    if (err != ODSI_OK)
        rpc_call_fail(call, err);
    else
        rpc_reply(call, &request->base);
    rpc_unpack_free(request);
}

static void *open_unary(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler unary = {.on_message = on_echo_once, .on_done = echo_done};
    note_open(service, call);
    *handler = &unary;
    return service;
}

static void *open_bidi(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler bidi = {
        .on_message = on_echo, .on_half_close = on_half_close, .on_done = echo_done};
    note_open(service, call);
    *handler = &bidi;
    return service;
}

static void *open_stream(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler stream = {.on_message = on_stream_request,
                                              .on_done = echo_done};
    note_open(service, call);
    *handler = &stream;
    return service;
}

static void *open_hold(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler hold = {
        .on_message = on_count_only, .on_half_close = on_half_close_note, .on_done = echo_done};
    note_open(service, call);
    *handler = &hold;
    return service;
}

static void *open_paused(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    rpc_call_pause(call);
    return open_hold(service, call, handler);
}

static void *open_parse(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler parse = {.on_message = on_parse, .on_done = echo_done};
    note_open(service, call);
    *handler = &parse;
    return service;
}

static void *open_refuse(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    (void)handler;
    note_open(service, call);
    rpc_call_fail(call, odsi_fail(ODSI_ERR_DENIED, "not today, 100%% sure: \"%s\"", "no"));
    return NULL;
}

static const struct rpc_method methods[] = {
    {NET_PATH("Unary"), open_unary, NET_MESSAGE_MAX},
    {NET_PATH("Bidi"), open_bidi, NET_MESSAGE_MAX},
    {NET_PATH("Stream"), open_stream, 64},
    {NET_PATH("Hold"), open_hold, NET_MESSAGE_MAX},
    {NET_PATH("Paused"), open_paused, NET_MESSAGE_MAX},
    {NET_PATH("Parse"), open_parse, NET_MESSAGE_MAX},
    {NET_PATH("Refuse"), open_refuse, NET_MESSAGE_MAX},
    {NET_PATH("Small"), open_unary, 1000},
};

/* ---- opening and closing ------------------------------------------------------------------- */

static void bite(void *context)
{
    struct net *self = context;
    rpc_loop_stop(self->loop);
    cr_assert_fail("the test did not end in time");
}

void net_run(struct net *self)
{
    enum odsi_err err = rpc_timer_start(&self->watchdog, self->loop, NET_WATCHDOG_US, bite, self);
    cr_assert_eq(err, ODSI_OK);
    rpc_loop_run(self->loop);
    rpc_timer_cancel(&self->watchdog);
}

void net_open_loop(struct net *self)
{
    cr_assert_eq(rpc_loop_open(&self->loop), ODSI_OK, "%s", odsi_err_text());
}

static enum odsi_err open_server(struct net *self)
{
    self->service = (struct rpc_service){.name = "test.Echo",
                                         .methods = methods,
                                         .method_count = sizeof methods / sizeof *methods,
                                         .context = self};
    enum odsi_err err = self->with_tls ? identity_make(&self->server_identity) : ODSI_OK;
    const struct rpc_server_config config = {.listen = "127.0.0.1:0",
                                             .identity = self->server_identity,
                                             .services = &self->service,
                                             .service_count = 1,
                                             .admit = self->admit,
                                             .admit_context = self};
    if (err == ODSI_OK)
        err = rpc_server_open(&self->server, self->loop, &config);
    if (err == ODSI_OK)
        snprintf(self->address, sizeof self->address, "127.0.0.1:%u",
                 rpc_server_port(self->server));
    return err;
}

void net_open_server(struct net *self)
{
    cr_assert_eq(open_server(self), ODSI_OK, "%s", odsi_err_text());
}

void net_open_channel(struct net *self, const struct rpc_channel_config *config)
{
    struct rpc_channel_config own = config ? *config : (struct rpc_channel_config){.address = NULL};
    if (self->with_tls && !self->client_identity)
        cr_assert_eq(identity_make(&self->client_identity), ODSI_OK, "%s", odsi_err_text());
    if (!own.address)
        own.address = self->address;
    if (!own.identity)
        own.identity = self->client_identity;
    if (!own.receive_size_max)
        own.receive_size_max = NET_MESSAGE_MAX;
    enum odsi_err err = rpc_channel_open(&self->channel, self->loop, &own);
    cr_assert_eq(err, ODSI_OK, "%s", odsi_err_text());
}

void net_open(struct net *self, const struct rpc_channel_config *config)
{
    net_open_loop(self);
    net_open_server(self);
    net_open_channel(self, config);
}

static void on_closed(void *context)
{
    struct net *self = context;
    self->is_server_closed = 1;
    rpc_loop_stop(self->loop);
}

void net_close(struct net *self)
{
    rpc_channel_close(&self->channel);
    if (self->server) {
        rpc_server_close(self->server, on_closed, self);
        self->server = NULL;
        while (!self->is_server_closed) /* ends of calls stop the loop, too */
            net_run(self);
    }
    rpc_loop_close(&self->loop);
    identity_close(&self->server_identity);
    identity_close(&self->client_identity);
}

/* ---- a server in another process ----------------------------------------------------------- */

#define SERVE_VARIABLE "ODSI_TEST_SERVE"

/* The other process is this very program, started again: it serves before main is reached, and
 * never gets there. (A process may not use gRPC after a mere fork.) */
__attribute__((constructor)) static void serve_for_ever(void)
{
    struct net net = {0};
    if (!getenv(SERVE_VARIABLE))
        return;
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* whatever becomes of the test */
    if (rpc_loop_open(&net.loop) != ODSI_OK || open_server(&net) != ODSI_OK)
        _exit(1);
    if (write(3, net.address, sizeof net.address) != (ssize_t)sizeof net.address)
        _exit(1);
    for (;;)
        rpc_loop_run(net.loop);
}

int net_spawn_self(const char *variable, const char *value, int fd)
{
    char path[4096] = "";
    char *argv[] = {path, NULL};
    posix_spawn_file_actions_t actions;
    int pid = -1;
    /* Not /proc/self/exe itself: under valgrind that would be valgrind. */
    cr_assert_gt(readlink("/proc/self/exe", path, sizeof path - 1), 0);
    cr_assert_eq(posix_spawn_file_actions_init(&actions), 0);
    cr_assert_eq(posix_spawn_file_actions_adddup2(&actions, fd, 3), 0);
    cr_assert_eq(setenv(variable, value, 1), 0);
    cr_assert_eq(posix_spawn(&pid, path, &actions, NULL, argv, environ), 0);
    cr_assert_eq(unsetenv(variable), 0);
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

void net_child_start(struct net_child *self)
{
    int fds[2];
    cr_assert_eq(pipe(fds), 0);
    self->pid = net_spawn_self(SERVE_VARIABLE, "1", fds[1]);
    close(fds[1]);
    cr_assert_eq(read(fds[0], self->address, sizeof self->address), sizeof self->address);
    close(fds[0]);
}

void net_child_signal(struct net_child *self, int signal)
{
    cr_assert_eq(kill(self->pid, signal), 0);
    if (signal == SIGKILL)
        cr_assert_eq(waitpid(self->pid, NULL, 0), self->pid);
}

struct later {
    struct rpc_timer timer;
    void (*fn)(void *context);
    void *context;
};

static void run_later(void *context)
{
    struct later later = *(struct later *)context;
    alloc_free(context);
    later.fn(later.context);
}

void net_later(struct net *self, uint64_t delay_us, void (*fn)(void *context), void *context)
{
    struct later *later = NULL;
    cr_assert_eq(alloc_zeroed(&later, 1, sizeof *later), ODSI_OK);
    later->fn = fn;
    later->context = context;
    cr_assert_eq(rpc_timer_start(&later->timer, self->loop, delay_us, run_later, later), ODSI_OK);
}

static void note_time(void *context)
{
    struct net *self = context;
    self->is_time_over = 1;
    rpc_loop_stop(self->loop);
}

void net_run_for(struct net *self, uint64_t time_us)
{
    self->is_time_over = 0;
    net_later(self, time_us, note_time, self);
    while (!self->is_time_over) /* ends of calls stop the loop, too */
        net_run(self);
}

/* ---- client -------------------------------------------------------------------------------- */

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct net_call *self = user;
    cr_assert_eq(call, self->call);
    cr_assert_eq(self->done_count, 0);
    self->message_count++;
    buf_reset(&self->last);
    for (size_t i = 0; i < message->piece_count; i++)
        cr_assert_eq(buf_append(&self->last, message->pieces[i].data, message->pieces[i].size),
                     ODSI_OK);
    cr_assert_eq(self->last.size, message->size);
    if (self->on_message)
        self->on_message(self, message);
}

static void on_sent(void *user, struct rpc_call *call)
{
    struct net_call *self = user;
    (void)call;
    cr_assert_eq(self->done_count, 0);
    self->sent_count++;
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct net_call *self = user;
    cr_assert_eq(call, self->call);
    self->done_count++;
    self->status = status;
    snprintf(self->text, sizeof self->text, "%s", text);
    rpc_loop_stop(self->net->loop);
}

void net_call_open(struct net_call *self, struct net *net, const char *path, uint64_t timeout_us)
{
    static const struct rpc_handler handler = {
        .on_message = on_message, .on_sent = on_sent, .on_done = on_done};
    self->net = net;
    buf_init(&self->last, NET_MESSAGE_MAX);
    enum odsi_err err =
        rpc_call_open(&self->call, net->channel, path, timeout_us, 0, &handler, self);
    cr_assert_eq(err, ODSI_OK, "%s", odsi_err_text());
}

void net_call_send(struct net_call *self, const void *data, size_t size)
{
    cr_assert_eq(rpc_call_send(self->call, data, size), ODSI_OK, "%s", odsi_err_text());
}

void net_call_free(struct net_call *self)
{
    buf_free(&self->last);
}

static void on_reply(void *context, enum rpc_status status, const char *text,
                     const struct rpc_message *reply)
{
    struct net_call *self = context;
    self->done_count++;
    self->status = status;
    snprintf(self->text, sizeof self->text, "%s", text);
    cr_assert_eq(reply != NULL, status == RPC_OK);
    if (reply) {
        self->message_count++;
        cr_assert_eq(buf_append(&self->last, rpc_message_flat(reply), reply->size), ODSI_OK);
    }
    rpc_loop_stop(self->net->loop);
}

void net_call_unary(struct net_call *self, struct net *net, const char *path, const void *request,
                    size_t size, uint64_t timeout_us)
{
    self->net = net;
    buf_init(&self->last, NET_MESSAGE_MAX);
    enum odsi_err err = rpc_unary(net->channel, path, timeout_us, 0, request, size, on_reply, self);
    cr_assert_eq(err, ODSI_OK, "%s", odsi_err_text());
    net_run(net);
    cr_assert_eq(self->done_count, 1);
}
