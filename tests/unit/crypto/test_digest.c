#include "common/base/alloc.h"
#include "common/crypto/digest.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <string.h>

static void expect_hex(const struct digest *digest, const char *hex)
{
    char text[DIGEST_HEX_SIZE];
    digest_to_hex(text, digest);
    cr_expect_str_eq(text, hex);
}

/* The examples of FIPS 180-4, and the empty message. */
Test(digest, gives_the_published_values)
{
    struct digest digest;
    digest_of(&digest, "", 0);
    expect_hex(&digest, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    digest_of(&digest, NULL, 0);
    expect_hex(&digest, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    digest_of(&digest, "abc", 3);
    expect_hex(&digest, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    digest_of(&digest, "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 56);
    expect_hex(&digest, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
}

/* Goal: a stream does not care how its input is cut, and starts over after a finish.
 * How: every cut of 200 bytes in two, twice on one stream. */
Test(digest, of_a_stream_is_that_of_its_bytes_however_they_are_cut)
{
    uint8_t data[200];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)(i * 7 + 3);
    struct digest whole;
    digest_of(&whole, data, sizeof data);
    struct digest_stream *stream = NULL;
    cr_assert_eq(digest_stream_open(&stream), ODSI_OK);
    for (size_t cut = 0; cut <= sizeof data; cut++) {
        struct digest digest;
        digest_stream_add(stream, data, cut);
        digest_stream_add(stream, data + cut, sizeof data - cut);
        digest_stream_finish(stream, &digest);
        cr_assert(digest_equal(&digest, &whole), "cut at %zu", cut);
    }
    digest_stream_close(&stream);
    cr_expect_null(stream);
    digest_stream_close(&stream);
}

Test(digest, differs_in_each_byte)
{
    struct digest a, b;
    digest_of(&a, "x", 1);
    for (size_t i = 0; i < DIGEST_SIZE; i++) {
        b = a;
        cr_expect(digest_equal(&a, &b));
        b.bytes[i] ^= 1;
        cr_expect_not(digest_equal(&a, &b));
    }
}

Test(digest, reads_back_its_own_hex_and_refuses_anything_else)
{
    struct digest digest, again;
    char text[DIGEST_HEX_SIZE + 1];
    digest_of(&digest, "odsi", 4);
    digest_to_hex(text, &digest);
    cr_assert_eq(digest_from_hex(&again, text), ODSI_OK);
    cr_expect(digest_equal(&digest, &again));

    const struct digest before = again;
    memcpy(text + 64, "0", 2);
    cr_expect_eq(digest_from_hex(&again, text), ODSI_ERR_INVALID, "65 digits");
    text[63] = '\0';
    cr_expect_eq(digest_from_hex(&again, text), ODSI_ERR_INVALID, "63 digits");
    text[63] = 'g';
    text[64] = '\0';
    cr_expect_eq(digest_from_hex(&again, text), ODSI_ERR_INVALID, "not a digit");
    cr_expect_eq(digest_from_hex(&again, ""), ODSI_ERR_INVALID);
    cr_expect(digest_equal(&again, &before), "a refused text changes nothing");
}

Test(digest, stream_open_reports_missing_memory)
{
    struct digest_stream *stream = NULL;
    alloc_fail_after(0);
    cr_expect_eq(digest_stream_open(&stream), ODSI_ERR_NO_MEMORY);
    alloc_fail_after(-1);
    cr_expect_null(stream);
}

static void *hash_often(void *unused)
{
    (void)unused;
    for (int i = 0; i < 1000; i++) {
        struct digest digest;
        digest_of(&digest, "abc", 3);
        if (digest.bytes[0] != 0xba)
            return (void *)1;
    }
    return NULL;
}

/* Goal: the first use may come from several threads at once (for the thread sanitizer). */
Test(digest, first_use_may_race)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, hash_often, NULL), 0);
    for (int i = 0; i < 4; i++) {
        void *result = NULL;
        cr_assert_eq(pthread_join(threads[i], &result), 0);
        cr_expect_null(result);
    }
}
