#include "common/crypto/identity.h"

#include "common/base/alloc.h"
#include "common/base/bytes.h"
#include "common/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <openssl/bio.h>
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/ec.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/pkcs12.h>
#include <openssl/rand.h>
#include <openssl/x509.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define KEY_FILE_SIZE_MAX    16384u /* a P-256 key takes 250 to 400 bytes */
#define CERTIFICATE_SIZE_MAX 16384u /* what a peer may make us parse; ours takes 700 bytes */
/* The cost of one guess of the passphrase: 16 MiB of memory and about 50 ms. libcrypto refuses
 * to use more than 32 MiB when it reads the file again. */
#define SCRYPT_N         16384u
#define SCRYPT_R         8u
#define SCRYPT_P         1u
#define SCRYPT_SALT_SIZE 16

/* DER of SubjectPublicKeyInfo up to the point: id-ecPublicKey, prime256v1, and a bit string that
 * starts an uncompressed point. A key has one id only if it has one encoding, so compressed points
 * and explicit curve parameters are refused. */
static const uint8_t spki_prefix[] = {0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48,
                                      0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48,
                                      0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04};
#define SPKI_SIZE (sizeof spki_prefix + 64)

struct identity {
    EVP_PKEY *key;
    struct digest id;
    char *key_pem; /* wiped at close */
    size_t key_pem_size;
    char *certificate_pem;
};

/* Gives up on an operation of libcrypto. Its error queue is emptied: what stays in it would be
 * taken by the TLS code of the same thread for an error of its own. */
static enum odsi_err crypto_fail(enum odsi_err err, const char *what)
{
    char reason[160];
    const unsigned long code = ERR_peek_last_error();
    if (code == 0)
        snprintf(reason, sizeof reason, "no reason given");
    else
        ERR_error_string_n(code, reason, sizeof reason);
    ERR_clear_error();
    return odsi_fail(err, "%s: %s", what, reason);
}

static int id_of_spki(struct digest *out, const uint8_t *der, int size)
{
    if (size != (int)SPKI_SIZE || memcmp(der, spki_prefix, sizeof spki_prefix) != 0)
        return 0;
    digest_of(out, der, (size_t)size);
    return 1;
}

/* The content of a memory BIO as text that the caller owns. */
static enum odsi_err take_text(char **out, size_t *size, BIO *bio)
{
    char *data = NULL;
    const long length = BIO_get_mem_data(bio, &data);
    if (length <= 0)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory to write a PEM text");
    if (size)
        *size = (size_t)length;
    return alloc_text(out, data, (size_t)length);
}

static void wipe_text(char **text, size_t size)
{
    if (*text)
        OPENSSL_cleanse(*text, size);
    alloc_free(*text);
    *text = NULL;
}

/* ---- the certificate --------------------------------------------------------------------- */

static int certificate_fill(X509 *certificate, EVP_PKEY *key, const struct digest *id)
{
    char hex[DIGEST_HEX_SIZE];
    uint8_t serial[8];
    digest_to_hex(hex, id);
    if (RAND_bytes(serial, sizeof serial) != 1)
        return 0;
    serial[0] = (uint8_t)((serial[0] & 0x7f) | 1); /* positive and not zero (RFC 5280) */
    BIGNUM *number = BN_bin2bn(serial, sizeof serial, NULL);
    X509_NAME *name = X509_get_subject_name(certificate);
    /* Peers judge the key alone, so dates prove nothing; a clock that is wrong must not keep two
     * honest machines apart. 9999 is how RFC 5280 writes "no end". */
    const int ok = number && X509_set_version(certificate, X509_VERSION_3) &&
                   BN_to_ASN1_INTEGER(number, X509_get_serialNumber(certificate)) &&
                   ASN1_TIME_set_string_X509(X509_getm_notBefore(certificate), "20200101000000Z") &&
                   ASN1_TIME_set_string_X509(X509_getm_notAfter(certificate), "99991231235959Z") &&
                   X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)hex,
                                              -1, -1, 0) &&
                   X509_set_issuer_name(certificate, name) && X509_set_pubkey(certificate, key) &&
                   X509_sign(certificate, key, EVP_sha256()) > 0;
    BN_free(number);
    return ok;
}

static enum odsi_err make_certificate(struct identity *self)
{
    enum odsi_err err = ODSI_OK;
    X509 *certificate = X509_new();
    BIO *bio = BIO_new(BIO_s_mem());
    if (!certificate || !bio || !certificate_fill(certificate, self->key, &self->id) ||
        PEM_write_bio_X509(bio, certificate) != 1)
        err = crypto_fail(ODSI_ERR_INTERNAL, "making a certificate");
    else
        err = take_text(&self->certificate_pem, NULL, bio);
    BIO_free(bio);
    X509_free(certificate);
    return err;
}

/* ---- the key ------------------------------------------------------------------------------ */

/* Everything that follows from self->key. path is for messages only. */
static enum odsi_err complete(struct identity *self, const char *path)
{
    enum odsi_err err = ODSI_OK;
    uint8_t *spki = NULL;
    BIO *bio = NULL;
    EVP_PKEY_CTX *check = EVP_PKEY_CTX_new_from_pkey(NULL, self->key, NULL);
    const int spki_size = i2d_PUBKEY(self->key, &spki);
    if (!EVP_PKEY_is_a(self->key, "EC") || !id_of_spki(&self->id, spki, spki_size)) {
        err = odsi_fail(ODSI_ERR_CORRUPT,
                        "%s: not a P-256 key; make one with: openssl genpkey -algorithm EC "
                        "-pkeyopt ec_paramgen_curve:P-256",
                        path);
        goto fail;
    }
    if (!check || EVP_PKEY_check(check) != 1) {
        err = odsi_fail(ODSI_ERR_CORRUPT, "%s: the private and the public key do not fit together",
                        path);
        goto fail;
    }
    bio = BIO_new(BIO_s_mem()); /* its memory is wiped when freed */
    if (!bio || PEM_write_bio_PKCS8PrivateKey(bio, self->key, NULL, NULL, 0, NULL, NULL) != 1) {
        err = crypto_fail(ODSI_ERR_INTERNAL, "writing a private key to memory");
        goto fail;
    }
    err = take_text(&self->key_pem, &self->key_pem_size, bio);
    if (err == ODSI_OK)
        err = make_certificate(self);
fail:
    ERR_clear_error();
    BIO_free(bio);
    OPENSSL_free(spki);
    EVP_PKEY_CTX_free(check);
    return err;
}

struct passphrase {
    const char *text; /* NULL: none */
    int asked;
};

/* Instead of libcrypto's own, which would ask on the terminal. */
static int give_passphrase(char *out, int size, int for_writing, void *user)
{
    struct passphrase *passphrase = user;
    (void)for_writing;
    passphrase->asked = 1;
    const size_t length = passphrase->text ? strlen(passphrase->text) : 0;
    if (length == 0 || length > (size_t)size)
        return -1;
    memcpy(out, passphrase->text, length);
    return (int)length;
}

static enum odsi_err key_from_pem(EVP_PKEY **out, const char *pem, size_t size, const char *path,
                                  const char *text)
{
    struct passphrase passphrase = {.text = text};
    BIO *bio = BIO_new_mem_buf(pem, (int)size);
    if (!bio)
        return crypto_fail(ODSI_ERR_NO_MEMORY, path);
    *out = PEM_read_bio_PrivateKey(bio, NULL, give_passphrase, &passphrase);
    BIO_free(bio);
    ERR_clear_error();
    if (*out && text && !passphrase.asked)
        log_line(LOG_WARN, "%s: a passphrase was given, but this key is not encrypted", path);
    if (*out)
        return ODSI_OK;
    if (passphrase.asked && !text)
        return odsi_fail(ODSI_ERR_DENIED, "%s: the key is encrypted; give its passphrase", path);
    if (passphrase.asked)
        return odsi_fail(ODSI_ERR_DENIED, "%s: the passphrase does not open this key", path);
    return odsi_fail(ODSI_ERR_CORRUPT, "%s: holds no private key in PEM form", path);
}

/* Writes the key as it goes into a file: PKCS#8, encrypted under AES-256 and scrypt when there is
 * a passphrase. */
static enum odsi_err key_to_pem(char **out, size_t *size, EVP_PKEY *key, const char *passphrase)
{
    enum odsi_err err = ODSI_OK;
    PKCS8_PRIV_KEY_INFO *info = NULL;
    X509_ALGOR *algorithm = NULL;
    X509_SIG *sealed = NULL;
    BIO *bio = BIO_new(BIO_s_mem());
    int ok = bio != NULL;
    if (ok && !passphrase) {
        ok = PEM_write_bio_PKCS8PrivateKey(bio, key, NULL, NULL, 0, NULL, NULL) == 1;
    } else if (ok) {
        info = EVP_PKEY2PKCS8(key);
        algorithm = PKCS5_pbe2_set_scrypt(EVP_aes_256_cbc(), NULL, SCRYPT_SALT_SIZE, NULL, SCRYPT_N,
                                          SCRYPT_R, SCRYPT_P);
        if (info && algorithm)
            sealed = PKCS8_set0_pbe(passphrase, (int)strlen(passphrase), info, algorithm);
        if (sealed)
            algorithm = NULL; /* it belongs to sealed now */
        ok = sealed && PEM_write_bio_PKCS8(bio, sealed) == 1;
    }
    err = ok ? take_text(out, size, bio) : crypto_fail(ODSI_ERR_INTERNAL, "encrypting a key");
    X509_SIG_free(sealed);
    X509_ALGOR_free(algorithm);
    PKCS8_PRIV_KEY_INFO_free(info);
    BIO_free(bio);
    return err;
}

/* ---- files -------------------------------------------------------------------------------- */

static enum odsi_err io_fail(const char *doing, const char *path)
{
    return odsi_fail(ODSI_ERR_IO, "%s %s: %s", doing, path, strerror(errno));
}

static enum odsi_err check_file(int fd, const char *path, size_t *size)
{
    struct stat info;
    if (fstat(fd, &info) != 0)
        return io_fail("looking at", path);
    if (!S_ISREG(info.st_mode))
        return odsi_fail(ODSI_ERR_CORRUPT, "%s: not a file", path);
    if (info.st_mode & (S_IRWXG | S_IRWXO))
        return odsi_fail(ODSI_ERR_DENIED,
                         "%s: others may read or change this private key (mode %04o); "
                         "run: chmod 600 %s",
                         path, (unsigned)info.st_mode & 07777u, path);
    if (info.st_size <= 0 || info.st_size > (off_t)KEY_FILE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "%s: %lld bytes cannot be a key", path,
                         (long long)info.st_size);
    *size = (size_t)info.st_size;
    return ODSI_OK;
}

/* The whole file; *out is wiped with wipe_text. */
static enum odsi_err read_file(char **out, size_t *size, const char *path)
{
    *out = NULL;
    const int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not hang us */
    if (fd < 0 && (errno == ENOENT || errno == ENOTDIR))
        return odsi_fail(ODSI_ERR_NOT_FOUND, "%s: no identity there", path);
    if (fd < 0)
        return io_fail("opening", path);
    enum odsi_err err = check_file(fd, path, size);
    if (err == ODSI_OK)
        err = alloc_zeroed(out, *size + 1, 1);
    size_t done = 0;
    while (err == ODSI_OK && done < *size) {
        const ssize_t got = read(fd, *out + done, *size - done);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            err = got < 0 ? io_fail("reading", path)
                          : odsi_fail(ODSI_ERR_CORRUPT, "%s: shrank while read", path);
        else
            done += (size_t)got;
    }
    if (err != ODSI_OK)
        wipe_text(out, *size);
    close(fd);
    return err;
}

static enum odsi_err make_parents(const char *path)
{
    char folder[PATH_MAX];
    const size_t length = strlen(path);
    if (length >= sizeof folder)
        return odsi_fail(ODSI_ERR_IO, "%.64s...: the path is too long", path);
    for (size_t i = 1; i < length; i++) {
        if (path[i] != '/' || path[i - 1] == '/')
            continue;
        memcpy(folder, path, i);
        folder[i] = '\0';
        if (mkdir(folder, 0700) != 0 && errno != EEXIST)
            return io_fail("making the folder", folder);
    }
    return ODSI_OK;
}

/* Makes the folder's new entry survive a crash; a folder that cannot be synced is no reason to
 * refuse the key. */
static void sync_parent(const char *path)
{
    char folder[PATH_MAX];
    const char *slash = strrchr(path, '/');
    const size_t length = slash ? (size_t)(slash - path) : 0;
    if (!slash)
        snprintf(folder, sizeof folder, ".");
    else
        snprintf(folder, sizeof folder, "%.*s", length ? (int)length : 1, path);
    const int fd = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return;
    (void)fsync(fd);
    close(fd);
}

static enum odsi_err write_new(const char *path, const char *text, size_t size)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return io_fail("making", path);
    enum odsi_err err = ODSI_OK;
    size_t done = 0;
    while (err == ODSI_OK && done < size) {
        const ssize_t put = write(fd, text + done, size - done);
        if (put < 0 && errno != EINTR)
            err = io_fail("writing", path);
        else if (put > 0)
            done += (size_t)put;
    }
    if (err == ODSI_OK && fsync(fd) != 0)
        err = io_fail("writing", path);
    if (close(fd) != 0 && err == ODSI_OK)
        err = io_fail("writing", path);
    return err;
}

/* Gives a file its name unless that is taken (errno EEXIST): neither call ever replaces a file. */
static int publish(const char *temporary, const char *path)
{
    if (link(temporary, path) == 0)
        return 1;
    if (errno == EEXIST)
        return 0;
    return renameat2(AT_FDCWD, temporary, AT_FDCWD, path, RENAME_NOREPLACE) == 0; /* no links */
}

/* Puts text at path whole. Of two processes that start at once exactly one wins; the other is told
 * ODSI_ERR_EXISTS. */
static enum odsi_err put_file(const char *path, const char *text, size_t size)
{
    char temporary[PATH_MAX];
    char suffix[17];
    uint8_t random[8];
    if (RAND_bytes(random, sizeof random) != 1)
        return crypto_fail(ODSI_ERR_INTERNAL, "no random numbers");
    bytes_to_hex(suffix, random, sizeof random);
    const int length = snprintf(temporary, sizeof temporary, "%s.%s", path, suffix);
    if (length < 0 || (size_t)length >= sizeof temporary)
        return odsi_fail(ODSI_ERR_IO, "%.64s...: the path is too long", path);
    enum odsi_err err = write_new(temporary, text, size);
    if (err == ODSI_OK && !publish(temporary, path))
        err = errno == EEXIST
                  ? odsi_fail(ODSI_ERR_EXISTS, "%s: made by another process meanwhile", path)
                  : io_fail("making", path);
    (void)unlink(temporary);
    if (err == ODSI_OK)
        sync_parent(path);
    return err;
}

/* ---- opening ------------------------------------------------------------------------------ */

static enum odsi_err read_identity(struct identity *self, const char *path, const char *passphrase)
{
    char *text = NULL;
    size_t size = 0;
    enum odsi_err err = read_file(&text, &size, path);
    if (err == ODSI_OK)
        err = key_from_pem(&self->key, text, size, path, passphrase);
    if (err == ODSI_OK)
        err = complete(self, path);
    wipe_text(&text, size);
    return err;
}

static enum odsi_err generate(EVP_PKEY **out)
{
    *out = EVP_EC_gen("P-256");
    return *out ? ODSI_OK : crypto_fail(ODSI_ERR_INTERNAL, "making a P-256 key");
}

static enum odsi_err create_file(const char *path, const char *passphrase)
{
    EVP_PKEY *key = NULL;
    char *text = NULL;
    size_t size = 0;
    enum odsi_err err = make_parents(path);
    if (err == ODSI_OK)
        err = generate(&key);
    if (err == ODSI_OK)
        err = key_to_pem(&text, &size, key, passphrase);
    if (err == ODSI_OK)
        err = put_file(path, text, size);
    wipe_text(&text, size);
    EVP_PKEY_free(key);
    return err;
}

enum odsi_err identity_open(struct identity **out, const char *path, int create,
                            const char *passphrase)
{
    struct identity *self = NULL;
    *out = NULL;
    if (passphrase && passphrase[0] == '\0')
        passphrase = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    err = read_identity(self, path, passphrase);
    if (err == ODSI_ERR_NOT_FOUND && create) {
        /* What counts is what lies there in the end, whoever put it there. */
        err = create_file(path, passphrase);
        if (err == ODSI_OK || err == ODSI_ERR_EXISTS)
            err = read_identity(self, path, passphrase);
    }
    if (err != ODSI_OK)
        identity_close(&self);
    *out = self;
    return err;
}

enum odsi_err identity_make(struct identity **out)
{
    struct identity *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    err = generate(&self->key);
    if (err == ODSI_OK)
        err = complete(self, "a new key");
    if (err != ODSI_OK)
        identity_close(&self);
    *out = self;
    return err;
}

void identity_close(struct identity **self)
{
    if (!*self)
        return;
    EVP_PKEY_free((*self)->key); /* wipes its numbers */
    wipe_text(&(*self)->key_pem, (*self)->key_pem_size);
    alloc_free((*self)->certificate_pem);
    alloc_free(*self);
    *self = NULL;
}

const struct digest *identity_id_view(const struct identity *self)
{
    return &self->id;
}

const char *identity_key_pem_view(const struct identity *self)
{
    return self->key_pem;
}

const char *identity_certificate_pem_view(const struct identity *self)
{
    return self->certificate_pem;
}

enum odsi_err identity_id_of_certificate(struct digest *out, const char *pem, size_t size)
{
    if (!pem || size == 0)
        return odsi_fail(ODSI_ERR_DENIED, "the peer shows no certificate");
    if (size > CERTIFICATE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_DENIED, "the peer's certificate has %zu bytes", size);
    uint8_t *spki = NULL;
    int spki_size = -1;
    BIO *bio = BIO_new_mem_buf(pem, (int)size);
    X509 *certificate = bio ? PEM_read_bio_X509(bio, NULL, NULL, NULL) : NULL;
    enum odsi_err err = ODSI_OK;
    if (!certificate)
        err = odsi_fail(ODSI_ERR_DENIED, "the peer's certificate cannot be read");
    else if (X509_get0_pubkey(certificate)) /* the point lies on the curve */
        spki_size = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate), &spki);
    if (err == ODSI_OK && !id_of_spki(out, spki, spki_size))
        err = odsi_fail(ODSI_ERR_DENIED, "the peer's certificate does not hold a P-256 key");
    OPENSSL_free(spki);
    X509_free(certificate);
    BIO_free(bio);
    ERR_clear_error();
    return err;
}

enum odsi_err identity_home(char *out, size_t size)
{
    static const struct {
        const char *variable;
        const char *suffix;
    } places[] = {{"ODSI_HOME", ""}, {"XDG_STATE_HOME", "/odsi"}, {"HOME", "/.local/state/odsi"}};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        const char *value = getenv(places[i].variable);
        if (!value || value[0] == '\0')
            continue;
        const int length = snprintf(out, size, "%s%s", value, places[i].suffix);
        if (length < 0 || (size_t)length >= size)
            return odsi_fail(ODSI_ERR_RANGE, "%s: the path is too long", places[i].variable);
        return ODSI_OK;
    }
    return odsi_fail(ODSI_ERR_NOT_FOUND, "none of ODSI_HOME, XDG_STATE_HOME and HOME is set, so "
                                         "there is no place for files; set ODSI_HOME");
}
