#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/gguf.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static struct gguf *open_bytes(const struct buf *bytes)
{
    struct gguf *gguf = NULL;
    cr_assert_eq(buf_status(bytes), ODSI_OK);
    cr_assert_eq(gguf_open_memory(&gguf, bytes->data, bytes->size), ODSI_OK, "%s", odsi_err_text());
    return gguf;
}

/* Reads whatever an open file offers, so that a wrong pointer shows under a sanitizer. */
static void count_key(void *context, struct gguf_text key, const char *value)
{
    uint64_t *sum = context;
    *sum += key.size + strlen(value);
}

static uint64_t touch_all(const struct gguf *gguf)
{
    uint64_t sum = 0;
    gguf_visit_metadata(gguf, count_key, &sum);
    for (uint64_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        sum += tensor->data[0] + tensor->data[tensor->size - 1];
    }
    struct gguf_array array;
    struct gguf_text text;
    size_t cursor = 0;
    if (gguf_get_array(gguf, "tokenizer.ggml.tokens", &array) == ODSI_OK)
        while (gguf_array_text(&array, &cursor, &text))
            for (size_t i = 0; i < text.size; i++)
                sum += (uint8_t)text.data[i];
    return sum;
}

Test(gguf, reads_the_demo_file)
{
    struct gguf *gguf = NULL;
    uint32_t number = 0;
    float real = 0;
    int flag = 0;
    struct gguf_text text = {.size = 0};
    struct gguf_array array;
    cr_assert_eq(gguf_open(&gguf, FIXTURE_DEMO), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(gguf_tensor_count(gguf), 57);
    cr_expect_eq(gguf_get_u32(gguf, "llama.embedding_length", &number), ODSI_OK);
    cr_expect_eq(number, 128);
    cr_expect_eq(gguf_get_f32(gguf, "llama.rope.freq_base", &real), ODSI_OK);
    cr_expect_eq(real, 10000.0f);
    cr_expect_eq(gguf_get_bool(gguf, "tokenizer.ggml.add_bos_token", &flag), ODSI_OK);
    cr_expect_eq(flag, 1);
    cr_expect_eq(gguf_get_text(gguf, "general.name", &text), ODSI_OK);
    cr_expect(gguf_text_is(text, "odsi-tiny"));
    cr_expect_eq(gguf_get_array(gguf, "tokenizer.ggml.tokens", &array), ODSI_OK);
    cr_expect_eq(array.count, 1024);
    const struct gguf_tensor *tensor = gguf_tensor_find(gguf, "blk.5.ffn_down.weight");
    cr_assert_not_null(tensor);
    cr_expect_eq(tensor->dims[0], 384);
    cr_expect_eq(tensor->dims[1], 128);
    cr_expect_eq(tensor->dims[2], 1);
    cr_expect_eq(tensor->ggml_type, TENSOR_Q8_0);
    cr_expect_eq(tensor->size, 384 / 32 * 34 * 128);
    uint8_t bytes[100];
    cr_expect_eq(gguf_read(gguf, tensor->offset, bytes, sizeof bytes), ODSI_OK);
    cr_expect_eq(memcmp(bytes, tensor->data, sizeof bytes), 0);
    cr_expect_null(gguf_tensor_find(gguf, "blk.6.ffn_down.weight"));
    cr_expect_null(gguf_tensor_at(gguf, 57));
    gguf_close(&gguf);
    cr_expect_null(gguf);
    gguf_close(&gguf);
}

Test(gguf, finds_every_tensor_by_its_name_and_sorts_them)
{
    struct gguf *gguf = NULL;
    cr_assert_eq(gguf_open(&gguf, FIXTURE_DEMO), ODSI_OK);
    for (uint64_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        char name[LIMIT_TENSOR_NAME_SIZE + 1] = "";
        memcpy(name, tensor->name.data, tensor->name.size);
        cr_expect_eq(gguf_tensor_find(gguf, name), tensor);
        if (i > 0) {
            const struct gguf_text a = gguf_tensor_by_name_at(gguf, i - 1)->name;
            const struct gguf_text b = gguf_tensor_by_name_at(gguf, i)->name;
            const size_t size = a.size < b.size ? a.size : b.size;
            const int order = memcmp(a.data, b.data, size);
            cr_expect(order < 0 || (order == 0 && a.size < b.size));
        }
    }
    gguf_close(&gguf);
}

Test(gguf, reads_numbers_of_any_type_that_fit_and_no_others)
{
    struct buf bytes;
    struct gguf *gguf;
    uint32_t number = 0;
    float real = 0;
    int flag;
    struct gguf_text text;
    struct gguf_array array;
    buf_init(&bytes, 4096);
    fixture_head(&bytes, 2, 0, 7);
    fixture_key(&bytes, "u8", GGUF_U8);
    (void)buf_append_u8(&bytes, 200);
    fixture_key(&bytes, "i16", GGUF_I16);
    (void)buf_append(&bytes, "\x34\x12", 2);
    fixture_key(&bytes, "minus", GGUF_I32);
    (void)buf_append_u32(&bytes, UINT32_MAX);
    fixture_key(&bytes, "u64", GGUF_U64);
    (void)buf_append_u64(&bytes, UINT32_MAX);
    fixture_key(&bytes, "large", GGUF_U64);
    (void)buf_append_u64(&bytes, UINT64_C(1) << 32);
    fixture_key(&bytes, "f64", GGUF_F64);
    (void)buf_append_u64(&bytes, UINT64_C(0x3ff8000000000000)); /* 1.5 */
    fixture_key(&bytes, "huge", GGUF_F64);
    (void)buf_append_u64(&bytes, UINT64_C(0x7fe0000000000000)); /* 2^1023 */
    gguf = open_bytes(&bytes);
    cr_expect_eq(gguf_get_u32(gguf, "u8", &number), ODSI_OK);
    cr_expect_eq(number, 200);
    cr_expect_eq(gguf_get_u32(gguf, "i16", &number), ODSI_OK);
    cr_expect_eq(number, 0x1234);
    cr_expect_eq(gguf_get_u32(gguf, "u64", &number), ODSI_OK);
    cr_expect_eq(number, UINT32_MAX);
    cr_expect_eq(gguf_get_f32(gguf, "f64", &real), ODSI_OK);
    cr_expect_eq(real, 1.5f);
    cr_expect_eq(gguf_get_u32(gguf, "minus", &number), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_u32(gguf, "large", &number), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_u32(gguf, "f64", &number), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_f32(gguf, "huge", &real), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_f32(gguf, "u8", &real), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_bool(gguf, "u8", &flag), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_text(gguf, "u8", &text), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_array(gguf, "u8", &array), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_get_u32(gguf, "none", &number), ODSI_ERR_NOT_FOUND);
    cr_expect_not_null(strstr(odsi_err_text(), "none"));
    cr_expect_eq(number, UINT32_MAX, "a failed call leaves the result alone");
    gguf_close(&gguf);
    buf_free(&bytes);
}

static void join_lines(void *context, struct gguf_text key, const char *value)
{
    (void)buf_printf(context, "%.*s=%s\n", (int)key.size, key.data, value);
}

Test(gguf, shows_metadata_on_one_line_each)
{
    struct buf bytes, lines;
    buf_init(&bytes, 4096);
    buf_init(&lines, 4096);
    fixture_head(&bytes, 3, 0, 5);
    fixture_string(&bytes, "text", "a\nb\x1b[31mc");
    fixture_key(&bytes, "minus", GGUF_I8);
    (void)buf_append_u8(&bytes, 0x80);
    fixture_bool(&bytes, "yes", 1);
    fixture_key(&bytes, "numbers", GGUF_ARRAY);
    (void)buf_append_u32(&bytes, GGUF_U8);
    (void)buf_append_u64(&bytes, 10);
    (void)buf_append(&bytes, "\1\2\3\4\5\6\7\10\11\12", 10);
    fixture_key(&bytes, "texts", GGUF_ARRAY);
    (void)buf_append_u32(&bytes, GGUF_TEXT);
    (void)buf_append_u64(&bytes, 2);
    fixture_text(&bytes, "x");
    fixture_text(&bytes, "");
    struct gguf *gguf = open_bytes(&bytes);
    gguf_visit_metadata(gguf, join_lines, &lines);
    cr_expect_str_eq(buf_text_view(&lines), "text=a\\nb\\x1b[31mc\nminus=-128\nyes=true\n"
                                            "numbers=10 x u8: [1, 2, 3, 4, 5, 6, 7, 8, ...]\n"
                                            "texts=2 x text: [x, ]\n");
    gguf_close(&gguf);
    buf_free(&bytes);
    buf_free(&lines);
}

Test(gguf, shows_long_values_within_its_buffer)
{
    struct buf bytes, lines;
    buf_init(&bytes, 1u << 20);
    buf_init(&lines, 1u << 20);
    fixture_head(&bytes, 3, 0, 2);
    fixture_key(&bytes, "text", GGUF_TEXT);
    (void)buf_append_u64(&bytes, 5000);
    fixture_zeros(&bytes, 5000);
    fixture_key(&bytes, "texts", GGUF_ARRAY);
    (void)buf_append_u32(&bytes, GGUF_TEXT);
    (void)buf_append_u64(&bytes, 20);
    for (int i = 0; i < 20; i++) {
        (void)buf_append_u64(&bytes, 500);
        fixture_zeros(&bytes, 500);
    }
    struct gguf *gguf = open_bytes(&bytes);
    gguf_visit_metadata(gguf, join_lines, &lines);
    cr_expect_eq(buf_status(&lines), ODSI_OK);
    cr_expect(lines.size < 2 * GGUF_VALUE_TEXT_SIZE + 32);
    gguf_close(&gguf);
    buf_free(&bytes);
    buf_free(&lines);
}

/* ---- files that lie ------------------------------------------------------------------------- */

static const uint64_t dims_8[] = {8, 1, 1, 1};

static void one_tensor(struct buf *out, const char *name, uint32_t dim_count, const uint64_t *dims,
                       uint32_t type, uint64_t offset)
{
    fixture_head(out, 3, 1, 0);
    fixture_tensor(out, name, dim_count, dims, type, offset);
    fixture_pad(out);
    fixture_zeros(out, 64);
}

static void lie_magic(struct buf *out)
{
    (void)buf_append(out, "GGML\3\0\0\0", 8);
    fixture_zeros(out, 16);
}

static void lie_version_1(struct buf *out)
{
    fixture_head(out, 1, 0, 0);
}

static void lie_big_endian(struct buf *out)
{
    fixture_head(out, 0x03000000, 0, 0);
}

static void lie_tensor_count(struct buf *out)
{
    fixture_head(out, 3, UINT64_MAX, 0);
    fixture_zeros(out, 4096);
}

static void lie_tensor_count_beyond_the_bytes(struct buf *out)
{
    fixture_head(out, 3, 100, 0);
    fixture_zeros(out, 3299);
}

static void lie_key_count(struct buf *out)
{
    fixture_head(out, 3, 0, UINT64_C(1) << 62);
    fixture_zeros(out, 4096);
}

static void lie_key_length(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    (void)buf_append_u64(out, UINT64_MAX - 7);
    fixture_zeros(out, 64);
}

static void lie_key_empty(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_u32(out, "", 1);
    fixture_zeros(out, 64);
}

static void lie_key_with_newline(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_u32(out, "a\nb", 1);
}

static void lie_key_twice(struct buf *out)
{
    fixture_head(out, 3, 0, 3);
    fixture_u32(out, "same", 1);
    fixture_u32(out, "other", 1);
    fixture_u32(out, "same", 2);
}

static void lie_value_type(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_key(out, "key", 13);
    fixture_zeros(out, 64);
}

static void lie_bool(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_bool(out, "key", 2);
}

static void lie_text_length(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_key(out, "key", GGUF_TEXT);
    (void)buf_append_u64(out, 65);
    fixture_zeros(out, 64);
}

static void lie_array(struct buf *out, uint32_t type, uint64_t count)
{
    fixture_head(out, 3, 0, 1);
    fixture_key(out, "key", GGUF_ARRAY);
    (void)buf_append_u32(out, type);
    (void)buf_append_u64(out, count);
    fixture_zeros(out, 64);
}

static void lie_array_overflow(struct buf *out)
{
    lie_array(out, GGUF_U64, UINT64_C(1) << 61);
}

static void lie_array_of_texts(struct buf *out)
{
    lie_array(out, GGUF_TEXT, 9);
}

static void lie_array_type(struct buf *out)
{
    lie_array(out, 13, 1);
}

static void lie_array_of_arrays(struct buf *out)
{
    lie_array(out, GGUF_ARRAY, 1);
}

static void lie_tensor_name_empty(struct buf *out)
{
    one_tensor(out, "", 1, dims_8, TENSOR_F32, 0);
}

static void lie_tensor_name_long(struct buf *out)
{
    char name[LIMIT_TENSOR_NAME_SIZE + 2];
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    one_tensor(out, name, 1, dims_8, TENSOR_F32, 0);
}

static void lie_tensor_twice(struct buf *out)
{
    fixture_head(out, 3, 2, 0);
    fixture_tensor(out, "same", 1, dims_8, TENSOR_F32, 0);
    fixture_tensor(out, "same", 1, dims_8, TENSOR_F32, 32);
    fixture_pad(out);
    fixture_zeros(out, 64);
}

static void lie_no_dims(struct buf *out)
{
    one_tensor(out, "t", 0, dims_8, TENSOR_F32, 0);
}

static void lie_five_dims(struct buf *out)
{
    const uint64_t dims[5] = {8, 1, 1, 1, 1};
    one_tensor(out, "t", 5, dims, TENSOR_F32, 0);
}

static void lie_dim_zero(struct buf *out)
{
    const uint64_t dims[2] = {8, 0};
    one_tensor(out, "t", 2, dims, TENSOR_F32, 0);
}

static void lie_dims_overflow(struct buf *out)
{
    const uint64_t dims[4] = {UINT64_C(1) << 32, UINT64_C(1) << 32, 1, 1};
    one_tensor(out, "t", 2, dims, TENSOR_F32, 0);
}

static void lie_size_overflow(struct buf *out)
{
    const uint64_t dims[1] = {UINT64_C(1) << 62};
    one_tensor(out, "t", 1, dims, TENSOR_F32, 0);
}

static void lie_type(struct buf *out)
{
    one_tensor(out, "t", 1, dims_8, 4, 0);
}

static void lie_type_large(struct buf *out)
{
    one_tensor(out, "t", 1, dims_8, UINT32_MAX, 0);
}

static void lie_half_block(struct buf *out)
{
    const uint64_t dims[1] = {31};
    one_tensor(out, "t", 1, dims, TENSOR_Q8_0, 0);
}

static void lie_offset_unaligned(struct buf *out)
{
    one_tensor(out, "t", 1, dims_8, TENSOR_F32, 16);
}

static void lie_offset_outside(struct buf *out)
{
    one_tensor(out, "t", 1, dims_8, TENSOR_F32, 64);
}

static void lie_offset_overflow(struct buf *out)
{
    one_tensor(out, "t", 1, dims_8, TENSOR_F32, UINT64_MAX - 31);
}

static void lie_overlap(struct buf *out)
{
    const uint64_t dims_16[1] = {16};
    fixture_head(out, 3, 3, 0);
    fixture_tensor(out, "a", 1, dims_8, TENSOR_F32, 32);
    fixture_tensor(out, "b", 1, dims_8, TENSOR_F32, 64);
    fixture_tensor(out, "c", 1, dims_16, TENSOR_F32, 0);
    fixture_pad(out);
    fixture_zeros(out, 128);
}

static void lie_alignment_0(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_u32(out, "general.alignment", 0);
}

static void lie_alignment_24(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_u32(out, "general.alignment", 24);
}

static void lie_alignment_huge(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_u32(out, "general.alignment", 1u << 31);
}

static void lie_alignment_text(struct buf *out)
{
    fixture_head(out, 3, 0, 1);
    fixture_string(out, "general.alignment", "32");
}

/* Goal: every lie is refused with its own sentence, before anything trusts it. */
Test(gguf, refuses_files_that_lie)
{
    static const struct {
        void (*make)(struct buf *out);
        enum odsi_err err;
        const char *says;
    } lies[] = {
        {lie_magic, ODSI_ERR_CORRUPT, "not a GGUF file"},
        {lie_version_1, ODSI_ERR_UNSUPPORTED, "version 1"},
        {lie_big_endian, ODSI_ERR_UNSUPPORTED, "big-endian"},
        {lie_tensor_count, ODSI_ERR_CORRUPT, "18446744073709551615 tensors"},
        {lie_tensor_count_beyond_the_bytes, ODSI_ERR_CORRUPT, "100 tensors"},
        {lie_key_count, ODSI_ERR_CORRUPT, "4611686018427387904 keys"},
        {lie_key_length, ODSI_ERR_CORRUPT, "key 0"},
        {lie_key_empty, ODSI_ERR_CORRUPT, "key 0"},
        {lie_key_with_newline, ODSI_ERR_CORRUPT, "key 0"},
        {lie_key_twice, ODSI_ERR_CORRUPT, "two keys are named same"},
        {lie_value_type, ODSI_ERR_CORRUPT, "type 13"},
        {lie_bool, ODSI_ERR_CORRUPT, "neither 0 nor 1"},
        {lie_text_length, ODSI_ERR_CORRUPT, "key: the file ends"},
        {lie_array_overflow, ODSI_ERR_CORRUPT, "key: the file ends"},
        {lie_array_of_texts, ODSI_ERR_CORRUPT, "key: the file ends"},
        {lie_array_type, ODSI_ERR_CORRUPT, "element type 13"},
        {lie_array_of_arrays, ODSI_ERR_UNSUPPORTED, "arrays of arrays"},
        {lie_tensor_name_empty, ODSI_ERR_CORRUPT, "no proper name"},
        {lie_tensor_name_long, ODSI_ERR_CORRUPT, "no proper name"},
        {lie_tensor_twice, ODSI_ERR_CORRUPT, "two tensors are named same"},
        {lie_no_dims, ODSI_ERR_CORRUPT, "1 to 4 dimensions"},
        {lie_five_dims, ODSI_ERR_CORRUPT, "1 to 4 dimensions"},
        {lie_dim_zero, ODSI_ERR_CORRUPT, "empty dimension"},
        {lie_dims_overflow, ODSI_ERR_CORRUPT, "larger than any file"},
        {lie_size_overflow, ODSI_ERR_CORRUPT, "larger than any file"},
        {lie_type, ODSI_ERR_UNSUPPORTED, "unknown type 4"},
        {lie_type_large, ODSI_ERR_UNSUPPORTED, "unknown type 4294967295"},
        {lie_half_block, ODSI_ERR_CORRUPT, "whole blocks of q8_0"},
        {lie_offset_unaligned, ODSI_ERR_CORRUPT, "not aligned to 32"},
        {lie_offset_outside, ODSI_ERR_CORRUPT, "outside the file"},
        {lie_offset_overflow, ODSI_ERR_CORRUPT, "outside the file"},
        {lie_overlap, ODSI_ERR_CORRUPT, "tensors c and a overlap"},
        {lie_alignment_0, ODSI_ERR_CORRUPT, "general.alignment is 0"},
        {lie_alignment_24, ODSI_ERR_CORRUPT, "general.alignment is 24"},
        {lie_alignment_huge, ODSI_ERR_CORRUPT, "general.alignment is 2147483648"},
        {lie_alignment_text, ODSI_ERR_CORRUPT, "general.alignment is a text"},
    };
    for (size_t i = 0; i < sizeof lies / sizeof lies[0]; i++) {
        struct buf bytes;
        struct gguf *gguf = NULL;
        buf_init(&bytes, 1u << 20);
        lies[i].make(&bytes);
        cr_assert_eq(buf_status(&bytes), ODSI_OK);
        cr_expect_eq(gguf_open_memory(&gguf, bytes.data, bytes.size), lies[i].err, "%s",
                     lies[i].says);
        cr_expect_null(gguf);
        cr_expect_not_null(strstr(odsi_err_text(), lies[i].says), "\"%s\" does not say \"%s\"",
                           odsi_err_text(), lies[i].says);
        buf_free(&bytes);
    }
}

/* Goal: the table above fails for the lie and not for the frame around it. */
Test(gguf, takes_the_same_files_without_the_lie)
{
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    one_tensor(&bytes, "t", 1, dims_8, TENSOR_F32, 32);
    struct gguf *gguf = open_bytes(&bytes);
    cr_expect_eq(gguf_tensor_at(gguf, 0)->size, 32);
    gguf_close(&gguf);
    buf_reset(&bytes);
    fixture_head(&bytes, 3, 0, 1);
    fixture_u32(&bytes, "general.alignment", 64);
    gguf = open_bytes(&bytes);
    gguf_close(&gguf);
    buf_free(&bytes);
}

/* A copy with nothing behind it, so that a sanitizer sees a read past the end. */
static enum odsi_err open_exact(struct gguf **out, const uint8_t *data, size_t size, uint8_t **copy)
{
    cr_assert_eq(alloc_zeroed(copy, size, 1), ODSI_OK);
    memcpy(*copy, data, size);
    return gguf_open_memory(out, *copy, size);
}

static size_t header_size(const struct buf *bytes)
{
    struct gguf *gguf = open_bytes(bytes);
    const size_t size = (size_t)gguf_tensor_at(gguf, 0)->offset;
    gguf_close(&gguf);
    return size;
}

Test(gguf, refuses_a_file_cut_anywhere)
{
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    fixture_model(&bytes, &(struct fixture_recipe){.skip_key = NULL});
    const size_t header = header_size(&bytes);
    for (size_t size = 0; size < bytes.size; size += size < header ? 1 : 997) {
        struct gguf *gguf = NULL;
        uint8_t *copy = NULL;
        cr_expect_eq(open_exact(&gguf, bytes.data, size, &copy), ODSI_ERR_CORRUPT, "cut at %zu: %s",
                     size, odsi_err_text());
        gguf_close(&gguf);
        alloc_free(copy);
    }
    buf_free(&bytes);
}

/* Goal: no byte of the header can bring the reader to misbehave. How: each one in turn gets three
 * other values; the file is refused with an error, or everything it offers can be read. */
Test(gguf, survives_any_changed_byte_of_the_header)
{
    static const uint8_t masks[] = {0x01, 0x80, 0xff};
    struct buf bytes;
    size_t opened = 0;
    buf_init(&bytes, 1u << 20);
    fixture_model(&bytes, &(struct fixture_recipe){.skip_key = NULL});
    const size_t header = header_size(&bytes);
    uint8_t *copy = NULL;
    cr_assert_eq(alloc_zeroed(&copy, bytes.size, 1), ODSI_OK);
    memcpy(copy, bytes.data, bytes.size);
    for (size_t at = 0; at < header; at++)
        for (size_t i = 0; i < sizeof masks; i++) {
            struct gguf *gguf = NULL;
            copy[at] ^= masks[i];
            const enum odsi_err err = gguf_open_memory(&gguf, copy, bytes.size);
            if (err == ODSI_OK) {
                opened++;
                (void)touch_all(gguf);
            } else {
                cr_expect(err == ODSI_ERR_CORRUPT || err == ODSI_ERR_UNSUPPORTED, "byte %zu: %s",
                          at, odsi_err_text());
            }
            gguf_close(&gguf);
            copy[at] ^= masks[i];
        }
    cr_expect(opened > header, "most bytes are texts and numbers that may be anything");
    alloc_free(copy);
    buf_free(&bytes);
}

/* Goal: counts alone cannot make opening slow. How: as many keys and tensors as allowed, named so
 * that they compare late; a quadratic search would take minutes. */
Test(gguf, opens_the_largest_index_quickly, .timeout = 120)
{
    struct buf bytes;
    buf_init(&bytes, 64u << 20);
    fixture_head(&bytes, 3, LIMIT_TENSORS_MAX, GGUF_KEYS_MAX);
    char name[64];
    for (uint32_t i = 0; i < GGUF_KEYS_MAX; i++) {
        snprintf(name, sizeof name, "general.a.long.common.beginning.%u", i);
        fixture_u32(&bytes, name, i);
    }
    for (uint32_t i = 0; i < LIMIT_TENSORS_MAX; i++) {
        snprintf(name, sizeof name, "a.long.common.beginning.%u", i);
        fixture_tensor(&bytes, name, 1, dims_8, TENSOR_F32, (uint64_t)i * 32);
    }
    fixture_pad(&bytes);
    for (uint32_t i = 0; i < LIMIT_TENSORS_MAX * 4; i++)
        (void)buf_append_u64(&bytes, 0);
    const clock_t start = clock();
    struct gguf *gguf = open_bytes(&bytes);
    for (uint32_t i = 0; i < GGUF_KEYS_MAX; i++) {
        uint32_t value = 0;
        snprintf(name, sizeof name, "general.a.long.common.beginning.%u", i);
        cr_assert_eq(gguf_get_u32(gguf, name, &value), ODSI_OK);
        cr_assert_eq(value, i);
    }
    cr_expect((double)(clock() - start) / CLOCKS_PER_SEC < 10.0);
    gguf_close(&gguf);
    buf_free(&bytes);
}

/* ---- the system's part ---------------------------------------------------------------------- */

static void expect_refused(const char *path, enum odsi_err err)
{
    struct gguf *gguf = NULL;
    cr_expect_eq(gguf_open(&gguf, path), err, "%s", odsi_err_text());
    cr_expect_null(gguf);
    cr_expect_not_null(strstr(odsi_err_text(), path), "\"%s\" does not name %s", odsi_err_text(),
                       path);
}

Test(gguf, names_the_path_of_what_is_not_a_file, .timeout = 30)
{
    char *folder = fixture_folder();
    const char *fifo = fixture_path(folder, "fifo");
    const char *empty = fixture_path(folder, "empty");
    struct buf nothing;
    buf_init(&nothing, 1);
    cr_assert_eq(mkfifo(fifo, 0600), 0);
    fixture_write(empty, &nothing);
    expect_refused(fixture_path(folder, "missing"), ODSI_ERR_NOT_FOUND);
    expect_refused(folder, ODSI_ERR_IO);
    expect_refused(fifo, ODSI_ERR_IO);
    expect_refused(empty, ODSI_ERR_CORRUPT);
    expect_refused("Makefile", ODSI_ERR_CORRUPT);
    fixture_folder_remove(folder);
}

Test(gguf, reports_a_file_that_shrinks_while_it_is_open)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "model.gguf");
    struct buf bytes;
    uint8_t byte;
    buf_init(&bytes, 1u << 20);
    fixture_model(&bytes, &(struct fixture_recipe){.skip_key = NULL});
    fixture_write(path, &bytes);
    struct gguf *gguf = NULL;
    cr_assert_eq(gguf_open(&gguf, path), ODSI_OK);
    cr_expect_eq(gguf_read(gguf, bytes.size - 1, &byte, 1), ODSI_OK);
    cr_expect_eq(gguf_read(gguf, bytes.size, &byte, 1), ODSI_ERR_CORRUPT);
    cr_expect_eq(gguf_read(gguf, UINT64_MAX, &byte, 1), ODSI_ERR_CORRUPT);
    cr_assert_eq(truncate(path, (off_t)bytes.size / 2), 0);
    cr_expect_eq(gguf_read(gguf, bytes.size - 1, &byte, 1), ODSI_ERR_CORRUPT);
    gguf_close(&gguf);
    buf_free(&bytes);
    fixture_folder_remove(folder);
}

/* Goal: whichever allocation fails, opening says so and leaks nothing (for the leak checker). */
Test(gguf, reports_every_allocation_that_fails)
{
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    fixture_model(&bytes, &(struct fixture_recipe){.skip_key = NULL});
    long failing = 0;
    for (;; failing++) {
        struct gguf *gguf = NULL;
        alloc_fail_after(failing);
        const enum odsi_err err = gguf_open_memory(&gguf, bytes.data, bytes.size);
        alloc_fail_after(-1);
        if (err == ODSI_OK) {
            gguf_close(&gguf);
            break;
        }
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        cr_assert_null(gguf);
    }
    cr_expect_eq(failing, 6);
    buf_free(&bytes);
}
