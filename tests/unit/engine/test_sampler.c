#include "worker/engine/sampler.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static uint32_t pick(const struct sampler_params *params, const float *logits, uint32_t count,
                     uint32_t position)
{
    struct sampler *sampler = NULL;
    uint32_t token = 0;
    float logprob = 0;
    cr_assert_eq(sampler_open(&sampler, params, count), ODSI_OK);
    sampler_pick(sampler, logits, position, &token, &logprob);
    cr_assert(logprob <= 1e-6f);
    sampler_close(&sampler);
    return token;
}

/* The known answers published with the Random123 library (kat_vectors, philox4x32 10). */
Test(sampler, philox_gives_the_published_vectors)
{
    const struct {
        uint32_t counter[4], key[2], expected[4];
    } cases[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
         {0xffffffff, 0xffffffff},
         {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint32_t out[4];
        sampler_philox(out, cases[i].counter, cases[i].key);
        cr_expect_arr_eq(out, cases[i].expected, sizeof out, "vector %zu", i);
    }
}

Test(sampler, greedy_takes_the_lowest_id_among_equals)
{
    const struct sampler_params greedy = {0};
    const float logits[] = {1.0f, 3.0f, 3.0f, -0.0f, 0.0f};
    const float zeros[] = {-0.0f, 0.0f};
    cr_expect_eq(pick(&greedy, logits, 5, 0), 1);
    cr_expect_eq(pick(&greedy, zeros, 2, 0), 0);
}

Test(sampler, is_a_function_of_seed_and_position_alone)
{
    const struct sampler_params params = {.temperature = 1.0f, .seed = 7};
    struct sampler *sampler = NULL;
    float logits[50];
    for (int i = 0; i < 50; i++)
        logits[i] = (float)(i % 7);
    cr_assert_eq(sampler_open(&sampler, &params, 50), ODSI_OK);
    for (uint32_t position = 20; position-- > 0;) { /* any order of positions */
        uint32_t token;
        float logprob;
        sampler_pick(sampler, logits, position, &token, &logprob);
        cr_expect_eq(token, pick(&params, logits, 50, position));
    }
    sampler_close(&sampler);
}

/* Goal: tokens come as often as the softmax says. Method: 40,000 positions, four tokens, compared
 * with the exact probabilities within five standard deviations. */
Test(sampler, draws_with_the_probabilities_of_the_softmax)
{
    const struct sampler_params params = {.temperature = 0.5f, .seed = 99};
    const float logits[] = {0.0f, 0.5f, -0.25f, 0.25f};
    double expected[4], sum = 0;
    uint32_t seen[4] = {0};
    const uint32_t draws = 40000;
    for (int i = 0; i < 4; i++)
        sum += expected[i] = exp((double)logits[i] / 0.5);
    for (uint32_t i = 0; i < draws; i++)
        seen[pick(&params, logits, 4, i)]++;
    for (int i = 0; i < 4; i++) {
        const double p = expected[i] / sum;
        const double deviation = sqrt(p * (1 - p) * draws);
        cr_expect(fabs(seen[i] - p * draws) < 5 * deviation, "token %d: %u, expected %.0f", i,
                  seen[i], p * draws);
    }
}

Test(sampler, top_k_top_p_and_min_p_keep_only_the_likely)
{
    const float logits[] = {0.0f, 2.0f, 1.0f, 3.0f, -1.0f}; /* p: .03 .24 .09 .64 .01 */
    for (uint32_t position = 0; position < 500; position++) {
        const struct sampler_params top_k = {.temperature = 1, .top_k = 2, .seed = 1};
        const struct sampler_params top_p = {.temperature = 1, .top_p = 0.7f, .seed = 1};
        const struct sampler_params one = {.temperature = 1, .top_p = 1e-6f, .seed = 1};
        const struct sampler_params min_p = {.temperature = 1, .min_p = 0.3f, .seed = 1};
        uint32_t token = pick(&top_k, logits, 5, position);
        cr_expect(token == 3 || token == 1);
        token = pick(&top_p, logits, 5, position);
        cr_expect(token == 3 || token == 1);
        cr_expect_eq(pick(&one, logits, 5, position), 3);
        token = pick(&min_p, logits, 5, position);
        cr_expect(token == 3 || token == 1);
    }
}

Test(sampler, repetition_penalty_counts_a_token_once_and_forgets_beyond_the_window)
{
    const struct sampler_params params = {.repetition_penalty = 2.0f, .penalty_window = 2};
    const float logits[] = {4.0f, 3.0f, -1.0f};
    struct sampler *sampler = NULL;
    uint32_t token;
    float logprob;
    cr_assert_eq(sampler_open(&sampler, &params, 3), ODSI_OK);
    sampler_accept(sampler, 0);
    sampler_accept(sampler, 0); /* twice in the window: 4 / 2, not 4 / 4 */
    sampler_pick(sampler, logits, 0, &token, &logprob);
    cr_expect_eq(token, 1);
    sampler_accept(sampler, 1);
    sampler_accept(sampler, 1); /* 0 has left the window */
    sampler_pick(sampler, logits, 0, &token, &logprob);
    cr_expect_eq(token, 0);
    sampler_accept(sampler, 77); /* ignored */
    sampler_close(&sampler);
}

/* Goal: the sort agrees with (value descending, id ascending) for every kind of float.
 * Method: with top_p tiny the best token is always picked; peel the best off one by one. */
Test(sampler, orders_all_finite_values_and_ties)
{
    float logits[64];
    srandom(5);
    for (int i = 0; i < 64; i++)
        logits[i] = i % 3 == 0 ? 0.0f : (float)(random() % 9 - 4) * 1e-20f;
    const struct sampler_params params = {.temperature = 1.0f, .top_k = 1, .seed = 3};
    for (int round = 0; round < 64; round++) {
        uint32_t best = 0;
        for (uint32_t i = 1; i < 64; i++)
            if (logits[i] > logits[best])
                best = i;
        cr_assert_eq(pick(&params, logits, 64, (uint32_t)round), best);
        logits[best] = -1e30f;
    }
}

Test(sampler, refuses_parameters_that_mean_nothing)
{
    const struct sampler_params wrong[] = {
        {.temperature = -1},
        {.temperature = NAN},
        {.temperature = INFINITY},
        {.temperature = 1e-9f},
        {.top_p = 1.5f},
        {.top_p = NAN},
        {.min_p = -0.1f},
        {.repetition_penalty = -2},
        {.repetition_penalty = 1e-9f},
        {.penalty_window = 1u << 20},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(sampler_check(&wrong[i]), ODSI_ERR_INVALID, "case %zu", i);
}
