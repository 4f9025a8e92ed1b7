#include "worker/engine/sampler.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "kernels/det.h"

#include <math.h>
#include <string.h>

struct candidate {
    float value; /* logit after penalty and temperature */
    uint32_t id;
};

struct sampler {
    struct sampler_params params;
    uint32_t vocab_size;
    struct candidate *candidates; /* [vocab_size] */
    struct candidate *spare;      /* [vocab_size], for sorting */
    uint32_t *history;            /* ring of penalty_window ids */
    uint32_t history_count;       /* accepted in all */
    float *penalized;             /* [vocab_size] */
};

static enum odsi_err check_range(const char *name, float value, float low, float high)
{
    if (value >= low && value <= high) /* false for NaN */
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_INVALID, "%s is %g: it must be between %g and %g", name,
                     (double)value, (double)low, (double)high);
}

enum odsi_err sampler_check(const struct sampler_params *params)
{
    enum odsi_err err = check_range("temperature", params->temperature, 0.0f, 100.0f);
    if (err == ODSI_OK && params->temperature > 0.0f)
        err = check_range("temperature", params->temperature, 1e-3f, 100.0f);
    if (err == ODSI_OK)
        err = check_range("top_p", params->top_p, 0.0f, 1.0f);
    if (err == ODSI_OK)
        err = check_range("min_p", params->min_p, 0.0f, 1.0f);
    if (err == ODSI_OK)
        err = check_range("repetition_penalty", params->repetition_penalty, 0.0f, 100.0f);
    if (err == ODSI_OK && params->repetition_penalty > 0.0f)
        err = check_range("repetition_penalty", params->repetition_penalty, 1e-2f, 100.0f);
    if (err == ODSI_OK && params->penalty_window > LIMIT_PENALTY_TOKENS)
        err = odsi_fail(ODSI_ERR_INVALID, "penalty_window is %u: at most %u",
                        params->penalty_window, LIMIT_PENALTY_TOKENS);
    return err;
}

static int has_penalty(const struct sampler *self)
{
    return self->params.repetition_penalty > 0.0f && self->params.repetition_penalty != 1.0f &&
           self->params.penalty_window > 0;
}

enum odsi_err sampler_open(struct sampler **out, const struct sampler_params *params,
                           uint32_t vocab_size)
{
    struct sampler *self = NULL;
    *out = NULL;
    enum odsi_err err = sampler_check(params);
    if (err != ODSI_OK)
        return err;
    err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->params = *params;
    self->vocab_size = vocab_size;
    if (params->temperature > 0.0f) {
        err = alloc_zeroed(&self->candidates, vocab_size, sizeof *self->candidates);
        if (err == ODSI_OK)
            err = alloc_zeroed(&self->spare, vocab_size, sizeof *self->spare);
    }
    if (err == ODSI_OK && has_penalty(self)) {
        err = alloc_zeroed(&self->history, params->penalty_window, sizeof *self->history);
        if (err == ODSI_OK)
            err = alloc_zeroed(&self->penalized, vocab_size, sizeof *self->penalized);
    }
    if (err != ODSI_OK) {
        sampler_close(&self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void sampler_close(struct sampler **self)
{
    if (!*self)
        return;
    alloc_free((*self)->candidates);
    alloc_free((*self)->spare);
    alloc_free((*self)->history);
    alloc_free((*self)->penalized);
    alloc_free(*self);
    *self = NULL;
}

void sampler_accept(struct sampler *self, uint32_t token)
{
    if (!self->history || token >= self->vocab_size)
        return;
    self->history[self->history_count % self->params.penalty_window] = token;
    self->history_count++;
}

/* Each token of the window once: a positive logit is divided by the penalty, another multiplied. */
static const float *apply_penalty(struct sampler *self, const float *logits)
{
    const float penalty = self->params.repetition_penalty;
    const uint32_t window = self->params.penalty_window;
    const uint32_t count = self->history_count < window ? self->history_count : window;
    if (!self->history || count == 0)
        return logits;
    memcpy(self->penalized, logits, self->vocab_size * sizeof *logits);
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t id = self->history[i];
        /* From the original, so that a second occurrence changes nothing. */
        self->penalized[id] = logits[id] > 0.0f ? logits[id] / penalty : logits[id] * penalty;
    }
    return self->penalized;
}

static uint32_t pick_greedy(const float *logits, uint32_t count)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* A key whose ascending order is the values' descending order; both zeros have one key. */
static uint32_t descending_key(float value)
{
    const uint32_t bits = det_bits(value + 0.0f);
    return bits & 0x80000000u ? bits : ~(bits | 0x80000000u);
}

/* Stable radix sort, 11 bits at a time; equal values stay in ascending id order. */
static void sort_candidates(struct sampler *self)
{
    struct candidate *from = self->candidates;
    struct candidate *to = self->spare;
    for (unsigned shift = 0; shift < 33; shift += 11) {
        uint32_t start[2048] = {0};
        for (uint32_t i = 0; i < self->vocab_size; i++)
            start[(descending_key(from[i].value) >> shift) & 2047u]++;
        uint32_t sum = 0;
        for (uint32_t digit = 0; digit < 2048; digit++) {
            const uint32_t here = start[digit];
            start[digit] = sum;
            sum += here;
        }
        for (uint32_t i = 0; i < self->vocab_size; i++)
            to[start[(descending_key(from[i].value) >> shift) & 2047u]++] = from[i];
        struct candidate *const swap = from;
        from = to;
        to = swap;
    }
    self->candidates = from;
    self->spare = to;
}

void sampler_philox(uint32_t out[4], const uint32_t counter[4], const uint32_t key[2])
{
    uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]};
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t a = (uint64_t)0xD2511F53u * c[0];
        const uint64_t b = (uint64_t)0xCD9E8D57u * c[2];
        const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b,
                                  (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
        memcpy(c, next, sizeof c);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    memcpy(out, c, sizeof c);
}

/* Uniform in [0, 1), 53 bits, from (seed, position) alone. */
static double uniform(uint64_t seed, uint32_t position)
{
    const uint32_t counter[4] = {position, 0, 0, 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t words[4];
    sampler_philox(words, counter, key);
    const uint64_t bits = ((uint64_t)words[0] << 21) ^ (words[1] >> 11);
    return (double)bits * 0x1p-53;
}

/* Weights e^(value - best) are binary32, their sums binary64 in sorted order. */
static double weight_of(const struct sampler *self, uint32_t index)
{
    return (double)det_exp(self->candidates[index].value - self->candidates[0].value);
}

static uint32_t pick_sampled(struct sampler *self, const float *logits, uint32_t position)
{
    const struct sampler_params *p = &self->params;
    for (uint32_t i = 0; i < self->vocab_size; i++)
        self->candidates[i] = (struct candidate){logits[i] / p->temperature, i};
    sort_candidates(self);
    uint32_t count = self->vocab_size;
    if (p->top_k > 0 && p->top_k < count)
        count = p->top_k;
    double total = 0.0;
    for (uint32_t i = 0; i < count; i++)
        total += weight_of(self, i);
    if (p->top_p > 0.0f && p->top_p < 1.0f) {
        const double want = (double)p->top_p * total;
        double sum = 0.0;
        uint32_t kept = 0;
        while (kept < count && sum < want)
            sum += weight_of(self, kept++);
        count = kept;
        total = sum;
    }
    if (p->min_p > 0.0f) {
        uint32_t kept = 1;
        double sum = weight_of(self, 0);
        while (kept < count && weight_of(self, kept) >= (double)p->min_p)
            sum += weight_of(self, kept++);
        count = kept;
        total = sum;
    }
    const double target = uniform(p->seed, position) * total;
    double sum = 0.0;
    for (uint32_t i = 0; i < count; i++) {
        sum += weight_of(self, i);
        if (sum > target)
            return self->candidates[i].id;
    }
    return self->candidates[0].id; /* not reached: target < total */
}

static inline __attribute__((always_inline)) double sum_exp(const float *logits, uint32_t count,
                                                            float top)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < count; i++)
        sum += (double)det_exp(logits[i] - top);
    return sum;
}

/* Over the whole vocabulary for every token: with the processor's own fma where it has one, instead
 * of a call for each (the result is the same by definition). */
#if defined(__x86_64__)
__attribute__((target("fma"))) static double sum_exp_fma(const float *logits, uint32_t count,
                                                         float top)
{
    return sum_exp(logits, count, top);
}
#endif

static double sum_exp_here(const float *logits, uint32_t count, float top)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("fma"))
        return sum_exp_fma(logits, count, top);
#endif
    return sum_exp(logits, count, top);
}

static float logprob_of(const float *logits, uint32_t count, uint32_t token)
{
    const float top = logits[pick_greedy(logits, count)];
    return (float)((double)(logits[token] - top) - log(sum_exp_here(logits, count, top)));
}

void sampler_pick(struct sampler *self, const float *logits, uint32_t position, uint32_t *token,
                  float *logprob)
{
    const float *rules = apply_penalty(self, logits);
    *token = self->params.temperature > 0.0f ? pick_sampled(self, rules, position)
                                             : pick_greedy(rules, self->vocab_size);
    *logprob = logprob_of(logits, self->vocab_size, *token);
}
