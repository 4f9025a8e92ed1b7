#include "common/net/daemon.h"

#include "common/base/io.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

Test(daemon, names_the_address_that_this_machine_can_use)
{
    const struct {
        const char *listen;
        uint16_t port;
        const char *expected;
    } cases[] = {
        {"127.0.0.1:0", 7, "127.0.0.1:7"}, {":7600", 7600, "127.0.0.1:7600"},
        {"0.0.0.0:0", 80, "127.0.0.1:80"}, {"[::]:1", 1, "127.0.0.1:1"},
        {"[::1]:0", 99, "[::1]:99"},       {"my.host:7700", 7700, "my.host:7700"},
    };
    char out[LIMIT_ADDRESS_SIZE];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        cr_expect_eq(daemon_address(out, sizeof out, cases[i].listen, cases[i].port), ODSI_OK);
        cr_expect_str_eq(out, cases[i].expected);
    }
    char longest[2 * LIMIT_ADDRESS_SIZE];
    memset(longest, 'a', sizeof longest);
    memcpy(longest + sizeof longest - 3, ":1", 3);
    cr_expect_eq(daemon_address(out, sizeof out, longest, 1), ODSI_ERR_INVALID);
}

Test(daemon, announces_in_the_ready_file_and_takes_it_away)
{
    char folder[] = "/tmp/odsi-test-daemon-XXXXXX", path[64], expected[128];
    struct identity *identity = NULL;
    struct buf buf;
    cr_assert_not_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/ready", folder);
    cr_assert_eq(daemon_open_identity(&identity, NULL, folder, "key.pem"), ODSI_OK);
    char id[DIGEST_HEX_SIZE];
    digest_to_hex(id, identity_id_view(identity));
    snprintf(expected, sizeof expected, "%s@h:1\n", id);
    buf_init(&buf, 1000);
    cr_expect_eq(daemon_announce("test", identity, "h:1", path), ODSI_OK);
    cr_expect_eq(io_read_file(path, &buf), ODSI_OK);
    cr_expect_str_eq(buf_text_view(&buf), expected);
    buf_reset(&buf);
    cr_expect_eq(daemon_announce("test", NULL, "h:1", path), ODSI_OK);
    cr_expect_eq(io_read_file(path, &buf), ODSI_OK);
    cr_expect_str_eq(buf_text_view(&buf), "h:1\n");
    daemon_withdraw(path);
    daemon_withdraw(path);
    cr_expect_eq(access(path, F_OK), -1);
    buf_free(&buf);
    identity_close(&identity);
    snprintf(path, sizeof path, "%s/key.pem", folder);
    unlink(path);
    cr_expect_eq(rmdir(folder), 0);
}
