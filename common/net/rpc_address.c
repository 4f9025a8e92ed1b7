/* Addresses as people write them, and as gRPC wants them. */
#include "common/net/rpc_private.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

#define ID_HEX_SIZE (DIGEST_HEX_SIZE - 1)

static int read_port(const char *text, uint16_t *out)
{
    uint32_t value = 0;
    size_t length = 0;
    for (; text[length] >= '0' && text[length] <= '9' && length < 6; length++)
        value = value * 10 + (uint32_t)(text[length] - '0');
    if (length == 0 || text[length] != '\0' || value > UINT16_MAX)
        return 0;
    *out = (uint16_t)value;
    return 1;
}

static int is_host_name(const char *host)
{
    for (; *host; host++) {
        const char c = *host;
        const int is_allowed = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
                               (c >= '0' && c <= '9') || c == '.' || c == '-' || c == '_';
        if (!is_allowed)
            return 0;
    }
    return 1;
}

enum odsi_err rpc_address_split(const char *address, char *host, uint16_t *port)
{
    struct in6_addr v6;
    const size_t length = strnlen(address, LIMIT_ADDRESS_SIZE);
    if (length == LIMIT_ADDRESS_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "address '%.32s...': too long", address);
    const char *colon = strrchr(address, ':');
    if (!colon || !read_port(colon + 1, port))
        return odsi_fail(ODSI_ERR_INVALID,
                         "address '%s': write host:port with a port from 0 to 65535", address);
    const size_t host_length = (size_t)(colon - address);
    if (address[0] == '[' && host_length >= 2 && colon[-1] == ']') {
        memcpy(host, address + 1, host_length - 2);
        host[host_length - 2] = '\0';
        if (inet_pton(AF_INET6, host, &v6) == 1)
            return ODSI_OK;
    } else {
        memcpy(host, address, host_length);
        host[host_length] = '\0';
        if (is_host_name(host))
            return ODSI_OK;
    }
    return odsi_fail(ODSI_ERR_INVALID,
                     "address '%s': '%s' is no host; IPv6 addresses are written [::1]:port",
                     address, host);
}

enum odsi_err rpc_address_read(const char *text, char *address, struct digest *id, int *has_id)
{
    char host[LIMIT_ADDRESS_SIZE];
    uint16_t port = 0;
    const char *at = strchr(text, '@');
    *has_id = 0;
    if (at) {
        char hex[DIGEST_HEX_SIZE] = {0};
        if ((size_t)(at - text) != ID_HEX_SIZE)
            return odsi_fail(ODSI_ERR_INVALID,
                             "peer '%.80s': before @ stand the %u hex digits of its identity", text,
                             (unsigned)ID_HEX_SIZE);
        memcpy(hex, text, ID_HEX_SIZE);
        enum odsi_err err = digest_from_hex(id, hex);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "peer '%.80s'", text);
        text = at + 1;
    }
    enum odsi_err err = rpc_address_split(text, host, &port);
    if (err != ODSI_OK)
        return err;
    *has_id = at != NULL;
    snprintf(address, LIMIT_ADDRESS_SIZE, "%s", text);
    return ODSI_OK;
}

static int is_loopback_host(const char *host)
{
    struct in_addr v4;
    struct in6_addr v6;
    if (inet_pton(AF_INET, host, &v4) == 1)
        return (ntohl(v4.s_addr) >> 24) == IN_LOOPBACKNET;
    if (inet_pton(AF_INET6, host, &v6) == 1)
        return IN6_IS_ADDR_LOOPBACK(&v6);
    return strcasecmp(host, "localhost") == 0;
}

int rpc_address_is_loopback(const char *address)
{
    char host[LIMIT_ADDRESS_SIZE];
    uint16_t port = 0;
    if (rpc_address_split(address, host, &port) != ODSI_OK)
        return 0;
    return host[0] == '\0' || is_loopback_host(host);
}

enum odsi_err rpc_address_target(char *out, const char *address)
{
    char host[LIMIT_ADDRESS_SIZE];
    uint16_t port = 0;
    struct in_addr v4;
    enum odsi_err err = rpc_address_split(address, host, &port);
    if (err != ODSI_OK)
        return err;
    if (port == 0)
        return odsi_fail(ODSI_ERR_INVALID, "address '%s': nobody can be reached at port 0",
                         address);
    /* "localhost" is taken at its word: what a resolver makes of it could be another machine. */
    if (host[0] == '\0' || strcasecmp(host, "localhost") == 0)
        snprintf(out, RPC_TARGET_SIZE, "ipv4:127.0.0.1:%u", port);
    else if (inet_pton(AF_INET, host, &v4) == 1)
        snprintf(out, RPC_TARGET_SIZE, "ipv4:%s:%u", host, port); /* no name to look up */
    else if (strchr(host, ':'))
        snprintf(out, RPC_TARGET_SIZE, "ipv6:[%s]:%u", host, port);
    else
        snprintf(out, RPC_TARGET_SIZE, "dns:///%s:%u", host, port);
    return ODSI_OK;
}

enum odsi_err rpc_address_listen(char *out, const char *address)
{
    char host[LIMIT_ADDRESS_SIZE];
    uint16_t port = 0;
    enum odsi_err err = rpc_address_split(address, host, &port);
    if (err != ODSI_OK)
        return err;
    if (host[0] == '\0')
        snprintf(out, RPC_TARGET_SIZE, "[::]:%u", port); /* IPv4 too, also where IPv6 is off */
    else if (strcasecmp(host, "localhost") == 0)
        snprintf(out, RPC_TARGET_SIZE, "127.0.0.1:%u", port); /* one socket, so one answer */
    else if (strchr(host, ':'))
        snprintf(out, RPC_TARGET_SIZE, "[%s]:%u", host, port);
    else
        snprintf(out, RPC_TARGET_SIZE, "%s:%u", host, port);
    return ODSI_OK;
}

/* errno of binding a socket of our own as gRPC does, or 0. */
static int try_bind(const struct addrinfo *info)
{
    const int one = 1;
    const int fd = socket(info->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return errno;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    int error = bind(fd, info->ai_addr, info->ai_addrlen) == 0 && listen(fd, 1) == 0 ? 0 : errno;
    close(fd);
    return error;
}

enum odsi_err rpc_address_explain(const char *address)
{
    char host[LIMIT_ADDRESS_SIZE];
    char service[8];
    uint16_t port = 0;
    struct addrinfo *found = NULL;
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    enum odsi_err err = rpc_address_split(address, host, &port);
    if (err != ODSI_OK)
        return err;
    snprintf(service, sizeof service, "%u", port);
    const int failure = getaddrinfo(host[0] ? host : NULL, service, &hints, &found);
    if (failure != 0)
        return odsi_fail(ODSI_ERR_INVALID, "cannot listen on %s: %s", address,
                         gai_strerror(failure));
    int error = 0;
    for (const struct addrinfo *info = found; info && error == 0; info = info->ai_next)
        error = try_bind(info);
    freeaddrinfo(found);
    switch (error) {
    case EADDRNOTAVAIL:
        return odsi_fail(ODSI_ERR_INVALID,
                         "cannot listen on %s: no interface of this machine has that address",
                         address);
    case EACCES:
        return odsi_fail(ODSI_ERR_DENIED,
                         "cannot listen on %s: ports below 1024 need privileges; choose another",
                         address);
    case 0: /* whoever had it has just left */
    case EADDRINUSE:
        return odsi_fail(ODSI_ERR_EXISTS,
                         "cannot listen on %s: the port is in use; stop the program that has it "
                         "or choose another port",
                         address);
    default:
        return odsi_fail(ODSI_ERR_IO, "cannot listen on %s: %s", address, strerror(error));
    }
}
