/* The service inside this process, so that its memory and clock can be played with; what users see
 * is tested with the real program in tests/integration. */
#include "coordinator/service.h"

#include "common/base/alloc.h"
#include "common/net/rpc_pack.h"
#include "coordinator/store_sqlite.h"
#include "tests/support/peers.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#define REFUSED_MAX 120 /* more allocations than any one call makes */

static struct peers peers;

struct host {
    struct store *store;
    struct service *service;
    struct identity *identity;
    struct rpc_server *server;
    uint64_t now_us;
    int healthy;
    char address[128];
};

static void set_up(void)
{
    peers_open(&peers);
}

static void tear_down(void)
{
    peers_close(&peers);
}

TestSuite(service, .init = set_up, .fini = tear_down, .timeout = 120);

static void on_health(void *context, int healthy)
{
    struct host *self = context;
    self->healthy = healthy;
}

static void host_open(struct host *self, struct store *store)
{
    char id[DIGEST_HEX_SIZE];
    memset(self, 0, sizeof *self);
    self->store = store;
    self->healthy = 1;
    self->now_us = 1790000000000000u;
    cr_assert_eq(identity_make(&self->identity), ODSI_OK);
    const struct service_config config = {
        .loop = peers.loop,
        .store = store,
        .clock = clock_manual(&self->now_us),
        .heartbeat_ms = 100,
        .on_health = on_health,
        .health_context = self,
    };
    cr_assert_eq(service_open(&self->service, &config), ODSI_OK);
    cr_assert_eq(service_start(self->service), ODSI_OK);
    const struct rpc_server_config server = {.listen = "127.0.0.1:0",
                                             .identity = self->identity,
                                             .services = service_rpc_view(self->service),
                                             .service_count = 1};
    cr_assert_eq(rpc_server_open(&self->server, peers.loop, &server), ODSI_OK);
    digest_to_hex(id, identity_id_view(self->identity));
    snprintf(self->address, sizeof self->address, "%s@127.0.0.1:%u", id,
             rpc_server_port(self->server));
}

static void stop_loop(void *context)
{
    (void)context;
    rpc_loop_stop(peers.loop);
}

static void host_close(struct host *self)
{
    service_stop(self->service);
    rpc_server_close(self->server, stop_loop, NULL);
    rpc_loop_run(peers.loop);
    service_close(&self->service);
    store_close(&self->store);
    identity_close(&self->identity);
}

/* A store of the given number of pages; 0: as many as it likes. */
static struct store *memory_store(uint32_t page_count_max)
{
    struct store *store = NULL;
    cr_assert_eq(store_sqlite_open(&store, ":memory:", page_count_max), ODSI_OK);
    return store;
}

static int never(void *context)
{
    (void)context;
    return 0;
}

static int is_unhealthy(void *context)
{
    const struct host *host = context;
    return !host->healthy;
}

Test(service, refuses_a_heartbeat_outside_its_limits)
{
    struct service *service = NULL;
    struct service_config config = {.loop = peers.loop, .heartbeat_ms = 0};
    cr_expect_eq(service_open(&service, &config), ODSI_ERR_INVALID);
    config.heartbeat_ms = MEMBERS_HEARTBEAT_MS_MAX + 1;
    cr_expect_eq(service_open(&service, &config), ODSI_ERR_INVALID);
    cr_expect_null(service);
    service_close(&service);
}

/* Goal: members age by the clock that all instances share, and a jump of it costs nobody his place.
 * Method: the clock stands still, jumps an hour, then goes on in steps as sweeps come. */
Test(service, counts_silence_by_its_clock_and_forgives_a_jump)
{
    struct host host;
    struct peers_caller caller;
    struct peers_join_request request;
    host_open(&host, memory_store(0));
    peers_caller_open(&peers, &caller, host.address, 1);
    peers_join_request(&request);
    cr_assert_eq(peers_call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    host.now_us += 3600000000u;
    (void)peers_wait_for(&peers, never, NULL, 500000);
    Odsi__V1__Directory *directory = peers_get_directory(&caller);
    cr_assert_eq(directory->n_members, 1);
    cr_expect_eq(directory->members[0]->silent_ms, 3600000);
    rpc_unpack_free(directory);
    uint32_t steps = 0;
    for (size_t count = 1; count > 0; steps++) {
        cr_assert_lt(steps, 100, "never gone");
        host.now_us += 50000;
        (void)peers_wait_for(&peers, never, NULL, 60000);
        directory = peers_get_directory(&caller);
        count = directory->n_members;
        rpc_unpack_free(directory);
    }
    cr_expect_geq(steps, 7, "3.5 heartbeats of 100 ms in steps of 50");
    peers_caller_close(&caller);
    host_close(&host);
}

Test(service, tells_its_health_when_the_store_fails_and_goes_on)
{
    struct host host;
    struct peers_caller caller;
    struct peers_join_request request;
    enum rpc_status status = RPC_OK;
    host_open(&host, memory_store(14));
    for (int i = 0; i < 200 && status == RPC_OK; i++) {
        peers_caller_open(&peers, &caller, host.address, 1);
        peers_join_request(&request);
        snprintf(request.address, sizeof request.address, "10.0.0.1:%d", 1000 + i);
        status = peers_call(&caller, "Join", &request.request.base);
        if (status == RPC_OK)
            peers_caller_close(&caller);
    }
    cr_assert_neq(status, RPC_OK);
    cr_expect(strstr(caller.text, "no room"), "%s", caller.text);
    cr_expect(is_unhealthy(&host));
    rpc_unpack_free(peers_get_directory(&caller));
    peers_caller_close(&caller);
    host_close(&host);
}

/* ---- memory ---- */

struct answer {
    int count;
    enum rpc_status status;
};

static void take_answer(void *context, enum rpc_status status, const char *text,
                        const struct rpc_message *reply)
{
    struct answer *answer = context;
    (void)text;
    (void)reply;
    answer->count++;
    answer->status = status;
    rpc_loop_stop(peers.loop);
}

static int is_over_or_newest(void *context)
{
    const struct peers_version_awaited *awaited = context;
    return awaited->watch->is_done || awaited->watch->version == awaited->version;
}

/* Goal: whichever allocation fails, every call is answered once, a watcher is either told that its
 * watch is over or sees the newest directory, and the service goes on.
 * Method: refuse the first, second, third ... allocation of this process, client's and server's
 * alike, during each call; then ask in peace. The sanitizer build sees any leak. */
Test(service, answers_every_call_whatever_allocation_fails)
{
    const char *methods[] = {"Join", "Heartbeat", "GetDirectory", "Leave"};
    struct host host;
    struct peers_watch watch;
    struct peers_caller caller;
    struct peers_join_request request;
    struct buf packed;
    host_open(&host, memory_store(0));
    peers_caller_open(&peers, &caller, host.address, 1);
    peers_join_request(&request);
    request.request.layers = NULL;
    request.request.layer_capacity = 4;
    buf_init(&packed, 4096);
    cr_assert_eq(rpc_pack(&packed, &request.request.base), ODSI_OK);
    cr_assert_eq(peers_call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    peers_watch_open(&peers, &watch, host.address);
    watch.is_tolerant = 1;
    for (int refused = 0; refused < REFUSED_MAX; refused++) {
        for (int i = 0; i < 4; i++) {
            struct answer answer = {0};
            char path[64];
            snprintf(path, sizeof path, "/odsi.v1.Coordinator/%s", methods[i]);
            alloc_fail_after(refused);
            const enum odsi_err err = rpc_unary(caller.channel, path, 5000000, 1, packed.data,
                                                i == 0 ? packed.size : 0, take_answer, &answer);
            if (err == ODSI_OK)
                rpc_loop_run(peers.loop);
            alloc_fail_after(-1);
            cr_assert_eq(answer.count, err == ODSI_OK, "%s, allocation %d", path, refused);
            cr_assert_neq(answer.status, RPC_DEADLINE_EXCEEDED, "%s, allocation %d", path, refused);
        }
    }
    cr_expect_eq(peers_call(&caller, "Join", &request.request.base), RPC_OK, "%s", caller.text);
    Odsi__V1__Directory *directory = peers_get_directory(&caller);
    struct peers_version_awaited awaited = {&watch, directory->version};
    rpc_unpack_free(directory);
    cr_expect(peers_wait_for(&peers, is_over_or_newest, &awaited, PEERS_WAIT_US));
    cr_expect(!watch.is_done || watch.status == RPC_RESOURCE_EXHAUSTED, "%d", watch.status);
    peers_watch_close(&watch);
    buf_free(&packed);
    peers_caller_close(&caller);
    host_close(&host);
}
