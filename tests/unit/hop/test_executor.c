/* The compute thread on the demo model: order, batching, sampling, failure, shutdown. */
#include "worker/hop/executor.h"

#include "common/base/alloc.h"
#include "worker/engine/prefix_key.h"
#include "worker/engine/startup.h"

#include <criterion/criterion.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define MODEL      "deploy/demo/odsi-tiny-q8_0.gguf"
#define EVENTS_MAX 256u

enum event_kind { OPENED, OUTPUT, TOKEN, FAILED, CLOSED };

struct event {
    enum event_kind kind;
    enum odsi_err err;
    uint32_t position;
    uint32_t token;
    enum hop_finish finish;
    float first;   /* of an output */
    uint32_t time; /* counts the events of all sessions */
};

/* What one session's callbacks said, in order. */
struct record {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct event events[EVENTS_MAX];
    uint32_t count;
    struct executor_session *ring;   /* its tokens go straight back into it */
    struct executor_session *beside; /* gets this step with the first token */
    struct executor_step *beside_step;
};

struct fixture {
    struct model *model;
    struct tokenizer *tokenizer;
    struct startup startup;
    struct hop_worker worker;
    struct executor *executor;
    struct hop_stage stage;
    struct hop_spec spec;
    struct record record;
};

static atomic_uint event_time;

static void add_event(struct record *record, struct event event)
{
    pthread_mutex_lock(&record->lock);
    event.time = atomic_fetch_add(&event_time, 1);
    cr_assert_lt(record->count, EVENTS_MAX);
    record->events[record->count++] = event;
    pthread_cond_signal(&record->changed);
    pthread_mutex_unlock(&record->lock);
}

static void on_opened(void *user, enum odsi_err err, uint32_t held_count)
{
    add_event(user, (struct event){.kind = OPENED, .err = err, .position = held_count});
}

static void on_output(void *user, const struct hop_header *header, float *activations,
                      size_t data_size)
{
    cr_expect_eq(data_size % sizeof(float), 0);
    add_event(user, (struct event){
                        .kind = OUTPUT, .position = header->position, .first = activations[0]});
    alloc_free(activations);
}

static void submit_tokens(struct executor_session *session, uint32_t position,
                          const uint32_t *tokens, uint32_t count, int sample);

static void on_token(void *user, const struct hop_header *header, uint32_t token, float logprob,
                     enum hop_finish finish)
{
    cr_expect(logprob <= 1e-6f);
    add_event(user, (struct event){.kind = TOKEN,
                                   .position = header->position + header->token_count,
                                   .token = token,
                                   .finish = finish});
    struct record *record = user;
    if (record->beside_step) {
        cr_assert_eq(executor_submit(record->beside, record->beside_step), ODSI_OK);
        record->beside_step = NULL;
    }
    if (record->ring && finish == HOP_FINISH_NONE)
        submit_tokens(record->ring, header->position + header->token_count, &token, 1, 1);
}

static void on_failed(void *user, const struct hop_header *header, enum odsi_err err)
{
    add_event(user, (struct event){.kind = FAILED, .err = err, .position = header->position});
}

static void on_closed(void *user)
{
    add_event(user, (struct event){.kind = CLOSED});
}

static const struct event *wait_event(struct record *record, uint32_t index)
{
    pthread_mutex_lock(&record->lock);
    while (record->count <= index)
        pthread_cond_wait(&record->changed, &record->lock);
    pthread_mutex_unlock(&record->lock);
    return &record->events[index];
}

static void wait_closed(struct record *record)
{
    pthread_mutex_lock(&record->lock);
    while (record->count == 0 || record->events[record->count - 1].kind != CLOSED)
        pthread_cond_wait(&record->changed, &record->lock);
    pthread_mutex_unlock(&record->lock);
}

static void record_init(struct record *record)
{
    memset(record, 0, sizeof *record);
    pthread_mutex_init(&record->lock, NULL);
    pthread_cond_init(&record->changed, NULL);
}

static void set_up(struct fixture *f, uint32_t layer_first, uint32_t layer_end)
{
    static const struct executor_events events = {on_opened, on_output, on_token, on_failed,
                                                  on_closed};
    const uint8_t *data;
    size_t size;
    memset(f, 0, sizeof *f);
    record_init(&f->record);
    cr_assert_eq(model_open(&f->model, MODEL, NULL, NULL, NULL), ODSI_OK);
    const struct model_params *params = model_params_view(f->model);
    model_tokenizer_view(f->model, &data, &size);
    cr_assert_eq(tokenizer_open(&f->tokenizer, data, size), ODSI_OK);
    const struct startup_config startup = {.backend = {.thread_count = 1},
                                           .layer_first = layer_first,
                                           .layer_end = layer_end,
                                           .kv_size = 4u << 20};
    cr_assert_eq(startup_open(&f->startup, f->model, &startup), ODSI_OK);
    f->worker = (struct hop_worker){.layer_count = params->layer_count,
                                    .layer_first = layer_first,
                                    .layer_end = layer_end,
                                    .dim = params->dim,
                                    .vocab_size = params->vocab_size};
    f->stage = (struct hop_stage){.layer_first = layer_first, .layer_end = layer_end};
    /* Alone in its path unless it lacks an end: then first or last of two. */
    f->spec = (struct hop_spec){.stages = &f->stage, .stage_count = 1, .token_limit = 300};
    const struct executor_config config = {.engine = f->startup.engine,
                                           .worker = &f->worker,
                                           .tokenizer = f->tokenizer,
                                           .clock = clock_system(),
                                           .events = &events};
    cr_assert_eq(executor_open(&f->executor, &config), ODSI_OK);
}

static void tear_down(struct fixture *f)
{
    executor_close(&f->executor);
    startup_close(&f->startup);
    tokenizer_close(&f->tokenizer);
    model_close(&f->model);
}

static struct executor_session *open_session(struct fixture *f, struct record *record)
{
    struct executor_session *session = NULL;
    cr_assert_eq(executor_session_open(&session, f->executor, &f->spec, record), ODSI_OK);
    return session;
}

static struct executor_step *make_step(uint32_t position, const uint32_t *tokens, uint32_t count,
                                       int sample)
{
    const struct hop_header header = {
        .position = position, .token_count = count, .kind = HOP_TOKENS, .sample = sample};
    struct executor_step *step = NULL;
    cr_assert_eq(executor_step_make(&step, &header, sizeof *tokens), ODSI_OK);
    memcpy(step->data, tokens, count * sizeof *tokens);
    return step;
}

static void submit_tokens(struct executor_session *session, uint32_t position,
                          const uint32_t *tokens, uint32_t count, int sample)
{
    cr_assert_eq(executor_submit(session, make_step(position, tokens, count, sample)), ODSI_OK);
}

/* Generates greedily, feeding each token back; returns how many came. */
static uint32_t generate(struct executor_session *session, struct record *record,
                         const uint32_t *prompt, uint32_t prompt_count, uint32_t *out,
                         uint32_t out_max)
{
    submit_tokens(session, 0, prompt, prompt_count, 1);
    for (uint32_t i = 0; i < out_max; i++) {
        const struct event *event = wait_event(record, i + 1);
        cr_assert_eq(event->kind, TOKEN);
        cr_assert_eq(event->position, prompt_count + i);
        out[i] = event->token;
        if (event->finish != HOP_FINISH_NONE)
            return i + 1;
        submit_tokens(session, event->position, &out[i], 1, 1);
    }
    return out_max;
}

Test(executor, generates_and_ends_where_it_is_told_to)
{
    const uint32_t prompt[] = {1, 466, 467, 261, 417};
    uint32_t tokens[64], limited[64];
    struct fixture f;
    set_up(&f, 0, 6);
    f.spec.new_tokens_max = 20;
    struct executor_session *session = open_session(&f, &f.record);
    cr_expect_eq(wait_event(&f.record, 0)->kind, OPENED);
    cr_expect_eq(generate(session, &f.record, prompt, 5, tokens, 64), 20);
    cr_expect_eq(wait_event(&f.record, 20)->finish, HOP_FINISH_LENGTH);
    executor_session_close(session);
    cr_expect_eq(wait_event(&f.record, 21)->kind, CLOSED);

    struct record second;
    record_init(&second);
    f.spec.new_tokens_max = 0;
    f.spec.token_limit = 9; /* positions 5..8 can be computed; the token for 9 ends it */
    session = open_session(&f, &second);
    cr_expect_eq(generate(session, &second, prompt, 5, limited, 64), 5);
    cr_expect_arr_eq(limited, tokens, 5 * sizeof *tokens);
    executor_session_close(session);
    tear_down(&f);
}

Test(executor, stops_at_a_stop_string_and_at_the_end_token)
{
    const uint32_t prompt[] = {1, 466, 467, 261, 417};
    uint32_t tokens[250];
    struct fixture f;
    set_up(&f, 0, 6);
    struct executor_session *session = open_session(&f, &f.record);
    const uint32_t whole = generate(session, &f.record, prompt, 5, tokens, 250);
    cr_expect_eq(tokens[whole - 1], tokenizer_eos(f.tokenizer));
    cr_expect_eq(wait_event(&f.record, whole)->finish, HOP_FINISH_END);
    executor_session_close(session);

    char text[4096];
    size_t size = sizeof text;
    struct record second;
    record_init(&second);
    cr_assert_eq(tokenizer_decode(f.tokenizer, tokens, whole, text, &size), ODSI_OK);
    cr_assert_eq(stop_add(&f.spec.stop, text + size / 2, 5), ODSI_OK);
    session = open_session(&f, &second);
    const uint32_t stopped = generate(session, &second, prompt, 5, tokens, 250);
    cr_expect_eq(wait_event(&second, stopped)->finish, HOP_FINISH_STOP);
    cr_expect_lt(stopped, whole);
    executor_session_close(session);
    tear_down(&f);
}

/* Goal: many sessions at once give each its own result. Method: the same greedy text eight times
 * over, all sessions fed from one thread while the executor batches them as it likes. */
Test(executor, sessions_do_not_disturb_each_other)
{
    enum { SESSIONS = 8, NEW = 12 };
    struct fixture f;
    struct record *records = NULL;
    struct executor_session *sessions[SESSIONS];
    uint32_t expected[SESSIONS][NEW];
    set_up(&f, 0, 6);
    cr_assert_eq(alloc_zeroed(&records, 2 * SESSIONS, sizeof *records), ODSI_OK);
    for (uint32_t s = 0; s < SESSIONS; s++) { /* one after the other */
        const uint32_t prompt[] = {1, 466 + s, 467, 261 + 3 * s};
        record_init(&records[s]);
        sessions[s] = open_session(&f, &records[s]);
        cr_assert_eq(generate(sessions[s], &records[s], prompt, 4, expected[s], NEW), NEW);
        executor_session_close(sessions[s]);
    }
    for (uint32_t s = 0; s < SESSIONS; s++) { /* all together */
        const uint32_t prompt[] = {1, 466 + s, 467, 261 + 3 * s};
        record_init(&records[SESSIONS + s]);
        sessions[s] = open_session(&f, &records[SESSIONS + s]);
        submit_tokens(sessions[s], 0, prompt, 4, 1);
    }
    for (uint32_t i = 0; i < NEW; i++) {
        for (uint32_t s = 0; s < SESSIONS; s++) {
            const struct event *event = wait_event(&records[SESSIONS + s], i + 1);
            cr_assert_eq(event->kind, TOKEN);
            cr_expect_eq(event->token, expected[s][i], "session %u token %u", s, i);
            submit_tokens(sessions[s], event->position, &event->token, 1, 1);
        }
    }
    for (uint32_t s = 0; s < SESSIONS; s++)
        executor_session_close(sessions[s]);
    tear_down(&f);
    alloc_free(records);
}

/* Goal: an answer goes on while a long prompt is computed beside it, and neither changes. Method: a
 * prompt of eight pieces is handed over while another session writes an answer, each token of which
 * is its next step at once: most pieces must have a token beside them. */
Test(executor, an_answer_goes_on_beside_a_long_prompt)
{
    enum { LONG = 500, NEW = 100 };
    const uint32_t prompt[] = {1, 466, 467, 261, 417};
    uint32_t tokens[NEW], text[LONG], beside = 0;
    struct fixture f;
    struct record alone, answer, both;
    set_up(&f, 0, 6);
    f.spec.token_limit = 510;
    f.spec.ignore_end = 1;
    for (uint32_t i = 0; i < LONG; i++)
        text[i] = (i * 7919u + i * i) % 1000;
    record_init(&alone);
    record_init(&answer);
    record_init(&both);
    struct executor_session *first = open_session(&f, &alone);
    submit_tokens(first, 0, text, LONG, 1);
    const uint32_t expected = wait_event(&alone, 1)->token;
    executor_session_close(first);
    f.spec.new_tokens_max = NEW;
    first = open_session(&f, &f.record);
    cr_assert_eq(generate(first, &f.record, prompt, 5, tokens, NEW), NEW);
    executor_session_close(first);

    struct executor_session *second = open_session(&f, &both);
    wait_event(&both, 0);
    first = open_session(&f, &answer);
    answer.ring = first;
    answer.beside = second;
    answer.beside_step = make_step(0, text, LONG, 1);
    submit_tokens(first, 0, prompt, 5, 1);
    const uint32_t begin = wait_event(&answer, 1)->time;
    cr_expect_eq(wait_event(&both, 1)->token, expected);
    for (uint32_t i = 0; i < NEW; i++) {
        const struct event *event = wait_event(&answer, i + 1);
        cr_expect_eq(event->token, tokens[i], "token %u", i);
        beside += event->time > begin && event->time < both.events[1].time;
    }
    cr_expect_geq(beside, 7, "only %u tokens came", beside);
    executor_session_close(first);
    executor_session_close(second);
    tear_down(&f);
}

static void set_prefix(struct fixture *f, struct digest *keys, const uint32_t *text, uint32_t count)
{
    const struct digest seed = {{0}};
    prefix_key_chain(keys, &seed, text, count / KV_PAGE_TOKENS);
    f->spec.prefix_keys = keys;
    f->spec.prefix_count = count / KV_PAGE_TOKENS;
    f->spec.prompt_count = count;
}

/* Goal: a second session of a prompt begins where it is told that it can, or earlier, and says what
 * the first one said. */
Test(executor, a_session_begins_behind_the_prefix_that_is_held)
{
    enum { COUNT = 200, NEW = 6 };
    static const uint32_t begins[] = {0, 192, 100, 64, 0, 191};
    struct digest keys[COUNT / KV_PAGE_TOKENS];
    uint32_t text[COUNT], expected[NEW] = {0};
    struct fixture f;
    set_up(&f, 0, 6);
    for (uint32_t i = 0; i < COUNT; i++)
        text[i] = (i * 7919u + i * i) % 1000;
    set_prefix(&f, keys, text, COUNT);
    for (uint32_t s = 0; s < 6; s++) {
        struct record record;
        record_init(&record);
        struct executor_session *session = open_session(&f, &record);
        cr_expect_eq(wait_event(&record, 0)->position, s == 0 ? 0 : 192, "session %u", s);
        submit_tokens(session, begins[s], text + begins[s], COUNT - begins[s], 1);
        for (uint32_t i = 0; i < NEW; i++) {
            const struct event *event = wait_event(&record, i + 1);
            cr_assert_eq(event->kind, TOKEN);
            cr_expect_eq(event->position, COUNT + i);
            if (s == 0)
                expected[i] = event->token;
            cr_expect_eq(event->token, expected[i], "session %u, token %u", s, i);
            submit_tokens(session, event->position, &event->token, 1, 1);
        }
        executor_session_close(session);
        wait_closed(&record);
    }
    tear_down(&f);
}

Test(executor, a_first_step_beyond_what_is_held_ends_the_session)
{
    const uint32_t token = 5;
    struct fixture f;
    set_up(&f, 0, 6);
    struct executor_session *session = open_session(&f, &f.record);
    submit_tokens(session, 3, &token, 1, 1);
    cr_expect_eq(wait_event(&f.record, 1)->kind, FAILED);
    cr_expect_eq(wait_event(&f.record, 1)->err, ODSI_ERR_RANGE);
    executor_session_close(session);
    tear_down(&f);
}

Test(executor, a_failed_step_ends_its_session_and_is_told_once)
{
    struct fixture f;
    struct executor_step *step = NULL;
    set_up(&f, 2, 4);
    f.spec.stage_count = 3; /* in the middle: activations in, activations out */
    f.spec.stage = 1;
    struct hop_stage stages[3] = {{.layer_first = 0, .layer_end = 2}, f.stage, {.layer_first = 4}};
    f.spec.stages = stages;
    struct executor_session *session = open_session(&f, &f.record);
    const struct hop_header header = {.stage = 1, .token_count = 2, .kind = HOP_ACTIVATIONS};
    for (int i = 0; i < 3; i++) {
        struct hop_header next = header;
        next.position = 2 * (uint32_t)i;
        cr_assert_eq(executor_step_make(&step, &next, f.worker.dim * 4), ODSI_OK);
        float *x = (float *)(void *)step->data;
        for (uint32_t c = 0; c < 2 * f.worker.dim; c++)
            x[c] = i == 1 && c == 7 ? NAN : 0.5f;
        cr_assert_eq(executor_submit(session, step), ODSI_OK);
    }
    cr_expect_eq(wait_event(&f.record, 0)->kind, OPENED);
    cr_expect_eq(wait_event(&f.record, 1)->kind, OUTPUT);
    cr_expect_eq(wait_event(&f.record, 2)->kind, FAILED);
    cr_expect_eq(f.record.events[2].err, ODSI_ERR_NUMERIC);
    executor_session_close(session);
    cr_expect_eq(wait_event(&f.record, 3)->kind, CLOSED, "and nothing in between");
    tear_down(&f);
}

Test(executor, a_session_that_does_not_fit_is_told_so_and_frees_nothing_of_others)
{
    struct fixture f;
    struct record first, second;
    struct executor_load before, load;
    record_init(&first);
    record_init(&second);
    set_up(&f, 0, 6);
    executor_load(f.executor, &before);
    f.spec.token_limit = 500;
    struct executor_session *sessions[64];
    uint32_t count = 0;
    struct record *records = NULL;
    cr_assert_eq(alloc_zeroed(&records, 64, sizeof *records), ODSI_OK);
    for (; count < 64; count++) {
        record_init(&records[count]);
        sessions[count] = open_session(&f, &records[count]);
        if (wait_event(&records[count], 0)->err != ODSI_OK)
            break;
    }
    cr_assert_lt(count, 64);
    cr_expect_eq(records[count].events[0].err, ODSI_ERR_BUSY);
    for (uint32_t i = 0; i <= count; i++)
        executor_session_close(sessions[i]);
    for (uint32_t i = 0; i <= count; i++)
        cr_expect_eq(wait_event(&records[i], 1)->kind, CLOSED);
    executor_load(f.executor, &load);
    cr_expect_eq(load.kv_tokens_free, before.kv_tokens_free);
    cr_expect_eq(load.session_count, 0);
    cr_expect_eq(load.queued_count, 0);
    tear_down(&f);
    alloc_free(records);
}

Test(executor, closing_it_closes_every_session)
{
    const uint32_t prompt[] = {1, 466, 467};
    struct fixture f;
    set_up(&f, 0, 6);
    struct executor_session *session = open_session(&f, &f.record);
    for (uint32_t i = 0; i < 50; i++)
        submit_tokens(session, i * 3, prompt, 3, 0);
    executor_close(&f.executor);
    cr_expect_eq(f.record.events[f.record.count - 1].kind, CLOSED);
    tear_down(&f);
}
