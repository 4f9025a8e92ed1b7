/* One gRPC call, unary or streaming, seen from the client or from the server: the same object and
 * the same callbacks for both.
 *
 * Life: opened by rpc_server (on_open of a method) or by rpc_client; then on_message for each
 * message from the peer, in order; on_half_close when the peer has no more (server side);
 * finally exactly one on_done, after which the pointer is dead. Nothing is called after on_done.
 *
 * Flow control: the next message is read only after on_message returned and while the call is not
 * paused, so a slow reader holds its peer back. Sending never blocks: messages queue up to
 * LIMIT_SEND_QUEUE_SIZE bytes per call, then rpc_call_send says ODSI_ERR_BUSY.
 *
 * Threads: callbacks on the loop's thread. rpc_call_send may be called from any thread that holds
 * a reference (rpc_call_ref); everything else on the loop's thread. */
#ifndef ODSI_COMMON_NET_RPC_CALL_H
#define ODSI_COMMON_NET_RPC_CALL_H
#include "common/base/err.h"
#include "common/crypto/digest.h"

#include <stddef.h>
#include <stdint.h>

struct rpc_call;

/* gRPC status codes; the numbers are gRPC's. */
enum rpc_status {
    RPC_OK = 0,
    RPC_CANCELLED = 1,
    RPC_UNKNOWN = 2,
    RPC_INVALID_ARGUMENT = 3,
    RPC_DEADLINE_EXCEEDED = 4,
    RPC_NOT_FOUND = 5,
    RPC_ALREADY_EXISTS = 6,
    RPC_PERMISSION_DENIED = 7,
    RPC_RESOURCE_EXHAUSTED = 8,
    RPC_FAILED_PRECONDITION = 9,
    RPC_ABORTED = 10,
    RPC_OUT_OF_RANGE = 11,
    RPC_UNIMPLEMENTED = 12,
    RPC_INTERNAL = 13,
    RPC_UNAVAILABLE = 14,
    RPC_DATA_LOSS = 15,
    RPC_UNAUTHENTICATED = 16,
};

/* The one mapping between our errors and gRPC's, used for every service. */
enum rpc_status rpc_status_of_err(enum odsi_err err);
enum odsi_err rpc_err_of_status(enum rpc_status status);

/* A received message: its bytes in one or more pieces. Valid during on_message only. */
struct rpc_message {
    size_t size; /* of all pieces */
    size_t piece_count;
    const struct rpc_piece {
        const uint8_t *data;
        size_t size;
    } * pieces;
    uint8_t **flat; /* where rpc_message_flat keeps its copy; NULL in a message made by hand */
};

/* All bytes in one piece: the message's own when there is only one, else a copy made once and kept
 * with the message. NULL when there is no memory (or the message was made by hand from several
 * pieces). Valid during on_message. */
const uint8_t *rpc_message_flat(const struct rpc_message *message);

/* Activation frames (proto/odsi/v1/hop.proto) are protobuf messages of the form
 *     Header header = 1; bytes payload = 2;
 * read without unpacking the payload. */
struct rpc_frame {
    const uint8_t *header; /* inside the message, or in scratch when it lies across pieces */
    size_t header_size;
    size_t payload_size;
    size_t payload_offset; /* in the message */
};

/* Finds header and payload. scratch holds LIMIT_HOP_HEADER_SIZE bytes.
 * Errors: ODSI_ERR_CORRUPT (not of that form, lengths that lie, header too long). */
ODSI_MUST_USE enum odsi_err rpc_frame_read(struct rpc_frame *out, const struct rpc_message *message,
                                           uint8_t *scratch);
/* Copies the payload straight to its place; out has payload_size bytes. */
void rpc_frame_copy_payload(const struct rpc_frame *self, const struct rpc_message *message,
                            void *out);

/* What a call's owner gets told. Any member may be NULL. user is what on_open returned (server) or
 * what rpc_client was given (client). */
struct rpc_handler {
    void (*on_message)(void *user, struct rpc_call *call, const struct rpc_message *message);
    void (*on_half_close)(void *user, struct rpc_call *call);
    /* The queue towards the peer has become empty; for senders that wait for room. */
    void (*on_sent)(void *user, struct rpc_call *call);
    /* status and text are the peer's word on the client side; on the server side status is RPC_OK
     * when our own finish was delivered and RPC_CANCELLED when the peer went away. */
    void (*on_done)(void *user, struct rpc_call *call, enum rpc_status status, const char *text);
};

/* Queues a message of size bytes, copied. Errors: ODSI_ERR_BUSY (queue full), ODSI_ERR_STATE (call
 * ended or half-closed), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err rpc_call_send(struct rpc_call *self, const void *data, size_t size);

/* Queues a frame: header bytes are copied; payload is not copied but released by
 * release(context, payload) once it is no longer needed, on any thread, also when the call fails
 * or ends first; when this function returns an error release is not called and the payload stays
 * the caller's. */
ODSI_MUST_USE enum odsi_err rpc_call_send_frame(struct rpc_call *self, const void *header,
                                                size_t header_size, void *payload,
                                                size_t payload_size,
                                                void (*release)(void *context, void *payload),
                                                void *context);

/* Client: no more messages from us. */
void rpc_call_half_close(struct rpc_call *self);
/* Server: ends the call after what is queued; text may be NULL. */
void rpc_call_finish(struct rpc_call *self, enum rpc_status status, const char *text);
/* Server: finish with the status of err and this thread's error text. */
void rpc_call_fail(struct rpc_call *self, enum odsi_err err);
/* Ends it now, from either side; queued messages are dropped. on_done follows. */
void rpc_call_cancel(struct rpc_call *self);

/* Stops and restarts reading; counted calls are not: the last one wins. */
void rpc_call_pause(struct rpc_call *self);
void rpc_call_resume(struct rpc_call *self);

/* Keeps the object (not the call) alive beyond on_done, so that another thread may still call
 * rpc_call_send (and get ODSI_ERR_STATE). */
struct rpc_call *rpc_call_ref(struct rpc_call *self);
void rpc_call_unref(struct rpc_call *self);

/* Who is at the other end: 1 and its id, or 0 on an insecure connection. */
int rpc_call_peer(const struct rpc_call *self, struct digest *out_id);
/* Its transport address for messages, such as "ipv4:127.0.0.1:40112". Valid until on_done. */
const char *rpc_call_peer_address_view(const struct rpc_call *self);
/* Microseconds until the deadline that the client gave; UINT64_MAX without one. */
uint64_t rpc_call_time_left_us(const struct rpc_call *self);
#endif
