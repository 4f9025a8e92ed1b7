/* Who may talk to whom. Peers that break the rules are played by plain OpenSSL in a thread. */
#include "common/base/alloc.h"
#include "tests/unit/net/net_fixture.h"

#include <arpa/inet.h>
#include <criterion/criterion.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SOCKET_TIMEOUT_S 10

/* ---- our own client and server ------------------------------------------------------------- */

static enum rpc_status call_once(struct net *net)
{
    struct net_call call = {0};
    net_call_unary(&call, net, NET_PATH("Unary"), "x", 1, NET_CALL_US);
    cr_log_info("status %d: %s", call.status, call.text);
    const enum rpc_status status = call.status;
    net_call_free(&call);
    return status;
}

Test(rpc_tls, both_sides_learn_each_other_s_id)
{
    struct net net = {.with_tls = 1};
    struct net_call call = {0};
    struct digest id;
    net_open(&net, NULL);
    net_call_open(&call, &net, NET_PATH("Bidi"), NET_CALL_US);
    cr_expect_eq(rpc_call_peer(call.call, &id), 0); /* not connected yet */
    net_call_send(&call, "x", 1);
    while (call.message_count == 0)
        net_run_for(&net, 10000);
    cr_assert_eq(rpc_call_peer(call.call, &id), 1);
    cr_expect(digest_equal(&id, identity_id_view(net.server_identity)));
    cr_expect(net.log.has_peer);
    cr_expect(digest_equal(&net.log.peer, identity_id_view(net.client_identity)));
    rpc_call_half_close(call.call);
    net_run(&net);
    cr_expect_eq(call.status, RPC_OK);
    net_call_free(&call);
    net_close(&net);
}

Test(rpc_tls, the_pinned_server_is_accepted)
{
    struct net net = {.with_tls = 1};
    net_open_loop(&net);
    net_open_server(&net);
    const struct digest pin = *identity_id_view(net.server_identity);
    net_open_channel(&net, &(struct rpc_channel_config){.peer_id = &pin});
    cr_expect_eq(call_once(&net), RPC_OK);
    net_close(&net);
}

Test(rpc_tls, a_server_other_than_the_pinned_one_is_refused)
{
    struct net net = {.with_tls = 1};
    net_open_loop(&net);
    net_open_server(&net);
    struct digest pin = *identity_id_view(net.server_identity);
    pin.bytes[31] ^= 1;
    net_open_channel(&net, &(struct rpc_channel_config){.peer_id = &pin});
    cr_expect_eq(call_once(&net), RPC_UNAVAILABLE);
    cr_expect_eq(net.log.open_count, 0);
    net_close(&net);
}

struct judge {
    unsigned count;
    int verdict;
    struct digest last;
};

static int judge_peer(void *context, const struct digest *peer_id)
{
    struct judge *self = context;
    self->count++;
    self->last = *peer_id;
    return self->verdict;
}

Test(rpc_tls, accept_peer_is_asked_once_per_connection_about_the_server)
{
    for (int verdict = 0; verdict <= 1; verdict++) {
        struct net net = {.with_tls = 1};
        struct judge judge = {.verdict = verdict};
        net_open(&net,
                 &(struct rpc_channel_config){.accept_peer = judge_peer, .accept_context = &judge});
        for (int i = 0; i < 3 && (verdict || i == 0); i++)
            cr_expect_eq(call_once(&net), verdict ? RPC_OK : RPC_UNAVAILABLE);
        cr_expect(digest_equal(&judge.last, identity_id_view(net.server_identity)));
        cr_expect(judge.count == 1 || (!verdict && judge.count < 20), "%u", judge.count);
        net_close(&net);
    }
}

static struct judge server_judge; /* a test is a process of its own */

static int judge_client(void *context, const struct digest *peer_id)
{
    (void)context;
    return judge_peer(&server_judge, peer_id);
}

Test(rpc_tls, admit_decides_which_clients_connect)
{
    for (int verdict = 0; verdict <= 1; verdict++) {
        struct net net = {.with_tls = 1, .admit = judge_client};
        server_judge = (struct judge){.verdict = verdict};
        net_open(&net, NULL);
        cr_expect_eq(call_once(&net), verdict ? RPC_OK : RPC_UNAVAILABLE);
        cr_expect_geq(server_judge.count, 1);
        cr_expect(digest_equal(&server_judge.last, identity_id_view(net.client_identity)));
        cr_expect_eq(net.log.open_count, (unsigned)verdict);
        net_close(&net);
    }
}

Test(rpc_tls, closing_while_a_handshake_waits_for_admit_leaves_nothing_behind)
{
    for (unsigned delay_us = 0; delay_us < 8000; delay_us += 1000) {
        struct net net = {.with_tls = 1, .admit = judge_client};
        struct judge judge = {.verdict = 1};
        struct net_call call = {0};
        server_judge = (struct judge){.verdict = 1};
        net_open(&net,
                 &(struct rpc_channel_config){.accept_peer = judge_peer, .accept_context = &judge});
        net_call_open(&call, &net, NET_PATH("Hold"), NET_CALL_US);
        net_run_for(&net, delay_us);
        net_close(&net); /* closes the channel first, then the server */
        cr_expect_eq(call.done_count, 1);
        net_call_free(&call);
    }
}

Test(rpc_tls, a_plaintext_client_is_refused_by_a_server_with_an_identity)
{
    struct net net = {.with_tls = 1};
    net_open_loop(&net);
    net_open_server(&net);
    net.with_tls = 0; /* from here on */
    net_open_channel(&net, NULL);
    cr_expect_eq(call_once(&net), RPC_UNAVAILABLE);
    cr_expect_eq(net.log.open_count, 0);
    net_close(&net);
}

Test(rpc_tls, a_client_with_an_identity_refuses_a_plaintext_server)
{
    struct net net = {0};
    net_open_loop(&net);
    net_open_server(&net);
    net.with_tls = 1;
    net_open_channel(&net, NULL);
    cr_expect_eq(call_once(&net), RPC_UNAVAILABLE);
    cr_expect_eq(net.log.open_count, 0);
    net_close(&net);
}

Test(rpc_tls, plaintext_is_for_loopback_only)
{
    static const struct {
        const char *address;
        enum odsi_err client, server;
    } cases[] = {
        {"127.0.0.1:7000", ODSI_OK, ODSI_OK},
        {"127.9.8.7:7000", ODSI_OK, ODSI_OK},
        {"localhost:7000", ODSI_OK, ODSI_OK},
        {":7000", ODSI_OK, ODSI_ERR_DENIED}, /* this machine, but every interface */
        {"[::1]:7000", ODSI_OK, ODSI_OK},
        {"10.0.0.1:7000", ODSI_ERR_DENIED, ODSI_ERR_DENIED},
        {"0.0.0.0:7000", ODSI_ERR_DENIED, ODSI_ERR_DENIED},
        {"[::]:7000", ODSI_ERR_DENIED, ODSI_ERR_DENIED},
        {"[fe80::1]:7000", ODSI_ERR_DENIED, ODSI_ERR_DENIED},
        {"localhost.evil.example:7000", ODSI_ERR_DENIED, ODSI_ERR_DENIED},
        {"127.0.0.1.evil.example:7000", ODSI_ERR_DENIED, ODSI_ERR_DENIED},
        {"127.0.0.1", ODSI_ERR_INVALID, ODSI_ERR_INVALID},
    };
    struct net net = {0};
    net_open_loop(&net);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const struct rpc_channel_config channel_config = {.address = cases[i].address};
        struct rpc_channel *channel = NULL;
        cr_expect_eq(rpc_channel_open(&channel, net.loop, &channel_config), cases[i].client, "%s",
                     cases[i].address);
        rpc_channel_close(&channel);
        if (cases[i].server == ODSI_OK)
            continue; /* test_rpc_server listens for real */
        const struct rpc_server_config server_config = {.listen = cases[i].address};
        struct rpc_server *server = NULL;
        cr_expect_eq(rpc_server_open(&server, net.loop, &server_config), cases[i].server, "%s",
                     cases[i].address);
        cr_expect_null(server);
    }
    rpc_loop_close(&net.loop);
}

/* ---- strangers ----------------------------------------------------------------------------- */

enum key_kind { KEY_NONE, KEY_P256, KEY_P384, KEY_RSA };

/* Gives ctx a self-signed certificate of that kind. */
static void give_certificate(SSL_CTX *ctx, enum key_kind kind)
{
    if (kind == KEY_NONE)
        return;
    EVP_PKEY *key = kind == KEY_RSA    ? EVP_RSA_gen(2048)
                    : kind == KEY_P384 ? EVP_EC_gen("P-384")
                                       : EVP_EC_gen("P-256");
    X509 *certificate = X509_new();
    cr_assert(key && certificate);
    X509_set_version(certificate, X509_VERSION_3);
    ASN1_INTEGER_set(X509_get_serialNumber(certificate), 1);
    X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_NAME *name = X509_get_subject_name(certificate);
    X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)"x", -1, -1, 0);
    X509_set_issuer_name(certificate, name);
    X509_set_pubkey(certificate, key);
    cr_assert_gt(X509_sign(certificate, key, EVP_sha256()), 0);
    cr_assert_eq(SSL_CTX_use_certificate(ctx, certificate), 1);
    cr_assert_eq(SSL_CTX_use_PrivateKey(ctx, key), 1);
    X509_free(certificate);
    EVP_PKEY_free(key);
}

struct stranger {
    pthread_t thread;
    struct rpc_loop *loop; /* stopped at the end */
    int fd;
    int version_max; /* 0: any */
    enum key_kind kind;
    int is_welcome; /* HTTP/2 bytes came through from the peer */
};

/* A stranger that writes to a peer which hung up must not die of it. */
static void ignore_sigpipe(void)
{
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    cr_assert_eq(sigaction(SIGPIPE, &ignore, NULL), 0);
}

static void limit_time(int fd)
{
    const struct timeval limit = {.tv_sec = SOCKET_TIMEOUT_S};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
}

static int choose_h2(SSL *ssl, const unsigned char **out, unsigned char *out_size,
                     const unsigned char *in, unsigned in_size, void *context)
{
    (void)ssl;
    (void)context;
    static const unsigned char h2[] = "\x02h2";
    return SSL_select_next_proto((unsigned char **)(uintptr_t)out, out_size, h2, 3, in, in_size) ==
                   OPENSSL_NPN_NEGOTIATED
               ? SSL_TLSEXT_ERR_OK
               : SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* Connects, says the HTTP/2 greeting, and waits for the server's: a server speaks first only to a
 * peer whose handshake it has finished. */
static void *run_strange_client(void *context)
{
    struct stranger *self = context;
    static const char greeting[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0";
    char answer[9];
    SSL_CTX *ctx = SSL_CTX_new(TLS_client_method());
    if (self->version_max)
        SSL_CTX_set_max_proto_version(ctx, self->version_max);
    SSL_CTX_set_alpn_protos(ctx, (const unsigned char *)"\x02h2", 3);
    give_certificate(ctx, self->kind);
    SSL *ssl = SSL_new(ctx);
    limit_time(self->fd);
    SSL_set_fd(ssl, self->fd);
    self->is_welcome = SSL_connect(ssl) == 1 && SSL_write(ssl, greeting, sizeof greeting - 1) > 0 &&
                       SSL_read(ssl, answer, sizeof answer) > 0;
    SSL_free(ssl);
    SSL_CTX_free(ctx);
    close(self->fd);
    rpc_loop_stop(self->loop);
    return NULL;
}

static int connect_to(const char *address)
{
    const char *colon = strrchr(address, ':');
    struct sockaddr_in to = {.sin_family = AF_INET,
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                             .sin_port = htons((uint16_t)strtoul(colon + 1, NULL, 10))};
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert_geq(fd, 0);
    cr_assert_eq(connect(fd, (struct sockaddr *)&to, sizeof to), 0);
    return fd;
}

Test(rpc_tls, the_server_talks_only_to_a_p256_certificate_over_tls_1_3)
{
    static const struct {
        const char *what;
        enum key_kind kind;
        int version_max;
        int is_welcome;
    } cases[] = {
        {"a P-256 certificate", KEY_P256, 0, 1},  {"no certificate", KEY_NONE, 0, 0},
        {"an RSA certificate", KEY_RSA, 0, 0},    {"a P-384 certificate", KEY_P384, 0, 0},
        {"TLS 1.2", KEY_P256, TLS1_2_VERSION, 0}, {"TLS 1.2 with RSA", KEY_RSA, TLS1_2_VERSION, 0},
    };
    struct net net = {.with_tls = 1};
    ignore_sigpipe();
    net_open_loop(&net);
    net_open_server(&net);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct stranger stranger = {.loop = net.loop,
                                    .fd = connect_to(net.address),
                                    .version_max = cases[i].version_max,
                                    .kind = cases[i].kind};
        cr_assert_eq(pthread_create(&stranger.thread, NULL, run_strange_client, &stranger), 0);
        net_run(&net);
        pthread_join(stranger.thread, NULL);
        cr_expect_eq(stranger.is_welcome, cases[i].is_welcome, "%s", cases[i].what);
    }
    cr_expect_eq(net.log.open_count, 0);
    net_close(&net);
}

/* Accepts connections until one of them gets as far as HTTP/2, or the listener is shut down. */
static void *run_strange_server(void *context)
{
    struct stranger *self = context;
    char greeting[24];
    SSL_CTX *ctx = SSL_CTX_new(TLS_server_method());
    if (self->version_max)
        SSL_CTX_set_max_proto_version(ctx, self->version_max);
    SSL_CTX_set_alpn_select_cb(ctx, choose_h2, NULL);
    give_certificate(ctx, self->kind);
    for (;;) {
        const int fd = accept(self->fd, NULL, NULL);
        if (fd < 0)
            break;
        SSL *ssl = SSL_new(ctx);
        limit_time(fd);
        SSL_set_fd(ssl, fd);
        if (SSL_accept(ssl) == 1 && SSL_read(ssl, greeting, sizeof greeting) > 0)
            self->is_welcome = 1;
        SSL_free(ssl);
        close(fd);
    }
    SSL_CTX_free(ctx);
    return NULL;
}

static int listen_on(char *address, size_t size)
{
    struct sockaddr_in on = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof on;
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    cr_assert_eq(bind(fd, (struct sockaddr *)&on, sizeof on), 0);
    cr_assert_eq(listen(fd, 8), 0);
    cr_assert_eq(getsockname(fd, (struct sockaddr *)&on, &length), 0);
    snprintf(address, size, "127.0.0.1:%u", ntohs(on.sin_port));
    return fd;
}

Test(rpc_tls, the_client_talks_only_to_a_p256_certificate_over_tls_1_3)
{
    static const struct {
        const char *what;
        enum key_kind kind;
        int version_max;
        int is_welcome;
    } cases[] = {
        {"a P-256 certificate", KEY_P256, 0, 1},          {"an RSA certificate", KEY_RSA, 0, 0},
        {"a P-384 certificate", KEY_P384, 0, 0},          {"TLS 1.2", KEY_P256, TLS1_2_VERSION, 0},
        {"TLS 1.2 with RSA", KEY_RSA, TLS1_2_VERSION, 0},
    };
    struct net net = {.with_tls = 1};
    ignore_sigpipe();
    net_open_loop(&net);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char address[64];
        struct stranger stranger = {.fd = listen_on(address, sizeof address),
                                    .version_max = cases[i].version_max,
                                    .kind = cases[i].kind};
        cr_assert_eq(pthread_create(&stranger.thread, NULL, run_strange_server, &stranger), 0);
        net_open_channel(&net, &(struct rpc_channel_config){.address = address});
        cr_expect_neq(call_once(&net), RPC_OK); /* it speaks no HTTP/2 */
        rpc_channel_close(&net.channel);
        shutdown(stranger.fd, SHUT_RDWR);
        pthread_join(stranger.thread, NULL);
        close(stranger.fd);
        cr_expect_eq(stranger.is_welcome, cases[i].is_welcome, "%s", cases[i].what);
    }
    net_close(&net);
}

Test(rpc_tls, a_peer_that_sends_nonsense_or_nothing_does_not_disturb_the_others)
{
    struct net net = {.with_tls = 1};
    net_open(&net, NULL);
    const int silent = connect_to(net.address);
    const int noisy = connect_to(net.address);
    static const char noise[] = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";
    cr_assert_eq(write(noisy, noise, sizeof noise), sizeof noise);
    for (int i = 0; i < 3; i++)
        cr_expect_eq(call_once(&net), RPC_OK);
    close(silent);
    close(noisy);
    net_close(&net);
}
