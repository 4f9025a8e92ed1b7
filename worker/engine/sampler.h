/* Picks a token from logits, so that the pick is as recomputable as a matrix product
 * (kernels/NUMERICS.md, "Sampling"): the same logits, parameters, history, seed and position give
 * the same token on every machine.
 *
 * Order of the rules: repetition penalty; greedy when temperature is 0, otherwise divide by
 * temperature, sort by (value descending, id ascending), keep top_k, keep top_p, keep min_p, draw.
 * Threads: one owner at a time. */
#ifndef ODSI_WORKER_ENGINE_SAMPLER_H
#define ODSI_WORKER_ENGINE_SAMPLER_H
#include "common/base/err.h"

#include <stdint.h>

struct sampler;

/* Zero is "off" for every field but seed. */
struct sampler_params {
    float temperature;        /* 0: greedy */
    uint32_t top_k;           /* keep the k best */
    float top_p;              /* keep the smallest set that has this share of the probability */
    float min_p;              /* keep tokens at least this times as likely as the best */
    float repetition_penalty; /* > 1: less likely when among the last penalty_window tokens */
    uint32_t penalty_window;
    uint64_t seed;
};

/* Checks every field; the text names the one that is wrong. Errors: ODSI_ERR_INVALID. */
ODSI_MUST_USE enum odsi_err sampler_check(const struct sampler_params *params);

/* Errors: those of sampler_check, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err sampler_open(struct sampler **out, const struct sampler_params *params,
                                         uint32_t vocab_size);
void sampler_close(struct sampler **self);

/* Tells it a token of the text so far, prompt or generated, in order; for the penalty. Ids outside
 * the vocabulary are ignored. */
void sampler_accept(struct sampler *self, uint32_t token);

/* The token for absolute position `position`, and the natural logarithm of its probability under
 * the unmodified logits (for people; not part of the numerics). logits[vocab_size] are finite.
 * Does not accept the token. */
void sampler_pick(struct sampler *self, const float *logits, uint32_t position, uint32_t *token,
                  float *logprob);

/* Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). For tests
 * and for whoever needs the same numbers. */
void sampler_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2]);
#endif
