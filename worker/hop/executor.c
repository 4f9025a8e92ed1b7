#include "worker/hop/executor.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "worker/engine/scheduler.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <string.h>

#define BATCH_STEPS_MAX 64u
/* A step longer than this is left to the executor's own thread: short ones because another step
 * may arrive meanwhile and share a batch, those of a session that is alone because the network
 * thread should not be away for longer. */
#define INLINE_MAX_US       500u
#define INLINE_ALONE_MAX_US 20000u
#define INLINE_TOKENS_MAX   4u /* only decodes: their time is known from the ones before */
/* Positions of prompts in one batch while answers are being written: what their next tokens have to
 * wait for, whether their steps are here yet or not. Enough to compute with nearly full speed. */
#define PROMPT_PIECE_TOKENS 64u

enum job_kind { JOB_OPEN, JOB_STEP, JOB_CLOSE };

struct executor_session {
    struct executor *executor;
    const struct hop_spec *spec;
    void *user;
    struct executor_job open_job;
    struct executor_job close_job;
    /* Below: for the one that holds the role. */
    struct executor_session *next, *previous; /* of all sessions */
    struct engine_session *engine_session;
    struct executor_job *first, **last_next; /* waiting steps, oldest first */
    uint32_t ready_index;                    /* in executor.ready; UINT32_MAX: no step waits */
    struct sampler *sampler;
    struct stop stop;
    uint32_t new_tokens;
    int started;   /* the first step was taken */
    int answering; /* one step that asked for a token ran, and there may be more */
    int failed;
};

struct picked_token {
    uint32_t token;
    float logprob;
    enum hop_finish finish;
};

struct executor {
    struct executor_config config;
    pthread_t thread;
    pthread_mutex_t lock; /* guards all up to role_thread */
    pthread_cond_t work;
    struct executor_job *jobs, **jobs_last;
    int stopping;
    int role_taken; /* somebody computes: role_thread */
    pthread_t role_thread;
    atomic_uint queued_count;
    atomic_uint session_count;
    atomic_ullong kv_tokens_free;
    uint64_t kv_tokens_total;
    /* Below: for the one that holds the role. */
    uint32_t decode_us; /* smoothed time of a small batch; 0: not known yet */
    struct executor_session *sessions;
    struct executor_session **ready; /* sessions with a waiting step */
    uint32_t ready_count, ready_capacity;
    uint32_t answering_count;
    struct scheduler_item *items; /* [ready_capacity] */
    uint32_t *order;              /* [ready_capacity] */
    struct scheduler_choice picked[BATCH_STEPS_MAX];
    struct executor_step *batch[BATCH_STEPS_MAX];
    struct engine_step steps[BATCH_STEPS_MAX];
    struct picked_token tokens[BATCH_STEPS_MAX];
    float *logits; /* [BATCH_STEPS_MAX][vocab_size]; NULL without the last layer */
    char *piece;   /* [TOKENIZER_PIECE_SIZE_MAX] */
};

enum odsi_err executor_step_make(struct executor_step **out, const struct hop_header *header,
                                 uint32_t row_size)
{
    struct executor_step *step = NULL;
    *out = NULL;
    const enum odsi_err err =
        alloc_zeroed(&step, 1, sizeof *step + (size_t)header->token_count * row_size);
    if (err != ODSI_OK)
        return err;
    step->header = *header;
    step->row_size = row_size;
    *out = step;
    return ODSI_OK;
}

void executor_step_free(struct executor_step *step)
{
    if (step)
        alloc_free(step->output);
    alloc_free(step);
}

static struct executor_step *step_of(struct executor_job *job)
{
    return (struct executor_step *)(void *)((char *)job - offsetof(struct executor_step, job));
}

/* ---- sessions and their waiting steps (holding the role) ------------------------------------ */

static void ready_add(struct executor *self, struct executor_session *session)
{
    ODSI_ASSERT(self->ready_count < self->ready_capacity);
    session->ready_index = self->ready_count;
    self->ready[self->ready_count++] = session;
}

static void ready_remove(struct executor *self, struct executor_session *session)
{
    struct executor_session *moved = self->ready[--self->ready_count];
    self->ready[session->ready_index] = moved;
    moved->ready_index = session->ready_index;
    session->ready_index = UINT32_MAX;
}

static struct executor_step *take_first(struct executor *self, struct executor_session *session)
{
    struct executor_job *job = session->first;
    session->first = job->next;
    if (!session->first) {
        session->last_next = &session->first;
        ready_remove(self, session);
    }
    return step_of(job);
}

static void drop_step(struct executor *self, struct executor_step *step)
{
    executor_step_free(step);
    atomic_fetch_sub(&self->queued_count, 1);
}

static void drop_waiting(struct executor *self, struct executor_session *session)
{
    while (session->first)
        drop_step(self, take_first(self, session));
}

/* Room in the ready list for one more session. */
static enum odsi_err grow_ready(struct executor *self)
{
    if (atomic_load(&self->session_count) < self->ready_capacity)
        return ODSI_OK;
    const uint32_t capacity = self->ready_capacity ? 2 * self->ready_capacity : 64;
    enum odsi_err err = alloc_resize(&self->ready, capacity, sizeof(struct executor_session *));
    if (err == ODSI_OK)
        err = alloc_resize(&self->items, capacity, sizeof *self->items);
    if (err == ODSI_OK)
        err = alloc_resize(&self->order, capacity, sizeof *self->order);
    if (err == ODSI_OK)
        self->ready_capacity = capacity;
    return err;
}

static void publish_load(struct executor *self)
{
    atomic_store(&self->kv_tokens_free, engine_kv_tokens_free(self->config.engine));
}

static enum odsi_err start_session(struct executor *self, struct executor_session *session)
{
    const struct hop_spec *spec = session->spec;
    const struct hop_stage *own = &spec->stages[spec->stage];
    const struct engine_prefix prefix = {.keys = spec->prefix_keys,
                                         .key_count = spec->prefix_count,
                                         .prompt_count = spec->prompt_count,
                                         .scope = spec->prefix_scope};
    enum odsi_err err = grow_ready(self);
    if (err == ODSI_OK)
        err = engine_session_open_prefix(&session->engine_session, self->config.engine,
                                         own->layer_first, own->layer_end, spec->token_limit,
                                         &prefix);
    if (err != ODSI_OK || !hop_is_last(spec))
        return err;
    session->stop = spec->stop;
    err = sampler_open(&session->sampler, &spec->sampling, self->config.worker->vocab_size);
    for (uint32_t i = 0; err == ODSI_OK && i < spec->penalty_count; i++)
        sampler_accept(session->sampler, spec->penalty_tokens[i]);
    return err;
}

static void open_session(struct executor *self, struct executor_session *session)
{
    session->next = self->sessions;
    if (session->next)
        session->next->previous = session;
    self->sessions = session;
    const enum odsi_err err = start_session(self, session);
    atomic_fetch_add(&self->session_count, 1);
    session->failed = err != ODSI_OK;
    publish_load(self);
    self->config.events->opened(
        session->user, err, err == ODSI_OK ? engine_session_length(session->engine_session) : 0);
}

static void set_answering(struct executor *self, struct executor_session *session, int answering)
{
    self->answering_count += (uint32_t)answering - (uint32_t)session->answering;
    session->answering = answering;
}

static void close_session(struct executor *self, struct executor_session *session)
{
    set_answering(self, session, 0);
    drop_waiting(self, session);
    engine_session_close(&session->engine_session);
    sampler_close(&session->sampler);
    if (session->next)
        session->next->previous = session->previous;
    if (session->previous)
        session->previous->next = session->next;
    else
        self->sessions = session->next;
    atomic_fetch_sub(&self->session_count, 1);
    publish_load(self);
    self->config.events->closed(session->user);
    alloc_free(session);
}

static void fail_step(struct executor *self, struct executor_step *step, enum odsi_err err)
{
    struct executor_session *session = step->job.session;
    session->failed = 1;
    set_answering(self, session, 0);
    drop_waiting(self, session);
    self->config.events->failed(session->user, &step->header, err);
}

/* Where the session's first step begins is where it begins (hop.h, "Prefix reuse"). */
static enum odsi_err begin(struct executor_session *session, const struct executor_step *step)
{
    if (session->started)
        return ODSI_OK;
    session->started = 1;
    return engine_session_begin_at(session->engine_session, step->header.position);
}

static void add_step(struct executor *self, struct executor_step *step)
{
    struct executor_session *session = step->job.session;
    if (session->failed) {
        drop_step(self, step);
        return;
    }
    const enum odsi_err err = begin(session, step);
    if (err != ODSI_OK) {
        fail_step(self, step, err);
        drop_step(self, step);
        return;
    }
    if (!session->first)
        ready_add(self, session);
    step->job.next = NULL;
    *session->last_next = &step->job;
    session->last_next = &step->job.next;
}

/* ---- running a batch (holding the role) ----------------------------------------------------- */

static uint32_t pick_batch(struct executor *self)
{
    for (uint32_t i = 0; i < self->ready_count; i++) {
        const struct executor_session *session = self->ready[i];
        const struct executor_step *step = step_of(session->first);
        const struct hop_stage *own = &session->spec->stages[session->spec->stage];
        self->items[i] = (struct scheduler_item){
            .arrival_us = step->arrival_us,
            .deadline_us = step->header.stage_budget_us > 0
                               ? step->arrival_us + (uint64_t)step->header.stage_budget_us
                               : SCHEDULER_NO_DEADLINE,
            .token_count = step->header.token_count - step->done_count,
            .layer_first = own->layer_first,
            .layer_end = own->layer_end,
        };
    }
    const uint32_t tokens_max = engine_batch_tokens_max(self->config.engine);
    const struct scheduler_limits limits = {
        .tokens_max = tokens_max,
        .steps_max = BATCH_STEPS_MAX,
        .prompt_tokens_max = self->answering_count > 0 ? PROMPT_PIECE_TOKENS : tokens_max,
    };
    const uint32_t count =
        scheduler_pick(self->items, self->ready_count, &limits, self->picked, self->order);
    for (uint32_t i = 0; i < count; i++)
        self->batch[i] = step_of(self->ready[self->picked[i].index]->first);
    return count;
}

/* The piece of the step that runs in this batch, as its index-th. */
static enum odsi_err prepare_step(struct executor *self, struct executor_step *step,
                                  uint32_t token_count, uint32_t index)
{
    struct executor_session *session = step->job.session;
    struct engine_step *run = &self->steps[index];
    const uint32_t dim = self->config.worker->dim;
    const uint32_t done = step->done_count;
    const uint32_t *data = step->data + (size_t)done * (step->row_size / sizeof *step->data);
    *run = (struct engine_step){.session = session->engine_session, .token_count = token_count};
    if (hop_is_first(session->spec))
        run->tokens = data;
    else
        run->input = (const float *)(const void *)data;
    if (hop_is_last(session->spec)) {
        if (step->header.sample && done + token_count == step->header.token_count)
            run->logits = self->logits + (size_t)index * self->config.worker->vocab_size;
        return ODSI_OK;
    }
    enum odsi_err err = ODSI_OK;
    if (!step->output)
        err = alloc_zeroed(&step->output, (size_t)step->header.token_count * dim, sizeof(float));
    if (err == ODSI_OK)
        run->output = step->output + (size_t)done * dim;
    return err;
}

static enum hop_finish finish_of(struct executor *self, struct executor_session *session,
                                 uint32_t position, uint32_t token)
{
    const struct hop_spec *spec = session->spec;
    if (!spec->ignore_end && tokenizer_is_end(self->config.tokenizer, token))
        return HOP_FINISH_END;
    const size_t size = tokenizer_piece(self->config.tokenizer, token, self->piece);
    if (stop_feed(&session->stop, self->piece, size))
        return HOP_FINISH_STOP;
    if (position >= spec->token_limit ||
        (spec->new_tokens_max > 0 && session->new_tokens >= spec->new_tokens_max))
        return HOP_FINISH_LENGTH;
    return HOP_FINISH_NONE;
}

/* What the last stage picked for one step of the batch. */
static void pick_token(struct executor *self, uint32_t index)
{
    const struct executor_step *step = self->batch[index];
    struct executor_session *session = step->job.session;
    struct picked_token *picked = &self->tokens[index];
    const uint32_t position = step->header.position + step->header.token_count;
    sampler_pick(session->sampler, self->steps[index].logits, position, &picked->token,
                 &picked->logprob);
    sampler_accept(session->sampler, picked->token);
    session->new_tokens++;
    picked->finish = finish_of(self, session, position, picked->token);
}

static void add_timing(struct executor_step *step, uint64_t end_us)
{
    struct hop_header *header = &step->header;
    if (header->timing_count == LIMIT_STAGES_MAX)
        return;
    const uint64_t used_us = end_us - step->arrival_us;
    header->timings[header->timing_count++] = (struct hop_timing){
        .stage = header->stage,
        .queue_us = (uint32_t)(used_us - step->compute_us),
        .compute_us = (uint32_t)step->compute_us,
        .network_us = header->network_us,
        .slack_us = header->stage_budget_us ? header->stage_budget_us - (int64_t)used_us : 0,
    };
    if (header->budget_us) {
        header->budget_us -= (int64_t)used_us;
        if (header->budget_us < 1)
            header->budget_us = 1; /* expired; 0 would mean "no deadline" */
    }
}

/* Tells what became of a step of which a piece has run, and takes it out when that was the last. */
static void report_step(struct executor *self, uint32_t index, uint64_t start_us, uint64_t end_us)
{
    struct executor_step *step = self->batch[index];
    struct executor_session *session = step->job.session;
    const struct engine_step *run = &self->steps[index];
    step->done_count += run->token_count;
    step->compute_us += end_us - start_us;
    if (run->status == ODSI_OK && step->done_count < step->header.token_count)
        return;
    take_first(self, session);
    add_timing(step, end_us);
    if (run->status != ODSI_OK) {
        fail_step(self, step, run->status);
    } else if (step->output) {
        float *output = step->output;
        step->output = NULL;
        set_answering(self, session, step->header.sample);
        self->config.events->output(session->user, &step->header, output,
                                    (size_t)step->header.token_count * self->config.worker->dim *
                                        sizeof(float));
    } else if (run->logits) {
        const struct picked_token *picked = &self->tokens[index];
        set_answering(self, session, picked->finish == HOP_FINISH_NONE);
        self->config.events->token(session->user, &step->header, picked->token, picked->logprob,
                                   picked->finish);
    }
    drop_step(self, step);
}

/* Follows upward at once and downward slowly, so that a long step is not run inline twice. */
static void learn_decode_time(struct executor *self, uint64_t used_us)
{
    const uint64_t used = used_us < 1 ? 1 : used_us > UINT32_MAX ? UINT32_MAX : used_us;
    const uint64_t smoothed = (7u * (uint64_t)self->decode_us + used) / 8u;
    self->decode_us = (uint32_t)(used > smoothed ? used : smoothed);
}

/* Readies the picked steps; those that cannot be are failed. Returns how many are left. */
static uint32_t prepare_batch(struct executor *self)
{
    const uint32_t picked = pick_batch(self);
    uint32_t count = 0;
    for (uint32_t i = 0; i < picked; i++) {
        struct executor_step *step = self->batch[i];
        const enum odsi_err err = prepare_step(self, step, self->picked[i].token_count, count);
        if (err == ODSI_OK) {
            self->batch[count++] = step;
            continue;
        }
        take_first(self, step->job.session);
        fail_step(self, step, err);
        drop_step(self, step);
    }
    return count;
}

static void run_batch(struct executor *self)
{
    const uint64_t start_us = clock_now_us(&self->config.clock);
    const uint32_t count = prepare_batch(self);
    if (count == 0)
        return;
    /* Its error is in every step's status. */
    const enum odsi_err run_err = engine_run(self->config.engine, self->steps, count);
    (void)run_err;
    for (uint32_t i = 0; i < count; i++)
        if (self->steps[i].logits && self->steps[i].status == ODSI_OK)
            pick_token(self, i); /* part of the stage's computing */
    const uint64_t end_us = clock_now_us(&self->config.clock);
    if (count == 1 && self->batch[0]->header.token_count <= INLINE_TOKENS_MAX)
        learn_decode_time(self, end_us - start_us);
    for (uint32_t i = 0; i < count; i++)
        report_step(self, i, start_us, end_us);
}

/* ---- the thread and its inbox --------------------------------------------------------------- */

/* With the lock held: takes the role and everything that waits. */
static struct executor_job *take_role(struct executor *self)
{
    struct executor_job *jobs = self->jobs;
    self->jobs = NULL;
    self->jobs_last = &self->jobs;
    self->role_taken = 1;
    self->role_thread = pthread_self();
    return jobs;
}

static int has_work(const struct executor *self)
{
    return self->jobs || self->ready_count > 0;
}

static void do_jobs(struct executor *self, struct executor_job *job)
{
    while (job) {
        struct executor_job *next = job->next; /* the job may be freed or queued elsewhere */
        if (job->kind == JOB_OPEN)
            open_session(self, job->session);
        else if (job->kind == JOB_STEP)
            add_step(self, step_of(job));
        else
            close_session(self, job->session);
        job = next;
    }
}

static void *run_thread(void *context)
{
    struct executor *self = context;
    pthread_mutex_lock(&self->lock);
    for (;;) {
        while (self->role_taken || (!self->stopping && !has_work(self)))
            pthread_cond_wait(&self->work, &self->lock);
        const int stopping = self->stopping;
        struct executor_job *jobs = take_role(self);
        pthread_mutex_unlock(&self->lock);
        do_jobs(self, jobs);
        if (stopping)
            break;
        if (self->ready_count > 0)
            run_batch(self);
        pthread_mutex_lock(&self->lock);
        self->role_taken = 0;
    }
    while (self->sessions)
        close_session(self, self->sessions);
    return NULL;
}

static void post(struct executor *self, enum job_kind kind, struct executor_session *session,
                 struct executor_job *job)
{
    job->next = NULL;
    job->kind = (int)kind;
    job->session = session;
    pthread_mutex_lock(&self->lock);
    *self->jobs_last = job;
    self->jobs_last = &job->next;
    if (!self->role_taken) /* whoever has it looks again before it gives it up */
        pthread_cond_signal(&self->work);
    pthread_mutex_unlock(&self->lock);
}

/* Whether this thread holds the role: it is inside a callback. */
static int holds_role(struct executor *self)
{
    pthread_mutex_lock(&self->lock);
    const int holds = self->role_taken && pthread_equal(self->role_thread, pthread_self());
    pthread_mutex_unlock(&self->lock);
    return holds;
}

/* Runs the step here and now, if nothing else waits and it is short; 0 when it was not taken. */
static int run_inline(struct executor *self, struct executor_step *step)
{
    const uint32_t max_us =
        atomic_load(&self->session_count) == 1 ? INLINE_ALONE_MAX_US : INLINE_MAX_US;
    pthread_mutex_lock(&self->lock);
    if (self->role_taken || self->stopping || has_work(self) || self->decode_us == 0 ||
        self->decode_us > max_us || step->header.token_count > INLINE_TOKENS_MAX) {
        pthread_mutex_unlock(&self->lock);
        return 0;
    }
    take_role(self);
    pthread_mutex_unlock(&self->lock);
    add_step(self, step);
    if (self->ready_count > 0)
        run_batch(self);
    pthread_mutex_lock(&self->lock);
    self->role_taken = 0;
    if (has_work(self) || self->stopping)
        pthread_cond_signal(&self->work);
    pthread_mutex_unlock(&self->lock);
    return 1;
}

enum odsi_err executor_open(struct executor **out, const struct executor_config *config)
{
    struct executor *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->config = *config;
    self->jobs_last = &self->jobs;
    self->kv_tokens_total = engine_kv_tokens_total(config->engine);
    publish_load(self);
    if (config->worker->layer_end == config->worker->layer_count) {
        err = alloc_zeroed(&self->logits, (size_t)BATCH_STEPS_MAX * config->worker->vocab_size,
                           sizeof *self->logits);
        if (err == ODSI_OK)
            err = alloc_zeroed(&self->piece, TOKENIZER_PIECE_SIZE_MAX, 1);
    }
    if (err != ODSI_OK)
        goto fail;
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->work, NULL);
    if (pthread_create(&self->thread, NULL, run_thread, self) != 0) {
        pthread_cond_destroy(&self->work);
        pthread_mutex_destroy(&self->lock);
        err = odsi_fail(ODSI_ERR_IO, "the compute thread could not be started: too many threads");
        goto fail;
    }
    *out = self;
    return ODSI_OK;
fail:
    alloc_free(self->logits);
    alloc_free(self->piece);
    alloc_free(self);
    return err;
}

void executor_close(struct executor **self_pointer)
{
    struct executor *self = *self_pointer;
    if (!self)
        return;
    pthread_mutex_lock(&self->lock);
    self->stopping = 1;
    pthread_cond_signal(&self->work);
    pthread_mutex_unlock(&self->lock);
    pthread_join(self->thread, NULL);
    pthread_cond_destroy(&self->work);
    pthread_mutex_destroy(&self->lock);
    alloc_free(self->ready);
    alloc_free(self->items);
    alloc_free(self->order);
    alloc_free(self->logits);
    alloc_free(self->piece);
    alloc_free(self);
    *self_pointer = NULL;
}

enum odsi_err executor_session_open(struct executor_session **out, struct executor *executor,
                                    const struct hop_spec *spec, void *user)
{
    struct executor_session *session = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&session, 1, sizeof *session);
    if (err != ODSI_OK)
        return err;
    session->executor = executor;
    session->spec = spec;
    session->user = user;
    session->last_next = &session->first;
    session->ready_index = UINT32_MAX;
    post(executor, JOB_OPEN, session, &session->open_job);
    *out = session;
    return ODSI_OK;
}

void executor_session_close(struct executor_session *session)
{
    post(session->executor, JOB_CLOSE, session, &session->close_job);
}

enum odsi_err executor_submit(struct executor_session *session, struct executor_step *step)
{
    struct executor *self = session->executor;
    if (atomic_fetch_add(&self->queued_count, 1) >= LIMIT_STEP_QUEUE) {
        atomic_fetch_sub(&self->queued_count, 1);
        return odsi_fail(ODSI_ERR_BUSY, "%u steps are waiting on this worker; try again later",
                         LIMIT_STEP_QUEUE);
    }
    step->arrival_us = clock_now_us(&self->config.clock);
    step->job.session = session;
    /* From a callback it goes straight to the session: in the inbox it could stand behind a close
     * of its own session that another thread has put there meanwhile. */
    if (holds_role(self))
        add_step(self, step);
    else if (!run_inline(self, step))
        post(self, JOB_STEP, session, &step->job);
    return ODSI_OK;
}

void executor_load(const struct executor *self, struct executor_load *out)
{
    out->session_count = atomic_load(&self->session_count);
    out->queued_count = atomic_load(&self->queued_count);
    out->kv_tokens_free = atomic_load(&self->kv_tokens_free);
    out->kv_tokens_total = self->kv_tokens_total;
}
