/* Keys in files and in memory, and ids out of certificates. */
#include "common/base/alloc.h"
#include "common/crypto/identity.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

struct folder {
    char path[64];
    char key[128]; /* path/a/b/key.pem */
};

static struct folder folder_make(void)
{
    struct folder self = {.path = "/tmp/odsi-identity-XXXXXX"};
    cr_assert_not_null(mkdtemp(self.path));
    snprintf(self.key, sizeof self.key, "%s/a/b/key.pem", self.path);
    return self;
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *state)
{
    (void)info;
    (void)kind;
    (void)state;
    return remove(path);
}

static void folder_remove(const struct folder *self)
{
    cr_expect_eq(nftw(self->path, remove_entry, 8, FTW_DEPTH | FTW_PHYS), 0);
}

static unsigned mode_of(const char *path)
{
    struct stat info;
    cr_assert_eq(stat(path, &info), 0, "%s: %s", path, strerror(errno));
    return info.st_mode & 07777u;
}

static void write_text(const char *path, const char *text)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    cr_assert_geq(fd, 0);
    cr_assert_eq(write(fd, text, strlen(text)), (ssize_t)strlen(text));
    close(fd);
}

static enum odsi_err try_open(const char *path, int create, const char *passphrase,
                              struct digest *id)
{
    struct identity *identity = NULL;
    enum odsi_err err = identity_open(&identity, path, create, passphrase);
    cr_expect_eq(identity != NULL, err == ODSI_OK);
    if (identity && id)
        *id = *identity_id_view(identity);
    identity_close(&identity);
    cr_expect_null(identity);
    return err;
}

Test(identity, a_made_key_is_found_again_with_the_same_id)
{
    const struct folder folder = folder_make();
    struct digest made;
    struct digest found;
    cr_expect_eq(try_open(folder.key, 0, NULL, NULL), ODSI_ERR_NOT_FOUND);
    cr_assert_eq(try_open(folder.key, 1, NULL, &made), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(try_open(folder.key, 0, NULL, &found), ODSI_OK);
    cr_expect(digest_equal(&made, &found));
    cr_assert_eq(try_open(folder.key, 1, "", &found), ODSI_OK);
    cr_expect(digest_equal(&made, &found));
    folder_remove(&folder);
}

Test(identity, the_file_and_its_folders_are_private_whatever_the_umask)
{
    const struct folder folder = folder_make();
    char parent[128];
    unsigned count = 0;
    umask(0);
    cr_assert_eq(try_open(folder.key, 1, NULL, NULL), ODSI_OK);
    cr_expect_eq(mode_of(folder.key), 0600);
    snprintf(parent, sizeof parent, "%s/a/b", folder.path);
    cr_expect_eq(mode_of(parent), 0700);
    DIR *entries = opendir(parent);
    cr_assert_not_null(entries);
    for (const struct dirent *entry = readdir(entries); entry; entry = readdir(entries))
        count += entry->d_name[0] != '.';
    closedir(entries);
    cr_expect_eq(count, 1, "nothing but the key may stay behind");
    snprintf(parent, sizeof parent, "%s/a", folder.path);
    cr_expect_eq(mode_of(parent), 0700);
    folder_remove(&folder);
}

Test(identity, a_key_that_others_may_read_is_refused_with_the_remedy)
{
    static const mode_t modes[] = {0640, 0604, 0620, 0601};
    const struct folder folder = folder_make();
    cr_assert_eq(try_open(folder.key, 1, NULL, NULL), ODSI_OK);
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        cr_assert_eq(chmod(folder.key, modes[i]), 0);
        cr_expect_eq(try_open(folder.key, 1, NULL, NULL), ODSI_ERR_DENIED, "mode %o", modes[i]);
        cr_expect_not_null(strstr(odsi_err_text(), "chmod 600"));
    }
    cr_assert_eq(chmod(folder.key, 0400), 0);
    cr_expect_eq(try_open(folder.key, 0, NULL, NULL), ODSI_OK);
    folder_remove(&folder);
}

Test(identity, a_passphrase_locks_the_file)
{
    const struct folder folder = folder_make();
    char text[2048] = "";
    struct digest made;
    struct digest found;
    cr_assert_eq(try_open(folder.key, 1, "correct horse", &made), ODSI_OK, "%s", odsi_err_text());
    const int fd = open(folder.key, O_RDONLY);
    cr_assert_gt(read(fd, text, sizeof text - 1), 0);
    close(fd);
    cr_expect_not_null(strstr(text, "BEGIN ENCRYPTED PRIVATE KEY"));
    cr_assert_eq(try_open(folder.key, 0, "correct horse", &found), ODSI_OK, "%s", odsi_err_text());
    cr_expect(digest_equal(&made, &found));
    cr_expect_eq(try_open(folder.key, 0, "wrong", NULL), ODSI_ERR_DENIED);
    cr_expect_eq(try_open(folder.key, 0, NULL, NULL), ODSI_ERR_DENIED);
    cr_expect_eq(try_open(folder.key, 1, "", NULL), ODSI_ERR_DENIED);
    cr_expect_null(strstr(odsi_err_text(), "correct horse"));
    folder_remove(&folder);
}

static char *key_text(EVP_PKEY *key)
{
    char *data = NULL;
    char *out = NULL;
    BIO *bio = BIO_new(BIO_s_mem());
    cr_assert_eq(PEM_write_bio_PKCS8PrivateKey(bio, key, NULL, NULL, 0, NULL, NULL), 1);
    const long size = BIO_get_mem_data(bio, &data);
    cr_assert_eq(alloc_text(&out, data, (size_t)size), ODSI_OK);
    BIO_free(bio);
    EVP_PKEY_free(key);
    return out;
}

Test(identity, anything_but_a_p256_key_is_corrupt_and_stays_as_it_is)
{
    const struct folder folder = folder_make();
    char path[128];
    char *texts[] = {key_text(EVP_EC_gen("P-384")), key_text(EVP_RSA_gen(2048)),
                     key_text(EVP_PKEY_Q_keygen(NULL, NULL, "ED25519"))};
    static const char *const nonsense[] = {"x", "-----BEGIN PRIVATE KEY-----\n",
                                           "-----BEGIN PRIVATE KEY-----\nAAAA\n"
                                           "-----END PRIVATE KEY-----\n"};
    snprintf(path, sizeof path, "%s/key.pem", folder.path);
    for (size_t i = 0; i < 6; i++) {
        const char *text = i < 3 ? texts[i] : nonsense[i - 3];
        char after[64] = "";
        write_text(path, text);
        cr_expect_eq(try_open(path, 1, NULL, NULL), ODSI_ERR_CORRUPT, "case %zu: %s", i,
                     odsi_err_text());
        cr_expect_not_null(strstr(odsi_err_text(), path));
        const int fd = open(path, O_RDONLY);
        cr_assert_gt(read(fd, after, sizeof after - 1), 0);
        close(fd);
        cr_expect_eq(strncmp(after, text, strlen(after)), 0, "case %zu was overwritten", i);
    }
    for (size_t i = 0; i < 3; i++)
        alloc_free(texts[i]);
    write_text(path, "");
    cr_expect_eq(try_open(path, 1, NULL, NULL), ODSI_ERR_CORRUPT);
    cr_assert_eq(truncate(path, 1 << 20), 0);
    cr_expect_eq(try_open(path, 1, NULL, NULL), ODSI_ERR_CORRUPT);
    cr_expect_eq(try_open(folder.path, 1, NULL, NULL), ODSI_ERR_CORRUPT); /* a folder */
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(mkfifo(path, 0600), 0);
    cr_expect_eq(try_open(path, 1, NULL, NULL), ODSI_ERR_CORRUPT); /* and it does not hang */
    folder_remove(&folder);
}

Test(identity, a_place_that_cannot_be_written_is_an_io_error)
{
    const struct folder folder = folder_make();
    char path[160];
    snprintf(path, sizeof path, "%s/file", folder.path);
    write_text(path, "x");
    snprintf(path, sizeof path, "%s/file/key.pem", folder.path); /* a file as a folder */
    cr_expect_eq(try_open(path, 0, NULL, NULL), ODSI_ERR_NOT_FOUND);
    cr_expect_eq(try_open(path, 1, NULL, NULL), ODSI_ERR_IO, "%s", odsi_err_text());
    char *long_path = NULL;
    cr_assert_eq(alloc_zeroed(&long_path, 8192, 1), ODSI_OK);
    memset(long_path, 'a', 8191);
    cr_expect_eq(try_open(long_path, 1, NULL, NULL), ODSI_ERR_IO);
    alloc_free(long_path);
    folder_remove(&folder);
}

#define RACERS 8

/* Goal: of processes that start at once all get the same identity.
 * How: eight of them, released together by a pipe, ten times. */
Test(identity, processes_that_start_at_once_agree_on_one_key)
{
    for (int round = 0; round < 10; round++) {
        const struct folder folder = folder_make();
        int start[2];
        int ids[2];
        struct digest first;
        cr_assert_eq(pipe(start), 0);
        cr_assert_eq(pipe(ids), 0);
        for (int i = 0; i < RACERS; i++) {
            const pid_t pid = fork();
            cr_assert_geq(pid, 0);
            if (pid > 0)
                continue;
            struct identity *identity = NULL;
            char go = 0;
            close(start[1]);
            if (read(start[0], &go, 1) != 0 ||
                identity_open(&identity, folder.key, 1, NULL) != ODSI_OK)
                _exit(1);
            const struct digest *id = identity_id_view(identity);
            _exit(write(ids[1], id, sizeof *id) == sizeof *id ? 0 : 1);
        }
        close(start[0]);
        close(start[1]); /* go */
        for (int i = 0; i < RACERS; i++) {
            struct digest id;
            int status = 0;
            cr_assert_gt(wait(&status), 0);
            cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "status %x", status);
            cr_assert_eq(read(ids[0], &id, sizeof id), sizeof id);
            if (i == 0)
                first = id;
            cr_expect(digest_equal(&first, &id), "round %d", round);
        }
        close(ids[0]);
        close(ids[1]);
        folder_remove(&folder);
    }
}

Test(identity, every_failed_allocation_is_an_error_without_a_leak_or_a_broken_file)
{
    const struct folder folder = folder_make();
    long failed = 0;
    for (enum odsi_err err = ODSI_ERR_NO_MEMORY; err != ODSI_OK; failed++) {
        alloc_fail_after(failed);
        err = try_open(folder.key, 1, "secret", NULL);
        alloc_fail_after(-1);
        cr_expect(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY, "allocation %ld: %d %s", failed,
                  (int)err, odsi_err_text());
        cr_assert_lt(failed, 50);
    }
    cr_expect_gt(failed, 3);
    cr_expect_eq(try_open(folder.key, 0, "secret", NULL), ODSI_OK);
    folder_remove(&folder);
}

/* ---- certificates -------------------------------------------------------------------------- */

Test(identity, the_id_is_the_digest_of_the_public_key_and_the_certificate_carries_it)
{
    struct identity *identity = NULL;
    struct digest id;
    struct digest own;
    char hex[DIGEST_HEX_SIZE];
    char name[128] = "";
    uint8_t *spki = NULL;
    cr_assert_eq(identity_make(&identity), ODSI_OK, "%s", odsi_err_text());
    const char *pem = identity_certificate_pem_view(identity);
    cr_assert_eq(identity_id_of_certificate(&id, pem, strlen(pem)), ODSI_OK);
    cr_expect(digest_equal(&id, identity_id_view(identity)));
    BIO *bio = BIO_new_mem_buf(pem, -1);
    X509 *certificate = PEM_read_bio_X509(bio, NULL, NULL, NULL);
    cr_assert_not_null(certificate);
    const int size = i2d_X509_PUBKEY(X509_get_X509_PUBKEY(certificate), &spki);
    digest_of(&own, spki, (size_t)size);
    cr_expect(digest_equal(&id, &own));
    digest_to_hex(hex, &id);
    X509_NAME_get_text_by_NID(X509_get_subject_name(certificate), NID_commonName, name,
                              sizeof name);
    cr_expect_str_eq(name, hex);
    cr_expect_eq(X509_verify(certificate, X509_get0_pubkey(certificate)), 1);
    cr_expect_gt(X509_cmp_current_time(X509_get0_notAfter(certificate)), 0);
    cr_expect_lt(X509_cmp_current_time(X509_get0_notBefore(certificate)), 0);
    BIO_free(bio);
    bio = BIO_new_mem_buf(identity_key_pem_view(identity), -1);
    EVP_PKEY *key = PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL);
    cr_assert_not_null(key);
    cr_expect_eq(X509_check_private_key(certificate, key), 1);
    EVP_PKEY_free(key);
    BIO_free(bio);
    OPENSSL_free(spki);
    X509_free(certificate);
    identity_close(&identity);
    identity_close(&identity);
}

static char *certificate_text(EVP_PKEY *key, int is_compressed)
{
    char *data = NULL;
    char *out = NULL;
    BIO *bio = BIO_new(BIO_s_mem());
    X509 *certificate = X509_new();
    if (is_compressed)
        EVP_PKEY_set_utf8_string_param(key, "point-format", "compressed");
    X509_gmtime_adj(X509_getm_notBefore(certificate), 0);
    X509_gmtime_adj(X509_getm_notAfter(certificate), 3600);
    X509_set_pubkey(certificate, key);
    cr_assert_gt(X509_sign(certificate, key, EVP_sha256()), 0);
    PEM_write_bio_X509(bio, certificate);
    const long size = BIO_get_mem_data(bio, &data);
    cr_assert_eq(alloc_text(&out, data, (size_t)size), ODSI_OK);
    BIO_free(bio);
    X509_free(certificate);
    EVP_PKEY_free(key);
    return out;
}

Test(identity, a_certificate_without_a_p256_key_in_its_one_encoding_is_denied)
{
    char *p256 = certificate_text(EVP_EC_gen("P-256"), 0);
    char *refused[] = {
        certificate_text(EVP_EC_gen("P-384"), 0), certificate_text(EVP_RSA_gen(2048), 0),
        certificate_text(EVP_EC_gen("secp256k1"), 0), certificate_text(EVP_EC_gen("P-256"), 1)};
    struct digest id;
    cr_expect_eq(identity_id_of_certificate(&id, p256, strlen(p256)), ODSI_OK);
    for (size_t i = 0; i < 4; i++) {
        cr_expect_eq(identity_id_of_certificate(&id, refused[i], strlen(refused[i])),
                     ODSI_ERR_DENIED, "case %zu", i);
        alloc_free(refused[i]);
    }
    cr_expect_eq(identity_id_of_certificate(&id, NULL, 0), ODSI_ERR_DENIED);
    cr_expect_eq(identity_id_of_certificate(&id, "", 0), ODSI_ERR_DENIED);
    cr_expect_eq(identity_id_of_certificate(&id, p256, SIZE_MAX), ODSI_ERR_DENIED);
    for (size_t size = 0; size + 40 < strlen(p256); size += 13)
        cr_expect_eq(identity_id_of_certificate(&id, p256, size), ODSI_ERR_DENIED, "%zu", size);
    alloc_free(p256);
}

/* ---- where files go ------------------------------------------------------------------------ */

Test(identity, home_is_the_first_of_three_variables_that_is_set)
{
    char out[64];
    unsetenv("ODSI_HOME");
    unsetenv("XDG_STATE_HOME");
    unsetenv("HOME");
    cr_expect_eq(identity_home(out, sizeof out), ODSI_ERR_NOT_FOUND);
    setenv("HOME", "/h", 1);
    cr_assert_eq(identity_home(out, sizeof out), ODSI_OK);
    cr_expect_str_eq(out, "/h/.local/state/odsi");
    cr_expect_eq(identity_home(out, 20), ODSI_ERR_RANGE);
    cr_expect_eq(identity_home(out, 21), ODSI_OK);
    setenv("XDG_STATE_HOME", "/s", 1);
    cr_assert_eq(identity_home(out, sizeof out), ODSI_OK);
    cr_expect_str_eq(out, "/s/odsi");
    setenv("ODSI_HOME", "/o", 1);
    cr_assert_eq(identity_home(out, sizeof out), ODSI_OK);
    cr_expect_str_eq(out, "/o");
    setenv("ODSI_HOME", "", 1);
    cr_assert_eq(identity_home(out, sizeof out), ODSI_OK);
    cr_expect_str_eq(out, "/s/odsi");
}
