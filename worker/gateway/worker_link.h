/* The sessions that share one connection to a worker: who is told what arrives for which session.
 *
 * Pure: worker_link_client feeds it. Callbacks run inside dispatch and break_all; they may join and
 * leave sessions, this one included. Threads: one owner. */
#ifndef ODSI_WORKER_GATEWAY_WORKER_LINK_H
#define ODSI_WORKER_GATEWAY_WORKER_LINK_H
#include "common/base/err.h"
#include "worker/gateway/generate.h"
#include "worker/hop/hop.h"

#include <stdint.h>

enum worker_link_event_kind { WORKER_LINK_OPENED, WORKER_LINK_TOKEN, WORKER_LINK_FAILED };

/* What a worker says about one session; pointers are valid during the callback. */
struct worker_link_event {
    enum worker_link_event_kind kind;
    struct hop_session_id session_id;
    uint32_t epoch;
    uint32_t held_count;         /* OPENED */
    struct generate_token token; /* TOKEN */
    enum odsi_err err;           /* FAILED */
    uint32_t position;           /* FAILED */
    const char *text;            /* FAILED */
};

struct worker_link_handler {
    void (*on_event)(void *user, const struct worker_link_event *event);
    /* The connection is gone, and the session is no longer joined. */
    void (*on_broken)(void *user, const char *text);
};

struct worker_link_sessions;

ODSI_MUST_USE enum odsi_err worker_link_open(struct worker_link_sessions **out);
/* Must have no sessions left. */
void worker_link_close(struct worker_link_sessions **self);

/* Errors: ODSI_ERR_EXISTS (the session has joined), ODSI_ERR_BUSY (LIMIT_SESSIONS_MAX have),
 * ODSI_ERR_NO_MEMORY. handler must stay valid. */
ODSI_MUST_USE enum odsi_err worker_link_join(struct worker_link_sessions *self,
                                             const struct hop_session_id *session_id,
                                             const struct worker_link_handler *handler, void *user);
/* Harmless for a session that is not there. */
void worker_link_leave(struct worker_link_sessions *self, const struct hop_session_id *session_id);
uint32_t worker_link_count(const struct worker_link_sessions *self);

/* Returns 0 when nobody has joined the event's session: it was closed, or never ours. */
int worker_link_dispatch(struct worker_link_sessions *self, const struct worker_link_event *event);
/* Takes out every session and tells it. */
void worker_link_break_all(struct worker_link_sessions *self, const char *text);
#endif
