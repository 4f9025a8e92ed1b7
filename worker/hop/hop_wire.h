/* Messages of proto/odsi/v1/hop.proto to the plain structs of hop.h and back.
 * Pure; any thread. Lengths and counts are checked here, meaning in hop.c. */
#ifndef ODSI_WORKER_HOP_HOP_WIRE_H
#define ODSI_WORKER_HOP_HOP_WIRE_H
#include "common/base/buf.h"
#include "odsi/v1/hop.pb-c.h"
#include "worker/hop/hop.h"

/* Errors: ODSI_ERR_INVALID (a field of the wrong size or out of range, named),
 * ODSI_ERR_UNSUPPORTED (codec, KV type), ODSI_ERR_NO_MEMORY. out is ended with hop_spec_free, also
 * after an error. */
ODSI_MUST_USE enum odsi_err hop_wire_read_spec(struct hop_spec *out,
                                               const Odsi__V1__OpenSession *message);

/* Errors: ODSI_ERR_INVALID. */
ODSI_MUST_USE enum odsi_err hop_wire_read_id(struct hop_session_id *out,
                                             const ProtobufCBinaryData *bytes);
ODSI_MUST_USE enum odsi_err hop_wire_read_header(struct hop_header *out,
                                                 const Odsi__V1__StepHeader *message);

/* Appends the packed StepHeader. Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_RANGE (out's ceiling). */
ODSI_MUST_USE enum odsi_err hop_wire_write_header(struct buf *out, const struct hop_header *header);
/* Appends a packed ControlEvent with a token. Errors: as above. */
ODSI_MUST_USE enum odsi_err hop_wire_write_token(struct buf *out, const struct hop_header *header,
                                                 uint32_t token, float logprob, int finish);
#endif
