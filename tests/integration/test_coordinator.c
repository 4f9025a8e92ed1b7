/* odsi-coordinator as its users meet it: the real program as a process, over real mutual TLS, with
 * the worker's own client as members and plain calls as everybody else.
 *
 * Times are generous, because other work shares the machine; nothing waits longer than it must. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/coordinator.pb-c.h"
#include "tests/support/process.h"
#include "worker/hop/coordinator_client.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#define WAIT_US      20000000u /* for anything that must happen */
#define CALL_US      10000000u
#define STEP_US      2000u /* between two looks at what a test waits for */
#define HEARTBEAT_MS 300u
#define MEMBERS_MAX  32u
#define LINE_SIZE    512u

static char folder[PROCESS_PATH_SIZE];
static char database[PROCESS_PATH_SIZE + 8]; /* as a --store url */
static struct rpc_loop *loop;

static void set_up(void)
{
    cr_assert_eq(process_folder_make(folder), ODSI_OK, "%s", odsi_err_text());
    snprintf(database, sizeof database, "sqlite:%s/odsi.db", folder);
    cr_assert_eq(rpc_loop_open(&loop), ODSI_OK);
}

static void tear_down(void)
{
    rpc_loop_close(&loop);
    process_folder_remove(folder);
}

TestSuite(coordinator, .init = set_up, .fini = tear_down, .timeout = 120);

/* ---- waiting ----------------------------------------------------------------------------------- */

struct waiting {
    struct rpc_timer timer;
    int (*is_true)(void *context);
    void *context;
    uint64_t until_us;
    int result;
};

static void look(void *context)
{
    struct waiting *self = context;
    self->result = self->is_true && self->is_true(self->context);
    if (self->result || clock_monotonic_us() > self->until_us)
        rpc_loop_stop(loop);
    else
        cr_assert_eq(rpc_timer_start(&self->timer, loop, STEP_US, look, self), ODSI_OK);
}

/* Runs the loop until is_true(context), at most for timeout_us; returns whether it became true. */
static int wait_for(int (*is_true)(void *context), void *context, uint64_t timeout_us)
{
    struct waiting self = {
        .is_true = is_true, .context = context, .until_us = clock_monotonic_us() + timeout_us};
    cr_assert_eq(rpc_timer_start(&self.timer, loop, 0, look, &self), ODSI_OK);
    rpc_loop_run(loop);
    return self.result;
}

static void run_for(uint64_t time_us)
{
    (void)wait_for(NULL, NULL, time_us);
}

/* ---- coordinators ------------------------------------------------------------------------------ */

struct instance {
    struct process *process;
    char ready_path[PROCESS_PATH_SIZE];
    char address[LINE_SIZE]; /* ID@host:port */
};

struct instance_config {
    const char *name;
    const char *listen; /* NULL: any port of loopback */
    const char *store;  /* NULL: the test's database */
    uint32_t heartbeat_ms;
    int insecure;
};

static void start(struct instance *self, const struct instance_config *config)
{
    char key[PROCESS_PATH_SIZE];
    char file[64];
    char heartbeat[16];
    snprintf(file, sizeof file, "%s.ready", config->name);
    cr_assert_eq(process_path(self->ready_path, folder, file), ODSI_OK);
    snprintf(file, sizeof file, "%s.pem", config->name);
    cr_assert_eq(process_path(key, folder, file), ODSI_OK);
    snprintf(heartbeat, sizeof heartbeat, "%u",
             config->heartbeat_ms ? config->heartbeat_ms : HEARTBEAT_MS);
    const char *args[] = {"--listen",
                          config->listen ? config->listen : "127.0.0.1:0",
                          "--store",
                          config->store ? config->store : database,
                          "--identity",
                          key,
                          "--heartbeat-ms",
                          heartbeat,
                          "--ready-file",
                          self->ready_path,
                          "--log-level",
                          "debug",
                          config->insecure ? "--insecure" : NULL,
                          NULL};
    const struct process_config process = {
        .program = "odsi-coordinator", .args = args, .folder = folder, .name = config->name};
    cr_assert_eq(process_start(&self->process, &process), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_wait_line(self->process, self->ready_path, WAIT_US, self->address,
                                   sizeof self->address),
                 ODSI_OK, "%s", odsi_err_text());
}

static void start_named(struct instance *self, const char *name)
{
    const struct instance_config config = {.name = name};
    start(self, &config);
}

/* The part of an instance's address after the ID. */
static const char *place_of(const struct instance *self)
{
    const char *at = strchr(self->address, '@');
    return at ? at + 1 : self->address;
}

/* ---- members ----------------------------------------------------------------------------------- */

struct worker {
    struct identity *identity;
    struct coordinator_client *client;
    uint32_t first;
    uint32_t end;
    int assigned_count;
    int lost_count;
    int gave_up;
    int left;
    struct odsi_failure failure;
    struct coordinator_load load;
};

static void on_assigned(void *context, uint32_t layer_first, uint32_t layer_end)
{
    struct worker *self = context;
    self->first = layer_first;
    self->end = layer_end;
    self->assigned_count++;
}

static void on_lost(void *context, const struct odsi_failure *failure, int retrying)
{
    struct worker *self = context;
    self->failure = *failure;
    self->lost_count++;
    self->gave_up |= !retrying;
}

static void fill_load(void *context, struct coordinator_load *out)
{
    const struct worker *self = context;
    *out = self->load;
}

static struct coordinator_client_config member_config(struct worker *self, const char *addresses,
                                                      const char *address)
{
    struct coordinator_client_config config = {
        .loop = loop,
        .addresses = addresses,
        .identity = self->identity,
        .address = address,
        .model_name = "story-110m",
        .layer_count = 12,
        .context_length = 1024,
        .numerics_version = 1,
        .layer_end = 12,
        .capability = {.memory_size = 1000, .decode_tokens_per_s = 7.5f, .backend = "avx2"},
        .on_assigned = on_assigned,
        .on_lost = on_lost,
        .context = self,
    };
    memset(config.model_id.bytes, 9, DIGEST_SIZE);
    return config;
}

static void make_worker(struct worker *self)
{
    memset(self, 0, sizeof *self);
    cr_assert_eq(identity_make(&self->identity), ODSI_OK);
}

/* Starts to join at addresses as a member at address with all 12 layers. */
static void join(struct worker *self, const char *addresses, const char *address)
{
    const struct coordinator_client_config config = member_config(self, addresses, address);
    cr_assert_eq(coordinator_client_open(&self->client, &config), ODSI_OK, "%s", odsi_err_text());
}

static void on_left(void *context)
{
    struct worker *self = context;
    self->left = 1;
}

static int is_assigned(void *context)
{
    const struct worker *self = context;
    return self->assigned_count > 0;
}

static int is_lost(void *context)
{
    const struct worker *self = context;
    return self->lost_count > 0;
}

static int has_left(void *context)
{
    const struct worker *self = context;
    return self->left;
}

/* Vanishes without a word. */
static void drop(struct worker *self)
{
    coordinator_client_close(&self->client);
    run_for(20000); /* what it had under way comes back as cancelled */
    identity_close(&self->identity);
}

/* ---- plain calls ------------------------------------------------------------------------------- */

struct caller {
    struct identity *identity; /* NULL: plaintext */
    struct rpc_channel *channel;
    int is_answered;
    enum rpc_status status;
    char text[LINE_SIZE];
    struct buf reply;
};

static void caller_open(struct caller *self, const char *address, int with_tls)
{
    char place[LIMIT_ADDRESS_SIZE];
    struct digest id;
    int has_id = 0;
    memset(self, 0, sizeof *self);
    buf_init(&self->reply, LIMIT_CONTROL_MESSAGE_SIZE);
    cr_assert_eq(rpc_address_read(address, place, &id, &has_id), ODSI_OK);
    if (with_tls)
        cr_assert_eq(identity_make(&self->identity), ODSI_OK);
    const struct rpc_channel_config config = {
        .address = place, .identity = self->identity, .peer_id = has_id ? &id : NULL};
    cr_assert_eq(rpc_channel_open(&self->channel, loop, &config), ODSI_OK, "%s", odsi_err_text());
}

static void caller_close(struct caller *self)
{
    rpc_channel_close(&self->channel);
    run_for(20000);
    identity_close(&self->identity);
    buf_free(&self->reply);
}

static void on_reply(void *context, enum rpc_status status, const char *text,
                     const struct rpc_message *reply)
{
    struct caller *self = context;
    self->is_answered = 1;
    self->status = status;
    snprintf(self->text, sizeof self->text, "%s", text ? text : "");
    for (size_t i = 0; reply && i < reply->piece_count; i++)
        cr_assert_eq(buf_append(&self->reply, reply->pieces[i].data, reply->pieces[i].size),
                     ODSI_OK);
}

static int is_answered(void *context)
{
    const struct caller *self = context;
    return self->is_answered;
}

static enum rpc_status call_bytes(struct caller *self, const char *method, const void *data,
                                  size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "/odsi.v1.Coordinator/%s", method);
    self->is_answered = 0;
    buf_reset(&self->reply);
    cr_assert_eq(rpc_unary(self->channel, path, CALL_US, 1, data, size, on_reply, self), ODSI_OK);
    cr_assert(wait_for(is_answered, self, WAIT_US));
    return self->status;
}

static enum rpc_status call(struct caller *self, const char *method,
                            const ProtobufCMessage *request)
{
    struct buf packed;
    buf_init(&packed, 65536);
    cr_assert_eq(rpc_pack(&packed, request), ODSI_OK);
    const enum rpc_status status = call_bytes(self, method, packed.data, packed.size);
    buf_free(&packed);
    return status;
}

/* GetDirectory, unpacked; ended with rpc_unpack_free. */
static Odsi__V1__Directory *get_directory(struct caller *self)
{
    const Odsi__V1__GetDirectoryRequest request = ODSI__V1__GET_DIRECTORY_REQUEST__INIT;
    Odsi__V1__Directory *directory = NULL;
    cr_assert_eq(call(self, "GetDirectory", &request.base), RPC_OK, "%s", self->text);
    cr_assert_eq(rpc_unpack_bytes(&directory, &odsi__v1__directory__descriptor, self->reply.data,
                                  self->reply.size),
                 ODSI_OK);
    return directory;
}

/* A valid Join of layers [0, 12); the parts are the caller's to spoil. */
struct join_request {
    Odsi__V1__JoinRequest request;
    Odsi__V1__ModelDescription model;
    Odsi__V1__LayerRange layers;
    Odsi__V1__Capability capability;
    uint8_t id[DIGEST_SIZE];
    char address[300];
    char name[200];
    char backend[100];
};

static void fill_request(struct join_request *self)
{
    *self = (struct join_request){.request = ODSI__V1__JOIN_REQUEST__INIT,
                                  .model = ODSI__V1__MODEL_DESCRIPTION__INIT,
                                  .layers = ODSI__V1__LAYER_RANGE__INIT,
                                  .capability = ODSI__V1__CAPABILITY__INIT,
                                  .address = "10.1.1.1:7700",
                                  .name = "story",
                                  .backend = "avx2"};
    self->model.model_id = (ProtobufCBinaryData){.len = DIGEST_SIZE, .data = self->id};
    self->model.name = self->name;
    self->model.layer_count = self->layers.end = 12;
    self->model.context_length = 1024;
    self->model.numerics_version = 1;
    self->capability.backend = self->backend;
    self->request.address = self->address;
    self->request.model = &self->model;
    self->request.layers = &self->layers;
    self->request.capability = &self->capability;
}

/* ---- watchers ---------------------------------------------------------------------------------- */

struct seen {
    struct digest id;
    char address[LIMIT_ADDRESS_SIZE];
    uint32_t first;
    uint32_t end;
    int ready;
    struct coordinator_load load;
};

struct watch {
    struct caller caller;
    struct rpc_call *call;
    int is_done;
    enum rpc_status status;
    uint32_t message_count;
    uint64_t version;
    uint32_t count;
    struct seen members[MEMBERS_MAX];
    uint32_t count_min; /* since the test last set it */
    int went_back;      /* a version was not larger than the one before */
};

static void watch_message(void *user, struct rpc_call *rpc, const struct rpc_message *message)
{
    struct watch *self = user;
    Odsi__V1__Directory *directory = NULL;
    (void)rpc;
    cr_assert_eq(rpc_unpack(&directory, &odsi__v1__directory__descriptor, message), ODSI_OK);
    cr_assert_leq(directory->n_members, MEMBERS_MAX);
    self->went_back |= self->message_count > 0 && directory->version <= self->version;
    self->message_count++;
    self->version = directory->version;
    self->count = (uint32_t)directory->n_members;
    if (self->count < self->count_min)
        self->count_min = self->count;
    for (uint32_t i = 0; i < self->count; i++) {
        const Odsi__V1__Member *member = directory->members[i];
        struct seen *seen = &self->members[i];
        cr_assert(member->worker_id.len == DIGEST_SIZE && member->layers && member->load);
        memcpy(seen->id.bytes, member->worker_id.data, DIGEST_SIZE);
        snprintf(seen->address, sizeof seen->address, "%s", member->address);
        seen->first = member->layers->first;
        seen->end = member->layers->end;
        seen->ready = member->ready;
        seen->load.session_count = member->load->session_count;
    }
    rpc_unpack_free(directory);
}

static void watch_done(void *user, struct rpc_call *rpc, enum rpc_status status, const char *text)
{
    struct watch *self = user;
    (void)rpc;
    (void)text;
    self->is_done = 1;
    self->status = status;
}

static int has_directory(void *context)
{
    const struct watch *self = context;
    return self->message_count > 0;
}

static void watch_open(struct watch *self, const char *address)
{
    static const struct rpc_handler handler = {.on_message = watch_message, .on_done = watch_done};
    memset(self, 0, sizeof *self);
    caller_open(&self->caller, address, 1);
    cr_assert_eq(rpc_call_open(&self->call, self->caller.channel,
                               "/odsi.v1.Coordinator/WatchDirectory", 0, 1, &handler, self),
                 ODSI_OK);
    cr_assert_eq(rpc_call_send(self->call, "", 0), ODSI_OK);
    rpc_call_half_close(self->call);
    cr_assert(wait_for(has_directory, self, WAIT_US));
}

static int is_over(void *context)
{
    const struct watch *self = context;
    return self->is_done;
}

static void watch_close(struct watch *self)
{
    if (!self->is_done)
        rpc_call_cancel(self->call);
    cr_assert(wait_for(is_over, self, WAIT_US));
    caller_close(&self->caller);
}

struct count_awaited {
    const struct watch *watch;
    uint32_t count;
    int ready; /* all of them; -1: either */
};

static int has_count(void *context)
{
    const struct count_awaited *awaited = context;
    const struct watch *watch = awaited->watch;
    for (uint32_t i = 0; i < watch->count; i++)
        if (awaited->ready >= 0 && watch->members[i].ready != awaited->ready)
            return 0;
    return watch->count == awaited->count;
}

struct version_awaited {
    const struct watch *watch;
    uint64_t version;
};

static int has_version(void *context)
{
    const struct version_awaited *awaited = context;
    return awaited->watch->version == awaited->version;
}

struct id_awaited {
    const struct watch *watch;
    const struct digest *id;
};

static int is_only_member(void *context)
{
    const struct id_awaited *awaited = context;
    return awaited->watch->count == 1 && digest_equal(&awaited->watch->members[0].id, awaited->id);
}

static void expect_members(const struct watch *watch, uint32_t count, int ready)
{
    struct count_awaited awaited = {watch, count, ready};
    cr_assert(wait_for(has_count, &awaited, WAIT_US), "%u members instead of %u", watch->count,
              count);
}

/* ---- membership -------------------------------------------------------------------------------- */

Test(coordinator, shows_a_member_from_its_join_to_its_leave)
{
    struct instance coordinator;
    struct watch watch;
    struct worker worker;
    start_named(&coordinator, "a");
    watch_open(&watch, coordinator.address);
    cr_expect_eq(watch.count, 0);
    make_worker(&worker);
    join(&worker, coordinator.address, "10.0.0.1:7700");
    expect_members(&watch, 1, 0);
    cr_expect_str_eq(watch.members[0].address, "10.0.0.1:7700");
    cr_expect(digest_equal(&watch.members[0].id, identity_id_view(worker.identity)));
    cr_expect(watch.members[0].first == 0 && watch.members[0].end == 12);
    cr_assert(wait_for(is_assigned, &worker, WAIT_US));
    worker.load.session_count = 42;
    coordinator_client_set_ready(worker.client, NULL, fill_load, &worker);
    expect_members(&watch, 1, 1);
    cr_expect_eq(watch.members[0].load.session_count, 42);
    run_for(5 * HEARTBEAT_MS * 1000);
    cr_expect_eq(watch.count, 1, "heartbeats keep it in");
    cr_expect_eq(worker.lost_count, 0, "%s", worker.failure.text);
    coordinator_client_leave(worker.client, on_left, &worker);
    cr_expect_not(worker.left);
    cr_assert(wait_for(has_left, &worker, WAIT_US));
    expect_members(&watch, 0, -1);
    cr_expect_not(watch.went_back);
    drop(&worker);
    watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: a worker that dies without a word is gone after three heartbeats, not before. */
Test(coordinator, forgets_a_member_that_falls_silent)
{
    struct instance coordinator;
    struct watch watch;
    struct worker worker;
    start_named(&coordinator, "a");
    watch_open(&watch, coordinator.address);
    make_worker(&worker);
    join(&worker, coordinator.address, "10.0.0.1:7700");
    expect_members(&watch, 1, -1);
    const uint64_t silent_us = clock_monotonic_us();
    drop(&worker);
    expect_members(&watch, 0, -1);
    cr_expect_geq(clock_monotonic_us() - silent_us, 2 * HEARTBEAT_MS * 1000);
    watch_close(&watch);
    process_close(&coordinator.process);
}

Test(coordinator, replaces_a_member_that_joins_again_elsewhere)
{
    struct instance coordinator;
    struct watch watch;
    struct worker worker;
    struct worker again;
    start_named(&coordinator, "a");
    watch_open(&watch, coordinator.address);
    make_worker(&worker);
    join(&worker, coordinator.address, "10.0.0.1:7700");
    expect_members(&watch, 1, -1);
    coordinator_client_close(&worker.client);
    make_worker(&again);
    identity_close(&again.identity);
    again.identity = worker.identity;
    worker.identity = NULL;
    join(&again, coordinator.address, "10.0.0.2:7700");
    cr_assert(wait_for(is_assigned, &again, WAIT_US));
    expect_members(&watch, 1, -1);
    run_for(300000);
    cr_expect_str_eq(watch.members[0].address, "10.0.0.2:7700");
    drop(&again);
    watch_close(&watch);
    process_close(&coordinator.process);
}

Test(coordinator, spreads_members_that_ask_for_layers_over_the_model)
{
    struct instance coordinator;
    struct worker workers[3];
    unsigned served = 0;
    start_named(&coordinator, "a");
    for (int i = 0; i < 3; i++) {
        char address[32];
        snprintf(address, sizeof address, "10.0.0.%d:7700", i + 1);
        make_worker(&workers[i]);
        struct coordinator_client_config config =
            member_config(&workers[i], coordinator.address, address);
        config.layer_end = 0;
        config.layer_capacity = 4;
        cr_assert_eq(coordinator_client_open(&workers[i].client, &config), ODSI_OK);
        cr_assert(wait_for(is_assigned, &workers[i], WAIT_US));
        for (uint32_t layer = workers[i].first; layer < workers[i].end; layer++)
            served |= 1u << layer;
    }
    cr_expect_eq(served, 0xfffu);
    for (int i = 0; i < 3; i++)
        drop(&workers[i]);
    process_close(&coordinator.process);
}

Test(coordinator, keeps_an_address_for_the_member_that_is_heard_there)
{
    struct instance coordinator;
    struct watch watch;
    struct worker first;
    struct worker second;
    start_named(&coordinator, "a");
    watch_open(&watch, coordinator.address);
    make_worker(&first);
    make_worker(&second);
    join(&first, coordinator.address, "10.0.0.1:7700");
    cr_assert(wait_for(is_assigned, &first, WAIT_US));
    join(&second, coordinator.address, "10.0.0.1:7700");
    cr_assert(wait_for(is_lost, &second, WAIT_US));
    cr_expect_eq(second.failure.err, ODSI_ERR_EXISTS, "%s", second.failure.text);
    cr_expect_not(second.gave_up);
    cr_expect_eq(second.assigned_count, 0);
    drop(&first); /* and now the other one gets in by itself */
    cr_assert(wait_for(is_assigned, &second, WAIT_US));
    struct id_awaited awaited = {&watch, identity_id_view(second.identity)};
    cr_expect(wait_for(is_only_member, &awaited, WAIT_US));
    drop(&second);
    watch_close(&watch);
    process_close(&coordinator.process);
}

/* ---- bad input --------------------------------------------------------------------------------- */

Test(coordinator, lets_nobody_join_without_an_identity_but_lets_them_read)
{
    struct instance coordinator;
    struct caller caller;
    struct join_request join_request;
    const Odsi__V1__HeartbeatRequest heartbeat = ODSI__V1__HEARTBEAT_REQUEST__INIT;
    const Odsi__V1__LeaveRequest leave = ODSI__V1__LEAVE_REQUEST__INIT;
    const struct instance_config config = {.name = "a", .insecure = 1};
    start(&coordinator, &config);
    cr_assert_null(strchr(coordinator.address, '@'), "%s", coordinator.address);
    caller_open(&caller, coordinator.address, 0);
    fill_request(&join_request);
    cr_expect_eq(call(&caller, "Join", &join_request.request.base), RPC_PERMISSION_DENIED);
    cr_expect(strstr(caller.text, "TLS"), "%s", caller.text);
    cr_expect_eq(call(&caller, "Heartbeat", &heartbeat.base), RPC_PERMISSION_DENIED);
    cr_expect_eq(call(&caller, "Leave", &leave.base), RPC_PERMISSION_DENIED);
    Odsi__V1__Directory *directory = get_directory(&caller);
    cr_expect_eq(directory->n_members, 0);
    rpc_unpack_free(directory);
    caller_close(&caller);
    process_close(&coordinator.process);
}

static void expect_refused(struct caller *caller, struct join_request *request, const char *word)
{
    cr_expect_eq(call(caller, "Join", &request->request.base), RPC_INVALID_ARGUMENT, "%s", word);
    cr_expect(strstr(caller->text, word), "'%s' does not say '%s'", caller->text, word);
    fill_request(request);
}

Test(coordinator, refuses_malformed_requests_by_name_and_goes_on)
{
    struct instance coordinator;
    struct caller caller;
    struct join_request request;
    uint8_t noise[9000];
    start_named(&coordinator, "a");
    caller_open(&caller, coordinator.address, 1);
    fill_request(&request);
    request.request.model = NULL;
    expect_refused(&caller, &request, "model");
    request.model.model_id.len = 31;
    expect_refused(&caller, &request, "model_id");
    memset(request.name, 'n', sizeof request.name - 1);
    expect_refused(&caller, &request, "name");
    memset(request.address, 'a', sizeof request.address - 1);
    expect_refused(&caller, &request, "address");
    snprintf(request.address, sizeof request.address, ":7700");
    expect_refused(&caller, &request, "address");
    memset(request.backend, 'b', sizeof request.backend - 1);
    expect_refused(&caller, &request, "backend");
    request.layers.end = 13;
    expect_refused(&caller, &request, "layers");
    request.request.layers = NULL;
    expect_refused(&caller, &request, "layer_capacity");
    memset(noise, 0xff, sizeof noise);
    cr_expect_eq(call_bytes(&caller, "Join", noise, 100), RPC_INVALID_ARGUMENT);
    cr_expect_eq(call_bytes(&caller, "Heartbeat", noise, 100), RPC_INVALID_ARGUMENT);
    cr_expect_eq(call_bytes(&caller, "Join", noise, sizeof noise), RPC_RESOURCE_EXHAUSTED);
    cr_expect_eq(call_bytes(&caller, "Jion", noise, 1), RPC_UNIMPLEMENTED);
    cr_expect_eq(call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    caller_close(&caller);
    process_close(&coordinator.process);
}

Test(coordinator, tells_an_unknown_member_to_join_again)
{
    struct instance coordinator;
    struct caller caller;
    struct join_request join_request;
    const Odsi__V1__HeartbeatRequest heartbeat = ODSI__V1__HEARTBEAT_REQUEST__INIT;
    const Odsi__V1__LeaveRequest leave = ODSI__V1__LEAVE_REQUEST__INIT;
    start_named(&coordinator, "a");
    caller_open(&caller, coordinator.address, 1);
    fill_request(&join_request);
    for (int known = 0; known < 2; known++) {
        Odsi__V1__HeartbeatReply *reply = NULL;
        cr_assert_eq(call(&caller, "Heartbeat", &heartbeat.base), RPC_OK);
        cr_assert_eq(rpc_unpack_bytes(&reply, &odsi__v1__heartbeat_reply__descriptor,
                                      caller.reply.data, caller.reply.size),
                     ODSI_OK);
        cr_expect_eq(reply->known, known);
        rpc_unpack_free(reply);
        cr_assert_eq(call(&caller, "Join", &join_request.request.base), RPC_OK, "%s", caller.text);
    }
    cr_expect_eq(call(&caller, "Leave", &leave.base), RPC_OK);
    cr_expect_eq(call(&caller, "Leave", &leave.base), RPC_OK, "leaving twice is no error");
    caller_close(&caller);
    process_close(&coordinator.process);
}

Test(coordinator, is_not_believed_by_a_member_that_expects_another_identity)
{
    struct instance coordinator;
    struct worker worker;
    char address[LINE_SIZE];
    start_named(&coordinator, "a");
    snprintf(address, sizeof address, "%s", coordinator.address);
    address[0] = address[0] == '0' ? '1' : '0';
    make_worker(&worker);
    join(&worker, address, "10.0.0.1:7700");
    cr_assert(wait_for(is_lost, &worker, WAIT_US));
    cr_expect_eq(worker.assigned_count, 0);
    cr_expect_not(worker.gave_up);
    drop(&worker);
    process_close(&coordinator.process);
}

Test(coordinator, makes_a_member_with_a_bad_address_give_up)
{
    struct instance coordinator;
    struct worker worker;
    start_named(&coordinator, "a");
    make_worker(&worker);
    join(&worker, coordinator.address, "0.0.0.0:7700");
    cr_assert(wait_for(is_lost, &worker, WAIT_US));
    cr_expect(worker.gave_up);
    cr_expect_eq(worker.failure.err, ODSI_ERR_INVALID);
    cr_expect(strstr(worker.failure.text, "0.0.0.0:7700"), "%s", worker.failure.text);
    coordinator_client_leave(worker.client, on_left, &worker);
    cr_assert(wait_for(has_left, &worker, WAIT_US), "there is nothing to leave");
    drop(&worker);
    process_close(&coordinator.process);
}

/* ---- coming and going of coordinators ---------------------------------------------------------- */

Test(coordinator, stops_within_two_seconds_when_asked)
{
    const int signals[] = {SIGTERM, SIGINT};
    for (int i = 0; i < 2; i++) {
        struct instance coordinator;
        struct watch watch;
        struct worker worker;
        int code = -1;
        start_named(&coordinator, i == 0 ? "a" : "b");
        watch_open(&watch, coordinator.address);
        make_worker(&worker);
        join(&worker, coordinator.address, "10.0.0.1:7700");
        expect_members(&watch, 1, -1);
        process_signal(coordinator.process, signals[i]);
        cr_assert_eq(process_wait(coordinator.process, 2000000, &code), ODSI_OK);
        cr_expect_eq(code, 0);
        cr_expect_eq(access(coordinator.ready_path, F_OK), -1, "the ready file is gone");
        cr_assert(wait_for(is_over, &watch, WAIT_US));
        cr_expect_eq(watch.status, RPC_UNAVAILABLE);
        drop(&worker);
        watch_close(&watch);
        process_close(&coordinator.process);
    }
}

/* Goal: nothing of value is in the process. A member goes on as if nothing had happened, without
 * joining again. */
Test(coordinator, keeps_its_members_over_a_kill_and_a_restart)
{
    struct instance coordinator;
    struct watch watch;
    struct worker worker;
    char place[LINE_SIZE];
    struct instance_config config = {.name = "a", .heartbeat_ms = 1000};
    start(&coordinator, &config);
    snprintf(place, sizeof place, "%s", place_of(&coordinator));
    make_worker(&worker);
    join(&worker, coordinator.address, "10.0.0.1:7700");
    cr_assert(wait_for(is_assigned, &worker, WAIT_US));
    coordinator_client_set_ready(worker.client, NULL, fill_load, &worker);
    watch_open(&watch, coordinator.address);
    expect_members(&watch, 1, 1);
    const uint64_t version = watch.version;
    watch_close(&watch);
    process_close(&coordinator.process); /* SIGKILL */
    config.listen = place;
    start(&coordinator, &config);
    watch_open(&watch, coordinator.address);
    cr_expect_eq(watch.count, 1);
    cr_expect_eq(watch.members[0].ready, 1);
    cr_expect_gt(watch.version, version);
    watch.count_min = 1;
    run_for(5000000); /* longer than three heartbeats */
    cr_expect_eq(watch.count_min, 1);
    cr_expect_eq(watch.members[0].ready, 1);
    cr_expect_eq(worker.assigned_count, 1);
    cr_expect_eq(worker.lost_count, 0, "%s", worker.failure.text);
    drop(&worker);
    watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: when a coordinator comes back that knows nobody, members join again by themselves, with the
 * layers they hold and ready as they were. */
Test(coordinator, gets_its_members_back_when_its_database_is_lost)
{
    struct instance coordinator;
    struct watch watch;
    struct worker worker;
    char place[LINE_SIZE];
    struct instance_config config = {.name = "a"};
    start(&coordinator, &config);
    snprintf(place, sizeof place, "%s", place_of(&coordinator));
    make_worker(&worker);
    struct coordinator_client_config member =
        member_config(&worker, coordinator.address, "10.0.0.1:7700");
    member.layer_end = 0;
    member.layer_capacity = 5;
    cr_assert_eq(coordinator_client_open(&worker.client, &member), ODSI_OK);
    cr_assert(wait_for(is_assigned, &worker, WAIT_US));
    coordinator_client_set_ready(worker.client, NULL, fill_load, &worker);
    process_close(&coordinator.process);
    cr_assert(wait_for(is_lost, &worker, WAIT_US));
    config.listen = place;
    config.store = "sqlite::memory:";
    start(&coordinator, &config);
    watch_open(&watch, coordinator.address);
    expect_members(&watch, 1, 1);
    cr_expect(watch.members[0].first == worker.first && watch.members[0].end == worker.end);
    cr_expect_eq(worker.assigned_count, 1, "the same layers are not assigned twice");
    drop(&worker);
    watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: two coordinators on one database are one: a join at one shows at the other, and when one
 * dies its members go on with the other without ever being missed. */
Test(coordinator, shares_its_database_with_a_second_one)
{
    struct instance a;
    struct instance b;
    struct watch watch;
    struct worker worker;
    char both[2 * LINE_SIZE];
    struct instance_config config = {.name = "a", .heartbeat_ms = 1000};
    start(&a, &config);
    config.name = "b";
    start(&b, &config);
    snprintf(both, sizeof both, "%s,%s", a.address, b.address);
    watch_open(&watch, b.address);
    make_worker(&worker);
    join(&worker, both, "10.0.0.1:7700");
    cr_assert(wait_for(is_assigned, &worker, WAIT_US));
    coordinator_client_set_ready(worker.client, NULL, fill_load, &worker);
    const uint64_t joined_us = clock_monotonic_us();
    expect_members(&watch, 1, 1);
    cr_expect_lt(clock_monotonic_us() - joined_us, 2000000);
    process_close(&a.process); /* SIGKILL */
    watch.count_min = 1;
    run_for(5000000);
    cr_expect_eq(watch.count_min, 1);
    cr_expect_eq(watch.members[0].ready, 1);
    coordinator_client_leave(worker.client, on_left, &worker);
    cr_assert(wait_for(has_left, &worker, WAIT_US));
    expect_members(&watch, 0, -1);
    cr_expect_not(watch.went_back);
    drop(&worker);
    watch_close(&watch);
    process_close(&b.process);
}

/* Goal: a coordinator that did not run does not blame its members for it.
 * Method: stopped for longer than three heartbeats, then continued. */
Test(coordinator, forgives_silence_in_a_time_when_it_was_stopped_itself)
{
    struct instance coordinator;
    struct watch watch;
    struct worker worker;
    start_named(&coordinator, "a");
    watch_open(&watch, coordinator.address);
    make_worker(&worker);
    join(&worker, coordinator.address, "10.0.0.1:7700");
    expect_members(&watch, 1, -1);
    process_signal(coordinator.process, SIGSTOP);
    run_for(2500000);
    process_signal(coordinator.process, SIGCONT);
    watch.count_min = 1;
    run_for(2500000);
    cr_expect_eq(watch.count_min, 1);
    cr_expect_eq(worker.assigned_count, 1);
    drop(&worker);
    watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: who does not read holds nobody up, and then sees the newest. */
Test(coordinator, gives_a_slow_watcher_the_newest_directory)
{
    struct instance coordinator;
    struct watch slow;
    struct watch quick;
    struct worker worker;
    start_named(&coordinator, "a");
    watch_open(&slow, coordinator.address);
    watch_open(&quick, coordinator.address);
    make_worker(&worker);
    rpc_call_pause(slow.call);
    for (int i = 0; i < 20; i++) {
        worker.assigned_count = 0;
        join(&worker, coordinator.address, "10.0.0.1:7700");
        cr_assert(wait_for(is_assigned, &worker, WAIT_US));
        expect_members(&quick, 1, -1);
        worker.left = 0;
        coordinator_client_leave(worker.client, on_left, &worker);
        cr_assert(wait_for(has_left, &worker, WAIT_US));
        expect_members(&quick, 0, -1);
        coordinator_client_close(&worker.client);
    }
    join(&worker, coordinator.address, "10.0.0.1:7700");
    expect_members(&quick, 1, -1);
    rpc_call_resume(slow.call);
    struct version_awaited awaited = {&slow, quick.version};
    cr_expect(wait_for(has_version, &awaited, WAIT_US));
    cr_expect_eq(slow.count, 1);
    cr_expect_eq(quick.message_count, 42);
    cr_expect_not(slow.went_back);
    drop(&worker);
    watch_close(&slow);
    watch_close(&quick);
    process_close(&coordinator.process);
}

/* ---- disks ------------------------------------------------------------------------------------- */

/* Goal: with no room to write, reading goes on and the process lives; with room again, joining does.
 * Method: a limit on the size of the files that the process may write. */
Test(coordinator, goes_on_answering_when_its_disk_is_full)
{
    struct instance coordinator;
    struct caller caller;
    struct join_request request;
    struct rlimit limit;
    enum rpc_status status = RPC_OK;
    start_named(&coordinator, "a");
    caller_open(&caller, coordinator.address, 1);
    fill_request(&request);
    cr_assert_eq(call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    cr_assert_eq(prlimit(process_pid(coordinator.process), RLIMIT_FSIZE, NULL, &limit), 0);
    limit.rlim_cur = 100000;
    cr_assert_eq(prlimit(process_pid(coordinator.process), RLIMIT_FSIZE, &limit, NULL), 0);
    for (int i = 0; i < 200 && status == RPC_OK; i++)
        status = call(&caller, "Join", &request.request.base);
    cr_expect_neq(status, RPC_OK);
    Odsi__V1__Directory *directory = get_directory(&caller);
    cr_expect_eq(directory->n_members, 1);
    rpc_unpack_free(directory);
    limit.rlim_cur = limit.rlim_max;
    cr_assert_eq(prlimit(process_pid(coordinator.process), RLIMIT_FSIZE, &limit, NULL), 0);
    cr_expect_eq(call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    caller_close(&caller);
    process_close(&coordinator.process);
}

/* ---- command line ------------------------------------------------------------------------------ */

/* Runs the program to its end; standard error must hold word in one line. */
static void expect_exit(const char *const *args, int code, const char *word)
{
    char path[PROCESS_PATH_SIZE];
    char *log = NULL;
    int got = -1;
    const struct process_config config = {
        .program = "odsi-coordinator", .args = args, .folder = folder, .name = "run"};
    cr_assert_eq(process_path(path, folder, "run.log"), ODSI_OK);
    unlink(path);
    cr_assert_eq(process_run(&config, WAIT_US, &got), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_read_file(&log, path), ODSI_OK);
    cr_expect_eq(got, code, "%s: %d, %s", args[0], got, log);
    if (code != 0) {
        cr_expect(strstr(log, word), "%s", log);
        cr_expect_eq(strchr(log, '\n'), log + strlen(log) - 1, "more than one line: %s", log);
    }
    alloc_free(log);
}

Test(coordinator, says_in_one_line_what_is_wrong_with_its_flags)
{
    char key[PROCESS_PATH_SIZE];
    cr_assert_eq(process_path(key, folder, "key.pem"), ODSI_OK);
    expect_exit((const char *[]){"--help", NULL}, 0, "");
    expect_exit((const char *[]){"--version", NULL}, 0, "");
    expect_exit((const char *[]){"--nonsense", NULL}, 2, "--nonsense");
    expect_exit((const char *[]){"more", NULL}, 2, "more");
    expect_exit((const char *[]){"--log-level", "loud", NULL}, 2, "loud");
    expect_exit((const char *[]){"--store", "postgresql://u:pass@h/d", "--identity", key, NULL}, 2,
                "PostgreSQL");
    expect_exit((const char *[]){"--store", "nosql", "--identity", key, NULL}, 2, "nosql");
    expect_exit((const char *[]){"--heartbeat-ms", "1", "--store", "sqlite::memory:", "--identity",
                                 key, NULL},
                2, "heartbeat");
    expect_exit(
        (const char *[]){"--insecure", "--listen", "0.0.0.0:0", "--store", "sqlite::memory:", NULL},
        1, "0.0.0.0:0");
    expect_exit((const char *[]){"--store", "sqlite:/nonexistent/x.db", "--identity", key, NULL}, 1,
                "/nonexistent/x.db");
}

Test(coordinator, refuses_a_port_in_use_and_a_file_that_is_no_database)
{
    struct instance coordinator;
    char key[PROCESS_PATH_SIZE];
    char path[PROCESS_PATH_SIZE];
    char store[PROCESS_PATH_SIZE + 8];
    cr_assert_eq(process_path(key, folder, "key.pem"), ODSI_OK);
    cr_assert_eq(process_path(path, folder, "noise.db"), ODSI_OK);
    snprintf(store, sizeof store, "sqlite:%s", path);
    start_named(&coordinator, "a");
    expect_exit((const char *[]){"--listen", place_of(&coordinator), "--store",
                                 "sqlite::memory:", "--identity", key, NULL},
                1, place_of(&coordinator));
    const int file = open(path, O_WRONLY | O_CREAT, 0600);
    cr_assert_geq(file, 0);
    for (int i = 0; i < 1000; i++)
        cr_assert_eq(write(file, "not a database ", 15), 15);
    close(file);
    expect_exit((const char *[]){"--store", store, "--identity", key, NULL}, 1, path);
    process_close(&coordinator.process);
}
