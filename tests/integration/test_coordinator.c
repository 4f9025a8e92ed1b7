/* odsi-coordinator as its users meet it: the real program as a process, over real mutual TLS. */
#include "tests/support/peers.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/net/rpc_pack.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
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

TestSuite(coordinator, .init = set_up, .fini = tear_down, .timeout = 120);

/* ---- membership ------------------------------------------------------------------------------ */

Test(coordinator, shows_a_member_from_its_join_to_its_leave)
{
    struct peers_instance coordinator;
    struct peers_watch watch;
    struct peers_worker worker;
    peers_start_named(&peers, &coordinator, "a");
    peers_watch_open(&peers, &watch, coordinator.address);
    cr_expect_eq(watch.count, 0);
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
    peers_expect_members(&watch, 1, 0);
    cr_expect_str_eq(watch.members[0].address, "10.0.0.1:7700");
    cr_expect(digest_equal(&watch.members[0].id, identity_id_view(worker.identity)));
    cr_expect(watch.members[0].first == 0 && watch.members[0].end == 12);
    cr_assert(peers_wait_for(&peers, peers_is_assigned, &worker, PEERS_WAIT_US));
    worker.load.session_count = 42;
    coordinator_client_set_ready(worker.client, NULL, peers_fill_load, &worker);
    peers_expect_members(&watch, 1, 1);
    cr_expect_eq(watch.members[0].load.session_count, 42);
    peers_run_for(&peers, 5 * PEERS_HEARTBEAT_MS * 1000);
    cr_expect_eq(watch.count, 1, "heartbeats keep it in");
    cr_expect_eq(worker.lost_count, 0, "%s", worker.failure.text);
    coordinator_client_leave(worker.client, peers_on_left, &worker);
    cr_expect_not(worker.left);
    cr_assert(peers_wait_for(&peers, peers_has_left, &worker, PEERS_WAIT_US));
    peers_expect_members(&watch, 0, -1);
    cr_expect_not(watch.went_back);
    peers_worker_drop(&worker);
    peers_watch_close(&watch);
    process_close(&coordinator.process);
}

/* Goal: a worker that dies without a word is gone after three heartbeats, not before. */
Test(coordinator, forgets_a_member_that_falls_silent)
{
    struct peers_instance coordinator;
    struct peers_watch watch;
    struct peers_worker worker;
    peers_start_named(&peers, &coordinator, "a");
    peers_watch_open(&peers, &watch, coordinator.address);
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
    peers_expect_members(&watch, 1, -1);
    const uint64_t silent_us = clock_monotonic_us();
    peers_worker_drop(&worker);
    peers_expect_members(&watch, 0, -1);
    cr_expect_geq(clock_monotonic_us() - silent_us, 2 * PEERS_HEARTBEAT_MS * 1000);
    peers_watch_close(&watch);
    process_close(&coordinator.process);
}

Test(coordinator, replaces_a_member_that_joins_again_elsewhere)
{
    struct peers_instance coordinator;
    struct peers_watch watch;
    struct peers_worker worker;
    struct peers_worker again;
    peers_start_named(&peers, &coordinator, "a");
    peers_watch_open(&peers, &watch, coordinator.address);
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, coordinator.address, "10.0.0.1:7700");
    peers_expect_members(&watch, 1, -1);
    coordinator_client_close(&worker.client);
    peers_worker_make(&peers, &again);
    identity_close(&again.identity);
    again.identity = worker.identity;
    worker.identity = NULL;
    peers_worker_join(&again, coordinator.address, "10.0.0.2:7700");
    cr_assert(peers_wait_for(&peers, peers_is_assigned, &again, PEERS_WAIT_US));
    peers_expect_members(&watch, 1, -1);
    peers_run_for(&peers, 300000);
    cr_expect_str_eq(watch.members[0].address, "10.0.0.2:7700");
    peers_worker_drop(&again);
    peers_watch_close(&watch);
    process_close(&coordinator.process);
}

Test(coordinator, spreads_members_that_ask_for_layers_over_the_model)
{
    struct peers_instance coordinator;
    struct peers_worker workers[3];
    unsigned served = 0;
    peers_start_named(&peers, &coordinator, "a");
    for (int i = 0; i < 3; i++) {
        char address[32];
        snprintf(address, sizeof address, "10.0.0.%d:7700", i + 1);
        peers_worker_make(&peers, &workers[i]);
        struct coordinator_client_config config =
            peers_worker_config(&workers[i], coordinator.address, address);
        config.layer_end = 0;
        config.layer_capacity = 4;
        cr_assert_eq(coordinator_client_open(&workers[i].client, &config), ODSI_OK);
        cr_assert(peers_wait_for(&peers, peers_is_assigned, &workers[i], PEERS_WAIT_US));
        for (uint32_t layer = workers[i].first; layer < workers[i].end; layer++)
            served |= 1u << layer;
    }
    cr_expect_eq(served, 0xfffu);
    for (int i = 0; i < 3; i++)
        peers_worker_drop(&workers[i]);
    process_close(&coordinator.process);
}

Test(coordinator, keeps_an_address_for_the_member_that_is_heard_there)
{
    struct peers_instance coordinator;
    struct peers_watch watch;
    struct peers_worker first;
    struct peers_worker second;
    peers_start_named(&peers, &coordinator, "a");
    peers_watch_open(&peers, &watch, coordinator.address);
    peers_worker_make(&peers, &first);
    peers_worker_make(&peers, &second);
    peers_worker_join(&first, coordinator.address, "10.0.0.1:7700");
    cr_assert(peers_wait_for(&peers, peers_is_assigned, &first, PEERS_WAIT_US));
    peers_worker_join(&second, coordinator.address, "10.0.0.1:7700");
    cr_assert(peers_wait_for(&peers, peers_is_lost, &second, PEERS_WAIT_US));
    cr_expect_eq(second.failure.err, ODSI_ERR_EXISTS, "%s", second.failure.text);
    cr_expect_not(second.gave_up);
    cr_expect_eq(second.assigned_count, 0);
    peers_worker_drop(&first); /* and now the other one gets in by itself */
    cr_assert(peers_wait_for(&peers, peers_is_assigned, &second, PEERS_WAIT_US));
    struct peers_id_awaited awaited = {&watch, identity_id_view(second.identity)};
    cr_expect(peers_wait_for(&peers, peers_is_only_member, &awaited, PEERS_WAIT_US));
    peers_worker_drop(&second);
    peers_watch_close(&watch);
    process_close(&coordinator.process);
}

/* ---- bad input ------------------------------------------------------------------------------- */

Test(coordinator, lets_nobody_join_without_an_identity_but_lets_them_read)
{
    struct peers_instance coordinator;
    struct peers_caller caller;
    struct peers_join_request join_request;
    const Odsi__V1__HeartbeatRequest heartbeat = ODSI__V1__HEARTBEAT_REQUEST__INIT;
    const Odsi__V1__LeaveRequest leave = ODSI__V1__LEAVE_REQUEST__INIT;
    const struct peers_instance_config config = {.name = "a", .insecure = 1};
    peers_start(&peers, &coordinator, &config);
    cr_assert_null(strchr(coordinator.address, '@'), "%s", coordinator.address);
    peers_caller_open(&peers, &caller, coordinator.address, 0);
    peers_join_request(&join_request);
    cr_expect_eq(peers_call(&caller, "Join", &join_request.request.base), RPC_PERMISSION_DENIED);
    cr_expect(strstr(caller.text, "TLS"), "%s", caller.text);
    cr_expect_eq(peers_call(&caller, "Heartbeat", &heartbeat.base), RPC_PERMISSION_DENIED);
    cr_expect_eq(peers_call(&caller, "Leave", &leave.base), RPC_PERMISSION_DENIED);
    Odsi__V1__Directory *directory = peers_get_directory(&caller);
    cr_expect_eq(directory->n_members, 0);
    rpc_unpack_free(directory);
    peers_caller_close(&caller);
    process_close(&coordinator.process);
}

static void expect_refused(struct peers_caller *caller, struct peers_join_request *request,
                           const char *word)
{
    cr_expect_eq(peers_call(caller, "Join", &request->request.base), RPC_INVALID_ARGUMENT, "%s",
                 word);
    cr_expect(strstr(caller->text, word), "'%s' does not say '%s'", caller->text, word);
    peers_join_request(request);
}

Test(coordinator, refuses_malformed_requests_by_name_and_goes_on)
{
    struct peers_instance coordinator;
    struct peers_caller caller;
    struct peers_join_request request;
    uint8_t noise[9000];
    peers_start_named(&peers, &coordinator, "a");
    peers_caller_open(&peers, &caller, coordinator.address, 1);
    peers_join_request(&request);
    request.request.model = NULL;
    expect_refused(&caller, &request, "model");
    request.model.model_id.len = 31;
    expect_refused(&caller, &request, "model_id");
    memset(request.name, 'n', sizeof request.name - 1);
    expect_refused(&caller, &request, "name");
    memset(request.address, 'a', sizeof request.address - 1);
    expect_refused(&caller, &request, "address");
    snprintf(request.address, sizeof request.address, ":7700");
    expect_refused(&caller, &request, "address");
    memset(request.backend, 'b', sizeof request.backend - 1);
    expect_refused(&caller, &request, "backend");
    request.layers.end = 13;
    expect_refused(&caller, &request, "layers");
    request.request.layers = NULL;
    expect_refused(&caller, &request, "layer_capacity");
    memset(noise, 0xff, sizeof noise);
    cr_expect_eq(peers_call_bytes(&caller, "Join", noise, 100), RPC_INVALID_ARGUMENT);
    cr_expect_eq(peers_call_bytes(&caller, "Heartbeat", noise, 100), RPC_INVALID_ARGUMENT);
    cr_expect_eq(peers_call_bytes(&caller, "Join", noise, sizeof noise), RPC_RESOURCE_EXHAUSTED);
    cr_expect_eq(peers_call_bytes(&caller, "Jion", noise, 1), RPC_UNIMPLEMENTED);
    cr_expect_eq(peers_call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    peers_caller_close(&caller);
    process_close(&coordinator.process);
}

Test(coordinator, tells_an_unknown_member_to_join_again)
{
    struct peers_instance coordinator;
    struct peers_caller caller;
    struct peers_join_request join_request;
    const Odsi__V1__HeartbeatRequest heartbeat = ODSI__V1__HEARTBEAT_REQUEST__INIT;
    const Odsi__V1__LeaveRequest leave = ODSI__V1__LEAVE_REQUEST__INIT;
    peers_start_named(&peers, &coordinator, "a");
    peers_caller_open(&peers, &caller, coordinator.address, 1);
    peers_join_request(&join_request);
    for (int known = 0; known < 2; known++) {
        Odsi__V1__HeartbeatReply *reply = NULL;
        cr_assert_eq(peers_call(&caller, "Heartbeat", &heartbeat.base), RPC_OK);
        cr_assert_eq(rpc_unpack_bytes(&reply, &odsi__v1__heartbeat_reply__descriptor,
                                      caller.reply.data, caller.reply.size),
                     ODSI_OK);
        cr_expect_eq(reply->known, known);
        rpc_unpack_free(reply);
        cr_assert_eq(peers_call(&caller, "Join", &join_request.request.base), RPC_OK, "%s",
                     caller.text);
    }
    cr_expect_eq(peers_call(&caller, "Leave", &leave.base), RPC_OK);
    cr_expect_eq(peers_call(&caller, "Leave", &leave.base), RPC_OK, "leaving twice is no error");
    peers_caller_close(&caller);
    process_close(&coordinator.process);
}

Test(coordinator, is_not_believed_by_a_member_that_expects_another_identity)
{
    struct peers_instance coordinator;
    struct peers_worker worker;
    char address[PEERS_LINE_SIZE];
    peers_start_named(&peers, &coordinator, "a");
    snprintf(address, sizeof address, "%s", coordinator.address);
    address[0] = address[0] == '0' ? '1' : '0';
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, address, "10.0.0.1:7700");
    cr_assert(peers_wait_for(&peers, peers_is_lost, &worker, PEERS_WAIT_US));
    cr_expect_eq(worker.assigned_count, 0);
    cr_expect_not(worker.gave_up);
    peers_worker_drop(&worker);
    process_close(&coordinator.process);
}

Test(coordinator, makes_a_member_with_a_bad_address_give_up)
{
    struct peers_instance coordinator;
    struct peers_worker worker;
    peers_start_named(&peers, &coordinator, "a");
    peers_worker_make(&peers, &worker);
    peers_worker_join(&worker, coordinator.address, "0.0.0.0:7700");
    cr_assert(peers_wait_for(&peers, peers_is_lost, &worker, PEERS_WAIT_US));
    cr_expect(worker.gave_up);
    cr_expect_eq(worker.failure.err, ODSI_ERR_INVALID);
    cr_expect(strstr(worker.failure.text, "0.0.0.0:7700"), "%s", worker.failure.text);
    coordinator_client_leave(worker.client, peers_on_left, &worker);
    cr_assert(peers_wait_for(&peers, peers_has_left, &worker, PEERS_WAIT_US),
              "there is nothing to leave");
    peers_worker_drop(&worker);
    process_close(&coordinator.process);
}
/* ---- command line ---------------------------------------------------------------------------- */

/* Runs the program to its end; standard error must hold word in one line. */
static void expect_exit(const char *const *args, int code, const char *word)
{
    char path[PROCESS_PATH_SIZE];
    char *log = NULL;
    int got = -1;
    const struct process_config config = {
        .program = "odsi-coordinator", .args = args, .folder = peers.folder, .name = "run"};
    cr_assert_eq(process_path(path, peers.folder, "run.log"), ODSI_OK);
    unlink(path);
    cr_assert_eq(process_run(&config, PEERS_WAIT_US, &got), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_read_file(&log, path), ODSI_OK);
    cr_expect_eq(got, code, "%s: %d, %s", args[0], got, log);
    if (code != 0) {
        cr_expect(strstr(log, word), "%s", log);
        cr_expect_eq(strchr(log, '\n'), log + strlen(log) - 1, "more than one line: %s", log);
    }
    alloc_free(log);
}

Test(coordinator, says_in_one_line_what_is_wrong_with_its_flags)
{
    char key[PROCESS_PATH_SIZE];
    cr_assert_eq(process_path(key, peers.folder, "key.pem"), ODSI_OK);
    expect_exit((const char *[]){"--help", NULL}, 0, "");
    expect_exit((const char *[]){"--version", NULL}, 0, "");
    expect_exit((const char *[]){"--nonsense", NULL}, 2, "--nonsense");
    expect_exit((const char *[]){"more", NULL}, 2, "more");
    expect_exit((const char *[]){"--log-level", "loud", NULL}, 2, "loud");
    expect_exit((const char *[]){"--store", "postgresql://u:pass@h/d", "--identity", key, NULL}, 2,
                "PostgreSQL");
    expect_exit((const char *[]){"--store", "nosql", "--identity", key, NULL}, 2, "nosql");
    expect_exit((const char *[]){"--heartbeat-ms", "1", "--store", "sqlite::memory:", "--identity",
                                 key, NULL},
                2, "heartbeat");
    expect_exit(
        (const char *[]){"--insecure", "--listen", "0.0.0.0:0", "--store", "sqlite::memory:", NULL},
        1, "0.0.0.0:0");
    expect_exit((const char *[]){"--store", "sqlite:/nonexistent/x.db", "--identity", key, NULL}, 1,
                "/nonexistent/x.db");
}

Test(coordinator, refuses_a_port_in_use_and_a_file_that_is_no_database)
{
    struct peers_instance coordinator;
    char key[PROCESS_PATH_SIZE];
    char path[PROCESS_PATH_SIZE];
    char store[PROCESS_PATH_SIZE + 8];
    cr_assert_eq(process_path(key, peers.folder, "key.pem"), ODSI_OK);
    cr_assert_eq(process_path(path, peers.folder, "noise.db"), ODSI_OK);
    snprintf(store, sizeof store, "sqlite:%s", path);
    peers_start_named(&peers, &coordinator, "a");
    expect_exit((const char *[]){"--listen", peers_place_of(&coordinator), "--store",
                                 "sqlite::memory:", "--identity", key, NULL},
                1, peers_place_of(&coordinator));
    const int file = open(path, O_WRONLY | O_CREAT, 0600);
    cr_assert_geq(file, 0);
    for (int i = 0; i < 1000; i++)
        cr_assert_eq(write(file, "not a database ", 15), 15);
    close(file);
    expect_exit((const char *[]){"--store", store, "--identity", key, NULL}, 1, path);
    process_close(&coordinator.process);
}
