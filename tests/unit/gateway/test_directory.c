#include "worker/gateway/directory.h"

#include "common/base/alloc.h"
#include "common/base/io.h"
#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

static struct directory_member member_of(uint8_t worker, uint8_t model, uint32_t first,
                                         uint32_t end)
{
    struct directory_member member = {
        .layer_count = 8,
        .context_length = 512,
        .numerics_version = 1,
        .layer_first = first,
        .layer_end = end,
        .prefill_tokens_per_s = 1234.5f,
        .decode_tokens_per_s = 67.25f,
        .kv_token_capacity = 1ull << 40,
        .kv_tokens_free = 5,
        .session_count = 3,
    };
    memset(member.worker_id.bytes, worker, DIGEST_SIZE);
    memset(member.model_id.bytes, model, DIGEST_SIZE);
    snprintf(member.address, sizeof member.address, "host%u.example:7700", worker);
    snprintf(member.model_name, sizeof member.model_name, "model-%u", model);
    return member;
}

static struct directory *directory_with(const struct directory_member *members, uint32_t count)
{
    struct directory *directory = NULL;
    cr_assert_eq(directory_open(&directory), ODSI_OK);
    directory_begin(directory, 77);
    for (uint32_t i = 0; i < count; i++)
        cr_assert_eq(directory_add(directory, &members[i]), ODSI_OK, "%s", odsi_err_text());
    directory_commit(directory);
    return directory;
}

Test(directory, finds_workers_whatever_their_order)
{
    struct directory_member members[5];
    const uint8_t ids[] = {9, 2, 7, 4, 2};
    uint32_t count = 0;
    for (uint32_t i = 0; i < 5; i++)
        members[i] = member_of(ids[i], 1, 0, 8);
    struct directory *directory = directory_with(members, 5);
    directory_members_view(directory, &count);
    cr_expect_eq(count, 4, "the same worker twice is left out");
    for (uint32_t i = 0; i < 5; i++) {
        const struct directory_member *found = directory_find(directory, &members[i].worker_id);
        cr_assert_not_null(found);
        cr_expect_str_eq(found->address, members[i].address);
    }
    const struct directory_member other = member_of(3, 1, 0, 8);
    cr_expect_null(directory_find(directory, &other.worker_id));
    directory_close(&directory);
}

Test(directory, tells_changes_of_members_from_changes_of_load)
{
    struct directory_member member = member_of(1, 1, 0, 8);
    struct directory *directory = NULL;
    cr_assert_eq(directory_open(&directory), ODSI_OK);
    cr_expect_not(directory_is_known(directory));
    directory_begin(directory, 1);
    cr_expect(directory_commit(directory), "the first one is a change, also when empty");
    cr_expect(directory_is_known(directory));
    for (int round = 0; round < 2; round++) {
        directory_begin(directory, 2);
        member.session_count++;
        cr_assert_eq(directory_add(directory, &member), ODSI_OK);
        cr_expect_eq(directory_commit(directory), round == 0);
    }
    member.layer_end = 7;
    directory_begin(directory, 3);
    cr_assert_eq(directory_add(directory, &member), ODSI_OK);
    cr_expect(directory_commit(directory));
    directory_close(&directory);
}

Test(directory, leaves_out_members_that_break_the_rules)
{
    struct directory *directory = directory_with(NULL, 0);
    for (int i = 0; i < 12; i++) {
        struct directory_member member = member_of(1, 1, 0, 8);
        uint32_t count = 0;
        switch (i) {
        case 0:
            member.address[0] = '\0';
            break;
        case 1:
            member.address[2] = '\n';
            break;
        case 2:
            memset(member.address, 'a', sizeof member.address);
            break;
        case 3:
            member.layer_end = 9;
            break;
        case 4:
            member.layer_first = 8;
            break;
        case 5:
            member.layer_count = LIMIT_LAYERS_MAX + 1;
            break;
        case 6:
            member.context_length = 0;
            break;
        case 7:
            member.decode_tokens_per_s = NAN;
            break;
        case 8:
            member.prefill_tokens_per_s = -1.0f;
            break;
        case 9:
            member.model_name[1] = 27;
            break;
        case 10:
            member.context_length = LIMIT_CONTEXT_MAX + 1;
            break;
        default:
            member.address[2] = ' ';
            break;
        }
        directory_begin(directory, 1);
        cr_expect_eq(directory_add(directory, &member), ODSI_ERR_INVALID, "case %d", i);
        directory_commit(directory);
        directory_members_view(directory, &count);
        cr_expect_eq(count, 0);
    }
    directory_close(&directory);
}

Test(directory, sums_up_models)
{
    const struct directory_member members[] = {member_of(1, 5, 0, 4), member_of(2, 6, 0, 8),
                                               member_of(3, 5, 3, 8), member_of(4, 7, 1, 8)};
    struct directory *directory = directory_with(members, 4);
    struct directory_model *models = NULL;
    uint32_t count = 0;
    cr_assert_eq(directory_models(directory, &models, &count), ODSI_OK);
    cr_assert_eq(count, 3);
    cr_expect_str_eq(models[0].name, "model-5");
    cr_expect_eq(models[0].worker_count, 2);
    cr_expect(models[0].complete);
    cr_expect(models[1].complete);
    cr_expect_not(models[2].complete, "layer 0 is missing");
    alloc_free(models);
    directory_close(&directory);
}

/* Workers that claim another shape for a model id cannot make the real one look incomplete. */
Test(directory, keeps_liars_about_a_models_shape_apart)
{
    struct directory_member members[] = {member_of(1, 5, 0, 8), member_of(2, 5, 0, 2)};
    members[1].layer_count = 100;
    struct directory *directory = directory_with(members, 2);
    struct directory_model *models = NULL;
    uint32_t count = 0;
    cr_assert_eq(directory_models(directory, &models, &count), ODSI_OK);
    cr_assert_eq(count, 2);
    cr_expect(models[0].complete);
    cr_expect_not(models[1].complete);
    alloc_free(models);
    directory_close(&directory);
}

Test(directory, comes_back_from_its_file)
{
    char folder[256];
    char path[512];
    uint32_t count = 0;
    const struct directory_member members[] = {member_of(1, 5, 0, 4), member_of(2, 5, 4, 8)};
    struct directory *directory = directory_with(members, 2);
    struct directory *copy = NULL;
    fixture_folder_make(folder);
    fixture_path(path, folder, "directory");
    cr_assert_eq(directory_open(&copy), ODSI_OK);
    cr_expect_eq(directory_load(copy, path), ODSI_ERR_NOT_FOUND);
    cr_expect_not(directory_is_known(copy));
    cr_assert_eq(directory_save(directory, path), ODSI_OK);
    cr_assert_eq(directory_load(copy, path), ODSI_OK, "%s", odsi_err_text());
    cr_expect(directory_is_known(copy));
    cr_expect_eq(directory_version(copy), 77);
    const struct directory_member *loaded = directory_members_view(copy, &count);
    cr_assert_eq(count, 2);
    cr_expect_str_eq(loaded[1].address, "host2.example:7700");
    cr_expect_str_eq(loaded[1].model_name, "model-5");
    cr_expect_eq(loaded[1].layer_first, 4);
    cr_expect_eq(loaded[1].kv_token_capacity, 1ull << 40);
    cr_expect_float_eq((double)loaded[1].decode_tokens_per_s, 67.25, 0.0);
    cr_expect_eq(loaded[1].session_count, 0, "load is not kept");
    directory_close(&copy);
    directory_close(&directory);
    fixture_folder_remove(folder);
}

/* Goal: a damaged file is refused and what was known stays. How: cut it after every byte, and flip
 * a bit in every byte. */
Test(directory, refuses_every_damaged_file)
{
    const struct directory_member members[] = {member_of(1, 5, 0, 4), member_of(2, 5, 4, 8)};
    struct directory *directory = directory_with(members, 2);
    struct directory *copy = directory_with(members, 1);
    struct buf bytes;
    uint32_t count = 0;
    buf_init(&bytes, 1u << 20);
    cr_assert_eq(directory_encode(directory, &bytes), ODSI_OK);
    for (size_t size = 0; size < bytes.size; size++)
        cr_assert_eq(directory_decode(copy, bytes.data, size), ODSI_ERR_CORRUPT, "cut at %zu",
                     size);
    for (size_t at = 0; at < bytes.size; at++) {
        bytes.data[at] ^= 1;
        cr_assert_eq(directory_decode(copy, bytes.data, bytes.size), ODSI_ERR_CORRUPT, "byte %zu",
                     at);
        bytes.data[at] ^= 1;
    }
    directory_members_view(copy, &count);
    cr_expect_eq(count, 1);
    cr_expect_eq(directory_decode(copy, bytes.data, bytes.size), ODSI_OK);
    buf_free(&bytes);
    directory_close(&copy);
    directory_close(&directory);
}

/* Goal: a file that is whole but lies inside (its digest was made for it) is refused too. */
Test(directory, refuses_a_well_sealed_lie)
{
    const struct directory_member members[] = {member_of(1, 5, 0, 4)};
    struct directory *directory = directory_with(members, 1);
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    cr_assert_eq(directory_encode(directory, &bytes), ODSI_OK);
    const size_t body = bytes.size - DIGEST_SIZE;
    const struct {
        size_t at;
        uint8_t value;
    } lies[] = {{16, 2}, {16, 0}, {19, 0xFF}, {85, 0xFF}, {100, 200}, {121, 0xFF}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        struct digest digest;
        const uint8_t kept = bytes.data[lies[i].at];
        bytes.data[lies[i].at] = lies[i].value;
        digest_of(&digest, bytes.data, body);
        memcpy(bytes.data + body, digest.bytes, DIGEST_SIZE);
        cr_expect_eq(directory_decode(directory, bytes.data, bytes.size), ODSI_ERR_CORRUPT,
                     "lie %zu", i);
        bytes.data[lies[i].at] = kept;
    }
    buf_free(&bytes);
    directory_close(&directory);
}
