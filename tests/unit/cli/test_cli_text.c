#include "worker/cli/cli_text.h"

#include <criterion/criterion.h>
#include <string.h>

static const char *duration(int64_t us)
{
    static char text[CLI_TEXT_SIZE];
    cli_text_duration(text, us);
    return text;
}

static const char *bytes(uint64_t size)
{
    static char text[CLI_TEXT_SIZE];
    cli_text_bytes(text, size);
    return text;
}

Test(cli_text, writes_durations_in_the_unit_that_fits)
{
    cr_expect_str_eq(duration(0), "0 us");
    cr_expect_str_eq(duration(999), "999 us");
    cr_expect_str_eq(duration(1000), "1.00 ms");
    cr_expect_str_eq(duration(1250), "1.25 ms");
    cr_expect_str_eq(duration(31000000), "31.00 s");
    cr_expect_str_eq(duration(-2500), "-2.50 ms");
    cr_expect_str_eq(duration(INT64_MIN), "-9223372036854.78 s");
}

Test(cli_text, writes_sizes_in_the_unit_that_fits)
{
    cr_expect_str_eq(bytes(0), "0 B");
    cr_expect_str_eq(bytes(1023), "1023 B");
    cr_expect_str_eq(bytes(1024), "1.0 KiB");
    cr_expect_str_eq(bytes(1024 * 1024 - 1), "1.0 MiB");
    cr_expect_str_eq(bytes(1610612736), "1.5 GiB");
    cr_expect_str_eq(bytes(UINT64_MAX), "16.0 EiB");
}

Test(cli_text, layer_ranges_come_back_as_they_were_written)
{
    char text[CLI_TEXT_SIZE];
    const uint32_t spans[][2] = {{0, 1}, {0, 12}, {7, 8}, {1023, 1024}, {0, UINT32_MAX}};
    for (size_t i = 0; i < sizeof spans / sizeof *spans; i++) {
        uint32_t first = 99, end = 99;
        const char *at = text;
        cli_text_layers(text, spans[i][0], spans[i][1]);
        cr_assert_eq(cli_text_read_layers(&at, &first, &end), ODSI_OK, "%s", text);
        cr_expect_eq(*at, '\0');
        cr_expect_eq(first, spans[i][0], "%s", text);
        cr_expect_eq(end, spans[i][1], "%s", text);
    }
    cli_text_layers(text, 4, 4);
    cr_expect_str_eq(text, "-");
}

Test(cli_text, one_number_is_a_range_of_one_layer)
{
    uint32_t first = 0, end = 0;
    const char *at = "5,6";
    cr_assert_eq(cli_text_read_layers(&at, &first, &end), ODSI_OK);
    cr_expect_eq(first, 5);
    cr_expect_eq(end, 6);
    cr_expect_str_eq(at, ",6");
}

Test(cli_text, refuses_what_is_not_a_range_of_layers)
{
    const char *const bad[] = {"", "-", "a", "1-", "-1", "3-2", "0-4294967295", "4294967296", " 1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint32_t first = 0, end = 0;
        const char *at = bad[i];
        cr_expect_eq(cli_text_read_layers(&at, &first, &end), ODSI_ERR_INVALID, "'%s'", bad[i]);
    }
}

Test(cli_text, reads_token_ids)
{
    uint32_t ids[4];
    uint32_t count = 4;
    cr_assert_eq(cli_text_read_ids("1,5,4294967295", ids, &count), ODSI_OK);
    cr_assert_eq(count, 3);
    cr_expect_eq(ids[0], 1);
    cr_expect_eq(ids[1], 5);
    cr_expect_eq(ids[2], UINT32_MAX);
    count = 4;
    cr_expect_eq(cli_text_read_ids("", ids, &count), ODSI_OK);
    cr_expect_eq(count, 0);
}

Test(cli_text, refuses_what_is_not_a_list_of_ids)
{
    const char *const bad[] = {"a", ",", "1,", ",1", "1,,2", "1 2", "-1", "4294967296", "1;2"};
    uint32_t ids[4];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint32_t count = 4;
        cr_expect_eq(cli_text_read_ids(bad[i], ids, &count), ODSI_ERR_INVALID, "'%s'", bad[i]);
    }
    uint32_t count = 4;
    cr_expect_eq(cli_text_read_ids("1,2,3,4,5", ids, &count), ODSI_ERR_RANGE);
}

Test(cli_text, counts_the_slips_between_two_words)
{
    cr_expect_eq(cli_text_distance("trace", "trace"), 0);
    cr_expect_eq(cli_text_distance("trace", "tace"), 1);
    cr_expect_eq(cli_text_distance("trace", "trrace"), 1);
    cr_expect_eq(cli_text_distance("trace", "trase"), 1);
    cr_expect_eq(cli_text_distance("trace", "rtace"), 1, "neighbours swapped are one slip");
    cr_expect_eq(cli_text_distance("", "abc"), 3);
    cr_expect_eq(cli_text_distance("kitten", "sitting"), 3);
    cr_expect_gt(cli_text_distance("a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"), 31);
}

/* Goal: exactly the well-formed sequences of RFC 3629. */
Test(cli_text, knows_where_a_character_of_utf_8_ends)
{
    const struct {
        const char *text;
        size_t length;
    } cases[] = {
        {"a", 1},
        {"\xc3\xa4", 2},
        {"\xe2\x82\xac", 3},
        {"\xf0\x9f\x98\x80", 4},
        {"\xf4\x8f\xbf\xbf", 4},
        {"\x80", 0},             /* a continuation alone */
        {"\xc3", 0},             /* cut off */
        {"\xc0\xaf", 0},         /* too long for '/' */
        {"\xe0\x80\xaf", 0},     /* the same in three bytes */
        {"\xed\xa0\x80", 0},     /* a surrogate */
        {"\xf4\x90\x80\x80", 0}, /* above U+10FFFF */
        {"\xff", 0},
        {"\xe2\x28\xa1", 0},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        cr_expect_eq(cli_text_utf8(cases[i].text, strlen(cases[i].text), 0), cases[i].length,
                     "case %zu", i);
    cr_expect_eq(cli_text_utf8("a", 1, 1), 0);
}

static const char *shown(int is_terminal, const char *text, size_t size)
{
    static char out[256];
    FILE *file = fmemopen(out, sizeof out, "w");
    cr_assert_not_null(file);
    cli_text_show(file, is_terminal, text, size);
    fclose(file);
    return out;
}

/* Goal: a swarm that sends escape sequences cannot move a cursor or change a title. */
Test(cli_text, shows_no_control_characters_on_a_terminal)
{
    const char hostile[] = "a\x1b]0;x\x07\nb\r\tc\x7f\xc2\x9b"
                           "d\xff\xc3\xa4";
    const char safe[] = "a\xef\xbf\xbd]0;x\xef\xbf\xbd\nb\xef\xbf\xbd\tc\xef\xbf\xbd\xef\xbf\xbd"
                        "d\xef\xbf\xbd\xc3\xa4";
    cr_expect_str_eq(shown(1, hostile, sizeof hostile - 1), safe);
    cr_expect_str_eq(shown(0, hostile, sizeof hostile - 1), hostile);
}
