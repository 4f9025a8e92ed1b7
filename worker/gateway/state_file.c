#include "worker/gateway/state_file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum odsi_err state_file_path(char *out, const char *folder, const char *name)
{
    const int size = snprintf(out, STATE_FILE_PATH_SIZE, "%s/%s", folder, name);
    if (size < 0 || (unsigned)size >= STATE_FILE_PATH_SIZE)
        return odsi_fail(ODSI_ERR_RANGE, "the path %.64s.../%.64s is longer than %u bytes", folder,
                         name, STATE_FILE_PATH_SIZE - 1);
    return ODSI_OK;
}

enum odsi_err state_file_folder(const char *folder)
{
    char path[STATE_FILE_PATH_SIZE];
    const size_t size = strlen(folder);
    if (size == 0 || size >= sizeof path)
        return odsi_fail(ODSI_ERR_INVALID, "the folder's name has %zu bytes, not 1 to %u", size,
                         STATE_FILE_PATH_SIZE - 1);
    for (size_t i = 1; i <= size; i++) {
        if (folder[i] != '/' && folder[i] != '\0')
            continue;
        memcpy(path, folder, i);
        path[i] = '\0';
        if (mkdir(path, 0700) != 0 && errno != EEXIST)
            return odsi_fail(ODSI_ERR_IO, "cannot make the folder %s: %s", path, strerror(errno));
    }
    return ODSI_OK;
}

static enum odsi_err read_all(int fd, const char *path, struct buf *out)
{
    uint8_t chunk[16384];
    for (;;) {
        const ssize_t got = read(fd, chunk, sizeof chunk);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return odsi_fail(ODSI_ERR_IO, "cannot read %s: %s", path, strerror(errno));
        if (got == 0)
            return ODSI_OK;
        const enum odsi_err err = buf_append(out, chunk, (size_t)got);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "%s", path);
    }
}

enum odsi_err state_file_read(const char *path, struct buf *out)
{
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return odsi_fail(errno == ENOENT ? ODSI_ERR_NOT_FOUND : ODSI_ERR_IO, "cannot open %s: %s",
                         path, strerror(errno));
    const enum odsi_err err = read_all(fd, path, out);
    close(fd);
    return err;
}

static enum odsi_err write_all(int fd, const char *path, const uint8_t *data, size_t size)
{
    while (size > 0) {
        const ssize_t put = write(fd, data, size);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return odsi_fail(ODSI_ERR_IO, "cannot write %s: %s", path, strerror(errno));
        data += put;
        size -= (size_t)put;
    }
    return ODSI_OK;
}

enum odsi_err state_file_write(const char *path, const void *data, size_t size)
{
    char temporary[STATE_FILE_PATH_SIZE + 16];
    snprintf(temporary, sizeof temporary, "%s.%ld.new", path, (long)getpid());
    const int fd = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return odsi_fail(ODSI_ERR_IO, "cannot make %s: %s", temporary, strerror(errno));
    enum odsi_err err = write_all(fd, temporary, data, size);
    if (close(fd) != 0 && err == ODSI_OK)
        err = odsi_fail(ODSI_ERR_IO, "cannot write %s: %s", temporary, strerror(errno));
    if (err == ODSI_OK && rename(temporary, path) != 0)
        err =
            odsi_fail(ODSI_ERR_IO, "cannot rename %s to %s: %s", temporary, path, strerror(errno));
    if (err != ODSI_OK)
        unlink(temporary);
    return err;
}
