#include "worker/gateway/directory_client.h"

#include "common/base/alloc.h"
#include "common/base/io.h"
#include "common/base/log.h"
#include "common/net/rpc_call.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/coordinator.pb-c.h"
#include "worker/gateway/known_peers.h"

#include <stdio.h>
#include <string.h>

#define WATCH_PATH       "/odsi.v1.Coordinator/WatchDirectory"
#define FIRST_MESSAGE_US 5000000u
#define PAUSE_MIN_US     100000u
#define PAUSE_MAX_US     5000000u
/* A full directory: LIMIT_MEMBERS_MAX members of some 700 bytes at most. */
#define DIRECTORY_SIZE_MAX (LIMIT_MEMBERS_MAX * 1024u)

struct coordinator {
    char address[LIMIT_ADDRESS_SIZE];
    struct digest id;
    int has_id;
};

struct directory_client {
    struct rpc_loop *loop;
    const struct identity *identity;
    char known_peers_path[IO_PATH_SIZE];
    char cache_path[IO_PATH_SIZE];
    struct directory *directory;
    void (*on_update)(void *context, int members_changed);
    void *context;

    struct coordinator coordinators[DIRECTORY_CLIENT_COORDINATORS_MAX];
    uint32_t coordinator_count;
    uint32_t current;
    struct rpc_channel *channel;
    struct rpc_call *call; /* until its on_done */
    struct rpc_timer timer;
    uint64_t pause_us;
    int received;                     /* on this call */
    char refusal[ODSI_ERR_TEXT_SIZE]; /* why we refused the peer */
    char trouble[ODSI_ERR_TEXT_SIZE];
    char logged[ODSI_ERR_TEXT_SIZE];

    int closing;
    void (*on_closed)(void *context);
    void *closed_context;
};

static void watch(void *context);

static enum odsi_err read_list(struct directory_client *self, const char *list)
{
    while (*list) {
        char one[LIMIT_ADDRESS_SIZE + DIGEST_HEX_SIZE + 1];
        const size_t size = strcspn(list, ",");
        if (size == 0 || size >= sizeof one)
            return odsi_fail(ODSI_ERR_INVALID,
                             "--coordinator: an entry of %zu bytes; expected [ID@]host:port", size);
        if (self->coordinator_count == DIRECTORY_CLIENT_COORDINATORS_MAX)
            return odsi_fail(ODSI_ERR_INVALID, "--coordinator: more than %u addresses",
                             DIRECTORY_CLIENT_COORDINATORS_MAX);
        memcpy(one, list, size);
        one[size] = '\0';
        struct coordinator *entry = &self->coordinators[self->coordinator_count++];
        const enum odsi_err err = rpc_address_read(one, entry->address, &entry->id, &entry->has_id);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "--coordinator");
        list += size;
        list += *list == ',';
    }
    if (self->coordinator_count == 0)
        return odsi_fail(ODSI_ERR_INVALID, "--coordinator is needed: [ID@]host:port");
    return ODSI_OK;
}

/* The same trouble every few seconds is said once. */
static void note_trouble(struct directory_client *self, const char *text)
{
    snprintf(self->trouble, sizeof self->trouble, "%s", text);
    if (strcmp(self->trouble, self->logged) == 0)
        return;
    snprintf(self->logged, sizeof self->logged, "%s", text);
    log_line(LOG_WARN, "%s", text);
}

static int accept_peer(void *context, const struct digest *peer_id)
{
    struct directory_client *self = context;
    const char *address = self->coordinators[self->current].address;
    const enum odsi_err err = known_peers_check(self->known_peers_path, address, peer_id);
    if (err == ODSI_OK)
        return 1;
    snprintf(self->refusal, sizeof self->refusal, "coordinator %.*s", ODSI_ERR_TEXT_SIZE - 16,
             odsi_err_text());
    return 0;
}

static int copy_text(char *out, size_t out_size, const char *text)
{
    const size_t size = strlen(text);
    if (size >= out_size)
        return 0;
    memcpy(out, text, size + 1);
    return 1;
}

static int copy_id(struct digest *out, const ProtobufCBinaryData *bytes)
{
    if (bytes->len != DIGEST_SIZE)
        return 0;
    memcpy(out->bytes, bytes->data, DIGEST_SIZE);
    return 1;
}

static int read_member(struct directory_member *out, const Odsi__V1__Member *from)
{
    memset(out, 0, sizeof *out);
    if (!from->model || !from->layers || !copy_id(&out->worker_id, &from->worker_id) ||
        !copy_id(&out->model_id, &from->model->model_id) ||
        !copy_text(out->address, sizeof out->address, from->address) ||
        !copy_text(out->model_name, sizeof out->model_name, from->model->name))
        return 0;
    out->layer_count = from->model->layer_count;
    out->context_length = from->model->context_length;
    out->numerics_version = from->model->numerics_version;
    out->layer_first = from->layers->first;
    out->layer_end = from->layers->end;
    if (from->capability) {
        out->prefill_tokens_per_s = from->capability->prefill_tokens_per_s;
        out->decode_tokens_per_s = from->capability->decode_tokens_per_s;
        out->kv_token_capacity = from->capability->kv_token_capacity;
    }
    if (from->load) {
        out->session_count = from->load->session_count;
        out->queued_step_count = from->load->queued_step_count;
        out->kv_tokens_free = from->load->kv_tokens_free;
    }
    return 1;
}

static void take_directory(struct directory_client *self, const Odsi__V1__Directory *from)
{
    uint32_t left_out = 0;
    directory_begin(self->directory, from->version);
    for (size_t i = 0; i < from->n_members; i++) {
        struct directory_member member;
        if (!from->members[i]->ready)
            continue;
        left_out += !read_member(&member, from->members[i]) ||
                    directory_add(self->directory, &member) != ODSI_OK;
    }
    const int changed = directory_commit(self->directory);
    if (changed) {
        uint32_t count = 0;
        directory_members_view(self->directory, &count);
        log_line(LOG_INFO, "directory version %llu: %u workers are ready%s",
                 (unsigned long long)from->version, count,
                 left_out ? "; broken entries were left out" : "");
        if (directory_save(self->directory, self->cache_path) != ODSI_OK)
            log_line(LOG_WARN, "the directory could not be kept: %s", odsi_err_text());
    }
    self->on_update(self->context, changed);
}

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct directory_client *self = user;
    if (self->closing)
        return;
    Odsi__V1__Directory *directory = NULL;
    if (rpc_unpack(&directory, &odsi__v1__directory__descriptor, message) != ODSI_OK) {
        snprintf(self->refusal, sizeof self->refusal, "coordinator %s sent a broken directory",
                 self->coordinators[self->current].address);
        rpc_call_cancel(call);
        return;
    }
    if (!self->received) {
        self->received = 1;
        self->pause_us = PAUSE_MIN_US;
        rpc_timer_cancel(&self->timer);
        log_line(LOG_INFO, "watching coordinator %s", self->coordinators[self->current].address);
    }
    self->trouble[0] = '\0';
    self->logged[0] = '\0';
    take_directory(self, directory);
    rpc_unpack_free(directory);
}

static void finish_close(struct directory_client *self)
{
    void (*on_closed)(void *context) = self->on_closed;
    void *context = self->closed_context;
    alloc_free(self);
    if (on_closed)
        on_closed(context);
}

/* Goes on with the next coordinator after a pause. */
static void try_next(struct directory_client *self)
{
    self->current = (self->current + 1) % self->coordinator_count;
    const uint64_t pause_us = self->pause_us;
    self->pause_us = pause_us * 2 < PAUSE_MAX_US ? pause_us * 2 : PAUSE_MAX_US;
    if (rpc_timer_start(&self->timer, self->loop, pause_us, watch, self) != ODSI_OK)
        log_line(LOG_ERROR, "the coordinators are watched no longer: %s", odsi_err_text());
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct directory_client *self = user;
    (void)call;
    self->call = NULL;
    rpc_channel_close(&self->channel);
    rpc_timer_cancel(&self->timer);
    if (self->closing) {
        finish_close(self);
        return;
    }
    char trouble[ODSI_ERR_TEXT_SIZE];
    snprintf(trouble, sizeof trouble, "coordinator %s: %s (status %d)",
             self->coordinators[self->current].address, text && *text ? text : "it ended the watch",
             (int)status);
    note_trouble(self, self->refusal[0] ? self->refusal : trouble);
    try_next(self);
}

static void on_silence(void *context)
{
    struct directory_client *self = context;
    snprintf(self->refusal, sizeof self->refusal,
             "coordinator %s sent no directory within %u seconds",
             self->coordinators[self->current].address, FIRST_MESSAGE_US / 1000000u);
    if (self->call)
        rpc_call_cancel(self->call);
}

static const struct rpc_handler handler = {.on_message = on_message, .on_done = on_done};

static enum odsi_err start_watch(struct directory_client *self)
{
    const struct coordinator *coordinator = &self->coordinators[self->current];
    const struct rpc_channel_config config = {
        .address = coordinator->address,
        .identity = self->identity,
        .peer_id = coordinator->has_id ? &coordinator->id : NULL,
        .accept_peer = accept_peer,
        .accept_context = self,
        .receive_size_max = DIRECTORY_SIZE_MAX,
    };
    const Odsi__V1__WatchDirectoryRequest request = ODSI__V1__WATCH_DIRECTORY_REQUEST__INIT;
    self->received = 0;
    self->refusal[0] = '\0';
    enum odsi_err err = rpc_channel_open(&self->channel, self->loop, &config);
    if (err == ODSI_OK)
        err = rpc_call_open(&self->call, self->channel, WATCH_PATH, 0, 0, &handler, self);
    if (err != ODSI_OK)
        return err;
    err = rpc_send(self->call, &request.base);
    if (err == ODSI_OK)
        err = rpc_timer_start(&self->timer, self->loop, FIRST_MESSAGE_US, on_silence, self);
    if (err != ODSI_OK) {
        rpc_call_cancel(self->call); /* on_done goes on from here */
        return ODSI_OK;
    }
    rpc_call_half_close(self->call);
    return ODSI_OK;
}

static void watch(void *context)
{
    struct directory_client *self = context;
    if (start_watch(self) == ODSI_OK)
        return;
    note_trouble(self, odsi_err_text());
    rpc_channel_close(&self->channel);
    try_next(self);
}

enum odsi_err directory_client_open(struct directory_client **out, struct rpc_loop *loop,
                                    const struct directory_client_config *config)
{
    struct directory_client *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->loop = loop;
    self->identity = config->identity;
    self->directory = config->directory;
    self->on_update = config->on_update;
    self->context = config->context;
    self->pause_us = PAUSE_MIN_US;
    snprintf(self->known_peers_path, sizeof self->known_peers_path, "%s", config->known_peers_path);
    snprintf(self->cache_path, sizeof self->cache_path, "%s", config->cache_path);
    err = read_list(self, config->coordinators);
    if (err == ODSI_OK)
        err = rpc_timer_start(&self->timer, loop, 0, watch, self);
    if (err != ODSI_OK) {
        alloc_free(self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void directory_client_close(struct directory_client **self_pointer,
                            void (*on_closed)(void *context), void *context)
{
    struct directory_client *self = *self_pointer;
    *self_pointer = NULL;
    if (!self)
        return;
    self->closing = 1;
    self->on_closed = on_closed;
    self->closed_context = context;
    rpc_timer_cancel(&self->timer);
    if (self->call)
        rpc_call_cancel(self->call);
    else
        finish_close(self);
}

const char *directory_client_trouble_view(const struct directory_client *self)
{
    return self->trouble;
}
