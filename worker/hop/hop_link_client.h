/* Links to other workers: one channel and one long-lived Steps stream per peer, shared by all
 * sessions between the two, with its measured round-trip time.
 *
 * Threads: the loop's thread, except where a function says any. */
#ifndef ODSI_WORKER_HOP_HOP_LINK_CLIENT_H
#define ODSI_WORKER_HOP_HOP_LINK_CLIENT_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_loop.h"
#include "worker/hop/hop.h"

struct hop_links;
struct hop_link;

struct hop_link_events {
    /* The peer refused a step of the session; text names why. epoch, stage and position are the
     * refused step's; the session may have another path by now. */
    void (*refused)(void *context, struct hop_link *link, const struct hop_session_id *id,
                    uint32_t epoch, uint32_t stage, uint32_t position,
                    const struct odsi_failure *failure);
    /* The stream ended; the link carries nothing more and is replaced by the next hop_links_get. */
    void (*broken)(void *context, struct hop_link *link, const struct odsi_failure *failure);
};

/* identity must outlive it. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err hop_links_open(struct hop_links **out, struct rpc_loop *loop,
                                           const struct identity *identity,
                                           const struct hop_link_events *events, void *context);
/* Ends every link; when the last stream is over and released, frees self and calls on_closed on the
 * loop's thread (at once when there is none). */
void hop_links_close(struct hop_links *self, void (*on_closed)(void *context), void *context);

/* The link to a worker, opened now when there is none that works. Ended with hop_link_release.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_INVALID (address). */
ODSI_MUST_USE enum odsi_err hop_links_get(struct hop_links *self, struct hop_link **out,
                                          const struct digest *peer_id, const char *address);
/* A link that nobody uses stays for the next session; idle ones are closed when there are many. */
void hop_link_release(struct hop_link *link);

/* Sends one step; header is a packed StepHeader. The payload is released with alloc_free when it
 * is no longer needed; on error it stays the caller's. Never by two threads at
 * once (the one that computes sends).
 * Errors: ODSI_ERR_UNAVAILABLE (broken), ODSI_ERR_BUSY (the peer does not read),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err hop_link_send(struct hop_link *link, const struct buf *header,
                                          void *payload, size_t payload_size);
/* Half the smoothed round trip; 0 before the first measurement. Any thread. */
uint32_t hop_link_one_way_us(const struct hop_link *link);
/* "12345678@host:port" for messages. Valid until release. */
const char *hop_link_name_view(const struct hop_link *link);
#endif
