/* One call. Rules of C-core that shape this file:
 *   - at most one SEND_MESSAGE and one RECV_MESSAGE may be under way, so sends wait in a queue;
 *   - each started batch comes back once through the completion queue, also when it failed, and
 *     until then the memory it points to and the grpc_call must stay;
 *   - a client gets its status, and a server its close, in a batch of its own.
 *
 * Sending: `lock` guards the queue. Whoever finds no send under way takes the next thing from the
 * queue and starts its batch, outside the lock; the completion, on the loop's thread, takes the one
 * after it. So send batches never overlap, whichever threads call rpc_call_send.
 * Receiving and everything else belongs to the loop's thread.
 *
 * The end: the end batch (status or close) sets is_ended, which refuses new sends; when the last
 * batch has come back the grpc_call is given up and on_done runs. */
#include "common/net/rpc_call.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/net/rpc_private.h"

#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#define STATUS_TEXT_SIZE 512u /* status texts are cut there, in both directions */
#define FRAME_KEYS_SIZE  24u  /* two keys and two lengths */
#define SEND_ITEM_COST   256u /* bytes a queued message takes besides its own */

struct send_item {
    struct send_item *next;
    grpc_byte_buffer *buffer;
    size_t size;
};

struct rpc_call {
    atomic_uint ref_count;
    struct rpc_loop *loop;
    int is_client;
    uint32_t receive_size_max;
    uint64_t deadline_us; /* UINT64_MAX: none */

    /* Loop thread. */
    struct rpc_call_owner *owner; /* NULL after the end */
    struct rpc_call *next;
    struct rpc_call **link; /* in the owner's list */
    grpc_call *call;        /* NULL after the end */
    const struct rpc_handler *handler;
    void *user;
    struct rpc_tag receive_tag, send_tag, end_tag, resume_tag;
    grpc_byte_buffer *received; /* where RECV_MESSAGE puts its result */
    grpc_byte_buffer *stash;    /* arrived while paused */
    grpc_byte_buffer *current;  /* during on_message */
    struct rpc_message_reader reader;
    grpc_metadata_array initial_metadata, trailing_metadata;
    grpc_status_code status;
    grpc_slice status_text;
    int is_cancelled_on_server;
    int is_receiving, is_receive_over, is_paused, is_resuming;
    int has_initial;  /* client: the peer's headers have come, or never will */
    int is_cancelled; /* by us: nothing more is delivered */
    int has_peer;
    struct digest peer;
    char *peer_address; /* gpr_free */

    pthread_mutex_t lock; /* guards what follows */
    struct send_item *queue;
    struct send_item **queue_end;
    size_t queued_size; /* with the one under way */
    struct send_item *sending;
    unsigned batch_count; /* batches under way, and the deferred resume */
    int is_sending;
    int has_sent_initial;
    int wait_for_ready;
    int has_begun;
    int wants_last, has_sent_last; /* half-close or status; set on the loop's thread */
    int is_dead;                   /* cancelled or broken: nothing more is sent */
    int is_ended;                  /* the end batch is back */
    enum rpc_status finish_status;
    char finish_text[STATUS_TEXT_SIZE];
};

static void maybe_end(struct rpc_call *self);

/* ---- batches ------------------------------------------------------------------------------ */

static void hold_batch(struct rpc_call *self)
{
    pthread_mutex_lock(&self->lock);
    self->batch_count++;
    pthread_mutex_unlock(&self->lock);
}

static void start(grpc_call *call, const grpc_op *ops, size_t count, struct rpc_tag *tag)
{
    const grpc_call_error error = grpc_call_start_batch(call, ops, count, tag, NULL);
    ODSI_ASSERT(error == GRPC_CALL_OK);
}

/* The last thing that the completion of a batch does: self may be gone afterwards. */
static void release_batch(struct rpc_call *self)
{
    pthread_mutex_lock(&self->lock);
    ODSI_ASSERT(self->batch_count > 0);
    self->batch_count--;
    pthread_mutex_unlock(&self->lock);
    maybe_end(self);
}

/* ---- sending ------------------------------------------------------------------------------ */

static void free_items(struct send_item *item)
{
    while (item) {
        struct send_item *next = item->next;
        grpc_byte_buffer_destroy(item->buffer); /* releases payloads */
        alloc_free(item);
        item = next;
    }
}

/* Takes all that waits; under the lock. The caller frees it outside. */
static struct send_item *take_queue(struct rpc_call *self)
{
    struct send_item *items = self->queue;
    for (const struct send_item *item = items; item; item = item->next)
        self->queued_size -= item->size;
    self->queue = NULL;
    self->queue_end = &self->queue;
    return items;
}

/* Starts the next send batch if none is under way. Called with the lock, which it gives back. */
static void pump(struct rpc_call *self)
{
    grpc_op ops[3];
    size_t count = 0;
    grpc_slice text = grpc_empty_slice();
    struct send_item *item = self->queue;
    const int is_last = self->wants_last && !self->has_sent_last && (!item || !item->next);
    /* A server's headers travel with the first thing it says; a client's open the call. */
    if (self->is_sending || self->is_dead || self->is_ended || !self->has_begun ||
        (!item && !is_last && (self->has_sent_initial || !self->is_client))) {
        pthread_mutex_unlock(&self->lock);
        return;
    }
    memset(ops, 0, sizeof ops);
    if (!self->has_sent_initial) {
        self->has_sent_initial = 1;
        ops[count].op = GRPC_OP_SEND_INITIAL_METADATA;
        if (self->wait_for_ready)
            ops[count].flags = GRPC_INITIAL_METADATA_WAIT_FOR_READY |
                               GRPC_INITIAL_METADATA_WAIT_FOR_READY_EXPLICITLY_SET;
        count++;
    }
    if (item) {
        self->queue = item->next;
        if (!self->queue)
            self->queue_end = &self->queue;
        item->next = NULL;
        self->sending = item;
        ops[count].op = GRPC_OP_SEND_MESSAGE;
        ops[count++].data.send_message.send_message = item->buffer;
    }
    if (is_last) {
        self->has_sent_last = 1;
        ops[count].op =
            self->is_client ? GRPC_OP_SEND_CLOSE_FROM_CLIENT : GRPC_OP_SEND_STATUS_FROM_SERVER;
        if (!self->is_client) {
            text = grpc_slice_from_copied_string(self->finish_text);
            ops[count].data.send_status_from_server.status = (grpc_status_code)self->finish_status;
            ops[count].data.send_status_from_server.status_details = &text;
        }
        count++;
    }
    self->is_sending = 1;
    self->batch_count++;
    grpc_call *call = self->call; /* alive until this batch has completed; see maybe_end */
    pthread_mutex_unlock(&self->lock);
    start(call, ops, count, &self->send_tag);
    grpc_slice_unref(text);
}

static void on_send_done(struct rpc_tag *tag, int ok)
{
    struct rpc_call *self = RPC_OWNER_OF(tag, struct rpc_call, send_tag);
    struct send_item *garbage = NULL;
    pthread_mutex_lock(&self->lock);
    struct send_item *sent = self->sending;
    self->sending = NULL;
    self->is_sending = 0;
    if (sent)
        self->queued_size -= sent->size;
    if (!ok) {
        self->is_dead = 1; /* the end batch follows and says why */
        garbage = take_queue(self);
    }
    const int is_empty = sent && ok && !self->queue && !self->wants_last && !self->is_dead;
    pump(self);
    free_items(sent);
    free_items(garbage);
    if (is_empty && self->handler && self->handler->on_sent)
        self->handler->on_sent(self->user, self);
    release_batch(self);
}

/* Queues buffer. On errors it stays the caller's. */
static enum odsi_err enqueue(struct rpc_call *self, grpc_byte_buffer *buffer, size_t size,
                             int is_last, enum rpc_status status)
{
    struct send_item *item = NULL;
    enum odsi_err err = alloc_zeroed(&item, 1, sizeof *item);
    if (err != ODSI_OK)
        return err;
    item->buffer = buffer;
    item->size = size + SEND_ITEM_COST;
    pthread_mutex_lock(&self->lock);
    if (self->is_dead || self->is_ended || self->wants_last) {
        err = odsi_fail(ODSI_ERR_STATE, "the call has ended; nothing more can be sent");
    } else if (self->queued_size > 0 && self->queued_size + item->size > LIMIT_SEND_QUEUE_SIZE) {
        /* A single message may be larger than the queue: then it waits alone. */
        err = odsi_fail(ODSI_ERR_BUSY, "the peer takes no more: %zu bytes wait to be sent",
                        self->queued_size);
    }
    if (err != ODSI_OK) {
        pthread_mutex_unlock(&self->lock);
        alloc_free(item);
        return err;
    }
    *self->queue_end = item;
    self->queue_end = &item->next;
    self->queued_size += item->size;
    if (is_last) {
        self->wants_last = 1;
        self->finish_status = status;
    }
    pump(self);
    return ODSI_OK;
}

static enum odsi_err send_copy(struct rpc_call *self, const void *data, size_t size, int is_last,
                               enum rpc_status status)
{
    grpc_slice slice = grpc_slice_from_copied_buffer(size ? data : "", size);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    enum odsi_err err = enqueue(self, buffer, size, is_last, status);
    if (err != ODSI_OK)
        grpc_byte_buffer_destroy(buffer);
    return err;
}

enum odsi_err rpc_call_send(struct rpc_call *self, const void *data, size_t size)
{
    return send_copy(self, data, size, 0, RPC_OK);
}

enum odsi_err rpc_call_send_last(struct rpc_call *self, const void *data, size_t size,
                                 enum rpc_status status)
{
    return send_copy(self, data, size, 1, status);
}

/* Rides with a payload slice until gRPC lets go of it. */
struct payload {
    void (*release)(void *context, void *payload); /* NULL: nobody wants to know */
    void *context;
    void *data;
    /* gRPC may let go on any thread of its own. It orders that after the send, but only we can
     * promise so to the one who reads this file, and to the thread sanitizer. */
    atomic_int is_handed_over;
};

static void release_payload(void *user)
{
    struct payload *payload = user;
    (void)atomic_load_explicit(&payload->is_handed_over, memory_order_acquire);
    if (payload->release)
        payload->release(payload->context, payload->data);
    alloc_free(payload);
}

static size_t put_varint(uint8_t *out, uint64_t value)
{
    size_t size = 0;
    for (; value >= 0x80; value >>= 7)
        out[size++] = (uint8_t)(value | 0x80);
    out[size++] = (uint8_t)value;
    return size;
}

/* `Header header = 1; bytes payload = 2;` up to the payload's bytes. */
static grpc_slice frame_prefix(const void *header, size_t header_size, size_t payload_size)
{
    uint8_t keys[FRAME_KEYS_SIZE];
    size_t before = 0;
    keys[before++] = 0x0a;
    before += put_varint(keys + before, header_size);
    size_t end = before;
    keys[end++] = 0x12;
    end += put_varint(keys + end, payload_size);
    grpc_slice slice = grpc_slice_malloc(end + header_size);
    uint8_t *out = GRPC_SLICE_START_PTR(slice);
    memcpy(out, keys, before);
    if (header_size > 0)
        memcpy(out + before, header, header_size);
    memcpy(out + before + header_size, keys + before, end - before);
    return slice;
}

enum odsi_err rpc_call_send_frame(struct rpc_call *self, const void *header, size_t header_size,
                                  void *payload, size_t payload_size,
                                  void (*release)(void *context, void *payload), void *context)
{
    struct payload *rider = NULL;
    ODSI_ASSERT(header_size <= LIMIT_HOP_HEADER_SIZE);
    enum odsi_err err = alloc_zeroed(&rider, 1, sizeof *rider);
    if (err != ODSI_OK)
        return err;
    rider->context = context;
    rider->data = payload;
    rider->release = release;
    atomic_store_explicit(&rider->is_handed_over, 1, memory_order_release);
    grpc_slice slices[2];
    slices[0] = frame_prefix(header, header_size, payload_size);
    slices[1] = grpc_slice_new_with_user_data(payload, payload_size, release_payload, rider);
    const size_t size = GRPC_SLICE_LENGTH(slices[0]) + payload_size;
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(slices, 2);
    err = enqueue(self, buffer, size, 0, RPC_OK);
    if (err != ODSI_OK) {
        rider->release = NULL; /* the payload stays the caller's */
        grpc_byte_buffer_destroy(buffer);
    }
    grpc_slice_unref(slices[0]);
    grpc_slice_unref(slices[1]);
    return err;
}

void rpc_call_half_close(struct rpc_call *self)
{
    ODSI_ASSERT(self->is_client);
    pthread_mutex_lock(&self->lock);
    self->wants_last = 1;
    pump(self);
}

void rpc_call_finish(struct rpc_call *self, enum rpc_status status, const char *text)
{
    ODSI_ASSERT(!self->is_client);
    pthread_mutex_lock(&self->lock);
    if (!self->wants_last) {
        self->wants_last = 1;
        self->finish_status = status;
        snprintf(self->finish_text, sizeof self->finish_text, "%s", text ? text : "");
    }
    pump(self);
}

void rpc_call_fail(struct rpc_call *self, enum odsi_err err)
{
    rpc_call_finish(self, rpc_status_of_err(err), odsi_err_text());
}

int rpc_call_is_finished(struct rpc_call *self)
{
    pthread_mutex_lock(&self->lock);
    const int is_finished = self->wants_last || self->is_dead || self->is_ended;
    pthread_mutex_unlock(&self->lock);
    return is_finished;
}

static void schedule_resume(struct rpc_call *self)
{
    if (self->is_resuming)
        return;
    self->is_resuming = 1;
    hold_batch(self);
    rpc_loop_defer(self->loop, &self->resume_tag);
}

/* Ends the call with a status that a client's own on_done will show. */
static void cancel_with(struct rpc_call *self, enum rpc_status status, const char *text)
{
    if (!self->call)
        return;
    pthread_mutex_lock(&self->lock);
    self->is_dead = 1;
    struct send_item *garbage = take_queue(self);
    pthread_mutex_unlock(&self->lock);
    self->is_cancelled = 1;
    grpc_call_cancel_with_status(self->call, (grpc_status_code)status, text, NULL);
    free_items(garbage);
    if (self->stash) { /* it may be all that on_done waits for */
        grpc_byte_buffer_destroy(self->stash);
        self->stash = NULL;
        schedule_resume(self);
    }
}

void rpc_call_cancel(struct rpc_call *self)
{
    cancel_with(self, RPC_CANCELLED, "cancelled here");
}

void rpc_call_cancel_all(struct rpc_call_owner *owner)
{
    for (struct rpc_call *call = owner->calls; call; call = call->next)
        rpc_call_cancel(call);
}

/* ---- receiving ---------------------------------------------------------------------------- */

/* A server that has said its last word reads no more; a client reads until the status. */
static int wants_messages(const struct rpc_call *self)
{
    return !self->is_cancelled && (self->is_client || !self->wants_last);
}

static void receive(struct rpc_call *self)
{
    grpc_op ops[2];
    size_t count = 0;
    if (self->is_receiving || self->is_receive_over || self->is_paused || self->stash)
        return;
    if (!self->is_client && !wants_messages(self))
        return;
    memset(ops, 0, sizeof ops);
    if (self->is_client && !self->has_initial) {
        ops[count].op = GRPC_OP_RECV_INITIAL_METADATA;
        ops[count++].data.recv_initial_metadata.recv_initial_metadata = &self->initial_metadata;
    }
    ops[count].op = GRPC_OP_RECV_MESSAGE;
    ops[count++].data.recv_message.recv_message = &self->received;
    self->is_receiving = 1;
    hold_batch(self);
    start(self->call, ops, count, &self->receive_tag);
}

/* Ends a call whose peer broke a rule. */
static void refuse(struct rpc_call *self, enum rpc_status status, const char *text)
{
    if (self->is_client)
        cancel_with(self, status, text);
    else
        rpc_call_finish(self, status, text);
}

static void deliver(struct rpc_call *self, grpc_byte_buffer *buffer)
{
    const size_t size = grpc_byte_buffer_length(buffer);
    self->current = buffer;
    if (size > self->receive_size_max) {
        char text[128];
        snprintf(text, sizeof text, "a message of %zu bytes; this method takes %u", size,
                 self->receive_size_max);
        refuse(self, RPC_RESOURCE_EXHAUSTED, text);
    } else if (buffer->data.raw.compression != GRPC_COMPRESS_NONE) {
        refuse(self, RPC_UNIMPLEMENTED, "compressed messages are not taken");
    } else if (rpc_message_read(&self->reader, buffer) != ODSI_OK) {
        refuse(self, RPC_RESOURCE_EXHAUSTED, odsi_err_text());
    } else if (self->handler && self->handler->on_message) {
        self->handler->on_message(self->user, self, &self->reader.message);
    }
    rpc_message_reset(&self->reader);
    if (self->current)
        grpc_byte_buffer_destroy(self->current);
    self->current = NULL;
}

grpc_byte_buffer *rpc_call_take_message(struct rpc_call *self)
{
    grpc_byte_buffer *buffer = self->current;
    self->current = NULL;
    return buffer;
}

static void learn_peer(struct rpc_call *self)
{
    self->peer_address = grpc_call_get_peer(self->call);
    if (self->owner->tls && rpc_tls_peer(self->owner->tls, self->call, &self->peer) == ODSI_OK)
        self->has_peer = 1;
}

static void on_received(struct rpc_tag *tag, int ok)
{
    struct rpc_call *self = RPC_OWNER_OF(tag, struct rpc_call, receive_tag);
    grpc_byte_buffer *buffer = self->received;
    self->received = NULL;
    self->is_receiving = 0;
    if (self->is_client && !self->has_initial) {
        self->has_initial = 1;
        learn_peer(self);
        /* Without a message there may have been no connection to ask. */
        if (buffer && self->owner->tls && !self->has_peer)
            cancel_with(self, RPC_UNAUTHENTICATED, odsi_err_text());
    }
    if (!buffer) {
        self->is_receive_over = 1;
        /* The same NULL stands for "no more" and for "broken". */
        if (!self->is_client && ok && wants_messages(self) &&
            !grpc_call_failed_before_recv_message(self->call) && self->handler &&
            self->handler->on_half_close)
            self->handler->on_half_close(self->user, self);
    } else if (!wants_messages(self)) {
        grpc_byte_buffer_destroy(buffer);
    } else if (self->is_paused) {
        self->stash = buffer;
    } else {
        deliver(self, buffer);
    }
    receive(self);
    release_batch(self);
}

void rpc_call_pause(struct rpc_call *self)
{
    self->is_paused = 1;
}

/* On a turn of its own, so that on_message never runs inside rpc_call_resume. */
static void on_resume(struct rpc_tag *tag, int ok)
{
    (void)ok;
    struct rpc_call *self = RPC_OWNER_OF(tag, struct rpc_call, resume_tag);
    self->is_resuming = 0;
    if (!self->is_paused) {
        grpc_byte_buffer *buffer = self->stash;
        self->stash = NULL;
        if (buffer && wants_messages(self))
            deliver(self, buffer);
        else if (buffer)
            grpc_byte_buffer_destroy(buffer);
        receive(self);
    }
    release_batch(self);
}

void rpc_call_resume(struct rpc_call *self)
{
    if (!self->is_paused)
        return;
    self->is_paused = 0;
    if (self->call)
        schedule_resume(self);
}

/* ---- the end ------------------------------------------------------------------------------ */

static void on_end(struct rpc_tag *tag, int ok)
{
    (void)ok;
    struct rpc_call *self = RPC_OWNER_OF(tag, struct rpc_call, end_tag);
    pthread_mutex_lock(&self->lock);
    self->is_ended = 1;
    struct send_item *garbage = take_queue(self);
    pthread_mutex_unlock(&self->lock);
    free_items(garbage);
    /* A reader that is paused still gets what a good end left behind, and on_done after it; it
     * must not have to resume in order to learn of a bad one. */
    if (self->stash && !(self->is_client && self->status == GRPC_STATUS_OK)) {
        grpc_byte_buffer_destroy(self->stash);
        self->stash = NULL;
    }
    release_batch(self);
}

static void tell_done(struct rpc_call *self)
{
    char text[STATUS_TEXT_SIZE];
    enum rpc_status status = self->is_cancelled_on_server ? RPC_CANCELLED : RPC_OK;
    snprintf(text, sizeof text, "%s", self->is_cancelled_on_server ? "the peer went away" : "");
    if (self->is_client) {
        size_t size = GRPC_SLICE_LENGTH(self->status_text);
        if (size >= sizeof text)
            size = sizeof text - 1;
        memcpy(text, GRPC_SLICE_START_PTR(self->status_text), size);
        text[size] = '\0';
        status = (enum rpc_status)self->status;
    }
    if (self->handler && self->handler->on_done)
        self->handler->on_done(self->user, self, status, text);
}

/* Gives up the grpc_call and tells the user, once no batch is under way any more. */
static void maybe_end(struct rpc_call *self)
{
    pthread_mutex_lock(&self->lock);
    const int is_over = self->is_ended && self->batch_count == 0 && !self->stash;
    grpc_call *call = is_over ? self->call : NULL;
    if (is_over)
        self->call = NULL; /* under the lock, since a sending thread reads it there */
    pthread_mutex_unlock(&self->lock);
    if (!call)
        return;
    struct rpc_call_owner *owner = self->owner;
    *self->link = self->next;
    if (self->next)
        self->next->link = self->link;
    tell_done(self);
    /* What belongs to gRPC goes now: others may hold the object longer than gRPC lives. */
    grpc_call_unref(call);
    rpc_message_free(&self->reader);
    grpc_metadata_array_destroy(&self->initial_metadata);
    grpc_metadata_array_destroy(&self->trailing_metadata);
    grpc_slice_unref(self->status_text);
    gpr_free(self->peer_address);
    self->peer_address = NULL;
    self->handler = NULL;
    self->owner = NULL;
    rpc_loop_release(self->loop);
    rpc_call_unref(self);
    owner->call_count--; /* only now, so that an on_done that closes the owner does not free it */
    owner->on_call_gone(owner);
}

/* ---- making and ending the object ----------------------------------------------------------- */

enum odsi_err rpc_call_make(struct rpc_call **out, struct rpc_call_owner *owner,
                            const struct rpc_call_setup *setup)
{
    struct rpc_call *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK) {
        grpc_call_cancel_with_status(setup->call, GRPC_STATUS_RESOURCE_EXHAUSTED, "no memory",
                                     NULL);
        grpc_call_unref(setup->call);
        return err;
    }
    pthread_mutex_init(&self->lock, NULL);
    atomic_init(&self->ref_count, 1);
    self->loop = owner->loop;
    self->owner = owner;
    self->call = setup->call;
    self->is_client = setup->is_client;
    self->wait_for_ready = setup->wait_for_ready;
    self->receive_size_max = setup->receive_size_max;
    self->handler = setup->handler;
    self->user = setup->user;
    const uint64_t now_us = clock_monotonic_us();
    self->deadline_us =
        setup->time_left_us < UINT64_MAX - now_us ? now_us + setup->time_left_us : UINT64_MAX;
    self->queue_end = &self->queue;
    self->receive_tag.fn = on_received;
    self->send_tag.fn = on_send_done;
    self->end_tag.fn = on_end;
    self->resume_tag.fn = on_resume;
    self->status_text = grpc_empty_slice();
    grpc_metadata_array_init(&self->initial_metadata);
    grpc_metadata_array_init(&self->trailing_metadata);
    self->next = owner->calls;
    self->link = &owner->calls;
    if (self->next)
        self->next->link = &self->next;
    owner->calls = self;
    owner->call_count++;
    rpc_loop_hold(self->loop);
    if (!self->is_client)
        learn_peer(self);
    *out = self;
    return ODSI_OK;
}

void rpc_call_begin(struct rpc_call *self)
{
    grpc_op op;
    memset(&op, 0, sizeof op);
    if (self->is_client) {
        op.op = GRPC_OP_RECV_STATUS_ON_CLIENT;
        op.data.recv_status_on_client.trailing_metadata = &self->trailing_metadata;
        op.data.recv_status_on_client.status = &self->status;
        op.data.recv_status_on_client.status_details = &self->status_text;
    } else {
        op.op = GRPC_OP_RECV_CLOSE_ON_SERVER;
        op.data.recv_close_on_server.cancelled = &self->is_cancelled_on_server;
    }
    hold_batch(self);
    start(self->call, &op, 1, &self->end_tag);
    pthread_mutex_lock(&self->lock);
    self->has_begun = 1;
    pump(self);
    receive(self);
}

void rpc_call_set_handler(struct rpc_call *self, const struct rpc_handler *handler, void *user)
{
    self->handler = handler;
    self->user = user;
}

struct rpc_call *rpc_call_ref(struct rpc_call *self)
{
    atomic_fetch_add_explicit(&self->ref_count, 1, memory_order_relaxed);
    return self;
}

void rpc_call_unref(struct rpc_call *self)
{
    if (!self || atomic_fetch_sub_explicit(&self->ref_count, 1, memory_order_acq_rel) != 1)
        return;
    ODSI_ASSERT(!self->call);
    ODSI_ASSERT(!self->queue && !self->sending);
    pthread_mutex_destroy(&self->lock);
    alloc_free(self);
}

/* ---- who and how long ------------------------------------------------------------------------ */

int rpc_call_peer(const struct rpc_call *self, struct digest *out_id)
{
    if (self->has_peer)
        *out_id = self->peer;
    return self->has_peer;
}

const char *rpc_call_peer_address_view(const struct rpc_call *self)
{
    if (self->peer_address)
        return self->peer_address;
    return self->owner ? self->owner->address : "unknown";
}

uint64_t rpc_call_time_left_us(const struct rpc_call *self)
{
    if (self->deadline_us == UINT64_MAX)
        return UINT64_MAX;
    const uint64_t now_us = clock_monotonic_us();
    return now_us < self->deadline_us ? self->deadline_us - now_us : 0;
}
