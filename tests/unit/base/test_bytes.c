#include "common/base/bytes.h"

#include <criterion/criterion.h>
#include <string.h>

Test(bytes, loads_little_endian_at_any_address)
{
    const uint8_t data[] = {0, 1, 2, 3, 0x84, 5, 6, 7, 0xf8};
    cr_expect_eq(bytes_load_u32(data + 1), 0x84030201u);
    cr_expect_eq(bytes_load_u64(data + 1), 0xf807060584030201u);
}

Test(bytes, hex_of_every_byte_reads_back)
{
    uint8_t data[256], back[256];
    char text[2 * sizeof data + 1];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (uint8_t)i;
    bytes_to_hex(text, data, sizeof data);
    cr_expect_eq(strlen(text), 2 * sizeof data);
    cr_expect_eq(strncmp(text, "000102030405060708090a0b0c0d0e0f10", 34), 0);
    cr_expect_eq(bytes_from_hex(back, sizeof back, text), 1);
    cr_expect_eq(memcmp(data, back, sizeof data), 0);
    bytes_to_hex(text, data, 0);
    cr_expect_str_eq(text, "");
}

Test(bytes, reads_upper_case_and_nothing_else)
{
    uint8_t out[2];
    cr_expect_eq(bytes_from_hex(out, 2, "aBCd"), 1);
    cr_expect_eq(out[0], 0xab);
    cr_expect_eq(out[1], 0xcd);
    cr_expect_eq(bytes_from_hex(out, 0, ""), 1);
    const char *const wrong[] = {"",     "a",    "ab",   "abc",  "abcde", "abcg", "ab/d",
                                 "ab:d", "ab@d", "abG0", "ab`d", "0xab",  " abc", "ab\xff"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        cr_expect_eq(bytes_from_hex(out, 2, wrong[i]), 0, "'%s'", wrong[i]);
}
