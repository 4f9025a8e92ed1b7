/* Calls of every shape between a client and a server on one loop. */
#include "common/base/alloc.h"
#include "common/base/bytes.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "tests/unit/net/net_fixture.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define MEBIBYTE (1u << 20)

static const size_t sizes[] = {0, 1, 13, 64, 4096, 16384, 65536, 1000003, 5 * MEBIBYTE};
#define SIZE_COUNT (sizeof sizes / sizeof *sizes)

static uint8_t *bytes_make(size_t size, uint32_t seed)
{
    uint8_t *data = NULL;
    cr_assert_eq(alloc_zeroed(&data, size, 1), ODSI_OK);
    net_fill(data, size, seed);
    return data;
}

Test(rpc_call, unary_returns_the_reply_for_every_size)
{
    struct net net = {0};
    net_open(&net, NULL);
    for (size_t i = 0; i < SIZE_COUNT; i++) {
        struct net_call call = {0};
        uint8_t *data = bytes_make(sizes[i], (uint32_t)i);
        net_call_unary(&call, &net, NET_PATH("Unary"), data, sizes[i], NET_CALL_US);
        cr_expect_eq(call.status, RPC_OK, "%zu bytes: %s", sizes[i], call.text);
        cr_assert_eq(call.last.size, sizes[i]);
        cr_expect(sizes[i] == 0 || memcmp(call.last.data, data, sizes[i]) == 0);
        alloc_free(data);
        net_call_free(&call);
    }
    cr_expect_eq(net.log.open_count, SIZE_COUNT);
    net_close(&net);
    cr_expect_eq(net.log.done_count, SIZE_COUNT);
    cr_expect_eq(net.log.last_status, RPC_OK);
}

static void check_stream_message(struct net_call *self, const struct rpc_message *message)
{
    uint8_t *expected = bytes_make(message->size, self->message_count - 1);
    cr_expect(memcmp(self->last.data, expected, message->size) == 0, "message %u",
              self->message_count - 1);
    alloc_free(expected);
}

Test(rpc_call, server_stream_delivers_every_message_in_order_before_the_status)
{
    struct net net = {0};
    struct net_call call = {.on_message = check_stream_message};
    const uint8_t request[8] = {200, 0, 0, 0, 0x10, 0x27, 0, 0}; /* 200 messages of 10,000 bytes */
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Stream"), NET_CALL_US);
    net_call_send(&call, request, sizeof request);
    rpc_call_half_close(call.call);
    net_run(&net);
    cr_expect_eq(call.status, RPC_OK, "%s", call.text);
    cr_expect_eq(call.message_count, 200);
    cr_expect_eq(call.last.size, 10000);
    cr_expect_eq(call.done_count, 1);
    net_call_free(&call);
    net_close(&net);
}

static void send_next_size(struct net_call *self, const struct rpc_message *message)
{
    (void)message;
    const size_t index = self->message_count; /* of the next one */
    uint8_t *expected = bytes_make(sizes[index - 1], (uint32_t)index - 1);
    cr_assert_eq(self->last.size, sizes[index - 1]);
    cr_expect(self->last.size == 0 || memcmp(self->last.data, expected, self->last.size) == 0);
    alloc_free(expected);
    if (index == SIZE_COUNT) {
        rpc_call_half_close(self->call);
        return;
    }
    uint8_t *data = bytes_make(sizes[index], (uint32_t)index);
    net_call_send(self, data, sizes[index]);
    alloc_free(data);
}

static void echo_all_sizes(int with_tls)
{
    struct net net = {.with_tls = with_tls};
    struct net_call call = {.on_message = send_next_size};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Bidi"), NET_CALL_US);
    net_call_send(&call, NULL, 0);
    net_run(&net);
    cr_expect_eq(call.status, RPC_OK, "%s", call.text);
    cr_expect_eq(call.message_count, SIZE_COUNT);
    cr_expect_eq(net.log.half_close_count, 1);
    cr_expect_gt(call.sent_count, 0);
    net_call_free(&call);
    net_close(&net);
}

Test(rpc_call, bidi_echoes_every_size)
{
    echo_all_sizes(0);
}

Test(rpc_call, bidi_echoes_every_size_over_mutual_tls)
{
    echo_all_sizes(1);
}

/* ---- frames -------------------------------------------------------------------------------- */

/* Payloads that count how often each was released, from whichever thread. */
struct payloads {
    atomic_uint release_count;
    atomic_uint double_count;
};

struct tracked {
    atomic_uint release_count;
    uint32_t seed;
    uint8_t data[];
};

static struct tracked *tracked_make(size_t size, uint32_t seed)
{
    struct tracked *self = NULL;
    cr_assert_eq(alloc_zeroed(&self, 1, sizeof *self + size), ODSI_OK);
    self->seed = seed;
    net_fill(self->data, size, seed);
    return self;
}

static void release_tracked(void *context, void *payload)
{
    struct payloads *payloads = context;
    struct tracked *self =
        (struct tracked *)(void *)((uint8_t *)payload - offsetof(struct tracked, data));
    if (atomic_fetch_add(&self->release_count, 1) > 0)
        atomic_fetch_add(&payloads->double_count, 1);
    atomic_fetch_add(&payloads->release_count, 1);
    alloc_free(self);
}

static enum odsi_err send_tracked(struct rpc_call *call, struct payloads *payloads, size_t size,
                                  uint32_t seed)
{
    uint8_t header[64];
    net_fill(header, sizeof header, ~seed);
    memcpy(header, &seed, sizeof seed);
    struct tracked *tracked = tracked_make(size, seed);
    enum odsi_err err = rpc_call_send_frame(call, header, sizeof header, tracked->data, size,
                                            release_tracked, payloads);
    if (err != ODSI_OK) {
        cr_assert_eq(atomic_load(&tracked->release_count), 0);
        alloc_free(tracked);
    }
    return err;
}

/* A frame that came back must hold the header and the payload of its seed. */
static uint32_t check_frame(const struct rpc_message *message)
{
    uint8_t scratch[LIMIT_HOP_HEADER_SIZE];
    uint8_t header[64];
    struct rpc_frame frame;
    uint32_t seed = 0;
    cr_assert_eq(rpc_frame_read(&frame, message, scratch), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(frame.header_size, sizeof header);
    memcpy(&seed, frame.header, sizeof seed);
    net_fill(header, sizeof header, ~seed);
    cr_expect(memcmp(frame.header + 4, header + 4, sizeof header - 4) == 0);
    uint8_t *payload = NULL;
    uint8_t *expected = bytes_make(frame.payload_size, seed);
    cr_assert_eq(alloc_zeroed(&payload, frame.payload_size, 1), ODSI_OK);
    rpc_frame_copy_payload(&frame, message, payload);
    cr_expect(memcmp(payload, expected, frame.payload_size) == 0, "payload of frame %u", seed);
    alloc_free(payload);
    alloc_free(expected);
    return seed;
}

static void check_next_frame(struct net_call *self, const struct rpc_message *message)
{
    cr_expect_eq(check_frame(message), self->message_count - 1);
    if (self->message_count == SIZE_COUNT)
        rpc_call_half_close(self->call);
}

static void send_frames(int with_tls)
{
    struct net net = {.with_tls = with_tls};
    struct net_call call = {.on_message = check_next_frame};
    struct payloads payloads = {0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Bidi"), NET_CALL_US);
    for (uint32_t i = 0; i < SIZE_COUNT; i++)
        cr_assert_eq(send_tracked(call.call, &payloads, sizes[i], i), ODSI_OK);
    net_run(&net);
    cr_expect_eq(call.status, RPC_OK, "%s", call.text);
    cr_expect_eq(call.message_count, SIZE_COUNT);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(payloads.release_count, SIZE_COUNT);
    cr_expect_eq(payloads.double_count, 0);
}

Test(rpc_call, frames_arrive_whole_and_every_payload_is_released_once)
{
    send_frames(0);
}

Test(rpc_call, frames_over_mutual_tls_arrive_whole_and_every_payload_is_released_once)
{
    send_frames(1);
}

/* ---- flow control -------------------------------------------------------------------------- */

#define FRAME_SIZE (256u * 1024u)

static unsigned fill_queue(struct net_call *call, struct payloads *payloads)
{
    unsigned count = 0;
    for (; count < 4096; count++) {
        enum odsi_err err = send_tracked(call->call, payloads, FRAME_SIZE, count);
        if (err == ODSI_ERR_BUSY)
            return count;
        cr_assert_eq(err, ODSI_OK, "frame %u: %s, status %d %s", count, odsi_err_text(),
                     call->status, call->text);
    }
    cr_assert_fail("a peer that does not read took %u frames", count);
    return 0;
}

static void stop_loop(void *context)
{
    rpc_loop_stop(context);
}

/* Goal: a reader that does not read holds its sender back, and costs bounded memory.
 * How: fill the queue, give the connection time to take what it will, fill it again. */
Test(rpc_call, a_paused_reader_makes_its_sender_busy_until_it_reads)
{
    struct net net = {0};
    struct net_call call = {0};
    struct payloads payloads = {0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Paused"), 0);
    unsigned count = fill_queue(&call, &payloads);
    cr_expect_geq(count, LIMIT_SEND_QUEUE_SIZE / FRAME_SIZE - 1);
    while (net.log.open_count == 0)
        net_run_for(&net, 10000);
    unsigned late = 100;
    for (int i = 0; i < 50 && late > 2; i++) {
        net_run_for(&net, 200000);
        late = fill_queue(&call, &payloads);
        count += late;
    }
    cr_expect_leq(late, 2, "the windows never fill");
    cr_expect_leq(count, 3 * LIMIT_SEND_QUEUE_SIZE / FRAME_SIZE);
    cr_expect_eq(call.sent_count, 0);
    cr_expect_leq(net.log.message_count, 1);
    cr_assert_not_null(net.log.last_call);

    rpc_call_resume(net.log.last_call);
    for (int i = 0; i < 500 && net.log.message_count < count; i++)
        net_run_for(&net, 50000);
    cr_expect_eq(net.log.message_count, count);
    cr_expect_gt(call.sent_count, 0);
    cr_expect_eq(send_tracked(call.call, &payloads, FRAME_SIZE, 0), ODSI_OK);
    rpc_call_cancel(call.call);
    net_run(&net);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(payloads.release_count, count + 1);
    cr_expect_eq(payloads.double_count, 0);
}

Test(rpc_call, cancelling_with_a_full_queue_releases_every_payload_once)
{
    struct net net = {0};
    struct net_call call = {0};
    struct payloads payloads = {0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Paused"), 0);
    const unsigned count = fill_queue(&call, &payloads);
    rpc_call_ref(call.call);
    rpc_call_cancel(call.call);
    cr_expect_eq(send_tracked(call.call, &payloads, 16, 0), ODSI_ERR_STATE);
    net_run(&net);
    cr_expect_eq(call.status, RPC_CANCELLED, "%d %s", call.status, call.text);
    cr_expect_eq(send_tracked(call.call, &payloads, 16, 0), ODSI_ERR_STATE);
    rpc_call_unref(call.call);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(payloads.release_count, count);
    cr_expect_eq(payloads.double_count, 0);
}

Test(rpc_call, one_message_larger_than_the_queue_is_taken_when_the_queue_is_empty)
{
    struct net net = {0};
    struct net_call call = {0};
    uint8_t *data = bytes_make(LIMIT_SEND_QUEUE_SIZE + 1, 0);
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Paused"), 0);
    net_call_send(&call, data, LIMIT_SEND_QUEUE_SIZE + 1);
    cr_expect_eq(rpc_call_send(call.call, data, 1), ODSI_ERR_BUSY);
    rpc_call_cancel(call.call);
    net_run(&net);
    alloc_free(data);
    net_call_free(&call);
    net_close(&net);
}

static void pause_first(struct net_call *self, const struct rpc_message *message)
{
    (void)message;
    if (self->message_count == 1)
        rpc_call_pause(self->call);
}

Test(rpc_call, a_paused_client_gets_no_message_and_no_end_until_it_resumes)
{
    struct net net = {0};
    struct net_call call = {.on_message = pause_first};
    const uint8_t request[8] = {3, 0, 0, 0, 100, 0, 0, 0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Stream"), NET_CALL_US);
    net_call_send(&call, request, sizeof request);
    while (call.message_count == 0)
        net_run_for(&net, 10000);
    net_run_for(&net, 200000);
    cr_expect_eq(call.message_count, 1);
    cr_expect_eq(call.done_count, 0);
    rpc_call_resume(call.call);
    net_run(&net);
    cr_expect_eq(call.message_count, 3);
    cr_expect_eq(call.done_count, 1);
    cr_expect_eq(call.status, RPC_OK);
    net_call_free(&call);
    net_close(&net);
}

static void pause_again(void *context)
{
    struct net_call *call = context;
    rpc_call_pause(call->call);
}

/* Goal: a message that arrives while paused, for a read that began before, is kept and not
 * delivered, and does not keep the call from being cancelled. */
Test(rpc_call, a_message_caught_by_a_pause_does_not_block_the_end)
{
    struct net net = {0};
    struct net_call call = {0};
    const uint8_t request[8] = {1, 0, 0, 0, 100, 0, 0, 0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Stream"), NET_CALL_US);
    pause_again(&call); /* the read is under way already */
    net_call_send(&call, request, sizeof request);
    net_run_for(&net, 200000);
    cr_expect_eq(call.message_count, 0);
    cr_expect_eq(call.done_count, 0);
    rpc_call_cancel(call.call);
    net_run(&net);
    cr_expect_eq(call.message_count, 0);
    cr_expect_eq(call.done_count, 1);
    net_call_free(&call);
    net_close(&net);
}

/* ---- bad ends ------------------------------------------------------------------------------ */

Test(rpc_call, a_message_over_the_limit_of_its_method_is_refused)
{
    struct net net = {0};
    uint8_t *data = bytes_make(NET_MESSAGE_MAX + MEBIBYTE, 0);
    net_open(&net, NULL);
    const struct {
        const char *path;
        size_t size;
        enum rpc_status status;
    } cases[] = {{NET_PATH("Small"), 1000, RPC_OK},
                 {NET_PATH("Small"), 1001, RPC_RESOURCE_EXHAUSTED},
                 {NET_PATH("Unary"), NET_MESSAGE_MAX + MEBIBYTE, RPC_RESOURCE_EXHAUSTED}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct net_call call = {0};
        net_call_unary(&call, &net, cases[i].path, data, cases[i].size, NET_CALL_US);
        cr_expect_eq(call.status, cases[i].status, "%s: %s", cases[i].path, call.text);
        net_call_free(&call);
    }
    alloc_free(data);
    net_close(&net);
}

Test(rpc_call, a_reply_over_the_limit_of_its_channel_is_refused)
{
    struct net net = {0};
    struct net_call call = {0};
    uint8_t data[2000] = {0};
    net_open(&net, &(struct rpc_channel_config){.receive_size_max = 1000});
    net_call_unary(&call, &net, NET_PATH("Unary"), data, sizeof data, NET_CALL_US);
    cr_expect_eq(call.status, RPC_RESOURCE_EXHAUSTED, "%s", call.text);
    net_call_free(&call);
    net_close(&net);
}

Test(rpc_call, an_unknown_method_is_unimplemented_at_once)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    const uint64_t start_us = clock_monotonic_us();
    net_call_unary(&call, &net, NET_PATH("Nothing"), "x", 1, NET_CALL_US);
    cr_expect_eq(call.status, RPC_UNIMPLEMENTED);
    cr_expect_not_null(strstr(call.text, NET_PATH("Nothing")), "%s", call.text);
    cr_expect_lt(clock_monotonic_us() - start_us, NET_CALL_US / 2);
    net_call_free(&call);
    net_close(&net);
}

Test(rpc_call, malformed_protobuf_is_an_invalid_argument)
{
    struct net net = {0};
    net_open(&net, NULL);
    const struct {
        const char *bytes;
        size_t size;
        enum rpc_status status;
    } cases[] = {{"\x0a\x02hi", 4, RPC_OK},
                 {"", 0, RPC_OK},
                 {"\x0a\x09hi", 4, RPC_INVALID_ARGUMENT},
                 {"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 11, RPC_INVALID_ARGUMENT},
                 {"\x0a", 1, RPC_INVALID_ARGUMENT}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct net_call call = {0};
        net_call_unary(&call, &net, NET_PATH("Parse"), cases[i].bytes, cases[i].size, NET_CALL_US);
        cr_expect_eq(call.status, cases[i].status, "case %zu: %s", i, call.text);
        net_call_free(&call);
    }
    net_close(&net);
}

Test(rpc_call, a_failed_call_carries_the_error_and_its_sentence)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    net_call_unary(&call, &net, NET_PATH("Refuse"), "x", 1, NET_CALL_US);
    cr_expect_eq(call.status, RPC_PERMISSION_DENIED);
    cr_expect_str_eq(call.text, "not today, 100% sure: \"no\"");
    net_call_free(&call);
    net_close(&net);
}

/* A connection that is already there makes what follows take next to no time. */
static void warm_up(struct net *net)
{
    struct net_call call = {0};
    net_call_unary(&call, net, NET_PATH("Unary"), "x", 1, NET_CALL_US);
    cr_assert_eq(call.status, RPC_OK, "%s", call.text);
    net_call_free(&call);
    while (net->log.done_count == 0)
        net_run_for(net, 1000);
}

Test(rpc_call, a_deadline_ends_the_call_on_both_sides)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    warm_up(&net);
    const uint64_t start_us = clock_monotonic_us();
    net_call_open(&call, &net, NET_PATH("Hold"), 200000);
    cr_expect_leq(rpc_call_time_left_us(call.call), 200000);
    net_run(&net);
    const uint64_t took_us = clock_monotonic_us() - start_us;
    cr_expect_eq(call.status, RPC_DEADLINE_EXCEEDED);
    cr_expect(took_us >= 195000 && took_us < 5000000, "%lu us", (unsigned long)took_us);
    cr_expect_gt(net.log.time_left_us, 0);
    cr_expect_leq(net.log.time_left_us, 210000);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(net.log.done_count, 2);
    cr_expect_eq(net.log.last_status, RPC_CANCELLED);
}

Test(rpc_call, without_a_timeout_there_is_no_deadline)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    net.log.on_open = stop_loop;
    net.log.context = net.loop;
    net_call_open(&call, &net, NET_PATH("Hold"), 0);
    net_run(&net);
    cr_expect_eq(net.log.time_left_us, UINT64_MAX);
    cr_expect_eq(rpc_call_time_left_us(call.call), UINT64_MAX);
    cr_expect_not_null(strstr(rpc_call_peer_address_view(net.log.last_call), "127.0.0.1"));
    struct digest id;
    cr_expect_eq(rpc_call_peer(net.log.last_call, &id), 0);
    rpc_call_cancel(call.call);
    net_run(&net);
    net_call_free(&call);
    net_close(&net);
}

Test(rpc_call, cancelling_on_the_client_ends_the_call_on_the_server)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    net.log.on_open = stop_loop;
    net.log.context = net.loop;
    net_call_open(&call, &net, NET_PATH("Hold"), 0);
    net_call_send(&call, "x", 1);
    net_run(&net);
    cr_assert_eq(net.log.open_count, 1);
    rpc_call_cancel(call.call);
    net_run(&net);
    cr_expect_eq(call.status, RPC_CANCELLED);
    net.log.on_done = stop_loop;
    if (net.log.done_count == 0)
        net_run(&net);
    cr_expect_eq(net.log.last_status, RPC_CANCELLED);
    cr_expect_eq(net.log.half_close_count, 0); /* going away is not "no more" */
    net_call_free(&call);
    net_close(&net);
}

static void cancel_on_server(void *context)
{
    struct net *net = context;
    cr_assert_not_null(net->log.last_call);
    rpc_call_cancel(net->log.last_call);
    rpc_call_cancel(net->log.last_call); /* harmless */
}

Test(rpc_call, cancelling_on_the_server_ends_the_call_on_the_client)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Hold"), NET_CALL_US);
    while (net.log.open_count == 0)
        net_run_for(&net, 10000);
    net_later(&net, 1000, cancel_on_server, &net);
    net_run(&net);
    cr_expect_eq(call.status, RPC_CANCELLED, "%d %s", call.status, call.text);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(net.log.last_status, RPC_CANCELLED);
}

static void half_close_call(struct net_call *self, const struct rpc_message *message)
{
    (void)message;
    rpc_call_half_close(self->call);
    cr_expect_eq(rpc_call_send(self->call, "x", 1), ODSI_ERR_STATE);
}

Test(rpc_call, nothing_is_sent_after_half_close)
{
    struct net net = {0};
    struct net_call call = {.on_message = half_close_call};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Bidi"), NET_CALL_US);
    net_call_send(&call, "x", 1);
    net_run(&net);
    cr_expect_eq(call.status, RPC_OK);
    cr_expect_eq(call.message_count, 1);
    net_call_free(&call);
    net_close(&net);
}

Test(rpc_call, a_dead_port_is_unavailable_at_once)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open_loop(&net);
    net_open_server(&net); /* to learn of a free port */
    rpc_server_close(net.server, stop_loop, net.loop);
    net.server = NULL;
    net_run(&net);
    net_open_channel(&net, NULL);
    net_call_unary(&call, &net, NET_PATH("Unary"), "x", 1, NET_CALL_US);
    cr_expect_eq(call.status, RPC_UNAVAILABLE);
    net_call_free(&call);
    net_close(&net);
}

static void note_status(void *context, enum rpc_status status, const char *text,
                        const struct rpc_message *reply)
{
    struct net_call *call = context;
    (void)text;
    (void)reply;
    call->done_count++;
    call->status = status;
    rpc_loop_stop(call->net->loop);
}

static void open_late_server(void *context)
{
    struct net *net = context;
    const struct rpc_service *service = &net->service;
    const struct rpc_server_config config = {
        .listen = net->address, .services = service, .service_count = 1};
    cr_assert_eq(rpc_server_open(&net->server, net->loop, &config), ODSI_OK, "%s", odsi_err_text());
}

/* Goal: a call that waits for its peer finds it soon after it comes up. */
Test(rpc_call, a_waiting_call_finds_a_server_that_comes_up_later)
{
    struct net net = {0};
    struct net_call call = {.net = &net};
    net_open_loop(&net);
    net_open_server(&net); /* to learn of a free port */
    rpc_server_close(net.server, stop_loop, net.loop);
    net.server = NULL;
    net_run(&net);
    net_open_channel(&net, NULL);
    enum odsi_err err =
        rpc_unary(net.channel, NET_PATH("Unary"), NET_CALL_US, 1, "x", 1, note_status, &call);
    cr_assert_eq(err, ODSI_OK);
    net_later(&net, 3000000, open_late_server, &net);
    const uint64_t start_us = clock_monotonic_us();
    net_run(&net);
    cr_expect_eq(call.status, RPC_OK);
    cr_expect_lt(clock_monotonic_us() - start_us, 4500000); /* not gRPC's own 1, 2.6, 5.1 s */
    net_close(&net);
}

/* ---- other processes, other threads -------------------------------------------------------- */

static void kill_child(void *context)
{
    net_child_signal(context, SIGKILL);
}

Test(rpc_call, a_peer_killed_in_mid_stream_makes_the_call_unavailable)
{
    struct net_child child;
    struct net net = {0};
    struct net_call call = {0};
    struct payloads payloads = {0};
    net_child_start(&child);
    net_open_loop(&net);
    net_open_channel(&net, &(struct rpc_channel_config){.address = child.address});
    net_call_open(&call, &net, NET_PATH("Bidi"), 0);
    for (uint32_t i = 0; i < 16; i++)
        cr_assert_eq(send_tracked(call.call, &payloads, MEBIBYTE, i), ODSI_OK);
    net_later(&net, 20000, kill_child, &child);
    net_run(&net);
    cr_expect_eq(call.status, RPC_UNAVAILABLE, "%d %s", call.status, call.text);
    cr_expect_eq(call.done_count, 1);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(payloads.release_count, 16);
}

static void freeze_child(void *context)
{
    net_child_signal(context, SIGSTOP);
}

/* Goal: a peer whose machine stands still is noticed, though its kernel keeps answering. */
Test(rpc_call, a_frozen_peer_is_noticed_by_keepalive)
{
    struct net_child child;
    struct net net = {0};
    struct net_call call = {0};
    net_child_start(&child);
    net_open_loop(&net);
    net_open_channel(&net, &(struct rpc_channel_config){.address = child.address,
                                                        .keepalive_timeout_us = 1000000});
    net_call_open(&call, &net, NET_PATH("Hold"), 0);
    net_later(&net, 100000, freeze_child, &child);
    const uint64_t start_us = clock_monotonic_us();
    net_run(&net);
    cr_expect_eq(call.status, RPC_UNAVAILABLE, "%d %s", call.status, call.text);
    cr_expect_lt(clock_monotonic_us() - start_us, 8000000);
    net_call_free(&call);
    net_close(&net);
    net_child_signal(&child, SIGKILL);
}

/* Goal: pings that keep an idle stream alive do not make the server hang up ("too many pings"). */
Test(rpc_call, an_idle_stream_stays_open)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Hold"), 0);
    net_run_for(&net, 6000000);
    cr_expect_eq(call.done_count, 0);
    rpc_call_cancel(call.call);
    net_run(&net);
    net_call_free(&call);
    net_close(&net);
}

#define SENDER_COUNT   4u
#define SENDER_FRAMES  300u
#define SENDER_PAYLOAD 3000u

struct sender {
    pthread_t thread;
    struct rpc_call *call;
    struct payloads *payloads;
    uint32_t first_seed;
    int sent_to_the_end;
};

static void *run_sender(void *context)
{
    struct sender *self = context;
    for (uint32_t i = 0; i < SENDER_FRAMES; i++) {
        enum odsi_err err = ODSI_ERR_BUSY;
        while (err == ODSI_ERR_BUSY)
            err = send_tracked(self->call, self->payloads, SENDER_PAYLOAD, self->first_seed + i);
        if (err != ODSI_OK)
            return NULL;
    }
    self->sent_to_the_end = 1;
    return NULL;
}

static void check_any_frame(struct net_call *self, const struct rpc_message *message)
{
    check_frame(message);
    if (self->message_count == SENDER_COUNT * SENDER_FRAMES)
        rpc_call_half_close(self->call);
}

static void start_senders(struct sender *senders, struct net_call *call, struct payloads *payloads)
{
    for (uint32_t i = 0; i < SENDER_COUNT; i++) {
        senders[i] = (struct sender){
            .call = rpc_call_ref(call->call), .payloads = payloads, .first_seed = i * 1000};
        cr_assert_eq(pthread_create(&senders[i].thread, NULL, run_sender, &senders[i]), 0);
    }
}

Test(rpc_call, threads_send_at_once_and_every_frame_arrives_whole)
{
    struct net net = {0};
    struct net_call call = {.on_message = check_any_frame};
    struct payloads payloads = {0};
    struct sender senders[SENDER_COUNT];
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Bidi"), 0);
    start_senders(senders, &call, &payloads);
    net_run(&net);
    for (uint32_t i = 0; i < SENDER_COUNT; i++) {
        pthread_join(senders[i].thread, NULL);
        cr_expect(senders[i].sent_to_the_end);
        rpc_call_unref(senders[i].call);
    }
    cr_expect_eq(call.status, RPC_OK, "%s", call.text);
    cr_expect_eq(call.message_count, SENDER_COUNT * SENDER_FRAMES);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(payloads.release_count, SENDER_COUNT * SENDER_FRAMES);
    cr_expect_eq(payloads.double_count, 0);
}

static void cancel_call(struct net_call *self, const struct rpc_message *message)
{
    (void)message;
    if (self->message_count == 20)
        rpc_call_cancel(self->call);
}

/* Goal: a call may end while other threads are sending on it, and its object may outlive even the
 * loop in their hands. */
Test(rpc_call, threads_that_send_past_the_end_are_told_so)
{
    struct net net = {0};
    struct net_call call = {.on_message = cancel_call};
    struct payloads payloads = {0};
    struct sender senders[SENDER_COUNT];
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Bidi"), 0);
    start_senders(senders, &call, &payloads);
    net_run(&net);
    cr_expect_eq(call.status, RPC_CANCELLED);
    net_close(&net);
    for (uint32_t i = 0; i < SENDER_COUNT; i++) {
        pthread_join(senders[i].thread, NULL);
        cr_expect_eq(rpc_call_send(senders[i].call, "x", 1), ODSI_ERR_STATE);
        rpc_call_unref(senders[i].call);
    }
    net_call_free(&call);
    cr_expect_eq(payloads.double_count, 0);
}

/* ---- ends from above ----------------------------------------------------------------------- */

Test(rpc_call, closing_the_channel_ends_its_calls_later_on_the_loop)
{
    struct net net = {0};
    struct net_call calls[3] = {{0}};
    net_open(&net, NULL);
    for (int i = 0; i < 3; i++)
        net_call_open(&calls[i], &net, NET_PATH("Hold"), 0);
    net_run_for(&net, 50000);
    rpc_channel_close(&net.channel);
    for (int i = 0; i < 3; i++)
        cr_expect_eq(calls[i].done_count, 0);
    for (int i = 0; i < 3; i++)
        while (calls[i].done_count == 0)
            net_run(&net);
    for (int i = 0; i < 3; i++) {
        cr_expect_eq(calls[i].done_count, 1);
        cr_expect_eq(calls[i].status, RPC_CANCELLED);
        net_call_free(&calls[i]);
    }
    net_close(&net);
}

static void close_channel(void *context, enum rpc_status status, const char *text,
                          const struct rpc_message *reply)
{
    struct net *net = context;
    (void)text;
    cr_expect_eq(status, RPC_OK);
    cr_expect_eq(reply->size, 1);
    rpc_channel_close(&net->channel);
    rpc_loop_stop(net->loop);
}

Test(rpc_call, the_channel_may_be_closed_in_the_last_callback_of_its_last_call)
{
    struct net net = {0};
    net_open(&net, NULL);
    enum odsi_err err =
        rpc_unary(net.channel, NET_PATH("Unary"), NET_CALL_US, 0, "x", 1, close_channel, &net);
    cr_assert_eq(err, ODSI_OK);
    net_run(&net);
    net_close(&net);
}

Test(rpc_call, closing_the_server_ends_open_calls_on_both_sides)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Hold"), 0);
    while (net.log.open_count == 0)
        net_run_for(&net, 10000);
    rpc_server_close(net.server, NULL, NULL);
    net.server = NULL;
    net_run(&net);
    cr_expect_eq(call.done_count, 1);
    cr_expect_neq(call.status, RPC_OK);
    net_call_free(&call);
    net_close(&net);
    cr_expect_eq(net.log.done_count, 1);
    cr_expect_eq(net.log.last_status, RPC_CANCELLED);
}

/* Goal: no allocation of ours can fail in a way that hangs, leaks or crashes.
 * How: let the 1st, 2nd, 3rd ... allocation of a whole conversation fail until none does. */
Test(rpc_call, every_failed_allocation_ends_in_an_error_or_a_status)
{
    long failed = 0;
    for (int is_over = 0; !is_over; failed++) {
        struct net net = {0};
        struct net_call call = {.net = &net};
        net_open(&net, NULL);
        alloc_fail_after(failed);
        enum odsi_err err = rpc_unary(net.channel, NET_PATH("Parse"), NET_CALL_US, 0, "\x0a\x01x",
                                      3, note_status, &call);
        const int opened = err == ODSI_OK;
        if (opened) {
            /* The watchdog allocates too, so it is not used; the deadline ends the call anyway. */
            rpc_loop_run(net.loop);
            cr_assert_eq(call.done_count, 1);
        }
        alloc_fail_after(-1);
        is_over = opened && call.status == RPC_OK;
        cr_expect(is_over || !opened || call.status == RPC_RESOURCE_EXHAUSTED ||
                      call.status == RPC_INVALID_ARGUMENT || call.status == RPC_INTERNAL,
                  "allocation %ld: status %d", failed, call.status);
        net_close(&net);
        cr_assert_lt(failed, 100);
    }
    cr_expect_gt(failed, 5);
}
