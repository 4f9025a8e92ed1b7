/* The description of our services as protoc wrote it (a google.protobuf.FileDescriptorSet), built
 * into the program, and the few questions that server reflection asks about it. Read by hand on the
 * wire, so that descriptor.proto itself is not needed.
 * Threads: immutable after open. */
#ifndef ODSI_COMMON_NET_RPC_DESCRIPTOR_H
#define ODSI_COMMON_NET_RPC_DESCRIPTOR_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

struct rpc_descriptor;

#define RPC_DESCRIPTOR_NONE SIZE_MAX /* no such file */

/* Indexes the files of a set; data is borrowed until close.
 * Errors: ODSI_ERR_CORRUPT, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err rpc_descriptor_open(struct rpc_descriptor **out, const uint8_t *data,
                                                size_t size);
/* The set of this program. */
ODSI_MUST_USE enum odsi_err rpc_descriptor_open_own(struct rpc_descriptor **out);
/* *self may be NULL. */
void rpc_descriptor_close(struct rpc_descriptor **self);

size_t rpc_descriptor_file_count(const struct rpc_descriptor *self);
/* The FileDescriptorProto of file index, as it goes on the wire. */
const uint8_t *rpc_descriptor_file_view(const struct rpc_descriptor *self, size_t index,
                                        size_t *size);
/* The file of that name ("odsi/v1/hop.proto"), or RPC_DESCRIPTOR_NONE. */
size_t rpc_descriptor_by_name(const struct rpc_descriptor *self, const char *name);
/* The file that defines a package-qualified message, field, enum, enum value, service or method
 * ("odsi.v1.Hop.Steps"), or RPC_DESCRIPTOR_NONE. */
size_t rpc_descriptor_by_symbol(const struct rpc_descriptor *self, const char *symbol);
/* Sets marks[i] to 1 for file index and for every file that it imports, however indirectly; marks
 * has file_count bytes. */
void rpc_descriptor_mark_imports(const struct rpc_descriptor *self, size_t index, uint8_t *marks);
#endif
