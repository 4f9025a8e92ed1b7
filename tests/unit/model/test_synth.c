#include "worker/model/synth.h"

#include "common/base/alloc.h"
#include "common/crypto/digest.h"
#include "kernels/quant.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/chat_template.h"
#include "worker/model/model.h"
#include "worker/model/quantizer.h"
#include "worker/model/tokenizer.h"

#include <criterion/criterion.h>
#include <math.h>
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
    } cases[] = {{TENSOR_F32, "989113c28f02b4ae7c6dacb3ad3df912f5051e2d383cf93a73ee62ba50916c9c"},
                 {TENSOR_F16, "e17a31f733b0fe2863ee855f5892b95de86ee78fc219a7271db8831b37f2ae27"},
                 {TENSOR_Q8_0, "948ef5a8b21cdab6c2690a3bd9b703a8bac8c9b9d1b916551ba7faec1f2c8730"}};
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

/* All weights of a tensor as f32; ended with alloc_free. */
static float *weights_of(const struct gguf_tensor *tensor)
{
    const uint32_t cols = (uint32_t)tensor->dims[0];
    const uint64_t rows = tensor->dims[1] * tensor->dims[2];
    const enum tensor_type type = (enum tensor_type)tensor->ggml_type;
    float *out = NULL;
    cr_assert_eq(alloc_zeroed(&out, rows * cols, sizeof *out), ODSI_OK);
    for (uint64_t row = 0; row < rows; row++)
        quantizer_read_row(type, tensor->data + row * quant_row_size(type, cols), cols,
                           out + row * cols);
    return out;
}

Test(synth, holds_the_same_numbers_in_every_type_that_can)
{
    static const enum tensor_type types[] = {TENSOR_F32, TENSOR_F16, TENSOR_BF16, TENSOR_Q8_0};
    static const char *const names[] = {"f32.gguf", "f16.gguf", "bf16.gguf", "q8.gguf"};
    char *folder = fixture_folder();
    struct gguf *files[4] = {NULL};
    for (size_t i = 0; i < 4; i++) {
        const char *path = fixture_path(folder, names[i]);
        write_ok(path, types[i], 3);
        cr_assert_eq(gguf_open(&files[i], path), ODSI_OK, "%s", odsi_err_text());
    }
    cr_expect_eq(gguf_tensor_count(files[0]), 3 + 9 * 3);
    for (uint64_t i = 0; i < gguf_tensor_count(files[0]); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(files[0], i);
        const uint64_t count = tensor->dims[0] * tensor->dims[1];
        float *weights = weights_of(tensor);
        double squares = 0;
        for (size_t file = 1; file < 4; file++) {
            float *others = weights_of(gguf_tensor_at(files[file], i));
            cr_expect_eq(memcmp(weights, others, count * sizeof *weights), 0, "%.*s in %s",
                         (int)tensor->name.size, tensor->name.data, names[file]);
            alloc_free(others);
        }
        for (uint64_t k = 0; k < count; k++)
            squares += (double)weights[k] * (double)weights[k];
        /* Unit inputs come out near 1 (times the embedding's, residual's or output's factor). */
        const double mean = squares / (double)count;
        const double unit = tensor->dim_count == 1 ? 1.0 : mean * (double)tensor->dims[0];
        const double wanted = gguf_text_is(tensor->name, "output.weight") ? 16 : 1;
        cr_expect(gguf_text_is(tensor->name, "token_embd.weight")
                      ? mean > 0.3 && mean < 3
                      : unit > 0.05 && unit < 3 * wanted,
                  "%.*s: %g", (int)tensor->name.size, tensor->name.data, unit);
        alloc_free(weights);
    }
    for (size_t i = 0; i < 4; i++)
        gguf_close(&files[i]);
    fixture_folder_remove(folder);
}

/* Goal: other types hold those numbers as well as they can. How: the error of each tensor relative
 * to the F32 file's, bounded by the type. */
Test(synth, quantizes_the_numbers_for_the_other_types)
{
    static const struct {
        enum tensor_type type;
        double error_max;
    } cases[] = {{TENSOR_Q4_0, 0.12},  {TENSOR_Q4_1, 0.08}, {TENSOR_Q5_0, 0.06},
                 {TENSOR_Q5_1, 0.04},  {TENSOR_Q2_K, 0.35}, {TENSOR_Q3_K, 0.18},
                 {TENSOR_Q4_K, 0.085}, {TENSOR_Q5_K, 0.05}, {TENSOR_Q6_K, 0.03}};
    char *folder = fixture_folder();
    const struct synth_shape *shape = synth_shape_find("qwen2-tiny");
    struct gguf *exact = NULL;
    const char *path = fixture_path(folder, "exact.gguf");
    cr_assert_eq(synth_write(path, shape, TENSOR_F32, 5, NULL, NULL), ODSI_OK);
    cr_assert_eq(gguf_open(&exact, path), ODSI_OK, "%s", odsi_err_text());
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        struct gguf *file = NULL;
        path = fixture_path(folder, quant_name(cases[c].type));
        cr_assert_eq(synth_write(path, shape, cases[c].type, 5, NULL, NULL), ODSI_OK);
        cr_assert_eq(gguf_open(&file, path), ODSI_OK, "%s", odsi_err_text());
        for (uint64_t i = 0; i < gguf_tensor_count(file); i++) {
            const struct gguf_tensor *tensor = gguf_tensor_at(file, i);
            const uint64_t count = tensor->dims[0] * tensor->dims[1];
            float *wanted = weights_of(gguf_tensor_at(exact, i)), *got = weights_of(tensor);
            double squares = 0, off = 0;
            for (uint64_t k = 0; k < count; k++) {
                squares += (double)wanted[k] * (double)wanted[k];
                off += (double)(got[k] - wanted[k]) * (double)(got[k] - wanted[k]);
            }
            const double bound = tensor->dim_count == 1 ? 0.0 : cases[c].error_max;
            cr_expect_eq(tensor->ggml_type, tensor->dim_count == 1 ? TENSOR_F32 : cases[c].type);
            cr_expect(sqrt(off / squares) <= bound, "%s %.*s: %g", quant_name(cases[c].type),
                      (int)tensor->name.size, tensor->name.data, sqrt(off / squares));
            alloc_free(wanted);
            alloc_free(got);
        }
        gguf_close(&file);
    }
    gguf_close(&exact);
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

/* What a made-up vocabulary must do: give a text back, and have a chat template that this build
 * knows. */
static void expect_vocabulary(const struct model *model, const char *name)
{
    static const char text[] = "hello world, 12 o'clock\n \xc3\xa9";
    struct tokenizer *tokenizer = NULL;
    struct chat_template *chat = NULL;
    const uint8_t *data;
    size_t size, text_size = sizeof text, template_size;
    uint32_t ids[64], count = 64;
    char back[sizeof text];
    model_tokenizer_view(model, &data, &size);
    cr_assert_eq(tokenizer_open(&tokenizer, data, size), ODSI_OK, "%s: %s", name, odsi_err_text());
    cr_expect_eq(tokenizer_vocab_size(tokenizer), model_params_view(model)->vocab_size);
    cr_assert_eq(tokenizer_encode(tokenizer, text, sizeof text - 1, TOKENIZER_BOS, ids, &count),
                 ODSI_OK, "%s: %s", name, odsi_err_text());
    cr_expect(count < sizeof text - 1, "%s: words are used", name);
    cr_assert_eq(tokenizer_decode(tokenizer, ids, count, back, &text_size), ODSI_OK);
    cr_expect(text_size == sizeof text - 1 && memcmp(back, text, text_size) == 0, "%s: %.*s", name,
              (int)text_size, back);
    const char *words = tokenizer_template_view(tokenizer, &template_size);
    cr_expect_eq(chat_template_open(&chat, words, template_size), ODSI_OK, "%s: %s", name,
                 odsi_err_text());
    chat_template_close(&chat);
    tokenizer_close(&tokenizer);
}

/* Goal: every small shape is a model of its family, as the reader of files understands it. */
Test(synth, writes_every_family_as_the_reader_knows_it)
{
    static const struct {
        const char *name;
        enum model_arch arch;
        uint32_t features, window, windowed_period, experts;
    } cases[] = {
        {"llama-tiny", MODEL_ARCH_LLAMA, 0, 0, 0, 0},
        {"mistral-tiny", MODEL_ARCH_LLAMA, 0, 48, 0, 0},
        {"llama3-tiny", MODEL_ARCH_LLAMA, MODEL_ROPE_FACTORS, 0, 0, 0},
        {"mixtral-tiny", MODEL_ARCH_LLAMA, 0, 0, 0, 4},
        {"qwen2-tiny", MODEL_ARCH_QWEN2, MODEL_QKV_BIAS, 0, 0, 0},
        {"qwen3-tiny", MODEL_ARCH_QWEN3, MODEL_QK_NORM, 0, 0, 0},
        {"qwen3moe-tiny", MODEL_ARCH_QWEN3, MODEL_QK_NORM, 0, 0, 8},
        {"gemma2-tiny", MODEL_ARCH_GEMMA2, MODEL_POST_NORMS, 24, 2, 0},
        {"gemma3-tiny", MODEL_ARCH_GEMMA3, MODEL_POST_NORMS | MODEL_QK_NORM, 24, 6, 0},
        {"phi3-tiny", MODEL_ARCH_PHI3, 0, 47, 0, 0},
        {"phi3-long-tiny", MODEL_ARCH_PHI3, MODEL_ROPE_FACTORS, 0, 0, 0},
    };
    char *folder = fixture_folder();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *path = fixture_path(folder, "a.gguf");
        const struct synth_shape *shape = synth_shape_find(cases[i].name);
        struct model *model = NULL;
        cr_assert_not_null(shape, "%s", cases[i].name);
        cr_assert_eq(synth_write(path, shape, TENSOR_Q4_K, 1, NULL, NULL), ODSI_OK, "%s",
                     odsi_err_text());
        cr_assert_eq(model_open(&model, path, NULL, NULL, NULL), ODSI_OK, "%s: %s", cases[i].name,
                     odsi_err_text());
        const struct model_params *got = model_params_view(model);
        cr_expect_eq(got->arch, cases[i].arch, "%s", cases[i].name);
        cr_expect_eq(got->features, cases[i].features, "%s: %u", cases[i].name, got->features);
        cr_expect_eq(got->window, cases[i].window, "%s", cases[i].name);
        cr_expect_eq(got->window_period, cases[i].windowed_period, "%s", cases[i].name);
        cr_expect_eq(got->expert_count, cases[i].experts, "%s", cases[i].name);
        cr_expect(got->weight_size < 10u << 20, "%s is tiny", cases[i].name);
        expect_vocabulary(model, cases[i].name);
        model_close(&model);
        cr_assert_eq(unlink(path), 0);
    }
    fixture_folder_remove(folder);
}

Test(synth, knows_its_shapes)
{
    size_t count = 0;
    for (const struct synth_shape *shape = synth_shapes(); shape->name; shape++, count++)
        cr_expect_eq(synth_shape_find(shape->name), shape);
    cr_expect(count >= 18);
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
    const struct synth_shape good = fixture_shape;
    struct synth_shape bad[] = {good, good, good, good, good, good, good, good};
    char *folder = fixture_folder();
    const char *path = fixture_path(folder, "a.gguf");
    bad[0].vocab_size = 258;
    bad[1].layer_count = 0;
    bad[2].kv_head_count = 3;
    bad[3].head_dim = 15;
    bad[4].dim = 1u << 20;
    bad[5].expert_count = 4; /* none of them used */
    bad[6].expert_used_count = 1;
    bad[7].vocabulary = SYNTH_VOCABULARY_GEMMA;
    bad[7].vocab_size = 261;
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        cr_expect_eq(synth_write(path, &bad[i], TENSOR_F32, 1, NULL, NULL), ODSI_ERR_INVALID,
                     "shape %zu", i);
    cr_expect_eq(synth_write(path, &good, (enum tensor_type)99, 1, NULL, NULL), ODSI_ERR_INVALID);
    expect_gone(path);
    fixture_folder_remove(folder);
}

/* Rows of 36, 40 and 100: no block of 32 fits, and the last block of a drawing is cut. */
Test(synth, writes_odd_shapes_in_the_types_that_take_them)
{
    char *folder = fixture_folder();
    struct synth_shape shape = fixture_shape;
    struct model *model = NULL;
    struct gguf *file = NULL;
    shape.dim = 36;
    shape.head_dim = 10;
    shape.ffn_dim = 100;
    const char *path = fixture_path(folder, "a.gguf");
    cr_assert_eq(synth_write(path, &shape, TENSOR_F32, 1, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
    cr_expect_eq(model_open(&model, path, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    model_close(&model);
    path = fixture_path(folder, "b.gguf");
    cr_assert_eq(synth_write(path, &shape, TENSOR_Q4_K, 1, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
    cr_assert_eq(gguf_open(&file, path), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(gguf_tensor_find(file, "blk.0.ffn_up.weight")->ggml_type, TENSOR_F16);
    gguf_close(&file);
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
