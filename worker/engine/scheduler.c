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

uint32_t scheduler_pick(const struct scheduler_item *items, uint32_t item_count,
                        uint32_t tokens_max, uint32_t steps_max, uint32_t *picked, uint32_t *order)
{
    if (item_count == 0)
        return 0;
    sort_by_urgency(items, item_count, order);
    const struct scheduler_item *first = &items[order[0]];
    uint32_t count = 0;
    uint32_t tokens = 0;
    for (uint32_t i = 0; i < item_count && count < steps_max; i++) {
        const struct scheduler_item *item = &items[order[i]];
        ODSI_ASSERT(item->token_count <= tokens_max);
        if (item->layer_first != first->layer_first || item->layer_end != first->layer_end ||
            item->token_count > tokens_max - tokens)
            continue;
        picked[count++] = order[i];
        tokens += item->token_count;
    }
    return count;
}
