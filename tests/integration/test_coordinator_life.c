/* Coordinators that stop, die, come back, share a database or run out of disk, seen from the
 * members and watchers that live on. */
#include "tests/support/peers.h"

#include "common/base/clock.h"
#include "common/net/rpc_pack.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static struct peers peers;

static void set_up(void)
{
    peers_open(&peers);
}

static void tear_down(void)
{
    peers_close(&peers);
}

TestSuite(coordinator_life, .init = set_up, .fini = tear_down, .timeout = 120);

/* ---- coming and going of coordinators -------------------------------------------------------- */

Test(coordinator_life, stops_within_two_seconds_when_asked)
{
    const int signals[] = {SIGTERM, SIGINT};
    for (int i = 0; i < 2; i++) {
        struct peers_instance coordinator;
        struct peers_watch watch;
        struct peers_worker worker;
        int code = -1;
        peers_start_named(&peers, &coordinator, i == 0 ? "a" : "b");
        peers_watch_open(&peers, &watch, coordinator.address);
        peers_worker_make(&peers, &worker);
        peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
        peers_expect_members(&watch, 1, -1);
        process_signal(coordinator.process, signals[i]);
        cr_assert_eq(process_wait(coordinator.process, 2000000, &code), ODSI_OK);
        cr_expect_eq(code, 0);
        cr_expect_eq(access(coordinator.ready_path, F_OK), -1, "the ready file is gone");
        cr_assert(peers_wait_for(&peers, peers_is_watch_over, &watch, PEERS_WAIT_US));
        cr_expect_eq(watch.status, RPC_UNAVAILABLE);
        peers_worker_drop(&worker);
        peers_watch_close(&watch);
        process_close(&coordinator.process);
    }
}

/* Goal: nothing of value is in the process. A member goes on as if nothing had happened, without
 * joining again. */
Test(coordinator_life, keeps_its_members_over_a_kill_and_a_restart)
{
    struct peers_instance coordinator;
    struct peers_watch watch;
    struct peers_worker worker;
    char place[PEERS_LINE_SIZE];
    struct peers_instance_config config = {.name = "a", .heartbeat_ms = 1000};
    peers_start(&peers, &coordinator, &config);
    snprintf(place, sizeof place, "%s", peers_place_of(&coordinator));
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
    cr_assert(peers_wait_for(&peers, peers_is_assigned, &worker, PEERS_WAIT_US));
    coordinator_client_set_ready(worker.client, NULL, peers_fill_load, &worker);
    peers_watch_open(&peers, &watch, coordinator.address);
    peers_expect_members(&watch, 1, 1);
    const uint64_t version = watch.version;
    peers_watch_close(&watch);
    process_close(&coordinator.process); /* SIGKILL */
    config.listen = place;
    peers_start(&peers, &coordinator, &config);
    peers_watch_open(&peers, &watch, coordinator.address);
    cr_expect_eq(watch.count, 1);
    cr_expect_eq(watch.members[0].ready, 1);
    cr_expect_gt(watch.version, version);
    watch.count_min = 1;
    peers_run_for(&peers, 5000000); /* longer than three heartbeats */
    cr_expect_eq(watch.count_min, 1);
    cr_expect_eq(watch.members[0].ready, 1);
    cr_expect_eq(worker.assigned_count, 1);
    cr_expect_eq(worker.lost_count, 0, "%s", worker.failure.text);
    peers_worker_drop(&worker);
    peers_watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: when a coordinator comes back that knows nobody, members join again by themselves, with the
 * layers they hold and ready as they were. */
Test(coordinator_life, gets_its_members_back_when_its_database_is_lost)
{
    struct peers_instance coordinator;
    struct peers_watch watch;
    struct peers_worker worker;
    char place[PEERS_LINE_SIZE];
    struct peers_instance_config config = {.name = "a"};
    peers_start(&peers, &coordinator, &config);
    snprintf(place, sizeof place, "%s", peers_place_of(&coordinator));
    peers_worker_make(&peers, &worker);
    struct coordinator_client_config member =
        peers_worker_config(&worker, coordinator.address, "10.0.0.1:7700");
    member.layer_end = 0;
    member.layer_capacity = 5;
    cr_assert_eq(coordinator_client_open(&worker.client, &member), ODSI_OK);
    cr_assert(peers_wait_for(&peers, peers_is_assigned, &worker, PEERS_WAIT_US));
    coordinator_client_set_ready(worker.client, NULL, peers_fill_load, &worker);
    process_close(&coordinator.process);
    cr_assert(peers_wait_for(&peers, peers_is_lost, &worker, PEERS_WAIT_US));
    config.listen = place;
    config.store = "sqlite::memory:";
    peers_start(&peers, &coordinator, &config);
    peers_watch_open(&peers, &watch, coordinator.address);
    peers_expect_members(&watch, 1, 1);
    cr_expect(watch.members[0].first == worker.first && watch.members[0].end == worker.end);
    cr_expect_eq(worker.assigned_count, 1, "the same layers are not assigned twice");
    peers_worker_drop(&worker);
    peers_watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: two coordinators on one database are one: a join at one shows at the other, and when one
 * dies its members go on with the other without ever being missed. */
Test(coordinator_life, shares_its_database_with_a_second_one)
{
    struct peers_instance a;
    struct peers_instance b;
    struct peers_watch watch;
    struct peers_worker worker;
    char both[2 * PEERS_LINE_SIZE];
    struct peers_instance_config config = {.name = "a", .heartbeat_ms = 1000};
    peers_start(&peers, &a, &config);
    config.name = "b";
    peers_start(&peers, &b, &config);
    snprintf(both, sizeof both, "%s,%s", a.address, b.address);
    peers_watch_open(&peers, &watch, b.address);
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, both, "10.0.0.1:7700");
    cr_assert(peers_wait_for(&peers, peers_is_assigned, &worker, PEERS_WAIT_US));
    coordinator_client_set_ready(worker.client, NULL, peers_fill_load, &worker);
    const uint64_t joined_us = clock_monotonic_us();
    peers_expect_members(&watch, 1, 1);
    cr_expect_lt(clock_monotonic_us() - joined_us, 2000000);
    process_close(&a.process); /* SIGKILL */
    watch.count_min = 1;
    peers_run_for(&peers, 5000000);
    cr_expect_eq(watch.count_min, 1);
    cr_expect_eq(watch.members[0].ready, 1);
    coordinator_client_leave(worker.client, peers_on_left, &worker);
    cr_assert(peers_wait_for(&peers, peers_has_left, &worker, PEERS_WAIT_US));
    peers_expect_members(&watch, 0, -1);
    cr_expect_not(watch.went_back);
    peers_worker_drop(&worker);
    peers_watch_close(&watch);
    process_close(&b.process);
}

/* Goal: a coordinator that did not run does not blame its members for it.
 * Method: stopped for longer than three heartbeats, then continued. */
Test(coordinator_life, forgives_silence_in_a_time_when_it_was_stopped_itself)
{
    struct peers_instance coordinator;
    struct peers_watch watch;
    struct peers_worker worker;
    peers_start_named(&peers, &coordinator, "a");
    peers_watch_open(&peers, &watch, coordinator.address);
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
    peers_expect_members(&watch, 1, -1);
    process_signal(coordinator.process, SIGSTOP);
    peers_run_for(&peers, 2500000);
    process_signal(coordinator.process, SIGCONT);
    watch.count_min = 1;
    peers_run_for(&peers, 2500000);
    cr_expect_eq(watch.count_min, 1);
    cr_expect_eq(worker.assigned_count, 1);
    peers_worker_drop(&worker);
    peers_watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: who does not read holds nobody up, and then sees the newest. */
Test(coordinator_life, gives_a_slow_watcher_the_newest_directory)
{
    struct peers_instance coordinator;
    struct peers_watch slow;
    struct peers_watch quick;
    struct peers_worker worker;
    peers_start_named(&peers, &coordinator, "a");
    peers_watch_open(&peers, &slow, coordinator.address);
    peers_watch_open(&peers, &quick, coordinator.address);
    peers_worker_make(&peers, &worker);
    rpc_call_pause(slow.call);
    for (int i = 0; i < 20; i++) {
        worker.assigned_count = 0;
        peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
        cr_assert(peers_wait_for(&peers, peers_is_assigned, &worker, PEERS_WAIT_US));
        peers_expect_members(&quick, 1, -1);
        worker.left = 0;
        coordinator_client_leave(worker.client, peers_on_left, &worker);
        cr_assert(peers_wait_for(&peers, peers_has_left, &worker, PEERS_WAIT_US));
        peers_expect_members(&quick, 0, -1);
        coordinator_client_close(&worker.client);
    }
    peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
    peers_expect_members(&quick, 1, -1);
    rpc_call_resume(slow.call);
    struct peers_version_awaited awaited = {&slow, quick.version};
    cr_expect(peers_wait_for(&peers, peers_has_version, &awaited, PEERS_WAIT_US));
    cr_expect_eq(slow.count, 1);
    cr_expect_eq(quick.message_count, 42);
    cr_expect_not(slow.went_back);
    peers_worker_drop(&worker);
    peers_watch_close(&slow);
    peers_watch_close(&quick);
    process_close(&coordinator.process);
}

/* ---- disks ----------------------------------------------------------------------------------- */

/* Goal: with no room to write, reading goes on and the process lives; with room again joining does.
 * Method: a limit on the size of the files that the process may write. */
Test(coordinator_life, goes_on_answering_when_its_disk_is_full)
{
    struct peers_instance coordinator;
    struct peers_caller caller;
    struct peers_join_request request;
    struct rlimit limit;
    enum rpc_status status = RPC_OK;
    peers_start_named(&peers, &coordinator, "a");
    peers_caller_open(&peers, &caller, coordinator.address, 1);
    peers_join_request(&request);
    cr_assert_eq(peers_call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    cr_assert_eq(prlimit(process_pid(coordinator.process), RLIMIT_FSIZE, NULL, &limit), 0);
    limit.rlim_cur = 100000;
    cr_assert_eq(prlimit(process_pid(coordinator.process), RLIMIT_FSIZE, &limit, NULL), 0);
    for (int i = 0; i < 200 && status == RPC_OK; i++)
        status = peers_call(&caller, "Join", &request.request.base);
    cr_expect_neq(status, RPC_OK);
    Odsi__V1__Directory *directory = peers_get_directory(&caller);
    cr_expect_eq(directory->n_members, 1);
    rpc_unpack_free(directory);
    limit.rlim_cur = limit.rlim_max;
    cr_assert_eq(prlimit(process_pid(coordinator.process), RLIMIT_FSIZE, &limit, NULL), 0);
    cr_expect_eq(peers_call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    peers_caller_close(&caller);
    process_close(&coordinator.process);
}
