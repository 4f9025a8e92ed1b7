/* SHA-256, with a domain tag for everything that is signed. Any thread; one owner per stream. */
#ifndef ODSI_COMMON_CRYPTO_DIGEST_H
#define ODSI_COMMON_CRYPTO_DIGEST_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

#define DIGEST_SIZE     32u
#define DIGEST_HEX_SIZE 65u /* with the NUL */

struct digest {
    uint8_t bytes[DIGEST_SIZE];
};

struct digest_stream;

/* SHA-256 of data. Cannot fail but for memory or a broken libcrypto, which abort. */
void digest_of(struct digest *out, const void *data, size_t size);

/* Errors: ODSI_ERR_NO_MEMORY. Ended with digest_stream_close; may be reused after a finish. */
ODSI_MUST_USE enum odsi_err digest_stream_open(struct digest_stream **out);
void digest_stream_add(struct digest_stream *self, const void *data, size_t size);
/* Writes the digest of everything added and starts over. */
void digest_stream_finish(struct digest_stream *self, struct digest *out);
void digest_stream_close(struct digest_stream **self);

int digest_equal(const struct digest *a, const struct digest *b);
void digest_to_hex(char out[DIGEST_HEX_SIZE], const struct digest *self);
/* Errors: ODSI_ERR_INVALID (not 64 hex digits). */
ODSI_MUST_USE enum odsi_err digest_from_hex(struct digest *out, const char *text);
#endif
