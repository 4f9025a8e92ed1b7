#include "common/crypto/digest.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"

#include <openssl/evp.h>
#include <pthread.h>

struct digest_stream {
    EVP_MD_CTX *context;
};

/* Looking an algorithm up by name takes a lock and costs more than hashing 64 bytes, so it is done
 * once for the process; written only under the once, constant afterwards. */
static pthread_once_t sha256_once = PTHREAD_ONCE_INIT;
static EVP_MD *sha256_md;

static void sha256_fetch(void)
{
    sha256_md = EVP_MD_fetch(NULL, "SHA256", NULL);
}

static const EVP_MD *sha256(void)
{
    pthread_once(&sha256_once, sha256_fetch);
    ODSI_ASSERT(sha256_md != NULL); /* a libcrypto without SHA-256 */
    return sha256_md;
}

void digest_of(struct digest *out, const void *data, size_t size)
{
    const int ok = EVP_Digest(size ? data : "", size, out->bytes, NULL, sha256(), NULL);
    ODSI_ASSERT(ok == 1);
}

static void start(struct digest_stream *self)
{
    const int ok = EVP_DigestInit_ex2(self->context, sha256(), NULL);
    ODSI_ASSERT(ok == 1);
}

enum odsi_err digest_stream_open(struct digest_stream **out)
{
    *out = NULL;
    struct digest_stream *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->context = EVP_MD_CTX_new();
    if (!self->context) {
        alloc_free(self);
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for a SHA-256 context");
    }
    start(self);
    *out = self;
    return ODSI_OK;
}

void digest_stream_add(struct digest_stream *self, const void *data, size_t size)
{
    if (size == 0)
        return;
    const int ok = EVP_DigestUpdate(self->context, data, size);
    ODSI_ASSERT(ok == 1);
}

void digest_stream_finish(struct digest_stream *self, struct digest *out)
{
    const int ok = EVP_DigestFinal_ex(self->context, out->bytes, NULL);
    ODSI_ASSERT(ok == 1);
    start(self);
}

void digest_stream_close(struct digest_stream **self)
{
    if (!*self)
        return;
    EVP_MD_CTX_free((*self)->context);
    alloc_free(*self);
    *self = NULL;
}

int digest_equal(const struct digest *a, const struct digest *b)
{
    return memcmp(a->bytes, b->bytes, DIGEST_SIZE) == 0;
}

void digest_to_hex(char out[DIGEST_HEX_SIZE], const struct digest *self)
{
    bytes_to_hex(out, self->bytes, DIGEST_SIZE);
}

enum odsi_err digest_from_hex(struct digest *out, const char *text)
{
    struct digest digest;
    if (!bytes_from_hex(digest.bytes, DIGEST_SIZE, text))
        return odsi_fail(ODSI_ERR_INVALID, "a SHA-256 is written as 64 hex digits");
    *out = digest;
    return ODSI_OK;
}
