#include "worker/model/synth.h"

#include "common/base/alloc.h"
#include "common/crypto/digest.h"
#include "kernels/det.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/model.h"
#include "worker/model/tokenizer.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static struct digest file_digest(const char *path)
{
    struct buf bytes;
    struct digest digest;
    buf_init(&bytes, 64u << 20);
    fixture_read(path, &bytes);
    digest_of(&digest, bytes.data, bytes.size);
    buf_free(&bytes);
    return digest;
}

static void write_ok(const char *path, enum tensor_type type, uint64_t seed)
{
    cr_assert_eq(synth_write(path, &fixture_shape, type, seed, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
}

/* Goal: the same shape, type and seed give the same bytes everywhere; benchmarks rely on it. */
Test(synth, writes_the_same_bytes_everywhere)
{
    static const struct {
        enum tensor_type type;
        const char *digest;
    } cases[] = {{TENSOR_F32, "52ca3548f5d8ca19ebee3f04ab471d004c385331084983ed0332ef0adb328089"},
                 {TENSOR_F16, "3728d932f206302de88a46ab7b46c26e5e772edcd4a3a0b3804df5d6260b1b8f"},
                 {TENSOR_Q8_0, "77f40990e4c3b66b5e30d67b43e586b572e4747b22ca4f108517a7ff4aa47002"}};
    char *folder = fixture_folder();
    for (size_t i = 0; i < 3; i++) {
        const char *path = fixture_path(folder, "a.gguf");
        char hex[DIGEST_HEX_SIZE];
        write_ok(path, cases[i].type, 7);
        const struct digest digest = file_digest(path);
        digest_to_hex(hex, &digest);
        cr_expect_str_eq(hex, cases[i].digest);
        cr_assert_eq(unlink(path), 0);
        write_ok(path, cases[i].type, 8);
        const struct digest other = file_digest(path);
        cr_expect_not(digest_equal(&digest, &other), "another seed");
        cr_assert_eq(unlink(path), 0);
    }
    fixture_folder_remove(folder);
}

/* The index-th weight of a tensor as f32. */
static float weight_at(const struct gguf_tensor *tensor, uint64_t index)
{
    const uint8_t *data = tensor->data;
    if (tensor->ggml_type == TENSOR_F32)
        return det_from_bits(bytes_load_u32(data + 4 * index));
    if (tensor->ggml_type == TENSOR_F16)
        return det_f32_from_f16((uint16_t)(data[2 * index] | data[2 * index + 1] << 8));
    const uint8_t *block = data + index / 32 * 34;
    return det_f32_from_f16((uint16_t)(block[0] | block[1] << 8)) *
           (float)(int8_t)block[2 + index % 32];
}

Test(synth, holds_the_same_numbers_in_every_type)
{
    static const enum tensor_type types[] = {TENSOR_F32, TENSOR_F16, TENSOR_Q8_0};
    static const char *const names[] = {"f32.gguf", "f16.gguf", "q8.gguf"};
    char *folder = fixture_folder();
    struct gguf *files[3] = {NULL};
    for (size_t i = 0; i < 3; i++) {
        const char *path = fixture_path(folder, names[i]);
        write_ok(path, types[i], 3);
        cr_assert_eq(gguf_open(&files[i], path), ODSI_OK, "%s", odsi_err_text());
    }
    cr_expect_eq(gguf_tensor_count(files[0]), 3 + 9 * 3);
    for (uint64_t i = 0; i < gguf_tensor_count(files[0]); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(files[0], i);
        const uint64_t count = tensor->dims[0] * tensor->dims[1];
        double squares = 0;
        for (uint64_t k = 0; k < count; k++) {
            const float value = weight_at(tensor, k);
            squares += (double)value * (double)value;
            for (size_t file = 1; file < 3; file++)
                cr_assert_eq(weight_at(gguf_tensor_at(files[file], i), k), value, "%.*s",
                             (int)tensor->name.size, tensor->name.data);
        }
        /* Unit inputs come out near 1 (times the embedding's or residual's own factor). */
        const double mean = squares / (double)count;
        const double unit = tensor->dim_count == 1 ? 1.0 : mean * (double)tensor->dims[0];
        cr_expect(gguf_text_is(tensor->name, "token_embd.weight") ? mean > 0.3 && mean < 3
                                                                  : unit > 0.05 && unit < 3,
                  "%.*s: %g", (int)tensor->name.size, tensor->name.data, unit);
    }
    for (size_t i = 0; i < 3; i++)
        gguf_close(&files[i]);
    fixture_folder_remove(folder);
}

Test(synth, writes_models_that_open_and_tokenize)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    struct model *model = NULL;
    struct tokenizer *tokenizer = NULL;
    const uint8_t *data;
    size_t size;
    const struct synth_shape *shape = synth_shape_find("llama-tiny");
    cr_assert_not_null(shape);
    cr_assert_eq(synth_write(path, shape, TENSOR_Q8_0, 1, NULL, NULL), ODSI_OK);
    cr_assert_eq(model_open(&model, path, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(model_params_view(model)->dim, 256);
    cr_expect_eq(model_params_view(model)->vocab_size, 2048);
    cr_expect_str_eq(model_params_view(model)->name, "llama-tiny synthetic");
    model_tokenizer_view(model, &data, &size);
    cr_assert_eq(tokenizer_open(&tokenizer, data, size), ODSI_OK);
    uint32_t ids[16];
    uint32_t count = 16;
    char text[16];
    size_t text_size = 16;
    cr_assert_eq(tokenizer_encode(tokenizer, "ab cd", 5, TOKENIZER_BOS, ids, &count), ODSI_OK);
    cr_expect(count < 5, "made-up pieces are used");
    cr_assert_eq(tokenizer_decode(tokenizer, ids, count, text, &text_size), ODSI_OK);
    cr_expect(text_size == 5 && memcmp(text, "ab cd", 5) == 0);
    tokenizer_close(&tokenizer);
    model_close(&model);
    fixture_folder_remove(folder);
}

Test(synth, knows_its_shapes)
{
    size_t count = 0;
    for (const struct synth_shape *shape = synth_shapes(); shape->name; shape++, count++)
        cr_expect_eq(synth_shape_find(shape->name), shape);
    cr_expect(count >= 3);
    cr_expect_null(synth_shape_find("llama-nothing"));
    const struct synth_shape *shape = synth_shape_find("llama-1.1b");
    cr_assert_not_null(shape);
    cr_expect(shape->dim == 2048 && shape->layer_count == 22 && shape->head_count == 32 &&
              shape->kv_head_count == 4 && shape->head_dim == 64 && shape->ffn_dim == 5632 &&
              shape->vocab_size == 32000 && shape->context_length == 2048);
}

static void expect_gone(const char *path)
{
    char part[1100];
    snprintf(part, sizeof part, "%s.part", path);
    cr_expect_neq(access(path, F_OK), 0);
    cr_expect_neq(access(part, F_OK), 0);
}

/* Goal: a full disk leaves nothing behind. How: a limit on the size of files acts like one; a
 * dozen limits from nothing to one byte short. */
Test(synth, leaves_no_file_when_the_disk_is_full)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    struct buf whole;
    struct rlimit unlimited;
    buf_init(&whole, 64u << 20);
    write_ok(path, TENSOR_F32, 1);
    fixture_read(path, &whole);
    cr_assert_eq(unlink(path), 0);
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    cr_assert_eq(sigaction(SIGXFSZ, &ignore, NULL), 0);
    cr_assert_eq(getrlimit(RLIMIT_FSIZE, &unlimited), 0);
    for (size_t i = 0; i < 12; i++) {
        const rlim_t room = i == 11 ? whole.size - 1 : whole.size * i / 11;
        const struct rlimit limit = {.rlim_cur = room, .rlim_max = unlimited.rlim_max};
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &limit), 0);
        const enum odsi_err err = synth_write(path, &fixture_shape, TENSOR_F32, 1, NULL, NULL);
        cr_assert_eq(setrlimit(RLIMIT_FSIZE, &unlimited), 0);
        cr_expect_eq(err, ODSI_ERR_IO);
        cr_expect(strstr(odsi_err_text(), path) && strstr(odsi_err_text(), "large"), "%s",
                  odsi_err_text());
        expect_gone(path);
    }
    buf_free(&whole);
    fixture_folder_remove(folder);
}

Test(synth, replaces_nothing)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    struct buf bytes;
    buf_init(&bytes, 16);
    (void)buf_append_text(&bytes, "mine");
    fixture_write(path, &bytes);
    cr_expect_eq(synth_write(path, &fixture_shape, TENSOR_F32, 1, NULL, NULL), ODSI_ERR_EXISTS);
    buf_reset(&bytes);
    fixture_read(path, &bytes);
    cr_expect_str_eq(buf_text_view(&bytes), "mine");
    cr_assert_eq(unlink(path), 0);
    fixture_write(fixture_path(folder, "a.gguf.part"), &bytes);
    cr_expect_eq(synth_write(path, &fixture_shape, TENSOR_F32, 1, NULL, NULL), ODSI_ERR_EXISTS);
    cr_expect_not_null(strstr(odsi_err_text(), "a.gguf.part"));
    cr_expect_eq(
        synth_write(fixture_path(folder, "no/a.gguf"), &fixture_shape, TENSOR_F32, 1, NULL, NULL),
        ODSI_ERR_IO);
    buf_free(&bytes);
    fixture_folder_remove(folder);
}

Test(synth, refuses_shapes_that_no_model_has)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    struct synth_shape shape = fixture_shape;
    cr_expect_eq(synth_write(path, &shape, (enum tensor_type)2, 1, NULL, NULL), ODSI_ERR_INVALID);
    shape.vocab_size = 258;
    cr_expect_eq(synth_write(path, &shape, TENSOR_F32, 1, NULL, NULL), ODSI_ERR_INVALID);
    shape = fixture_shape;
    shape.ffn_dim = 100;
    cr_expect_eq(synth_write(path, &shape, TENSOR_Q8_0, 1, NULL, NULL), ODSI_ERR_INVALID);
    shape = fixture_shape;
    shape.layer_count = 0;
    cr_expect_eq(synth_write(path, &shape, TENSOR_F32, 1, NULL, NULL), ODSI_ERR_INVALID);
    shape = fixture_shape;
    shape.kv_head_count = 3;
    cr_expect_eq(synth_write(path, &shape, TENSOR_F32, 1, NULL, NULL), ODSI_ERR_INVALID);
    expect_gone(path);
    shape = fixture_shape;
    shape.ffn_dim = 100; /* fine in F32, where the last block of a tensor may be cut */
    shape.dim = 36;
    shape.head_dim = 10;
    struct model *model = NULL;
    cr_assert_eq(synth_write(path, &shape, TENSOR_F32, 1, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
    cr_expect_eq(model_open(&model, path, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    model_close(&model);
    fixture_folder_remove(folder);
}

struct seen {
    uint64_t done, total;
};

static void see(void *context, uint64_t done, uint64_t total)
{
    struct seen *seen = context;
    cr_expect(done > seen->done && done <= total);
    *seen = (struct seen){done, total};
}

Test(synth, tells_how_far_it_is)
{
    char *folder = fixture_folder();
    struct seen seen = {0};
    struct buf bytes;
    const char *path = fixture_path(folder, "a.gguf");
    buf_init(&bytes, 64u << 20);
    cr_assert_eq(synth_write(path, synth_shape_find("llama-tiny"), TENSOR_F16, 1, see, &seen),
                 ODSI_OK);
    fixture_read(path, &bytes);
    cr_expect_eq(seen.done, bytes.size);
    cr_expect_eq(seen.total, bytes.size);
    buf_free(&bytes);
    fixture_folder_remove(folder);
}

Test(synth, reports_every_allocation_that_fails)
{
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    long failing = 0;
    for (;; failing++) {
        alloc_fail_after(failing);
        const enum odsi_err err = synth_write(path, &fixture_shape, TENSOR_Q8_0, 1, NULL, NULL);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        expect_gone(path);
    }
    cr_expect(failing > 5);
    fixture_folder_remove(folder);
}
