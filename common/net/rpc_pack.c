#include "common/net/rpc_pack.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/net/rpc_private.h"

#include <string.h>

/* protobuf-c allocates whatever a message asks for: 4 MB of empty repeated fields become 500 MB.
 * This allocator has a budget. */
struct budget {
    ProtobufCAllocator allocator;
    size_t left_size;
    int is_out_of_memory; /* of the machine's, not of the budget */
};

#define ALLOCATION_COST 16u /* what malloc adds to each */

static void *budget_alloc(void *data, size_t size)
{
    struct budget *self = data;
    void *memory = NULL;
    if (size > self->left_size || self->left_size - size < ALLOCATION_COST)
        return NULL;
    if (alloc_resize(&memory, size, 1) != ODSI_OK) {
        self->is_out_of_memory = 1;
        return NULL;
    }
    self->left_size -= size + ALLOCATION_COST;
    return memory;
}

static void budget_free(void *data, void *memory)
{
    (void)data;
    alloc_free(memory);
}

enum odsi_err rpc_unpack_bytes(void *out_message, const ProtobufCMessageDescriptor *type,
                               const uint8_t *data, size_t size)
{
    static const uint8_t nothing[1]; /* protobuf-c copies from it, if only no bytes */
    struct budget budget = {.allocator = {.alloc = budget_alloc, .free = budget_free},
                            .left_size = LIMIT_UNPACK_SIZE};
    budget.allocator.allocator_data = &budget;
    ProtobufCMessage *message =
        protobuf_c_message_unpack(type, &budget.allocator, size, size ? data : nothing);
    memcpy(out_message, &message, sizeof message);
    if (message)
        return ODSI_OK;
    if (budget.is_out_of_memory) /* our trouble, not the sender's: it may try again */
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for a message of %zu bytes", size);
    return odsi_fail(ODSI_ERR_INVALID,
                     "%zu bytes that are no %s, or need more than %u bytes of memory", size,
                     type->name, LIMIT_UNPACK_SIZE);
}

enum odsi_err rpc_unpack(void *out_message, const ProtobufCMessageDescriptor *type,
                         const struct rpc_message *message)
{
    const void *none = NULL;
    const uint8_t *data = rpc_message_flat(message);
    if (data)
        return rpc_unpack_bytes(out_message, type, data, message->size);
    memcpy(out_message, &none, sizeof none);
    return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for a message of %zu bytes", message->size);
}

void rpc_unpack_free(void *message)
{
    ProtobufCAllocator allocator = {.free = budget_free};
    if (message)
        protobuf_c_message_free_unpacked(message, &allocator);
}

struct buf_writer {
    ProtobufCBuffer base;
    struct buf *out;
};

static void append(ProtobufCBuffer *buffer, size_t size, const uint8_t *data)
{
    struct buf_writer *self = (struct buf_writer *)(void *)buffer;
    (void)buf_append(self->out, data, size); /* out remembers a failure */
}

enum odsi_err rpc_pack(struct buf *out, const ProtobufCMessage *message)
{
    struct buf_writer writer = {.base = {.append = append}, .out = out};
    buf_reset(out);
    protobuf_c_message_pack_to_buffer(message, &writer.base);
    return buf_status(out);
}

enum odsi_err rpc_send(struct rpc_call *call, const ProtobufCMessage *message)
{
    struct buf packed;
    buf_init(&packed, LIMIT_UNPACK_SIZE); /* more than that no receiver unpacks */
    enum odsi_err err = rpc_pack(&packed, message);
    if (err == ODSI_OK)
        err = rpc_call_send(call, packed.data, packed.size);
    buf_free(&packed);
    return err;
}

void rpc_reply(struct rpc_call *call, const ProtobufCMessage *message)
{
    struct buf packed;
    buf_init(&packed, LIMIT_UNPACK_SIZE);
    enum odsi_err err = rpc_pack(&packed, message);
    if (err == ODSI_OK)
        err = rpc_call_send_last(call, packed.data, packed.size, RPC_OK);
    if (err != ODSI_OK)
        rpc_call_fail(call, err);
    buf_free(&packed);
}
