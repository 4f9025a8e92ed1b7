#include "worker/gateway/answer.h"

#include "common/base/alloc.h"
#include "common/base/bytes.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "kernels/ops.h"
#include "worker/gateway/model_choice.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

#define AVOID_MAX 16u /* workers one answer gave up on */
/* A path that holds the prompt's beginning is taken unless its steps are expected to cost more than
 * this much of the best one's: two or three sessions more on a worker. */
#define KNOWN_COST_PERCENT 150u

/* One worker of the path; the user pointer of its connection. */
struct stage {
    struct answer *answer;
    uint32_t index;
    struct worker_link *link; /* NULL: not joined */
};

struct answer {
    struct answer_context *context;
    struct answer *next;
    struct answer *previous;
    struct request request;
    const struct answer_handler *handler;
    void *user;
    struct hop_session_id session_id;
    uint64_t start_us;
    uint64_t deadline_us; /* UINT64_MAX: none */
    struct digest model_id;
    struct model_card *card;
    struct encoder_job *job;
    uint32_t *tokens; /* of the prompt, until generate has them */
    uint32_t token_count;
    uint32_t new_tokens_max;
    struct generate *generate;
    struct rpc_timer timer;
    struct stage stages[LIMIT_STAGES_MAX];
    struct hop_stage *hop_stages; /* [LIMIT_STAGES_MAX] */
    uint32_t stage_count;
    struct digest avoid[AVOID_MAX];
    uint32_t avoid_count;
    int starting; /* in answer_start: failures are returned */
    int pumping;
    int ended;
    struct odsi_failure failure;
};

static void pump(struct answer *self);

/* ---- beginning and end ----------------------------------------------------------------------- */

static enum odsi_err fill_random(void *out, size_t size)
{
    ssize_t got;
    do {
        got = getrandom(out, size, 0);
    } while (got < 0 && errno == EINTR);
    if (got == (ssize_t)size)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_IO, "the system gives no random bytes: %s", strerror(errno));
}

static void stage_leave(struct answer *self, uint32_t index)
{
    struct stage *stage = &self->stages[index];
    if (!stage->link)
        return;
    worker_link_client_leave(stage->link, &self->session_id);
    worker_book_count_session(self->context->book, &self->hop_stages[index].worker_id, -1);
    stage->link = NULL;
}

static void answer_free(struct answer *self)
{
    struct answer_context *context = self->context;
    for (uint32_t i = 0; i < self->stage_count; i++)
        stage_leave(self, i);
    if (self->previous)
        self->previous->next = self->next;
    else
        context->first = self->next;
    if (self->next)
        self->next->previous = self->previous;
    context->count--;
    rpc_timer_cancel(&self->timer);
    model_fetch_cancel(context->models, self);
    encoder_cancel(&self->job);
    generate_close(&self->generate);
    model_store_release(&self->card);
    alloc_free(self->tokens);
    alloc_free(self->hop_stages);
    request_free(&self->request);
    alloc_free(self);
}

/* The last thing done with self. */
static void tell_end(struct answer *self, const struct generate_summary *summary)
{
    const struct answer_end end = {
        .err = self->failure.err,
        .text = self->failure.text,
        .session_id = &self->session_id,
        .model_id = &self->model_id,
        .numerics_version = NUMERICS_VERSION,
        .seed = self->request.sampling.seed,
        .summary = summary,
        .stages = self->hop_stages,
    };
    self->handler->on_end(self->user, &end);
    answer_free(self);
}

/* Ends an answer before its state machine runs, with this thread's error text. */
static void fail_early(struct answer *self, enum odsi_err err)
{
    odsi_failure_take(&self->failure, err);
    self->ended = 1;
    if (!self->starting)
        tell_end(self, NULL);
}

void answer_cancel(struct answer **self)
{
    if (*self)
        answer_free(*self); /* leaves every worker */
    *self = NULL;
}

/* ---- path ------------------------------------------------------------------------------------ */

static int is_avoided(const struct answer *self, const struct digest *worker_id)
{
    for (uint32_t i = 0; i < self->avoid_count && i < AVOID_MAX; i++)
        if (digest_equal(&self->avoid[i], worker_id))
            return 1;
    return 0;
}

/* The workers that could be in the path; with_room leaves out those whose KV cache is too full. */
static uint32_t candidates(const struct answer *self, int with_room, uint64_t now_us,
                           struct path_member *out, uint32_t *indexes)
{
    uint32_t count = 0;
    uint32_t member_count = 0;
    const struct directory_member *members =
        directory_members_view(self->context->directory, &member_count);
    const uint64_t needed = (uint64_t)self->token_count + self->new_tokens_max;
    for (uint32_t i = 0; i < member_count; i++) {
        const struct directory_member *member = &members[i];
        if (!digest_equal(&member->model_id, &self->model_id) ||
            member->layer_count != model_store_params_view(self->card)->layer_count ||
            member->numerics_version != NUMERICS_VERSION || is_avoided(self, &member->worker_id))
            continue;
        if (with_room && member->kv_token_capacity > 0 && member->kv_tokens_free < needed)
            continue;
        worker_book_member(self->context->book, member, now_us, &out[count]);
        indexes[count++] = i;
    }
    return count;
}

static void describe_stage(struct answer *self, uint32_t index, const struct path_stage *chosen,
                           const struct directory_member *member, struct generate_stage *out)
{
    char hex[DIGEST_HEX_SIZE];
    struct hop_stage *stage = &self->hop_stages[index];
    memset(stage, 0, sizeof *stage);
    stage->worker_id = member->worker_id;
    memcpy(stage->address, member->address, sizeof stage->address);
    stage->layer_first = chosen->layer_first;
    stage->layer_end = chosen->layer_end;
    self->stages[index] = (struct stage){.answer = self, .index = index};
    digest_to_hex(hex, &member->worker_id);
    snprintf(out->label, sizeof out->label, "worker %.16s at %s, layers %u-%u", hex,
             member->address, chosen->layer_first, chosen->layer_end - 1);
    worker_book_expect(self->context->book, member, chosen->layer_end - chosen->layer_first,
                       &out->expected);
}

/* Room for one choice of a path. */
struct choice {
    struct path_member *members;
    uint32_t *indexes;
    struct generate_stage *stages; /* [LIMIT_STAGES_MAX] */
    struct path_stage chosen[LIMIT_STAGES_MAX];
    uint32_t stage_count;
};

static void choice_free(struct choice *choice)
{
    alloc_free(choice->members);
    alloc_free(choice->indexes);
    alloc_free(choice->stages);
}

/* Whether a remembered path, as stages of today's members, can be taken and is not much busier than
 * the one that was chosen. */
static int is_worth_taking(const struct answer *self, const struct choice *choice,
                           const struct prefix_book_stage *known, uint32_t stage_count,
                           uint32_t candidate_count, struct path_stage *out)
{
    uint64_t cost = 0, chosen_cost = 0;
    uint32_t member_count = 0;
    const struct directory_member *members =
        directory_members_view(self->context->directory, &member_count);
    for (uint32_t i = 0; i < choice->stage_count; i++) {
        const struct path_stage *stage = &choice->chosen[i];
        chosen_cost += path_stage_cost(&choice->members[stage->member_index],
                                       stage->layer_end - stage->layer_first);
    }
    for (uint32_t i = 0; i < stage_count; i++) {
        uint32_t at = 0;
        while (at < candidate_count &&
               !digest_equal(&members[choice->indexes[at]].worker_id, &known[i].worker_id))
            at++;
        if (at == candidate_count || choice->members[at].layer_first > known[i].layer_first ||
            choice->members[at].layer_end < known[i].layer_end)
            return 0;
        out[i] = (struct path_stage){at, known[i].layer_first, known[i].layer_end};
        cost += path_stage_cost(&choice->members[at], known[i].layer_end - known[i].layer_first);
    }
    return known[stage_count - 1].layer_end == model_store_params_view(self->card)->layer_count &&
           cost <= chosen_cost * KNOWN_COST_PERCENT / 100;
}

/* Prefers the path that was given the beginning of this text, and remembers the one taken. */
static enum odsi_err follow_prefix(struct answer *self, struct choice *choice,
                                   uint32_t candidate_count)
{
    const struct digest *keys = NULL;
    uint32_t key_count = 0, stage_count = 0, member_count = 0;
    const struct prefix_book_stage *known = NULL;
    struct path_stage stages[LIMIT_STAGES_MAX];
    struct prefix_book_stage taken[LIMIT_STAGES_MAX];
    const struct directory_member *members =
        directory_members_view(self->context->directory, &member_count);
    const enum odsi_err err = generate_prefix(self->generate, &keys, &key_count);
    if (err != ODSI_OK)
        return err;
    if (prefix_book_find(self->context->prefixes, keys, key_count, &known, &stage_count) > 0 &&
        is_worth_taking(self, choice, known, stage_count, candidate_count, stages)) {
        memcpy(choice->chosen, stages, stage_count * sizeof *stages);
        choice->stage_count = stage_count;
    }
    for (uint32_t i = 0; i < choice->stage_count; i++) {
        const struct path_stage *stage = &choice->chosen[i];
        taken[i] =
            (struct prefix_book_stage){members[choice->indexes[stage->member_index]].worker_id,
                                       stage->layer_first, stage->layer_end};
    }
    prefix_book_note(self->context->prefixes, keys, key_count, taken, choice->stage_count);
    return ODSI_OK;
}

static enum odsi_err choose(struct answer *self, struct choice *choice, uint64_t now_us)
{
    uint32_t member_count = 0;
    directory_members_view(self->context->directory, &member_count);
    enum odsi_err err = alloc_zeroed(&choice->members, member_count, sizeof *choice->members);
    if (err == ODSI_OK)
        err = alloc_zeroed(&choice->indexes, member_count, sizeof *choice->indexes);
    if (err == ODSI_OK)
        err = alloc_zeroed(&choice->stages, LIMIT_STAGES_MAX, sizeof *choice->stages);
    if (err != ODSI_OK)
        return err;
    /* How full a worker is may have changed since it said so: without room anywhere, ask anyway. */
    uint32_t count = 0;
    for (int with_room = 1; with_room >= 0; with_room--) {
        count = candidates(self, with_room, now_us, choice->members, choice->indexes);
        err = path_choose(choice->chosen, &choice->stage_count, choice->members, count,
                          model_store_params_view(self->card)->layer_count, &self->context->random);
        if (err != ODSI_ERR_UNAVAILABLE)
            break;
    }
    if (err == ODSI_OK)
        err = follow_prefix(self, choice, count);
    return err;
}

static void log_path(const struct answer *self, const struct choice *choice)
{
    char hex[2 * HOP_SESSION_ID_SIZE + 1];
    if (!log_enabled(LOG_DEBUG))
        return;
    bytes_to_hex(hex, self->session_id.bytes, HOP_SESSION_ID_SIZE);
    for (uint32_t i = 0; i < choice->stage_count; i++)
        log_line(LOG_DEBUG, "session %s, stage %u: %s", hex, i, choice->stages[i].label);
}

static void take_path(struct answer *self)
{
    const uint64_t now_us = clock_monotonic_us();
    struct choice choice = {0};
    const enum odsi_err err = choose(self, &choice, now_us);
    if (err == ODSI_OK) {
        uint32_t member_count = 0;
        const struct directory_member *members =
            directory_members_view(self->context->directory, &member_count);
        for (uint32_t i = 0; i < choice.stage_count; i++)
            describe_stage(self, i, &choice.chosen[i],
                           &members[choice.indexes[choice.chosen[i].member_index]],
                           &choice.stages[i]);
        self->stage_count = choice.stage_count;
        log_path(self, &choice);
        generate_set_path(self->generate, choice.stages, choice.stage_count, now_us);
    } else {
        generate_give_up(self->generate, err, now_us);
    }
    choice_free(&choice);
}

/* ---- events of connections ------------------------------------------------------------------- */

static void on_event(void *user, const struct worker_link_event *event)
{
    const struct stage *stage = user;
    struct answer *self = stage->answer;
    const uint64_t now_us = clock_monotonic_us();
    enum odsi_err err = ODSI_OK;
    switch (event->kind) {
    case WORKER_LINK_OPENED:
        err =
            generate_opened(self->generate, stage->index, event->epoch, event->held_count, now_us);
        break;
    case WORKER_LINK_TOKEN:
        err = generate_token(self->generate, stage->index, &event->token, now_us);
        break;
    case WORKER_LINK_FAILED:
        generate_stage_failed(self->generate, stage->index, event->epoch, event->err,
                              event->position, event->text, now_us);
        break;
    }
    if (err != ODSI_OK)
        log_line(LOG_DEBUG, "stage %u: refused: %s", stage->index, odsi_err_text());
    pump(self);
}

static void on_broken(void *user, const char *text)
{
    struct stage *stage = user;
    struct answer *self = stage->answer;
    stage->link = NULL;
    worker_book_count_session(self->context->book, &self->hop_stages[stage->index].worker_id, -1);
    generate_link_broken(self->generate, stage->index, text, clock_monotonic_us());
    pump(self);
}

static const struct worker_link_handler link_handler = {on_event, on_broken};

/* ---- actions of the machine ------------------------------------------------------------------ */

static enum odsi_err join(struct answer *self, uint32_t index)
{
    struct stage *stage = &self->stages[index];
    const struct hop_stage *hop = &self->hop_stages[index];
    const enum odsi_err err =
        worker_link_client_join(self->context->links, &stage->link, &hop->worker_id, hop->address,
                                &self->session_id, &link_handler, stage);
    if (err == ODSI_OK)
        worker_book_count_session(self->context->book, &hop->worker_id, 1);
    return err;
}

static void open_stage(struct answer *self, const struct generate_action *action)
{
    const struct request *request = &self->request;
    for (uint32_t i = 0; i < self->stage_count; i++)
        self->hop_stages[i].budget_us = (int64_t)action->stage_budgets_us[i];
    const struct worker_link_spec spec = {
        .session_id = self->session_id,
        .epoch = action->epoch,
        .model_id = self->model_id,
        .numerics_version = NUMERICS_VERSION,
        .stages = self->hop_stages,
        .stage_count = self->stage_count,
        .stage = action->stage,
        .token_limit = self->token_count + self->new_tokens_max,
        .step_budget_us = action->budget_us,
        .prompt_count = action->prompt_count,
        .prefix_keys = action->prefix_keys,
        .prefix_count = action->prefix_count,
        .sampling = request->sampling,
        .penalty_tokens = action->tokens,
        .penalty_count = action->token_count,
        .stops = request->stops,
        .stop_count = request->stop_count,
        .ignore_end = request->ignore_end,
        .new_tokens_max = action->new_tokens_max,
    };
    enum odsi_err err = join(self, action->stage);
    if (err == ODSI_OK)
        err = worker_link_client_send_open(self->stages[action->stage].link, &spec);
    if (err != ODSI_OK)
        generate_link_broken(self->generate, action->stage, odsi_err_text(), clock_monotonic_us());
}

static void send_step(struct answer *self, const struct generate_action *action)
{
    const struct hop_header header = {
        .id = self->session_id,
        .epoch = action->epoch,
        .stage = 0,
        .position = action->position,
        .token_count = action->token_count,
        .kind = HOP_TOKENS,
        .sample = action->sample,
        .budget_us = (int64_t)action->budget_us,
        .stage_budget_us = (int64_t)action->stage_budget_us,
    };
    enum odsi_err err = ODSI_ERR_UNAVAILABLE;
    if (self->stages[0].link)
        err = worker_link_client_send_step(self->stages[0].link, &header, action->tokens);
    if (err != ODSI_OK)
        generate_link_broken(self->generate, 0, odsi_err_text(), clock_monotonic_us());
}

static void emit(struct answer *self, const struct generate_action *action)
{
    const struct answer_piece piece = {
        .session_id = &self->session_id,
        .tokens = action->tokens,
        .logprobs = action->logprobs,
        .token_count = action->token_count,
        .text = action->text,
        .text_size = action->text_size,
    };
    self->handler->on_piece(self->user, &piece);
}

/* A worker that surely failed is left out of this answer. One that is only suspected is taken again
 * when there is no other: if it is gone, the next try shows it. */
static void reroute(struct answer *self, const struct generate_action *action)
{
    const uint64_t now_us = clock_monotonic_us();
    const struct digest *worker_id = &self->hop_stages[action->stage].worker_id;
    log_line(LOG_WARN, "%s; looking for another path", action->failure->text);
    if (action->failure->err != ODSI_ERR_BUSY) {
        worker_book_add_failure(self->context->book, worker_id, now_us);
        worker_book_add_failure(self->context->book, &self->hop_stages[action->other].worker_id,
                                now_us);
    }
    /* Beyond AVOID_MAX the oldest is forgiven; generate bounds how often this goes on. */
    if (action->certain)
        self->avoid[self->avoid_count++ % AVOID_MAX] = *worker_id;
    take_path(self);
}

static void note_steps(struct answer *self, const struct generate_summary *summary)
{
    for (uint32_t i = 0; i < summary->hop_count; i++) {
        const struct hop_stage *stage = &self->hop_stages[i];
        const struct generate_hop *hop = &summary->hops[i];
        if (hop->step_count > 0)
            worker_book_add_step(self->context->book, &stage->worker_id,
                                 stage->layer_end - stage->layer_first, hop->compute_us,
                                 hop->network_us);
    }
}

/* Returns 1 when this was the last action, and self is gone. */
static int act(struct answer *self, const struct generate_action *action)
{
    switch (action->kind) {
    case GENERATE_OPEN:
        open_stage(self, action);
        return 0;
    case GENERATE_STEP:
        send_step(self, action);
        return 0;
    case GENERATE_CLOSE:
        stage_leave(self, action->stage);
        return 0;
    case GENERATE_EMIT:
        emit(self, action);
        return 0;
    case GENERATE_REROUTE:
        reroute(self, action);
        return 0;
    case GENERATE_FINISH:
        note_steps(self, action->summary);
        break;
    case GENERATE_FAIL:
        self->failure = *action->failure;
        break;
    }
    self->ended = 1;
    if (!self->starting)
        tell_end(self, action->summary);
    return 1;
}

static void on_timer(void *context)
{
    struct answer *self = context;
    if (self->generate) {
        generate_timer(self->generate, clock_monotonic_us());
        pump(self);
        return;
    }
    fail_early(self, odsi_fail(ODSI_ERR_TIMEOUT,
                               "the deadline passed before the model's tokenizer was ready"));
}

static enum odsi_err start_timer(struct answer *self, uint64_t wake_us)
{
    const uint64_t now_us = clock_monotonic_us();
    if (wake_us == UINT64_MAX) {
        rpc_timer_cancel(&self->timer);
        return ODSI_OK;
    }
    return rpc_timer_start(&self->timer, self->context->loop,
                           wake_us > now_us ? wake_us - now_us : 0, on_timer, self);
}

/* Does what the machine wants until it wants nothing. May end the answer. */
static void pump(struct answer *self)
{
    struct generate_action action;
    if (self->pumping)
        return;
    self->pumping = 1;
    while (generate_next(self->generate, &action))
        if (act(self, &action))
            return;
    self->pumping = 0;
    const enum odsi_err err = start_timer(self, generate_wake_us(self->generate));
    if (err == ODSI_OK)
        return;
    generate_abort(self->generate, err, odsi_err_text(), clock_monotonic_us());
    pump(self);
}

void answer_client_ready(struct answer *self)
{
    if (!self->generate)
        return;
    generate_client_ready(self->generate);
    pump(self);
}

void answer_abort_all(struct answer_context *context, enum odsi_err err, const char *text)
{
    while (context->first) {
        struct answer *self = context->first;
        if (self->generate) {
            generate_abort(self->generate, err, text, clock_monotonic_us());
            pump(self);
        } else {
            fail_early(self, odsi_fail(err, "%s", text));
        }
    }
}

/* ---- from request to machine ----------------------------------------------------------------- */

static enum odsi_err make_machine(struct answer *self)
{
    const struct request *request = &self->request;
    const struct model_params *params = model_store_params_view(self->card);
    if (self->token_count >= params->context_length)
        return odsi_fail(ODSI_ERR_RANGE,
                         "the prompt has %u tokens; the model's context of %u leaves no room for "
                         "an answer",
                         self->token_count, params->context_length);
    const uint32_t room = params->context_length - self->token_count;
    self->new_tokens_max =
        request->max_tokens > 0 && request->max_tokens < room ? request->max_tokens : room;
    const struct generate_config config = {
        .tokenizer = model_store_tokenizer_view(self->card),
        .vocab_size = params->vocab_size,
        .prompt = self->tokens,
        .prompt_count = self->token_count,
        .new_tokens_max = self->new_tokens_max,
        .ignore_end = request->ignore_end,
        .stops = request->stops,
        .stop_count = request->stop_count,
        .penalty_window = request->sampling.penalty_window,
        .prefix_seed = self->context->prefix_seed,
        .start_us = self->start_us,
        .deadline_us = self->deadline_us,
        .open_timeout_us = self->context->open_timeout_us,
        .stall_timeout_us = self->context->stall_timeout_us,
        .reroute_max = self->context->reroute_max,
    };
    return generate_open(&self->generate, &config);
}

/* The prompt's tokens are there. */
static void run(struct answer *self)
{
    const enum odsi_err err = make_machine(self);
    if (err != ODSI_OK) {
        fail_early(self, err);
        return;
    }
    alloc_free(self->tokens);
    self->tokens = NULL;
    take_path(self);
    pump(self);
}

static void on_encoded(void *user, enum odsi_err err, uint32_t *tokens, uint32_t count)
{
    struct answer *self = user;
    self->job = NULL;
    self->tokens = tokens;
    self->token_count = count;
    if (err == ODSI_ERR_RANGE)
        odsi_fail(err, "the %s has %u tokens; the model's context has %u",
                  self->request.message_count > 0 ? "conversation" : "prompt", count,
                  model_store_params_view(self->card)->context_length);
    if (err == ODSI_OK && count == 0)
        err = odsi_fail(ODSI_ERR_INVALID,
                        "prompt: it is empty, and this model has no token to begin with");
    if (err != ODSI_OK)
        fail_early(self, err);
    else
        run(self);
}

static enum odsi_err take_prompt_tokens(struct answer *self)
{
    struct request *request = &self->request;
    const uint32_t vocab_size = model_store_params_view(self->card)->vocab_size;
    for (uint32_t i = 0; i < request->prompt_token_count; i++)
        if (request->prompt_tokens[i] >= vocab_size)
            return odsi_fail(ODSI_ERR_INVALID,
                             "prompt_tokens: entry %u is beyond the model's vocabulary of %u", i,
                             vocab_size);
    self->tokens = request->prompt_tokens;
    self->token_count = request->prompt_token_count;
    request->prompt_tokens = NULL;
    return ODSI_OK;
}

/* An empty prompt is the bos alone, for models that want it in front and for those that do not. */
static enum odsi_err take_bos(struct answer *self)
{
    const uint32_t bos = tokenizer_bos(model_store_tokenizer_view(self->card));
    if (bos == TOKENIZER_NONE)
        return odsi_fail(ODSI_ERR_INVALID,
                         "prompt: it is empty, and this model has no token to begin with");
    const enum odsi_err err = alloc_zeroed(&self->tokens, 1, sizeof *self->tokens);
    if (err != ODSI_OK)
        return err;
    self->tokens[0] = bos;
    self->token_count = 1;
    return ODSI_OK;
}

/* The prompt or the conversation goes to the thread that makes tokens of it, and is forgotten. */
static enum odsi_err start_encoder(struct answer *self)
{
    struct request *request = &self->request;
    const uint32_t token_max = model_store_params_view(self->card)->context_length;
    struct encoder *encoder = self->context->encoder;
    enum odsi_err err;
    if (request->message_count > 0)
        err = encoder_start_chat(encoder, &self->job, self->card, request->messages,
                                 request->message_count, token_max, on_encoded, self);
    else
        err = encoder_start(encoder, &self->job, self->card, request->prompt, request->prompt_size,
                            token_max, on_encoded, self);
    alloc_free(request->prompt);
    request->prompt = NULL;
    alloc_free(request->messages);
    request->messages = NULL;
    alloc_free(request->message_text);
    request->message_text = NULL;
    return err;
}

static void on_model(void *user, enum odsi_err err, struct model_card *card)
{
    struct answer *self = user;
    struct request *request = &self->request;
    self->card = card;
    if (err == ODSI_OK && (request->prompt_size > 0 || request->message_count > 0)) {
        err = start_encoder(self);
        if (err == ODSI_OK)
            return;
    } else if (err == ODSI_OK) {
        err = request->prompt_token_count > 0 ? take_prompt_tokens(self) : take_bos(self);
    }
    if (err != ODSI_OK)
        fail_early(self, err);
    else
        run(self);
}

static enum odsi_err find_model(struct answer *self)
{
    struct directory_model *models = NULL;
    const struct directory_model *chosen = NULL;
    uint32_t count = 0;
    enum odsi_err err = directory_models(self->context->directory, &models, &count);
    if (err == ODSI_OK)
        err = model_choice_find(models, count, self->request.model, &chosen);
    if (err == ODSI_OK)
        self->model_id = chosen->model_id;
    alloc_free(models);
    return err;
}

static enum odsi_err prepare(struct answer *self)
{
    struct request *request = &self->request;
    enum odsi_err err = request_check(request);
    if (err == ODSI_OK)
        err = fill_random(&self->session_id, sizeof self->session_id);
    while (err == ODSI_OK && request->sampling.seed == 0) {
        err = fill_random(&request->sampling.seed, sizeof request->sampling.seed);
        request->sampling.seed >>= 11; /* 53 bits: a number in every JSON reader */
    }
    if (err == ODSI_OK)
        err = find_model(self);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->hop_stages, LIMIT_STAGES_MAX, sizeof *self->hop_stages);
    if (err == ODSI_OK)
        err = start_timer(self, self->deadline_us);
    return err;
}

enum odsi_err answer_start(struct answer **out, struct answer_context *context,
                           struct request *request, const struct answer_handler *handler,
                           void *user)
{
    struct answer *self = NULL;
    *out = NULL;
    enum odsi_err err = ODSI_OK;
    if (context->count >= context->count_max)
        err = odsi_fail(ODSI_ERR_BUSY, "%u answers are being written; try again later",
                        context->count_max);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK) {
        request_free(request);
        return err;
    }
    self->context = context;
    self->request = *request;
    memset(request, 0, sizeof *request);
    self->handler = handler;
    self->user = user;
    self->start_us = clock_monotonic_us();
    self->deadline_us =
        self->request.deadline_us > 0 && self->request.deadline_us < UINT64_MAX - self->start_us
            ? self->start_us + self->request.deadline_us
            : UINT64_MAX;
    self->next = context->first;
    if (self->next)
        self->next->previous = self;
    context->first = self;
    context->count++;
    self->starting = 1;
    err = prepare(self);
    if (err == ODSI_OK)
        model_fetch_want(context->models, &self->model_id, on_model, self);
    if (err == ODSI_OK && self->ended)
        err = odsi_fail(self->failure.err, "%s", self->failure.text);
    if (err != ODSI_OK) {
        answer_free(self);
        return err;
    }
    self->starting = 0;
    *out = self;
    return ODSI_OK;
}
