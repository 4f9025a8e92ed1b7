/* The embedded store: one SQLite database file, shared by any number of coordinators on one
 * machine. The only file that includes sqlite3.h is its source. See store.h for the contract. */
#ifndef ODSI_COORDINATOR_STORE_SQLITE_H
#define ODSI_COORDINATOR_STORE_SQLITE_H
#include "common/base/err.h"
#include "coordinator/store.h"

#include <stdint.h>

/* path may be ":memory:". page_count_max bounds the file to that many pages of 4 KiB, for tests of
 * a full disk; 0: no bound. Errors: those of store_open. */
ODSI_MUST_USE enum odsi_err store_sqlite_open(struct store **out, const char *path,
                                              uint32_t page_count_max);
#endif
