/* Timers of rpc_loop.h: a binary heap that the loop asks before it waits. C-core has alarms for
 * C++ only, and its own timers count whole milliseconds, so ours fire up to a millisecond or two
 * late, never early. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_private.h"

struct rpc_timer_state {
    uint64_t due_us;
    uint64_t order;
    size_t index; /* in the heap */
    struct rpc_timer_heap *heap;
    struct rpc_timer *owner;
    void (*fn)(void *context);
    void *context;
};

static int is_before(const struct rpc_timer_state *a, const struct rpc_timer_state *b)
{
    return a->due_us != b->due_us ? a->due_us < b->due_us : a->order < b->order;
}

static void put(struct rpc_timer_heap *heap, size_t index, struct rpc_timer_state *state)
{
    heap->items[index] = state;
    state->index = index;
}

static void move_up(struct rpc_timer_heap *heap, size_t index)
{
    struct rpc_timer_state *state = heap->items[index];
    while (index > 0 && is_before(state, heap->items[(index - 1) / 2])) {
        put(heap, index, heap->items[(index - 1) / 2]);
        index = (index - 1) / 2;
    }
    put(heap, index, state);
}

static void move_down(struct rpc_timer_heap *heap, size_t index)
{
    struct rpc_timer_state *state = heap->items[index];
    for (;;) {
        size_t child = 2 * index + 1;
        if (child >= heap->count)
            break;
        if (child + 1 < heap->count && is_before(heap->items[child + 1], heap->items[child]))
            child++;
        if (!is_before(heap->items[child], state))
            break;
        put(heap, index, heap->items[child]);
        index = child;
    }
    put(heap, index, state);
}

/* Takes the state out and makes its timer idle; the caller frees it. */
static void detach(struct rpc_timer_state *state)
{
    struct rpc_timer_heap *heap = state->heap;
    const size_t index = state->index;
    struct rpc_timer_state *last = heap->items[--heap->count];
    if (last != state) {
        put(heap, index, last);
        move_down(heap, index);
        move_up(heap, last->index);
    }
    state->owner->state = NULL;
}

enum odsi_err rpc_timer_start(struct rpc_timer *self, struct rpc_loop *loop, uint64_t delay_us,
                              void (*fn)(void *context), void *context)
{
    struct rpc_timer_heap *heap = rpc_loop_timers(loop);
    struct rpc_timer_state *state = NULL;
    rpc_timer_cancel(self);
    if (heap->count == heap->capacity) {
        const size_t capacity = heap->capacity ? 2 * heap->capacity : 64;
        enum odsi_err err = alloc_resize(&heap->items, capacity, sizeof *heap->items);
        if (err != ODSI_OK)
            return err;
        heap->capacity = capacity;
    }
    enum odsi_err err = alloc_zeroed(&state, 1, sizeof *state);
    if (err != ODSI_OK)
        return err;
    const uint64_t now_us = clock_monotonic_us();
    state->due_us = delay_us < UINT64_MAX - now_us ? now_us + delay_us : UINT64_MAX;
    state->order = heap->next_order++;
    state->heap = heap;
    state->owner = self;
    state->fn = fn;
    state->context = context;
    put(heap, heap->count++, state);
    move_up(heap, state->index);
    self->state = state;
    return ODSI_OK;
}

void rpc_timer_cancel(struct rpc_timer *self)
{
    struct rpc_timer_state *state = self->state;
    if (!state)
        return;
    detach(state);
    alloc_free(state);
}

void rpc_timer_fire(struct rpc_timer_heap *heap, uint64_t now_us)
{
    /* A timer that restarts itself with no delay waits for the next turn. */
    const uint64_t order_end = heap->next_order;
    while (heap->count > 0 && heap->items[0]->due_us <= now_us &&
           heap->items[0]->order < order_end) {
        struct rpc_timer_state *state = heap->items[0];
        void (*fn)(void *context) = state->fn;
        void *context = state->context;
        detach(state);
        alloc_free(state);
        fn(context); /* may free or restart the timer */
    }
}

uint64_t rpc_timer_next_us(const struct rpc_timer_heap *heap)
{
    return heap->count > 0 ? heap->items[0]->due_us : UINT64_MAX;
}

void rpc_timer_drop_all(struct rpc_timer_heap *heap)
{
    for (size_t i = 0; i < heap->count; i++) {
        heap->items[i]->owner->state = NULL;
        alloc_free(heap->items[i]);
    }
    alloc_free(heap->items);
    heap->items = NULL;
    heap->count = heap->capacity = 0;
}
