/* Which of the waiting steps run together next: a pure function from state and now to a batch.
 *
 * The step with the least slack (earliest deadline) decides which layers run and is always in the
 * batch; without deadlines that is the one that came first (draft 7.3). Then come short steps:
 * each is an answer that is being written, and costs next to nothing beside the others. What room
 * is left goes to long ones, the prompts, by urgency; of those a piece may run, and the rest in a
 * later batch. So a prompt never waits for answers, since it becomes the one that came first, and
 * an answer waits for one piece of a prompt at most. */
#ifndef ODSI_WORKER_ENGINE_SCHEDULER_H
#define ODSI_WORKER_ENGINE_SCHEDULER_H
#include <stdint.h>

#define SCHEDULER_NO_DEADLINE UINT64_MAX
/* Positions of the longest step that counts as a short one: it always runs as a whole. */
#define SCHEDULER_SHORT_TOKENS 8u

/* The next step of one session that has one. */
struct scheduler_item {
    uint64_t arrival_us;
    uint64_t deadline_us; /* same clock; SCHEDULER_NO_DEADLINE: none */
    uint32_t token_count; /* positions still to run, >= 1 */
    uint32_t layer_first; /* only steps with equal layers can share a batch */
    uint32_t layer_end;
};

struct scheduler_limits {
    uint32_t tokens_max;        /* positions of a batch; at least SCHEDULER_SHORT_TOKENS + 1 */
    uint32_t steps_max;         /* >= 1 */
    uint32_t prompt_tokens_max; /* of tokens_max, for all long steps together; >= 1 */
};

struct scheduler_choice {
    uint32_t index;       /* of the item */
    uint32_t token_count; /* how many of its positions run */
};

/* Writes the chosen items to picked[steps_max], the most urgent one first, and returns how many: at
 * least 1 when item_count is. order[item_count] is scratch. */
uint32_t scheduler_pick(const struct scheduler_item *items, uint32_t item_count,
                        const struct scheduler_limits *limits, struct scheduler_choice *picked,
                        uint32_t *order);
#endif
