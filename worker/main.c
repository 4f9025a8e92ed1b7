/* odsi-worker: holds a range of layers of one model and serves them.
 *
 * The main thread runs the event loop from the start, so that SIGTERM and the coordinator are heard
 * while a loader thread reads the model. Order: identity, port, model, join, weights, serving. */
#include "common/base/args.h"
#include "common/base/clock.h"
#include "common/base/io.h"
#include "common/base/log.h"
#include "common/crypto/identity.h"
#include "common/net/daemon.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"
#include "worker/engine/kv_cache.h"
#include "worker/engine/startup.h"
#include "worker/hop/coordinator_client.h"
#include "worker/hop/hop_service.h"
#include "worker/model/source.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PROGRESS_STEP_US 100000u

struct flags {
    const char *model;
    const char *layers;
    const char *listen;
    const char *advertise;
    const char *coordinator;
    const char *identity;
    const char *state_dir;
    const char *ready_file;
    const char *backend;
    const char *gpu;
    const char *log_level;
    uint32_t threads;
    uint64_t kv_memory;
    int cpu;
};

struct worker {
    struct flags flags;
    char state_dir[512];
    char address[LIMIT_ADDRESS_SIZE]; /* advertised */
    struct identity *identity;
    struct rpc_loop *loop;
    struct rpc_server *server;
    struct hop_service *service;
    struct coordinator_client *coordinator;
    struct model *model;
    struct startup startup;
    uint32_t layer_first, layer_end; /* asked for with --layers; equal: the coordinator chooses */
    pthread_t loader;
    int loader_started;
    struct odsi_failure loader_failure;
    uint64_t progress_us;
    int serving;
    int stopping;
    int exit_code;
};

/* ---- stopping ------------------------------------------------------------------------------- */

static void loop_over(void *context)
{
    struct worker *self = context;
    rpc_loop_stop(self->loop);
}

static void server_closed(void *context)
{
    struct worker *self = context;
    struct hop_service *service = self->service;
    self->service = NULL;
    hop_service_close(service, loop_over, self);
}

static void left_swarm(void *context)
{
    struct worker *self = context;
    coordinator_client_close(&self->coordinator);
    rpc_server_close(self->server, server_closed, self);
    self->server = NULL;
}

/* Leaves the swarm first, so that nobody is sent here any more; then ends what runs. */
static void stop(void *context)
{
    struct worker *self = context;
    if (self->stopping)
        return;
    self->stopping = 1;
    daemon_withdraw(self->flags.ready_file);
    rpc_server_set_serving(self->server, 0);
    if (self->coordinator)
        coordinator_client_leave(self->coordinator, left_swarm, self);
    else
        left_swarm(self);
}

static void terminate(void *context)
{
    struct worker *self = context;
    log_line(LOG_INFO, "stopping");
    stop(self);
}

static void fail(struct worker *self, const char *text)
{
    log_line(LOG_ERROR, "%s", text);
    self->exit_code = 1;
    stop(self);
}

/* ---- loading (loader thread, then its end on the loop) -------------------------------------- */

static void show_progress(void *context, uint64_t done, uint64_t total)
{
    struct worker *self = context;
    const uint64_t now_us = clock_monotonic_us();
    if (!isatty(STDERR_FILENO) || (done < total && now_us - self->progress_us < PROGRESS_STEP_US))
        return;
    self->progress_us = now_us;
    fprintf(stderr, "\rreading the model: %3u%% of %llu MiB%s",
            (unsigned)(total ? done * 100 / total : 100), (unsigned long long)(total >> 20),
            done >= total ? "\n" : "");
}

static void weights_loaded(void *context);
static void model_read(void *context);

static void *load_model(void *context)
{
    struct worker *self = context;
    const enum odsi_err err =
        model_open(&self->model, self->flags.model, self->state_dir, show_progress, self);
    odsi_failure_take(&self->loader_failure, err);
    if (rpc_loop_post(self->loop, model_read, self) != ODSI_OK)
        log_line(LOG_ERROR, "%s", odsi_err_text());
    return NULL;
}

static void *load_weights(void *context)
{
    struct worker *self = context;
    const struct startup_config config = {
        .backend = {.name = self->flags.backend, .thread_count = self->flags.threads},
        .layer_first = self->layer_first,
        .layer_end = self->layer_end,
        .kv_size = self->flags.kv_memory,
        .measure = 1,
        .announces = 1,
        .progress = show_progress,
        .context = self,
    };
    const enum odsi_err err = startup_open(&self->startup, self->model, &config);
    odsi_failure_take(&self->loader_failure, err);
    if (rpc_loop_post(self->loop, weights_loaded, self) != ODSI_OK)
        log_line(LOG_ERROR, "%s", odsi_err_text());
    return NULL;
}

static void start_loader(struct worker *self, void *(*run)(void *context))
{
    if (pthread_create(&self->loader, NULL, run, self) != 0)
        fail(self, "the loader thread could not be started: too many threads");
    else
        self->loader_started = 1;
}

/* Whether the loader's work is of use: it succeeded and nobody asked to stop meanwhile. */
static int end_loader(struct worker *self)
{
    pthread_join(self->loader, NULL);
    self->loader_started = 0;
    if (self->loader_failure.err != ODSI_OK && !self->stopping)
        fail(self, self->loader_failure.text);
    return !self->stopping;
}

/* ---- joining -------------------------------------------------------------------------------- */

static void fill_load(void *context, struct coordinator_load *out)
{
    struct worker *self = context;
    struct executor_load load;
    hop_service_load(self->service, &load);
    out->session_count = load.session_count;
    out->queued_step_count = load.queued_count;
    out->kv_tokens_free = load.kv_tokens_free;
}

static struct coordinator_capability capability_of(const struct worker *self)
{
    const struct model_params *params = model_params_view(self->model);
    const uint64_t page_tokens = engine_kv_tokens_total(self->startup.engine);
    return (struct coordinator_capability){
        .memory_size = model_span_weight_size(self->model, self->layer_first, self->layer_end) +
                       page_tokens / KV_PAGE_TOKENS *
                           kv_cache_page_size(self->layer_end - self->layer_first,
                                              params->kv_head_count, params->head_dim),
        .kv_token_capacity = page_tokens,
        .prefill_tokens_per_s = self->startup.measure.prefill_tokens_per_s,
        .decode_tokens_per_s = self->startup.measure.decode_tokens_per_s,
        .backend = self->startup.backend->ops->name,
        .thread_count = self->startup.backend->thread_count,
    };
}

static void weights_loaded(void *context)
{
    struct worker *self = context;
    if (!end_loader(self))
        return;
    const enum odsi_err err = hop_service_start(self->service, self->model, self->startup.engine,
                                                self->layer_first, self->layer_end);
    if (err != ODSI_OK) {
        fail(self, odsi_err_text());
        return;
    }
    const struct coordinator_capability capability = capability_of(self);
    coordinator_client_set_ready(self->coordinator, &capability, fill_load, self);
    rpc_server_set_serving(self->server, 1);
    self->serving = 1;
    if (daemon_announce("odsi-worker", self->identity, self->address, self->flags.ready_file) !=
        ODSI_OK) {
        fail(self, odsi_err_text());
        return;
    }
    log_line(LOG_INFO,
             "serving layers %u-%u of %s at %s: backend %s, %u threads, prefill %.0f and decode "
             "%.0f tokens/s through these layers",
             self->layer_first, self->layer_end - 1, model_params_view(self->model)->name,
             self->address, self->startup.backend->ops->name, self->startup.backend->thread_count,
             (double)self->startup.measure.prefill_tokens_per_s,
             (double)self->startup.measure.decode_tokens_per_s);
}

/* The coordinator's word on which layers to hold; on a later rejoin they are held already. */
static void assigned(void *context, uint32_t layer_first, uint32_t layer_end)
{
    struct worker *self = context;
    if (self->loader_started || self->serving || self->stopping)
        return;
    if (layer_first >= layer_end || layer_end > model_params_view(self->model)->layer_count) {
        fail(self, "the coordinator assigned layers that this model does not have");
        return;
    }
    self->layer_first = layer_first;
    self->layer_end = layer_end;
    start_loader(self, load_weights);
}

static void lost(void *context, const struct odsi_failure *failure, int retrying)
{
    struct worker *self = context;
    if (retrying)
        log_line(LOG_WARN, "not in the swarm: %s; trying again", failure->text);
    else if (!self->stopping)
        fail(self, failure->text);
}

static void join(struct worker *self)
{
    const struct model_params *params = model_params_view(self->model);
    const struct coordinator_client_config config = {
        .loop = self->loop,
        .addresses = self->flags.coordinator,
        .identity = self->identity,
        .address = self->address,
        .model_id = *model_id_view(self->model),
        .model_name = params->name,
        .layer_count = params->layer_count,
        .context_length = params->context_length,
        .numerics_version = NUMERICS_VERSION,
        .layer_first = self->layer_first,
        .layer_end = self->layer_end,
        .layer_capacity = startup_layer_capacity(self->model),
        .capability = {.memory_size = startup_memory_free()},
        .on_assigned = assigned,
        .on_lost = lost,
        .context = self,
    };
    if (coordinator_client_open(&self->coordinator, &config) != ODSI_OK)
        fail(self, odsi_err_text());
}

static void model_read(void *context)
{
    struct worker *self = context;
    if (!end_loader(self))
        return;
    const struct model_params *params = model_params_view(self->model);
    if (self->layer_end > params->layer_count) {
        odsi_fail(ODSI_ERR_RANGE, "--layers %s: %s has layers 0-%u", self->flags.layers,
                  params->name, params->layer_count - 1);
        fail(self, odsi_err_text());
        return;
    }
    join(self);
}

/* ---- configuration -------------------------------------------------------------------------- */

static enum odsi_err read_layers(struct worker *self)
{
    unsigned first = 0, last = 0;
    int used = 0;
    const char *text = self->flags.layers;
    if (strcmp(text, "auto") == 0)
        return ODSI_OK;
    if (sscanf(text, "%u-%u%n", &first, &last, &used) != 2 || text[used] != '\0' || last < first ||
        last >= LIMIT_LAYERS_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "--layers %s: use FIRST-LAST, such as 0-11, or auto",
                         text);
    self->layer_first = first;
    self->layer_end = last + 1;
    return ODSI_OK;
}

static enum odsi_err read_folders(struct worker *self)
{
    enum odsi_err err = ODSI_OK;
    if (self->flags.state_dir)
        snprintf(self->state_dir, sizeof self->state_dir, "%s", self->flags.state_dir);
    else
        err = identity_home(self->state_dir, sizeof self->state_dir);
    if (err == ODSI_OK)
        err = io_make_folders(self->state_dir, 0700);
    return err;
}

static enum odsi_err check_flags(struct worker *self)
{
    if (!self->flags.model)
        return odsi_fail(ODSI_ERR_INVALID, "--model FILE is missing: which GGUF file or "
                                           "folder to serve");
    if (!self->flags.coordinator)
        return odsi_fail(ODSI_ERR_INVALID, "--coordinator [ID@]HOST:PORT is missing: whom to join");
    if (self->flags.gpu)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "--gpu %s: this build has no CUDA backend; run with --cpu",
                         self->flags.gpu);
    return read_layers(self);
}

/* Where others reach this worker: --advertise, or the listening address with its real port. */
static enum odsi_err set_address(struct worker *self)
{
    const char *text = self->flags.advertise;
    if (!text) {
        if (strncmp(self->flags.listen, "0.0.0.0:", 8) == 0 || self->flags.listen[0] == ':')
            log_line(LOG_WARN, "no --advertise HOST:PORT: only programs on this machine will reach "
                               "this worker");
        return daemon_address(self->address, sizeof self->address, self->flags.listen,
                              rpc_server_port(self->server));
    }
    if (!strrchr(text, ':') || strlen(text) >= sizeof self->address)
        return odsi_fail(ODSI_ERR_INVALID, "--advertise %s: use HOST:PORT", text);
    snprintf(self->address, sizeof self->address, "%s", text);
    return ODSI_OK;
}

/* The width of the residual stream, before the model is hashed: it bounds what the port takes. */
static enum odsi_err read_dim(struct worker *self, uint32_t *dim)
{
    struct source *source = NULL;
    enum odsi_err err = source_open(&source, self->flags.model);
    if (err != ODSI_OK)
        return err;
    *dim = source->params.dim;
    if (*dim == 0 || *dim > LIMIT_DIM_MAX)
        err = odsi_fail(ODSI_ERR_CORRUPT, "%s: %u numbers a position: 1 to %u", self->flags.model,
                        *dim, LIMIT_DIM_MAX);
    source_close(&source);
    return err;
}

static enum odsi_err open_all(struct worker *self)
{
    uint32_t dim = 0;
    enum odsi_err err = check_flags(self);
    daemon_withdraw(self->flags.ready_file); /* of a run that was killed */
    if (err == ODSI_OK)
        err = read_folders(self);
    if (err == ODSI_OK)
        err = daemon_open_identity(&self->identity, self->flags.identity, self->state_dir,
                                   "worker.pem");
    if (err == ODSI_OK)
        err = rpc_loop_open(&self->loop);
    if (err == ODSI_OK)
        err = rpc_loop_on_terminate(self->loop, terminate, self);
    if (err == ODSI_OK)
        err = read_dim(self, &dim);
    if (err == ODSI_OK)
        err = hop_service_open(&self->service, self->loop, self->identity, dim);
    if (err != ODSI_OK)
        return err;
    const struct rpc_server_config config = {.listen = self->flags.listen,
                                             .identity = self->identity,
                                             .services = hop_service_rpc_view(self->service),
                                             .service_count = 1};
    err = rpc_server_open(&self->server, self->loop, &config);
    if (err == ODSI_OK)
        err = set_address(self);
    if (err == ODSI_OK)
        rpc_server_set_serving(self->server, 0);
    return err;
}

static void run(struct worker *self)
{
    start_loader(self, load_model);
    rpc_loop_run(self->loop);
    if (self->loader_started)
        pthread_join(self->loader, NULL);
}

/* Undoes a start that failed half-way. */
static void give_up(struct worker *self)
{
    if (self->server) {
        stop(self);
        rpc_loop_run(self->loop);
    } else if (self->service) {
        hop_service_close(self->service, NULL, NULL); /* no links yet: at once */
    }
}

static void close_all(struct worker *self)
{
    startup_close(&self->startup);
    model_close(&self->model);
    rpc_loop_close(&self->loop);
    identity_close(&self->identity);
}

static enum args_outcome read_flags(struct flags *flags, struct args **args, int argc, char **argv)
{
    const struct args_option options[] = {
        {"model", 'm', ARGS_TEXT, &flags->model, "FILE",
         "the model to serve (GGUF file or folder)"},
        {"coordinator", 'c', ARGS_TEXT, &flags->coordinator, "[ID@]HOST:PORT",
         "whom to join; several, comma-separated, are tried in turn"},
        {"layers", 'l', ARGS_TEXT, &flags->layers, "A-B",
         "layers to hold (default auto: what the swarm needs most and this machine can hold)"},
        {"cpu", 0, ARGS_FLAG, &flags->cpu, NULL, "compute on the CPU (the default of this build)",
         1}, /* ODSI_CPU says which instruction sets may be used (kernels/backend.h) */
        {"gpu", 0, ARGS_TEXT, &flags->gpu, "N", "compute on this GPU"},
        {"threads", 't', ARGS_U32, &flags->threads, "N", "threads to compute with (default: all)"},
        {"backend", 0, ARGS_TEXT, &flags->backend, "NAME", "auto, scalar, avx2 or avx512"},
        {"kv-memory", 0, ARGS_U64, &flags->kv_memory, "BYTES",
         "memory for sessions (default: 16 full contexts, at most a quarter of free memory)"},
        {"listen", 0, ARGS_TEXT, &flags->listen, "HOST:PORT",
         "where to listen (default 0.0.0.0:7700; port 0: any)"},
        {"advertise", 0, ARGS_TEXT, &flags->advertise, "HOST:PORT",
         "where others reach this worker (default: the listening address)"},
        {"identity", 0, ARGS_TEXT, &flags->identity, "FILE",
         "this worker's key, made on first start (default STATE-DIR/worker.pem)"},
        {"state-dir", 0, ARGS_TEXT, &flags->state_dir, "DIR",
         "key and caches (default $ODSI_HOME or ~/.local/state/odsi)"},
        {"ready-file", 0, ARGS_TEXT, &flags->ready_file, "FILE",
         "written with ID@HOST:PORT once serving"},
        {"log-level", 0, ARGS_TEXT, &flags->log_level, "LEVEL", "error, warn, info or debug"},
        {NULL, 0, ARGS_FLAG, NULL, NULL, NULL},
    };
    const struct args_program program = {
        .name = "odsi-worker",
        .summary = "Serves a range of layers of one model to a swarm.",
        .usage = "[options] --model FILE --coordinator [ID@]HOST:PORT",
        .examples = "odsi-worker --cpu --threads 8 --model llama-3.1-8b-q8_0.gguf "
                    "--coordinator coord.example:7600\n"
                    "odsi-worker --model m.gguf --layers 0-11 --listen 0.0.0.0:7700 "
                    "--advertise my.host:7700 --coordinator coord.example:7600\n"
                    "\nCtrl-C leaves the swarm and stops.",
        .options = options,
    };
    int rest = 0;
    const enum args_outcome outcome = args_read(args, &program, argc, argv, &rest);
    if (outcome != ARGS_RUN || rest == argc)
        return outcome;
    fprintf(stderr, "odsi-worker: unexpected argument '%s'; see --help\n", argv[rest]);
    return ARGS_EXIT_USAGE;
}

int main(int argc, char **argv)
{
    struct worker worker = {
        .flags = {
            .listen = "0.0.0.0:7700", .layers = "auto", .backend = "auto", .log_level = "info"}};
    struct args *args = NULL;
    const enum args_outcome outcome = read_flags(&worker.flags, &args, argc, argv);
    if (outcome != ARGS_RUN) {
        args_close(&args);
        return outcome == ARGS_EXIT_OK ? 0 : 2;
    }
    enum odsi_err err = log_setup("odsi-worker", worker.flags.log_level);
    if (err == ODSI_OK)
        daemon_survive_file_limit();
    if (err == ODSI_OK)
        err = open_all(&worker);
    if (err == ODSI_OK) {
        run(&worker);
    } else {
        fprintf(stderr, "odsi-worker: %s\n", odsi_err_text());
        worker.exit_code = err == ODSI_ERR_INVALID || err == ODSI_ERR_UNSUPPORTED ? 2 : 1;
        give_up(&worker);
    }
    close_all(&worker);
    args_close(&args);
    return worker.exit_code;
}
