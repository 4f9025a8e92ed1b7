#include "common/base/io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static enum odsi_err io_error(const char *what, const char *path)
{
    return odsi_fail(errno == ENOENT ? ODSI_ERR_NOT_FOUND : ODSI_ERR_IO, "%s %s: %s", what, path,
                     strerror(errno));
}

enum odsi_err io_read_file(const char *path, struct buf *out)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return io_error("reading", path);
    enum odsi_err err = ODSI_OK;
    for (;;) {
        char chunk[16384];
        const ssize_t got = read(fd, chunk, sizeof chunk);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            err = io_error("reading", path);
        else if (got > 0)
            err = buf_append(out, chunk, (size_t)got);
        if (got > 0 && err != ODSI_OK)
            odsi_fail_prefix(err, "reading %s", path);
        if (got <= 0 || err != ODSI_OK)
            break;
    }
    close(fd);
    return err;
}

static enum odsi_err write_all(int fd, const char *path, const uint8_t *data, size_t size)
{
    while (size > 0) {
        const ssize_t done = write(fd, data, size);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return io_error("writing", path);
        data += done;
        size -= (size_t)done;
    }
    return ODSI_OK;
}

/* The name in path's folder is durable only when the folder is synced too. */
static enum odsi_err sync_folder_of(const char *path)
{
    char folder[IO_PATH_SIZE];
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    if (slash)
        slash[slash == folder] = '\0';
    else
        snprintf(folder, sizeof folder, ".");
    const int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return io_error("opening", folder);
    const enum odsi_err err = fsync(fd) == 0 ? ODSI_OK : io_error("syncing", folder);
    close(fd);
    return err;
}

enum odsi_err io_write_file(const char *path, const void *data, size_t size, mode_t mode, int sync)
{
    char temporary[IO_PATH_SIZE];
    const int length = snprintf(temporary, sizeof temporary, "%s.XXXXXX", path);
    if (length < 0 || (size_t)length >= sizeof temporary)
        return odsi_fail(ODSI_ERR_RANGE, "path too long: %s", path);
    const int fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0)
        return io_error("writing", path);
    enum odsi_err err = write_all(fd, path, data, size);
    if (err == ODSI_OK && (fchmod(fd, mode) != 0 || (sync && fsync(fd) != 0)))
        err = io_error("writing", path);
    if (close(fd) != 0 && err == ODSI_OK)
        err = io_error("writing", path);
    if (err == ODSI_OK && rename(temporary, path) != 0)
        err = io_error("renaming to", path);
    if (err != ODSI_OK) {
        unlink(temporary);
        return err;
    }
    return sync ? sync_folder_of(path) : ODSI_OK;
}

enum odsi_err io_make_folders(const char *folder, mode_t mode)
{
    char path[IO_PATH_SIZE];
    const size_t size = strlen(folder);
    if (size == 0 || size >= sizeof path)
        return odsi_fail(ODSI_ERR_RANGE, "folder name of %zu bytes: 1 to %u", size,
                         IO_PATH_SIZE - 1);
    memcpy(path, folder, size + 1);
    for (size_t i = 1; i <= size; i++) {
        if (path[i] != '/' && path[i] != '\0')
            continue;
        const char kept = path[i];
        path[i] = '\0';
        if (mkdir(path, mode) != 0 && errno != EEXIST)
            return io_error("making folder", path);
        path[i] = kept;
    }
    struct stat status;
    if (stat(path, &status) != 0)
        return io_error("making folder", path);
    if (!S_ISDIR(status.st_mode))
        return odsi_fail(ODSI_ERR_IO, "%s is there, but no folder", path);
    return ODSI_OK;
}
