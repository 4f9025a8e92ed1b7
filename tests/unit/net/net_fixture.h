/* One loop with an echo server and a client of it, run by the test's own thread until the test
 * says stop. Every run has a watchdog, so that a test fails instead of hanging. */
#ifndef ODSI_TESTS_UNIT_NET_NET_FIXTURE_H
#define ODSI_TESTS_UNIT_NET_NET_FIXTURE_H
#include "common/base/buf.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"

#define NET_WATCHDOG_US 60000000u /* generous: other work shares the machine */
#define NET_CALL_US     30000000u /* a call that should succeed */
#define NET_MESSAGE_MAX (6u << 20)

/* What the server saw of the calls to it. */
struct net_server_log {
    unsigned open_count;
    unsigned message_count;
    unsigned half_close_count;
    unsigned done_count;
    enum rpc_status last_status;
    struct rpc_call *last_call; /* NULL after its end */
    uint64_t time_left_us;
    int has_peer;
    struct digest peer;
    void (*on_open)(void *context); /* called for each new call */
    void (*on_done)(void *context);
    void *context;
};

struct net {
    struct rpc_loop *loop;
    struct rpc_server *server;
    struct rpc_channel *channel;
    struct identity *server_identity; /* NULL: plaintext */
    struct identity *client_identity;
    char address[64];
    struct net_server_log log;
    struct rpc_timer watchdog;
    struct rpc_service service;
    int is_server_closed;
    int is_time_over;
    int with_tls; /* set before net_open */
    int (*admit)(void *context, const struct digest *peer_id);
};

/* Opens all three; config fields of the channel other than address and identity are the caller's
 * (NULL: none). */
void net_open(struct net *self, const struct rpc_channel_config *config);
void net_close(struct net *self);
void net_open_loop(struct net *self);
void net_open_server(struct net *self);
void net_open_channel(struct net *self, const struct rpc_channel_config *config);
/* Runs the loop until rpc_loop_stop; fails the test when the watchdog bites. */
void net_run(struct net *self);

/* Runs the loop for that long. */
void net_run_for(struct net *self, uint64_t time_us);

/* A client's call and what came of it. */
struct net_call {
    struct net *net;
    struct rpc_call *call;
    unsigned message_count;
    unsigned sent_count; /* on_sent */
    unsigned done_count;
    enum rpc_status status;
    char text[256];
    struct buf last; /* the newest message */
    /* Called for each message, when set; on_done stops the loop by itself. */
    void (*on_message)(struct net_call *self, const struct rpc_message *message);
};

void net_call_open(struct net_call *self, struct net *net, const char *path, uint64_t timeout_us);
void net_call_send(struct net_call *self, const void *data, size_t size);
void net_call_free(struct net_call *self);
/* Makes a unary call and runs the loop until its end. */
void net_call_unary(struct net_call *self, struct net *net, const char *path, const void *request,
                    size_t size, uint64_t timeout_us);

/* Starts this very program again, with `variable` set to value and fd as its descriptor 3; a
 * constructor that looks for the variable is its main. Returns the process id. */
int net_spawn_self(const char *variable, const char *value, int fd);

/* An echo server in a process of its own. */
struct net_child {
    int pid;
    char address[64];
};
void net_child_start(struct net_child *self);
/* Sends the signal; after SIGKILL it also waits for the end. */
void net_child_signal(struct net_child *self, int signal);

/* Runs fn(context) after delay_us, once. */
void net_later(struct net *self, uint64_t delay_us, void (*fn)(void *context), void *context);

/* size bytes that depend on seed. */
void net_fill(uint8_t *out, size_t size, uint32_t seed);

/* Methods of the server:
 *   Unary    the request as the reply
 *   Bidi     each message comes back; half-close ends it
 *   Stream   the request is u32 count, u32 size: count messages of size bytes
 *   Hold     opens, reads, and never answers
 *   Paused   as Hold, but never reads
 *   Parse    the request as a HealthCheckRequest, or the error of that
 *   Refuse   ODSI_ERR_DENIED with a text
 *   Small    as Unary, with a limit of 1000 bytes */
#define NET_PATH(method) "/test.Echo/" method
#endif
