/* Trust on first use: which identity answered at an address when we first came there.
 *
 * The file has one line per address, "host:port ID" with ID in 64 hex digits; empty lines and
 * lines that start with '#' are allowed, so that people can edit it. It is read anew at every
 * check and extended by one whole line under a lock, so several programs may share it.
 * Any thread; blocks for the time of one small read and write. */
#ifndef ODSI_WORKER_GATEWAY_KNOWN_PEERS_H
#define ODSI_WORKER_GATEWAY_KNOWN_PEERS_H
#include "common/base/err.h"
#include "common/crypto/digest.h"

#define KNOWN_PEERS_SIZE_MAX (1u << 20) /* bytes of the file; some 10,000 peers */

/* Whether id is the one that path remembers for address; an address that is not in the file is
 * added with id (the file is made with mode 0600).
 * Errors: ODSI_ERR_DENIED (another id is remembered; the sentence says what to do),
 * ODSI_ERR_CORRUPT (a line that breaks the rules, named), ODSI_ERR_IO, ODSI_ERR_RANGE (full). */
ODSI_MUST_USE enum odsi_err known_peers_check(const char *path, const char *address,
                                              const struct digest *id);
#endif
