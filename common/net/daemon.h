/* What every server program of ours does around its event loop. Main thread only. */
#ifndef ODSI_COMMON_NET_DAEMON_H
#define ODSI_COMMON_NET_DAEMON_H
#include "common/base/err.h"
#include "common/base/limits.h"
#include "common/crypto/identity.h"

#include <stddef.h>
#include <stdint.h>

#define DAEMON_PLACE_SIZE (DIGEST_HEX_SIZE + LIMIT_ADDRESS_SIZE + 16u)

/* Lets a write beyond a file size limit fail instead of killing the process. */
void daemon_survive_file_limit(void);

/* Opens the key at path, or when that is NULL FOLDER/NAME, and makes it on first start; the
 * passphrase is $ODSI_PASSPHRASE. Errors: those of identity_open, ODSI_ERR_RANGE. */
ODSI_MUST_USE enum odsi_err daemon_open_identity(struct identity **out, const char *path,
                                                 const char *folder, const char *name);

/* "host:port" where programs on this machine reach a server that listens on `listen` and got
 * `port`: 127.0.0.1 stands for "all interfaces". size is at least LIMIT_ADDRESS_SIZE.
 * Errors: ODSI_ERR_INVALID (too long). */
ODSI_MUST_USE enum odsi_err daemon_address(char *out, size_t size, const char *listen,
                                           uint16_t port);

/* Says on standard output that program serves at [ID@]address, and writes the same to ready_file
 * (NULL: none) for scripts that wait for it. identity NULL: plaintext, no ID.
 * Errors: those of io_write_file. */
ODSI_MUST_USE enum odsi_err daemon_announce(const char *program, const struct identity *identity,
                                            const char *address, const char *ready_file);
/* Takes the ready file away, at the end and before a start (one of a killed run may lie there). */
void daemon_withdraw(const char *ready_file);
#endif
