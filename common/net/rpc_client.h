/* gRPC channels and the calls a client makes. Loop thread only, but for open.
 *
 * A peer is written [ID@]host:port, ID being the 64 hex digits of its identity. With an ID the
 * connection is refused unless the peer proves that key. */
#ifndef ODSI_COMMON_NET_RPC_CLIENT_H
#define ODSI_COMMON_NET_RPC_CLIENT_H
#include "common/base/err.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_loop.h"

#include <stddef.h>
#include <stdint.h>

struct rpc_channel;

struct rpc_channel_config {
    const char *address;             /* "host:port"; ":port" means 127.0.0.1 */
    const struct identity *identity; /* ours; NULL: plaintext, loopback addresses only */
    const struct digest *peer_id;    /* NULL: whoever answers, see accept_peer */
    /* With peer_id NULL: asked once per new connection whether this id is the right one (trust on
     * first use); NULL accepts. Loop thread, short. */
    int (*accept_peer)(void *context, const struct digest *peer_id);
    void *accept_context;
    uint32_t receive_size_max; /* bytes of one message; 0: LIMIT_CONTROL_MESSAGE_SIZE */
    /* A peer that stays silent for a second is asked whether it lives; without an answer within
     * this time its calls end with RPC_UNAVAILABLE. The answer queues behind data under way, so
     * slow lines need seconds. 0: 4 s. */
    uint32_t keepalive_timeout_us;
};

/* Splits "[ID@]host:port". *has_id tells whether id was set; address has LIMIT_ADDRESS_SIZE bytes.
 * Errors: ODSI_ERR_INVALID with what is wrong. */
ODSI_MUST_USE enum odsi_err rpc_address_read(const char *text, char *address, struct digest *id,
                                             int *has_id);
/* Whether host:port names the loopback interface. */
int rpc_address_is_loopback(const char *address);

/* Connects lazily and reconnects by itself. Errors: ODSI_ERR_INVALID, ODSI_ERR_DENIED (plaintext
 * outside loopback), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err rpc_channel_open(struct rpc_channel **out, struct rpc_loop *loop,
                                             const struct rpc_channel_config *config);
/* Calls that still run are cancelled (their on_done run later on the loop). *self may be NULL. */
void rpc_channel_close(struct rpc_channel **self);
/* Smoothed round-trip time of unary calls is not measured here; the hop protocol does its own. */

/* Opens a call. timeout_us 0: none (only for long-lived streams). wait_for_ready: keep trying to
 * connect until the timeout instead of failing at once.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_STATE. Otherwise handler's on_done will come. */
ODSI_MUST_USE enum odsi_err rpc_call_open(struct rpc_call **out, struct rpc_channel *channel,
                                          const char *path, uint64_t timeout_us, int wait_for_ready,
                                          const struct rpc_handler *handler, void *user);

/* One request, one reply. on_reply comes exactly once: status RPC_OK with the reply (valid during
 * the callback), or another status with text and reply NULL.
 * Errors: as rpc_call_open; on_reply does not come then. */
ODSI_MUST_USE enum odsi_err
rpc_unary(struct rpc_channel *channel, const char *path, uint64_t timeout_us, int wait_for_ready,
          const void *request, size_t request_size,
          void (*on_reply)(void *context, enum rpc_status status, const char *text,
                           const struct rpc_message *reply),
          void *context);
#endif
