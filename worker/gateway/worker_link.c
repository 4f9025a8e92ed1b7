#include "worker/gateway/worker_link.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

#include <string.h>

#define BUCKET_COUNT 256u

struct entry {
    struct entry *next;
    struct hop_session_id session_id;
    const struct worker_link_handler *handler;
    void *user;
};

struct worker_link_sessions {
    struct entry *buckets[BUCKET_COUNT];
    uint32_t count;
};

enum odsi_err worker_link_open(struct worker_link_sessions **out)
{
    return alloc_zeroed(out, 1, sizeof **out);
}

void worker_link_close(struct worker_link_sessions **self)
{
    if (!*self)
        return;
    ODSI_ASSERT((*self)->count == 0);
    alloc_free(*self);
    *self = NULL;
}

/* The place that points to the session's entry, or to the NULL at the end of its bucket. Ids are
 * random and our own, so any byte of them spreads well. */
static struct entry **find(struct worker_link_sessions *self,
                           const struct hop_session_id *session_id)
{
    struct entry **at = &self->buckets[session_id->bytes[0] % BUCKET_COUNT];
    while (*at && memcmp(&(*at)->session_id, session_id, sizeof *session_id) != 0)
        at = &(*at)->next;
    return at;
}

enum odsi_err worker_link_join(struct worker_link_sessions *self,
                               const struct hop_session_id *session_id,
                               const struct worker_link_handler *handler, void *user)
{
    struct entry **at = find(self, session_id);
    if (*at)
        return odsi_fail(ODSI_ERR_EXISTS, "this session is open on this worker already");
    if (self->count >= LIMIT_SESSIONS_MAX)
        return odsi_fail(ODSI_ERR_BUSY, "%u sessions are open on this worker", LIMIT_SESSIONS_MAX);
    struct entry *entry = NULL;
    const enum odsi_err err = alloc_zeroed(&entry, 1, sizeof *entry);
    if (err != ODSI_OK)
        return err;
    entry->session_id = *session_id;
    entry->handler = handler;
    entry->user = user;
    *at = entry;
    self->count++;
    return ODSI_OK;
}

void worker_link_leave(struct worker_link_sessions *self, const struct hop_session_id *session_id)
{
    struct entry **at = find(self, session_id);
    struct entry *entry = *at;
    if (!entry)
        return;
    *at = entry->next;
    self->count--;
    alloc_free(entry);
}

uint32_t worker_link_count(const struct worker_link_sessions *self)
{
    return self->count;
}

int worker_link_dispatch(struct worker_link_sessions *self, const struct worker_link_event *event)
{
    const struct entry *entry = *find(self, &event->session_id);
    if (!entry)
        return 0;
    entry->handler->on_event(entry->user, event);
    return 1;
}

void worker_link_break_all(struct worker_link_sessions *self, const char *text)
{
    /* Taken out first: a callback may join the next connection under the same id. A callback ends
     * only its own session, so the entries still to come stay valid. */
    struct entry *all = NULL;
    for (uint32_t i = 0; i < BUCKET_COUNT; i++) {
        while (self->buckets[i]) {
            struct entry *entry = self->buckets[i];
            self->buckets[i] = entry->next;
            entry->next = all;
            all = entry;
        }
    }
    self->count = 0;
    while (all) {
        struct entry *entry = all;
        all = entry->next;
        entry->handler->on_broken(entry->user, text);
        alloc_free(entry);
    }
}
