/* Messages in pieces, and frames read across them. */
#include "common/base/buf.h"
#include "common/base/clock.h"
#include "common/base/limits.h"
#include "common/net/rpc_call.h"

#include <criterion/criterion.h>
#include <string.h>

static uint8_t scratch[LIMIT_HOP_HEADER_SIZE];

static enum odsi_err read_whole(struct rpc_frame *frame, const void *data, size_t size)
{
    const struct rpc_piece piece = {.data = data, .size = size};
    const struct rpc_message message = {.size = size, .piece_count = 1, .pieces = &piece};
    return rpc_frame_read(frame, &message, scratch);
}

Test(rpc_message, a_frame_is_a_header_then_a_payload)
{
    static const struct {
        const char *bytes;
        size_t size;
        enum odsi_err err;
        size_t header_size, payload_size;
    } cases[] = {
        {"\x0a\x02hh\x12\x03ppp", 9, ODSI_OK, 2, 3},
        {"\x0a\x00\x12\x03ppp", 7, ODSI_OK, 0, 3},
        {"\x0a\x02hh\x12\x00", 6, ODSI_OK, 2, 0},
        {"\x0a\x02hh", 4, ODSI_OK, 2, 0}, /* an empty payload left out */
        {"\x0a\x82\x80\x00hh", 6, ODSI_OK, 2, 0},
        {"", 0, ODSI_ERR_CORRUPT, 0, 0},
        {"\x0a", 1, ODSI_ERR_CORRUPT, 0, 0},
        {"\x0a\x03hh", 4, ODSI_ERR_CORRUPT, 0, 0},            /* shorter than it says */
        {"\x12\x03ppp\x0a\x02hh", 9, ODSI_ERR_CORRUPT, 0, 0}, /* the wrong order */
        {"\x12\x03ppp", 5, ODSI_ERR_CORRUPT, 0, 0},           /* no header */
        {"\x0a\x02hh\x12\x04ppp", 9, ODSI_ERR_CORRUPT, 0, 0}, /* a payload cut short */
        {"\x0a\x02hh\x12\x02ppp", 9, ODSI_ERR_CORRUPT, 0, 0}, /* bytes behind it */
        {"\x0a\x02hh\x1a\x03ppp", 9, ODSI_ERR_CORRUPT, 0, 0}, /* another field */
        {"\x08\x02hh", 4, ODSI_ERR_CORRUPT, 0, 0},            /* a number */
        {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 11, ODSI_ERR_CORRUPT, 0, 0},
        {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f", 11, ODSI_ERR_CORRUPT, 0, 0},
        {"\x0a\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x00", 12, ODSI_ERR_CORRUPT, 0, 0},
        {"\x0a\x02hh\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 15, ODSI_ERR_CORRUPT, 0, 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct rpc_frame frame;
        cr_assert_eq(read_whole(&frame, cases[i].bytes, cases[i].size), cases[i].err, "case %zu",
                     i);
        if (cases[i].err != ODSI_OK)
            continue;
        cr_expect_eq(frame.header_size, cases[i].header_size, "case %zu", i);
        cr_expect_eq(frame.payload_size, cases[i].payload_size, "case %zu", i);
        for (size_t k = 0; k < frame.header_size; k++)
            cr_expect_eq(frame.header[k], 'h');
        char payload[4] = "";
        const struct rpc_piece piece = {.data = (const uint8_t *)cases[i].bytes,
                                        .size = cases[i].size};
        const struct rpc_message message = {
            .size = cases[i].size, .piece_count = 1, .pieces = &piece};
        rpc_frame_copy_payload(&frame, &message, payload);
        cr_expect(memcmp(payload, "ppp", frame.payload_size) == 0, "case %zu", i);
    }
}

Test(rpc_message, a_header_longer_than_the_limit_is_corrupt)
{
    struct buf frame;
    struct rpc_frame out;
    buf_init(&frame, 1u << 20);
    for (uint32_t size = LIMIT_HOP_HEADER_SIZE; size <= LIMIT_HOP_HEADER_SIZE + 1; size++) {
        const uint8_t key[] = {0x0a, (uint8_t)(size | 0x80), (uint8_t)(size >> 7 | 0x80),
                               (uint8_t)(size >> 14)};
        buf_reset(&frame);
        buf_append(&frame, key, sizeof key);
        for (uint32_t i = 0; i < size; i++)
            buf_append_u8(&frame, 'h');
        cr_assert_eq(buf_status(&frame), ODSI_OK);
        cr_expect_eq(read_whole(&out, frame.data, frame.size),
                     size <= LIMIT_HOP_HEADER_SIZE ? ODSI_OK : ODSI_ERR_CORRUPT);
    }
    buf_free(&frame);
}

/* Goal: where the pieces of a message end must not matter.
 * How: every way to cut one frame into three pieces, some of them empty. */
Test(rpc_message, a_frame_reads_the_same_however_it_is_cut)
{
    static const uint8_t bytes[] = "\x0a\x05HEADR\x12\x09PAYLOADXX";
    const size_t size = sizeof bytes - 1;
    for (size_t a = 0; a <= size; a++) {
        for (size_t b = a; b <= size; b++) {
            const struct rpc_piece pieces[3] = {{.data = bytes, .size = a},
                                                {.data = bytes + a, .size = b - a},
                                                {.data = bytes + b, .size = size - b}};
            const struct rpc_message message = {.size = size, .piece_count = 3, .pieces = pieces};
            struct rpc_frame frame;
            char payload[9];
            cr_assert_eq(rpc_frame_read(&frame, &message, scratch), ODSI_OK, "cut %zu %zu", a, b);
            cr_assert_eq(frame.header_size, 5);
            cr_assert(memcmp(frame.header, "HEADR", 5) == 0, "cut %zu %zu", a, b);
            cr_assert_eq(frame.payload_size, 9);
            rpc_frame_copy_payload(&frame, &message, payload);
            cr_assert(memcmp(payload, "PAYLOADXX", 9) == 0, "cut %zu %zu", a, b);
        }
    }
}

/* Goal: no bytes make the reader leave its message (the sanitizers watch) or take back what it
 * promises about sizes. */
Test(rpc_message, any_bytes_are_a_frame_or_an_error)
{
    static const uint8_t valid[] = "\x0a\x05HEADR\x12\x09PAYLOADXX";
    const unsigned seed = (unsigned)clock_unix_us();
    uint32_t state = seed;
    cr_log_info("seed %u", seed);
    for (unsigned round = 0; round < 20000; round++) {
        uint8_t bytes[sizeof valid - 1];
        memcpy(bytes, valid, sizeof bytes);
        for (unsigned i = 0; i < 1 + round % 3; i++) {
            state = state * 1664525u + 1013904223u;
            bytes[(state >> 24) % sizeof bytes] = (uint8_t)(state >> 8);
        }
        state = state * 1664525u + 1013904223u;
        const size_t size = (state >> 20) % (sizeof bytes + 1);
        const size_t cut = size ? (state >> 8) % size : 0;
        const struct rpc_piece pieces[2] = {{.data = bytes, .size = cut},
                                            {.data = bytes + cut, .size = size - cut}};
        const struct rpc_message message = {.size = size, .piece_count = 2, .pieces = pieces};
        struct rpc_frame frame;
        uint8_t payload[sizeof bytes];
        if (rpc_frame_read(&frame, &message, scratch) != ODSI_OK)
            continue;
        cr_assert_leq(frame.payload_offset + frame.payload_size, size, "seed %u", seed);
        cr_assert_leq(frame.header_size, size, "seed %u", seed);
        rpc_frame_copy_payload(&frame, &message, payload);
    }
}

Test(rpc_message, a_message_of_one_piece_is_flat_without_a_copy)
{
    const struct rpc_piece pieces[2] = {{.data = (const uint8_t *)"abc", .size = 3},
                                        {.data = (const uint8_t *)"de", .size = 2}};
    const struct rpc_message one = {.size = 3, .piece_count = 1, .pieces = pieces};
    const struct rpc_message none = {.size = 0, .piece_count = 0, .pieces = pieces};
    const struct rpc_message by_hand = {.size = 5, .piece_count = 2, .pieces = pieces};
    cr_expect_eq(rpc_message_flat(&one), pieces[0].data);
    cr_expect_not_null(rpc_message_flat(&none));
    cr_expect_null(rpc_message_flat(&by_hand));
}
