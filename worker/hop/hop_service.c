#include "worker/hop/hop_service.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/hop.pb-c.h"
#include "worker/hop/hop_link_client.h"
#include "worker/hop/hop_wire.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define SESSION_BUCKETS 1024u
#define HEADER_BUF_SIZE (LIMIT_HOP_HEADER_SIZE + 1024u)
#define ACK_DELAY_US    5000u

/* One Control stream: the sessions it opened end with it. */
struct control {
    struct hop_service *service;
    struct rpc_call *call; /* referenced by every session */
    struct session *first;
};

struct session {
    struct hop_service *service;
    struct session *next;          /* in its bucket */
    struct session *control_next;  /* of the same Control stream */
    struct control *control;       /* NULL once that stream has ended */
    struct rpc_call *control_call; /* referenced; events may be sent from any thread */
    struct hop_spec spec;
    struct executor_session *executor_session;
    struct hop_link *link;      /* to the next stage, or the ring; NULL on a path of one stage */
    pthread_mutex_t order_lock; /* guards order: the ring of a path of one stage is local */
    struct hop_order order;
    atomic_int failed;
    int ending;
};

struct hop_service {
    struct rpc_loop *loop;
    const struct identity *identity;
    struct rpc_service rpc;
    struct rpc_method methods[3];
    struct hop_worker worker;
    const struct model *model;
    struct tokenizer *tokenizer;
    struct executor *executor; /* NULL before start */
    struct hop_links *links;
    struct session *buckets[SESSION_BUCKETS];
    uint32_t session_count;
    uint8_t *scratch; /* [LIMIT_HOP_HEADER_SIZE], loop thread */
    struct buf out;   /* packing buffer of whoever computes */
    int closing;
    void (*on_closed)(void *context);
    void *closed_context;
};

/* ---- sessions by id ------------------------------------------------------------------------- */

static struct session **bucket_of(struct hop_service *self, const struct hop_session_id *id)
{
    /* Ids are random, and a hostile one can only make its own bucket longer (bounded in all). */
    return &self->buckets[((uint32_t)id->bytes[0] | (uint32_t)id->bytes[1] << 8) % SESSION_BUCKETS];
}

static struct session *find_session(struct hop_service *self, const struct hop_session_id *id,
                                    uint32_t stage)
{
    for (struct session *at = *bucket_of(self, id); at; at = at->next)
        if (at->spec.stage == stage && memcmp(&at->spec.id, id, sizeof *id) == 0)
            return at;
    return NULL;
}

static void finish_closing(struct hop_service *self);

static void free_session(void *context)
{
    struct session *session = context;
    struct hop_service *service = session->service;
    if (session->link)
        hop_link_release(session->link);
    rpc_call_unref(session->control_call);
    pthread_mutex_destroy(&session->order_lock);
    hop_spec_free(&session->spec);
    alloc_free(session);
    service->session_count--;
    finish_closing(service);
}

/* Takes the session out of sight and ends it; its memory goes when the executor is done with it. */
static void end_session(struct session *session)
{
    if (session->ending)
        return;
    session->ending = 1;
    struct session **at = bucket_of(session->service, &session->spec.id);
    while (*at != session)
        at = &(*at)->next;
    *at = session->next;
    if (session->control) {
        at = &session->control->first;
        while (*at != session)
            at = &(*at)->control_next;
        *at = session->control_next;
        session->control = NULL;
    }
    executor_session_close(session->executor_session);
}

/* ---- events to the gateway (any thread) ----------------------------------------------------- */

static void send_failed_event(struct rpc_call *call, const struct hop_session_id *id,
                              uint32_t epoch, uint32_t stage, uint32_t position, enum odsi_err err,
                              const char *text)
{
    Odsi__V1__SessionFailed failed = ODSI__V1__SESSION_FAILED__INIT;
    Odsi__V1__ControlEvent event = ODSI__V1__CONTROL_EVENT__INIT;
    failed.session_id.data = (uint8_t *)(uintptr_t)id->bytes;
    failed.session_id.len = sizeof id->bytes;
    failed.epoch = epoch;
    failed.stage = stage;
    failed.position = position;
    failed.error = (Odsi__V1__ErrorCode)err;
    failed.text = (char *)(uintptr_t)text;
    event.kind_case = ODSI__V1__CONTROL_EVENT__KIND_FAILED;
    event.failed = &failed;
    if (rpc_send(call, &event.base) != ODSI_OK)
        log_line(LOG_DEBUG, "a gateway could not be told of a failure: %s", odsi_err_text());
}

/* Tells the gateway, once; the session takes no further steps. */
static void fail_session(struct session *session, uint32_t position, enum odsi_err err,
                         const char *cause)
{
    const struct hop_spec *spec = &session->spec;
    const struct hop_stage *own = &spec->stages[spec->stage];
    char text[ODSI_ERR_TEXT_SIZE + 96];
    if (atomic_exchange(&session->failed, 1))
        return;
    snprintf(text, sizeof text, "stage %u (layers %u-%u), position %u: %s", spec->stage,
             own->layer_first, own->layer_end - 1, position, cause);
    send_failed_event(session->control_call, &spec->id, spec->epoch, spec->stage, position, err,
                      text);
}

/* ---- results of the executor (its role) ----------------------------------------------- */

static void on_opened(void *user, enum odsi_err err, uint32_t held_count)
{
    struct session *session = user;
    if (err != ODSI_OK) {
        fail_session(session, 0, err, odsi_err_text());
        return;
    }
    pthread_mutex_lock(&session->order_lock);
    session->order.held_count = held_count;
    pthread_mutex_unlock(&session->order_lock);
    Odsi__V1__SessionOpened opened = ODSI__V1__SESSION_OPENED__INIT;
    Odsi__V1__ControlEvent event = ODSI__V1__CONTROL_EVENT__INIT;
    opened.session_id.data = session->spec.id.bytes;
    opened.session_id.len = sizeof session->spec.id.bytes;
    opened.epoch = session->spec.epoch;
    opened.held_token_count = held_count;
    event.kind_case = ODSI__V1__CONTROL_EVENT__KIND_OPENED;
    event.opened = &opened;
    if (rpc_send(session->control_call, &event.base) != ODSI_OK)
        log_line(LOG_DEBUG, "a gateway could not be told of its session: %s", odsi_err_text());
}

static int64_t subtract_budget(int64_t budget_us, uint32_t used_us)
{
    if (budget_us == 0)
        return 0;
    return budget_us > used_us ? budget_us - used_us : 1; /* 1: expired, 0 would be "none" */
}

static void on_output(void *user, const struct hop_header *header, float *activations,
                      size_t data_size)
{
    struct session *session = user;
    struct hop_service *service = session->service;
    const struct hop_spec *spec = &session->spec;
    struct hop_header next = *header;
    next.stage = spec->stage + 1;
    next.kind = HOP_ACTIVATIONS;
    next.network_us = hop_link_one_way_us(session->link);
    next.budget_us = subtract_budget(header->budget_us, next.network_us);
    const int decode = header->sample && header->token_count == 1;
    next.stage_budget_us = decode ? spec->stages[next.stage].budget_us : header->stage_budget_us;
    if (next.budget_us > 0 && (next.stage_budget_us == 0 || next.stage_budget_us > next.budget_us))
        next.stage_budget_us = next.budget_us;
    enum odsi_err err = hop_wire_write_header(&service->out, &next);
    if (err == ODSI_OK)
        err = hop_link_send(session->link, &service->out, activations, data_size);
    if (err != ODSI_OK) {
        alloc_free(activations);
        fail_session(session, header->position, err, odsi_err_text());
    }
}

static enum odsi_err take_tokens(struct session *session, const struct hop_header *header,
                                 const struct digest *sender, const uint32_t *tokens);

/* The ring: the sampled token is the first stage's next step. */
static enum odsi_err send_around(struct session *session, const struct hop_header *header,
                                 uint32_t token)
{
    const struct hop_spec *spec = &session->spec;
    struct hop_service *service = session->service;
    struct hop_header next = {.id = header->id,
                              .epoch = header->epoch,
                              .stage = 0,
                              .position = header->position + header->token_count,
                              .token_count = 1,
                              .kind = HOP_TOKENS,
                              .sample = 1};
    next.network_us = session->link ? hop_link_one_way_us(session->link) : 0;
    next.budget_us = subtract_budget(spec->step_budget_us, next.network_us);
    next.stage_budget_us = spec->stages[0].budget_us;
    if (!session->link)
        return take_tokens(session, &next, &service->worker.id, &token);
    uint32_t *payload = NULL;
    enum odsi_err err = hop_wire_write_header(&service->out, &next);
    if (err == ODSI_OK)
        err = alloc_zeroed(&payload, 1, sizeof *payload);
    if (err != ODSI_OK)
        return err;
    *payload = token;
    err = hop_link_send(session->link, &service->out, payload, sizeof *payload);
    if (err != ODSI_OK)
        alloc_free(payload);
    return err;
}

static void on_token(void *user, const struct hop_header *header, uint32_t token, float logprob,
                     enum hop_finish finish)
{
    struct session *session = user;
    struct hop_service *service = session->service;
    enum odsi_err err = ODSI_OK;
    if (finish == HOP_FINISH_NONE) /* first, since the next step waits for it */
        err = send_around(session, header, token);
    if (err == ODSI_OK)
        err = hop_wire_write_token(&service->out, header, token, logprob, (int)finish);
    if (err == ODSI_OK)
        err = rpc_call_send(session->control_call, service->out.data, service->out.size);
    if (err != ODSI_OK)
        fail_session(session, header->position, err, odsi_err_text());
}

static void on_failed(void *user, const struct hop_header *header, enum odsi_err err)
{
    fail_session(user, header->position, err, odsi_err_text());
}

static void on_closed(void *user)
{
    struct session *session = user;
    if (rpc_loop_post(session->service->loop, free_session, session) != ODSI_OK)
        log_line(LOG_ERROR, "a session's memory is lost: %s", odsi_err_text());
}

/* ---- steps ---------------------------------------------------------------------------------- */

/* Decides about a step and, when it is to run, makes room for its rows: *out is NULL for a
 * duplicate. */
static enum odsi_err accept_step(struct session *session, const struct hop_header *header,
                                 const struct digest *sender, uint64_t payload_size,
                                 struct executor_step **out)
{
    enum odsi_err err = ODSI_OK;
    *out = NULL;
    if (atomic_load(&session->failed))
        return odsi_fail(ODSI_ERR_STATE, "the session has failed on this stage");
    pthread_mutex_lock(&session->order_lock);
    const enum hop_verdict verdict =
        hop_accept(&session->spec, &session->service->worker, &session->order, header, sender,
                   payload_size, &err);
    pthread_mutex_unlock(&session->order_lock);
    if (verdict != HOP_TAKE)
        return err;
    return executor_step_make(out, header, (uint32_t)(payload_size / header->token_count));
}

/* A step was taken; from here on an error ends the session, since its position is used up. */
static void submit_step(struct session *session, struct executor_step *step)
{
    enum odsi_err err = ODSI_OK;
    if (hop_is_first(&session->spec)) {
        for (uint32_t i = 0; err == ODSI_OK && i < step->header.token_count; i++)
            if (step->data[i] >= session->service->worker.vocab_size)
                err = odsi_fail(ODSI_ERR_INVALID, "token id %u: the vocabulary has %u",
                                step->data[i], session->service->worker.vocab_size);
    }
    if (err == ODSI_OK)
        err = executor_submit(session->executor_session, step);
    if (err != ODSI_OK) {
        fail_session(session, step->header.position, err, odsi_err_text());
        executor_step_free(step);
    }
}

/* Token ids that lie in one piece: from the gateway, or from this worker itself. */
static enum odsi_err take_tokens(struct session *session, const struct hop_header *header,
                                 const struct digest *sender, const uint32_t *tokens)
{
    struct executor_step *step = NULL;
    const size_t size = (size_t)header->token_count * sizeof *tokens;
    const enum odsi_err err = accept_step(session, header, sender, size, &step);
    if (err != ODSI_OK || !step)
        return err;
    memcpy(step->data, tokens, size);
    submit_step(session, step);
    return ODSI_OK;
}

/* One incoming Steps stream and what it has not acknowledged yet. */
struct steps {
    struct hop_service *service;
    struct rpc_call *call;
    struct rpc_timer timer;
    uint32_t frame_count; /* frames to acknowledge; 0: the timer is idle */
    /* Of the last of them: */
    struct hop_session_id id;
    uint32_t epoch, stage, position;
    uint64_t arrival_us;
    struct odsi_failure failure;
};

static void send_ack(struct steps *steps)
{
    Odsi__V1__StepAck ack = ODSI__V1__STEP_ACK__INIT;
    ack.session_id.data = steps->id.bytes;
    ack.session_id.len = sizeof steps->id.bytes;
    ack.epoch = steps->epoch;
    ack.stage = steps->stage;
    ack.position = steps->position;
    ack.error = (Odsi__V1__ErrorCode)steps->failure.err;
    ack.text = steps->failure.err == ODSI_OK ? (char *)(uintptr_t) "" : steps->failure.text;
    ack.held_us = (uint32_t)(clock_monotonic_us() - steps->arrival_us);
    ack.frame_count = steps->frame_count;
    steps->frame_count = 0;
    if (rpc_send(steps->call, &ack.base) != ODSI_OK)
        rpc_call_fail(steps->call, ODSI_ERR_BUSY); /* it does not read its acknowledgements */
}

static void ack_timer(void *context)
{
    struct steps *steps = context;
    if (steps->frame_count > 0)
        send_ack(steps);
}

/* A refusal is told at once; that all is well can wait for more frames, since at thousands of
 * tokens a second an answer to each would cost as much as the tokens themselves. */
static void acknowledge(struct steps *steps, const struct hop_header *header,
                        const struct odsi_failure *failure, uint64_t arrival_us)
{
    const int is_first = steps->frame_count++ == 0;
    steps->id = header->id;
    steps->epoch = header->epoch;
    steps->stage = header->stage;
    steps->position = header->position;
    steps->arrival_us = arrival_us;
    steps->failure = *failure;
    if (failure->err != ODSI_OK ||
        (is_first && rpc_timer_start(&steps->timer, steps->service->loop, ACK_DELAY_US, ack_timer,
                                     steps) != ODSI_OK))
        send_ack(steps);
}

static enum odsi_err read_frame(struct hop_service *self, const struct rpc_message *message,
                                struct rpc_frame *frame, struct hop_header *header)
{
    Odsi__V1__StepHeader *packed = NULL;
    enum odsi_err err = rpc_frame_read(frame, message, self->scratch);
    if (err == ODSI_OK)
        err = rpc_unpack_bytes(&packed, &odsi__v1__step_header__descriptor, frame->header,
                               frame->header_size);
    if (err == ODSI_OK)
        err = hop_wire_read_header(header, packed);
    rpc_unpack_free(packed);
    return err;
}

static enum odsi_err take_frame(struct hop_service *self, const struct digest *sender,
                                const struct rpc_message *message, const struct rpc_frame *frame,
                                const struct hop_header *header, struct executor_step **step,
                                struct session **session)
{
    *session = find_session(self, &header->id, header->stage);
    if (!*session)
        return odsi_fail(ODSI_ERR_NOT_FOUND, "no such session is open here");
    const enum odsi_err err = accept_step(*session, header, sender, frame->payload_size, step);
    if (err == ODSI_OK && *step)
        rpc_frame_copy_payload(frame, message, (*step)->data);
    return err;
}

static void steps_on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct steps *steps = user;
    struct hop_service *self = steps->service;
    const uint64_t arrival_us = clock_monotonic_us();
    struct odsi_failure failure;
    struct rpc_frame frame;
    struct hop_header header;
    struct digest sender;
    struct executor_step *step = NULL;
    struct session *session = NULL;
    if (!self->executor || !rpc_call_peer(call, &sender)) {
        rpc_call_fail(call, odsi_fail(ODSI_ERR_UNAVAILABLE, "this worker is still loading"));
        return;
    }
    enum odsi_err err = read_frame(self, message, &frame, &header);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err); /* no session to blame: the stream itself is broken */
        return;
    }
    err = take_frame(self, &sender, message, &frame, &header, &step, &session);
    odsi_failure_take(&failure, err);
    if (step)
        submit_step(session, step); /* first: the next stage waits for it, the sender does not */
    acknowledge(steps, &header, &failure, arrival_us);
}

static void steps_on_half_close(void *user, struct rpc_call *call)
{
    (void)user;
    rpc_call_finish(call, RPC_OK, NULL);
}

static void steps_on_done(void *user, struct rpc_call *call, enum rpc_status status,
                          const char *text)
{
    struct steps *steps = user;
    (void)call;
    (void)status;
    (void)text;
    rpc_timer_cancel(&steps->timer);
    alloc_free(steps);
}

static void *steps_on_open(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler steps_handler = {.on_message = steps_on_message,
                                                     .on_half_close = steps_on_half_close,
                                                     .on_done = steps_on_done};
    struct steps *steps = NULL;
    const enum odsi_err err = alloc_zeroed(&steps, 1, sizeof *steps);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return NULL;
    }
    steps->service = service;
    steps->call = call;
    *handler = &steps_handler;
    return steps;
}

/* ---- the Control stream --------------------------------------------------------------------- */

/* Whose pages the session may use, and who may use its own. */
static void set_scope(struct hop_spec *spec, const struct rpc_call *call)
{
    struct digest gateway_id;
    if (rpc_call_peer(call, &gateway_id))
        hop_prefix_scope(&spec->prefix_scope, spec, &gateway_id);
    else
        spec->prefix_count = 0; /* it could be anybody */
}

/* Checks the message against this worker and connects to the next stage. */
static enum odsi_err prepare_session(struct session *session, const Odsi__V1__OpenSession *message)
{
    struct hop_service *service = session->service;
    struct hop_spec *spec = &session->spec;
    enum odsi_err err = hop_wire_read_spec(spec, message);
    if (err == ODSI_OK)
        err = hop_check_spec(spec, &service->worker);
    if (err == ODSI_OK)
        set_scope(spec, session->control_call);
    if (err == ODSI_OK && find_session(service, &spec->id, spec->stage))
        err = odsi_fail(ODSI_ERR_EXISTS, "this session is open already");
    if (err == ODSI_OK && spec->stage_count > 1) {
        const struct hop_stage *next = &spec->stages[(spec->stage + 1) % spec->stage_count];
        err = hop_links_get(service->links, &session->link, &next->worker_id, next->address);
    }
    return err;
}

static enum odsi_err make_session(struct control *control, const Odsi__V1__OpenSession *message,
                                  struct session **out)
{
    struct session *session = NULL;
    enum odsi_err err = alloc_zeroed(&session, 1, sizeof *session);
    if (err != ODSI_OK)
        return err;
    session->service = control->service;
    session->control = control;
    session->control_call = rpc_call_ref(control->call);
    pthread_mutex_init(&session->order_lock, NULL);
    err = prepare_session(session, message);
    if (err == ODSI_OK) /* last: its answer comes from another thread */
        err = executor_session_open(&session->executor_session, session->service->executor,
                                    &session->spec, session);
    session->service->session_count++;
    if (err != ODSI_OK)
        free_session(session);
    else
        *out = session;
    return err;
}

static enum odsi_err open_session(struct control *control, const Odsi__V1__OpenSession *message)
{
    struct hop_service *service = control->service;
    struct session *session = NULL;
    if (!service->executor || service->closing)
        return odsi_fail(ODSI_ERR_UNAVAILABLE, "this worker is %s",
                         service->closing ? "leaving" : "still loading");
    if (service->session_count >= LIMIT_SESSIONS_MAX)
        return odsi_fail(ODSI_ERR_BUSY, "%u sessions are open here; try again later",
                         LIMIT_SESSIONS_MAX);
    const enum odsi_err err = make_session(control, message, &session);
    if (err != ODSI_OK)
        return err;
    session->control_next = control->first;
    control->first = session;
    struct session **bucket = bucket_of(service, &session->spec.id);
    session->next = *bucket;
    *bucket = session;
    return ODSI_OK;
}

static enum odsi_err control_step(struct control *control, const Odsi__V1__StepFrame *frame)
{
    struct hop_header header;
    if (!frame->header)
        return odsi_fail(ODSI_ERR_INVALID, "a step without a header");
    enum odsi_err err = hop_wire_read_header(&header, frame->header);
    if (err != ODSI_OK)
        return err;
    struct session *session = find_session(control->service, &header.id, header.stage);
    if (!session || session->control != control)
        return ODSI_OK; /* closed meanwhile; the gateway knows */
    if (frame->payload.len != (size_t)header.token_count * sizeof(uint32_t))
        err = odsi_fail(ODSI_ERR_INVALID, "a step of %u tokens with %zu bytes", header.token_count,
                        frame->payload.len);
    uint32_t tokens[LIMIT_STEP_TOKENS];
    if (err == ODSI_OK && header.token_count > LIMIT_STEP_TOKENS)
        err = odsi_fail(ODSI_ERR_RANGE, "a step of %u positions: at most %u", header.token_count,
                        LIMIT_STEP_TOKENS);
    if (err == ODSI_OK) {
        memcpy(tokens, frame->payload.data, frame->payload.len);
        err = take_tokens(session, &header, NULL, tokens);
    }
    if (err != ODSI_OK)
        fail_session(session, header.position, err, odsi_err_text());
    return ODSI_OK;
}

static enum odsi_err control_close(struct control *control, const Odsi__V1__CloseSession *message)
{
    struct hop_session_id id;
    const enum odsi_err err = hop_wire_read_id(&id, &message->session_id);
    if (err != ODSI_OK)
        return err;
    struct session *session = control->first;
    while (session) {
        struct session *next = session->control_next;
        if (memcmp(&session->spec.id, &id, sizeof id) == 0)
            end_session(session);
        session = next;
    }
    return ODSI_OK;
}

static void control_open(struct control *control, const Odsi__V1__OpenSession *message)
{
    const enum odsi_err err = open_session(control, message);
    struct hop_session_id id;
    char text[ODSI_ERR_TEXT_SIZE];
    if (err == ODSI_OK)
        return;
    snprintf(text, sizeof text, "%s", odsi_err_text());
    if (hop_wire_read_id(&id, &message->session_id) != ODSI_OK)
        memset(&id, 0, sizeof id);
    send_failed_event(control->call, &id, message->epoch, message->stage, 0, err, text);
}

static void control_on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct control *control = user;
    Odsi__V1__ControlRequest *request = NULL;
    enum odsi_err err = rpc_unpack(&request, &odsi__v1__control_request__descriptor, message);
    if (err == ODSI_OK) {
        switch (request->kind_case) {
        case ODSI__V1__CONTROL_REQUEST__KIND_OPEN:
            control_open(control, request->open);
            break;
        case ODSI__V1__CONTROL_REQUEST__KIND_STEP:
            err = control_step(control, request->step);
            break;
        case ODSI__V1__CONTROL_REQUEST__KIND_CLOSE:
            err = control_close(control, request->close);
            break;
        default:
            err = odsi_fail(ODSI_ERR_INVALID, "a request of unknown kind");
        }
    }
    if (err != ODSI_OK)
        rpc_call_fail(call, err);
    rpc_unpack_free(request);
}

static void control_on_half_close(void *user, struct rpc_call *call)
{
    (void)user;
    rpc_call_finish(call, RPC_OK, NULL);
}

static void control_on_done(void *user, struct rpc_call *call, enum rpc_status status,
                            const char *text)
{
    struct control *control = user;
    (void)call;
    (void)status;
    (void)text;
    while (control->first)
        end_session(control->first);
    alloc_free(control);
}

static void *control_on_open(void *service, struct rpc_call *call,
                             const struct rpc_handler **handler)
{
    static const struct rpc_handler control_handler = {.on_message = control_on_message,
                                                       .on_half_close = control_on_half_close,
                                                       .on_done = control_on_done};
    struct control *control = NULL;
    const enum odsi_err err = alloc_zeroed(&control, 1, sizeof *control);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return NULL;
    }
    control->service = service;
    control->call = call;
    *handler = &control_handler;
    return control;
}

/* ---- the model ------------------------------------------------------------------------------ */

static void model_on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct hop_service *self = user;
    Odsi__V1__GetModelRequest *request = NULL;
    Odsi__V1__GetModelReply reply = ODSI__V1__GET_MODEL_REPLY__INIT;
    enum odsi_err err = rpc_unpack(&request, &odsi__v1__get_model_request__descriptor, message);
    if (err == ODSI_OK && !self->model)
        err = odsi_fail(ODSI_ERR_UNAVAILABLE, "this worker is still loading");
    if (err == ODSI_OK &&
        (request->model_id.len != DIGEST_SIZE ||
         memcmp(request->model_id.data, self->worker.model_id.bytes, DIGEST_SIZE) != 0))
        err = odsi_fail(ODSI_ERR_NOT_FOUND, "this worker serves another model");
    rpc_unpack_free(request);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return;
    }
    const uint8_t *data = NULL;
    model_manifest_view(self->model, &data, &reply.manifest.len);
    reply.manifest.data = (uint8_t *)(uintptr_t)data;
    model_tokenizer_view(self->model, &data, &reply.tokenizer.len);
    reply.tokenizer.data = (uint8_t *)(uintptr_t)data;
    rpc_reply(call, &reply.base);
}

static void *model_on_open(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler model_handler = {.on_message = model_on_message};
    (void)call;
    *handler = &model_handler;
    return service;
}

/* ---- trouble on links ----------------------------------------------------------------------- */

/* A refused step of a path that is over says nothing about the session's new path. */
static void link_refused(void *context, struct hop_link *link, const struct hop_session_id *id,
                         uint32_t epoch, uint32_t stage, uint32_t position,
                         const struct odsi_failure *failure)
{
    struct hop_service *self = context;
    for (struct session *at = *bucket_of(self, id); at; at = at->next)
        if (at->link == link && at->spec.epoch == epoch &&
            (at->spec.stage + 1) % at->spec.stage_count == stage &&
            memcmp(&at->spec.id, id, sizeof *id) == 0)
            fail_session(at, position, failure->err, failure->text);
}

static void link_broken(void *context, struct hop_link *link, const struct odsi_failure *failure)
{
    struct hop_service *self = context;
    for (uint32_t i = 0; i < SESSION_BUCKETS; i++)
        for (struct session *at = self->buckets[i]; at; at = at->next)
            if (at->link == link)
                fail_session(at, at->order.next_position, failure->err, failure->text);
}

/* ---- opening and closing -------------------------------------------------------------------- */

enum odsi_err hop_service_open(struct hop_service **out, struct rpc_loop *loop,
                               const struct identity *identity, uint32_t dim)
{
    static const struct hop_link_events link_events = {.refused = link_refused,
                                                       .broken = link_broken};
    struct hop_service *self = NULL;
    *out = NULL;
    ODSI_ASSERT(dim <= LIMIT_DIM_MAX);
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->loop = loop;
    self->identity = identity;
    self->worker.id = *identity_id_view(identity);
    buf_init(&self->out, HEADER_BUF_SIZE);
    self->methods[0] =
        (struct rpc_method){"/odsi.v1.Hop/Control", control_on_open, LIMIT_CONTROL_MESSAGE_SIZE};
    self->methods[1] =
        (struct rpc_method){"/odsi.v1.Hop/Steps", steps_on_open, LIMIT_HOP_MESSAGE_SIZE_OF(dim)};
    self->methods[2] = (struct rpc_method){"/odsi.v1.Hop/GetModel", model_on_open, 1024};
    self->rpc = (struct rpc_service){"odsi.v1.Hop", self->methods, 3, self};
    err = alloc_zeroed(&self->scratch, LIMIT_HOP_HEADER_SIZE, 1);
    if (err == ODSI_OK)
        err = hop_links_open(&self->links, loop, identity, &link_events, self);
    if (err != ODSI_OK) {
        alloc_free(self->scratch);
        alloc_free(self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

const struct rpc_service *hop_service_rpc_view(const struct hop_service *self)
{
    return &self->rpc;
}

enum odsi_err hop_service_start(struct hop_service *self, const struct model *model,
                                struct engine *engine, uint32_t layer_first, uint32_t layer_end)
{
    static const struct executor_events events = {.opened = on_opened,
                                                  .output = on_output,
                                                  .token = on_token,
                                                  .failed = on_failed,
                                                  .closed = on_closed};
    const struct model_params *params = model_params_view(model);
    const uint8_t *data = NULL;
    size_t size = 0;
    model_tokenizer_view(model, &data, &size);
    enum odsi_err err = tokenizer_open(&self->tokenizer, data, size);
    if (err != ODSI_OK)
        return err;
    self->worker.model_id = *model_id_view(model);
    self->worker.layer_count = params->layer_count;
    self->worker.layer_first = layer_first;
    self->worker.layer_end = layer_end;
    self->worker.dim = params->dim;
    self->worker.vocab_size = params->vocab_size;
    const struct executor_config config = {.engine = engine,
                                           .worker = &self->worker,
                                           .tokenizer = self->tokenizer,
                                           .clock = clock_system(),
                                           .events = &events};
    err = executor_open(&self->executor, &config);
    if (err == ODSI_OK)
        self->model = model;
    return err;
}

void hop_service_load(const struct hop_service *self, struct executor_load *out)
{
    memset(out, 0, sizeof *out);
    if (self->executor)
        executor_load(self->executor, out);
}

static void links_closed(void *context)
{
    struct hop_service *self = context;
    void (*const on_service_closed)(void *) = self->on_closed;
    void *const closed_context = self->closed_context;
    executor_close(&self->executor);
    tokenizer_close(&self->tokenizer);
    buf_free(&self->out);
    alloc_free(self->scratch);
    alloc_free(self);
    if (on_service_closed)
        on_service_closed(closed_context);
}

/* Sessions first, since they use links; then the links; then the rest. */
static void finish_closing(struct hop_service *self)
{
    if (!self->closing || self->session_count > 0 || !self->links)
        return;
    struct hop_links *links = self->links;
    self->links = NULL;
    hop_links_close(links, links_closed, self);
}

void hop_service_close(struct hop_service *self, void (*on_service_closed)(void *context),
                       void *context)
{
    self->closing = 1;
    self->on_closed = on_service_closed;
    self->closed_context = context;
    for (uint32_t i = 0; i < SESSION_BUCKETS; i++) {
        while (self->buckets[i]) {
            fail_session(self->buckets[i], 0, ODSI_ERR_UNAVAILABLE, "this worker is leaving");
            end_session(self->buckets[i]);
        }
    }
    finish_closing(self);
}
