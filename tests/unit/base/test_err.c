#include "common/base/err.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <string.h>

Test(err, keeps_the_sentence_and_returns_the_code)
{
    cr_expect_eq(odsi_fail(ODSI_ERR_RANGE, "layer %d of %d", 7, 4), ODSI_ERR_RANGE);
    cr_expect_str_eq(odsi_err_text(), "layer 7 of 4");
}

Test(err, has_an_empty_text_before_the_first_failure)
{
    cr_expect_str_eq(odsi_err_text(), "");
}

Test(err, prefix_goes_in_front_and_may_repeat)
{
    (void)odsi_fail(ODSI_ERR_CORRUPT, "bad magic");
    cr_expect_eq(odsi_fail_prefix(ODSI_ERR_CORRUPT, "file %s", "a.gguf"), ODSI_ERR_CORRUPT);
    (void)odsi_fail_prefix(ODSI_ERR_CORRUPT, "worker %d", 3);
    cr_expect_str_eq(odsi_err_text(), "worker 3: file a.gguf: bad magic");
}

Test(err, a_sentence_may_be_built_from_the_one_before)
{
    (void)odsi_fail(ODSI_ERR_IO, "disk full");
    (void)odsi_fail(ODSI_ERR_IO, "saving failed: %s; %s", odsi_err_text(), odsi_err_text());
    cr_expect_str_eq(odsi_err_text(), "saving failed: disk full; disk full");
    (void)odsi_fail_prefix(ODSI_ERR_IO, "(%.9s)", odsi_err_text());
    cr_expect_str_eq(odsi_err_text(), "(saving fa): saving failed: disk full; disk full");
}

/* Goal: no length of sentence or prefix runs over the text's memory or leaves it without an end. */
Test(err, cuts_what_is_too_long)
{
    char text[2 * ODSI_ERR_TEXT_SIZE];
    for (size_t size = ODSI_ERR_TEXT_SIZE - 4; size < ODSI_ERR_TEXT_SIZE + 4; size++) {
        memset(text, 'a', size);
        text[size] = '\0';
        const size_t kept = size < ODSI_ERR_TEXT_SIZE ? size : ODSI_ERR_TEXT_SIZE - 1;
        (void)odsi_fail(ODSI_ERR_INVALID, "%s", text);
        cr_expect_eq(strlen(odsi_err_text()), kept);
        (void)odsi_fail_prefix(ODSI_ERR_INVALID, "b");
        cr_expect_eq(strlen(odsi_err_text()), ODSI_ERR_TEXT_SIZE - 1);
        cr_expect_eq(strncmp(odsi_err_text(), "b: aaa", 6), 0);
        (void)odsi_fail_prefix(ODSI_ERR_INVALID, "%s", text);
        cr_expect_eq(strlen(odsi_err_text()), ODSI_ERR_TEXT_SIZE - 1);
    }
}

Test(err, names_every_code_and_survives_others)
{
    for (int code = 0; code < ODSI_ERR_COUNT; code++) {
        const char *name = odsi_err_name((enum odsi_err)code);
        cr_expect(name && name[0] && strcmp(name, "unknown error") != 0, "code %d", code);
        for (int other = 0; other < code; other++)
            cr_expect_str_neq(name, odsi_err_name((enum odsi_err)other));
    }
    cr_expect_str_eq(odsi_err_name(ODSI_OK), "ok");
    cr_expect_str_eq(odsi_err_name(ODSI_ERR_INTERNAL), "internal error");
    cr_expect_str_eq(odsi_err_name((enum odsi_err)ODSI_ERR_COUNT), "unknown error");
    cr_expect_str_eq(odsi_err_name((enum odsi_err) - 1), "unknown error");
}

static void *fail_elsewhere(void *context)
{
    cr_expect_str_eq(odsi_err_text(), "");
    (void)odsi_fail(ODSI_ERR_BUSY, "there");
    odsi_failure_take(context, ODSI_ERR_BUSY);
    return NULL;
}

Test(err, each_thread_has_its_own_and_failure_carries_it_over)
{
    struct odsi_failure failure;
    pthread_t thread;
    (void)odsi_fail(ODSI_ERR_IO, "here");
    cr_assert_eq(pthread_create(&thread, NULL, fail_elsewhere, &failure), 0);
    pthread_join(thread, NULL);
    cr_expect_str_eq(odsi_err_text(), "here");
    cr_expect_eq(failure.err, ODSI_ERR_BUSY);
    cr_expect_str_eq(failure.text, "there");
}
