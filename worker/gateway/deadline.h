/* Time: what a step is expected to take, and how the time that is left is cut (draft 7.1).
 *
 * Durations only; no clock is shared between participants. Pure; any thread. */
#ifndef ODSI_WORKER_GATEWAY_DEADLINE_H
#define ODSI_WORKER_GATEWAY_DEADLINE_H
#include <stdint.h>

/* A smoothed duration, as TCP keeps its round-trip time (RFC 6298). Zero-initialize it. */
struct deadline_estimate {
    uint32_t mean_us;
    uint32_t deviation_us;
    uint32_t sample_count; /* 0: nothing is known */
};

void deadline_estimate_add(struct deadline_estimate *self, uint32_t sample_us);
/* A bound that is rarely passed: mean plus four deviations; fallback_us when nothing is known. */
uint64_t deadline_estimate_bound_us(const struct deadline_estimate *self, uint64_t fallback_us);

/* What is expected of one stage of a path. */
struct deadline_stage {
    uint64_t token_ns;   /* computing one position of a prompt chunk */
    uint32_t step_us;    /* computing one decode step */
    uint32_t network_us; /* one way from the stage before */
};

/* How long prompt_count positions in steps of chunk_count take through all stages, the stages
 * working side by side on successive chunks. */
uint64_t deadline_prefill_us(const struct deadline_stage *stages, uint32_t stage_count,
                             uint32_t prompt_count, uint32_t chunk_count);
/* How long one decode step takes through all stages. */
uint64_t deadline_step_us(const struct deadline_stage *stages, uint32_t stage_count);

/* Cuts left_us into the prompt's part and the part of each of new_count decode steps, in
 * proportion to what is expected of them. Either may come out shorter than expected: then the
 * deadline is tight, and the workers see it as negative slack. Every part is at least 1, since 0
 * means "no deadline" on the wire. */
void deadline_cut_answer(uint64_t left_us, uint64_t prefill_us, uint64_t step_us,
                         uint32_t new_count, uint64_t *prefill_budget_us, uint64_t *step_budget_us);
/* The share of budget_us that belongs to one stage: in proportion to its expected compute plus
 * network. positions: 1 for a decode step, more for a prompt chunk. At least 1. */
uint64_t deadline_stage_budget_us(uint64_t budget_us, const struct deadline_stage *stages,
                                  uint32_t stage_count, uint32_t stage_index, uint32_t positions);
#endif
