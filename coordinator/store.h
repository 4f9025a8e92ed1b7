/* What coordinators know, kept where every instance of them sees it: whole transactions, each
 * implemented natively by its store (SQLite here), with the rules of members.h applied inside.
 *
 * Every function either takes effect as a whole or changes nothing; after an error the store goes
 * on answering. An instance keeps nothing of its own, so any of them may die at any moment.
 *
 * version: of the directory; grows with every change of members, layers or readiness, never goes
 * back, also not over restarts and power failures.
 *
 * Threads: one owner. The service calls it on the loop's thread: with SQLite a call takes well
 * under a millisecond (no call waits for the disk but for the rare checkpoint), and waits at most
 * STORE_BUSY_MS for another instance's transaction.
 *
 * Errors of every function: ODSI_ERR_IO (disk full, disk errors), ODSI_ERR_CORRUPT,
 * ODSI_ERR_BUSY (others held the store too long; try again), ODSI_ERR_NO_MEMORY. */
#ifndef ODSI_COORDINATOR_STORE_H
#define ODSI_COORDINATOR_STORE_H
#include "common/base/err.h"
#include "coordinator/members.h"

#include <stdint.h>

#define STORE_BUSY_MS 500u

struct store;

/* url: sqlite:FILE (made when there is none) or sqlite::memory: (gone with the process).
 * Errors: also ODSI_ERR_INVALID (not such a url), ODSI_ERR_UNSUPPORTED (a kind of store that this
 * build does not have, or a file made by a newer one), ODSI_ERR_NOT_FOUND (no such folder). */
ODSI_MUST_USE enum odsi_err store_open(struct store **out, const char *url);
void store_close(struct store **self);

/* Lets a worker in as members_join decides; *out is its row. The wish must be checked.
 * Errors: also those of members_join. */
ODSI_MUST_USE enum odsi_err store_join(struct store *self, const struct members_wish *wish,
                                       uint32_t heartbeat_ms, uint64_t now_us, struct member *out);
/* Takes a checked heartbeat; *out_known is 0 when there is no such member. */
ODSI_MUST_USE enum odsi_err store_heartbeat(struct store *self, const struct digest *worker_id,
                                            const struct members_beat *beat, uint64_t now_us,
                                            int *out_known);
/* Not being a member is no error; *out_known tells. */
ODSI_MUST_USE enum odsi_err store_leave(struct store *self, const struct digest *worker_id,
                                        int *out_known);
/* Removes everyone for whom members_is_expired, and sets times that lie in the future (the clock
 * was set back) to now. */
ODSI_MUST_USE enum odsi_err store_expire(struct store *self, uint64_t since_us, uint64_t now_us,
                                         uint32_t *out_removed);

ODSI_MUST_USE enum odsi_err store_version(struct store *self, uint64_t *out_version);
/* One consistent view: its version, then visit for every member by ascending id. What visit returns
 * other than ODSI_OK ends the reading and is returned. */
ODSI_MUST_USE enum odsi_err
store_read(struct store *self, uint64_t *out_version,
           enum odsi_err (*visit)(void *context, const struct member *row), void *context);

/* What a kind of store implements; its object begins with struct store. */
struct store_kind {
    void (*close)(struct store *self);
    enum odsi_err (*join)(struct store *self, const struct members_wish *wish,
                          uint32_t heartbeat_ms, uint64_t now_us, struct member *out);
    enum odsi_err (*heartbeat)(struct store *self, const struct digest *worker_id,
                               const struct members_beat *beat, uint64_t now_us, int *out_known);
    enum odsi_err (*leave)(struct store *self, const struct digest *worker_id, int *out_known);
    enum odsi_err (*expire)(struct store *self, uint64_t since_us, uint64_t now_us,
                            uint32_t *out_removed);
    enum odsi_err (*version)(struct store *self, uint64_t *out_version);
    enum odsi_err (*read)(struct store *self, uint64_t *out_version,
                          enum odsi_err (*visit)(void *context, const struct member *row),
                          void *context);
};
struct store {
    const struct store_kind *kind;
};
#endif
