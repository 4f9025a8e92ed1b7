/* Received bytes: pieces, flat copies, and the hand-read frame of header and payload. */
#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/net/rpc_private.h"

#include <grpc/byte_buffer_reader.h>
#include <string.h>

#define FRAME_HEADER_KEY  0x0au /* field 1, length-delimited */
#define FRAME_PAYLOAD_KEY 0x12u /* field 2, length-delimited */

enum odsi_err rpc_message_read(struct rpc_message_reader *reader, grpc_byte_buffer *buffer)
{
    grpc_byte_buffer_reader slices;
    grpc_slice *slice = NULL;
    size_t count = 0;
    rpc_message_reset(reader);
    if (!grpc_byte_buffer_reader_init(&slices, buffer))
        return odsi_fail(ODSI_ERR_CORRUPT, "a message that gRPC cannot read");
    enum odsi_err err = ODSI_OK;
    while (err == ODSI_OK && grpc_byte_buffer_reader_peek(&slices, &slice)) {
        if (GRPC_SLICE_LENGTH(*slice) == 0)
            continue;
        if (count == reader->piece_capacity) {
            const size_t capacity = count ? 2 * count : 8;
            err = alloc_resize(&reader->pieces, capacity, sizeof *reader->pieces);
            if (err != ODSI_OK)
                break;
            reader->piece_capacity = capacity;
        }
        reader->pieces[count].data = GRPC_SLICE_START_PTR(*slice);
        reader->pieces[count].size = GRPC_SLICE_LENGTH(*slice);
        reader->message.size += reader->pieces[count++].size;
    }
    grpc_byte_buffer_reader_destroy(&slices);
    reader->message.pieces = reader->pieces;
    reader->message.piece_count = count;
    reader->message.flat = &reader->flat;
    return err;
}

void rpc_message_reset(struct rpc_message_reader *reader)
{
    alloc_free(reader->flat);
    reader->flat = NULL;
    memset(&reader->message, 0, sizeof reader->message);
}

void rpc_message_free(struct rpc_message_reader *reader)
{
    rpc_message_reset(reader);
    alloc_free(reader->pieces);
    reader->pieces = NULL;
    reader->piece_capacity = 0;
}

/* Copies size bytes from offset of the message; they are there. */
static void copy_out(const struct rpc_message *message, size_t offset, void *out, size_t size)
{
    uint8_t *to = out;
    for (size_t i = 0; i < message->piece_count && size > 0; i++) {
        const struct rpc_piece *piece = &message->pieces[i];
        if (offset >= piece->size) {
            offset -= piece->size;
            continue;
        }
        const size_t here = piece->size - offset < size ? piece->size - offset : size;
        memcpy(to, piece->data + offset, here);
        to += here;
        size -= here;
        offset = 0;
    }
}

const uint8_t *rpc_message_flat(const struct rpc_message *message)
{
    static const uint8_t nothing[1];
    if (message->size == 0)
        return nothing;
    if (message->piece_count == 1)
        return message->pieces[0].data;
    if (!message->flat)
        return NULL; /* made by hand */
    if (!*message->flat) {
        uint8_t *copy = NULL;
        if (alloc_zeroed(&copy, message->size, 1) != ODSI_OK)
            return NULL;
        copy_out(message, 0, copy, message->size);
        *message->flat = copy;
    }
    return *message->flat;
}

/* A place in the message. */
struct cursor {
    const struct rpc_message *message;
    size_t piece;
    size_t in_piece;
    size_t offset; /* in the whole message */
};

static int next_byte(struct cursor *self, uint8_t *out)
{
    while (self->piece < self->message->piece_count &&
           self->in_piece == self->message->pieces[self->piece].size) {
        self->piece++;
        self->in_piece = 0;
    }
    if (self->piece == self->message->piece_count)
        return 0;
    *out = self->message->pieces[self->piece].data[self->in_piece++];
    self->offset++;
    return 1;
}

/* The caller knows that size bytes are left. */
static void skip(struct cursor *self, size_t size)
{
    self->offset += size;
    while (size > 0) {
        const size_t left = self->message->pieces[self->piece].size - self->in_piece;
        const size_t here = left < size ? left : size;
        self->in_piece += here;
        size -= here;
        if (size > 0) {
            self->piece++;
            self->in_piece = 0;
        }
    }
}

/* A length that the rest of the message can hold. */
static int next_length(struct cursor *self, size_t *out)
{
    uint64_t value = 0;
    uint8_t byte = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        if (!next_byte(self, &byte))
            return 0;
        if (shift == 63 && byte > 1)
            return 0;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) {
            *out = (size_t)value;
            return value <= self->message->size - self->offset;
        }
    }
    return 0;
}

/* Where size bytes at the cursor lie in one piece, else NULL. */
static const uint8_t *one_piece(const struct cursor *self, size_t size)
{
    static const uint8_t nothing[1];
    if (size == 0)
        return nothing;
    struct cursor at = *self;
    while (at.in_piece == at.message->pieces[at.piece].size) {
        at.piece++;
        at.in_piece = 0;
    }
    const struct rpc_piece *piece = &at.message->pieces[at.piece];
    return piece->size - at.in_piece >= size ? piece->data + at.in_piece : NULL;
}

enum odsi_err rpc_frame_read(struct rpc_frame *out, const struct rpc_message *message,
                             uint8_t *scratch)
{
    struct cursor at = {.message = message};
    uint8_t key = 0;
    memset(out, 0, sizeof *out);
    out->header = scratch;
    if (!next_byte(&at, &key) || key != FRAME_HEADER_KEY || !next_length(&at, &out->header_size))
        return odsi_fail(ODSI_ERR_CORRUPT, "a frame of %zu bytes that does not begin with a header",
                         message->size);
    if (out->header_size > LIMIT_HOP_HEADER_SIZE)
        return odsi_fail(ODSI_ERR_CORRUPT, "a frame header of %zu bytes; %u are allowed",
                         out->header_size, LIMIT_HOP_HEADER_SIZE);
    const uint8_t *header = one_piece(&at, out->header_size);
    if (!header)
        copy_out(message, at.offset, scratch, out->header_size);
    out->header = header ? header : scratch;
    skip(&at, out->header_size);
    out->payload_offset = at.offset;
    if (!next_byte(&at, &key))
        return ODSI_OK; /* an empty payload may be left out */
    if (key != FRAME_PAYLOAD_KEY || !next_length(&at, &out->payload_size))
        return odsi_fail(ODSI_ERR_CORRUPT, "a frame whose header is not followed by a payload");
    out->payload_offset = at.offset;
    if (message->size - at.offset != out->payload_size)
        return odsi_fail(ODSI_ERR_CORRUPT, "a frame with %zu bytes behind its payload",
                         message->size - at.offset - out->payload_size);
    return ODSI_OK;
}

void rpc_frame_copy_payload(const struct rpc_frame *self, const struct rpc_message *message,
                            void *out)
{
    copy_out(message, self->payload_offset, out, self->payload_size);
}
