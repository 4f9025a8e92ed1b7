/* odsi-coordinator: the control plane of a swarm. Keeps nothing itself; what it knows is in the
 * store, so it may be killed at any moment, and several may run on one store. */
#include "common/base/args.h"
#include "common/base/io.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/crypto/identity.h"
#include "common/net/daemon.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"
#include "coordinator/service.h"
#include "coordinator/store.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define STOP_MAX_US 1500000u /* a peer that does not let go holds nobody up longer */

struct flags {
    const char *listen;
    const char *store;
    const char *identity;
    const char *log_level;
    const char *ready_file;
    uint32_t heartbeat_ms;
    int insecure;
};

struct coordinator {
    struct flags flags;
    struct rpc_loop *loop;
    struct identity *identity; /* NULL: plaintext */
    struct store *store;
    struct service *service;
    struct rpc_server *server;
    struct rpc_timer stop_timer;
};

/* ---- stopping -------------------------------------------------------------------------------- */

static void server_closed(void *context)
{
    struct coordinator *self = context;
    rpc_timer_cancel(&self->stop_timer);
    rpc_loop_stop(self->loop);
}

/* All that matters is in the store and transactions are whole, so nothing is lost this way. */
static void stop_at_once(void *context)
{
    (void)context;
    log_line(LOG_WARN, "connections did not close in time; ending without them");
    _exit(0);
}

static void terminate(void *context)
{
    struct coordinator *self = context;
    log_line(LOG_INFO, "stopping");
    daemon_withdraw(self->flags.ready_file);
    if (!self->server) { /* told to stop while it starts */
        rpc_loop_stop(self->loop);
        return;
    }
    if (rpc_timer_start(&self->stop_timer, self->loop, STOP_MAX_US, stop_at_once, self) != ODSI_OK)
        log_line(LOG_WARN, "%s", odsi_err_text());
    service_stop(self->service);
    rpc_server_close(self->server, server_closed, self);
    self->server = NULL;
}

/* ---- starting -------------------------------------------------------------------------------- */

static uint64_t unix_now_us(void *context)
{
    (void)context;
    return clock_unix_us();
}

static void set_health(void *context, int healthy)
{
    struct coordinator *self = context;
    if (self->server)
        rpc_server_set_serving(self->server, healthy);
}

static enum odsi_err open_identity(struct coordinator *self)
{
    char folder[IO_PATH_SIZE] = "";
    if (self->flags.insecure)
        return ODSI_OK;
    if (!self->flags.identity) {
        const enum odsi_err err = identity_home(folder, sizeof folder);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "no place for a key; give --identity FILE");
    }
    return daemon_open_identity(&self->identity, self->flags.identity, folder, "coordinator.pem");
}

static enum odsi_err announce(const struct coordinator *self)
{
    char address[LIMIT_ADDRESS_SIZE];
    const enum odsi_err err =
        daemon_address(address, sizeof address, self->flags.listen, rpc_server_port(self->server));
    return err == ODSI_OK ? daemon_announce("odsi-coordinator", self->identity, address,
                                            self->flags.ready_file)
                          : err;
}

static enum odsi_err open_server(struct coordinator *self)
{
    const struct rpc_server_config config = {
        .listen = self->flags.listen,
        .identity = self->identity,
        .services = service_rpc_view(self->service),
        .service_count = 1,
    };
    return rpc_server_open(&self->server, self->loop, &config);
}

static enum odsi_err open_all(struct coordinator *self)
{
    enum odsi_err err = rpc_loop_open(&self->loop);
    if (err == ODSI_OK)
        err = rpc_loop_on_terminate(self->loop, terminate, self);
    if (err == ODSI_OK)
        err = open_identity(self);
    if (err == ODSI_OK)
        err = store_open(&self->store, self->flags.store);
    if (err != ODSI_OK)
        return err;
    const struct service_config config = {
        .loop = self->loop,
        .store = self->store,
        .clock = {.now_us = unix_now_us},
        .heartbeat_ms = self->flags.heartbeat_ms,
        .on_health = set_health,
        .health_context = self,
    };
    err = service_open(&self->service, &config);
    if (err == ODSI_OK)
        err = service_start(self->service);
    if (err == ODSI_OK)
        err = open_server(self);
    return err;
}

/* Also after a failure half-way, when the loop has not run yet. */
static void close_all(struct coordinator *self)
{
    if (self->server) {
        rpc_server_close(self->server, server_closed, self);
        self->server = NULL;
        rpc_loop_run(self->loop);
    }
    service_close(&self->service);
    rpc_loop_close(&self->loop);
    store_close(&self->store);
    identity_close(&self->identity);
}

static int run(struct coordinator *self)
{
    daemon_withdraw(self->flags.ready_file);
    enum odsi_err err = open_all(self);
    if (err == ODSI_OK)
        err = announce(self);
    if (err == ODSI_OK)
        rpc_loop_run(self->loop);
    else
        fprintf(stderr, "odsi-coordinator: %s\n", odsi_err_text());
    close_all(self);
    if (err == ODSI_OK)
        return 0;
    return err == ODSI_ERR_INVALID || err == ODSI_ERR_UNSUPPORTED ? 2 : 1;
}

int main(int argc, char **argv)
{
    struct coordinator coordinator = {.flags = {.listen = ":7600",
                                                .store = "sqlite:odsi.db",
                                                .log_level = "info",
                                                .heartbeat_ms = 1000}};
    struct flags *flags = &coordinator.flags;
    const struct args_option options[] = {
        {"listen", 'l', ARGS_TEXT, &flags->listen, "HOST:PORT",
         "where to listen (default :7600, on all interfaces; port 0: any)"},
        {"store", 's', ARGS_TEXT, &flags->store, "URL",
         "where members are kept: sqlite:FILE (default sqlite:odsi.db); several may share it"},
        {"identity", 'i', ARGS_TEXT, &flags->identity, "FILE",
         "the key, made on first start (default ~/.local/state/odsi/coordinator.pem)"},
        {"insecure", 0, ARGS_FLAG, &flags->insecure, NULL,
         "plaintext, on a loopback address only; nobody can join then, only read"},
        {"heartbeat-ms", 0, ARGS_U32, &flags->heartbeat_ms, "MS",
         "how often members report (default 1000); after three missed ones they are gone"},
        {"ready-file", 0, ARGS_TEXT, &flags->ready_file, "FILE",
         "written with ID@HOST:PORT while serving"},
        {"log-level", 0, ARGS_TEXT, &flags->log_level, "LEVEL", "error, warn, info or debug"},
        {NULL, 0, ARGS_FLAG, NULL, NULL, NULL, 0},
    };
    const struct args_program program = {
        .name = "odsi-coordinator",
        .summary = "Keeps the directory of a swarm: who serves which layers.",
        .usage = "[options]",
        .examples = "odsi-coordinator --listen :7600 --store sqlite:odsi.db",
        .options = options,
    };
    struct args *args = NULL;
    int rest = 0;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    int code = outcome == ARGS_EXIT_OK ? 0 : 2;
    if (outcome == ARGS_RUN && rest < argc) {
        fprintf(stderr, "odsi-coordinator: unexpected argument '%s'; see --help\n", argv[rest]);
    } else if (outcome == ARGS_RUN && log_setup("odsi-coordinator", flags->log_level) != ODSI_OK) {
        fprintf(stderr, "odsi-coordinator: %s\n", odsi_err_text());
    } else if (outcome == ARGS_RUN) {
        daemon_survive_file_limit();
        code = run(&coordinator);
    }
    args_close(&args);
    return code;
}
