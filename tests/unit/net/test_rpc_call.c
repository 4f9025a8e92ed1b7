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
