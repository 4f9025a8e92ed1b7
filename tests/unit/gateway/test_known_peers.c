#include "worker/gateway/known_peers.h"

#include "common/base/buf.h"
#include "common/base/io.h"
#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static struct digest id_of(uint8_t fill)
{
    struct digest id;
    memset(id.bytes, fill, sizeof id.bytes);
    return id;
}

static void write_file(const char *path, const char *text)
{
    cr_assert_eq(io_write_file(path, text, strlen(text), 0600, 0), ODSI_OK);
}

Test(known_peers, remembers_the_first_identity_of_an_address)
{
    char folder[256];
    char path[512];
    struct stat status;
    const struct digest one = id_of(0x11);
    const struct digest other = id_of(0x22);
    fixture_folder_make(folder);
    fixture_path(path, folder, "known_peers");
    cr_expect_eq(known_peers_check(path, "coord.example:7600", &one), ODSI_OK);
    cr_expect_eq(known_peers_check(path, "coord.example:7601", &other), ODSI_OK);
    cr_expect_eq(known_peers_check(path, "coord.example:7600", &one), ODSI_OK);
    cr_expect_eq(known_peers_check(path, "coord.example:7601", &other), ODSI_OK);
    cr_expect_eq(stat(path, &status), 0);
    cr_expect_eq(status.st_mode & 0777, 0600);
    fixture_folder_remove(folder);
}

Test(known_peers, refuses_another_identity_and_says_what_to_do)
{
    char folder[256];
    char path[512];
    const struct digest one = id_of(0x11);
    const struct digest other = id_of(0x22);
    fixture_folder_make(folder);
    fixture_path(path, folder, "known_peers");
    cr_assert_eq(known_peers_check(path, "127.0.0.1:7600", &one), ODSI_OK);
    cr_expect_eq(known_peers_check(path, "127.0.0.1:7600", &other), ODSI_ERR_DENIED);
    cr_expect(strstr(odsi_err_text(), "delete that line"), "%s", odsi_err_text());
    cr_expect(strstr(odsi_err_text(), path), "%s", odsi_err_text());
    cr_expect(strstr(odsi_err_text(), "2222"), "%s", odsi_err_text());
    cr_expect_eq(known_peers_check(path, "127.0.0.1:7600", &one), ODSI_OK, "and stays refused");
    fixture_folder_remove(folder);
}

Test(known_peers, reads_what_people_write)
{
    char folder[256];
    char path[512];
    char text[512];
    char hex[DIGEST_HEX_SIZE];
    const struct digest one = id_of(0xAB);
    const struct digest other = id_of(0x22);
    fixture_folder_make(folder);
    fixture_path(path, folder, "known_peers");
    digest_to_hex(hex, &one);
    snprintf(text, sizeof text, "# our coordinators\n\nhost:1 %s\r\n#host:2 x\nhost:2 %s\n", hex,
             hex);
    write_file(path, text);
    cr_expect_eq(known_peers_check(path, "host:1", &one), ODSI_OK);
    cr_expect_eq(known_peers_check(path, "host:2", &other), ODSI_ERR_DENIED);
    cr_expect_eq(known_peers_check(path, "host:", &other), ODSI_OK, "no prefix matches");
    fixture_folder_remove(folder);
}

Test(known_peers, refuses_broken_lines_by_number)
{
    static const char *const broken[] = {
        "host:1\n",
        "host:1 1234\n",
        "host:1  aa\n",
        " aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n",
        "host:1 zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz\n",
        "host:1 aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    };
    char folder[256];
    char path[512];
    const struct digest one = id_of(0x11);
    fixture_folder_make(folder);
    fixture_path(path, folder, "known_peers");
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) {
        char text[256];
        snprintf(text, sizeof text, "# first\n%s", broken[i]);
        write_file(path, text);
        cr_expect_eq(known_peers_check(path, "host:9", &one), ODSI_ERR_CORRUPT, "case %zu", i);
        cr_expect(strstr(odsi_err_text(), "line 2"), "%s", odsi_err_text());
    }
    fixture_folder_remove(folder);
}

Test(known_peers, refuses_addresses_that_would_break_the_file)
{
    char folder[256];
    char path[512];
    const struct digest one = id_of(0x11);
    fixture_folder_make(folder);
    fixture_path(path, folder, "known_peers");
    cr_expect_eq(known_peers_check(path, "", &one), ODSI_ERR_INVALID);
    cr_expect_eq(known_peers_check(path, "a b:1", &one), ODSI_ERR_INVALID);
    cr_expect_eq(known_peers_check(path, "a:1\nb:1", &one), ODSI_ERR_INVALID);
    cr_expect_eq(known_peers_check(path, "#a:1", &one), ODSI_ERR_INVALID);
    cr_expect_eq(known_peers_check("/nonexistent/known_peers", "a:1", &one), ODSI_ERR_IO);
    fixture_folder_remove(folder);
}
