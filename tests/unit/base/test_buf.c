#include "common/base/alloc.h"
#include "common/base/buf.h"

#include <criterion/criterion.h>
#include <stdint.h>
#include <string.h>

Test(buf, is_empty_text_before_the_first_append)
{
    struct buf buf;
    buf_init(&buf, 10);
    cr_expect_eq(buf_status(&buf), ODSI_OK);
    cr_expect_str_eq(buf_text_view(&buf), "");
    cr_expect_null(buf.data);
    buf_free(&buf);
}

Test(buf, appends_numbers_in_little_endian)
{
    static const uint8_t expected[] = {0xfe, 4, 3, 2, 1, 8, 7, 6, 5, 4, 3, 2, 1};
    struct buf buf;
    buf_init(&buf, 100);
    buf_append_u8(&buf, 0xfe);
    buf_append_u32(&buf, 0x01020304u);
    buf_append_u64(&buf, 0x0102030405060708u);
    cr_assert_eq(buf_status(&buf), ODSI_OK);
    cr_assert_eq(buf.size, sizeof expected);
    cr_expect_eq(memcmp(buf.data, expected, sizeof expected), 0);
    buf_free(&buf);
}

Test(buf, mixes_text_format_and_bytes)
{
    struct buf buf;
    buf_init(&buf, 1000);
    buf_append_text(&buf, "layers ");
    buf_printf(&buf, "%d-%d", 3, 11);
    buf_append(&buf, "!?", 1);
    buf_append(&buf, NULL, 0);
    cr_expect_str_eq(buf_text_view(&buf), "layers 3-11!");
    buf_printf(&buf, "%s", "");
    cr_expect_eq(buf.size, 12);
    buf_free(&buf);
}

/* Goal: the content may reach the ceiling, not pass it, and a refused append changes nothing.
 * How: for every small ceiling, append single bytes until one is refused. */
Test(buf, holds_exactly_what_its_ceiling_allows)
{
    for (size_t size_max = 0; size_max < 300; size_max++) {
        struct buf buf;
        buf_init(&buf, size_max);
        for (size_t i = 0; i < size_max; i++)
            cr_assert_eq(buf_append_u8(&buf, (uint8_t)i), ODSI_OK);
        cr_expect_eq(buf_append_u8(&buf, 0), ODSI_ERR_RANGE);
        cr_expect_eq(buf.size, size_max);
        cr_expect_leq(buf.capacity, size_max + 1, "the memory stays below the ceiling too");
        for (size_t i = 0; i < size_max; i++)
            cr_assert_eq(buf.data[i], (uint8_t)i);
        buf_free(&buf);
    }
}

Test(buf, stays_failed_until_reset)
{
    struct buf buf;
    buf_init(&buf, 4);
    buf_append_text(&buf, "abc");
    cr_expect_eq(buf_append_text(&buf, "de"), ODSI_ERR_RANGE);
    cr_expect(strstr(odsi_err_text(), "4 bytes"));
    cr_expect_eq(buf_append_text(&buf, "d"), ODSI_ERR_RANGE, "it would fit, but a part is missing");
    cr_expect_eq(buf_printf(&buf, "d"), ODSI_ERR_RANGE);
    cr_expect_eq(buf_status(&buf), ODSI_ERR_RANGE);
    cr_expect_str_eq(buf_text_view(&buf), "", "half a text is not shown as a whole one");
    buf_reset(&buf);
    cr_expect_eq(buf_append_text(&buf, "efgh"), ODSI_OK);
    cr_expect_str_eq(buf_text_view(&buf), "efgh");
    buf_free(&buf);
    cr_expect_eq(buf_append_text(&buf, "abcd"), ODSI_OK, "free leaves it usable");
    cr_expect_str_eq(buf_text_view(&buf), "abcd");
    buf_free(&buf);
}

Test(buf, keeps_its_content_when_memory_is_refused)
{
    struct buf buf;
    char large[1000];
    memset(large, 'x', sizeof large);
    buf_init(&buf, 10000);
    buf_append_text(&buf, "kept");
    alloc_fail_after(0);
    cr_expect_eq(buf_append(&buf, large, sizeof large), ODSI_ERR_NO_MEMORY);
    cr_expect_eq(buf.size, 4);
    cr_expect_eq(memcmp(buf.data, "kept", 4), 0);
    buf_free(&buf);
}

/* Goal: sizes near the end of the address space end in an error, not in a wrapped sum. */
Test(buf, refuses_sizes_that_would_wrap)
{
    struct buf buf;
    buf_init(&buf, SIZE_MAX);
    buf_append_text(&buf, "a");
    cr_expect_eq(buf_append(&buf, "b", SIZE_MAX - 1), ODSI_ERR_NO_MEMORY);
    buf_reset(&buf);
    cr_expect_eq(buf_append(&buf, "b", SIZE_MAX), ODSI_ERR_NO_MEMORY);
    buf_reset(&buf);
    cr_expect_eq(buf_append(&buf, "b", SIZE_MAX / 2 + 2), ODSI_ERR_NO_MEMORY);
    buf_free(&buf);
}
