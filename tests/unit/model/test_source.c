#include "worker/model/source.h"

#include "common/base/alloc.h"
#include "tests/unit/model/family_fixture.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/arch.h"
#include "worker/model/gguf_value.h"
#include "worker/model/model.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct family_recipe plain = {.arch = "llama"};

static struct digest id_of(const char *path, const char *cache)
{
    struct model *model = NULL;
    cr_assert_eq(model_open(&model, path, cache, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    const struct digest id = *model_id_view(model);
    model_close(&model);
    return id;
}

/* Goal: how a model is cut into files says nothing about what it is, and any part will do to name
 * it. */
Test(source, split_model_is_the_same_model)
{
    char *folder = fixture_folder();
    const struct digest whole = id_of(family_write(folder, &plain, 1), NULL);
    for (uint32_t parts = 2; parts <= 7; parts += 5) {
        (void)family_write(folder, &plain, parts);
        for (uint32_t i = 0; i < parts; i++) {
            char name[64];
            struct source *source = NULL;
            snprintf(name, sizeof name, "m-%05u-of-%05u.gguf", i + 1, parts);
            const char *path = fixture_path(folder, name);
            const struct digest id = id_of(path, NULL);
            cr_expect(digest_equal(&whole, &id), "part %u of %u", i + 1, parts);
            cr_assert_eq(source_open(&source, path), ODSI_OK);
            cr_expect_eq(source->file_count, parts);
            cr_expect_not_null(strstr(source->files[0].path, "m-00001-of"));
            source_close(&source);
            cr_expect_null(source);
            source_close(&source);
        }
    }
    fixture_folder_remove(folder);
}

/* Goal: the kept manifest is of all files. How: another time of change of the last part. */
Test(source, cache_knows_every_part)
{
    char *folder = fixture_folder();
    char cache[512], last[512];
    struct stat before, after;
    const char *path = family_write(folder, &plain, 3);
    snprintf(cache, sizeof cache, "%s/cache", folder);
    snprintf(last, sizeof last, "%s/m-00003-of-00003.gguf", folder);
    const struct digest id = id_of(path, cache);
    cr_assert_eq(stat(last, &before), 0);
    fixture_flip(last, (uint64_t)before.st_size - 40, 1); /* keeps its time */
    const struct digest kept = id_of(path, cache);
    cr_expect(digest_equal(&id, &kept), "a hint is trusted as long as the files look the same");
    const struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    cr_assert_eq(utimensat(AT_FDCWD, last, times, 0), 0);
    cr_assert_eq(stat(last, &after), 0);
    const struct digest other = id_of(path, cache);
    cr_expect_not(digest_equal(&id, &other));
    fixture_folder_remove(folder);
}

static void expect_refused(const char *path, enum odsi_err wanted, const char *says)
{
    struct source *source = NULL;
    cr_expect_eq(source_open(&source, path), wanted, "%s: %s", says, odsi_err_text());
    cr_expect_null(source);
    cr_expect_not_null(strstr(odsi_err_text(), says), "\"%s\" does not say \"%s\"", odsi_err_text(),
                       says);
}

static void copy(const char *folder, const char *from, const char *to)
{
    struct buf bytes;
    buf_init(&bytes, 8u << 20);
    fixture_read(fixture_path(folder, from), &bytes);
    fixture_write(fixture_path(folder, to), &bytes);
    buf_free(&bytes);
}

/* Goal: a set of parts that is not whole or not one set is refused, and what is wrong is named. */
Test(source, refuses_parts_that_are_not_one_model)
{
    char *folder = fixture_folder();
    struct family_recipe fewer = plain;
    fewer.skip_tensor = "blk.1.ffn_up.weight";
    char first[512];
    snprintf(first, sizeof first, "%s", family_write(folder, &plain, 3));

    copy(folder, "m-00002-of-00003.gguf", "kept");
    cr_assert_eq(unlink(fixture_path(folder, "m-00002-of-00003.gguf")), 0);
    expect_refused(first, ODSI_ERR_NOT_FOUND, "part 2 of 3");
    expect_refused(fixture_path(folder, "m-00003-of-00003.gguf"), ODSI_ERR_NOT_FOUND,
                   "m-00002-of-00003.gguf");

    copy(folder, "m-00003-of-00003.gguf", "m-00002-of-00003.gguf");
    expect_refused(first, ODSI_ERR_CORRUPT, "by its metadata this is part 3 of 3");
    copy(folder, "kept", "m-00002-of-00003.gguf");
    expect_refused(fixture_path(folder, "kept"), ODSI_ERR_INVALID, "one of 3 parts");
    copy(folder, "m-00001-of-00003.gguf", "m-00001-of-00004.gguf");
    expect_refused(fixture_path(folder, "m-00001-of-00004.gguf"), ODSI_ERR_INVALID,
                   "one of 3 parts");

    /* A part of another cut of the model: a tensor twice, or one too few. */
    (void)family_write(folder, &fewer, 3);
    copy(folder, "kept", "m-00002-of-00003.gguf");
    expect_refused(first, ODSI_ERR_CORRUPT, "two tensors are named");
    (void)family_write(folder, &fewer, 3);
    struct buf bytes;
    buf_init(&bytes, 8u << 20);
    family_part(&bytes, &plain, 0, 3);
    for (size_t at = 0; at + 23 < bytes.size; at++) /* its count of tensors, one more */
        if (memcmp(bytes.data + at, "split.tensors.count", 19) == 0)
            bytes.data[at + 23]++;
    (void)family_write(folder, &plain, 3);
    fixture_write(first, &bytes);
    expect_refused(first, ODSI_ERR_CORRUPT, "split.tensors.count is");
    buf_free(&bytes);
    fixture_folder_remove(folder);
}

Test(source, refuses_what_is_no_file)
{
    char *folder = fixture_folder();
    const char *pipe = fixture_path(folder, "pipe.gguf");
    cr_assert_eq(mkfifo(pipe, 0600), 0);
    expect_refused(pipe, ODSI_ERR_IO, "not a regular file");
    expect_refused(fixture_path(folder, "absent.gguf"), ODSI_ERR_NOT_FOUND, "absent.gguf");
    fixture_folder_remove(folder);
}

/* Goal: of longrope's two lists of factors the model has the one for its own context, under the
 * name that all families use. How: the same file with the original context shorter and as long. */
Test(source, takes_the_factors_of_the_context)
{
    static const uint32_t original[] = {16, 64, 0};
    char *folder = fixture_folder();
    for (size_t i = 0; i < 3; i++) {
        struct source *source = NULL;
        struct family_recipe recipe = {
            .arch = "phi3",
            .extra_tensors = {"rope_factors_long.weight", "rope_factors_short.weight"},
            .extra_cols = 4,
            .keys = {{"rope.scaling.original_context_length", GGUF_U32, original[i], NULL}}};
        if (original[i] == 0)
            recipe.keys[0].key = NULL;
        struct gguf *file = NULL;
        const char *path = family_write(folder, &recipe, 1);
        cr_assert_eq(source_open(&source, path), ODSI_OK, "%s", odsi_err_text());
        cr_assert_eq(gguf_open(&file, path), ODSI_OK);
        const struct source_tensor *factors = arch_find(source, "rope_freqs.weight");
        cr_assert_not_null(factors);
        cr_expect_eq(factors->offset,
                     gguf_tensor_find(file, original[i] == 16 ? recipe.extra_tensors[0]
                                                              : recipe.extra_tensors[1])
                         ->offset);
        cr_expect_null(arch_find(source, "rope_factors_long.weight"));
        cr_expect_null(arch_find(source, "rope_factors_short.weight"));
        cr_expect(source->params.features & MODEL_ROPE_FACTORS);
        gguf_close(&file);
        source_close(&source);
    }
    fixture_folder_remove(folder);
}

Test(source, reports_every_allocation_that_fails)
{
    char *folder = fixture_folder();
    const char *path = family_write(folder, &plain, 3);
    long failing = 0;
    for (;; failing++) {
        struct source *source = NULL;
        alloc_fail_after(failing);
        const enum odsi_err err = source_open(&source, path);
        alloc_fail_after(-1);
        if (err == ODSI_OK) {
            source_close(&source);
            break;
        }
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        cr_assert_null(source);
    }
    cr_expect(failing > 20, "%ld", failing);
    fixture_folder_remove(folder);
}
