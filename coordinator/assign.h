/* Which layers a worker gets that joins with `layers auto` (draft 6.1, 6.3): a pure function of
 * what the others hold. Any thread.
 *
 * The window is as long as the worker's capacity and lies where the swarm is weakest. Compared in
 * this order:
 *   1. it holds most of the least replicated layers (the unserved ones, while there are any);
 *   2. its layers are held by the fewest members, counted over the whole window;
 *   3. its slowest layer is the slowest, by the sum of the speeds that its holders advertise;
 *      then the sum of that over its layers is the least;
 *   4. it lies inside the shortest gap that it does not overflow, so that long gaps stay whole;
 *   5. it starts at the lowest layer.
 *
 * Promised: a window never overlaps served layers when one that overlaps them less would serve as
 * many new ones; and when every member came by this function and none left, capacities that sum to
 * layer_count or more leave no layer unserved, in any order of joining.
 * Not promised: that gaps left by departed members, or between ranges that members chose
 * themselves, are closed whenever some other placement could have closed them. Nobody who serves
 * is ever moved (draft 6.1: reassignment is conservative), and who comes later is not known. */
#ifndef ODSI_COORDINATOR_ASSIGN_H
#define ODSI_COORDINATOR_ASSIGN_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

/* What one other member of the same model holds: layers [first, end). */
struct assign_range {
    uint32_t first;
    uint32_t end;
    float speed; /* tokens per second through these layers, as advertised; 0: unknown */
};

/* Chooses [*out_first, *out_end) of a model of layer_count layers for a worker that holds at most
 * capacity (more than layer_count means all).
 * Errors: ODSI_ERR_INVALID (layer_count or capacity is 0, layer_count over LIMIT_LAYERS_MAX, a
 * range outside the model), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err assign_choose(uint32_t *out_first, uint32_t *out_end,
                                          const struct assign_range *ranges, size_t range_count,
                                          uint32_t layer_count, uint32_t capacity);
#endif
