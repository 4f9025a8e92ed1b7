/* How the client opens, closes and leaves when nobody answers; its dealings with a coordinator are
 * tested with the real program in tests/integration. */
#include "worker/hop/coordinator_client.h"

#include "common/base/alloc.h"
#include "tests/support/peers.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static struct peers peers;

static void set_up(void)
{
    peers_open(&peers);
}

static void tear_down(void)
{
    peers_close(&peers);
}

TestSuite(coordinator_client, .init = set_up, .fini = tear_down, .timeout = 60);

Test(coordinator_client, opens_whole_or_not_at_all)
{
    struct peers_worker worker;
    long refused = 0;
    peers_worker_make(&peers, &worker);
    const struct coordinator_client_config config =
        peers_worker_config(&worker, "127.0.0.1:1,127.0.0.1:2", "10.0.0.1:7700");
    for (;; refused++) {
        alloc_fail_after(refused);
        const enum odsi_err err = coordinator_client_open(&worker.client, &config);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "%s", odsi_err_text());
        cr_assert_null(worker.client);
    }
    cr_expect_geq(refused, 3);
    peers_worker_drop(&worker);
}

Test(coordinator_client, refuses_addresses_and_texts_that_cannot_be_right)
{
    const char *bad[] = {"", "nowhere", "a:1,", ",a:1", "a:1,,b:2", "xyz@a:1", "a:99999"};
    struct peers_worker worker;
    char many[400] = "a:1";
    char long_name[200];
    peers_worker_make(&peers, &worker);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const struct coordinator_client_config config =
            peers_worker_config(&worker, bad[i], "10.0.0.1:7700");
        cr_expect_eq(coordinator_client_open(&worker.client, &config), ODSI_ERR_INVALID, "'%s'",
                     bad[i]);
        cr_assert_null(worker.client);
    }
    for (size_t i = 0; i < COORDINATOR_ADDRESSES_MAX; i++)
        snprintf(many + strlen(many), sizeof many - strlen(many), ",a:%zu", i + 2);
    struct coordinator_client_config config = peers_worker_config(&worker, many, "10.0.0.1:7700");
    cr_expect_eq(coordinator_client_open(&worker.client, &config), ODSI_ERR_INVALID);
    memset(long_name, 'n', sizeof long_name - 1);
    long_name[sizeof long_name - 1] = '\0';
    config = peers_worker_config(&worker, "127.0.0.1:1", "10.0.0.1:7700");
    config.model_name = long_name;
    cr_expect_eq(coordinator_client_open(&worker.client, &config), ODSI_ERR_INVALID);
    peers_worker_drop(&worker);
}

static void close_client(void *context, const struct odsi_failure *failure, int retrying)
{
    struct peers_worker *worker = context;
    (void)failure;
    (void)retrying;
    worker->lost_count++;
    coordinator_client_close(&worker->client);
}

/* Goal: the owner may close it in any callback; nothing is called afterwards. */
Test(coordinator_client, can_be_closed_in_its_own_callback)
{
    struct peers_worker worker;
    peers_worker_make(&peers, &worker);
    struct coordinator_client_config config =
        peers_worker_config(&worker, "127.0.0.1:1,127.0.0.1:1", "10.0.0.1:7700");
    config.on_lost = close_client;
    cr_assert_eq(coordinator_client_open(&worker.client, &config), ODSI_OK);
    cr_assert(peers_wait_for(&peers, peers_is_lost, &worker, PEERS_WAIT_US));
    cr_expect_null(worker.client);
    peers_run_for(&peers, 300000);
    cr_expect_eq(worker.lost_count, 1);
    peers_worker_drop(&worker);
}

Test(coordinator_client, leaves_at_once_when_nobody_can_be_reached)
{
    struct peers_worker worker;
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, "127.0.0.1:1", "10.0.0.1:7700");
    cr_assert(peers_wait_for(&peers, peers_is_lost, &worker, PEERS_WAIT_US));
    coordinator_client_leave(worker.client, peers_on_left, &worker);
    cr_expect_not(worker.left, "never before it returned");
    cr_assert(peers_wait_for(&peers, peers_has_left, &worker, 1500000));
    peers_worker_drop(&worker);
}
