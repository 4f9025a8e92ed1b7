/* How fast this machine reads memory: the ceiling of decoding, which reads every weight once per
 * token; and how much of it this process takes. Main thread; starts threads of its own for the time
 * of the call. */
#ifndef ODSI_WORKER_CLI_CLI_MEMORY_H
#define ODSI_WORKER_CLI_CLI_MEMORY_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

/* Gigabytes (10^9) per second that thread_count threads read together from size bytes, the best of
 * some passes in about a third of a second. size should be several times the caches.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_IO (no thread). */
ODSI_MUST_USE enum odsi_err cli_memory_read_gbps(double *out, uint32_t thread_count, size_t size);

/* Begins to count anew for cli_memory_peak. Returns 0 when the system does not do that. */
int cli_memory_peak_reset(void);
/* The most bytes that this process had resident at once since then; 0: the system does not tell. */
uint64_t cli_memory_peak(void);
#endif
