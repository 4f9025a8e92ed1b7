#include "worker/gateway/generate.h"

#include "tests/unit/gateway/talk.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

/* ---- a whole conversation -------------------------------------------------------------------- */

Test(generate, holds_a_whole_conversation)
{
    struct talk talk;
    talk_prepare(&talk, 3, 3);
    talk_open(&talk);
    for (uint32_t i = 0; i < 3; i++)
        cr_expect_eq(talk.open_count[i], 1);
    cr_expect_eq(talk.step_count, 0, "no step before all stages are open");
    talk_open_all(&talk);
    cr_expect_eq(talk.step_count, 1);
    cr_expect_eq(talk.step_positions, 3);
    cr_expect(talk.sampled);
    cr_expect_eq(memcmp(talk.step_tokens, talk.prompt, 12), 0);
    cr_expect_eq(talk.step_budget_us, 0, "no deadline");
    talk_say(&talk, FIXTURE_HELLO);
    cr_expect_str_eq(talk.text, " hello");
    talk_say(&talk, FIXTURE_WORLD);
    cr_expect_eq(talk.emit_count, 2);
    cr_expect_not(talk.finished);
    talk_say(&talk, FIXTURE_EOS);
    cr_expect(talk.finished);
    cr_expect_str_eq(talk.text, " hello world");
    cr_expect_eq(talk.token_count, 3);
    cr_expect_eq(talk.tokens[2], FIXTURE_EOS);
    cr_expect_eq(talk.summary.finish, GENERATE_END);
    cr_expect_eq(talk.summary.prompt_count, 3);
    cr_expect_eq(talk.summary.new_count, 3);
    cr_expect_eq(talk.summary.first_token_us, 13000);
    cr_expect_eq(talk.summary.total_us, 33000);
    for (uint32_t i = 0; i < 3; i++)
        cr_expect_eq(talk.close_count[i], 1);
    cr_expect_eq(generate_wake_us(talk.machine), UINT64_MAX);
    talk_close(&talk);
}

Test(generate, sends_a_long_prompt_in_bounded_steps_and_samples_after_the_last)
{
    for (uint32_t stages = 1; stages <= 4; stages++) {
        struct talk talk;
        talk_prepare(&talk, 2000, stages);
        talk_open(&talk);
        talk_open_all(&talk);
        cr_expect_eq(talk.step_positions, 2000);
        cr_expect(talk.sampled);
        cr_expect_leq(talk.step_largest, LIMIT_STEP_TOKENS);
        cr_expect_geq(talk.step_count, 4);
        cr_expect_eq(memcmp(talk.step_tokens, talk.prompt, 8000), 0);
        talk_close(&talk);
    }
}

Test(generate, ends_at_the_length)
{
    struct talk talk;
    talk_prepare(&talk, 1, 2);
    talk.config.new_tokens_max = 2;
    talk.config.ignore_end = 1;
    talk_open(&talk);
    talk_open_all(&talk);
    cr_expect_eq(talk.new_tokens_asked, 2);
    talk_say(&talk, FIXTURE_EOS);
    cr_expect_not(talk.finished, "the end token is ignored");
    talk_say(&talk, FIXTURE_HELLO);
    cr_expect(talk.finished);
    cr_expect_eq(talk.summary.finish, GENERATE_LENGTH);
    talk_close(&talk);
}

Test(generate, ends_at_a_stop_string_across_tokens)
{
    struct talk talk;
    const struct stop_string stop = {.data = "STOP", .size = 4};
    talk_prepare(&talk, 4, 2);
    talk.config.stops = &stop;
    talk.config.stop_count = 1;
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    talk_say(&talk, FIXTURE_ST);
    cr_expect_str_eq(talk.text, " hello");
    cr_expect_eq(talk.token_count, 2, "tokens come as they are made");
    struct generate_token last = talk_token_at(&talk, 6, FIXTURE_OP);
    last.finish = GENERATE_STOP;
    cr_expect_eq(talk_send(&talk, &last), ODSI_OK);
    cr_expect(talk.finished);
    cr_expect_eq(talk.summary.finish, GENERATE_STOP);
    cr_expect_str_eq(talk.text, " hello");
    talk_close(&talk);
}

Test(generate, shows_at_the_end_what_it_held_back)
{
    struct talk talk;
    const struct stop_string stop = {.data = "STOP", .size = 4};
    talk_prepare(&talk, 4, 1);
    talk.config.stops = &stop;
    talk.config.stop_count = 1;
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_ST);
    talk_say(&talk, FIXTURE_BYTE + 0xE2);
    talk_say(&talk, FIXTURE_EOS);
    cr_expect(talk.finished);
    cr_expect_str_eq(talk.text, "ST\xEF\xBF\xBD");
    talk_close(&talk);
}

Test(generate, drops_the_leading_space_only_when_nothing_stands_before)
{
    struct talk talk;
    talk_prepare(&talk, 1, 1); /* the bos alone */
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    cr_expect_str_eq(talk.text, "hello");
    talk_close(&talk);
}

Test(generate, tells_the_last_stage_the_end_of_the_prompt_for_the_penalty)
{
    struct talk talk;
    talk_prepare(&talk, 100, 2);
    talk.config.penalty_window = 64;
    talk_open(&talk);
    cr_expect_eq(talk.penalty_count, 64);
    cr_expect_eq(talk.penalty_last, talk.prompt[99]);
    talk_close(&talk);
    talk_prepare(&talk, 3, 2);
    talk.config.penalty_window = 64;
    talk_open(&talk);
    cr_expect_eq(talk.penalty_count, 3);
    talk_close(&talk);
}

Test(generate, gives_the_mean_over_decode_steps)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    talk_open_all(&talk);
    struct hop_timing timings[3] = {
        {0, 999, 999, 999, 999}, {1, 999, 999, 999, 999}, {7, 1, 1, 1, 1}};
    struct generate_token token = talk_token_at(&talk, 3, FIXTURE_HELLO);
    token.timings = timings;
    token.timing_count = 3;
    cr_assert_eq(talk_send(&talk, &token), ODSI_OK);
    for (uint32_t i = 0; i < 2; i++) {
        timings[0] = (struct hop_timing){0, 10 + 2 * i, 100, 5, -40};
        timings[1] = (struct hop_timing){1, 0, 300, 7, INT64_MAX};
        token.position = 4 + i;
        cr_assert_eq(talk_send(&talk, &token), ODSI_OK);
    }
    talk_say(&talk, FIXTURE_EOS); /* a step without timings does not count */
    cr_assert(talk.finished);
    cr_expect_eq(talk.summary.hop_count, 2);
    cr_expect_eq(talk.summary.hops[0].step_count, 2);
    cr_expect_eq(talk.summary.hops[0].queue_us, 11);
    cr_expect_eq(talk.summary.hops[0].compute_us, 100);
    cr_expect_eq(talk.summary.hops[0].slack_us, -40);
    cr_expect_eq(talk.summary.hops[1].network_us, 7);
    cr_expect_gt(talk.summary.hops[1].slack_us, 0);
    talk_close(&talk);
}

/* ---- bad events ------------------------------------------------------------------------------ */

Test(generate, takes_each_position_once)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    struct generate_token again = talk_token_at(&talk, 3, FIXTURE_WORLD);
    cr_expect_eq(talk_send(&talk, &again), ODSI_ERR_STATE);
    again.epoch = talk.epoch + 1;
    again.position = 4;
    cr_expect_eq(talk_send(&talk, &again), ODSI_ERR_STATE, "another epoch");
    talk_say(&talk, FIXTURE_WORLD);
    cr_expect_str_eq(talk.text, " hello world");
    cr_expect_eq(talk.token_count, 2);
    cr_expect_eq(talk.reroute_count, 0);
    talk_close(&talk);
}

Test(generate, takes_tokens_from_the_last_stage_only)
{
    struct talk talk;
    talk_prepare(&talk, 3, 3);
    talk_open(&talk);
    talk_open_all(&talk);
    const struct generate_token token = talk_token_at(&talk, 3, FIXTURE_HELLO);
    for (uint32_t stage = 0; stage < 2; stage++)
        cr_expect_eq(generate_token(talk.machine, stage, &token, talk.now_us), ODSI_ERR_DENIED);
    cr_expect_eq(generate_token(talk.machine, 3, &token, talk.now_us), ODSI_ERR_DENIED);
    talk_pump(&talk);
    cr_expect_eq(talk.token_count, 0);
    cr_expect_eq(talk.reroute_count, 0);
    talk_say(&talk, FIXTURE_HELLO);
    talk_close(&talk);
}

/* Goal: what a good worker never sends ends its part in the answer, and the worker is named. */
Test(generate, leaves_a_worker_that_breaks_the_protocol)
{
    const struct {
        uint32_t position;
        uint32_t token;
        float logprob;
        enum generate_finish finish;
        const char *word;
    } cases[] = {
        {5, FIXTURE_HELLO, -0.5f, GENERATE_GO_ON, "position 5 where 4 is next"},
        {4, FIXTURE_VOCAB, -0.5f, GENERATE_GO_ON, "vocabulary"},
        {4, UINT32_MAX, -0.5f, GENERATE_GO_ON, "vocabulary"},
        {4, FIXTURE_HELLO, NAN, GENERATE_GO_ON, "logprob"},
        {4, FIXTURE_HELLO, -INFINITY, GENERATE_GO_ON, "logprob"},
        {4, FIXTURE_HELLO, -0.5f, GENERATE_END, "ended the answer"},
        {4, FIXTURE_HELLO, -0.5f, GENERATE_LENGTH, "ended the answer"},
        {4, FIXTURE_HELLO, -0.5f, GENERATE_STOP, "ended the answer"},
        {4, FIXTURE_HELLO, -0.5f, GENERATE_CANCELLED, "ended the answer"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct talk talk;
        talk_prepare(&talk, 3, 2);
        talk_open(&talk);
        talk_open_all(&talk);
        talk_say(&talk, FIXTURE_WORLD);
        struct generate_token token = talk_token_at(&talk, cases[i].position, cases[i].token);
        token.logprob = cases[i].logprob;
        token.finish = cases[i].finish;
        cr_expect_eq(talk_send(&talk, &token), ODSI_ERR_CORRUPT, "case %zu", i);
        cr_expect_eq(talk.reroute_count, 1, "case %zu", i);
        cr_expect_eq(talk.blamed, 1);
        cr_expect_eq(talk.close_count[0] + talk.close_count[1], 2);
        cr_expect(strstr(talk.failure.text, cases[i].word), "%s", talk.failure.text);
        cr_expect(strstr(talk.failure.text, "worker w1, layers 2-3"), "%s", talk.failure.text);
        generate_give_up(talk.machine, ODSI_ERR_UNAVAILABLE, talk.now_us);
        talk_pump(&talk);
        cr_expect(talk.failed);
        cr_expect_eq(talk.failure.err, ODSI_ERR_UNAVAILABLE);
        talk_close(&talk);
    }
}

Test(generate, refuses_tokens_before_the_prompt)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    const struct generate_token token = talk_token_at(&talk, 3, FIXTURE_HELLO);
    cr_expect_eq(talk_send(&talk, &token), ODSI_ERR_CORRUPT);
    cr_expect_eq(talk.reroute_count, 1);
    cr_expect_eq(talk_send(&talk, &token), ODSI_ERR_STATE, "no path now");
    talk_close(&talk);
}

Test(generate, refuses_a_stage_that_opens_twice_or_late)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    cr_expect_eq(generate_opened(talk.machine, 0, talk.epoch + 1, 0, talk.now_us), ODSI_ERR_STATE);
    cr_expect_eq(generate_opened(talk.machine, 2, talk.epoch, 0, talk.now_us), ODSI_ERR_STATE);
    cr_expect_eq(generate_opened(talk.machine, 0, talk.epoch, 0, talk.now_us), ODSI_OK);
    cr_expect_eq(generate_opened(talk.machine, 0, talk.epoch, 0, talk.now_us), ODSI_ERR_STATE);
    talk_pump(&talk);
    cr_expect_eq(talk.step_count, 0, "stage 1 is not open");
    cr_expect_eq(generate_opened(talk.machine, 1, talk.epoch, 0, talk.now_us), ODSI_OK);
    talk_pump(&talk);
    cr_expect_eq(talk.step_count, 1);
    cr_expect_eq(generate_opened(talk.machine, 1, talk.epoch, 0, talk.now_us), ODSI_ERR_STATE);
    talk_close(&talk);
}

/* ---- failures and other paths ---------------------------------------------------------------- */

/* Goal: after a failure in the middle the answer goes on as if nothing had happened. */
Test(generate, computes_the_text_so_far_again_on_another_path)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk.config.penalty_window = 8;
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    talk_say(&talk, FIXTURE_WORLD);
    const uint32_t old_epoch = talk.epoch;
    generate_link_broken(talk.machine, 1, "socket closed", talk.now_us);
    talk_pump(&talk);
    cr_assert_eq(talk.reroute_count, 1);
    cr_expect_eq(talk.blamed, 1);
    cr_expect_eq(talk.failure.err, ODSI_ERR_UNAVAILABLE);
    cr_expect(strstr(talk.failure.text,
                     "worker w1, layers 2-3, step at position 5: unavailable: socket closed"),
              "%s", talk.failure.text);
    cr_expect_eq(talk.close_count[0], 1);
    cr_expect_eq(talk.close_count[1], 1);
    generate_set_path(talk.machine, talk.stages, 2, talk.now_us);
    talk_pump(&talk);
    cr_expect_eq(talk.epoch, old_epoch + 1);
    cr_expect_eq(talk.new_tokens_asked, 98);
    cr_expect_eq(talk.penalty_count, 5);
    cr_expect_eq(talk.penalty_last, FIXTURE_WORLD);
    talk_open_all(&talk);
    cr_expect_eq(talk.step_positions, 5);
    cr_expect_eq(talk.step_tokens[3], FIXTURE_HELLO);
    cr_expect_eq(talk.step_tokens[4], FIXTURE_WORLD);
    struct generate_token late = talk_token_at(&talk, 5, FIXTURE_ST);
    late.epoch = old_epoch;
    cr_expect_eq(talk_send(&talk, &late), ODSI_ERR_STATE, "the old path is over");
    talk_say(&talk, FIXTURE_ST);
    talk_say(&talk, FIXTURE_EOS);
    cr_expect(talk.finished);
    cr_expect_str_eq(talk.text, " hello worldST");
    cr_expect_eq(talk.token_count, 4);
    cr_expect_eq(talk.summary.new_count, 4);
    cr_expect_eq(talk.close_count[0], 2);
    talk_close(&talk);
}

Test(generate, gives_up_after_too_many_paths_in_a_row)
{
    struct talk talk;
    talk_prepare(&talk, 3, 1);
    talk_open(&talk);
    for (uint32_t i = 0; i < 3; i++) {
        generate_link_broken(talk.machine, 0, "refused", talk.now_us);
        talk_pump(&talk);
        cr_assert_eq(talk.reroute_count, i + 1);
        generate_set_path(talk.machine, talk.stages, 1, talk.now_us);
        talk_pump(&talk);
    }
    generate_link_broken(talk.machine, 0, "refused", talk.now_us);
    talk_pump(&talk);
    cr_expect(talk.failed);
    cr_expect_eq(talk.reroute_count, 3);
    talk_close(&talk);
}

Test(generate, forgets_failures_when_a_token_comes)
{
    struct talk talk;
    talk_prepare(&talk, 3, 1);
    talk_open(&talk);
    for (uint32_t i = 0; i < 10; i++) {
        talk_open_all(&talk);
        talk_say(&talk, FIXTURE_HELLO);
        generate_link_broken(talk.machine, 0, "again", talk.now_us);
        talk_pump(&talk);
        cr_assert_eq(talk.reroute_count, i + 1);
        generate_set_path(talk.machine, talk.stages, 1, talk.now_us);
        talk_pump(&talk);
    }
    cr_expect_not(talk.failed);
    talk_close(&talk);
}

Test(generate, fails_with_the_first_cause_when_there_is_no_other_path)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    generate_stage_failed(talk.machine, 1, talk.epoch, ODSI_ERR_BUSY, 0, "no KV memory",
                          talk.now_us);
    talk_pump(&talk);
    odsi_fail(ODSI_ERR_UNAVAILABLE, "no path");
    generate_give_up(talk.machine, ODSI_ERR_UNAVAILABLE, talk.now_us);
    talk_pump(&talk);
    cr_expect(talk.failed);
    cr_expect_eq(talk.failure.err, ODSI_ERR_BUSY);
    cr_expect(strstr(talk.failure.text, "no KV memory"), "%s", talk.failure.text);
    talk_close(&talk);
}

Test(generate, fails_with_the_callers_words_when_there_never_was_a_path)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    cr_assert_eq(generate_open(&talk.machine, &talk.config), ODSI_OK);
    generate_give_up(talk.machine, odsi_fail(ODSI_ERR_UNAVAILABLE, "layer 3 is missing"),
                     talk.now_us);
    talk_pump(&talk);
    cr_expect(talk.failed);
    cr_expect_eq(talk.failure.err, ODSI_ERR_UNAVAILABLE);
    cr_expect_str_eq(talk.failure.text, "layer 3 is missing");
    talk_close(&talk);
}

/* Goal: what goes wrong between gateway and worker does not read as the client's mistake. */
Test(generate, tells_clients_only_what_they_can_act_on)
{
    const enum odsi_err told[][2] = {
        {ODSI_ERR_BUSY, ODSI_ERR_BUSY},           {ODSI_ERR_NO_MEMORY, ODSI_ERR_BUSY},
        {ODSI_ERR_NUMERIC, ODSI_ERR_NUMERIC},     {ODSI_ERR_TIMEOUT, ODSI_ERR_TIMEOUT},
        {ODSI_ERR_INVALID, ODSI_ERR_UNAVAILABLE}, {ODSI_ERR_DENIED, ODSI_ERR_UNAVAILABLE},
        {ODSI_ERR_RANGE, ODSI_ERR_UNAVAILABLE},   {ODSI_OK, ODSI_ERR_UNAVAILABLE},
    };
    for (size_t i = 0; i < sizeof told / sizeof *told; i++) {
        struct talk talk;
        talk_prepare(&talk, 3, 2);
        talk.config.reroute_max = 0;
        talk_open(&talk);
        generate_stage_failed(talk.machine, 1, talk.epoch, told[i][0], 0, "cause", talk.now_us);
        talk_pump(&talk);
        cr_expect(talk.failed);
        cr_expect_eq(talk.failure.err, told[i][1], "case %zu", i);
        talk_close(&talk);
    }
}

/* A stage that runs and misses a peer speaks of the next one: the ring closes at stage 0. */
Test(generate, avoids_the_worker_that_a_neighbour_cannot_reach)
{
    for (uint32_t stage = 0; stage < 3; stage++) {
        struct talk talk;
        talk_prepare(&talk, 3, 3);
        talk_open(&talk);
        talk_open_all(&talk);
        generate_stage_failed(talk.machine, stage, talk.epoch, ODSI_ERR_UNAVAILABLE, 3, "gone",
                              talk.now_us);
        talk_pump(&talk);
        cr_expect_eq(talk.blamed, (stage + 1) % 3);
        cr_expect_eq(talk.other, talk.blamed);
        cr_expect_not(talk.certain);
        talk_close(&talk);
    }
    struct talk talk;
    talk_prepare(&talk, 3, 3);
    talk_open(&talk);
    generate_stage_failed(talk.machine, 1, talk.epoch, ODSI_ERR_UNAVAILABLE, 0, "still loading",
                          talk.now_us);
    talk_pump(&talk);
    cr_expect_eq(talk.blamed, 1, "while opening it may speak of itself");
    cr_expect_eq(talk.other, 2, "or of the next");
    cr_expect_not(talk.certain);
    talk_close(&talk);
    talk_prepare(&talk, 3, 1);
    talk_open(&talk);
    generate_stage_failed(talk.machine, 0, talk.epoch, ODSI_ERR_UNAVAILABLE, 0, "leaving",
                          talk.now_us);
    talk_pump(&talk);
    cr_expect(talk.certain, "there is nobody else");
    talk_close(&talk);
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    generate_stage_failed(talk.machine, 0, talk.epoch, ODSI_ERR_BUSY, 0, "full", talk.now_us);
    talk_pump(&talk);
    cr_expect_eq(talk.blamed, 0);
    cr_expect(talk.certain);
    talk_close(&talk);
}

Test(generate, ignores_failures_of_a_path_that_is_over)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    talk_open_all(&talk);
    generate_stage_failed(talk.machine, 0, talk.epoch - 1, ODSI_ERR_IO, 3, "old", talk.now_us);
    generate_stage_failed(talk.machine, 9, talk.epoch, ODSI_ERR_IO, 3, "nobody", talk.now_us);
    talk_pump(&talk);
    cr_expect_eq(talk.reroute_count, 0);
    talk_say(&talk, FIXTURE_EOS);
    generate_link_broken(talk.machine, 0, "after the end", talk.now_us);
    generate_timer(talk.machine, UINT64_MAX);
    talk_pump(&talk);
    cr_expect_not(talk.failed);
    talk_close(&talk);
}

/* ---- time ------------------------------------------------------------------------------------ */

Test(generate, fails_at_the_deadline_and_says_how_far_it_came)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk.config.deadline_us = talk.now_us + 2 * TALK_SECOND_US;
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    cr_expect_eq(generate_wake_us(talk.machine), talk.config.deadline_us);
    generate_timer(talk.machine, talk.config.deadline_us - 1);
    talk_pump(&talk);
    cr_expect_not(talk.failed);
    generate_timer(talk.machine, talk.config.deadline_us);
    talk_pump(&talk);
    cr_expect(talk.failed);
    cr_expect_eq(talk.failure.err, ODSI_ERR_TIMEOUT);
    cr_expect(strstr(talk.failure.text, "2000 ms"), "%s", talk.failure.text);
    cr_expect(strstr(talk.failure.text, "1 of at most 100"), "%s", talk.failure.text);
    cr_expect_str_eq(talk.text, " hello");
    cr_expect_eq(talk.close_count[0] + talk.close_count[1], 2);
    talk_close(&talk);
}

Test(generate, cuts_the_deadline_into_budgets)
{
    struct talk talk;
    talk_prepare(&talk, 600, 2);
    talk.config.deadline_us = talk.now_us + 10 * TALK_SECOND_US;
    talk.stages[1].expected.step_us = 3000;
    talk.stages[1].expected.token_ns = 300000;
    talk_open(&talk);
    cr_expect_gt(talk.open_budget_us, 0);
    cr_expect_leq(talk.open_budget_us * 99, 10 * TALK_SECOND_US);
    cr_expect_gt(talk.stage_budgets_us[1], talk.stage_budgets_us[0]);
    cr_expect_leq(talk.stage_budgets_us[0] + talk.stage_budgets_us[1], talk.open_budget_us + 2);
    talk_open_all(&talk);
    cr_expect_gt(talk.step_budget_us, 0);
    cr_expect_lt(talk.step_budget_us, 10 * TALK_SECOND_US);
    cr_expect_gt(talk.step_stage_budget_us, 0);
    cr_expect_lt(talk.step_stage_budget_us, talk.step_budget_us);
    talk_close(&talk);
}

Test(generate, tries_another_path_when_a_stage_does_not_open)
{
    struct talk talk;
    talk_prepare(&talk, 3, 3);
    talk_open(&talk);
    cr_assert_eq(generate_opened(talk.machine, 0, talk.epoch, 0, talk.now_us), ODSI_OK);
    cr_expect_eq(generate_wake_us(talk.machine), talk.now_us + 5 * TALK_SECOND_US);
    generate_timer(talk.machine, talk.now_us + 5 * TALK_SECOND_US);
    talk_pump(&talk);
    cr_expect_eq(talk.reroute_count, 1);
    cr_expect_eq(talk.blamed, 1, "the first that is silent");
    cr_expect(strstr(talk.failure.text, "did not open the session within 5000 ms"), "%s",
              talk.failure.text);
    talk_close(&talk);
}

Test(generate, tries_another_path_when_tokens_stop_coming)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    generate_timer(talk.machine, talk.now_us + 60 * TALK_SECOND_US - 1);
    talk_pump(&talk);
    cr_expect_eq(talk.reroute_count, 0);
    generate_timer(talk.machine, talk.now_us + 60 * TALK_SECOND_US);
    talk_pump(&talk);
    cr_expect_eq(talk.reroute_count, 1);
    cr_expect(strstr(talk.failure.text, "no token for 60000 ms"), "%s", talk.failure.text);
    talk_close(&talk);
}

/* ---- the client ------------------------------------------------------------------------------ */

Test(generate, gathers_tokens_for_a_slow_client)
{
    struct talk talk;
    talk_prepare(&talk, 3, 1);
    talk.client_reads = 0;
    talk_open(&talk);
    talk_open_all(&talk);
    for (int i = 0; i < 5; i++)
        talk_say(&talk, FIXTURE_HELLO);
    cr_expect_eq(talk.emit_count, 1);
    cr_expect_eq(talk.token_count, 1);
    generate_client_ready(talk.machine);
    talk_pump(&talk);
    cr_expect_eq(talk.emit_count, 2);
    cr_expect_eq(talk.token_count, 5, "the other four in one piece");
    talk_say(&talk, FIXTURE_WORLD);
    talk_say(&talk, FIXTURE_EOS);
    cr_expect(talk.finished, "the rest does not wait any more");
    cr_expect_eq(talk.token_count, 7);
    cr_expect_str_eq(talk.text, " hello hello hello hello hello world");
    talk_close(&talk);
}

Test(generate, closes_every_stage_when_the_client_goes_away)
{
    for (int phase = 0; phase < 3; phase++) {
        struct talk talk;
        talk_prepare(&talk, 3, 3);
        talk_open(&talk);
        if (phase > 0)
            talk_open_all(&talk);
        if (phase > 1)
            talk_say(&talk, FIXTURE_HELLO);
        generate_cancel(talk.machine, talk.now_us);
        talk_pump(&talk);
        for (uint32_t i = 0; i < 3; i++)
            cr_expect_eq(talk.close_count[i], 1, "phase %d", phase);
        cr_expect_not(talk.failed || talk.finished, "nobody is there to be told");
        talk_close(&talk);
    }
}

Test(generate, gives_what_there_is_before_it_is_aborted)
{
    struct talk talk;
    talk_prepare(&talk, 3, 1);
    talk.client_reads = 0;
    talk_open(&talk);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    talk_say(&talk, FIXTURE_WORLD);
    generate_abort(talk.machine, ODSI_ERR_UNAVAILABLE, "the gateway is stopping", talk.now_us);
    talk_pump(&talk);
    cr_expect(talk.failed);
    cr_expect_eq(talk.failure.err, ODSI_ERR_UNAVAILABLE);
    cr_expect_str_eq(talk.text, " hello world");
    talk_close(&talk);
}

Test(generate, cuts_a_long_backlog_into_pieces_a_client_can_receive)
{
    struct talk talk;
    talk_prepare(&talk, 3, 1);
    talk.config.new_tokens_max = 220;
    talk.client_reads = 0;
    talk_open(&talk);
    talk_open_all(&talk);
    for (int i = 0; i < 220; i++)
        talk_say(&talk, FIXTURE_LONG);
    cr_expect(talk.finished);
    cr_expect_eq(talk.token_count, 220);
    cr_expect_eq(talk.text_size, 220 * 300);
    cr_expect_eq(talk.emit_count, 3, "the first, 64 KiB, and the rest");
    talk_close(&talk);
}
