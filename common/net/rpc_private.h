/* What the files of common/net share with each other and with nobody else. Only files named
 * rpc_*.c may include it, because it brings in the headers of gRPC. */
#ifndef ODSI_COMMON_NET_RPC_PRIVATE_H
#define ODSI_COMMON_NET_RPC_PRIVATE_H
#include "common/base/limits.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <stddef.h>
#include <stdint.h>

/* ---- rpc_loop: events --------------------------------------------------------------------- */

/* What the completion queue gives back; embedded in its owner, which outlives the event. */
struct rpc_tag {
    void (*fn)(struct rpc_tag *self, int ok);
    struct rpc_tag *next; /* while deferred */
};

/* The object that a member belongs to. */
#define RPC_OWNER_OF(pointer, type, member)                                                        \
    ((type *)(void *)((char *)(pointer)-offsetof(type, member)))

grpc_completion_queue *rpc_loop_queue(struct rpc_loop *self);
/* Runs tag (ok 1) on the next turn of the loop. Loop thread. */
void rpc_loop_defer(struct rpc_loop *self, struct rpc_tag *tag);
/* Something exists that still waits for events: rpc_loop_close turns the loop until all of it was
 * released. Loop thread. */
void rpc_loop_hold(struct rpc_loop *self);
void rpc_loop_release(struct rpc_loop *self);
/* A server or channel was opened, and closed: rpc_loop_close insists on the latter. */
void rpc_loop_attach(struct rpc_loop *self);
void rpc_loop_detach(struct rpc_loop *self);

/* ---- rpc_timer: a heap of what is due, inside the loop --------------------------------------- */

struct rpc_timer_heap {
    struct rpc_timer_state **items; /* the earliest first, in heap order */
    size_t count;
    size_t capacity;
    uint64_t next_order; /* equal times fire in the order of their start */
};

struct rpc_timer_heap *rpc_loop_timers(struct rpc_loop *self);
/* Runs what is due at now_us. */
void rpc_timer_fire(struct rpc_timer_heap *heap, uint64_t now_us);
/* When the next one is due; UINT64_MAX without any. */
uint64_t rpc_timer_next_us(const struct rpc_timer_heap *heap);
/* Forgets all; their owners find them idle. */
void rpc_timer_drop_all(struct rpc_timer_heap *heap);

/* ---- rpc_signal ------------------------------------------------------------------------------ */

struct rpc_signal; /* the thread that waits for signals */
ODSI_MUST_USE enum odsi_err rpc_signal_open(struct rpc_signal **out, struct rpc_loop *loop,
                                            void (*fn)(void *context), void *context);
void rpc_signal_close(struct rpc_signal **self);

/* ---- rpc_address ----------------------------------------------------------------------------- */

/* Splits "host:port", "[v6]:port" or ":port"; host has LIMIT_ADDRESS_SIZE bytes and comes without
 * brackets. Errors: ODSI_ERR_INVALID. */
ODSI_MUST_USE enum odsi_err rpc_address_split(const char *address, char *host, uint16_t *port);
/* What gRPC wants to hear to connect (":port" becomes 127.0.0.1) or to listen (":port" becomes
 * every interface). out has RPC_TARGET_SIZE bytes. */
#define RPC_TARGET_SIZE (LIMIT_ADDRESS_SIZE + 32u)
ODSI_MUST_USE enum odsi_err rpc_address_target(char *out, const char *address);
ODSI_MUST_USE enum odsi_err rpc_address_listen(char *out, const char *address);
/* Why a listener could not be bound: binds a socket of its own and reports errno as an error. */
enum odsi_err rpc_address_explain(const char *address);

/* ---- rpc_tls: the only user of gRPC's experimental TLS interface ----------------------------- */

struct rpc_tls;

struct rpc_tls_config {
    struct rpc_loop *loop;
    const struct identity *identity;
    const struct digest *pin; /* the only peer allowed; NULL: see admit */
    int (*admit)(void *context, const struct digest *peer_id);
    void *context;
};

/* Must run before gRPC is initialized for the first time: see the .c file. */
void rpc_tls_enforce_version(void);
ODSI_MUST_USE enum odsi_err rpc_tls_open(struct rpc_tls **out, const struct rpc_tls_config *config);
/* Handshakes that still run are refused; admit is not called again. */
void rpc_tls_close(struct rpc_tls **self);
grpc_channel_credentials *rpc_tls_channel_credentials(struct rpc_tls *self,
                                                      const struct identity *identity);
grpc_server_credentials *rpc_tls_server_credentials(struct rpc_tls *self,
                                                    const struct identity *identity);
/* The id at the other end of a call; loop thread.
 * Errors: ODSI_ERR_DENIED (no certificate, or not the pinned one). */
ODSI_MUST_USE enum odsi_err rpc_tls_peer(struct rpc_tls *self, grpc_call *call, struct digest *out);

/* ---- rpc_call -------------------------------------------------------------------------------- */

/* A channel or a server: where calls come from. */
struct rpc_call_owner {
    struct rpc_loop *loop;
    struct rpc_tls *tls;    /* NULL: plaintext */
    struct rpc_call *calls; /* that have not ended */
    size_t call_count;
    const char *address; /* for messages */
    /* A call has left the list, after its on_done. */
    void (*on_call_gone)(struct rpc_call_owner *self);
};

struct rpc_call_setup {
    grpc_call *call; /* taken, also on errors */
    int is_client;
    int wait_for_ready;
    uint32_t receive_size_max;
    uint64_t time_left_us; /* UINT64_MAX: no deadline */
    const struct rpc_handler *handler;
    void *user;
};

/* Makes the object without starting anything; it is in the owner's list and holds the loop. */
ODSI_MUST_USE enum odsi_err rpc_call_make(struct rpc_call **out, struct rpc_call_owner *owner,
                                          const struct rpc_call_setup *setup);
/* Starts sending and receiving. */
void rpc_call_begin(struct rpc_call *self);
/* Server: whom to tell from now on; NULL: nobody. */
void rpc_call_set_handler(struct rpc_call *self, const struct rpc_handler *handler, void *user);
/* Server: a message and the end in one batch; client: the message and half-close. */
ODSI_MUST_USE enum odsi_err rpc_call_send_last(struct rpc_call *self, const void *data, size_t size,
                                               enum rpc_status status);
int rpc_call_is_finished(struct rpc_call *self);
void rpc_call_cancel_all(struct rpc_call_owner *owner);
/* During on_message: the message's bytes become the caller's, who destroys them. */
grpc_byte_buffer *rpc_call_take_message(struct rpc_call *self);

/* ---- rpc_message ----------------------------------------------------------------------------- */

/* The pieces of a byte buffer, and the flat copy once somebody asked for it. */
struct rpc_message_reader {
    struct rpc_message message;
    struct rpc_piece *pieces;
    size_t piece_capacity;
    uint8_t *flat;
};

/* Fills reader->message from buffer, which must outlive it. */
ODSI_MUST_USE enum odsi_err rpc_message_read(struct rpc_message_reader *reader,
                                             grpc_byte_buffer *buffer);
/* Gives back the flat copy; keeps the array of pieces for the next message. */
void rpc_message_reset(struct rpc_message_reader *reader);
void rpc_message_free(struct rpc_message_reader *reader);

/* ---- rpc_health, rpc_reflection: services that every server has ------------------------------ */

struct rpc_health;
ODSI_MUST_USE enum odsi_err rpc_health_open(struct rpc_health **out);
void rpc_health_close(struct rpc_health **self);
/* The services it answers for; the array must outlive self. */
void rpc_health_set_services(struct rpc_health *self, const struct rpc_service *services,
                             size_t count);
void rpc_health_set_serving(struct rpc_health *self, int serving);
struct rpc_service rpc_health_service(struct rpc_health *self);

struct rpc_reflection;
ODSI_MUST_USE enum odsi_err rpc_reflection_open(struct rpc_reflection **out);
void rpc_reflection_close(struct rpc_reflection **self);
/* The services it lists; the array must outlive self. */
void rpc_reflection_set_services(struct rpc_reflection *self, const struct rpc_service *services,
                                 size_t count);
struct rpc_service rpc_reflection_service(struct rpc_reflection *self, int is_v1);
#endif
