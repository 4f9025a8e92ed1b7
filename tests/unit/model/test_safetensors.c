#include "common/base/limits.h"
#include "kernels/ops.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/safetensors.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* A file with this header and data_size bytes behind it. */
static enum odsi_err open_header(struct safetensors **out, const char *header, uint64_t data_size)
{
    const size_t size = strlen(header);
    return safetensors_open(out, (const uint8_t *)header, size,
                            SAFETENSORS_PREFIX_SIZE + size + data_size);
}

Test(safetensors, reads_tensors_with_their_types_shapes_and_places)
{
    const char *header =
        "{\"__metadata__\": {\"format\": \"pt\"},"
        "\"b\": {\"dtype\": \"BF16\", \"shape\": [3, 5], \"data_offsets\": [8, 38]},"
        "\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]},"
        "\"c\": {\"data_offsets\": [38, 46], \"shape\": [], \"dtype\": \"I64\"},"
        "\"d\": {\"dtype\": \"F16\", \"shape\": [0, 7], \"data_offsets\": [46, 46]},"
        "\"e\": {\"dtype\": \"F4\", \"shape\": [4], \"data_offsets\": [46, 48]}}   ";
    const uint64_t data_at = SAFETENSORS_PREFIX_SIZE + strlen(header);
    const struct safetensors_tensor want[] = {
        {"a", "F32", TENSOR_F32, 1, {2}, data_at, 8},
        {"b", "BF16", TENSOR_BF16, 2, {3, 5}, data_at + 8, 30},
        {"c", "I64", -1, 0, {0}, data_at + 38, 8},
        {"d", "F16", TENSOR_F16, 2, {0, 7}, data_at + 46, 0},
        {"e", "F4", -1, 1, {4}, data_at + 46, 2},
    };
    struct safetensors *file = NULL;
    cr_assert_eq(open_header(&file, header, 48), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(safetensors_count(file), 5);
    for (uint32_t i = 0; i < 5; i++) {
        const struct safetensors_tensor *got = safetensors_at(file, i);
        cr_expect_str_eq(got->name, want[i].name);
        cr_expect_str_eq(got->dtype, want[i].dtype);
        cr_expect_eq(got->type, want[i].type);
        cr_expect_eq(got->dim_count, want[i].dim_count);
        cr_expect_arr_eq(got->dims, want[i].dims, sizeof got->dims);
        cr_expect_eq(got->offset, want[i].offset);
        cr_expect_eq(got->size, want[i].size);
    }
    safetensors_close(&file);
    cr_expect_null(file);
    safetensors_close(&file);
}

Test(safetensors, takes_a_file_without_tensors)
{
    struct safetensors *file = NULL;
    cr_assert_eq(open_header(&file, "{}", 0), ODSI_OK);
    cr_expect_eq(safetensors_count(file), 0);
    safetensors_close(&file);
    cr_expect_eq(open_header(&file, "{}", 1), ODSI_ERR_CORRUPT, "a byte that belongs to no tensor");
}

#define A8 "\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}"

Test(safetensors, refuses_headers_that_lie)
{
    static const struct {
        const char *header;
        uint64_t data_size;
        enum odsi_err err;
        const char *says;
    } cases[] = {
        {"", 0, ODSI_ERR_CORRUPT, "JSON"},
        {"[]", 0, ODSI_ERR_CORRUPT, "object"},
        {"{" A8, 8, ODSI_ERR_CORRUPT, "JSON"},
        {"{" A8 "} x", 8, ODSI_ERR_CORRUPT, "JSON"},
        {"{" A8 "," A8 "}", 8, ODSI_ERR_CORRUPT, "duplicate"},
        {"{" A8 "}", 7, ODSI_ERR_CORRUPT, "a is at 0 to 8 of 7"},
        {"{" A8 "}", 9, ODSI_ERR_CORRUPT, "end at byte"},
        /* Places: a gap, an overlap, two names for the same bytes, backwards. */
        {"{" A8 ", \"b\": {\"dtype\": \"I8\", \"shape\": [4], \"data_offsets\": [9, 13]}}", 13,
         ODSI_ERR_CORRUPT, "b begins at 9"},
        {"{" A8 ", \"b\": {\"dtype\": \"I8\", \"shape\": [4], \"data_offsets\": [7, 11]}}", 11,
         ODSI_ERR_CORRUPT, "b begins at 7"},
        {"{" A8 ", \"b\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "begins at 0"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [0], \"data_offsets\": [8, 0]}}", 8,
         ODSI_ERR_CORRUPT, "8 to 0"},
        /* Shapes that do not fit their bytes, or 64 bits. */
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [3], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "its shape takes 12"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4611686018427387904, 4], \"data_offsets\": [0, "
         "0]}}",
         0, ODSI_ERR_CORRUPT, "2^64"},
        {"{\"a\": {\"dtype\": \"F4\", \"shape\": [3], \"data_offsets\": [0, 1]}}", 1,
         ODSI_ERR_CORRUPT, "whole number of bytes"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [-2], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "whole number"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [2.0], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "whole number"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [99999999999999999999], \"data_offsets\": [0, "
         "8]}}",
         8, ODSI_ERR_CORRUPT, "JSON"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1,1,1,1,1,1,1,1,2], \"data_offsets\": [0, 8]}}",
         8, ODSI_ERR_UNSUPPORTED, "9 dimensions"},
        /* Descriptions. */
        {"{\"a\": {\"dtype\": \"Q9\", \"shape\": [2], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_UNSUPPORTED, "Q9"},
        {"{\"a\": {\"dtype\": 5, \"shape\": [2], \"data_offsets\": [0, 8]}}", 8, ODSI_ERR_CORRUPT,
         "dtype"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": 2, \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "shape"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8, 9]}}", 8,
         ODSI_ERR_CORRUPT, "data_offsets"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8], \"x\": 1}}", 8,
         ODSI_ERR_CORRUPT, "described"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [2]}}", 8, ODSI_ERR_CORRUPT, "described"},
        {"{\"a\": 7}", 0, ODSI_ERR_CORRUPT, "described"},
        {"{\"a\": null}", 0, ODSI_ERR_CORRUPT, "described"},
        /* Names. */
        {"{\"\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "name"},
        {"{\"a b\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "name"},
        {"{\"a\\n\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "name"},
        {"{\"a\\u0000\": {\"dtype\": \"F32\", \"shape\": [2], \"data_offsets\": [0, 8]}}", 8,
         ODSI_ERR_CORRUPT, "JSON"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct safetensors *file = NULL;
        cr_expect_eq(open_header(&file, cases[i].header, cases[i].data_size), cases[i].err,
                     "%s: %s", cases[i].header, odsi_err_text());
        cr_expect_null(file);
        cr_expect_not_null(strstr(odsi_err_text(), cases[i].says), "%s: %s", cases[i].header,
                           odsi_err_text());
    }
}

Test(safetensors, checks_the_size_of_the_header)
{
    static const struct {
        uint64_t stated;
        uint64_t file_size;
        enum odsi_err err;
    } cases[] = {
        {2, 10, ODSI_OK},
        {2, 9, ODSI_ERR_CORRUPT},
        {0, 100, ODSI_ERR_CORRUPT},
        {1, 100, ODSI_ERR_CORRUPT},
        {3, 10, ODSI_ERR_CORRUPT},
        {2, 0, ODSI_ERR_CORRUPT},
        {UINT64_MAX, UINT64_MAX, ODSI_ERR_CORRUPT},
        {SAFETENSORS_HEADER_SIZE_MAX, SAFETENSORS_HEADER_SIZE_MAX + 8ull, ODSI_OK},
        {SAFETENSORS_HEADER_SIZE_MAX + 1ull, UINT64_MAX, ODSI_ERR_CORRUPT},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        uint8_t prefix[SAFETENSORS_PREFIX_SIZE];
        size_t size = 0;
        for (uint32_t byte = 0; byte < sizeof prefix; byte++)
            prefix[byte] = (uint8_t)(cases[i].stated >> 8 * byte);
        cr_expect_eq(safetensors_header_size(prefix, cases[i].file_size, &size), cases[i].err,
                     "%zu", i);
        if (cases[i].err == ODSI_OK)
            cr_expect_eq(size, cases[i].stated);
    }
}

/* Goal: a header cannot ask for memory out of proportion to what a real one needs. */
Test(safetensors, bounds_what_a_header_can_hold)
{
    struct buf header;
    struct safetensors *file = NULL;
    buf_init(&header, SAFETENSORS_HEADER_SIZE_MAX);
    (void)buf_append_text(&header, "{\"a\": [0");
    for (uint32_t i = 0; i < (4u << 20); i++)
        (void)buf_append_text(&header, ",0");
    (void)buf_append_text(&header, "]}");
    cr_assert_eq(buf_status(&header), ODSI_OK);
    cr_expect_eq(safetensors_open(&file, header.data, header.size, 8 + header.size),
                 ODSI_ERR_CORRUPT);
    cr_expect_not_null(strstr(odsi_err_text(), "values"), "%s", odsi_err_text());

    buf_reset(&header);
    for (uint32_t i = 0; i < (1u << 19); i++)
        (void)buf_append_text(&header, "[");
    cr_expect_eq(safetensors_open(&file, header.data, header.size, 8 + header.size),
                 ODSI_ERR_CORRUPT);

    buf_reset(&header);
    (void)buf_append_text(&header, "{");
    for (uint32_t i = 0; i < LIMIT_TENSORS_MAX + 1; i++)
        (void)buf_printf(&header,
                         "%s\"%u\": {\"dtype\": \"I8\", \"shape\": [0], \"data_offsets\": "
                         "[0, 0]}",
                         i ? "," : "", i);
    (void)buf_append_text(&header, "}");
    cr_expect_eq(safetensors_open(&file, header.data, header.size, 8 + header.size),
                 ODSI_ERR_CORRUPT);
    cr_expect_not_null(strstr(odsi_err_text(), "65537 tensors"), "%s", odsi_err_text());
    buf_free(&header);
}

/* Goal: damage never crashes, and whatever is taken still lies within the file, once. */
Test(safetensors, survives_damage)
{
    const char *whole =
        "{" A8 ", \"b\": {\"dtype\": \"BF16\", \"shape\": [3, 5], \"data_offsets\": "
        "[8, 38]}, \"c\": {\"dtype\": \"F16\", \"shape\": [1], \"data_offsets\": "
        "[38, 40]}}";
    uint64_t seed = 77001;
    uint32_t taken = 0;
    for (uint32_t round = 0; round < 20000; round++) {
        uint8_t header[512];
        struct safetensors *file = NULL;
        const size_t size = strlen(whole);
        memcpy(header, whole, size);
        for (uint32_t i = 0; i <= round % 3; i++)
            header[fixture_random(&seed) % size] = (uint8_t)(' ' + fixture_random(&seed) % 95);
        if (safetensors_open(&file, header, size, 8 + size + 40) != ODSI_OK)
            continue;
        uint64_t sum = 0;
        taken++;
        for (uint32_t i = 0; i < safetensors_count(file); i++)
            sum += safetensors_at(file, i)->size;
        cr_expect_eq(sum, 40, "seed 77001, round %u", round);
        safetensors_close(&file);
    }
    cr_expect(taken > 0);
}
