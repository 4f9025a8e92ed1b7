/* A participant's identity (draft 8.1): a self-made P-256 key. Its id is the SHA-256 of the
 * key's DER SubjectPublicKeyInfo, so the id proves itself; nobody issues it.
 *
 * The key lives in one PEM file of mode 0600 (PKCS#8, encrypted when a passphrase is given); the
 * certificate for TLS is made from it in memory at every start. Keys are never logged.
 * Threads: immutable after open; any thread. */
#ifndef ODSI_COMMON_CRYPTO_IDENTITY_H
#define ODSI_COMMON_CRYPTO_IDENTITY_H
#include "common/base/err.h"
#include "common/crypto/digest.h"

#include <stddef.h>

struct identity;

/* Reads the key at path, or makes one there (parent folder 0700, file 0600, written whole or not
 * at all) when create is set and none exists. passphrase may be NULL.
 * Errors: ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_CORRUPT (not a P-256 key),
 * ODSI_ERR_DENIED (wrong passphrase, or the file may be read by others). */
ODSI_MUST_USE enum odsi_err identity_open(struct identity **out, const char *path, int create,
                                          const char *passphrase);
/* A key that lives only in memory; for tests and one-shot clients. */
ODSI_MUST_USE enum odsi_err identity_make(struct identity **out);
/* Wipes the key. */
void identity_close(struct identity **self);

const struct digest *identity_id_view(const struct identity *self);
/* PEM of the private key and of a self-signed certificate (CN = hex id); valid until close.
 * For TLS only (common/net/rpc_tls). */
const char *identity_key_pem_view(const struct identity *self);
const char *identity_certificate_pem_view(const struct identity *self);

/* The id inside a peer's certificate.
 * Errors: ODSI_ERR_DENIED (empty, not a certificate, not a P-256 key). */
ODSI_MUST_USE enum odsi_err identity_id_of_certificate(struct digest *out, const char *pem,
                                                       size_t size);

/* Where programs keep their files unless told otherwise: $ODSI_HOME, else $XDG_STATE_HOME/odsi,
 * else $HOME/.local/state/odsi. Errors: ODSI_ERR_NOT_FOUND (none of the variables is set),
 * ODSI_ERR_RANGE (longer than size). */
ODSI_MUST_USE enum odsi_err identity_home(char *out, size_t size);
#endif
