/* Which of the waiting steps run together next: a pure function from state and now to a batch.
 *
 * The step with the least slack (earliest deadline) goes first, without deadlines the one that
 * came first; others with the same layers join while the batch has room (draft 7.3). */
#ifndef ODSI_WORKER_ENGINE_SCHEDULER_H
#define ODSI_WORKER_ENGINE_SCHEDULER_H
#include <stdint.h>

#define SCHEDULER_NO_DEADLINE UINT64_MAX

/* The next step of one session that has one. */
struct scheduler_item {
    uint64_t arrival_us;
    uint64_t deadline_us; /* same clock; SCHEDULER_NO_DEADLINE: none */
    uint32_t token_count;
    uint32_t layer_first; /* only steps with equal layers can share a batch */
    uint32_t layer_end;
};

/* Writes the indices of the chosen items to picked[], most urgent first, and returns how many: at
 * least 1 when item_count is, at most steps_max. Their token counts sum to at most tokens_max
 * (every item alone fits). order[item_count] is scratch. */
uint32_t scheduler_pick(const struct scheduler_item *items, uint32_t item_count,
                        uint32_t tokens_max, uint32_t steps_max, uint32_t *picked, uint32_t *order);
#endif
