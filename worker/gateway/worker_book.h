/* What this gateway has seen of each worker itself: how long its layers take, how far it is, how
 * many of our sessions it has, and whether it failed lately (draft 6.1, 7.3). The directory's
 * figures are a worker's own word; these are observations, and come first.
 * Pure; threads: one owner. */
#ifndef ODSI_WORKER_GATEWAY_WORKER_BOOK_H
#define ODSI_WORKER_GATEWAY_WORKER_BOOK_H
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "worker/gateway/deadline.h"
#include "worker/gateway/directory.h"
#include "worker/gateway/path.h"

#include <stdint.h>

/* After a failure a worker is taken only when there is no other, for this long. */
#define WORKER_BOOK_AVOID_US 10000000u

struct worker_book;

ODSI_MUST_USE enum odsi_err worker_book_open(struct worker_book **out);
void worker_book_close(struct worker_book **self);

/* One decode step on layer_count layers of a worker. Forgotten when there is no memory. */
void worker_book_add_step(struct worker_book *self, const struct digest *worker_id,
                          uint32_t layer_count, uint32_t compute_us, uint32_t network_us);
/* A session of ours came to a worker (+1) or left it (-1). */
void worker_book_count_session(struct worker_book *self, const struct digest *worker_id,
                               int change);
void worker_book_add_failure(struct worker_book *self, const struct digest *worker_id,
                             uint64_t now_us);
/* Forgets workers that are neither in the directory nor in use. */
void worker_book_prune(struct worker_book *self, const struct directory *directory);

/* How path_choose sees a worker. */
void worker_book_member(const struct worker_book *self, const struct directory_member *member,
                        uint64_t now_us, struct path_member *out);
/* What is expected of layer_count of its layers. */
void worker_book_expect(const struct worker_book *self, const struct directory_member *member,
                        uint32_t layer_count, struct deadline_stage *out);
#endif
