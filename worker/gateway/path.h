/* Choosing a path (draft 6.1, 7.3): which workers run a session, and which layers on each.
 *
 * A shortest path over layer boundaries: a worker may serve any part of the range that it holds,
 * so the ranges of replicas need not line up. The cost of a stage is
 *     hop_us + wait_us + layers * layer_us,
 * so longer stages on fewer workers win unless a worker is slow or busy. Pure functions; any
 * thread. Time is O(members * layers). */
#ifndef ODSI_WORKER_GATEWAY_PATH_H
#define ODSI_WORKER_GATEWAY_PATH_H
#include "common/base/err.h"
#include "common/base/limits.h"

#include <stddef.h>
#include <stdint.h>

/* Workers whose cost for a stage, load left out, is within this of each other are equal. */
#define PATH_EQUAL_PERCENT 10u

/* One worker as the chooser sees it; its index in the array is its name. */
struct path_member {
    uint32_t layer_first; /* holds [layer_first, layer_end) */
    uint32_t layer_end;
    uint32_t layer_us; /* computing one decode step of one layer */
    uint32_t hop_us;   /* bringing a step to it; 0 counts as 1, so that fewer stages win ties */
    uint32_t wait_us;  /* expected wait behind the load it has */
};

struct path_stage {
    uint32_t member_index;
    uint32_t layer_first;
    uint32_t layer_end;
};

/* Where chance comes from; tests inject their own. */
struct path_random {
    uint32_t (*next)(void *context);
    void *context;
};

/* Fills stages (LIMIT_STAGES_MAX of them) with a path over [0, layer_count): each worker at most
 * once. Among equal replicas of a stage two are drawn at random and the less loaded one is taken
 * (the power of two choices: a stale directory must not send every gateway to the same worker);
 * with random NULL, or one replica, the cheapest is taken, the lower index on a tie.
 * Errors: ODSI_ERR_UNAVAILABLE (a layer is held by nobody; the first is named), ODSI_ERR_RANGE
 * (more than LIMIT_STAGES_MAX stages), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err path_choose(struct path_stage *stages, uint32_t *stage_count,
                                        const struct path_member *members, uint32_t member_count,
                                        uint32_t layer_count, const struct path_random *random);

/* The cost of one stage in microseconds. */
uint64_t path_stage_cost(const struct path_member *member, uint32_t layer_count);

/* Writes the layers of [0, layer_count) that no member holds, as "2-5, 9", cut to size bytes with
 * "..." at the end; returns how many there are. */
uint32_t path_missing(char *out, size_t size, const struct path_member *members,
                      uint32_t member_count, uint32_t layer_count);
#endif
