/* A real worker against a gateway and a peer that do not behave: each wrong message gets its own
 * answer, and an honest session beside it goes on. The test speaks the hop protocol itself. */
#include "tests/support/swarm.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_pack.h"
#include "kernels/ops.h"
#include "odsi/v1/coordinator.pb-c.h"
#include "odsi/v1/hop.pb-c.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MODEL        "deploy/demo/odsi-tiny-q8_0.gguf"
#define LAYERS       6u
#define WAIT_US      5000000u
#define MESSAGES_MAX 512u

/* One stream of ours and what came back on it; messages are kept packed. */
struct stream {
    pthread_mutex_t lock;
    struct rpc_call *call;
    uint8_t *messages[MESSAGES_MAX];
    size_t sizes[MESSAGES_MAX];
    uint32_t count;
    uint32_t read;
    int done;
    enum rpc_status status;
};

struct client {
    struct rpc_loop *loop;
    pthread_t thread;
    struct identity *identity;
    struct rpc_channel *channel;
    struct stream streams[4];
    uint32_t stream_count;
    struct digest worker_id;
    char address[LIMIT_ADDRESS_SIZE];
    uint8_t model_id[DIGEST_SIZE];
};

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct stream *stream = user;
    const uint8_t *flat = rpc_message_flat(message);
    (void)call;
    pthread_mutex_lock(&stream->lock);
    if (stream->count < MESSAGES_MAX && flat) {
        if (alloc_zeroed(&stream->messages[stream->count], message->size + 1, 1) == ODSI_OK) {
            memcpy(stream->messages[stream->count], flat, message->size);
            stream->sizes[stream->count++] = message->size;
        }
    }
    pthread_mutex_unlock(&stream->lock);
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct stream *stream = user;
    (void)call;
    (void)text;
    pthread_mutex_lock(&stream->lock);
    stream->done = 1;
    stream->status = status;
    pthread_mutex_unlock(&stream->lock);
}

static const struct rpc_handler stream_handler = {.on_message = on_message, .on_done = on_done};

static void *run_loop(void *context)
{
    rpc_loop_run(context);
    return NULL;
}

struct opening {
    struct client *client;
    struct stream *stream;
    const char *path;
    int done;
};

static void open_on_loop(void *context)
{
    struct opening *opening = context;
    struct stream *stream = opening->stream;
    if (rpc_call_open(&stream->call, opening->client->channel, opening->path, 0, 1, &stream_handler,
                      stream) == ODSI_OK)
        rpc_call_ref(stream->call);
    __atomic_store_n(&opening->done, 1, __ATOMIC_SEQ_CST);
}

static struct stream *open_stream(struct client *client, const char *path)
{
    struct stream *stream = &client->streams[client->stream_count++];
    struct opening opening = {.client = client, .stream = stream, .path = path};
    pthread_mutex_init(&stream->lock, NULL);
    cr_assert_eq(rpc_loop_post(client->loop, open_on_loop, &opening), ODSI_OK);
    while (!__atomic_load_n(&opening.done, __ATOMIC_SEQ_CST))
        usleep(100);
    cr_assert_not_null(stream->call);
    return stream;
}

/* The next message of a stream, or 0 when it ended or nothing came. */
static int next_message(struct stream *stream, const uint8_t **data, size_t *size)
{
    const uint64_t until_us = clock_monotonic_us() + WAIT_US;
    while (clock_monotonic_us() < until_us) {
        pthread_mutex_lock(&stream->lock);
        const int there = stream->read < stream->count;
        if (there) {
            *data = stream->messages[stream->read];
            *size = stream->sizes[stream->read++];
        }
        const int over = !there && stream->done;
        pthread_mutex_unlock(&stream->lock);
        if (there || over)
            return there;
        usleep(200);
    }
    return 0;
}

static enum rpc_status wait_end(struct stream *stream)
{
    const uint64_t until_us = clock_monotonic_us() + WAIT_US;
    while (clock_monotonic_us() < until_us) {
        pthread_mutex_lock(&stream->lock);
        const int done = stream->done;
        pthread_mutex_unlock(&stream->lock);
        if (done)
            return stream->status;
        usleep(200);
    }
    cr_assert_fail("the stream did not end");
    return RPC_UNKNOWN;
}

static Odsi__V1__ControlEvent *next_event(struct stream *stream)
{
    const uint8_t *data = NULL;
    size_t size = 0;
    Odsi__V1__ControlEvent *event = NULL;
    cr_assert(next_message(stream, &data, &size), "no event came");
    cr_assert_eq(rpc_unpack_bytes(&event, &odsi__v1__control_event__descriptor, data, size),
                 ODSI_OK);
    return event;
}

static Odsi__V1__ErrorCode next_ack(struct stream *stream)
{
    const uint8_t *data = NULL;
    size_t size = 0;
    Odsi__V1__StepAck *ack = NULL;
    cr_assert(next_message(stream, &data, &size), "no acknowledgement came");
    cr_assert_eq(rpc_unpack_bytes(&ack, &odsi__v1__step_ack__descriptor, data, size), ODSI_OK);
    const Odsi__V1__ErrorCode error = ack->error;
    rpc_unpack_free(ack);
    return error;
}

/* The swarm's directory names the worker's model; asked over a channel of its own. */
static void on_directory(void *context, enum rpc_status status, const char *text,
                         const struct rpc_message *reply)
{
    struct client *client = context;
    Odsi__V1__Directory *directory = NULL;
    (void)text;
    if (status == RPC_OK &&
        rpc_unpack(&directory, &odsi__v1__directory__descriptor, reply) == ODSI_OK &&
        directory->n_members == 1)
        memcpy(client->model_id, directory->members[0]->model->model_id.data, DIGEST_SIZE);
    rpc_unpack_free(directory);
    rpc_loop_stop(client->loop);
}

static void open_channel(struct client *client, const char *text, struct rpc_channel **out,
                         struct digest *id)
{
    int has_id = 0;
    cr_assert_eq(rpc_address_read(text, client->address, id, &has_id), ODSI_OK);
    const struct rpc_channel_config config = {
        .address = client->address, .identity = client->identity, .peer_id = id};
    cr_assert_eq(rpc_channel_open(out, client->loop, &config), ODSI_OK);
}

static void client_open(struct client *client, const struct swarm *swarm)
{
    struct rpc_channel *coordinator = NULL;
    struct digest id;
    memset(client, 0, sizeof *client);
    cr_assert_eq(identity_make(&client->identity), ODSI_OK);
    cr_assert_eq(rpc_loop_open(&client->loop), ODSI_OK);
    open_channel(client, swarm->coordinator_address, &coordinator, &id);
    cr_assert_eq(rpc_unary(coordinator, "/odsi.v1.Coordinator/GetDirectory", WAIT_US, 1, "", 0,
                           on_directory, client),
                 ODSI_OK);
    rpc_loop_run(client->loop);
    rpc_channel_close(&coordinator);
    open_channel(client, swarm->worker_addresses[0], &client->channel, &client->worker_id);
    cr_assert_eq(pthread_create(&client->thread, NULL, run_loop, client->loop), 0);
}

static void end_on_loop(void *context)
{
    struct client *client = context;
    for (uint32_t i = 0; i < client->stream_count; i++)
        if (!client->streams[i].done) /* set on this thread */
            rpc_call_cancel(client->streams[i].call);
}

/* What is posted last may find the loop stopped: then closing it runs it (a hang once). */
static void client_close(struct client *client)
{
    cr_assert_eq(rpc_loop_post(client->loop, end_on_loop, client), ODSI_OK);
    for (uint32_t i = 0; i < client->stream_count; i++) {
        wait_end(&client->streams[i]);
        rpc_call_unref(client->streams[i].call);
        for (uint32_t m = 0; m < client->streams[i].count; m++)
            alloc_free(client->streams[i].messages[m]);
    }
    rpc_loop_stop(client->loop);
    pthread_join(client->thread, NULL);
    rpc_channel_close(&client->channel);
    rpc_loop_close(&client->loop);
    identity_close(&client->identity);
}

/* ---- what a gateway says -------------------------------------------------------------------- */

/* Changes one thing about an honest OpenSession. */
typedef void (*spoil_open)(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                           Odsi__V1__Stage *stage);

static void send_open(struct client *client, struct stream *control, uint8_t session,
                      uint32_t layer_first, uint32_t layer_end, spoil_open spoil)
{
    uint8_t id[16];
    memset(id, session, sizeof id);
    Odsi__V1__ControlRequest request = ODSI__V1__CONTROL_REQUEST__INIT;
    Odsi__V1__OpenSession open = ODSI__V1__OPEN_SESSION__INIT;
    Odsi__V1__Contract contract = ODSI__V1__CONTRACT__INIT;
    Odsi__V1__Stage stage = ODSI__V1__STAGE__INIT;
    Odsi__V1__LayerRange layers = ODSI__V1__LAYER_RANGE__INIT;
    Odsi__V1__Stage *path[] = {&stage};
    layers.first = layer_first;
    layers.end = layer_end;
    stage.worker_id = (ProtobufCBinaryData){DIGEST_SIZE, client->worker_id.bytes};
    stage.address = client->address;
    stage.layers = &layers;
    contract.model_id = (ProtobufCBinaryData){DIGEST_SIZE, client->model_id};
    contract.numerics_version = NUMERICS_VERSION;
    open.session_id = (ProtobufCBinaryData){sizeof id, id};
    open.contract = &contract;
    open.n_path = 1;
    open.path = path;
    open.token_limit = 100;
    if (spoil)
        spoil(&open, &contract, &stage);
    request.kind_case = ODSI__V1__CONTROL_REQUEST__KIND_OPEN;
    request.open = &open;
    cr_assert_eq(rpc_send(control->call, &request.base), ODSI_OK);
}

static void send_tokens(struct stream *control, uint8_t session, uint32_t position,
                        const uint32_t *tokens, uint32_t count, size_t payload_size, int sample)
{
    uint8_t id[16];
    memset(id, session, sizeof id);
    Odsi__V1__ControlRequest request = ODSI__V1__CONTROL_REQUEST__INIT;
    Odsi__V1__StepFrame frame = ODSI__V1__STEP_FRAME__INIT;
    Odsi__V1__StepHeader header = ODSI__V1__STEP_HEADER__INIT;
    header.session_id = (ProtobufCBinaryData){sizeof id, id};
    header.position = position;
    header.token_count = count;
    header.sample = sample;
    frame.header = &header;
    frame.payload = (ProtobufCBinaryData){payload_size, (uint8_t *)(uintptr_t)tokens};
    request.kind_case = ODSI__V1__CONTROL_REQUEST__KIND_STEP;
    request.step = &frame;
    cr_assert_eq(rpc_send(control->call, &request.base), ODSI_OK);
}

static uint32_t expect_opened(struct stream *control)
{
    Odsi__V1__ControlEvent *event = next_event(control);
    cr_assert_eq(event->kind_case, ODSI__V1__CONTROL_EVENT__KIND_OPENED, "%s",
                 event->kind_case == ODSI__V1__CONTROL_EVENT__KIND_FAILED ? event->failed->text
                                                                          : "a token");
    const uint32_t held = event->opened->held_token_count;
    rpc_unpack_free(event);
    return held;
}

static void expect_failed(struct stream *control, Odsi__V1__ErrorCode error, const char *what)
{
    Odsi__V1__ControlEvent *event = next_event(control);
    cr_assert_eq(event->kind_case, ODSI__V1__CONTROL_EVENT__KIND_FAILED, "%s", what);
    cr_expect_eq(event->failed->error, error, "%s: %s", what, event->failed->text);
    cr_expect_gt(strlen(event->failed->text), 10, "%s", what);
    rpc_unpack_free(event);
}

/* An honest session from beginning to end; its tokens are always the same. */
static void expect_honest_session(struct client *client, struct stream *control, uint8_t session)
{
    const uint32_t prompt[] = {1, 466, 467, 261, 417};
    static const uint32_t expected[] = {988, 378};
    send_open(client, control, session, 0, LAYERS, NULL);
    expect_opened(control);
    send_tokens(control, session, 0, prompt, 5, sizeof prompt, 1);
    for (uint32_t i = 0; i < 2; i++) {
        Odsi__V1__ControlEvent *event = next_event(control);
        cr_assert_eq(event->kind_case, ODSI__V1__CONTROL_EVENT__KIND_TOKEN);
        cr_expect_eq(event->token->position, 5 + i);
        cr_expect_eq(event->token->token, expected[i]);
        rpc_unpack_free(event);
    }
}

static void open_worker(struct swarm *swarm, struct client *client)
{
    const struct swarm_config config = {.model = MODEL, .layer_count = LAYERS, .worker_count = 1};
    swarm_open(swarm, &config);
    client_open(client, swarm);
}

static void other_model(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                        Odsi__V1__Stage *stage)
{
    (void)open;
    (void)stage;
    contract->model_id.data[5] ^= 1;
}

static void other_numerics(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                           Odsi__V1__Stage *stage)
{
    (void)open;
    (void)stage;
    contract->numerics_version = 77;
}

static void short_id(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                     Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    open->session_id.len = 15;
}

static void no_contract(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                        Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    open->contract = NULL;
}

static void no_layers(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                      Odsi__V1__Stage *stage)
{
    (void)open;
    (void)contract;
    stage->layers = NULL;
}

static void huge_limit(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                       Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    open->token_limit = UINT32_MAX;
}

static void no_path(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                    Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    open->n_path = 0;
}

static uint8_t some_keys[5000 * DIGEST_SIZE];

static void set_prefix(Odsi__V1__OpenSession *open, uint32_t prompt_count, size_t keys_size)
{
    open->prompt_token_count = prompt_count;
    open->prefix_keys = (ProtobufCBinaryData){keys_size, some_keys};
}

static void half_a_key(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                       Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    set_prefix(open, 100, DIGEST_SIZE / 2);
}

static void too_many_keys(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                          Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    set_prefix(open, 100, 2 * DIGEST_SIZE); /* 100 tokens have one whole page */
}

static void thousands_of_keys(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                              Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    set_prefix(open, UINT32_MAX, sizeof some_keys);
}

static void prompt_beyond_limit(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                                Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    set_prefix(open, 101, 0); /* token_limit is 100 */
}

static void honest_prefix(Odsi__V1__OpenSession *open, Odsi__V1__Contract *contract,
                          Odsi__V1__Stage *stage)
{
    (void)contract;
    (void)stage;
    set_prefix(open, 70, DIGEST_SIZE);
}

Test(hostile_hop, wrong_sessions_are_refused_by_name, .timeout = 60)
{
    const struct {
        const char *what;
        spoil_open spoil;
        Odsi__V1__ErrorCode error;
    } cases[] = {
        {"another numerics version", other_numerics, ODSI__V1__ERROR_CODE__ERROR_UNSUPPORTED},
        {"a short session id", short_id, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"no contract", no_contract, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"a stage without layers", no_layers, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"more positions than the model has", huge_limit, ODSI__V1__ERROR_CODE__ERROR_RANGE},
        {"no path", no_path, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"half a prefix key", half_a_key, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"more keys than pages", too_many_keys, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"thousands of keys", thousands_of_keys, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"a prompt beyond the limit", prompt_beyond_limit, ODSI__V1__ERROR_CODE__ERROR_INVALID},
        {"another model", other_model, ODSI__V1__ERROR_CODE__ERROR_NOT_FOUND},
    };
    struct swarm swarm;
    struct client client;
    open_worker(&swarm, &client);
    struct stream *control = open_stream(&client, "/odsi.v1.Hop/Control");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        send_open(&client, control, (uint8_t)(10 + i), 0, LAYERS, cases[i].spoil);
        expect_failed(control, cases[i].error, cases[i].what);
    }
    client.model_id[5] ^= 1; /* other_model spoiled our copy */
    send_open(&client, control, 60, 0, 5, NULL);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_INVALID, "a path that ends too early");
    send_open(&client, control, 61, 0, LAYERS + 1, NULL);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_INVALID, "a layer that does not exist");
    expect_honest_session(&client, control, 1);
    client_close(&client);
    swarm_close(&swarm);
}

Test(hostile_hop, wrong_steps_end_their_session_only, .timeout = 60)
{
    const uint32_t tokens[600] = {1, 466, 467, 261, 417};
    const uint32_t foreign[] = {1, 1u << 30};
    struct swarm swarm;
    struct client client;
    open_worker(&swarm, &client);
    struct stream *control = open_stream(&client, "/odsi.v1.Hop/Control");
    for (uint8_t session = 1; session <= 6; session++) {
        send_open(&client, control, session, 0, LAYERS, NULL);
        expect_opened(control);
    }
    send_tokens(control, 1, 3, tokens, 5, 20, 1);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_STATE, "a gap");
    send_tokens(control, 2, 0, tokens, 5, 19, 1);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_INVALID, "a payload of the wrong size");
    send_tokens(control, 3, 0, foreign, 2, 8, 1);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_INVALID, "a token that does not exist");
    send_tokens(control, 4, 0, tokens, 600, 2400, 1);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_RANGE, "too many positions in one step");
    send_tokens(control, 5, 0, tokens, 101, 404, 1);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_RANGE, "beyond the session's limit");
    send_tokens(control, 6, 0, tokens, 5, 20, 0);
    send_tokens(control, 6, 0, tokens, 5, 20, 0); /* a duplicate is no error, and runs nothing */
    send_tokens(control, 6, 5, tokens, 1, 4, 1);
    Odsi__V1__ControlEvent *event = next_event(control);
    cr_expect_eq(event->kind_case, ODSI__V1__CONTROL_EVENT__KIND_TOKEN);
    rpc_unpack_free(event);
    client_close(&client);
    swarm_close(&swarm);
}

static uint32_t expect_token(struct stream *control, uint32_t position)
{
    Odsi__V1__ControlEvent *event = next_event(control);
    cr_assert_eq(event->kind_case, ODSI__V1__CONTROL_EVENT__KIND_TOKEN);
    cr_expect_eq(event->token->position, position);
    const uint32_t token = event->token->token;
    rpc_unpack_free(event);
    return token;
}

/* Goal: positions that are held are a place to begin at and nothing else, and only those of the
 * same gateway are. Method: one session leaves a page of 64 positions; others begin within, behind
 * and beyond it; then a second gateway asks for the same keys. */
Test(hostile_hop, a_session_begins_within_what_is_held_for_its_gateway_only, .timeout = 60)
{
    static const uint32_t begins[] = {64, 30, 0};
    uint32_t tokens[70];
    struct swarm swarm;
    struct client client, stranger;
    open_worker(&swarm, &client);
    struct stream *control = open_stream(&client, "/odsi.v1.Hop/Control");
    for (uint32_t i = 0; i < 70; i++)
        tokens[i] = 261 + i * 7;
    send_open(&client, control, 1, 0, LAYERS, honest_prefix);
    cr_expect_eq(expect_opened(control), 0);
    send_tokens(control, 1, 0, tokens, 70, 280, 1);
    const uint32_t expected = expect_token(control, 70);
    for (uint32_t i = 71; i < 100; i++) /* to the session's end, so that nothing more comes */
        expect_token(control, i);
    expect_token(control, 100);
    for (uint8_t i = 0; i < 3; i++) {
        send_open(&client, control, 2 + i, 0, LAYERS, honest_prefix);
        cr_expect_eq(expect_opened(control), 64);
        send_tokens(control, 2 + i, begins[i], tokens + begins[i], 70 - begins[i],
                    4 * (70 - begins[i]), 1);
        cr_expect_eq(expect_token(control, 70), expected, "from position %u", begins[i]);
        for (uint32_t at = 71; at <= 100; at++)
            expect_token(control, at);
    }
    send_open(&client, control, 9, 0, LAYERS, honest_prefix);
    cr_expect_eq(expect_opened(control), 64);
    send_tokens(control, 9, 65, tokens + 65, 5, 20, 1);
    expect_failed(control, ODSI__V1__ERROR_CODE__ERROR_STATE, "beyond what is held");

    client_open(&stranger, &swarm);
    struct stream *other = open_stream(&stranger, "/odsi.v1.Hop/Control");
    send_open(&stranger, other, 20, 0, LAYERS, honest_prefix);
    cr_expect_eq(expect_opened(other), 0, "another gateway's pages are not for it");
    client_close(&stranger);
    client_close(&client);
    swarm_close(&swarm);
}

/* ---- what a peer says ----------------------------------------------------------------------- */

static void send_frame(struct stream *steps, uint8_t session, uint32_t stage, uint32_t count,
                       size_t payload_size)
{
    uint8_t id[16];
    void *payload = NULL;
    memset(id, session, sizeof id);
    Odsi__V1__StepHeader header = ODSI__V1__STEP_HEADER__INIT;
    struct buf packed;
    header.session_id = (ProtobufCBinaryData){sizeof id, id};
    header.stage = stage;
    header.token_count = count;
    header.kind = ODSI__V1__STEP_KIND__STEP_ACTIVATIONS;
    buf_init(&packed, LIMIT_HOP_HEADER_SIZE);
    cr_assert_eq(rpc_pack(&packed, &header.base), ODSI_OK);
    Odsi__V1__StepFrame frame = ODSI__V1__STEP_FRAME__INIT;
    cr_assert_eq(alloc_zeroed(&payload, payload_size + 1, 1), ODSI_OK);
    frame.header = &header;
    frame.payload = (ProtobufCBinaryData){payload_size, payload};
    cr_assert_eq(rpc_send(steps->call, &frame.base), ODSI_OK);
    alloc_free(payload);
    buf_free(&packed);
}

Test(hostile_hop, strangers_cannot_put_steps_into_a_session, .timeout = 60)
{
    struct swarm swarm;
    struct client client;
    open_worker(&swarm, &client);
    struct stream *control = open_stream(&client, "/odsi.v1.Hop/Control");
    struct stream *steps = open_stream(&client, "/odsi.v1.Hop/Steps");
    send_open(&client, control, 1, 0, LAYERS, NULL);
    expect_opened(control);
    send_frame(steps, 1, 0, 1, 4);
    cr_expect_eq(next_ack(steps), ODSI__V1__ERROR_CODE__ERROR_DENIED);
    send_frame(steps, 99, 0, 1, 4);
    cr_expect_eq(next_ack(steps), ODSI__V1__ERROR_CODE__ERROR_NOT_FOUND);
    send_frame(steps, 1, UINT32_MAX, UINT32_MAX, 4);
    cr_expect_eq(next_ack(steps), ODSI__V1__ERROR_CODE__ERROR_NOT_FOUND);
    expect_honest_session(&client, control, 2);
    client_close(&client);
    swarm_close(&swarm);
}

Test(hostile_hop, malformed_and_oversized_messages_end_their_stream_only, .timeout = 60)
{
    static const uint8_t garbage[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff};
    struct swarm swarm;
    struct client client;
    void *big = NULL;
    open_worker(&swarm, &client);
    struct stream *control = open_stream(&client, "/odsi.v1.Hop/Control");
    struct stream *steps = open_stream(&client, "/odsi.v1.Hop/Steps");
    struct stream *other = open_stream(&client, "/odsi.v1.Hop/Control");
    cr_assert_eq(rpc_call_send(steps->call, garbage, sizeof garbage), ODSI_OK);
    cr_expect_eq(wait_end(steps), rpc_status_of_err(ODSI_ERR_CORRUPT));
    cr_assert_eq(alloc_zeroed(&big, LIMIT_CONTROL_MESSAGE_SIZE + 1, 1), ODSI_OK);
    cr_assert_eq(rpc_call_send(other->call, big, LIMIT_CONTROL_MESSAGE_SIZE + 1), ODSI_OK);
    cr_expect_eq(wait_end(other), RPC_RESOURCE_EXHAUSTED);
    alloc_free(big);
    struct stream *wide = open_stream(&client, "/odsi.v1.Hop/Steps");
    send_frame(wide, 1, 0, LIMIT_STEP_TOKENS, LIMIT_STEP_TOKENS * 4 * 4096); /* dim is 128 */
    cr_expect_eq(wait_end(wide), RPC_RESOURCE_EXHAUSTED);
    expect_honest_session(&client, control, 1);
    cr_assert_eq(rpc_call_send(control->call, garbage, sizeof garbage), ODSI_OK);
    cr_expect_eq(wait_end(control), RPC_INVALID_ARGUMENT);
    client_close(&client);
    swarm_close(&swarm);
}
