#include "worker/engine/scheduler.h"

#include "common/base/assert.h"

static int goes_before(const struct scheduler_item *a, const struct scheduler_item *b)
{
    if (a->deadline_us != b->deadline_us)
        return a->deadline_us < b->deadline_us;
    return a->arrival_us < b->arrival_us;
}

/* Insertion sort: the list is short and nearly in order, and equal items keep their order. */
static void sort_by_urgency(const struct scheduler_item *items, uint32_t item_count,
                            uint32_t *order)
{
    for (uint32_t i = 0; i < item_count; i++) {
        uint32_t at = i;
        while (at > 0 && goes_before(&items[i], &items[order[at - 1]])) {
            order[at] = order[at - 1];
            at--;
        }
        order[at] = i;
    }
}

static int is_short(const struct scheduler_item *item)
{
    return item->token_count <= SCHEDULER_SHORT_TOKENS;
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* A batch being put together. */
struct batch {
    struct scheduler_choice *picked;
    uint32_t count;
    uint32_t tokens_left;
    uint32_t prompt_tokens_left;
};

static void add(struct batch *self, const struct scheduler_item *item, uint32_t index)
{
    uint32_t count = min_u32(item->token_count, self->tokens_left);
    if (!is_short(item)) {
        count = min_u32(count, self->prompt_tokens_left);
        self->prompt_tokens_left -= count;
    } else if (count < item->token_count) {
        return;
    }
    if (count == 0)
        return;
    self->tokens_left -= count;
    self->picked[self->count++] = (struct scheduler_choice){index, count};
}

uint32_t scheduler_pick(const struct scheduler_item *items, uint32_t item_count,
                        const struct scheduler_limits *limits, struct scheduler_choice *picked,
                        uint32_t *order)
{
    struct batch batch = {.picked = picked,
                          .tokens_left = limits->tokens_max,
                          .prompt_tokens_left = limits->prompt_tokens_max};
    ODSI_ASSERT(limits->tokens_max > SCHEDULER_SHORT_TOKENS && limits->steps_max > 0);
    ODSI_ASSERT(limits->prompt_tokens_max > 0);
    if (item_count == 0)
        return 0;
    sort_by_urgency(items, item_count, order);
    const struct scheduler_item *first = &items[order[0]];
    /* The first one's place is kept while short ones are added; how much of it runs is known when
     * they are in. */
    const uint32_t kept = is_short(first) ? first->token_count : 1;
    batch.tokens_left -= kept;
    batch.count = 1;
    for (int want_short = 1; want_short >= 0; want_short--) {
        for (uint32_t i = 1; i < item_count && batch.count < limits->steps_max; i++) {
            const struct scheduler_item *item = &items[order[i]];
            if (is_short(item) == want_short && item->layer_first == first->layer_first &&
                item->layer_end == first->layer_end)
                add(&batch, item, order[i]);
        }
        if (want_short) {
            const uint32_t count = batch.count;
            batch.tokens_left += kept;
            batch.count = 0;
            add(&batch, first, order[0]);
            batch.count = count;
        }
    }
    return batch.count;
}
