/* Small files of the state folder: read whole under a ceiling, replaced whole or not at all.
 * Any thread; blocks for the time of one small read or write. */
#ifndef ODSI_WORKER_GATEWAY_STATE_FILE_H
#define ODSI_WORKER_GATEWAY_STATE_FILE_H
#include "common/base/buf.h"
#include "common/base/err.h"

#include <stddef.h>

#define STATE_FILE_PATH_SIZE 4096u

/* Writes "folder/name" to out (STATE_FILE_PATH_SIZE bytes). Errors: ODSI_ERR_RANGE. */
ODSI_MUST_USE enum odsi_err state_file_path(char *out, const char *folder, const char *name);
/* Makes the folder (mode 0700) and those above it. Errors: ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err state_file_folder(const char *folder);

/* Appends the whole file to out, whose ceiling bounds it.
 * Errors: ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_RANGE (larger than out may grow). */
ODSI_MUST_USE enum odsi_err state_file_read(const char *path, struct buf *out);
/* Replaces path by data (mode 0600): readers see the old content or the new, never a part. Not
 * synced to disk, because the event loop must not wait for one: whoever reads such a file checks
 * its content. Errors: ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err state_file_write(const char *path, const void *data, size_t size);
#endif
