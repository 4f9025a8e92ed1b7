/* Whole small files: read under a ceiling, replaced whole or not at all. Any thread; blocks for the
 * time of the disk. */
#ifndef ODSI_COMMON_BASE_IO_H
#define ODSI_COMMON_BASE_IO_H
#include "common/base/buf.h"
#include "common/base/err.h"

#include <stddef.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define IO_PATH_SIZE 4096u

/* Appends the whole file to out, whose ceiling bounds it.
 * Errors: ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_RANGE (larger than out may grow). */
ODSI_MUST_USE enum odsi_err io_read_file(const char *path, struct buf *out);

/* Replaces path by data: readers see the old content or the new, never a part, also after a crash
 * when sync is set. mode is the file's, whatever the umask.
 * Errors: ODSI_ERR_IO with path and cause; the old file is then as it was. */
ODSI_MUST_USE enum odsi_err io_write_file(const char *path, const void *data, size_t size,
                                          mode_t mode, int sync);

/* Makes folder and those above it with mode; those that exist stay as they are.
 * Errors: ODSI_ERR_IO, ODSI_ERR_RANGE (path too long). */
ODSI_MUST_USE enum odsi_err io_make_folders(const char *folder, mode_t mode);

#ifdef __cplusplus
}
#endif
#endif
