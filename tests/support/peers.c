#include "tests/support/peers.h"

#include "common/base/clock.h"
#include "common/net/rpc_pack.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#define CALL_US 10000000u
#define STEP_US 2000u /* between two looks at what a test waits for */

void peers_open(struct peers *self)
{
    cr_assert_eq(process_folder_make(self->folder), ODSI_OK, "%s", odsi_err_text());
    snprintf(self->database, sizeof self->database, "sqlite:%s/odsi.db", self->folder);
    cr_assert_eq(rpc_loop_open(&self->loop), ODSI_OK);
}

void peers_close(struct peers *self)
{
    rpc_loop_close(&self->loop);
    process_folder_remove(self->folder);
}

/* ---- waiting --------------------------------------------------------------------------------- */

struct waiting {
    struct peers *peers;
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
        rpc_loop_stop(self->peers->loop);
    else
        cr_assert_eq(rpc_timer_start(&self->timer, self->peers->loop, STEP_US, look, self),
                     ODSI_OK);
}

int peers_wait_for(struct peers *peers, int (*is_true)(void *context), void *context,
                   uint64_t timeout_us)
{
    struct waiting self = {.peers = peers,
                           .is_true = is_true,
                           .context = context,
                           .until_us = clock_monotonic_us() + timeout_us};
    cr_assert_eq(rpc_timer_start(&self.timer, peers->loop, 0, look, &self), ODSI_OK);
    rpc_loop_run(peers->loop);
    return self.result;
}

void peers_run_for(struct peers *peers, uint64_t time_us)
{
    (void)peers_wait_for(peers, NULL, NULL, time_us);
}

/* ---- coordinators ---------------------------------------------------------------------------- */

void peers_start(struct peers *peers, struct peers_instance *self,
                 const struct peers_instance_config *config)
{
    char key[PROCESS_PATH_SIZE];
    char file[64];
    char heartbeat[16];
    snprintf(file, sizeof file, "%s.ready", config->name);
    cr_assert_eq(process_path(self->ready_path, peers->folder, file), ODSI_OK);
    snprintf(file, sizeof file, "%s.pem", config->name);
    cr_assert_eq(process_path(key, peers->folder, file), ODSI_OK);
    snprintf(heartbeat, sizeof heartbeat, "%u",
             config->heartbeat_ms ? config->heartbeat_ms : PEERS_HEARTBEAT_MS);
    const char *args[] = {"--listen",
                          config->listen ? config->listen : "127.0.0.1:0",
                          "--store",
                          config->store ? config->store : peers->database,
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
        .program = "odsi-coordinator", .args = args, .folder = peers->folder, .name = config->name};
    cr_assert_eq(process_start(&self->process, &process), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_wait_line(self->process, self->ready_path, PEERS_WAIT_US, self->address,
                                   sizeof self->address),
                 ODSI_OK, "%s", odsi_err_text());
}

void peers_start_named(struct peers *peers, struct peers_instance *self, const char *name)
{
    const struct peers_instance_config config = {.name = name};
    peers_start(peers, self, &config);
}

const char *peers_place_of(const struct peers_instance *self)
{
    const char *at = strchr(self->address, '@');
    return at ? at + 1 : self->address;
}

/* ---- members --------------------------------------------------------------------------------- */

static void on_assigned(void *context, uint32_t layer_first, uint32_t layer_end)
{
    struct peers_worker *self = context;
    self->first = layer_first;
    self->end = layer_end;
    self->assigned_count++;
}

static void on_lost(void *context, const struct odsi_failure *failure, int retrying)
{
    struct peers_worker *self = context;
    self->failure = *failure;
    self->lost_count++;
    self->gave_up |= !retrying;
}

void peers_fill_load(void *context, struct coordinator_load *out)
{
    const struct peers_worker *self = context;
    *out = self->load;
}

struct coordinator_client_config peers_worker_config(struct peers_worker *self,
                                                     const char *addresses, const char *address)
{
    struct coordinator_client_config config = {
        .loop = self->peers->loop,
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

void peers_worker_make(struct peers *peers, struct peers_worker *self)
{
    memset(self, 0, sizeof *self);
    self->peers = peers;
    cr_assert_eq(identity_make(&self->identity), ODSI_OK);
}

void peers_worker_join(struct peers_worker *self, const char *addresses, const char *address)
{
    const struct coordinator_client_config config = peers_worker_config(self, addresses, address);
    cr_assert_eq(coordinator_client_open(&self->client, &config), ODSI_OK, "%s", odsi_err_text());
}

void peers_on_left(void *context)
{
    struct peers_worker *self = context;
    self->left = 1;
}

int peers_is_assigned(void *context)
{
    const struct peers_worker *self = context;
    return self->assigned_count > 0;
}

int peers_is_lost(void *context)
{
    const struct peers_worker *self = context;
    return self->lost_count > 0;
}

int peers_has_left(void *context)
{
    const struct peers_worker *self = context;
    return self->left;
}

void peers_worker_drop(struct peers_worker *self)
{
    coordinator_client_close(&self->client);
    peers_run_for(self->peers, 20000); /* what it had under way comes back as cancelled */
    identity_close(&self->identity);
}

/* ---- plain calls ----------------------------------------------------------------------------- */

void peers_caller_open(struct peers *peers, struct peers_caller *self, const char *address,
                       int with_tls)
{
    char place[LIMIT_ADDRESS_SIZE];
    struct digest id;
    int has_id = 0;
    memset(self, 0, sizeof *self);
    self->peers = peers;
    buf_init(&self->reply, LIMIT_CONTROL_MESSAGE_SIZE);
    cr_assert_eq(rpc_address_read(address, place, &id, &has_id), ODSI_OK);
    if (with_tls)
        cr_assert_eq(identity_make(&self->identity), ODSI_OK);
    const struct rpc_channel_config config = {
        .address = place, .identity = self->identity, .peer_id = has_id ? &id : NULL};
    cr_assert_eq(rpc_channel_open(&self->channel, peers->loop, &config), ODSI_OK, "%s",
                 odsi_err_text());
}

void peers_caller_close(struct peers_caller *self)
{
    rpc_channel_close(&self->channel);
    peers_run_for(self->peers, 20000);
    identity_close(&self->identity);
    buf_free(&self->reply);
}

static void on_reply(void *context, enum rpc_status status, const char *text,
                     const struct rpc_message *reply)
{
    struct peers_caller *self = context;
    self->is_answered = 1;
    self->status = status;
    snprintf(self->text, sizeof self->text, "%s", text ? text : "");
    for (size_t i = 0; reply && i < reply->piece_count; i++)
        cr_assert_eq(buf_append(&self->reply, reply->pieces[i].data, reply->pieces[i].size),
                     ODSI_OK);
}

static int is_answered(void *context)
{
    const struct peers_caller *self = context;
    return self->is_answered;
}

enum rpc_status peers_call_bytes(struct peers_caller *self, const char *method, const void *data,
                                 size_t size)
{
    char path[64];
    snprintf(path, sizeof path, "/odsi.v1.Coordinator/%s", method);
    self->is_answered = 0;
    buf_reset(&self->reply);
    cr_assert_eq(rpc_unary(self->channel, path, CALL_US, 1, data, size, on_reply, self), ODSI_OK);
    cr_assert(peers_wait_for(self->peers, is_answered, self, PEERS_WAIT_US));
    return self->status;
}

enum rpc_status peers_call(struct peers_caller *self, const char *method,
                           const ProtobufCMessage *request)
{
    struct buf packed;
    buf_init(&packed, 65536);
    cr_assert_eq(rpc_pack(&packed, request), ODSI_OK);
    const enum rpc_status status = peers_call_bytes(self, method, packed.data, packed.size);
    buf_free(&packed);
    return status;
}

Odsi__V1__Directory *peers_get_directory(struct peers_caller *self)
{
    const Odsi__V1__GetDirectoryRequest request = ODSI__V1__GET_DIRECTORY_REQUEST__INIT;
    Odsi__V1__Directory *directory = NULL;
    cr_assert_eq(peers_call(self, "GetDirectory", &request.base), RPC_OK, "%s", self->text);
    cr_assert_eq(rpc_unpack_bytes(&directory, &odsi__v1__directory__descriptor, self->reply.data,
                                  self->reply.size),
                 ODSI_OK);
    return directory;
}

void peers_join_request(struct peers_join_request *self)
{
    *self = (struct peers_join_request){.request = ODSI__V1__JOIN_REQUEST__INIT,
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

/* ---- watchers -------------------------------------------------------------------------------- */

static void watch_message(void *user, struct rpc_call *rpc, const struct rpc_message *message)
{
    struct peers_watch *self = user;
    Odsi__V1__Directory *directory = NULL;
    (void)rpc;
    const enum odsi_err err = rpc_unpack(&directory, &odsi__v1__directory__descriptor, message);
    if (self->is_tolerant && err != ODSI_OK)
        return;
    cr_assert_eq(err, ODSI_OK, "%s", odsi_err_text());
    cr_assert_leq(directory->n_members, PEERS_MEMBERS_MAX);
    self->went_back |= self->message_count > 0 && directory->version <= self->version;
    self->message_count++;
    self->version = directory->version;
    self->count = (uint32_t)directory->n_members;
    if (self->count < self->count_min)
        self->count_min = self->count;
    for (uint32_t i = 0; i < self->count; i++) {
        const Odsi__V1__Member *member = directory->members[i];
        struct peers_seen *seen = &self->members[i];
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
    struct peers_watch *self = user;
    (void)rpc;
    (void)text;
    self->is_done = 1;
    self->status = status;
}

static int has_directory(void *context)
{
    const struct peers_watch *self = context;
    return self->message_count > 0;
}

void peers_watch_open(struct peers *peers, struct peers_watch *self, const char *address)
{
    static const struct rpc_handler handler = {.on_message = watch_message, .on_done = watch_done};
    memset(self, 0, sizeof *self);
    peers_caller_open(peers, &self->caller, address, 1);
    cr_assert_eq(rpc_call_open(&self->call, self->caller.channel,
                               "/odsi.v1.Coordinator/WatchDirectory", 0, 1, &handler, self),
                 ODSI_OK);
    cr_assert_eq(rpc_call_send(self->call, "", 0), ODSI_OK);
    rpc_call_half_close(self->call);
    cr_assert(peers_wait_for(peers, has_directory, self, PEERS_WAIT_US));
}

int peers_is_watch_over(void *context)
{
    const struct peers_watch *self = context;
    return self->is_done;
}

void peers_watch_close(struct peers_watch *self)
{
    if (!self->is_done)
        rpc_call_cancel(self->call);
    cr_assert(peers_wait_for(self->caller.peers, peers_is_watch_over, self, PEERS_WAIT_US));
    peers_caller_close(&self->caller);
}

struct count_awaited {
    const struct peers_watch *watch;
    uint32_t count;
    int ready; /* all of them; -1: either */
};

static int has_count(void *context)
{
    const struct count_awaited *awaited = context;
    const struct peers_watch *watch = awaited->watch;
    for (uint32_t i = 0; i < watch->count; i++)
        if (awaited->ready >= 0 && watch->members[i].ready != awaited->ready)
            return 0;
    return watch->count == awaited->count;
}

int peers_has_version(void *context)
{
    const struct peers_version_awaited *awaited = context;
    return awaited->watch->version == awaited->version;
}

int peers_is_only_member(void *context)
{
    const struct peers_id_awaited *awaited = context;
    return awaited->watch->count == 1 && digest_equal(&awaited->watch->members[0].id, awaited->id);
}

void peers_expect_members(const struct peers_watch *watch, uint32_t count, int ready)
{
    struct count_awaited awaited = {watch, count, ready};
    cr_assert(peers_wait_for(watch->caller.peers, has_count, &awaited, PEERS_WAIT_US),
              "%u members instead of %u", watch->count, count);
}
