#include "worker/hop/hop_link_client.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_pack.h"
#include "odsi/v1/hop.pb-c.h"
#include "worker/hop/hop_wire.h"

#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define IDLE_LINKS_MAX 16u
#define SENT_MAX       1024u /* frames whose acknowledgement is awaited for timing */

struct hop_link {
    struct hop_links *links;
    struct hop_link *next;
    struct digest peer_id;
    char address[LIMIT_ADDRESS_SIZE];
    char name[LIMIT_ADDRESS_SIZE + 16];
    struct rpc_channel *channel;
    struct rpc_call *call; /* referenced */
    uint32_t user_count;
    int broken;
    int done; /* on_done has come */
    atomic_uint one_way_us;
    struct hop_rtt rtt;
    /* When the last frames were sent: written by whoever sends, read by the loop's thread, since
     * acknowledgements come in the order of the frames. */
    _Atomic uint64_t sent_us[SENT_MAX];
    _Atomic uint64_t sent_count;
    uint64_t acked_count;   /* loop thread, and so the next one */
    uint64_t measured_from; /* frames before it waited for the connection; 0: none came back yet */
};

struct hop_links {
    struct rpc_loop *loop;
    const struct identity *identity;
    struct hop_link_events events;
    void *context;
    struct hop_link *first;
    int closing;
    void (*on_closed)(void *context);
    void *closed_context;
};

enum odsi_err hop_links_open(struct hop_links **out, struct rpc_loop *loop,
                             const struct identity *identity, const struct hop_link_events *events,
                             void *context)
{
    struct hop_links *self = NULL;
    *out = NULL;
    const enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->loop = loop;
    self->identity = identity;
    self->events = *events;
    self->context = context;
    *out = self;
    return ODSI_OK;
}

static void unlist(struct hop_link *link)
{
    struct hop_link **at = &link->links->first;
    while (*at && *at != link)
        at = &(*at)->next;
    if (*at)
        *at = link->next;
}

static void finish_closing(struct hop_links *self)
{
    if (!self->closing || self->first)
        return;
    void (*const on_closed)(void *) = self->on_closed;
    void *const context = self->closed_context;
    alloc_free(self);
    if (on_closed)
        on_closed(context);
}

/* Frees it once nobody uses it and its stream has ended. */
static void free_if_over(struct hop_link *link)
{
    struct hop_links *links = link->links;
    if (link->user_count > 0 || !link->done)
        return;
    unlist(link);
    rpc_channel_close(&link->channel);
    rpc_call_unref(link->call);
    alloc_free(link);
    finish_closing(links);
}

void hop_links_close(struct hop_links *self, void (*on_closed)(void *context), void *context)
{
    self->closing = 1;
    self->on_closed = on_closed;
    self->closed_context = context;
    for (struct hop_link *link = self->first; link; link = link->next) {
        link->broken = 1;
        if (!link->done)
            rpc_call_cancel(link->call);
    }
    finish_closing(self);
}

/* frame_count more frames have come back, the last of them after held_us at the peer. */
static void measure(struct hop_link *link, uint32_t frame_count, uint32_t held_us)
{
    const uint64_t now_us = clock_monotonic_us();
    const uint64_t sent_count = atomic_load(&link->sent_count);
    if (frame_count == 0 || frame_count > sent_count - link->acked_count)
        return; /* more acknowledged than sent: not worth a measurement */
    if (link->measured_from == 0)
        link->measured_from = sent_count;
    link->acked_count += frame_count;
    const uint64_t last = link->acked_count - 1;
    const uint64_t sent_us = atomic_load(&link->sent_us[last % SENT_MAX]);
    if (sent_count - last > SENT_MAX || last < link->measured_from || now_us - sent_us > UINT32_MAX)
        return;
    const uint32_t whole_us = (uint32_t)(now_us - sent_us);
    hop_rtt_add(&link->rtt, whole_us > held_us ? whole_us - held_us : 1);
    atomic_store(&link->one_way_us, link->rtt.mean_us / 2);
}

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct hop_link *link = user;
    Odsi__V1__StepAck *ack = NULL;
    struct hop_session_id id;
    enum odsi_err err = rpc_unpack(&ack, &odsi__v1__step_ack__descriptor, message);
    if (err == ODSI_OK)
        err = hop_wire_read_id(&id, &ack->session_id);
    if (err != ODSI_OK) {
        log_line(LOG_WARN, "%s sent a malformed acknowledgement: %s", link->name, odsi_err_text());
        rpc_unpack_free(ack);
        rpc_call_cancel(call);
        return;
    }
    measure(link, ack->frame_count, ack->held_us);
    if (ack->error != ODSI__V1__ERROR_CODE__ERROR_OK) {
        struct odsi_failure failure;
        odsi_failure_take(&failure, odsi_fail((enum odsi_err)ack->error, "stage %u, %s: %s",
                                              ack->stage, link->name, ack->text ? ack->text : ""));
        link->links->events.refused(link->links->context, link, &id, ack->epoch, ack->stage,
                                    ack->position, &failure);
    }
    rpc_unpack_free(ack);
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct hop_link *link = user;
    struct odsi_failure failure;
    (void)call;
    link->done = 1;
    link->broken = 1;
    odsi_failure_take(&failure, odsi_fail(ODSI_ERR_UNAVAILABLE, "worker %s: stream ended (%d): %s",
                                          link->name, (int)status, text ? text : ""));
    link->user_count++; /* so that a release in the callback does not free it under our feet */
    link->links->events.broken(link->links->context, link, &failure);
    link->user_count--;
    free_if_over(link);
}

static enum odsi_err connect_link(struct hop_link *link)
{
    static const struct rpc_handler handler = {.on_message = on_message, .on_done = on_done};
    const struct rpc_channel_config config = {
        .address = link->address,
        .identity = link->links->identity,
        .peer_id = &link->peer_id,
        .receive_size_max = LIMIT_HOP_HEADER_SIZE,
    };
    enum odsi_err err = rpc_channel_open(&link->channel, link->links->loop, &config);
    if (err == ODSI_OK)
        err = rpc_call_open(&link->call, link->channel, "/odsi.v1.Hop/Steps", 0, 0, &handler, link);
    if (err == ODSI_OK)
        rpc_call_ref(link->call);
    else
        link->call = NULL;
    return err;
}

/* Closes the oldest unused links beyond IDLE_LINKS_MAX; each ends in its on_done. */
static void close_idle(struct hop_links *self)
{
    uint32_t idle = 0;
    for (struct hop_link *link = self->first; link; link = link->next) {
        if (link->user_count > 0 || link->broken || ++idle <= IDLE_LINKS_MAX)
            continue;
        link->broken = 1;
        rpc_call_cancel(link->call);
    }
}

enum odsi_err hop_links_get(struct hop_links *self, struct hop_link **out,
                            const struct digest *peer_id, const char *address)
{
    struct hop_link *link = NULL;
    char hex[DIGEST_HEX_SIZE];
    *out = NULL;
    for (link = self->first; link; link = link->next) {
        if (!link->broken && digest_equal(&link->peer_id, peer_id) &&
            strcmp(link->address, address) == 0) {
            link->user_count++;
            *out = link;
            return ODSI_OK;
        }
    }
    close_idle(self);
    enum odsi_err err = alloc_zeroed(&link, 1, sizeof *link);
    if (err != ODSI_OK)
        return err;
    link->links = self;
    link->peer_id = *peer_id;
    link->user_count = 1;
    digest_to_hex(hex, peer_id);
    snprintf(link->address, sizeof link->address, "%s", address);
    snprintf(link->name, sizeof link->name, "%.8s@%s", hex, address);
    err = connect_link(link);
    if (err != ODSI_OK) {
        rpc_channel_close(&link->channel);
        alloc_free(link);
        return err;
    }
    link->next = self->first;
    self->first = link;
    *out = link;
    return ODSI_OK;
}

void hop_link_release(struct hop_link *link)
{
    ODSI_ASSERT(link->user_count > 0);
    link->user_count--;
    free_if_over(link);
}

static void release_payload(void *context, void *payload)
{
    (void)context;
    alloc_free(payload);
}

enum odsi_err hop_link_send(struct hop_link *link, const struct buf *header, void *payload,
                            size_t payload_size)
{
    const uint64_t index = atomic_load(&link->sent_count);
    atomic_store(&link->sent_us[index % SENT_MAX], clock_monotonic_us());
    atomic_store(&link->sent_count, index + 1); /* before the frame: its answer may be quick */
    const enum odsi_err err = rpc_call_send_frame(link->call, header->data, header->size, payload,
                                                  payload_size, release_payload, NULL);
    if (err != ODSI_OK)
        atomic_store(&link->sent_count, index);
    if (err == ODSI_ERR_STATE)
        return odsi_fail(ODSI_ERR_UNAVAILABLE, "worker %s: its stream has ended", link->name);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "worker %s", link->name);
}

uint32_t hop_link_one_way_us(const struct hop_link *link)
{
    return atomic_load(&link->one_way_us);
}

const char *hop_link_name_view(const struct hop_link *link)
{
    return link->name;
}
