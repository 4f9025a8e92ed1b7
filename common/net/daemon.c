#include "common/net/daemon.h"

#include "common/base/io.h"
#include "common/base/log.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void daemon_survive_file_limit(void)
{
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    if (sigaction(SIGXFSZ, &ignore, NULL) != 0)
        log_line(LOG_WARN, "SIGXFSZ cannot be ignored: %s", strerror(errno));
}

enum odsi_err daemon_open_identity(struct identity **out, const char *path, const char *folder,
                                   const char *name)
{
    char standard[IO_PATH_SIZE];
    if (!path) {
        const int size = snprintf(standard, sizeof standard, "%s/%s", folder, name);
        if (size < 0 || (size_t)size >= sizeof standard)
            return odsi_fail(ODSI_ERR_RANGE, "path too long: %s/%s", folder, name);
        path = standard;
    }
    return identity_open(out, path, 1, getenv("ODSI_PASSPHRASE"));
}

enum odsi_err daemon_address(char *out, size_t size, const char *listen, uint16_t port)
{
    const char *colon = strrchr(listen, ':');
    size_t host_size = colon ? (size_t)(colon - listen) : strlen(listen);
    if (host_size == 0 || strncmp(listen, "0.0.0.0:", 8) == 0 || strncmp(listen, "[::]:", 5) == 0) {
        listen = "127.0.0.1";
        host_size = strlen(listen);
    }
    const int written = snprintf(out, size, "%.*s:%u", (int)host_size, listen, port);
    if (written < 0 || (size_t)written >= size || (size_t)written >= LIMIT_ADDRESS_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "address too long: %s", listen);
    return ODSI_OK;
}

enum odsi_err daemon_announce(const char *program, const struct identity *identity,
                              const char *address, const char *ready_file)
{
    char id[DIGEST_HEX_SIZE] = "";
    char line[DAEMON_PLACE_SIZE];
    if (identity)
        digest_to_hex(id, identity_id_view(identity));
    const int size = snprintf(line, sizeof line, "%s%s%s\n", id, identity ? "@" : "", address);
    printf("%s: serving at %s", program, line);
    fflush(stdout);
    if (!ready_file)
        return ODSI_OK;
    return io_write_file(ready_file, line, (size_t)size, 0644, 0);
}

void daemon_withdraw(const char *ready_file)
{
    if (ready_file && unlink(ready_file) != 0 && errno != ENOENT)
        log_line(LOG_WARN, "%s stays: %s", ready_file, strerror(errno));
}
