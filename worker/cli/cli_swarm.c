#include "worker/cli/cli_swarm.h"

#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_client.h"
#include "worker/cli/cli_child.h"
#include "worker/cli/cli_client.h"
#include "worker/cli/cli_text.h"
#include "worker/model/model.h"
#include "worker/model/source.h"

#include <errno.h>
#include <ftw.h>
#include <inttypes.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_SIZE          CLI_CHILD_PATH_SIZE
#define ADDRESS_SIZE       (DIGEST_HEX_SIZE + LIMIT_ADDRESS_SIZE)
#define ARGUMENTS_MAX      32u
#define STOP_GRACE_US      3000000u
#define POLL_MS            30u
#define ASK_TIMEOUT_US     1000000u
#define FOLDERS_OPEN_MAX   16
#define LISTEN_ANY_LOCAL   "127.0.0.1:0"
#define COORDINATOR_INDEX  0u
#define GATEWAY_INDEX      1u
#define FIRST_WORKER_INDEX 2u
#define MEMBERS_MAX        (CLI_SWARM_WORKERS_MAX + FIRST_WORKER_INDEX)

/* One process of the swarm. */
struct member {
    char name[CLI_CHILD_NAME_SIZE];
    struct cli_child child;
    struct digest id;
    char address[LIMIT_ADDRESS_SIZE]; /* host:port; "" until it is ready */
};

struct cli_swarm {
    struct cli_swarm_config config;
    struct cli_span spans[LIMIT_STAGES_MAX];
    uint32_t shard_count;
    uint32_t layer_count;
    char bin_dir[PATH_SIZE];
    char dir[PATH_SIZE]; /* "" before it is made */
    struct cli_env environment;
    struct member members[MEMBERS_MAX];
    uint32_t member_count;
    struct cli_client *client; /* of the gateway, once it has an address */
};

/* ---- opening --------------------------------------------------------------------------------- */

static enum odsi_err path_join(char out[PATH_SIZE], const char *dir, const char *name,
                               const char *suffix)
{
    const int length = snprintf(out, PATH_SIZE, "%s/%s%s", dir, name, suffix);
    if (length < 0 || (unsigned)length >= PATH_SIZE)
        return odsi_fail(ODSI_ERR_RANGE, "%.64s...: this path is too long", dir);
    return ODSI_OK;
}

/* The number of layers, from the description alone: a mistake in the flags should not wait until
 * all the weights are hashed. */
static enum odsi_err read_layer_count(uint32_t *out, const char *path)
{
    struct source *source = NULL;
    enum odsi_err err = source_open(&source, path);
    if (err != ODSI_OK)
        return err;
    *out = source->params.layer_count;
    if (*out == 0 || *out > LIMIT_LAYERS_MAX)
        err = odsi_fail(ODSI_ERR_CORRUPT, "%s: %" PRIu32 " layers", path, *out);
    source_close(&source);
    return err;
}

static enum odsi_err find_programs(struct cli_swarm *self)
{
    static const char *const programs[] = {"odsi-coordinator", "odsi-gateway", "odsi-worker"};
    char path[PATH_SIZE];
    const ssize_t size = readlink("/proc/self/exe", self->bin_dir, sizeof self->bin_dir - 1);
    if (size <= 0)
        return odsi_fail(ODSI_ERR_IO, "/proc/self/exe: %s", strerror(errno));
    self->bin_dir[size] = '\0';
    *strrchr(self->bin_dir, '/') = '\0'; /* the link is an absolute path */
    for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
        const enum odsi_err err = path_join(path, self->bin_dir, programs[i], "");
        if (err != ODSI_OK)
            return err;
        if (access(path, X_OK) != 0)
            return odsi_fail(ODSI_ERR_NOT_FOUND,
                             "%s: %s; the programs of a swarm must lie beside this one", path,
                             strerror(errno));
    }
    return ODSI_OK;
}

static enum odsi_err make_plan(struct cli_swarm *self)
{
    const struct cli_swarm_config *config = &self->config;
    const uint32_t wanted = config->shard_count ? config->shard_count : config->worker_count;
    enum odsi_err err = ODSI_OK;
    if (config->worker_count == 0 || config->worker_count > CLI_SWARM_WORKERS_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "%" PRIu32 " workers: use 1 to %u", config->worker_count,
                         CLI_SWARM_WORKERS_MAX);
    self->shard_count = wanted;
    if (config->layers)
        err = cli_split_read(self->spans, &self->shard_count, self->layer_count, config->layers);
    else
        err = cli_split_balanced(self->spans, self->layer_count, wanted);
    if (err != ODSI_OK)
        return err;
    if (config->shard_count && self->shard_count != config->shard_count)
        return odsi_fail(ODSI_ERR_INVALID,
                         "--layers has %" PRIu32 " ranges, --shards says %" PRIu32,
                         self->shard_count, config->shard_count);
    if (self->shard_count > config->worker_count)
        return odsi_fail(ODSI_ERR_INVALID,
                         "%" PRIu32 " shards need as many workers at least, not %" PRIu32,
                         self->shard_count, config->worker_count);
    return ODSI_OK;
}

static enum odsi_err make_folder(struct cli_swarm *self)
{
    const char *parent = getenv("TMPDIR");
    char path[PATH_SIZE];
    enum odsi_err err =
        path_join(path, parent && parent[0] ? parent : "/tmp", "odsi-local-XXXXXX", "");
    if (err != ODSI_OK)
        return err;
    if (!mkdtemp(path))
        return odsi_fail(ODSI_ERR_IO, "%s: %s", path, strerror(errno));
    snprintf(self->dir, sizeof self->dir, "%s", path);
    return ODSI_OK;
}

/* The folder of the programs' own files: home for caches, and one folder for each member. */
static enum odsi_err add_member(struct cli_swarm *self, const char *name)
{
    struct member *member = &self->members[self->member_count++];
    struct identity *identity = NULL;
    char path[PATH_SIZE];
    snprintf(member->name, sizeof member->name, "%s", name);
    enum odsi_err err = path_join(path, self->dir, name, "");
    if (err == ODSI_OK && mkdir(path, 0700) != 0)
        err = odsi_fail(ODSI_ERR_IO, "%s: %s", path, strerror(errno));
    if (err == ODSI_OK)
        err = path_join(path, self->dir, name, ".pem");
    /* Made here, so that whoever needs an id has it before the process runs. */
    if (err == ODSI_OK)
        err = identity_open(&identity, path, 1, NULL);
    if (err == ODSI_OK)
        member->id = *identity_id_view(identity);
    identity_close(&identity);
    return err;
}

static enum odsi_err add_members(struct cli_swarm *self)
{
    extern char **environ;
    enum odsi_err err = add_member(self, "coordinator");
    if (err == ODSI_OK)
        err = add_member(self, "gateway");
    for (uint32_t i = 0; err == ODSI_OK && i < self->config.worker_count; i++) {
        char name[CLI_CHILD_NAME_SIZE];
        snprintf(name, sizeof name, "worker-%" PRIu32, i);
        err = add_member(self, name);
    }
    if (err == ODSI_OK)
        err = cli_env_copy(&self->environment, environ, cli_env_keep_for_server);
    if (err == ODSI_OK)
        err = cli_env_set(&self->environment, "ODSI_HOME", self->dir);
    return err;
}

enum odsi_err cli_swarm_open(struct cli_swarm **out, const struct cli_swarm_config *config)
{
    struct cli_swarm *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->config = *config;
    err = read_layer_count(&self->layer_count, config->model_path);
    if (err == ODSI_OK)
        err = make_plan(self);
    if (err == ODSI_OK)
        err = find_programs(self);
    if (err == ODSI_OK)
        err = make_folder(self);
    if (err == ODSI_OK)
        err = add_members(self);
    if (err != ODSI_OK) {
        cli_swarm_close(&self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

/* ---- starting -------------------------------------------------------------------------------- */

/* Arguments of a program, each text copied into one buffer of fixed places. */
struct arguments {
    char texts[ARGUMENTS_MAX][PATH_SIZE];
    char *argv[ARGUMENTS_MAX + 1];
    uint32_t count;
    enum odsi_err err;
};

static void add_argument(struct arguments *self, const char *format, ...) ODSI_PRINTF(2, 3);
static void add_argument(struct arguments *self, const char *format, ...)
{
    va_list args;
    if (self->err != ODSI_OK)
        return;
    if (self->count == ARGUMENTS_MAX) {
        self->err = odsi_fail(ODSI_ERR_INTERNAL, "more than %u arguments", ARGUMENTS_MAX);
        return;
    }
    char *text = self->texts[self->count];
    va_start(args, format);
    const int length = vsnprintf(text, PATH_SIZE, format, args);
    va_end(args);
    if (length < 0 || (unsigned)length >= PATH_SIZE)
        self->err = odsi_fail(ODSI_ERR_RANGE, "'%.64s...' is too long", text);
    self->argv[self->count++] = text;
    self->argv[self->count] = NULL;
}

/* Starts member `index` with the arguments that all programs share, then those of `own`. */
static enum odsi_err start_member(struct cli_swarm *self, uint32_t index, const char *program,
                                  void (*own)(const struct cli_swarm *self, uint32_t index,
                                              struct arguments *arguments))
{
    struct member *member = &self->members[index];
    struct arguments *arguments = NULL;
    enum odsi_err err = alloc_zeroed(&arguments, 1, sizeof *arguments);
    if (err != ODSI_OK)
        return err;
    add_argument(arguments, "%s/%s", self->bin_dir, program);
    add_argument(arguments, "--listen=" LISTEN_ANY_LOCAL);
    add_argument(arguments, "--identity=%s/%s.pem", self->dir, member->name);
    add_argument(arguments, "--ready-file=%s/%s.ready", self->dir, member->name);
    add_argument(arguments, "--log-level=%s", self->config.log_level);
    own(self, index, arguments);
    err = arguments->err;
    if (err == ODSI_OK) {
        const struct cli_child_config child = {
            .name = member->name,
            .dir = self->dir,
            .argv = arguments->argv,
            .environment = self->environment.items,
        };
        err = cli_child_start(&member->child, &child);
    }
    alloc_free(arguments);
    return err;
}

/* ID@host:port */
static void text_of_coordinator(const struct cli_swarm *self, char out[ADDRESS_SIZE])
{
    const struct member *coordinator = &self->members[COORDINATOR_INDEX];
    char id[DIGEST_HEX_SIZE];
    digest_to_hex(id, &coordinator->id);
    snprintf(out, ADDRESS_SIZE, "%s@%s", id, coordinator->address);
}

static void coordinator_arguments(const struct cli_swarm *self, uint32_t index,
                                  struct arguments *out)
{
    add_argument(out, "--store=sqlite:%s/%s/odsi.db", self->dir, self->members[index].name);
}

static void gateway_arguments(const struct cli_swarm *self, uint32_t index, struct arguments *out)
{
    char coordinator[ADDRESS_SIZE];
    text_of_coordinator(self, coordinator);
    add_argument(out, "--coordinator=%s", coordinator);
    add_argument(out, "--state-dir=%s/%s", self->dir, self->members[index].name);
    add_argument(out, "--insecure");
}

static void worker_arguments(const struct cli_swarm *self, uint32_t index, struct arguments *out)
{
    const uint32_t worker = index - FIRST_WORKER_INDEX;
    const struct cli_span *span = &self->spans[worker % self->shard_count];
    char coordinator[ADDRESS_SIZE], layers[CLI_TEXT_SIZE];
    text_of_coordinator(self, coordinator);
    cli_text_layers(layers, span->layer_first, span->layer_end);
    add_argument(out, "--cpu");
    add_argument(out, "--model=%s", self->config.model_path);
    add_argument(out, "--threads=%" PRIu32, self->config.thread_count);
    add_argument(out, "--layers=%s", layers);
    add_argument(out, "--coordinator=%s", coordinator);
    /* Shared: what one of them learnt about the model file, the others need not hash again. */
    add_argument(out, "--state-dir=%s/state", self->dir);
}

/* ---- becoming ready -------------------------------------------------------------------------- */

/* Reads a ready file, one whole line "[ID@]host:port"; the address stays "" until it is there. */
static enum odsi_err read_ready(const struct cli_swarm *self, struct member *member)
{
    char path[PATH_SIZE], line[ADDRESS_SIZE] = "";
    struct digest id;
    int has_id = 0;
    enum odsi_err err = path_join(path, self->dir, member->name, ".ready");
    if (err != ODSI_OK)
        return err;
    FILE *file = fopen(path, "re");
    if (!file)
        return ODSI_OK;
    char *end = fgets(line, sizeof line, file) ? strchr(line, '\n') : NULL;
    fclose(file);
    if (!end)
        return ODSI_OK;
    *end = '\0';
    return rpc_address_read(line, member->address, &id, &has_id);
}

static enum odsi_err fail_ended(const struct member *member)
{
    char text[ODSI_ERR_TEXT_SIZE];
    cli_child_tell_end(&member->child, text, sizeof text);
    fprintf(stderr, "odsi local: %s; the end of its log:\n", text);
    cli_child_show_log(&member->child, stderr);
    return odsi_fail(ODSI_ERR_UNAVAILABLE, "%s while the swarm was starting", text);
}

/* One look at every process that was started. */
static enum odsi_err look(struct cli_swarm *self)
{
    for (uint32_t i = 0; i < self->member_count; i++) {
        struct member *member = &self->members[i];
        if (member->child.pid == 0)
            continue;
        if (cli_child_ended(&member->child))
            return fail_ended(member);
        if (member->address[0] == '\0') {
            const enum odsi_err err = read_ready(self, member);
            if (err != ODSI_OK)
                return odsi_fail_prefix(err, "%s: its ready file", member->name);
        }
    }
    return ODSI_OK;
}

/* "swarm: 1 of 3 workers ready, waiting for worker-1". */
static void show_waiting(const struct cli_swarm *self, const char *name,
                         struct cli_progress *progress)
{
    uint32_t ready = 0;
    for (uint32_t i = FIRST_WORKER_INDEX; i < self->member_count; i++)
        ready += self->members[i].address[0] != '\0';
    cli_progress_show(progress, "swarm: %" PRIu32 " of %" PRIu32 " workers ready, waiting for %s",
                      ready, self->config.worker_count, name);
}

/* Waits until the members [0, count) have their addresses. */
static enum odsi_err wait_for_members(struct cli_swarm *self, uint32_t count, uint64_t deadline_us,
                                      struct cli_progress *progress)
{
    for (;;) {
        uint32_t missing = count;
        enum odsi_err err = look(self);
        if (err != ODSI_OK)
            return err;
        for (uint32_t i = count; i-- > 0;)
            if (self->members[i].address[0] == '\0')
                missing = i;
        if (missing == count)
            return ODSI_OK;
        const char *name = self->members[missing].name;
        if (clock_monotonic_us() > deadline_us)
            return odsi_fail(ODSI_ERR_TIMEOUT,
                             "%s is not ready after %" PRIu32 " s; give it more with --timeout, or "
                             "look into its log with --keep",
                             name, self->config.ready_timeout_s);
        show_waiting(self, name, progress);
        int is_terminal = 0;
        if (cli_child_wait(POLL_MS, &is_terminal))
            return odsi_fail(ODSI_ERR_CANCELLED, "cancelled");
    }
}

/* Whether the gateway serves every layer, with all workers. */
static int is_complete(struct cli_swarm *self)
{
    struct cli_model_row *rows = NULL;
    uint32_t row_count = 0;
    int complete = 0;
    if (cli_client_models(self->client, ASK_TIMEOUT_US, &rows, &row_count) == ODSI_OK)
        complete = row_count > 0 && rows[0].is_complete &&
                   rows[0].worker_count >= self->config.worker_count;
    alloc_free(rows);
    return complete;
}

static enum odsi_err wait_for_gateway(struct cli_swarm *self, uint64_t deadline_us,
                                      struct cli_progress *progress)
{
    const struct cli_client_config config = {.peer = self->members[GATEWAY_INDEX].address,
                                             .is_insecure = 1};
    enum odsi_err err = cli_client_open(&self->client, &config);
    cli_progress_show(progress,
                      "swarm: %" PRIu32 " workers ready, waiting for the gateway to see them",
                      self->config.worker_count);
    while (err == ODSI_OK && !is_complete(self)) {
        int is_terminal = 0;
        err = look(self);
        if (err == ODSI_OK && clock_monotonic_us() > deadline_us)
            err = odsi_fail(ODSI_ERR_TIMEOUT,
                            "the gateway does not see all workers after %" PRIu32 " s; look into "
                            "the logs with --keep",
                            self->config.ready_timeout_s);
        if (err == ODSI_OK && cli_child_wait(POLL_MS, &is_terminal))
            err = odsi_fail(ODSI_ERR_CANCELLED, "cancelled");
    }
    return err;
}

static void show_hashing(void *context, uint64_t done, uint64_t total)
{
    cli_progress_bytes(context, "swarm: hashing the model", done, total);
}

/* Once for all workers, which find the manifest in the folder of their state. */
static enum odsi_err hash_model(const struct cli_swarm *self, struct cli_progress *progress)
{
    struct model *model = NULL;
    char path[PATH_SIZE];
    enum odsi_err err = path_join(path, self->dir, "state", "");
    if (err == ODSI_OK)
        err = model_open(&model, self->config.model_path, path, show_hashing, progress);
    model_close(&model);
    return err;
}

enum odsi_err cli_swarm_start(struct cli_swarm *self, struct cli_progress *progress)
{
    const uint64_t deadline_us =
        clock_monotonic_us() + (uint64_t)self->config.ready_timeout_s * 1000000;
    enum odsi_err err = hash_model(self, progress);
    if (err == ODSI_OK)
        err = start_member(self, COORDINATOR_INDEX, "odsi-coordinator", coordinator_arguments);
    if (err == ODSI_OK)
        err = wait_for_members(self, COORDINATOR_INDEX + 1, deadline_us, progress);
    if (err == ODSI_OK)
        err = start_member(self, GATEWAY_INDEX, "odsi-gateway", gateway_arguments);
    for (uint32_t i = FIRST_WORKER_INDEX; err == ODSI_OK && i < self->member_count; i++)
        err = start_member(self, i, "odsi-worker", worker_arguments);
    if (err == ODSI_OK)
        err = wait_for_members(self, self->member_count, deadline_us, progress);
    if (err == ODSI_OK)
        err = wait_for_gateway(self, deadline_us, progress);
    cli_progress_clear(progress);
    return err;
}

/* ---- while it is ready ----------------------------------------------------------------------- */

enum odsi_err cli_swarm_environment(const struct cli_swarm *self, struct cli_env *environment)
{
    char coordinator[ADDRESS_SIZE];
    text_of_coordinator(self, coordinator);
    enum odsi_err err =
        cli_env_set(environment, "ODSI_GATEWAY", self->members[GATEWAY_INDEX].address);
    if (err == ODSI_OK)
        err = cli_env_set(environment, "ODSI_INSECURE", "1");
    if (err == ODSI_OK)
        err = cli_env_set(environment, "ODSI_COORDINATOR", coordinator);
    if (err == ODSI_OK)
        err = cli_env_set(environment, "ODSI_LOCAL_DIR", self->dir);
    /* A command's own key belongs to this swarm too, unless the user has chosen a place. */
    const char *home = cli_env_get_view(environment, "ODSI_HOME");
    if (err == ODSI_OK && (!home || home[0] == '\0'))
        err = cli_env_set(environment, "ODSI_HOME", self->dir);
    return err;
}

void cli_swarm_show(const struct cli_swarm *self, FILE *to)
{
    const char *gateway = self->members[GATEWAY_INDEX].address;
    char text[ADDRESS_SIZE];
    fprintf(to, "The swarm is up.\n\n");
    for (uint32_t i = FIRST_WORKER_INDEX; i < self->member_count; i++) {
        const struct cli_span *span = &self->spans[(i - FIRST_WORKER_INDEX) % self->shard_count];
        cli_text_layers(text, span->layer_first, span->layer_end);
        fprintf(to, "  %-10s layers %-8s %s\n", self->members[i].name, text,
                self->members[i].address);
    }
    text_of_coordinator(self, text);
    fprintf(to,
            "\nIn another terminal:\n"
            "  odsi generate --insecure --gateway %s --prompt \"Once upon a time\"\n"
            "  odsi status --coordinator %s\n\n"
            "Logs are in %s. Ctrl-C ends the swarm.\n",
            gateway, text, self->dir);
    fflush(to);
}

uint32_t cli_swarm_watch(struct cli_swarm *self)
{
    uint32_t running = 0;
    for (uint32_t i = 0; i < self->member_count; i++) {
        struct cli_child *child = &self->members[i].child;
        char text[ODSI_ERR_TEXT_SIZE];
        if (cli_child_ended(child)) {
            cli_child_tell_end(child, text, sizeof text);
            fprintf(stderr, "odsi local: %s\n", text);
            /* Who was killed on purpose has nothing to explain. */
            const int code = cli_child_exit_code(child);
            if (code != 0 && code != 128 + SIGKILL && code != 128 + SIGTERM)
                cli_child_show_log(child, stderr);
        }
        running += child->is_running != 0;
    }
    return running;
}

/* ---- the end --------------------------------------------------------------------------------- */

/* Sends signal_number to the members [first, end) and waits until they have ended, at most until
 * deadline_us; returns how many have not. */
static uint32_t end_members(struct cli_swarm *self, uint32_t first, uint32_t end, int signal_number,
                            uint64_t deadline_us)
{
    for (uint32_t i = first; i < end; i++)
        cli_child_signal(&self->members[i].child, signal_number);
    for (;;) {
        uint32_t running = 0;
        int is_terminal = 0;
        for (uint32_t i = first; i < end; i++) {
            cli_child_ended(&self->members[i].child);
            running += self->members[i].child.is_running != 0;
        }
        if (running == 0 || clock_monotonic_us() > deadline_us)
            return running;
        if (cli_child_wait(POLL_MS, &is_terminal))
            return running; /* somebody is in a hurry */
    }
}

static int remove_entry(const char *path, const struct stat *status, int kind, struct FTW *walk)
{
    (void)status;
    (void)kind;
    (void)walk;
    remove(path);
    return 0;
}

void cli_swarm_close(struct cli_swarm **self_pointer)
{
    struct cli_swarm *self = *self_pointer;
    if (!self)
        return;
    cli_client_close(&self->client);
    const uint64_t deadline_us = clock_monotonic_us() + STOP_GRACE_US;
    /* The coordinator last: whoever leaves tells it so. */
    end_members(self, GATEWAY_INDEX, self->member_count, SIGTERM, deadline_us);
    end_members(self, COORDINATOR_INDEX, GATEWAY_INDEX, SIGTERM, deadline_us);
    while (end_members(self, COORDINATOR_INDEX, self->member_count, SIGKILL, UINT64_MAX) > 0)
        continue;
    if (self->dir[0] != '\0' && self->config.is_kept)
        fprintf(stderr, "odsi local: everything is kept in %s\n", self->dir);
    else if (self->dir[0] != '\0')
        nftw(self->dir, remove_entry, FOLDERS_OPEN_MAX, FTW_DEPTH | FTW_PHYS);
    cli_env_free(&self->environment);
    alloc_free(self);
    *self_pointer = NULL;
}
