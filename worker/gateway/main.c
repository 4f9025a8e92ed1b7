/* odsi-gateway: the user's own agent. Clients ask it for text; it tokenizes, chooses the workers,
 * watches over the session and streams the answer. It holds no model weights. */
#include "common/base/args.h"
#include "common/base/io.h"
#include "common/base/limits.h"
#include "common/base/log.h"
#include "common/crypto/identity.h"
#include "common/net/daemon.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"
#include "worker/gateway/gateway.h"
#include "worker/gateway/inference_service.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define LAST_WORDS_US 200000u  /* for clients to read how their answers ended */
#define STOP_MAX_US   1500000u /* a peer that does not let go holds nobody up longer */
#define READY_MAX_US  3000000u /* how long the start waits for a first directory */

struct flags {
    const char *coordinator;
    const char *listen;
    const char *identity;
    const char *state_dir;
    const char *ready_file;
    const char *log_level;
    uint32_t sessions_max;
    uint32_t open_timeout_ms;
    uint32_t stall_timeout_ms;
    int insecure;
};

struct program {
    struct flags flags;
    char state_dir[IO_PATH_SIZE];
    struct rpc_loop *loop;
    struct identity *identity;
    struct gateway *gateway;
    struct inference_service *service;
    struct rpc_server *server;
    struct rpc_timer ready_timer;
    struct rpc_timer stop_timer;
    int stopping;
    int failed;
};

/* ---- stopping -------------------------------------------------------------------------------- */

static void gateway_closed(void *context)
{
    struct program *self = context;
    rpc_timer_cancel(&self->stop_timer);
    rpc_loop_stop(self->loop);
}

static void server_closed(void *context)
{
    struct program *self = context;
    if (self->gateway)
        gateway_close(&self->gateway, gateway_closed, self);
    else
        rpc_loop_stop(self->loop);
}

/* Nothing is lost: what is kept was written when it came. */
static void stop_at_once(void *context)
{
    const struct program *self = context;
    log_line(LOG_WARN, "connections did not close in time; ending without them");
    _exit(self->failed);
}

static void close_server(void *context)
{
    struct program *self = context;
    if (rpc_timer_start(&self->stop_timer, self->loop, STOP_MAX_US, stop_at_once, self) != ODSI_OK)
        log_line(LOG_WARN, "%s", odsi_err_text());
    if (!self->server) {
        server_closed(self);
        return;
    }
    struct rpc_server *server = self->server;
    self->server = NULL;
    rpc_server_close(server, server_closed, self);
}

static void stop(struct program *self)
{
    if (self->stopping)
        return;
    self->stopping = 1;
    rpc_timer_cancel(&self->ready_timer);
    daemon_withdraw(self->flags.ready_file);
    uint32_t ended = 0;
    if (self->server)
        rpc_server_set_serving(self->server, 0);
    if (self->service)
        inference_service_stop(self->service);
    if (self->gateway) {
        struct answer_context *answers = gateway_answers(self->gateway);
        ended = answers->count;
        answer_abort_all(answers, ODSI_ERR_UNAVAILABLE, "the gateway is stopping");
    }
    if (ended == 0 || rpc_timer_start(&self->stop_timer, self->loop, LAST_WORDS_US, close_server,
                                      self) != ODSI_OK)
        close_server(self);
}

static void terminate(void *context)
{
    log_line(LOG_INFO, "stopping");
    stop(context);
}

/* ---- starting -------------------------------------------------------------------------------- */

static void announce(void *context)
{
    struct program *self = context;
    char address[LIMIT_ADDRESS_SIZE];
    if (self->stopping || !self->server)
        return;
    rpc_timer_cancel(&self->ready_timer);
    enum odsi_err err =
        daemon_address(address, sizeof address, self->flags.listen, rpc_server_port(self->server));
    if (err == ODSI_OK)
        err = daemon_announce("odsi-gateway", self->flags.insecure ? NULL : self->identity, address,
                              self->flags.ready_file);
    if (err == ODSI_OK)
        return;
    fprintf(stderr, "odsi-gateway: %s\n", odsi_err_text());
    self->failed = 1;
    stop(self);
}

/* Posted, so that it comes after the server is open also when the directory was kept. */
static void on_ready(void *context)
{
    struct program *self = context;
    if (rpc_loop_post(self->loop, announce, self) != ODSI_OK)
        log_line(LOG_ERROR, "%s", odsi_err_text());
}

static void on_no_directory(void *context)
{
    struct program *self = context;
    log_line(LOG_WARN, "no directory yet; requests fail until a coordinator answers: %s",
             gateway_trouble_view(self->gateway));
    announce(self);
}

static enum odsi_err open_state(struct program *self)
{
    if (self->flags.state_dir) {
        snprintf(self->state_dir, sizeof self->state_dir, "%s", self->flags.state_dir);
    } else {
        char home[IO_PATH_SIZE - 32];
        const enum odsi_err err = identity_home(home, sizeof home);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "no place for state; give --state-dir FOLDER");
        snprintf(self->state_dir, sizeof self->state_dir, "%s/gateway", home);
    }
    const enum odsi_err err = io_make_folders(self->state_dir, 0700);
    if (err != ODSI_OK)
        return err;
    return daemon_open_identity(&self->identity, self->flags.identity, self->state_dir,
                                "identity.pem");
}

static enum odsi_err open_gateway(struct program *self)
{
    const struct gateway_config config = {
        .loop = self->loop,
        .identity = self->identity,
        .coordinators = self->flags.coordinator,
        .state_dir = self->state_dir,
        .answers_max = self->flags.sessions_max,
        .open_timeout_us = (uint64_t)self->flags.open_timeout_ms * 1000,
        .stall_timeout_us = (uint64_t)self->flags.stall_timeout_ms * 1000,
        .on_ready = on_ready,
        .context = self,
    };
    return gateway_open(&self->gateway, &config);
}

static enum odsi_err open_server(struct program *self)
{
    enum odsi_err err = inference_service_open(&self->service, self->gateway);
    if (err != ODSI_OK)
        return err;
    const struct rpc_server_config config = {
        .listen = self->flags.listen,
        .identity = self->flags.insecure ? NULL : self->identity,
        .services = inference_service_rpc_view(self->service),
        .service_count = 1,
    };
    return rpc_server_open(&self->server, self->loop, &config);
}

static enum odsi_err open_all(struct program *self)
{
    enum odsi_err err = rpc_loop_open(&self->loop);
    if (err == ODSI_OK)
        err = rpc_loop_on_terminate(self->loop, terminate, self);
    if (err == ODSI_OK)
        err = open_state(self);
    if (err == ODSI_OK)
        err = open_gateway(self);
    if (err == ODSI_OK)
        err = open_server(self);
    if (err == ODSI_OK)
        err = rpc_timer_start(&self->ready_timer, self->loop, READY_MAX_US, on_no_directory, self);
    return err;
}

static int run(struct program *self)
{
    daemon_withdraw(self->flags.ready_file);
    if (open_all(self) != ODSI_OK) {
        fprintf(stderr, "odsi-gateway: %s\n", odsi_err_text());
        self->failed = 1;
        if (self->loop)
            stop(self); /* what is open already closes on the loop */
    }
    if (self->loop)
        rpc_loop_run(self->loop);
    inference_service_close(&self->service);
    rpc_loop_close(&self->loop);
    identity_close(&self->identity);
    return self->failed;
}

int main(int argc, char **argv)
{
    static struct program self = {.flags = {.listen = "127.0.0.1:7800",
                                            .log_level = "info",
                                            .sessions_max = 1024,
                                            .open_timeout_ms = 10000,
                                            .stall_timeout_ms = 120000}};
    struct flags *flags = &self.flags;
    const struct args_option options[] = {
        {"coordinator", 'c', ARGS_TEXT, &flags->coordinator, "[ID@]HOST:PORT[,...]",
         "who knows the workers; several for one swarm, tried in turn"},
        {"listen", 'l', ARGS_TEXT, &flags->listen, "HOST:PORT",
         "where clients call (127.0.0.1:7800; port 0: any free one)"},
        {"insecure", 0, ARGS_FLAG, &flags->insecure, NULL,
         "clients call in plaintext, on this machine only; workers are always called by mTLS"},
        {"identity", 'i', ARGS_TEXT, &flags->identity, "FILE",
         "our key (STATE_DIR/identity.pem; made when there is none)"},
        {"state-dir", 0, ARGS_TEXT, &flags->state_dir, "FOLDER",
         "where directory, models and known peers are kept ($ODSI_HOME/gateway)"},
        {"sessions-max", 0, ARGS_U32, &flags->sessions_max, "N", "answers at a time (1024)"},
        {"open-timeout-ms", 0, ARGS_U32, &flags->open_timeout_ms, "MS",
         "for a worker to open a session, before another is tried (10000)"},
        {"stall-timeout-ms", 0, ARGS_U32, &flags->stall_timeout_ms, "MS",
         "without any token, before another path is tried (120000)"},
        {"ready-file", 0, ARGS_TEXT, &flags->ready_file, "FILE",
         "written with one line, [ID@]host:port, once it serves"},
        {"log-level", 0, ARGS_TEXT, &flags->log_level, "LEVEL", "error, warn, info, debug (info)"},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi-gateway",
        .summary = "Answers clients with text that the workers of a swarm generate.",
        .usage = "[options] --coordinator [ID@]HOST:PORT",
        .examples = "  odsi-gateway --coordinator coord.example:7600 --insecure\n"
                    "  odsi-gateway --coordinator 127.0.0.1:7600,127.0.0.1:7601 --listen :7800\n",
        .options = options,
    };
    struct args *args = NULL;
    int rest = 0;
    int code = 0;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    if (outcome != ARGS_RUN) {
        code = outcome == ARGS_EXIT_OK ? 0 : 2;
    } else if (rest < argc || !flags->coordinator || flags->sessions_max == 0 ||
               log_setup("odsi-gateway", flags->log_level) != ODSI_OK) {
        fprintf(stderr, "odsi-gateway: %s; see --help\n",
                rest < argc                ? "what stands behind the options is not understood"
                : !flags->coordinator      ? "--coordinator is needed"
                : flags->sessions_max == 0 ? "--sessions-max must be at least 1"
                                           : odsi_err_text());
        code = 2;
    } else {
        daemon_survive_file_limit();
        code = run(&self);
    }
    args_close(&args);
    return code;
}
