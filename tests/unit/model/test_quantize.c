#include "worker/model/quantize.h"

#include "common/base/alloc.h"
#include "kernels/quant.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/gguf.h"
#include "worker/model/gguf_writer.h"
#include "worker/model/model.h"
#include "worker/model/synth.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static enum odsi_err quantize_to(const char *from, const char *to, const struct quant_mix *mix,
                                 uint32_t threads, int may_requantize)
{
    struct quantize_result result;
    const struct quantize_config config = {
        .mix = mix, .thread_count = threads, .may_requantize = may_requantize};
    return quantize_run(from, to, &config, &result);
}

static void synth_ok(const char *path, const char *shape, enum tensor_type type)
{
    cr_assert_eq(synth_write(path, synth_shape_find(shape), type, 4, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
}

static struct gguf *opened(const char *path)
{
    struct gguf *file = NULL;
    cr_assert_eq(gguf_open(&file, path), ODSI_OK, "%s", odsi_err_text());
    return file;
}

static void expect_gone(const char *path)
{
    char part[1100];
    snprintf(part, sizeof part, "%s.part", path);
    cr_expect_neq(access(path, F_OK), 0);
    cr_expect_neq(access(part, F_OK), 0);
}

static void expect_same_bytes(const char *a, const char *b)
{
    struct buf bytes[2];
    const char *paths[2] = {a, b};
    for (int i = 0; i < 2; i++) {
        buf_init(&bytes[i], 64u << 20);
        fixture_read(paths[i], &bytes[i]);
    }
    cr_expect(bytes[0].size == bytes[1].size &&
                  memcmp(bytes[0].data, bytes[1].data, bytes[0].size) == 0,
              "%s and %s differ", a, b);
    buf_free(&bytes[0]);
    buf_free(&bytes[1]);
}

/* Goal: the tensors are those of a model that was made with these types at once. */
Test(quantize, gives_the_tensors_that_the_weights_would_have_had)
{
    static const char *const mixes[] = {"f32", "f16", "bf16", "q6_k", "q4_k_m", "q3_k_s", "q5_1"};
    char *folder = fixture_folder();
    const char *from = fixture_path(folder, "from.gguf");
    const char *to = fixture_path(folder, "to.gguf");
    const char *wanted_path = fixture_path(folder, "wanted.gguf");
    synth_ok(from, "qwen2-tiny", TENSOR_F32);
    for (size_t i = 0; i < sizeof mixes / sizeof mixes[0]; i++) {
        const struct quant_mix *mix = quant_mix_find(mixes[i]);
        cr_assert_eq(quantize_to(from, to, mix, 2, 0), ODSI_OK, "%s", odsi_err_text());
        cr_assert_eq(
            synth_write_mix(wanted_path, synth_shape_find("qwen2-tiny"), mix, 4, NULL, NULL),
            ODSI_OK);
        struct gguf *got = opened(to), *wanted = opened(wanted_path);
        cr_assert_eq(gguf_tensor_count(got), gguf_tensor_count(wanted));
        for (uint64_t t = 0; t < gguf_tensor_count(got); t++) {
            const struct gguf_tensor *a = gguf_tensor_at(got, t), *b = gguf_tensor_at(wanted, t);
            cr_assert_eq(a->ggml_type, b->ggml_type, "%s", mixes[i]);
            cr_assert(a->size == b->size && memcmp(a->data, b->data, a->size) == 0, "%s: %.*s",
                      mixes[i], (int)a->name.size, a->name.data);
        }
        uint32_t file_type = 999, version = 0;
        cr_assert_eq(gguf_get_u32(got, "general.file_type", &file_type), ODSI_OK);
        cr_expect_eq(file_type, mix->file_type);
        const enum odsi_err err = gguf_get_u32(got, "general.quantization_version", &version);
        cr_expect_eq(err, i < 3 ? ODSI_ERR_NOT_FOUND : ODSI_OK);
        gguf_close(&got);
        gguf_close(&wanted);
        cr_assert(unlink(to) == 0 && unlink(wanted_path) == 0);
    }
    fixture_folder_remove(folder);
}

/* Whatever the family and the mix, this build can run the result. */
Test(quantize, makes_models_that_open)
{
    static const char *const shapes[] = {"llama-tiny",  "gemma3-tiny",    "qwen3moe-tiny",
                                         "phi3-tiny",   "phi3-long-tiny", "mixtral-tiny",
                                         "gemma2-tiny", "llama3-tiny"};
    const struct quant_mix *mix = quant_mix_table();
    char *folder = fixture_folder();
    const char *from = fixture_path(folder, "from.gguf");
    const char *to = fixture_path(folder, "to.gguf");
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        synth_ok(from, shapes[i], TENSOR_F16);
        for (int k = 0; k < 3; k++) {
            struct model *before = NULL, *after = NULL;
            mix = (mix + 1)->name ? mix + 1 : quant_mix_table();
            cr_assert_eq(quantize_to(from, to, mix, 1, 0), ODSI_OK, "%s", odsi_err_text());
            cr_assert_eq(model_open(&before, from, NULL, NULL, NULL), ODSI_OK);
            cr_assert_eq(model_open(&after, to, NULL, NULL, NULL), ODSI_OK, "%s in %s: %s",
                         shapes[i], mix->name, odsi_err_text());
            struct model_params wanted = *model_params_view(before);
            wanted.weight_size = model_params_view(after)->weight_size;
            cr_expect_eq(memcmp(&wanted, model_params_view(after), sizeof wanted), 0,
                         "the hyper-parameters are those of before");
            model_close(&before);
            model_close(&after);
            cr_assert_eq(unlink(to), 0);
        }
        cr_assert_eq(unlink(from), 0);
    }
    fixture_folder_remove(folder);
}

/* Writes the index-th of two parts: every second tensor of file, metadata in the first. */
static void write_part(const struct gguf *file, const char *path, uint32_t index)
{
    struct gguf_writer *out = NULL;
    struct gguf_value value;
    cr_assert_eq(gguf_writer_open(&out, path, NULL, NULL), ODSI_OK);
    for (uint64_t i = 0; index == 0 && gguf_key_value(file, i, &value); i++)
        gguf_writer_copy(out, gguf_key_at(file, i), &value);
    gguf_writer_u32(out, "split.no", index);
    gguf_writer_u32(out, "split.count", 2);
    gguf_writer_u32(out, "split.tensors.count", (uint32_t)gguf_tensor_count(file));
    const uint64_t count = gguf_tensor_count(file), half = count / 2;
    const uint64_t first = index == 0 ? 0 : half, end = index == 0 ? half : count;
    for (uint64_t i = first; i < end; i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(file, i);
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)tensor->name.size, tensor->name.data);
        gguf_writer_tensor(out, name, (enum tensor_type)tensor->ggml_type, tensor->dim_count,
                           tensor->dims);
    }
    cr_assert_eq(gguf_writer_begin(out), ODSI_OK);
    for (uint64_t i = first; i < end; i++)
        cr_assert_eq(
            gguf_writer_data(out, gguf_tensor_at(file, i)->data, gguf_tensor_at(file, i)->size),
            ODSI_OK);
    cr_assert_eq(gguf_writer_finish(out), ODSI_OK);
    gguf_writer_close(&out);
}

/* Goal: the result has the same bytes whether the model lies in one file or two, whatever the
 * number of threads. */
Test(quantize, joins_the_parts_of_a_split_model)
{
    char *folder = fixture_folder();
    const char *from = fixture_path(folder, "from.gguf");
    const char *to = fixture_path(folder, "to.gguf");
    const struct quant_mix *mix = quant_mix_find("q4_k_m");
    synth_ok(from, "llama-tiny", TENSOR_BF16);
    cr_assert_eq(quantize_to(from, to, mix, 1, 0), ODSI_OK, "%s", odsi_err_text());
    struct gguf *file = opened(from);
    for (uint32_t i = 0; i < 2; i++)
        write_part(file,
                   fixture_path(folder, i == 0 ? "m-00001-of-00002.gguf" : "m-00002-of-00002.gguf"),
                   i);
    gguf_close(&file);
    for (uint32_t i = 0; i < 2; i++) {
        const char *part =
            fixture_path(folder, i == 0 ? "m-00001-of-00002.gguf" : "m-00002-of-00002.gguf");
        const char *joined = fixture_path(folder, "joined.gguf");
        cr_assert_eq(quantize_to(part, joined, mix, 3 + i, 0), ODSI_OK, "%s", odsi_err_text());
        expect_same_bytes(to, joined);
        cr_assert_eq(unlink(joined), 0);
    }
    fixture_folder_remove(folder);
}

Test(quantize, takes_quantized_weights_only_when_told)
{
    char *folder = fixture_folder();
    const char *from = fixture_path(folder, "from.gguf");
    const char *to = fixture_path(folder, "to.gguf");
    const struct quant_mix pure = quant_mix_pure(TENSOR_Q4_0);
    const struct quant_mix same = quant_mix_pure(TENSOR_Q8_0);
    struct model *model = NULL;
    synth_ok(from, "llama-tiny", TENSOR_Q8_0);
    cr_expect_eq(quantize_to(from, to, &pure, 1, 0), ODSI_ERR_INVALID);
    cr_expect(strstr(odsi_err_text(), "token_embd.weight is q8_0 already"), "%s", odsi_err_text());
    expect_gone(to);
    cr_assert_eq(quantize_to(from, to, &pure, 1, 1), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(model_open(&model, to, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    model_close(&model);
    cr_assert_eq(unlink(to), 0);
    cr_expect_eq(quantize_to(from, to, &same, 1, 0), ODSI_OK, "what has the type is copied");
    fixture_folder_remove(folder);
}

Test(quantize, refuses_weights_that_are_not_finite_and_names_the_tensor)
{
    char *folder = fixture_folder();
    const char *from = fixture_path(folder, "from.gguf");
    const char *to = fixture_path(folder, "to.gguf");
    synth_ok(from, "llama-tiny", TENSOR_F32);
    struct gguf *file = opened(from);
    const struct gguf_tensor *tensor = gguf_tensor_find(file, "blk.2.ffn_up.weight");
    cr_assert_not_null(tensor);
    const uint64_t at = tensor->offset + 4 * 777;
    uint32_t bits;
    memcpy(&bits, tensor->data + 4 * 777, sizeof bits);
    gguf_close(&file);
    const uint32_t mask = bits ^ 0x7fc00000u; /* makes it a NaN */
    for (uint32_t i = 0; i < 4; i++)
        fixture_flip(from, at + i, (uint8_t)(mask >> (8 * i)));
    cr_expect_eq(quantize_to(from, to, quant_mix_find("q5_k_m"), 2, 0), ODSI_ERR_NUMERIC);
    cr_expect(strstr(odsi_err_text(), "blk.2.ffn_up.weight") &&
                  strstr(odsi_err_text(), "row 3, column 9 "),
              "%s", odsi_err_text());
    expect_gone(to);
    fixture_folder_remove(folder);
}

Test(quantize, refuses_what_is_not_a_model_file)
{
    char *folder = fixture_folder();
    const char *to = fixture_path(folder, "to.gguf");
    const struct quant_mix *mix = quant_mix_find("q8_0");
    cr_expect_eq(quantize_to(folder, to, mix, 1, 0), ODSI_ERR_UNSUPPORTED);
    cr_expect(strstr(odsi_err_text(), "is a folder"), "%s", odsi_err_text());
    cr_expect_eq(quantize_to("Makefile", to, mix, 1, 0), ODSI_ERR_CORRUPT);
    cr_expect_eq(quantize_to(fixture_path(folder, "none.gguf"), to, mix, 1, 0), ODSI_ERR_NOT_FOUND);
    cr_expect_eq(quantize_to(FIXTURE_DEMO, FIXTURE_DEMO, mix, 1, 1), ODSI_ERR_EXISTS);
    cr_expect_eq(quantize_to(FIXTURE_DEMO, to, mix, 0, 1), ODSI_ERR_INVALID, "no thread");
    expect_gone(to);
    fixture_folder_remove(folder);
}

Test(quantize, reports_every_allocation_that_fails)
{
    char *folder = fixture_folder();
    const char *from = fixture_path(folder, "from.gguf");
    const char *to = fixture_path(folder, "to.gguf");
    cr_assert_eq(synth_write(from, &fixture_shape, TENSOR_F16, 1, NULL, NULL), ODSI_OK);
    long failing = 0;
    for (;; failing++) {
        alloc_fail_after(failing);
        const enum odsi_err err = quantize_to(from, to, quant_mix_find("q4_0"), 2, 0);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        expect_gone(to);
    }
    cr_expect(failing > 20);
    fixture_folder_remove(folder);
}
