#include "common/base/io.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char *fresh_folder(char *template)
{
    cr_assert_not_null(mkdtemp(template));
    return template;
}

Test(io, replaces_a_file_whole_and_reads_it_back)
{
    char folder[] = "/tmp/odsi-test-io-XXXXXX", path[64];
    struct buf buf;
    struct stat status;
    snprintf(path, sizeof path, "%s/a", fresh_folder(folder));
    buf_init(&buf, 100);
    cr_expect_eq(io_read_file(path, &buf), ODSI_ERR_NOT_FOUND);
    cr_expect_eq(io_write_file(path, "one", 3, 0600, 1), ODSI_OK);
    cr_expect_eq(io_write_file(path, "second", 6, 0600, 0), ODSI_OK);
    cr_expect_eq(io_read_file(path, &buf), ODSI_OK);
    cr_expect_str_eq(buf_text_view(&buf), "second");
    cr_expect_eq(stat(path, &status), 0);
    cr_expect_eq(status.st_mode & 0777, 0600u);
    buf_free(&buf);
    unlink(path);
    cr_expect_eq(rmdir(folder), 0, "nothing else is left");
}

Test(io, refuses_a_file_above_the_ceiling)
{
    char folder[] = "/tmp/odsi-test-io-XXXXXX", path[64];
    struct buf buf;
    snprintf(path, sizeof path, "%s/a", fresh_folder(folder));
    cr_assert_eq(io_write_file(path, "12345678", 8, 0600, 0), ODSI_OK);
    buf_init(&buf, 7);
    cr_expect_eq(io_read_file(path, &buf), ODSI_ERR_RANGE);
    buf_free(&buf);
    unlink(path);
    rmdir(folder);
}

Test(io, leaves_nothing_behind_when_it_cannot_write)
{
    char folder[] = "/tmp/odsi-test-io-XXXXXX", path[64];
    snprintf(path, sizeof path, "%s/no/such/folder", fresh_folder(folder));
    cr_expect_neq(io_write_file(path, "x", 1, 0600, 1), ODSI_OK);
    cr_expect(strstr(odsi_err_text(), path) != NULL);
    snprintf(path, sizeof path, "%s/a", folder);
    cr_expect_eq(mkdir(path, 0700), 0);
    cr_expect_neq(io_write_file(path, "x", 1, 0600, 1), ODSI_OK, "a folder is in the way");
    rmdir(path);
    cr_expect_eq(rmdir(folder), 0, "no temporary file is left");
}

Test(io, makes_all_folders_of_a_path)
{
    char folder[] = "/tmp/odsi-test-io-XXXXXX", path[64];
    struct stat status;
    snprintf(path, sizeof path, "%s/a/b/c/", fresh_folder(folder));
    cr_expect_eq(io_make_folders(path, 0700), ODSI_OK);
    cr_expect_eq(io_make_folders(path, 0700), ODSI_OK);
    cr_expect(stat(path, &status) == 0 && S_ISDIR(status.st_mode));
    for (const char *suffix[] = {"/a/b/c", "/a/b", "/a", ""}, **at = suffix; at < suffix + 4;
         at++) {
        snprintf(path, sizeof path, "%s%s", folder, *at);
        cr_expect_eq(rmdir(path), 0);
    }
}

Test(io, says_which_file_is_too_large)
{
    char folder[] = "/tmp/odsi-test-io-XXXXXX", path[64];
    struct buf buf;
    snprintf(path, sizeof path, "%s/large", fresh_folder(folder));
    buf_init(&buf, 3);
    cr_assert_eq(io_write_file(path, "four", 4, 0600, 0), ODSI_OK);
    cr_expect_eq(io_read_file(path, &buf), ODSI_ERR_RANGE);
    cr_expect(strstr(odsi_err_text(), path), "%s", odsi_err_text());
    buf_free(&buf);
    unlink(path);
    rmdir(folder);
}

Test(io, a_file_is_not_taken_for_a_folder)
{
    char folder[] = "/tmp/odsi-test-io-XXXXXX", path[64];
    snprintf(path, sizeof path, "%s/file", fresh_folder(folder));
    cr_assert_eq(io_write_file(path, "", 0, 0600, 0), ODSI_OK);
    cr_expect_eq(io_make_folders(path, 0700), ODSI_ERR_IO);
    cr_expect_eq(io_make_folders(folder, 0700), ODSI_OK);
    unlink(path);
    rmdir(folder);
}
