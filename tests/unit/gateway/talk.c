#include "tests/unit/gateway/talk.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static void take_open(struct talk *self, const struct generate_action *action)
{
    cr_assert_lt(action->stage, self->stage_count);
    if (action->stage == 0)
        self->step_positions = UINT32_MAX; /* the first step says where it begins */
    self->key_count = action->prefix_count;
    if (action->prefix_count > 0)
        self->key_last = action->prefix_keys[action->prefix_count - 1];
    self->prompt_count = action->prompt_count;
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
    if (self->step_positions == UINT32_MAX)
        self->step_positions = action->position;
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
void talk_pump(struct talk *self)
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

void talk_prepare(struct talk *self, uint32_t prompt_count, uint32_t stage_count)
{
    memset(self, 0, sizeof *self);
    self->tokenizer = fixture_tokenizer();
    self->client_reads = 1;
    self->now_us = 5 * TALK_SECOND_US;
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
        .open_timeout_us = 5 * TALK_SECOND_US,
        .stall_timeout_us = 60 * TALK_SECOND_US,
        .reroute_max = 3,
    };
}

void talk_open(struct talk *self)
{
    cr_assert_eq(generate_open(&self->machine, &self->config), ODSI_OK);
    generate_set_path(self->machine, self->stages, self->stage_count, self->now_us);
    talk_pump(self);
}

void talk_close(struct talk *self)
{
    generate_close(&self->machine);
    tokenizer_close(&self->tokenizer);
}

void talk_open_all(struct talk *self)
{
    for (uint32_t i = 0; i < self->stage_count; i++) {
        self->now_us += 1000;
        cr_assert_eq(
            generate_opened(self->machine, i, self->epoch, self->held_counts[i], self->now_us),
            ODSI_OK);
        talk_pump(self);
    }
}

struct generate_token talk_token_at(const struct talk *self, uint32_t position, uint32_t token)
{
    return (struct generate_token){
        .epoch = self->epoch, .position = position, .token = token, .logprob = -0.5f};
}

enum odsi_err talk_send(struct talk *self, const struct generate_token *token)
{
    self->now_us += 10000;
    const enum odsi_err err =
        generate_token(self->machine, self->stage_count - 1, token, self->now_us);
    talk_pump(self);
    return err;
}

/* The next token of a good worker. */
void talk_say(struct talk *self, uint32_t token)
{
    const struct generate_token next =
        talk_token_at(self, self->config.prompt_count + generate_new_count(self->machine), token);
    cr_assert_eq(talk_send(self, &next), ODSI_OK, "%s", odsi_err_text());
}
