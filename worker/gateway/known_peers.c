#include "worker/gateway/known_peers.h"

#include "common/base/buf.h"
#include "common/base/io.h"
#include "common/base/limits.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

enum line_kind { LINE_OTHER, LINE_MATCH, LINE_BAD };

/* Compares one line (without its newline) with address; a match fills remembered. */
static enum line_kind line_read(const char *line, size_t size, const char *address,
                                struct digest *remembered)
{
    if (size > 0 && line[size - 1] == '\r')
        size--;
    if (size == 0 || line[0] == '#')
        return LINE_OTHER;
    const char *space = memchr(line, ' ', size);
    if (!space || space == line)
        return LINE_BAD;
    const size_t address_size = (size_t)(space - line);
    char hex[DIGEST_HEX_SIZE];
    if (size - address_size - 1 != sizeof hex - 1 || address_size >= LIMIT_ADDRESS_SIZE)
        return LINE_BAD;
    memcpy(hex, space + 1, sizeof hex - 1);
    hex[sizeof hex - 1] = '\0';
    struct digest id;
    if (digest_from_hex(&id, hex) != ODSI_OK)
        return LINE_BAD;
    if (strlen(address) != address_size || memcmp(line, address, address_size) != 0)
        return LINE_OTHER;
    *remembered = id;
    return LINE_MATCH;
}

/* *found tells whether a line names address. A last line without newline is an append that was
 * cut short, and is as bad as any other. */
static enum odsi_err search(const char *path, const char *text, size_t size, const char *address,
                            struct digest *remembered, int *found)
{
    *found = 0;
    unsigned line_number = 1;
    for (size_t start = 0; start < size; line_number++) {
        const char *newline = memchr(text + start, '\n', size - start);
        const size_t line_size = newline ? (size_t)(newline - text) - start : size - start;
        const enum line_kind kind = line_read(text + start, line_size, address, remembered);
        if (kind == LINE_BAD || !newline)
            return odsi_fail(ODSI_ERR_CORRUPT,
                             "%s, line %u: not \"host:port ID\" with 64 hex digits and an end of "
                             "line; correct or delete the line",
                             path, line_number);
        if (kind == LINE_MATCH) {
            *found = 1;
            return ODSI_OK;
        }
        start += line_size + 1;
    }
    return ODSI_OK;
}

/* Not synced: this runs while a peer waits in its handshake. A line that a crash loses is learnt
 * again. */
static enum odsi_err append(int fd, const char *path, const char *address, const struct digest *id)
{
    char hex[DIGEST_HEX_SIZE];
    char line[LIMIT_ADDRESS_SIZE + DIGEST_HEX_SIZE + 2];
    digest_to_hex(hex, id);
    const int size = snprintf(line, sizeof line, "%s %s\n", address, hex);
    const ssize_t put = write(fd, line, (size_t)size);
    if (put != size)
        return odsi_fail(ODSI_ERR_IO, "cannot write %s: %s", path,
                         put < 0 ? strerror(errno) : "the disk is full");
    return ODSI_OK;
}

static enum odsi_err check_locked(int fd, const char *path, const char *address,
                                  const struct digest *id)
{
    struct buf content;
    struct digest remembered;
    int found = 0;
    buf_init(&content, KNOWN_PEERS_SIZE_MAX);
    enum odsi_err err = io_read_file(path, &content);
    if (err == ODSI_OK)
        err = search(path, buf_text_view(&content), content.size, address, &remembered, &found);
    buf_free(&content);
    if (err != ODSI_OK)
        return err;
    if (!found)
        return append(fd, path, address, id);
    if (digest_equal(&remembered, id))
        return ODSI_OK;
    char old_hex[DIGEST_HEX_SIZE];
    char new_hex[DIGEST_HEX_SIZE];
    digest_to_hex(old_hex, &remembered);
    digest_to_hex(new_hex, id);
    return odsi_fail(ODSI_ERR_DENIED,
                     "%s is not who it was: it now proves identity %s, but %s remembers %s; if its "
                     "operator confirms the change, delete that line of the file, otherwise "
                     "someone may be in between",
                     address, new_hex, path, old_hex);
}

enum odsi_err known_peers_check(const char *path, const char *address, const struct digest *id)
{
    const size_t size = strlen(address);
    if (size == 0 || size >= LIMIT_ADDRESS_SIZE || address[0] == '#' || strpbrk(address, " \r\n"))
        return odsi_fail(ODSI_ERR_INVALID, "an address of %zu bytes cannot be remembered in %s",
                         size, path);
    const int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    if (fd < 0)
        return odsi_fail(ODSI_ERR_IO, "cannot open %s: %s", path, strerror(errno));
    enum odsi_err err = ODSI_OK;
    while (flock(fd, LOCK_EX) != 0 && err == ODSI_OK) {
        if (errno != EINTR)
            err = odsi_fail(ODSI_ERR_IO, "cannot lock %s: %s", path, strerror(errno));
    }
    if (err == ODSI_OK)
        err = check_locked(fd, path, address, id);
    close(fd); /* gives the lock back */
    return err;
}
