#include "common/crypto/digest.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/crypto/sha256_lanes.h"

#include <openssl/evp.h>
#include <pthread.h>

/* Either libcrypto's, or ours: then whole blocks go into state and what is left waits in rest. */
struct digest_stream {
    EVP_MD_CTX *context; /* NULL: ours */
    struct sha256_state state;
    uint64_t size; /* added so far */
    uint8_t rest[SHA256_BLOCK_SIZE];
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
    if (!self->context) {
        sha256_lanes_start(&self->state);
        self->size = 0;
        return;
    }
    const int ok = EVP_DigestInit_ex2(self->context, sha256(), NULL);
    ODSI_ASSERT(ok == 1);
}

enum odsi_err digest_stream_open_by(struct digest_stream **out, int by_library)
{
    *out = NULL;
    struct digest_stream *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    if (by_library) {
        self->context = EVP_MD_CTX_new();
        if (!self->context) {
            alloc_free(self);
            return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for a SHA-256 context");
        }
    }
    start(self);
    *out = self;
    return ODSI_OK;
}

enum odsi_err digest_stream_open(struct digest_stream **out)
{
    return digest_stream_open_by(out, !sha256_lanes_available());
}

/* Moves bytes into the started block, and the block, when it is full, into the state. Returns how
 * many bytes that were. */
static size_t fill_rest(struct digest_stream *self, const uint8_t *data, size_t size)
{
    const size_t have = self->size % SHA256_BLOCK_SIZE;
    const size_t room = SHA256_BLOCK_SIZE - have;
    const size_t taken = size < room ? size : room;
    struct sha256_state *state = &self->state;
    const uint8_t *block = self->rest;
    memcpy(self->rest + have, data, taken);
    self->size += taken;
    if (taken == room)
        sha256_lanes_add(&state, &block, 1, 1);
    return taken;
}

static void add_own(struct digest_stream *self, const uint8_t *data, size_t size)
{
    struct sha256_state *state = &self->state;
    if (self->size % SHA256_BLOCK_SIZE != 0) {
        const size_t taken = fill_rest(self, data, size);
        data += taken;
        size -= taken;
    }
    const size_t blocks = size / SHA256_BLOCK_SIZE;
    if (blocks > 0)
        sha256_lanes_add(&state, &data, 1, blocks);
    self->size += blocks * SHA256_BLOCK_SIZE;
    if (size % SHA256_BLOCK_SIZE != 0)
        (void)fill_rest(self, data + blocks * SHA256_BLOCK_SIZE, size % SHA256_BLOCK_SIZE);
}

void digest_stream_add(struct digest_stream *self, const void *data, size_t size)
{
    if (size == 0)
        return;
    if (!self->context) {
        add_own(self, data, size);
        return;
    }
    const int ok = EVP_DigestUpdate(self->context, data, size);
    ODSI_ASSERT(ok == 1);
}

/* Whole blocks of at most SHA256_LANES_MAX streams. */
static void add_blocks(struct digest_stream *const *selves, const uint8_t *const *data,
                       size_t block_count, uint32_t count)
{
    struct sha256_state *states[SHA256_LANES_MAX];
    for (uint32_t i = 0; i < count; i++) {
        states[i] = &selves[i]->state;
        selves[i]->size += (uint64_t)block_count * SHA256_BLOCK_SIZE;
    }
    sha256_lanes_add(states, data, count, block_count);
}

void digest_stream_add_together(struct digest_stream *const *selves, const uint8_t *const *data,
                                size_t size, uint32_t count)
{
    const size_t blocks = size / SHA256_BLOCK_SIZE;
    size_t done = blocks * SHA256_BLOCK_SIZE;
    for (uint32_t i = 0; i < count; i++) /* all of ours, and none inside of a block */
        if (selves[i]->context || selves[i]->size % SHA256_BLOCK_SIZE != 0)
            done = 0;
    for (uint32_t i = 0; i < count && done > 0; i += SHA256_LANES_MAX)
        add_blocks(selves + i, data + i, blocks,
                   count - i < SHA256_LANES_MAX ? count - i : SHA256_LANES_MAX);
    for (uint32_t i = 0; i < count; i++)
        digest_stream_add(selves[i], data[i] + done, size - done);
}

/* FIPS 180-4, 5.1.1: a bit, zeros, and the size in bits at the end of a block. */
static void finish_own(struct digest_stream *self, struct digest *out)
{
    uint8_t end[2 * SHA256_BLOCK_SIZE] = {0x80};
    const uint64_t bits = self->size * 8;
    const size_t have = self->size % SHA256_BLOCK_SIZE;
    const size_t block_end = have < SHA256_BLOCK_SIZE - 8 ? SHA256_BLOCK_SIZE : sizeof end;
    const size_t size = block_end - have;
    for (uint32_t i = 0; i < 8; i++)
        end[size - 1 - i] = (uint8_t)(bits >> (8 * i));
    add_own(self, end, size);
    for (uint32_t i = 0; i < DIGEST_SIZE; i++)
        out->bytes[i] = (uint8_t)(self->state.h[i / 4] >> (24 - 8 * (i % 4)));
}

void digest_stream_finish(struct digest_stream *self, struct digest *out)
{
    if (!self->context) {
        finish_own(self, out);
    } else {
        const int ok = EVP_DigestFinal_ex(self->context, out->bytes, NULL);
        ODSI_ASSERT(ok == 1);
    }
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
