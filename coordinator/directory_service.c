#include "coordinator/directory_service.h"

#include "common/base/alloc.h"
#include "common/base/buf.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/coordinator.pb-c.h"

#include <string.h>

#define FRESH_US        100000u  /* load and silence in a reply may be this old */
#define PUBLISH_MIN_US  2000u    /* changes this close together go out as one */
#define PUBLISH_MAX_US  2000000u /* and no change waits longer than this */
#define PACK_SHARE      10u      /* one part in this many of the time may go to packing */
#define MEMBER_TAG      0x12u    /* field 2 of Directory, length-delimited */
#define VERSION_TAG     0x08u    /* field 1, varint */
#define MEMBER_SIZE_MAX 1024u

/* One call of WatchDirectory. */
struct watcher {
    struct directory_service *service;
    struct rpc_call *call;
    struct watcher *next;
    struct watcher *previous;
    int asked;              /* its request came; it is counted and in the list */
    uint64_t sent_version;  /* of the last directory queued for it */
    size_t sending_size;    /* bytes of it under way; 0: it has taken everything */
    uint64_t sending_at_us; /* since when */
};

struct directory_service {
    struct rpc_loop *loop;
    struct store *store;
    const struct clock *clock; /* for rows; ages here are monotonic */
    struct rpc_timer publish_timer;
    int publish_waits;
    uint64_t version; /* newest that we know of */

    struct buf packed; /* the Directory message */
    struct buf scratch;
    int is_packed;
    uint64_t packed_version;
    uint64_t packed_at_us;
    uint64_t pack_cost_us; /* of the last packing */
    uint64_t row_now_us;   /* of the packing under way */

    struct watcher *watchers;
    uint32_t watcher_count;
    size_t sending_size; /* of all watchers */
};

static void publish(void *context);
static void publish_later(struct directory_service *self);

/* ---- packing --------------------------------------------------------------------------------- */

static void append_varint(struct buf *out, uint64_t value)
{
    while (value >= 0x80) {
        (void)buf_append_u8(out, (uint8_t)(value | 0x80));
        value >>= 7;
    }
    (void)buf_append_u8(out, (uint8_t)value);
}

/* protobuf-c's structs have no const texts; packing does not write to them. */
static char *text_of(const char *text)
{
    char *unconst = NULL;
    memcpy(&unconst, &text, sizeof unconst);
    return unconst;
}

static ProtobufCBinaryData bytes_of(const struct digest *id)
{
    ProtobufCBinaryData data = {.len = DIGEST_SIZE};
    const uint8_t *bytes = id->bytes;
    memcpy(&data.data, &bytes, sizeof data.data);
    return data;
}

static uint32_t silent_ms(const struct member *row, uint64_t now_us)
{
    const uint64_t silent = members_silence_us(row, now_us) / 1000;
    return silent < UINT32_MAX ? (uint32_t)silent : UINT32_MAX;
}

static enum odsi_err pack_member(struct buf *out, const struct member *row, uint64_t now_us)
{
    Odsi__V1__ModelDescription model = ODSI__V1__MODEL_DESCRIPTION__INIT;
    Odsi__V1__LayerRange layers = ODSI__V1__LAYER_RANGE__INIT;
    Odsi__V1__Capability capability = ODSI__V1__CAPABILITY__INIT;
    Odsi__V1__Load load = ODSI__V1__LOAD__INIT;
    Odsi__V1__Member member = ODSI__V1__MEMBER__INIT;
    model.model_id = bytes_of(&row->model.id);
    model.name = text_of(row->model.name);
    model.layer_count = row->model.layer_count;
    model.context_length = row->model.context_length;
    model.numerics_version = row->model.numerics_version;
    layers.first = row->layer_first;
    layers.end = row->layer_end;
    capability.memory_size = row->capability.memory_size;
    capability.kv_token_capacity = row->capability.kv_token_capacity;
    capability.prefill_tokens_per_s = row->capability.prefill_tokens_per_s;
    capability.decode_tokens_per_s = row->capability.decode_tokens_per_s;
    capability.backend = text_of(row->capability.backend);
    capability.thread_count = row->capability.thread_count;
    load.session_count = row->load.session_count;
    load.queued_step_count = row->load.queued_step_count;
    load.kv_tokens_free = row->load.kv_tokens_free;
    member.worker_id = bytes_of(&row->worker_id);
    member.address = text_of(row->address);
    member.model = &model;
    member.layers = &layers;
    member.capability = &capability;
    member.load = &load;
    member.ready = row->ready != 0;
    member.silent_ms = silent_ms(row, now_us);
    return rpc_pack(out, &member.base);
}

static enum odsi_err add_member(void *context, const struct member *row)
{
    struct directory_service *self = context;
    const enum odsi_err err = pack_member(&self->scratch, row, self->row_now_us);
    if (err != ODSI_OK)
        return err;
    (void)buf_append_u8(&self->packed, MEMBER_TAG);
    append_varint(&self->packed, self->scratch.size);
    return buf_append(&self->packed, self->scratch.data, self->scratch.size);
}

/* Reads everything from the store and packs it. One member after the other, so that the whole
 * directory is never there as thousands of small objects. */
static enum odsi_err pack(struct directory_service *self)
{
    const uint64_t start_us = clock_monotonic_us();
    uint64_t version = 0;
    self->is_packed = 0;
    buf_reset(&self->packed);
    self->row_now_us = clock_now_us(self->clock);
    enum odsi_err err = store_read(self->store, &version, add_member, self);
    if (err != ODSI_OK)
        return err;
    (void)buf_append_u8(&self->packed, VERSION_TAG);
    append_varint(&self->packed, version);
    err = buf_status(&self->packed);
    if (err != ODSI_OK)
        return err;
    self->packed_at_us = clock_monotonic_us();
    self->pack_cost_us = self->packed_at_us - start_us;
    self->packed_version = version;
    if (version > self->version)
        self->version = version;
    self->is_packed = 1;
    return ODSI_OK;
}

static uint64_t pack_interval_us(const struct directory_service *self, uint64_t least_us)
{
    const uint64_t wanted_us = self->pack_cost_us * PACK_SHARE;
    const uint64_t capped_us = wanted_us < PUBLISH_MAX_US ? wanted_us : PUBLISH_MAX_US;
    return capped_us > least_us ? capped_us : least_us;
}

enum odsi_err directory_service_notice(struct directory_service *self)
{
    uint64_t version = 0;
    const enum odsi_err err = store_version(self->store, &version);
    if (err == ODSI_OK && version != self->version) {
        self->version = version;
        publish_later(self);
    }
    return err;
}

/* Makes packed the newest version, and not older than load may be. */
static enum odsi_err refresh(struct directory_service *self)
{
    const enum odsi_err err = directory_service_notice(self);
    if (err != ODSI_OK)
        return err;
    const uint64_t age_us = clock_monotonic_us() - self->packed_at_us;
    if (self->is_packed && self->packed_version == self->version &&
        age_us < pack_interval_us(self, FRESH_US))
        return ODSI_OK;
    return pack(self);
}

/* ---- watchers -------------------------------------------------------------------------------- */

static void taken(struct watcher *watcher)
{
    watcher->service->sending_size -= watcher->sending_size;
    watcher->sending_size = 0;
}

/* Queues the packed directory for one who has taken everything before and does not have it. */
static void send_newest(struct watcher *watcher)
{
    struct directory_service *self = watcher->service;
    if (!self->is_packed || watcher->sending_size > 0 ||
        watcher->sent_version == self->packed_version ||
        self->sending_size + self->packed.size > DIRECTORY_QUEUE_SIZE_MAX)
        return;
    const uint64_t sent_version = watcher->sent_version;
    watcher->sent_version = self->packed_version;
    watcher->sending_size = self->packed.size;
    watcher->sending_at_us = clock_monotonic_us();
    self->sending_size += watcher->sending_size;
    const enum odsi_err err = rpc_call_send(watcher->call, self->packed.data, self->packed.size);
    if (err == ODSI_OK)
        return;
    taken(watcher);
    watcher->sent_version = sent_version;
    if (err != ODSI_ERR_STATE) /* else it has ended and on_done is on its way */
        rpc_call_fail(watcher->call, err);
}

static void publish_later(struct directory_service *self)
{
    if (self->publish_waits || self->watcher_count == 0)
        return;
    const uint64_t delay_us = pack_interval_us(self, PUBLISH_MIN_US);
    if (rpc_timer_start(&self->publish_timer, self->loop, delay_us, publish, self) == ODSI_OK)
        self->publish_waits = 1; /* else the next notice tries again */
}

static void publish(void *context)
{
    struct directory_service *self = context;
    self->publish_waits = 0;
    if (!self->is_packed || self->packed_version != self->version) {
        const enum odsi_err err = pack(self);
        if (err != ODSI_OK) {
            log_line(LOG_WARN, "directory not published: %s", odsi_err_text());
            return;
        }
    }
    struct watcher *next = NULL;
    for (struct watcher *watcher = self->watchers; watcher; watcher = next) {
        next = watcher->next;
        send_newest(watcher);
    }
}

/* Drops who stalls, and tells whether anyone waits for a newer directory than he has. */
static int look_after_watchers(struct directory_service *self)
{
    const uint64_t now_us = clock_monotonic_us();
    int behind = 0;
    struct watcher *next = NULL;
    for (struct watcher *watcher = self->watchers; watcher; watcher = next) {
        next = watcher->next;
        if (watcher->sending_size == 0)
            behind |= watcher->sent_version != self->version;
        else if (now_us - watcher->sending_at_us > DIRECTORY_STALL_US)
            rpc_call_cancel(watcher->call);
    }
    return behind;
}

enum odsi_err directory_service_tick(struct directory_service *self)
{
    const enum odsi_err err = directory_service_notice(self);
    if (err == ODSI_OK && look_after_watchers(self))
        publish_later(self);
    return err;
}

static void watch_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct watcher *watcher = user;
    struct directory_service *self = watcher->service;
    (void)message; /* the request has no fields */
    if (watcher->asked)
        return;
    if (self->watcher_count >= DIRECTORY_WATCHERS_MAX) {
        rpc_call_finish(call, RPC_RESOURCE_EXHAUSTED,
                        "too many watch this coordinator; ask another one or call GetDirectory");
        return;
    }
    const enum odsi_err err = refresh(self);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return;
    }
    watcher->asked = 1;
    watcher->next = self->watchers;
    if (self->watchers)
        self->watchers->previous = watcher;
    self->watchers = watcher;
    self->watcher_count++;
    send_newest(watcher);
}

static void watch_half_close(void *user, struct rpc_call *call)
{
    const struct watcher *watcher = user;
    if (!watcher->asked)
        rpc_call_finish(call, RPC_INVALID_ARGUMENT, "the request is missing");
}

static void watch_sent(void *user, struct rpc_call *call)
{
    struct watcher *watcher = user;
    (void)call;
    taken(watcher);
    send_newest(watcher);
}

static void watch_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct watcher *watcher = user;
    struct directory_service *self = watcher->service;
    (void)call;
    (void)status;
    (void)text;
    if (watcher->asked) {
        taken(watcher);
        if (watcher->previous)
            watcher->previous->next = watcher->next;
        else
            self->watchers = watcher->next;
        if (watcher->next)
            watcher->next->previous = watcher->previous;
        self->watcher_count--;
    }
    alloc_free(watcher);
}

void *directory_service_watch(struct directory_service *self, struct rpc_call *call,
                              const struct rpc_handler **handler)
{
    static const struct rpc_handler watch_handler = {
        .on_message = watch_message,
        .on_half_close = watch_half_close,
        .on_sent = watch_sent,
        .on_done = watch_done,
    };
    struct watcher *watcher = NULL;
    const enum odsi_err err = alloc_zeroed(&watcher, 1, sizeof *watcher);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return NULL;
    }
    watcher->service = self;
    watcher->call = call;
    *handler = &watch_handler;
    return watcher;
}

/* ---- the rest -------------------------------------------------------------------------------- */

void directory_service_get(struct directory_service *self, struct rpc_call *call)
{
    enum odsi_err err = refresh(self);
    if (err == ODSI_OK)
        err = rpc_call_send(call, self->packed.data, self->packed.size);
    if (err == ODSI_OK)
        rpc_call_finish(call, RPC_OK, NULL);
    else
        rpc_call_fail(call, err);
}

void directory_service_stop(struct directory_service *self)
{
    struct watcher *next = NULL;
    rpc_timer_cancel(&self->publish_timer);
    for (struct watcher *watcher = self->watchers; watcher; watcher = next) {
        next = watcher->next;
        rpc_call_finish(watcher->call, RPC_UNAVAILABLE, "this coordinator stops");
    }
}

enum odsi_err directory_service_open(struct directory_service **out, struct rpc_loop *loop,
                                     struct store *store, const struct clock *clock)
{
    const enum odsi_err err = alloc_zeroed(out, 1, sizeof **out);
    if (err != ODSI_OK)
        return err;
    (*out)->loop = loop;
    (*out)->store = store;
    (*out)->clock = clock;
    buf_init(&(*out)->packed, LIMIT_CONTROL_MESSAGE_SIZE);
    buf_init(&(*out)->scratch, MEMBER_SIZE_MAX);
    return ODSI_OK;
}

void directory_service_close(struct directory_service **self)
{
    if (!*self)
        return;
    ODSI_ASSERT(!(*self)->watchers);
    rpc_timer_cancel(&(*self)->publish_timer);
    buf_free(&(*self)->packed);
    buf_free(&(*self)->scratch);
    alloc_free(*self);
    *self = NULL;
}
