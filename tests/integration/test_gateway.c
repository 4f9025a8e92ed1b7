/* The gateway among real processes: what clients are told, and what it does when they, workers or
 * coordinators go away. The client is this test, so that it knows exactly when to do harm. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/inference.pb-c.h"
#include "tests/support/swarm.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MODEL       "deploy/demo/odsi-tiny-q8_0.gguf"
#define DEMO_LAYERS 6u
#define LONG_TOKENS 400u
#define WAIT_US     30000000u
#define TOKENS_MAX  1024u
#define TEXT_MAX    16384u

/* One Generate call and all that came of it. */
struct ask {
    struct client *client;
    struct rpc_call *call;
    uint32_t tokens[TOKENS_MAX];
    uint32_t token_count;
    char text[TEXT_MAX];
    size_t text_size;
    int has_summary;
    int finish;
    uint32_t hop_count;
    char hops[SWARM_WORKERS_MAX][80]; /* addresses */
    int done;
    enum rpc_status status;
    char error[1024];
    uint32_t harm_at; /* once so many tokens are there; 0: never */
    void (*harm)(struct ask *self);
};

struct client {
    struct swarm *swarm;
    struct rpc_loop *loop;
    struct rpc_channel *channel;
    struct rpc_timer timer;
    uint32_t open_count;
    int timed_out;
};

static void on_timeout(void *context)
{
    struct client *self = context;
    self->timed_out = 1;
    rpc_loop_stop(self->loop);
}

static void client_open(struct client *self, struct swarm *swarm)
{
    memset(self, 0, sizeof *self);
    self->swarm = swarm;
    const struct rpc_channel_config config = {.address = swarm->gateway_address};
    cr_assert_eq(rpc_loop_open(&self->loop), ODSI_OK);
    cr_assert_eq(rpc_channel_open(&self->channel, self->loop, &config), ODSI_OK);
}

static void client_close(struct client *self)
{
    rpc_channel_close(&self->channel);
    rpc_loop_close(&self->loop);
}

/* Runs until every call has ended. */
static void client_run(struct client *self)
{
    self->timed_out = 0;
    cr_assert_eq(rpc_timer_start(&self->timer, self->loop, WAIT_US, on_timeout, self), ODSI_OK);
    if (self->open_count > 0)
        rpc_loop_run(self->loop);
    rpc_timer_cancel(&self->timer);
    cr_assert_not(self->timed_out, "a call hangs");
}

static void take_summary(struct ask *self, const Odsi__V1__Summary *summary)
{
    self->has_summary = 1;
    self->finish = (int)summary->finish;
    self->hop_count = (uint32_t)summary->n_hops;
    cr_assert_leq(self->hop_count, SWARM_WORKERS_MAX);
    cr_expect_eq(summary->new_token_count, self->token_count);
    for (uint32_t i = 0; i < self->hop_count; i++)
        snprintf(self->hops[i], sizeof self->hops[i], "%s", summary->hops[i]->stage->address);
}

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct ask *self = user;
    Odsi__V1__GenerateResponse *response = NULL;
    (void)call;
    cr_assert_eq(rpc_unpack(&response, &odsi__v1__generate_response__descriptor, message), ODSI_OK);
    cr_assert_not(self->has_summary, "nothing follows the summary");
    cr_assert_eq(response->n_tokens, response->n_logprobs);
    cr_assert_leq(self->token_count + response->n_tokens, TOKENS_MAX);
    for (size_t i = 0; i < response->n_tokens; i++)
        self->tokens[self->token_count++] = response->tokens[i];
    const size_t size = strlen(response->text);
    cr_assert_lt(self->text_size + size, TEXT_MAX);
    memcpy(self->text + self->text_size, response->text, size + 1);
    self->text_size += size;
    if (response->summary)
        take_summary(self, response->summary);
    rpc_unpack_free(response);
    if (self->harm_at > 0 && self->token_count >= self->harm_at) {
        self->harm_at = 0;
        self->harm(self);
    }
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct ask *self = user;
    (void)call;
    self->done = 1;
    self->call = NULL;
    self->status = status;
    snprintf(self->error, sizeof self->error, "%s", text ? text : "");
    if (--self->client->open_count == 0)
        rpc_loop_stop(self->client->loop);
}

static void ask_start(struct ask *self, struct client *client,
                      const Odsi__V1__GenerateRequest *request, uint64_t timeout_us)
{
    static const struct rpc_handler handler = {.on_message = on_message, .on_done = on_done};
    self->client = client;
    cr_assert_eq(rpc_call_open(&self->call, client->channel, "/odsi.v1.Inference/Generate",
                               timeout_us, 0, &handler, self),
                 ODSI_OK);
    client->open_count++;
    cr_assert_eq(rpc_send(self->call, &request->base), ODSI_OK);
    rpc_call_half_close(self->call);
}

static Odsi__V1__GenerateRequest request_for(const char *prompt, uint32_t max_tokens, uint64_t seed)
{
    Odsi__V1__GenerateRequest request = ODSI__V1__GENERATE_REQUEST__INIT;
    request.prompt = (char *)(uintptr_t)prompt;
    request.max_tokens = max_tokens;
    request.temperature = 0.9f;
    request.seed = seed;
    request.ignore_end = 1;
    return request;
}

/* A long answer; memory from the heap, ended with alloc_free. */
static struct ask *ask_long(struct client *client, uint64_t seed)
{
    struct ask *ask = NULL;
    const Odsi__V1__GenerateRequest request = request_for("Once upon a time", LONG_TOKENS, seed);
    cr_assert_eq(alloc_zeroed(&ask, 1, sizeof *ask), ODSI_OK);
    ask_start(ask, client, &request, 0);
    return ask;
}

static void expect_whole(const struct ask *ask)
{
    cr_assert_eq(ask->status, RPC_OK, "%s", ask->error);
    cr_assert(ask->has_summary);
    cr_expect_eq(ask->token_count, LONG_TOKENS);
    cr_expect_eq(ask->finish, ODSI__V1__FINISH_REASON__FINISH_LENGTH);
}

static void expect_same(const struct ask *ask, const struct ask *reference)
{
    expect_whole(ask);
    cr_expect_eq(memcmp(ask->tokens, reference->tokens, LONG_TOKENS * sizeof *ask->tokens), 0);
    cr_expect_str_eq(ask->text, reference->text);
}

static const char *without_id(const char *address)
{
    const char *at = strchr(address, '@');
    return at ? at + 1 : address;
}

static int went_through(const struct ask *ask, const char *address)
{
    for (uint32_t i = 0; i < ask->hop_count; i++)
        if (strcmp(ask->hops[i], without_id(address)) == 0)
            return 1;
    return 0;
}

static void expect_in_gateway_log(const struct swarm *swarm, const char *word, int wanted)
{
    char *log = NULL;
    cr_assert_eq(process_read_log(&log, swarm->gateway), ODSI_OK);
    cr_expect_eq(strstr(log, word) != NULL, wanted, "\"%s\" in: %s", word, log);
    alloc_free(log);
}

static void kill_worker_1(struct ask *self)
{
    process_close(&self->client->swarm->workers[1]);
}

/* Which worker the gateway chose last for the second half of the layers, from its log. */
static uint32_t second_half_of(const struct swarm *swarm)
{
    char *log = NULL;
    const char *last = NULL;
    uint32_t found = 0;
    cr_assert_eq(process_read_log(&log, swarm->gateway), ODSI_OK);
    for (const char *at = log; (at = strstr(at, "stage 1: worker ")); at++)
        last = at + strlen("stage 1: worker ");
    cr_assert_not_null(last, "no path in: %s", log);
    for (uint32_t i = 0; i < swarm->worker_count; i++)
        if (strncmp(last, swarm->worker_addresses[i], 16) == 0)
            found = i;
    alloc_free(log);
    return found;
}

static void kill_second_half(struct ask *self)
{
    struct swarm *swarm = self->client->swarm;
    process_close(&swarm->workers[second_half_of(swarm)]);
}

/* Goal: output after a failure is output without it, byte for byte (draft 6.4). How: two workers
 * for each half of the layers; the one that has the second half is killed in the middle. */
Test(gateway, an_answer_goes_on_byte_for_byte_when_a_worker_dies, .timeout = 120)
{
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 4, .shard_count = 2};
    struct swarm swarm;
    struct client client;
    cr_assert_eq(setenv("ODSI_LOG_LEVEL", "debug", 1), 0); /* paths are in the log then */
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    struct ask *reference = ask_long(&client, 10);
    struct ask *other = ask_long(&client, 11);
    client_run(&client);
    expect_whole(reference);
    expect_whole(other);
    cr_expect_neq(memcmp(reference->tokens, other->tokens, 4 * LONG_TOKENS), 0);
    alloc_free(other);
    struct ask *ask = ask_long(&client, 10);
    ask->harm_at = 20;
    ask->harm = kill_second_half;
    client_run(&client);
    expect_same(ask, reference);
    for (uint32_t i = 1; i < 4; i += 2)
        cr_expect_eq(went_through(ask, swarm.worker_addresses[i]), swarm.workers[i] != NULL);
    expect_in_gateway_log(&swarm, "looking for another path", 1);
    alloc_free(ask);
    alloc_free(reference);
    client_close(&client);
    swarm_close(&swarm);
}

/* Without a replica the answer ends with one error that names peer, layers, step and cause. */
Test(gateway, a_lost_worker_without_a_replica_is_named, .timeout = 120)
{
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 3};
    struct swarm swarm;
    struct client client;
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    struct ask *ask = ask_long(&client, 1);
    ask->harm_at = 20;
    ask->harm = kill_worker_1;
    client_run(&client);
    cr_expect_eq(ask->status, RPC_UNAVAILABLE, "%d", (int)ask->status);
    char name[24];
    snprintf(name, sizeof name, "worker %.16s", swarm.worker_addresses[1]);
    cr_expect(strstr(ask->error, name), "%s", ask->error);
    cr_expect(strstr(ask->error, "layers 2-3"), "%s", ask->error);
    cr_expect(strstr(ask->error, "step at position"), "%s", ask->error);
    cr_expect_geq(ask->token_count, 20, "what was made before is there");
    cr_expect_lt(ask->token_count, LONG_TOKENS);
    alloc_free(ask);
    client_close(&client);
    swarm_close(&swarm);
}

static void cancel_call(struct ask *self)
{
    rpc_call_cancel(self->call);
}

/* Goal: a client that goes away frees its room on the workers at once. How: KV memory for one long
 * session only; a second is refused, and taken after the first client has left. */
Test(gateway, a_client_that_goes_away_frees_its_room, .timeout = 120)
{
    static const char *const small[] = {"--kv-memory=1M", NULL};
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 1, .worker_args = small};
    struct swarm swarm;
    struct client client;
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    struct ask *first = ask_long(&client, 1);
    struct ask *second = ask_long(&client, 2);
    client_run(&client);
    expect_whole(first);
    cr_expect_eq(second->status, RPC_RESOURCE_EXHAUSTED, "%s", second->error);
    alloc_free(first);
    alloc_free(second);
    first = ask_long(&client, 1);
    first->harm_at = 5;
    first->harm = cancel_call;
    client_run(&client);
    cr_expect_eq(first->status, RPC_CANCELLED);
    cr_expect_lt(first->token_count, LONG_TOKENS);
    second = ask_long(&client, 2);
    client_run(&client);
    expect_whole(second);
    alloc_free(first);
    alloc_free(second);
    client_close(&client);
    swarm_close(&swarm);
}

static struct ask *paused;

static void pause_call(struct ask *self)
{
    rpc_call_pause(self->call);
    paused = self;
}

static void resume_paused(struct ask *self)
{
    (void)self;
    cr_assert_not(paused->done);
    rpc_call_resume(paused->call);
}

/* Goal: one slow reader holds up nobody, and misses nothing. How: it stops reading until the other
 * answer is whole; then it reads on. */
Test(gateway, a_slow_client_holds_up_nobody, .timeout = 120)
{
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 2};
    struct swarm swarm;
    struct client client;
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    struct ask *slow = ask_long(&client, 3);
    slow->harm_at = 5;
    slow->harm = pause_call;
    struct ask *other = ask_long(&client, 4);
    other->harm_at = LONG_TOKENS;
    other->harm = resume_paused;
    client_run(&client);
    expect_whole(other);
    expect_whole(slow);
    alloc_free(slow);
    alloc_free(other);
    client_close(&client);
    swarm_close(&swarm);
}

static void restart_gateway(struct swarm *swarm)
{
    char coordinator[600], state[PROCESS_PATH_SIZE + 32], ready[PROCESS_PATH_SIZE];
    char ready_flag[PROCESS_PATH_SIZE + 16];
    int code = -1;
    process_signal(swarm->gateway, SIGTERM);
    cr_assert_eq(process_wait(swarm->gateway, 5000000, &code), ODSI_OK);
    cr_expect_eq(code, 0);
    process_close(&swarm->gateway);
    cr_assert_eq(process_path(ready, swarm->folder, "gateway-2.ready"), ODSI_OK);
    snprintf(coordinator, sizeof coordinator, "--coordinator=%s", swarm->coordinator_address);
    snprintf(state, sizeof state, "--state-dir=%s/gateway", swarm->folder);
    snprintf(ready_flag, sizeof ready_flag, "--ready-file=%s", ready);
    const char *const args[] = {
        "--listen=127.0.0.1:0", "--insecure", coordinator, state, ready_flag, NULL};
    const struct process_config config = {
        .program = "odsi-gateway", .args = args, .folder = swarm->folder, .name = "gateway-2"};
    cr_assert_eq(process_start(&swarm->gateway, &config), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_wait_line(swarm->gateway, ready, WAIT_US, swarm->gateway_address,
                                   sizeof swarm->gateway_address),
                 ODSI_OK, "%s", odsi_err_text());
}

/* Goal: the control path is never needed for a token (draft 10). How: the coordinator is killed;
 * then answers are asked of the gateway that knew it, and of one that starts afterwards. */
Test(gateway, answers_without_any_coordinator, .timeout = 120)
{
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 2};
    struct swarm swarm;
    struct client client;
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    struct ask *before = ask_long(&client, 5);
    client_run(&client);
    expect_whole(before);
    process_close(&swarm.coordinator);
    struct ask *after = ask_long(&client, 5);
    client_run(&client);
    expect_same(after, before);
    client_close(&client);
    restart_gateway(&swarm);
    client_open(&client, &swarm);
    struct ask *again = ask_long(&client, 5);
    client_run(&client);
    expect_same(again, before);
    alloc_free(before);
    alloc_free(after);
    alloc_free(again);
    client_close(&client);
    swarm_close(&swarm);
}

static void terminate_gateway(struct ask *self)
{
    process_signal(self->client->swarm->gateway, SIGTERM);
}

Test(gateway, stops_within_two_seconds_and_tells_its_clients, .timeout = 120)
{
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 2};
    struct swarm swarm;
    struct client client;
    struct ask *asks[6];
    int code = -1;
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    for (uint32_t i = 0; i < 6; i++)
        asks[i] = ask_long(&client, 1 + i);
    asks[0]->harm_at = 10;
    asks[0]->harm = terminate_gateway;
    client_run(&client);
    cr_assert_eq(process_wait(swarm.gateway, 2000000, &code), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(code, 0);
    for (uint32_t i = 0; i < 6; i++) {
        cr_expect_eq(asks[i]->status, RPC_UNAVAILABLE, "%s", asks[i]->error);
        cr_expect(strstr(asks[i]->error, "stopping"), "%s", asks[i]->error);
        cr_expect_lt(asks[i]->token_count, LONG_TOKENS);
        alloc_free(asks[i]);
    }
    process_close(&swarm.gateway);
    client_close(&client);
    swarm_close(&swarm);
}

static void expect_refused(struct client *client, const Odsi__V1__GenerateRequest *request,
                           uint64_t timeout_us, enum rpc_status status, const char *word)
{
    struct ask *ask = NULL;
    cr_assert_eq(alloc_zeroed(&ask, 1, sizeof *ask), ODSI_OK);
    ask_start(ask, client, request, timeout_us);
    client_run(client);
    cr_expect_eq(ask->status, status, "%d: %s", (int)ask->status, ask->error);
    cr_expect(strstr(ask->error, word), "\"%s\" does not mention %s", ask->error, word);
    alloc_free(ask);
}

static void refuse_fields(struct client *client, const char *prompt)
{
    uint32_t tokens[] = {1, 500, 1024};
    char letter[] = "a";
    char empty[] = "";
    char *stops[9];
    char long_stop[] = "0123456789012345678901234567890123456789012345678901234567890123456789";
    char *long_stops[] = {long_stop};
    char bad_name[] = "other";
    Odsi__V1__GenerateRequest request = request_for(prompt, 5, 1);
    for (size_t i = 0; i < 9; i++)
        stops[i] = letter;
    request.prompt_tokens = tokens;
    request.n_prompt_tokens = 2;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "more than one is given");
    request.prompt = empty;
    request.n_prompt_tokens = 3;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "entry 2 is beyond");
    request = request_for(prompt, 5, 1);
    request.stop = stops;
    request.n_stop = 9;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "more than 8 stop strings");
    request.stop = long_stops;
    request.n_stop = 1;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "stop string of 70 bytes");
    request = request_for(prompt, 5, 1);
    request.model = bad_name;
    expect_refused(client, &request, 0, RPC_NOT_FOUND, "odsi-tiny");
    request = request_for(prompt, 5, 1);
    request.top_p = 2.0f;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "top_p");
}

static void refuse_messages(struct client *client)
{
    Odsi__V1__ChatMessage *messages[LIMIT_CHAT_MESSAGES + 1];
    Odsi__V1__ChatMessage message = ODSI__V1__CHAT_MESSAGE__INIT;
    char user[] = "user", tool[] = "tool", text[] = "hello";
    Odsi__V1__GenerateRequest request = request_for("", 5, 1);
    message.role = user;
    message.content = text;
    for (size_t i = 0; i <= LIMIT_CHAT_MESSAGES; i++)
        messages[i] = &message;
    request.messages = messages;
    request.n_messages = 1;
    expect_refused(client, &request, 0, RPC_UNIMPLEMENTED, "the model's file has no chat template");
    request.n_messages = LIMIT_CHAT_MESSAGES + 1;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "messages: 1025 of them");
    request.n_messages = 1;
    request.prompt = text;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "more than one is given");
    request.prompt = message.role = tool;
    expect_refused(client, &request, 0, RPC_INVALID_ARGUMENT, "entry 0: a role is");
}

static void refuse_lengths(struct client *client)
{
    static uint32_t tokens[600];
    static char text[8192];
    Odsi__V1__GenerateRequest request = request_for("", 5, 1);
    for (uint32_t i = 0; i < 600; i++)
        tokens[i] = 300;
    request.prompt_tokens = tokens;
    request.n_prompt_tokens = 600;
    expect_refused(client, &request, 0, RPC_OUT_OF_RANGE, "600 tokens; the model's context of 512");
    request.n_prompt_tokens = 512;
    expect_refused(client, &request, 0, RPC_OUT_OF_RANGE, "no room for an answer");
    for (size_t i = 0; i + 1 < sizeof text; i++)
        text[i] = (char)('a' + i % 26);
    request = request_for(text, 5, 1);
    expect_refused(client, &request, 0, RPC_OUT_OF_RANGE, "the model's context has 512");
}

Test(gateway, says_what_is_wrong_with_a_request, .timeout = 120)
{
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 1};
    struct swarm swarm;
    struct client client;
    const char *prompt = "Once";
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    refuse_fields(&client, prompt);
    refuse_messages(&client);
    refuse_lengths(&client);
    Odsi__V1__GenerateRequest request = request_for(prompt, 500, 1);
    request.deadline_ms = 5;
    expect_refused(&client, &request, 0, RPC_DEADLINE_EXCEEDED, "deadline");
    request.deadline_ms = 0;
    expect_refused(&client, &request, 5000, RPC_DEADLINE_EXCEEDED, "");
    /* All of that left no trace. */
    struct ask *ask = ask_long(&client, 1);
    client_run(&client);
    expect_whole(ask);
    alloc_free(ask);
    client_close(&client);
    swarm_close(&swarm);
}

/* Sends raw bytes as a GenerateRequest. */
static void expect_bytes_refused(struct client *client, const void *bytes, size_t size,
                                 const char *word)
{
    static const struct rpc_handler handler = {.on_message = on_message, .on_done = on_done};
    struct ask *ask = NULL;
    cr_assert_eq(alloc_zeroed(&ask, 1, sizeof *ask), ODSI_OK);
    ask->client = client;
    cr_assert_eq(rpc_call_open(&ask->call, client->channel, "/odsi.v1.Inference/Generate", 0, 0,
                               &handler, ask),
                 ODSI_OK);
    client->open_count++;
    if (size > 0)
        cr_assert_eq(rpc_call_send(ask->call, bytes, size), ODSI_OK);
    rpc_call_half_close(ask->call);
    client_run(client);
    cr_expect_eq(ask->status, RPC_INVALID_ARGUMENT, "%d: %s", (int)ask->status, ask->error);
    cr_expect(strstr(ask->error, word), "\"%s\" does not mention %s", ask->error, word);
    alloc_free(ask);
}

Test(gateway, refuses_bytes_that_are_no_request, .timeout = 120)
{
    const struct swarm_config config = {
        .model = MODEL, .layer_count = DEMO_LAYERS, .worker_count = 1};
    struct swarm swarm;
    struct client client;
    swarm_open(&swarm, &config);
    client_open(&client, &swarm);
    expect_bytes_refused(&client, "\x12\x05Onc", 5, "");       /* cut short */
    expect_bytes_refused(&client, "\xFF\xFF\xFF\xFF", 4, "");  /* no field */
    expect_bytes_refused(&client, "\x12\x05On\0ce", 7, "NUL"); /* protobuf-c would cut it */
    expect_bytes_refused(&client, "\x7A\x0D\x0A\x04user\x12\x05On\0ce", 15, "entry 0 has a NUL");
    expect_bytes_refused(&client, "", 0, "no request was sent"); /* half-closed at once */
    struct ask *ask = ask_long(&client, 1);
    client_run(&client);
    expect_whole(ask);
    alloc_free(ask);
    client_close(&client);
    swarm_close(&swarm);
}
