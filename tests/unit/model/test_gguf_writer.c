#include "worker/model/gguf_writer.h"

#include "common/base/alloc.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/gguf.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static const uint64_t matrix_dims[] = {256, 3};
static const uint64_t cube_dims[] = {32, 2, 5};
static const uint64_t vector_dims[] = {7};
#define MATRIX_SIZE (3u * 144u)
#define CUBE_SIZE   (10u * 34u)
#define VECTOR_SIZE 28u
#define DATA_SIZE   (MATRIX_SIZE + CUBE_SIZE + VECTOR_SIZE)

static void put_header(struct gguf_writer *out)
{
    gguf_writer_text(out, "general.architecture", "none");
    gguf_writer_u32(out, "a.number", 4000000000u);
    gguf_writer_f32(out, "a.float", 0.1f);
    gguf_writer_bool(out, "a.yes", 7);
    gguf_writer_array(out, "a.texts", GGUF_TEXT, 2);
    gguf_writer_item_text(out, "with\0zero", 9);
    gguf_writer_item_text(out, "", 0);
    gguf_writer_array(out, "a.numbers", GGUF_I32, 3);
    for (uint32_t i = 0; i < 3; i++)
        gguf_writer_item_u32(out, i - 1);
    gguf_writer_tensor(out, "matrix", TENSOR_Q4_K, 2, matrix_dims);
    gguf_writer_tensor(out, "cube", TENSOR_Q8_0, 3, cube_dims);
    gguf_writer_tensor(out, "vector", TENSOR_F32, 1, vector_dims);
}

static uint8_t byte_at(uint32_t index)
{
    return (uint8_t)(index * 7 + index / 256);
}

/* Writes the whole file, its data in pieces of part bytes. */
static enum odsi_err write_file(const char *path, uint32_t part)
{
    struct gguf_writer *out = NULL;
    uint8_t data[DATA_SIZE];
    for (uint32_t i = 0; i < DATA_SIZE; i++)
        data[i] = byte_at(i);
    enum odsi_err err = gguf_writer_open(&out, path, NULL, NULL);
    if (err == ODSI_OK) {
        put_header(out);
        err = gguf_writer_begin(out);
    }
    for (uint32_t at = 0; at < DATA_SIZE && err == ODSI_OK; at += part)
        err = gguf_writer_data(out, data + at, DATA_SIZE - at < part ? DATA_SIZE - at : part);
    if (err == ODSI_OK)
        err = gguf_writer_finish(out);
    gguf_writer_close(&out);
    return err;
}

static void expect_gone(const char *path)
{
    char part[1100];
    snprintf(part, sizeof part, "%s.part", path);
    cr_expect_neq(access(path, F_OK), 0);
    cr_expect_neq(access(part, F_OK), 0);
}

static void expect_metadata(const struct gguf *file)
{
    struct gguf_text text;
    struct gguf_array array;
    uint32_t number;
    float value;
    int flag;
    size_t cursor = 0;
    cr_assert_eq(gguf_get_text(file, "general.architecture", &text), ODSI_OK);
    cr_expect(gguf_text_is(text, "none"));
    cr_assert_eq(gguf_get_u32(file, "a.number", &number), ODSI_OK);
    cr_expect_eq(number, 4000000000u);
    cr_assert_eq(gguf_get_f32(file, "a.float", &value), ODSI_OK);
    cr_expect_eq(value, 0.1f);
    cr_assert_eq(gguf_get_bool(file, "a.yes", &flag), ODSI_OK);
    cr_expect_eq(flag, 1);
    cr_assert_eq(gguf_get_array(file, "a.texts", &array), ODSI_OK);
    cr_assert(gguf_array_text(&array, &cursor, &text));
    cr_expect(text.size == 9 && memcmp(text.data, "with\0zero", 9) == 0);
    cr_assert(gguf_array_text(&array, &cursor, &text));
    cr_expect_eq(text.size, 0);
    cr_assert_eq(gguf_get_array(file, "a.numbers", &array), ODSI_OK);
    cr_expect(array.count == 3 && array.size == 12);
    cr_expect_eq(bytes_load_u32(array.data), UINT32_MAX);
}

/* Goal: what is written is read back, and how the data came in pieces never shows. */
Test(gguf_writer, writes_what_the_reader_reads)
{
    static const uint32_t parts[] = {1, 31, 144, 433, DATA_SIZE};
    static const uint32_t sizes[] = {MATRIX_SIZE, CUBE_SIZE, VECTOR_SIZE};
    char *folder = fixture_folder();
    struct buf first, other;
    buf_init(&first, 65536);
    buf_init(&other, 65536);
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
        const char *path = fixture_path(folder, "a.gguf");
        struct gguf *file = NULL;
        cr_assert_eq(write_file(path, parts[i]), ODSI_OK, "%s", odsi_err_text());
        cr_assert_eq(gguf_open(&file, path), ODSI_OK, "%s", odsi_err_text());
        expect_metadata(file);
        cr_assert_eq(gguf_tensor_count(file), 3);
        uint32_t at = 0;
        for (uint32_t t = 0; t < 3; t++) {
            const struct gguf_tensor *tensor = gguf_tensor_at(file, t);
            cr_assert_eq(tensor->size, sizes[t]);
            cr_expect_eq(tensor->offset % GGUF_WRITER_ALIGNMENT, 0);
            for (uint32_t k = 0; k < sizes[t]; k++, at++)
                cr_assert_eq(tensor->data[k], byte_at(at), "tensor %u, byte %u", t, k);
        }
        cr_expect_eq(gguf_tensor_at(file, 1)->dims[2], 5);
        gguf_close(&file);
        buf_reset(&other);
        fixture_read(path, i == 0 ? &first : &other);
        cr_expect(i == 0 ||
                  (first.size == other.size && memcmp(first.data, other.data, first.size) == 0));
        cr_assert_eq(unlink(path), 0);
    }
    buf_free(&first);
    buf_free(&other);
    fixture_folder_remove(folder);
}

static void copy_all(const char *from, const char *to)
{
    struct gguf *file = NULL;
    struct gguf_writer *out = NULL;
    struct gguf_value value;
    cr_assert_eq(gguf_open(&file, from), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(gguf_writer_open(&out, to, NULL, NULL), ODSI_OK);
    for (uint64_t i = 0; gguf_key_value(file, i, &value); i++)
        gguf_writer_copy(out, gguf_key_at(file, i), &value);
    gguf_writer_tensor(out, "matrix", TENSOR_Q4_K, 2, matrix_dims);
    gguf_writer_tensor(out, "cube", TENSOR_Q8_0, 3, cube_dims);
    gguf_writer_tensor(out, "vector", TENSOR_F32, 1, vector_dims);
    cr_assert_eq(gguf_writer_begin(out), ODSI_OK);
    for (uint64_t i = 0; i < 3; i++)
        cr_assert_eq(
            gguf_writer_data(out, gguf_tensor_at(file, i)->data, gguf_tensor_at(file, i)->size),
            ODSI_OK);
    cr_assert_eq(gguf_writer_finish(out), ODSI_OK);
    gguf_writer_close(&out);
    gguf_close(&file);
}

Test(gguf_writer, copies_values_of_every_kind_byte_for_byte)
{
    char *folder = fixture_folder();
    struct buf bytes[2];
    const char *paths[2] = {fixture_path(folder, "a.gguf"), fixture_path(folder, "b.gguf")};
    cr_assert_eq(write_file(paths[0], 100), ODSI_OK);
    copy_all(paths[0], paths[1]);
    for (int i = 0; i < 2; i++) {
        buf_init(&bytes[i], 65536);
        fixture_read(paths[i], &bytes[i]);
    }
    cr_assert_eq(bytes[0].size, bytes[1].size);
    cr_expect_eq(memcmp(bytes[0].data, bytes[1].data, bytes[0].size), 0);
    buf_free(&bytes[0]);
    buf_free(&bytes[1]);
    fixture_folder_remove(folder);
}

Test(gguf_writer, leaves_nothing_when_it_is_given_up)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    const uint8_t byte = 1;
    for (int stage = 0; stage < 3; stage++) {
        struct gguf_writer *out = NULL;
        cr_assert_eq(gguf_writer_open(&out, path, NULL, NULL), ODSI_OK);
        put_header(out);
        if (stage > 0)
            cr_assert_eq(gguf_writer_begin(out), ODSI_OK);
        if (stage > 1)
            cr_assert_eq(gguf_writer_data(out, &byte, 1), ODSI_OK);
        gguf_writer_close(&out);
        gguf_writer_close(&out);
        expect_gone(path);
    }
    fixture_folder_remove(folder);
}

Test(gguf_writer, tells_of_tensors_that_cannot_be)
{
    static const struct {
        enum tensor_type type;
        uint32_t dim_count;
        uint64_t dims[4];
    } cases[] = {{TENSOR_Q4_K, 1, {255}},
                 {(enum tensor_type)99, 1, {256}},
                 {TENSOR_F32, 2, {4, 0}},
                 {TENSOR_F32, 4, {1u << 31, 1u << 31, 1u << 31, 1u << 31}},
                 {TENSOR_F32, 2, {UINT64_C(1) << 40, UINT64_C(1) << 21}}};
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct gguf_writer *out = NULL;
        cr_assert_eq(gguf_writer_open(&out, path, NULL, NULL), ODSI_OK);
        gguf_writer_tensor(out, "odd", cases[i].type, cases[i].dim_count, cases[i].dims);
        gguf_writer_tensor(out, "vector", TENSOR_F32, 1, vector_dims);
        cr_expect_eq(gguf_writer_begin(out), ODSI_ERR_INVALID, "case %zu", i);
        cr_expect_not_null(strstr(odsi_err_text(), "tensor odd"), "%s", odsi_err_text());
        gguf_writer_close(&out);
        expect_gone(path);
    }
    fixture_folder_remove(folder);
}

/* Goal: no failure of disk or memory leaves a file or goes unsaid. How: a limit on the size of
 * files acts like a full disk, at every size; then every allocation fails in turn. */
Test(gguf_writer, leaves_nothing_when_disk_or_memory_run_out)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    struct buf whole;
    struct rlimit unlimited;
    buf_init(&whole, 65536);
    cr_assert_eq(write_file(path, 1000), ODSI_OK);
    fixture_read(path, &whole);
    cr_assert_eq(unlink(path), 0);
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    cr_assert_eq(sigaction(SIGXFSZ, &ignore, NULL), 0);
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &unlimited), 0);
    for (rlim_t room = 0; room < whole.size; room += 61) {
        const struct rlimit limit = {.rlim_cur = room, .rlim_max = unlimited.rlim_max};
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        const enum odsi_err err = write_file(path, 1000);
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &unlimited), 0);
        cr_expect_eq(err, ODSI_ERR_IO, "room for %lu", (unsigned long)room);
        expect_gone(path);
    }
    long failing = 0;
    for (;; failing++) {
        alloc_fail_after(failing);
        const enum odsi_err err = write_file(path, 1000);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        expect_gone(path);
    }
    cr_expect(failing > 8);
    buf_free(&whole);
    fixture_folder_remove(folder);
}

Test(gguf_writer, replaces_nothing)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    struct gguf_writer *out = NULL;
    struct buf bytes;
    buf_init(&bytes, 16);
    (void)buf_append_text(&bytes, "mine");
    fixture_write(path, &bytes);
    cr_expect_eq(gguf_writer_open(&out, path, NULL, NULL), ODSI_ERR_EXISTS);
    cr_assert_eq(unlink(path), 0);
    fixture_write(fixture_path(folder, "a.gguf.part"), &bytes);
    cr_expect_eq(gguf_writer_open(&out, path, NULL, NULL), ODSI_ERR_EXISTS);
    cr_expect_not_null(strstr(odsi_err_text(), "a.gguf.part"));
    cr_expect_eq(access(fixture_path(folder, "a.gguf.part"), F_OK), 0, "it is another's");
    cr_expect_eq(gguf_writer_open(&out, fixture_path(folder, "no/a.gguf"), NULL, NULL),
                 ODSI_ERR_IO);
    cr_expect_null(out);
    buf_free(&bytes);
    fixture_folder_remove(folder);
}
