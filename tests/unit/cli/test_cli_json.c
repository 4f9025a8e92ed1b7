#include "worker/cli/cli_json.h"

#include "kernels/det.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

static const char *printed(json_t *object, enum odsi_err *err)
{
    static char out[4096];
    memset(out, 0, sizeof out);
    FILE *file = fmemopen(out, sizeof out, "w");
    cr_assert_not_null(file);
    *err = cli_json_print(object, file);
    fclose(file);
    return out;
}

Test(cli_json, prints_one_object_on_one_line)
{
    enum odsi_err err = ODSI_OK;
    const uint32_t ids[] = {1, 4294967295u};
    const char *text = printed(json_pack("{s:o, s:o, s:o}", "ids", cli_json_ids(ids, 2), "layers",
                                         cli_json_layers(0, 2), "none", cli_json_ids(NULL, 0)),
                               &err);
    cr_expect_eq(err, ODSI_OK);
    cr_expect_str_eq(text, "{\"ids\": [1, 4294967295], \"layers\": \"0-1\", \"none\": []}\n");
}

/* Goal: a float in the output is the float that was computed. */
Test(cli_json, floats_come_back_bit_for_bit)
{
    const float values[] = {0.1f, 1.17549435e-38f, 3.4028235e38f, -7.25f, 1.00000012f, 1e-45f};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        enum odsi_err err = ODSI_OK;
        const char *text = printed(json_pack("{s:o}", "v", cli_json_f64((double)values[i])), &err);
        json_t *back = json_loads(text, 0, NULL);
        cr_assert_not_null(back, "%s", text);
        const float got = (float)json_real_value(json_object_get(back, "v"));
        cr_expect_eq(det_bits(got), det_bits(values[i]), "%s", text);
        json_decref(back);
    }
}

Test(cli_json, what_json_cannot_say_becomes_null_or_text)
{
    enum odsi_err err = ODSI_OK;
    cr_expect_str_eq(printed(json_pack("{s:o, s:o, s:o, s:o}", "nan", cli_json_f64((double)NAN),
                                       "inf", cli_json_f64((double)INFINITY), "most",
                                       cli_json_u64(INT64_MAX), "more", cli_json_u64(UINT64_MAX)),
                             &err),
                     "{\"nan\": null, \"inf\": null, \"most\": 9223372036854775807, "
                     "\"more\": \"18446744073709551615\"}\n");
}

Test(cli_json, replaces_bytes_that_are_not_utf_8)
{
    const char bytes[] = "a\xff"
                         "b\xc3\xa4\xe2\x82";
    json_t *value = cli_json_text(bytes, sizeof bytes - 1);
    cr_assert_not_null(value);
    cr_expect_str_eq(json_string_value(value), "a\xef\xbf\xbd"
                                               "b\xc3\xa4\xef\xbf\xbd\xef\xbf\xbd");
    json_decref(value);
}

Test(cli_json, the_best_logits_come_first_and_the_lower_id_among_equals)
{
    const float logits[] = {1.0f, 3.0f, -2.0f, 3.0f, 2.5f};
    enum odsi_err err = ODSI_OK;
    cr_expect_str_eq(printed(json_pack("{s:o}", "top", cli_json_top(logits, 5, 4)), &err),
                     "{\"top\": [[1, 3.0], [3, 3.0], [4, 2.5], [0, 1.0]]}\n");
    cr_expect_str_eq(printed(json_pack("{s:o}", "top", cli_json_top(logits, 2, 5)), &err),
                     "{\"top\": [[1, 3.0], [0, 1.0]]}\n");
}

Test(cli_json, a_missing_object_is_an_error_and_no_output)
{
    enum odsi_err err = ODSI_OK;
    cr_expect_str_eq(printed(json_pack("{s:o}", "v", (json_t *)NULL), &err), "");
    cr_expect_eq(err, ODSI_ERR_NO_MEMORY);
}

Test(cli_json, tells_when_the_output_is_full)
{
    FILE *file = fopen("/dev/full", "w");
    cr_assert_not_null(file);
    cr_expect_eq(cli_json_print(json_object(), file), ODSI_ERR_IO);
    fclose(file);
}
