/* Mutual TLS without certificate authorities: each side shows a certificate it made itself, TLS
 * proves that it holds the key, and we compare the key's hash with the id we want (draft 8.1).
 *
 * This is the only file that uses gRPC's grpc_tls_* interface, which its header calls experimental.
 * What must hold whatever its version, and what tests/unit/net checks case by case:
 *   - a server and a client always have our verifier: without one, a server takes any certificate
 *     and a client falls back to host names;
 *   - an empty certificate is refused;
 *   - the id is looked at again for each call (rpc_tls_peer), from what that connection proved.
 *
 * TLS 1.3 only. gRPC 1.51 has no C function to set the lowest version. But it reads the cipher
 * suites of TLS 1.2 from an environment variable, and those of TLS 1.3 are separate. With only a
 * suite that needs an RSA key, no handshake below 1.3 can succeed: our servers have no RSA key,
 * and our clients refuse every certificate without a P-256 key. */
#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_private.h"

#include <grpc/support/alloc.h>
#include <grpc/support/string_util.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Reading a certificate takes 100 microseconds and each call needs the id in it; connections are
 * few and long-lived, so a handful of answers is kept. */
#define CACHE_COUNT           8u
#define CACHE_CERTIFICATE_MAX 2048u

struct cached_peer {
    size_t size; /* 0: empty */
    char certificate[CACHE_CERTIFICATE_MAX];
    struct digest id;
};

/* A handshake that waits for admit on the loop's thread. */
struct check {
    struct rpc_tls *tls;
    grpc_tls_custom_verification_check_request *request;
    grpc_tls_on_custom_verification_check_done_cb done;
    void *done_arg;
    struct digest id;
    int is_cancelled; /* under tls->lock */
    struct check *next;
    struct check **link;
};

struct rpc_tls {
    grpc_tls_certificate_verifier_external external;
    grpc_tls_certificate_verifier *verifier; /* keeps this struct alive, see destruct */
    atomic_uint use_count;                   /* the owner and each check */
    struct rpc_loop *loop;
    int has_pin;
    struct digest pin;
    int (*admit)(void *context, const struct digest *peer_id);
    void *context;
    int is_closed; /* loop thread */
    unsigned next_cached;
    struct cached_peer cache[CACHE_COUNT]; /* loop thread */
    pthread_mutex_t lock;
    struct check *checks;
};

void rpc_tls_enforce_version(void)
{
    setenv("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES256-GCM-SHA384", 1);
}

static void drop_use(struct rpc_tls *self)
{
    if (atomic_fetch_sub(&self->use_count, 1) == 1)
        grpc_tls_certificate_verifier_release(self->verifier);
}

static int refuse(grpc_status_code *status, char **details, const char *why)
{
    *status = GRPC_STATUS_UNAUTHENTICATED;
    *details = gpr_strdup(why);
    return 1; /* decided */
}

static void finish_check(void *context)
{
    struct check *check = context;
    struct rpc_tls *self = check->tls;
    pthread_mutex_lock(&self->lock);
    *check->link = check->next;
    if (check->next)
        check->next->link = check->link;
    const int is_cancelled = check->is_cancelled;
    pthread_mutex_unlock(&self->lock);
    /* gRPC forgets a cancelled request before it says so, so that a call of done that comes a
     * moment too late finds nothing and does nothing. */
    if (!is_cancelled) {
        if (!self->is_closed && self->admit(self->context, &check->id))
            check->done(check->request, check->done_arg, GRPC_STATUS_OK, "");
        else
            check->done(check->request, check->done_arg, GRPC_STATUS_UNAUTHENTICATED,
                        "this identity is not admitted");
    }
    alloc_free(check);
    drop_use(self);
}

/* Hands the question to the loop's thread: a handshake may be advanced by a thread of gRPC (its
 * backup poller, a reconnect timer), but admit belongs to the loop. Returns 0 when it is on its
 * way. */
static int start_check(struct rpc_tls *self, const struct check *question)
{
    struct check *check = NULL;
    if (alloc_zeroed(&check, 1, sizeof *check) != ODSI_OK)
        return 1;
    *check = *question;
    atomic_fetch_add(&self->use_count, 1);
    pthread_mutex_lock(&self->lock);
    check->next = self->checks;
    check->link = &self->checks;
    if (check->next)
        check->next->link = &check->next;
    self->checks = check;
    pthread_mutex_unlock(&self->lock);
    if (rpc_loop_post(self->loop, finish_check, check) == ODSI_OK)
        return 0;
    pthread_mutex_lock(&self->lock);
    *check->link = check->next;
    if (check->next)
        check->next->link = check->link;
    pthread_mutex_unlock(&self->lock);
    alloc_free(check);
    drop_use(self);
    return 1;
}

/* gRPC asks: is this peer all right? Any thread. */
static int verify(void *user, grpc_tls_custom_verification_check_request *request,
                  grpc_tls_on_custom_verification_check_done_cb done, void *done_arg,
                  grpc_status_code *status, char **details)
{
    struct rpc_tls *self = user;
    struct check question = {.tls = self, .request = request, .done = done, .done_arg = done_arg};
    const char *certificate = request->peer_info.peer_cert;
    if (identity_id_of_certificate(&question.id, certificate,
                                   certificate ? strlen(certificate) : 0) != ODSI_OK)
        return refuse(status, details, odsi_err_text());
    if (self->has_pin && !digest_equal(&self->pin, &question.id))
        return refuse(status, details, "the peer is not the identity that was asked for");
    if (self->admit && !self->has_pin) {
        if (start_check(self, &question) == 0)
            return 0;
        return refuse(status, details, "cannot ask whether this identity is admitted");
    }
    *status = GRPC_STATUS_OK;
    return 1;
}

static void cancel(void *user, grpc_tls_custom_verification_check_request *request)
{
    struct rpc_tls *self = user;
    pthread_mutex_lock(&self->lock);
    for (struct check *check = self->checks; check; check = check->next)
        if (check->request == request)
            check->is_cancelled = 1;
    pthread_mutex_unlock(&self->lock);
}

/* The last user of the verifier, which may be a connection that outlived us, is gone. */
static void destruct(void *user)
{
    struct rpc_tls *self = user;
    pthread_mutex_destroy(&self->lock);
    alloc_free(self);
}

enum odsi_err rpc_tls_open(struct rpc_tls **out, const struct rpc_tls_config *config)
{
    struct rpc_tls *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    pthread_mutex_init(&self->lock, NULL);
    atomic_init(&self->use_count, 1);
    self->loop = config->loop;
    self->admit = config->admit;
    self->context = config->context;
    self->has_pin = config->pin != NULL;
    if (config->pin)
        self->pin = *config->pin;
    self->external.user_data = self;
    self->external.verify = verify;
    self->external.cancel = cancel;
    self->external.destruct = destruct;
    self->verifier = grpc_tls_certificate_verifier_external_create(&self->external);
    *out = self;
    return ODSI_OK;
}

void rpc_tls_close(struct rpc_tls **self)
{
    if (!*self)
        return;
    (*self)->is_closed = 1;
    drop_use(*self);
    *self = NULL;
}

static grpc_tls_credentials_options *make_options(struct rpc_tls *self,
                                                  const struct identity *identity)
{
    const char *certificate = identity_certificate_pem_view(identity);
    grpc_tls_identity_pairs *pairs = grpc_tls_identity_pairs_create();
    grpc_tls_identity_pairs_add_pair(pairs, identity_key_pem_view(identity), certificate);
    /* Our own certificate stands in for the roots, which a client must have and nobody uses:
     * otherwise gRPC loads the system's, and fails where there are none. */
    grpc_tls_certificate_provider *provider =
        grpc_tls_certificate_provider_static_data_create(certificate, pairs);
    grpc_tls_credentials_options *options = grpc_tls_credentials_options_create();
    grpc_tls_credentials_options_set_certificate_provider(options, provider);
    grpc_tls_credentials_options_watch_identity_key_cert_pairs(options);
    grpc_tls_credentials_options_set_certificate_verifier(options, self->verifier);
    grpc_tls_certificate_provider_release(provider);
    return options;
}

grpc_channel_credentials *rpc_tls_channel_credentials(struct rpc_tls *self,
                                                      const struct identity *identity)
{
    grpc_tls_credentials_options *options = make_options(self, identity);
    grpc_tls_credentials_options_watch_root_certs(options);
    grpc_tls_credentials_options_set_verify_server_cert(options, 0); /* no chain to check */
    grpc_tls_credentials_options_set_check_call_host(options, 0);    /* ids, not names */
    return grpc_tls_credentials_create(options);
}

grpc_server_credentials *rpc_tls_server_credentials(struct rpc_tls *self,
                                                    const struct identity *identity)
{
    grpc_tls_credentials_options *options = make_options(self, identity);
    grpc_tls_credentials_options_set_cert_request_type(
        options, GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_BUT_DONT_VERIFY);
    return grpc_tls_server_credentials_create(options);
}

static enum odsi_err cached_id(struct rpc_tls *self, struct digest *out, const char *certificate,
                               size_t size)
{
    for (unsigned i = 0; i < CACHE_COUNT; i++) {
        const struct cached_peer *peer = &self->cache[i];
        if (size > 0 && peer->size == size && memcmp(peer->certificate, certificate, size) == 0) {
            *out = peer->id;
            return ODSI_OK;
        }
    }
    enum odsi_err err = identity_id_of_certificate(out, certificate, size);
    if (err == ODSI_OK && size <= CACHE_CERTIFICATE_MAX) {
        struct cached_peer *peer = &self->cache[self->next_cached++ % CACHE_COUNT];
        memcpy(peer->certificate, certificate, size);
        peer->size = size;
        peer->id = *out;
    }
    return err;
}

enum odsi_err rpc_tls_peer(struct rpc_tls *self, grpc_call *call, struct digest *out)
{
    grpc_auth_context *context = grpc_call_auth_context(call);
    if (!context)
        return odsi_fail(ODSI_ERR_DENIED, "the connection has not proved who the peer is");
    grpc_auth_property_iterator it =
        grpc_auth_context_find_properties_by_name(context, GRPC_X509_PEM_CERT_PROPERTY_NAME);
    const grpc_auth_property *property = grpc_auth_property_iterator_next(&it);
    enum odsi_err err = cached_id(self, out, property ? property->value : NULL,
                                  property ? property->value_length : 0);
    grpc_auth_context_release(context);
    if (err == ODSI_OK && self->has_pin && !digest_equal(&self->pin, out))
        err = odsi_fail(ODSI_ERR_DENIED, "the peer is not the identity that was asked for");
    return err;
}
