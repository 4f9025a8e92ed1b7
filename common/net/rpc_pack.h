/* protobuf-c messages over rpc_call: unpacking under a memory limit, packing and sending.
 * Loop thread, or any thread for pack. */
#ifndef ODSI_COMMON_NET_RPC_PACK_H
#define ODSI_COMMON_NET_RPC_PACK_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/net/rpc_call.h"

#include <protobuf-c/protobuf-c.h>

/* Unpacks with at most LIMIT_UNPACK_SIZE bytes of memory; *out is ended with rpc_unpack_free.
 * Errors: ODSI_ERR_INVALID (malformed, or too large when unpacked), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err rpc_unpack(void *out_message, const ProtobufCMessageDescriptor *type,
                                       const struct rpc_message *message);
ODSI_MUST_USE enum odsi_err rpc_unpack_bytes(void *out_message,
                                             const ProtobufCMessageDescriptor *type,
                                             const uint8_t *data, size_t size);
/* NULL is allowed. */
void rpc_unpack_free(void *message);
/* Packs into out (reset first). Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_RANGE (out's ceiling). */
ODSI_MUST_USE enum odsi_err rpc_pack(struct buf *out, const ProtobufCMessage *message);
/* Packs and sends. Errors: those of rpc_pack and rpc_call_send. */
ODSI_MUST_USE enum odsi_err rpc_send(struct rpc_call *call, const ProtobufCMessage *message);
/* Server: the one reply of a unary call, then RPC_OK; on any error the call fails with it. */
void rpc_reply(struct rpc_call *call, const ProtobufCMessage *message);
#endif
