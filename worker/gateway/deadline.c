#include "worker/gateway/deadline.h"

/* a * b / c without losing the high bits of the product. */
static uint64_t scale(uint64_t a, uint64_t b, uint64_t c)
{
    __extension__ typedef unsigned __int128 wide;
    const wide result = c ? (wide)a * b / c : 0;
    return result > UINT64_MAX ? UINT64_MAX : (uint64_t)result;
}

static uint64_t at_least_one(uint64_t value)
{
    return value ? value : 1;
}

void deadline_estimate_add(struct deadline_estimate *self, uint32_t sample_us)
{
    if (self->sample_count == 0) {
        *self = (struct deadline_estimate){sample_us, sample_us / 2, 1};
        return;
    }
    const uint32_t error_us =
        sample_us > self->mean_us ? sample_us - self->mean_us : self->mean_us - sample_us;
    self->deviation_us = (uint32_t)((3 * (uint64_t)self->deviation_us + error_us) / 4);
    self->mean_us = (uint32_t)((7 * (uint64_t)self->mean_us + sample_us) / 8);
    if (self->sample_count < UINT32_MAX)
        self->sample_count++;
}

uint64_t deadline_estimate_bound_us(const struct deadline_estimate *self, uint64_t fallback_us)
{
    if (self->sample_count == 0)
        return fallback_us;
    return self->mean_us + 4 * (uint64_t)self->deviation_us;
}

static uint64_t stage_us(const struct deadline_stage *stage, uint32_t positions)
{
    const uint64_t compute_us =
        positions <= 1 ? stage->step_us : scale(stage->token_ns, positions, 1000);
    /* One position of a chunk is never cheaper than a decode step of its own. */
    return stage->network_us + (compute_us > stage->step_us ? compute_us : stage->step_us);
}

uint64_t deadline_prefill_us(const struct deadline_stage *stages, uint32_t stage_count,
                             uint32_t prompt_count, uint32_t chunk_count)
{
    const uint32_t chunks =
        chunk_count ? prompt_count / chunk_count + (prompt_count % chunk_count != 0) : 1;
    const uint32_t positions = prompt_count < chunk_count ? prompt_count : chunk_count;
    uint64_t first_us = 0;
    uint64_t slowest_us = 0;
    for (uint32_t i = 0; i < stage_count; i++) {
        const uint64_t us = stage_us(&stages[i], positions);
        first_us += us;
        slowest_us = us > slowest_us ? us : slowest_us;
    }
    return first_us + (chunks ? chunks - 1 : 0) * slowest_us;
}

uint64_t deadline_step_us(const struct deadline_stage *stages, uint32_t stage_count)
{
    uint64_t sum_us = 0;
    for (uint32_t i = 0; i < stage_count; i++)
        sum_us += stage_us(&stages[i], 1);
    return sum_us;
}

void deadline_cut_answer(uint64_t left_us, uint64_t prefill_us, uint64_t step_us,
                         uint32_t new_count, uint64_t *prefill_budget_us, uint64_t *step_budget_us)
{
    /* The first new token comes with the prompt's last step. */
    const uint64_t steps = new_count > 0 ? new_count - 1 : 0;
    const uint64_t whole_us = at_least_one(prefill_us + steps * step_us);
    *prefill_budget_us = at_least_one(scale(left_us, prefill_us, whole_us));
    *step_budget_us = at_least_one(scale(left_us, step_us, whole_us));
}

uint64_t deadline_stage_budget_us(uint64_t budget_us, const struct deadline_stage *stages,
                                  uint32_t stage_count, uint32_t stage_index, uint32_t positions)
{
    uint64_t whole_us = 0;
    for (uint32_t i = 0; i < stage_count; i++)
        whole_us += stage_us(&stages[i], positions);
    return at_least_one(
        scale(budget_us, stage_us(&stages[stage_index], positions), at_least_one(whole_us)));
}
