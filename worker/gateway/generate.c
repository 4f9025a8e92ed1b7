#include "worker/gateway/generate.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "worker/engine/prefix_key.h"
#include "worker/gateway/text_stream.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Prompt chunks of a path with several stages: short enough that the stages work side by side,
 * long enough that each reads its weights for many positions at once. */
#define CHUNK_TOKENS_MIN 128u

enum state { NO_PATH, OPENING, PREFILL, DECODING, DONE, FAILED };

struct hop_sum {
    uint64_t queue_us;
    uint64_t compute_us;
    uint64_t network_us;
    int64_t slack_us;
    uint32_t step_count;
};

enum stage_state { STAGE_NEW, STAGE_ASKED, STAGE_READY, STAGE_CLOSED };

struct generate {
    struct generate_config config;
    enum state state;
    struct text_stream *text;

    uint32_t *tokens;  /* prompt, then answer */
    float *logprobs;   /* of the answer */
    uint32_t capacity; /* of tokens, and of logprobs plus prompt_count */
    uint32_t token_count;
    uint32_t emitted_count; /* of the answer */

    struct generate_stage stages[LIMIT_STAGES_MAX];
    enum stage_state stage_states[LIMIT_STAGES_MAX];
    uint32_t held_counts[LIMIT_STAGES_MAX];      /* positions that each holds, once it is ready */
    uint64_t stage_budgets_us[LIMIT_STAGES_MAX]; /* of a decode step */
    struct hop_sum sums[LIMIT_STAGES_MAX];
    uint32_t stage_count;
    uint32_t epoch;
    uint32_t chunk_count;       /* positions in one step of the prompt */
    uint32_t sent_count;        /* positions sent to the first stage */
    uint32_t prefill_count;     /* positions of this path before it decodes */
    uint32_t held_count;        /* of these, the first that all stages hold already */
    struct digest *prefix_keys; /* [prefix_count] of the whole pages of those positions */
    uint32_t prefix_count;
    uint64_t step_budget_us; /* of a decode step; 0: no deadline */

    uint32_t reroute_count; /* since the last token */
    int reroute_wanted;
    uint32_t blamed;
    uint32_t suspect; /* may be to blame as well; else blamed again */
    int certain;      /* blamed it is */
    int client_ready;
    int client_gone;
    int end_told; /* FINISH or FAIL was handed out */
    uint64_t now_us;
    uint64_t phase_us; /* when the path last moved on */
    struct odsi_failure failure;
    struct generate_summary summary;
};

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t new_count(const struct generate *self)
{
    return self->token_count - self->config.prompt_count;
}

uint32_t generate_new_count(const struct generate *self)
{
    return new_count(self);
}

static int has_ended(const struct generate *self)
{
    return self->state == DONE || self->state == FAILED;
}

/* Makes room for one more token of the answer. */
static enum odsi_err grow(struct generate *self)
{
    const struct generate_config *config = &self->config;
    if (self->token_count < self->capacity)
        return ODSI_OK;
    const uint32_t limit = config->prompt_count + config->new_tokens_max;
    const uint32_t wanted = min_u32(limit, self->capacity + self->capacity / 2 + 64);
    enum odsi_err err = alloc_resize(&self->tokens, wanted, sizeof *self->tokens);
    if (err == ODSI_OK)
        err = alloc_resize(&self->logprobs, wanted - config->prompt_count, sizeof *self->logprobs);
    if (err == ODSI_OK)
        self->capacity = wanted;
    return err;
}

/* Whether the prompt adds any text, so that the answer stands behind something. */
static int prompt_has_text(const struct generate_config *config, char *piece)
{
    for (uint32_t i = 0; i < config->prompt_count; i++)
        if (tokenizer_piece(config->tokenizer, config->prompt[i], piece) > 0)
            return 1;
    return 0;
}

enum odsi_err generate_open(struct generate **out, const struct generate_config *config)
{
    *out = NULL;
    ODSI_ASSERT(config->prompt_count > 0 && config->new_tokens_max > 0);
    struct generate *self = NULL;
    char *piece = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err == ODSI_OK)
        err = alloc_zeroed(&piece, TOKENIZER_PIECE_SIZE_MAX + 1, 1);
    if (err != ODSI_OK)
        goto fail;
    self->config = *config;
    self->client_ready = 1;
    self->now_us = config->start_us;
    self->phase_us = config->start_us;
    err = text_stream_open(&self->text, config->tokenizer, config->stops, config->stop_count,
                           !prompt_has_text(config, piece));
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->tokens, config->prompt_count, sizeof *self->tokens);
    if (err != ODSI_OK)
        goto fail;
    memcpy(self->tokens, config->prompt, config->prompt_count * sizeof *self->tokens);
    self->token_count = config->prompt_count;
    self->capacity = config->prompt_count;
    self->config.prompt = NULL;
    self->config.stops = NULL;
    alloc_free(piece);
    *out = self;
    return ODSI_OK;
fail:
    alloc_free(piece);
    generate_close(&self);
    return err;
}

void generate_close(struct generate **self)
{
    if (!*self)
        return;
    text_stream_close(&(*self)->text);
    alloc_free((*self)->tokens);
    alloc_free((*self)->logprobs);
    alloc_free((*self)->prefix_keys);
    alloc_free(*self);
    *self = NULL;
}

/* ---- ends ------------------------------------------------------------------------------------ */

static void fail_with(struct generate *self, const struct odsi_failure *failure)
{
    if (has_ended(self))
        return;
    if (failure != &self->failure)
        self->failure = *failure;
    self->state = FAILED;
    self->reroute_wanted = 0;
}

static void fail_now(struct generate *self, enum odsi_err err)
{
    struct odsi_failure failure;
    odsi_failure_take(&failure, err);
    fail_with(self, &failure);
}

/* What a client can act on: that workers are full, gone or late, or that the model broke down. The
 * rest is between gateway and worker, and to the client the worker is unavailable. */
static enum odsi_err client_error(enum odsi_err err)
{
    switch (err) {
    case ODSI_ERR_BUSY:
    case ODSI_ERR_NO_MEMORY:
        return ODSI_ERR_BUSY;
    case ODSI_ERR_NUMERIC:
    case ODSI_ERR_TIMEOUT:
        return err;
    default:
        return ODSI_ERR_UNAVAILABLE;
    }
}

/* The current path is over; ask for another one, or end. */
static void break_path(struct generate *self, uint32_t blamed, enum odsi_err err, uint32_t position,
                       const char *cause)
{
    struct odsi_failure *failure = &self->failure;
    failure->err = client_error(err);
    snprintf(failure->text, sizeof failure->text, "%s, step at position %u: %s: %s",
             self->stages[blamed].label, position, odsi_err_name(err), cause);
    self->blamed = blamed;
    self->suspect = blamed;
    self->certain = 1;
    if (self->reroute_count >= self->config.reroute_max) {
        fail_with(self, failure);
        return;
    }
    self->reroute_count++;
    self->reroute_wanted = 1;
    self->state = NO_PATH;
}

static void finish(struct generate *self, enum generate_finish reason)
{
    const enum odsi_err err = text_stream_end(self->text);
    if (err != ODSI_OK) {
        fail_now(self, err);
        return;
    }
    struct generate_summary *summary = &self->summary;
    summary->finish = reason;
    summary->prompt_count = self->config.prompt_count;
    summary->new_count = new_count(self);
    summary->total_us = self->now_us - self->config.start_us;
    summary->hop_count = self->stage_count;
    for (uint32_t i = 0; i < self->stage_count; i++) {
        const struct hop_sum *sum = &self->sums[i];
        const uint32_t count = sum->step_count ? sum->step_count : 1;
        summary->hops[i] = (struct generate_hop){
            .queue_us = (uint32_t)(sum->queue_us / count),
            .compute_us = (uint32_t)(sum->compute_us / count),
            .network_us = (uint32_t)(sum->network_us / count),
            .slack_us = sum->slack_us / (int64_t)count,
            .step_count = sum->step_count,
        };
    }
    self->state = DONE;
}

/* ---- path ------------------------------------------------------------------------------------ */

static uint32_t positions_to_run(const struct generate *self)
{
    return self->prefill_count - self->held_count;
}

static void cut_deadline(struct generate *self, uint64_t *prefill_budget_us)
{
    *prefill_budget_us = 0;
    self->step_budget_us = 0;
    memset(self->stage_budgets_us, 0, sizeof self->stage_budgets_us);
    if (self->config.deadline_us == UINT64_MAX)
        return;
    struct deadline_stage expected[LIMIT_STAGES_MAX];
    for (uint32_t i = 0; i < self->stage_count; i++)
        expected[i] = self->stages[i].expected;
    const uint64_t left_us =
        self->config.deadline_us > self->now_us ? self->config.deadline_us - self->now_us : 1;
    const uint32_t wanted = self->config.new_tokens_max - new_count(self);
    deadline_cut_answer(
        left_us,
        deadline_prefill_us(expected, self->stage_count, positions_to_run(self), self->chunk_count),
        deadline_step_us(expected, self->stage_count), wanted, prefill_budget_us,
        &self->step_budget_us);
    for (uint32_t i = 0; i < self->stage_count; i++)
        self->stage_budgets_us[i] =
            deadline_stage_budget_us(self->step_budget_us, expected, self->stage_count, i, 1);
}

/* The keys of the text so far. */
static enum odsi_err make_keys(struct generate *self)
{
    const uint32_t count = self->token_count / KV_PAGE_TOKENS;
    const enum odsi_err err =
        alloc_resize(&self->prefix_keys, count + 1, sizeof *self->prefix_keys);
    if (err != ODSI_OK)
        return err;
    prefix_key_chain(self->prefix_keys, &self->config.prefix_seed, self->tokens, count);
    self->prefix_count = count;
    return ODSI_OK;
}

enum odsi_err generate_prefix(struct generate *self, const struct digest **keys,
                              uint32_t *key_count)
{
    const enum odsi_err err = make_keys(self);
    *keys = self->prefix_keys;
    *key_count = err == ODSI_OK ? self->prefix_count : 0;
    return err;
}

/* Several stages work side by side on chunks of what is left to run. */
static void cut_chunks(struct generate *self)
{
    self->chunk_count = LIMIT_STEP_TOKENS;
    if (self->stage_count == 1)
        return;
    const uint32_t even = positions_to_run(self) / (2 * self->stage_count) + 1;
    self->chunk_count =
        even < CHUNK_TOKENS_MIN ? CHUNK_TOKENS_MIN : min_u32(even, LIMIT_STEP_TOKENS);
}

void generate_set_path(struct generate *self, const struct generate_stage *stages,
                       uint32_t stage_count, uint64_t now_us)
{
    if (has_ended(self))
        return;
    ODSI_ASSERT(self->state == NO_PATH);
    ODSI_ASSERT(stage_count > 0 && stage_count <= LIMIT_STAGES_MAX);
    self->now_us = now_us;
    self->phase_us = now_us;
    memcpy(self->stages, stages, stage_count * sizeof *stages);
    memset(self->stage_states, 0, sizeof self->stage_states);
    memset(self->sums, 0, sizeof self->sums);
    self->stage_count = stage_count;
    self->epoch++;
    self->sent_count = 0;
    self->prefill_count = self->token_count;
    self->held_count = 0;
    cut_chunks(self);
    self->reroute_wanted = 0;
    uint64_t prefill_budget_us = 0;
    cut_deadline(self, &prefill_budget_us);
    self->state = OPENING;
    const enum odsi_err err = make_keys(self);
    if (err != ODSI_OK)
        fail_now(self, err);
}

void generate_give_up(struct generate *self, enum odsi_err err, uint64_t now_us)
{
    self->now_us = now_us;
    if (self->epoch > 0)
        fail_with(self, &self->failure);
    else
        fail_now(self, err);
}

/* ---- inputs ---------------------------------------------------------------------------------- */

static enum odsi_err break_corrupt(struct generate *self, uint32_t stage, uint32_t position)
{
    char cause[ODSI_ERR_TEXT_SIZE];
    snprintf(cause, sizeof cause, "%s", odsi_err_text());
    break_path(self, stage, ODSI_ERR_CORRUPT, position, cause);
    return ODSI_ERR_CORRUPT;
}

/* All stages are open: the text is sent from where the one that holds the least begins. */
static void begin_prefill(struct generate *self)
{
    self->held_count = self->held_counts[0];
    for (uint32_t i = 1; i < self->stage_count; i++)
        self->held_count = min_u32(self->held_count, self->held_counts[i]);
    self->sent_count = self->held_count;
    cut_chunks(self);
    if (new_count(self) == 0)
        self->summary.reused_count = self->held_count;
    self->state = PREFILL;
}

enum odsi_err generate_opened(struct generate *self, uint32_t stage, uint32_t epoch,
                              uint32_t held_count, uint64_t now_us)
{
    self->now_us = now_us;
    if (self->state != OPENING || epoch != self->epoch || stage >= self->stage_count ||
        self->stage_states[stage] != STAGE_ASKED)
        return odsi_fail(ODSI_ERR_STATE, "stage %u says that epoch %u is open: not expected", stage,
                         epoch);
    if (held_count >= self->prefill_count || held_count > self->prefix_count * KV_PAGE_TOKENS) {
        odsi_fail(ODSI_ERR_CORRUPT,
                  "it says that it holds %u positions of a text of %u tokens with %u keys",
                  held_count, self->prefill_count, self->prefix_count);
        return break_corrupt(self, stage, held_count);
    }
    self->stage_states[stage] = STAGE_READY;
    self->held_counts[stage] = held_count;
    for (uint32_t i = 0; i < self->stage_count; i++)
        if (self->stage_states[i] != STAGE_READY)
            return ODSI_OK;
    begin_prefill(self);
    self->phase_us = now_us;
    return ODSI_OK;
}

/* Refusals that leave the path alone, then those that end it. */
static enum odsi_err check_token(struct generate *self, uint32_t stage,
                                 const struct generate_token *token)
{
    if (has_ended(self) || self->state == NO_PATH || token->epoch != self->epoch)
        return odsi_fail(ODSI_ERR_STATE, "a token of epoch %u, which is over", token->epoch);
    if (stage + 1 != self->stage_count)
        return odsi_fail(ODSI_ERR_DENIED, "a token from stage %u of %u: only the last may send one",
                         stage, self->stage_count);
    if (token->position < self->token_count && self->state == DECODING)
        return odsi_fail(ODSI_ERR_STATE, "position %u came before", token->position);
    enum odsi_err err = ODSI_OK;
    if (self->state == OPENING || self->sent_count < self->prefill_count)
        err = odsi_fail(ODSI_ERR_CORRUPT, "it sent a token before it was given the prompt");
    else if (token->position != self->token_count)
        err = odsi_fail(ODSI_ERR_CORRUPT, "it sent position %u where %u is next", token->position,
                        self->token_count);
    else if (token->token >= self->config.vocab_size)
        err = odsi_fail(ODSI_ERR_CORRUPT, "it sent an id beyond the vocabulary of %u",
                        self->config.vocab_size);
    else if (!isfinite(token->logprob))
        err = odsi_fail(ODSI_ERR_CORRUPT, "it sent a logprob that is not a number");
    return err == ODSI_OK ? ODSI_OK : break_corrupt(self, stage, self->token_count);
}

/* The first step of a path carries the prompt, so the means leave it out. */
static void add_timings(struct generate *self, const struct generate_token *token)
{
    if (self->state != DECODING)
        return;
    for (uint32_t i = 0; i < token->timing_count; i++) {
        const struct hop_timing *timing = &token->timings[i];
        if (timing->stage >= self->stage_count)
            continue;
        struct hop_sum *sum = &self->sums[timing->stage];
        sum->queue_us += timing->queue_us;
        sum->compute_us += timing->compute_us;
        sum->network_us += timing->network_us;
        /* A worker's word: clamped, so that no sum of them can overflow. */
        const int64_t day_us = INT64_C(86400000000);
        sum->slack_us += timing->slack_us > day_us    ? day_us
                         : timing->slack_us < -day_us ? -day_us
                                                      : timing->slack_us;
        sum->step_count++;
    }
}

static enum generate_finish finish_reason(const struct generate *self, uint32_t token, int stopped)
{
    if (!self->config.ignore_end && tokenizer_is_end(self->config.tokenizer, token))
        return GENERATE_END;
    if (stopped)
        return GENERATE_STOP;
    if (new_count(self) >= self->config.new_tokens_max)
        return GENERATE_LENGTH;
    return GENERATE_GO_ON;
}

enum odsi_err generate_token(struct generate *self, uint32_t stage,
                             const struct generate_token *token, uint64_t now_us)
{
    self->now_us = now_us;
    enum odsi_err err = check_token(self, stage, token);
    if (err != ODSI_OK)
        return err;
    int stopped = 0;
    err = grow(self);
    if (err == ODSI_OK)
        err = text_stream_push(self->text, token->token, &stopped);
    if (err != ODSI_OK) {
        fail_now(self, err);
        return err;
    }
    add_timings(self, token);
    self->tokens[self->token_count] = token->token;
    self->logprobs[new_count(self)] = token->logprob;
    self->token_count++;
    if (new_count(self) == 1)
        self->summary.first_token_us = now_us - self->config.start_us;
    self->state = DECODING;
    self->phase_us = now_us;
    self->reroute_count = 0;
    const enum generate_finish reason = finish_reason(self, token->token, stopped);
    if (reason != GENERATE_GO_ON) {
        finish(self, reason);
        return ODSI_OK;
    }
    if (token->finish == GENERATE_GO_ON)
        return ODSI_OK;
    /* Only what the gateway can see itself ends an answer; anything else would let a worker cut
     * answers short. */
    odsi_fail(ODSI_ERR_CORRUPT,
              "it ended the answer (reason %d) where neither an end-of-text "
              "token, a stop string nor the length does",
              (int)token->finish);
    return break_corrupt(self, stage, token->position);
}

void generate_stage_failed(struct generate *self, uint32_t stage, uint32_t epoch, enum odsi_err err,
                           uint32_t position, const char *text, uint64_t now_us)
{
    self->now_us = now_us;
    if (has_ended(self) || self->state == NO_PATH || epoch != self->epoch ||
        stage >= self->stage_count)
        return;
    const uint32_t next = (stage + 1) % self->stage_count;
    const uint32_t blamed = self->state == OPENING ? stage : next;
    if (err != ODSI_ERR_UNAVAILABLE || next == stage) {
        break_path(self, stage, err == ODSI_OK ? ODSI_ERR_INTERNAL : err, position, text);
        return;
    }
    break_path(self, blamed, err, position, text);
    self->suspect = next;
    self->certain = 0;
}

void generate_link_broken(struct generate *self, uint32_t stage, const char *text, uint64_t now_us)
{
    self->now_us = now_us;
    if (has_ended(self) || self->state == NO_PATH || stage >= self->stage_count)
        return;
    /* While the prompt is under way nobody knows which of its steps was lost; name the first. */
    const uint32_t position = self->state == DECODING ? self->token_count : 0;
    break_path(self, stage, ODSI_ERR_UNAVAILABLE, position, text);
}

static uint64_t add_us(uint64_t a, uint64_t b)
{
    return a > UINT64_MAX - b ? UINT64_MAX : a + b;
}

static uint64_t phase_end_us(const struct generate *self)
{
    struct deadline_stage expected[LIMIT_STAGES_MAX];
    switch (self->state) {
    case OPENING:
        return add_us(self->phase_us, self->config.open_timeout_us);
    case PREFILL:
    case DECODING:
        for (uint32_t i = 0; i < self->stage_count; i++)
            expected[i] = self->stages[i].expected;
        return add_us(add_us(self->phase_us, self->config.stall_timeout_us),
                      self->state == DECODING
                          ? 0
                          : 10 * deadline_prefill_us(expected, self->stage_count,
                                                     positions_to_run(self), self->chunk_count));
    case NO_PATH:
    case DONE:
    case FAILED:
        break;
    }
    return UINT64_MAX;
}

uint64_t generate_wake_us(const struct generate *self)
{
    if (has_ended(self))
        return UINT64_MAX;
    const uint64_t phase_us = phase_end_us(self);
    return phase_us < self->config.deadline_us ? phase_us : self->config.deadline_us;
}

static const char *phase_name(const struct generate *self)
{
    switch (self->state) {
    case OPENING:
        return "the session was being opened";
    case PREFILL:
        return "the prompt was being computed";
    case DECODING:
        return "the answer was being written";
    default:
        return "no path was open";
    }
}

void generate_timer(struct generate *self, uint64_t now_us)
{
    self->now_us = now_us;
    if (has_ended(self))
        return;
    if (now_us >= self->config.deadline_us) {
        fail_now(self,
                 odsi_fail(ODSI_ERR_TIMEOUT,
                           "the deadline of %llu ms passed while %s; %u of at most %u tokens "
                           "were made",
                           (unsigned long long)((self->config.deadline_us - self->config.start_us) /
                                                1000),
                           phase_name(self), new_count(self), self->config.new_tokens_max));
        return;
    }
    if (now_us < phase_end_us(self))
        return;
    char cause[96];
    if (self->state == OPENING) {
        uint32_t silent = 0;
        while (silent + 1 < self->stage_count && self->stage_states[silent] == STAGE_READY)
            silent++;
        snprintf(cause, sizeof cause, "it did not open the session within %llu ms",
                 (unsigned long long)(self->config.open_timeout_us / 1000));
        break_path(self, silent, ODSI_ERR_UNAVAILABLE, 0, cause);
        return;
    }
    /* Which stage is stuck cannot be seen from here; the last one owes the token. */
    snprintf(cause, sizeof cause, "no token for %llu ms",
             (unsigned long long)((now_us - self->phase_us) / 1000));
    break_path(self, self->stage_count - 1, ODSI_ERR_TIMEOUT, self->token_count, cause);
}

void generate_client_ready(struct generate *self)
{
    self->client_ready = 1;
}

void generate_cancel(struct generate *self, uint64_t now_us)
{
    self->client_gone = 1;
    generate_abort(self, ODSI_ERR_CANCELLED, "the client went away", now_us);
}

void generate_abort(struct generate *self, enum odsi_err err, const char *text, uint64_t now_us)
{
    self->now_us = now_us;
    fail_now(self, odsi_fail(err, "%s", text));
}

/* ---- actions --------------------------------------------------------------------------------- */

static int next_close(struct generate *self, struct generate_action *out)
{
    if (self->state != NO_PATH && !has_ended(self))
        return 0;
    for (uint32_t i = 0; i < self->stage_count; i++) {
        const enum stage_state state = self->stage_states[i];
        self->stage_states[i] = STAGE_CLOSED;
        if (state != STAGE_ASKED && state != STAGE_READY)
            continue;
        out->kind = GENERATE_CLOSE;
        out->stage = i;
        return 1;
    }
    return 0;
}

static int next_open(struct generate *self, struct generate_action *out)
{
    if (self->state != OPENING)
        return 0;
    for (uint32_t i = 0; i < self->stage_count; i++) {
        if (self->stage_states[i] != STAGE_NEW)
            continue;
        self->stage_states[i] = STAGE_ASKED;
        const uint32_t told = min_u32(self->config.penalty_window, self->token_count);
        *out = (struct generate_action){
            .kind = GENERATE_OPEN,
            .stage = i,
            .epoch = self->epoch,
            .tokens = self->tokens + self->token_count - told,
            .token_count = told,
            .new_tokens_max = self->config.new_tokens_max - new_count(self),
            .prompt_count = self->prefill_count,
            .prefix_keys = self->prefix_keys,
            .prefix_count = self->prefix_count,
            .budget_us = self->step_budget_us,
            .stage_budgets_us = self->stage_budgets_us,
        };
        return 1;
    }
    return 0;
}

/* All chunks leave at once: the stages take them one after the other, side by side. The budget of
 * each covers those in front of it. */
static int next_step(struct generate *self, struct generate_action *out)
{
    if (self->state != PREFILL || self->sent_count == self->prefill_count)
        return 0;
    const uint32_t count = min_u32(self->chunk_count, self->prefill_count - self->sent_count);
    *out = (struct generate_action){
        .kind = GENERATE_STEP,
        .epoch = self->epoch,
        .position = self->sent_count,
        .tokens = self->tokens + self->sent_count,
        .token_count = count,
    };
    self->sent_count += count;
    out->sample = self->sent_count == self->prefill_count;
    uint64_t prefill_budget_us = 0;
    cut_deadline(self, &prefill_budget_us);
    if (prefill_budget_us == 0)
        return 1;
    struct deadline_stage expected[LIMIT_STAGES_MAX];
    for (uint32_t i = 0; i < self->stage_count; i++)
        expected[i] = self->stages[i].expected;
    out->budget_us =
        prefill_budget_us / positions_to_run(self) * (self->sent_count - self->held_count) + 1;
    out->stage_budget_us =
        deadline_stage_budget_us(out->budget_us, expected, self->stage_count, 0, count);
    return 1;
}

static int next_emit(struct generate *self, struct generate_action *out)
{
    const uint32_t waiting = new_count(self) - self->emitted_count;
    if (self->client_gone || (waiting == 0 && text_stream_is_empty(self->text)) ||
        (!self->client_ready && !has_ended(self)))
        return 0;
    *out = (struct generate_action){
        .kind = GENERATE_EMIT,
        .tokens = self->tokens + self->config.prompt_count + self->emitted_count,
        .logprobs = self->logprobs + self->emitted_count,
        .token_count = min_u32(waiting, GENERATE_EMIT_TOKENS),
    };
    text_stream_take(self->text, GENERATE_EMIT_TEXT_SIZE, &out->text, &out->text_size);
    self->emitted_count += out->token_count;
    self->client_ready = 0;
    return 1;
}

static int next_end(struct generate *self, struct generate_action *out)
{
    if (self->end_told || self->client_gone || !has_ended(self))
        return 0;
    self->end_told = 1;
    *out = (struct generate_action){
        .kind = self->state == DONE ? GENERATE_FINISH : GENERATE_FAIL,
        .summary = &self->summary,
        .failure = &self->failure,
    };
    return 1;
}

int generate_next(struct generate *self, struct generate_action *out)
{
    memset(out, 0, sizeof *out);
    if (next_close(self, out) || next_open(self, out) || next_step(self, out) ||
        next_emit(self, out) || next_end(self, out))
        return 1;
    if (!self->reroute_wanted)
        return 0;
    self->reroute_wanted = 0;
    out->kind = GENERATE_REROUTE;
    out->stage = self->blamed;
    out->other = self->suspect;
    out->certain = self->certain;
    out->failure = &self->failure;
    return 1;
}
