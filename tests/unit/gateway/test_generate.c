#include "worker/gateway/generate.h"

#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#define SECOND_US 1000000u

/* A machine under test and everything it wanted so far. */
struct talk {
    struct tokenizer *tokenizer;
    struct generate *machine;
    struct generate_config config;
    uint32_t prompt[2048];
    struct generate_stage stages[4];
    uint32_t stage_count;
    uint64_t now_us;
    int client_reads; /* takes every piece at once */

    uint32_t epoch; /* of the last OPEN */
    uint32_t open_count[4];
    uint32_t close_count[4];
    uint32_t new_tokens_asked; /* in the last OPEN */
    uint32_t penalty_count;
    uint32_t penalty_last;
    uint64_t open_budget_us;
    uint64_t stage_budgets_us[4];
    uint32_t step_count;
    uint32_t step_positions; /* sent on this path, all in order */
    uint32_t step_largest;
    uint64_t step_budget_us; /* of the last step */
    uint64_t step_stage_budget_us;
    uint32_t step_tokens[4096];
    int sampled;
    char text[131072];
    size_t text_size;
    uint32_t tokens[4096];
    uint32_t token_count;
    uint32_t emit_count;
    uint32_t reroute_count;
    uint32_t blamed;
    uint32_t other;
    int certain;
    int finished;
    int failed;
    struct generate_summary summary;
    struct odsi_failure failure;
};

static void take_open(struct talk *self, const struct generate_action *action)
{
    cr_assert_lt(action->stage, self->stage_count);
    if (action->stage == 0)
        self->step_positions = 0;
    self->epoch = action->epoch;
    self->open_count[action->stage]++;
    self->new_tokens_asked = action->new_tokens_max;
    self->penalty_count = action->token_count;
    self->penalty_last = action->token_count ? action->tokens[action->token_count - 1] : 0;
    self->open_budget_us = action->budget_us;
    for (uint32_t i = 0; i < self->stage_count; i++)
        self->stage_budgets_us[i] = action->stage_budgets_us[i];
    self->sampled = 0;
}

static void take_step(struct talk *self, const struct generate_action *action)
{
    cr_assert_eq(action->epoch, self->epoch);
    cr_assert_eq(action->position, self->step_positions, "in order, without gaps");
    cr_assert(action->token_count > 0 && action->token_count <= LIMIT_STEP_TOKENS);
    cr_assert_not(self->sampled, "only the last step samples");
    memcpy(self->step_tokens + action->position, action->tokens, action->token_count * 4);
    self->step_positions += action->token_count;
    self->step_count++;
    if (action->token_count > self->step_largest)
        self->step_largest = action->token_count;
    self->sampled = action->sample;
    self->step_budget_us = action->budget_us;
    self->step_stage_budget_us = action->stage_budget_us;
}

static void take_emit(struct talk *self, const struct generate_action *action)
{
    cr_assert_not(self->finished || self->failed);
    memcpy(self->text + self->text_size, action->text, action->text_size);
    self->text_size += action->text_size;
    self->text[self->text_size] = '\0';
    memcpy(self->tokens + self->token_count, action->tokens, action->token_count * 4);
    for (uint32_t i = 0; i < action->token_count; i++)
        cr_assert_float_eq((double)action->logprobs[i], -0.5, 1e-6);
    self->token_count += action->token_count;
    self->emit_count++;
}

/* Takes all actions there are. */
static void pump(struct talk *self)
{
    struct generate_action action;
    for (;;) {
        while (generate_next(self->machine, &action)) {
            cr_assert_not(self->finished || self->failed, "nothing comes after the end");
            switch (action.kind) {
            case GENERATE_OPEN:
                take_open(self, &action);
                break;
            case GENERATE_STEP:
                take_step(self, &action);
                break;
            case GENERATE_CLOSE:
                self->close_count[action.stage]++;
                break;
            case GENERATE_EMIT:
                take_emit(self, &action);
                break;
            case GENERATE_REROUTE:
                self->reroute_count++;
                self->blamed = action.stage;
                self->other = action.other;
                self->certain = action.certain;
                self->failure = *action.failure;
                break;
            case GENERATE_FINISH:
                self->finished = 1;
                self->summary = *action.summary;
                break;
            case GENERATE_FAIL:
                self->failed = 1;
                self->failure = *action.failure;
                break;
            }
        }
        if (!self->client_reads)
            return;
        const uint32_t emitted = self->emit_count;
        generate_client_ready(self->machine);
        if (!generate_next(self->machine, &action))
            return;
        cr_assert_eq(action.kind, GENERATE_EMIT);
        take_emit(self, &action);
        cr_assert_eq(self->emit_count, emitted + 1);
    }
}

static void talk_prepare(struct talk *self, uint32_t prompt_count, uint32_t stage_count)
{
    memset(self, 0, sizeof *self);
    self->tokenizer = fixture_tokenizer();
    self->client_reads = 1;
    self->now_us = 5 * SECOND_US;
    self->stage_count = stage_count;
    for (uint32_t i = 0; i < prompt_count; i++)
        self->prompt[i] = i == 0 ? FIXTURE_BOS : FIXTURE_BYTE + i % 256;
    for (uint32_t i = 0; i < 4; i++) {
        snprintf(self->stages[i].label, sizeof self->stages[i].label, "worker w%u, layers %u-%u", i,
                 2 * i, 2 * i + 1);
        self->stages[i].expected =
            (struct deadline_stage){.token_ns = 100000, .step_us = 1000, .network_us = 500};
    }
    self->config = (struct generate_config){
        .tokenizer = self->tokenizer,
        .vocab_size = FIXTURE_VOCAB,
        .prompt = self->prompt,
        .prompt_count = prompt_count,
        .new_tokens_max = 100,
        .start_us = self->now_us,
        .deadline_us = UINT64_MAX,
        .open_timeout_us = 5 * SECOND_US,
        .stall_timeout_us = 60 * SECOND_US,
        .reroute_max = 3,
    };
}

static void talk_open(struct talk *self)
{
    cr_assert_eq(generate_open(&self->machine, &self->config), ODSI_OK);
    generate_set_path(self->machine, self->stages, self->stage_count, self->now_us);
    pump(self);
}

static void talk_close(struct talk *self)
{
    generate_close(&self->machine);
    tokenizer_close(&self->tokenizer);
}

static void open_all(struct talk *self)
{
    for (uint32_t i = 0; i < self->stage_count; i++) {
        self->now_us += 1000;
        cr_assert_eq(generate_opened(self->machine, i, self->epoch, self->now_us), ODSI_OK);
        pump(self);
    }
}

static struct generate_token token_at(const struct talk *self, uint32_t position, uint32_t token)
{
    return (struct generate_token){
        .epoch = self->epoch, .position = position, .token = token, .logprob = -0.5f};
}

static enum odsi_err send(struct talk *self, const struct generate_token *token)
{
    self->now_us += 10000;
    const enum odsi_err err =
        generate_token(self->machine, self->stage_count - 1, token, self->now_us);
    pump(self);
    return err;
}

/* The next token of a good worker. */
static void say(struct talk *self, uint32_t token)
{
    const struct generate_token next =
        token_at(self, self->config.prompt_count + generate_new_count(self->machine), token);
    cr_assert_eq(send(self, &next), ODSI_OK, "%s", odsi_err_text());
}

/* ---- a whole conversation -------------------------------------------------------------------- */

Test(generate, holds_a_whole_conversation)
{
    struct talk talk;
    talk_prepare(&talk, 3, 3);
    talk_open(&talk);
    for (uint32_t i = 0; i < 3; i++)
        cr_expect_eq(talk.open_count[i], 1);
    cr_expect_eq(talk.step_count, 0, "no step before all stages are open");
    open_all(&talk);
    cr_expect_eq(talk.step_count, 1);
    cr_expect_eq(talk.step_positions, 3);
    cr_expect(talk.sampled);
    cr_expect_eq(memcmp(talk.step_tokens, talk.prompt, 12), 0);
    cr_expect_eq(talk.step_budget_us, 0, "no deadline");
    say(&talk, FIXTURE_HELLO);
    cr_expect_str_eq(talk.text, " hello");
    say(&talk, FIXTURE_WORLD);
    cr_expect_eq(talk.emit_count, 2);
    cr_expect_not(talk.finished);
    say(&talk, FIXTURE_EOS);
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
        open_all(&talk);
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
    open_all(&talk);
    cr_expect_eq(talk.new_tokens_asked, 2);
    say(&talk, FIXTURE_EOS);
    cr_expect_not(talk.finished, "the end token is ignored");
    say(&talk, FIXTURE_HELLO);
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
    open_all(&talk);
    say(&talk, FIXTURE_HELLO);
    say(&talk, FIXTURE_ST);
    cr_expect_str_eq(talk.text, " hello");
    cr_expect_eq(talk.token_count, 2, "tokens come as they are made");
    struct generate_token last = token_at(&talk, 6, FIXTURE_OP);
    last.finish = GENERATE_STOP;
    cr_expect_eq(send(&talk, &last), ODSI_OK);
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
    open_all(&talk);
    say(&talk, FIXTURE_ST);
    say(&talk, FIXTURE_BYTE + 0xE2);
    say(&talk, FIXTURE_EOS);
    cr_expect(talk.finished);
    cr_expect_str_eq(talk.text, "ST\xEF\xBF\xBD");
    talk_close(&talk);
}

Test(generate, drops_the_leading_space_only_when_nothing_stands_before)
{
    struct talk talk;
    talk_prepare(&talk, 1, 1); /* the bos alone */
    talk_open(&talk);
    open_all(&talk);
    say(&talk, FIXTURE_HELLO);
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
    open_all(&talk);
    struct hop_timing timings[3] = {
        {0, 999, 999, 999, 999}, {1, 999, 999, 999, 999}, {7, 1, 1, 1, 1}};
    struct generate_token token = token_at(&talk, 3, FIXTURE_HELLO);
    token.timings = timings;
    token.timing_count = 3;
    cr_assert_eq(send(&talk, &token), ODSI_OK);
    for (uint32_t i = 0; i < 2; i++) {
        timings[0] = (struct hop_timing){0, 10 + 2 * i, 100, 5, -40};
        timings[1] = (struct hop_timing){1, 0, 300, 7, INT64_MAX};
        token.position = 4 + i;
        cr_assert_eq(send(&talk, &token), ODSI_OK);
    }
    say(&talk, FIXTURE_EOS); /* a step without timings does not count */
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
    open_all(&talk);
    say(&talk, FIXTURE_HELLO);
    struct generate_token again = token_at(&talk, 3, FIXTURE_WORLD);
    cr_expect_eq(send(&talk, &again), ODSI_ERR_STATE);
    again.epoch = talk.epoch + 1;
    again.position = 4;
    cr_expect_eq(send(&talk, &again), ODSI_ERR_STATE, "another epoch");
    say(&talk, FIXTURE_WORLD);
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
    open_all(&talk);
    const struct generate_token token = token_at(&talk, 3, FIXTURE_HELLO);
    for (uint32_t stage = 0; stage < 2; stage++)
        cr_expect_eq(generate_token(talk.machine, stage, &token, talk.now_us), ODSI_ERR_DENIED);
    cr_expect_eq(generate_token(talk.machine, 3, &token, talk.now_us), ODSI_ERR_DENIED);
    pump(&talk);
    cr_expect_eq(talk.token_count, 0);
    cr_expect_eq(talk.reroute_count, 0);
    say(&talk, FIXTURE_HELLO);
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
        open_all(&talk);
        say(&talk, FIXTURE_WORLD);
        struct generate_token token = token_at(&talk, cases[i].position, cases[i].token);
        token.logprob = cases[i].logprob;
        token.finish = cases[i].finish;
        cr_expect_eq(send(&talk, &token), ODSI_ERR_CORRUPT, "case %zu", i);
        cr_expect_eq(talk.reroute_count, 1, "case %zu", i);
        cr_expect_eq(talk.blamed, 1);
        cr_expect_eq(talk.close_count[0] + talk.close_count[1], 2);
        cr_expect(strstr(talk.failure.text, cases[i].word), "%s", talk.failure.text);
        cr_expect(strstr(talk.failure.text, "worker w1, layers 2-3"), "%s", talk.failure.text);
        generate_give_up(talk.machine, ODSI_ERR_UNAVAILABLE, talk.now_us);
        pump(&talk);
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
    const struct generate_token token = token_at(&talk, 3, FIXTURE_HELLO);
    cr_expect_eq(send(&talk, &token), ODSI_ERR_CORRUPT);
    cr_expect_eq(talk.reroute_count, 1);
    cr_expect_eq(send(&talk, &token), ODSI_ERR_STATE, "no path now");
    talk_close(&talk);
}

Test(generate, refuses_a_stage_that_opens_twice_or_late)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    cr_expect_eq(generate_opened(talk.machine, 0, talk.epoch + 1, talk.now_us), ODSI_ERR_STATE);
    cr_expect_eq(generate_opened(talk.machine, 2, talk.epoch, talk.now_us), ODSI_ERR_STATE);
    cr_expect_eq(generate_opened(talk.machine, 0, talk.epoch, talk.now_us), ODSI_OK);
    cr_expect_eq(generate_opened(talk.machine, 0, talk.epoch, talk.now_us), ODSI_ERR_STATE);
    pump(&talk);
    cr_expect_eq(talk.step_count, 0, "stage 1 is not open");
    cr_expect_eq(generate_opened(talk.machine, 1, talk.epoch, talk.now_us), ODSI_OK);
    pump(&talk);
    cr_expect_eq(talk.step_count, 1);
    cr_expect_eq(generate_opened(talk.machine, 1, talk.epoch, talk.now_us), ODSI_ERR_STATE);
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
    open_all(&talk);
    say(&talk, FIXTURE_HELLO);
    say(&talk, FIXTURE_WORLD);
    const uint32_t old_epoch = talk.epoch;
    generate_link_broken(talk.machine, 1, "socket closed", talk.now_us);
    pump(&talk);
    cr_assert_eq(talk.reroute_count, 1);
    cr_expect_eq(talk.blamed, 1);
    cr_expect_eq(talk.failure.err, ODSI_ERR_UNAVAILABLE);
    cr_expect(strstr(talk.failure.text,
                     "worker w1, layers 2-3, step at position 5: unavailable: socket closed"),
              "%s", talk.failure.text);
    cr_expect_eq(talk.close_count[0], 1);
    cr_expect_eq(talk.close_count[1], 1);
    generate_set_path(talk.machine, talk.stages, 2, talk.now_us);
    pump(&talk);
    cr_expect_eq(talk.epoch, old_epoch + 1);
    cr_expect_eq(talk.new_tokens_asked, 98);
    cr_expect_eq(talk.penalty_count, 5);
    cr_expect_eq(talk.penalty_last, FIXTURE_WORLD);
    open_all(&talk);
    cr_expect_eq(talk.step_positions, 5);
    cr_expect_eq(talk.step_tokens[3], FIXTURE_HELLO);
    cr_expect_eq(talk.step_tokens[4], FIXTURE_WORLD);
    struct generate_token late = token_at(&talk, 5, FIXTURE_ST);
    late.epoch = old_epoch;
    cr_expect_eq(send(&talk, &late), ODSI_ERR_STATE, "the old path is over");
    say(&talk, FIXTURE_ST);
    say(&talk, FIXTURE_EOS);
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
        pump(&talk);
        cr_assert_eq(talk.reroute_count, i + 1);
        generate_set_path(talk.machine, talk.stages, 1, talk.now_us);
        pump(&talk);
    }
    generate_link_broken(talk.machine, 0, "refused", talk.now_us);
    pump(&talk);
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
        open_all(&talk);
        say(&talk, FIXTURE_HELLO);
        generate_link_broken(talk.machine, 0, "again", talk.now_us);
        pump(&talk);
        cr_assert_eq(talk.reroute_count, i + 1);
        generate_set_path(talk.machine, talk.stages, 1, talk.now_us);
        pump(&talk);
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
    pump(&talk);
    odsi_fail(ODSI_ERR_UNAVAILABLE, "no path");
    generate_give_up(talk.machine, ODSI_ERR_UNAVAILABLE, talk.now_us);
    pump(&talk);
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
    pump(&talk);
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
        pump(&talk);
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
        open_all(&talk);
        generate_stage_failed(talk.machine, stage, talk.epoch, ODSI_ERR_UNAVAILABLE, 3, "gone",
                              talk.now_us);
        pump(&talk);
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
    pump(&talk);
    cr_expect_eq(talk.blamed, 1, "while opening it may speak of itself");
    cr_expect_eq(talk.other, 2, "or of the next");
    cr_expect_not(talk.certain);
    talk_close(&talk);
    talk_prepare(&talk, 3, 1);
    talk_open(&talk);
    generate_stage_failed(talk.machine, 0, talk.epoch, ODSI_ERR_UNAVAILABLE, 0, "leaving",
                          talk.now_us);
    pump(&talk);
    cr_expect(talk.certain, "there is nobody else");
    talk_close(&talk);
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    generate_stage_failed(talk.machine, 0, talk.epoch, ODSI_ERR_BUSY, 0, "full", talk.now_us);
    pump(&talk);
    cr_expect_eq(talk.blamed, 0);
    cr_expect(talk.certain);
    talk_close(&talk);
}

Test(generate, ignores_failures_of_a_path_that_is_over)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk_open(&talk);
    open_all(&talk);
    generate_stage_failed(talk.machine, 0, talk.epoch - 1, ODSI_ERR_IO, 3, "old", talk.now_us);
    generate_stage_failed(talk.machine, 9, talk.epoch, ODSI_ERR_IO, 3, "nobody", talk.now_us);
    pump(&talk);
    cr_expect_eq(talk.reroute_count, 0);
    say(&talk, FIXTURE_EOS);
    generate_link_broken(talk.machine, 0, "after the end", talk.now_us);
    generate_timer(talk.machine, UINT64_MAX);
    pump(&talk);
    cr_expect_not(talk.failed);
    talk_close(&talk);
}

/* ---- time ------------------------------------------------------------------------------------ */

Test(generate, fails_at_the_deadline_and_says_how_far_it_came)
{
    struct talk talk;
    talk_prepare(&talk, 3, 2);
    talk.config.deadline_us = talk.now_us + 2 * SECOND_US;
    talk_open(&talk);
    open_all(&talk);
    say(&talk, FIXTURE_HELLO);
    cr_expect_eq(generate_wake_us(talk.machine), talk.config.deadline_us);
    generate_timer(talk.machine, talk.config.deadline_us - 1);
    pump(&talk);
    cr_expect_not(talk.failed);
    generate_timer(talk.machine, talk.config.deadline_us);
    pump(&talk);
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
    talk.config.deadline_us = talk.now_us + 10 * SECOND_US;
    talk.stages[1].expected.step_us = 3000;
    talk.stages[1].expected.token_ns = 300000;
    talk_open(&talk);
    cr_expect_gt(talk.open_budget_us, 0);
    cr_expect_leq(talk.open_budget_us * 99, 10 * SECOND_US);
    cr_expect_gt(talk.stage_budgets_us[1], talk.stage_budgets_us[0]);
    cr_expect_leq(talk.stage_budgets_us[0] + talk.stage_budgets_us[1], talk.open_budget_us + 2);
    open_all(&talk);
    cr_expect_gt(talk.step_budget_us, 0);
    cr_expect_lt(talk.step_budget_us, 10 * SECOND_US);
    cr_expect_gt(talk.step_stage_budget_us, 0);
    cr_expect_lt(talk.step_stage_budget_us, talk.step_budget_us);
    talk_close(&talk);
}

Test(generate, tries_another_path_when_a_stage_does_not_open)
{
    struct talk talk;
    talk_prepare(&talk, 3, 3);
    talk_open(&talk);
    cr_assert_eq(generate_opened(talk.machine, 0, talk.epoch, talk.now_us), ODSI_OK);
    cr_expect_eq(generate_wake_us(talk.machine), talk.now_us + 5 * SECOND_US);
    generate_timer(talk.machine, talk.now_us + 5 * SECOND_US);
    pump(&talk);
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
    open_all(&talk);
    say(&talk, FIXTURE_HELLO);
    generate_timer(talk.machine, talk.now_us + 60 * SECOND_US - 1);
    pump(&talk);
    cr_expect_eq(talk.reroute_count, 0);
    generate_timer(talk.machine, talk.now_us + 60 * SECOND_US);
    pump(&talk);
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
    open_all(&talk);
    for (int i = 0; i < 5; i++)
        say(&talk, FIXTURE_HELLO);
    cr_expect_eq(talk.emit_count, 1);
    cr_expect_eq(talk.token_count, 1);
    generate_client_ready(talk.machine);
    pump(&talk);
    cr_expect_eq(talk.emit_count, 2);
    cr_expect_eq(talk.token_count, 5, "the other four in one piece");
    say(&talk, FIXTURE_WORLD);
    say(&talk, FIXTURE_EOS);
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
            open_all(&talk);
        if (phase > 1)
            say(&talk, FIXTURE_HELLO);
        generate_cancel(talk.machine, talk.now_us);
        pump(&talk);
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
    open_all(&talk);
    say(&talk, FIXTURE_HELLO);
    say(&talk, FIXTURE_WORLD);
    generate_abort(talk.machine, ODSI_ERR_UNAVAILABLE, "the gateway is stopping", talk.now_us);
    pump(&talk);
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
    open_all(&talk);
    for (int i = 0; i < 220; i++)
        say(&talk, FIXTURE_LONG);
    cr_expect(talk.finished);
    cr_expect_eq(talk.token_count, 220);
    cr_expect_eq(talk.text_size, 220 * 300);
    cr_expect_eq(talk.emit_count, 3, "the first, 64 KiB, and the rest");
    talk_close(&talk);
}
