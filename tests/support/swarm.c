#include "tests/support/swarm.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

#include <criterion/criterion.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#define START_US 60000000u
#define STOP_US  5000000u
#define ARGS_MAX 48u

/* Starts program with "--flag=FOLDER/NAME.ext" texts already in args, and reads its ready file. */
static struct process *start(struct swarm *self, const char *program, const char *name,
                             const char *const *args, char *address)
{
    struct process *process = NULL;
    char ready[PROCESS_PATH_SIZE], ready_flag[PROCESS_PATH_SIZE + 16], file[64];
    char identity_flag[PROCESS_PATH_SIZE + 16];
    const char *all[ARGS_MAX];
    size_t count = 0;
    for (; args[count]; count++) {
        ODSI_ASSERT(count + 4 < ARGS_MAX);
        all[count] = args[count];
    }
    snprintf(file, sizeof file, "%s.ready", name);
    cr_assert_eq(process_path(ready, self->folder, file), ODSI_OK);
    snprintf(ready_flag, sizeof ready_flag, "--ready-file=%s", ready);
    snprintf(identity_flag, sizeof identity_flag, "--identity=%s/%s.pem", self->folder, name);
    all[count++] = ready_flag;
    all[count++] = identity_flag;
    all[count] = NULL;
    const struct process_config config = {
        .program = program, .args = all, .folder = self->folder, .name = name};
    cr_assert_eq(process_start(&process, &config), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_wait_line(process, ready, START_US, address, 512), ODSI_OK, "%s: %s", name,
                 odsi_err_text());
    return process;
}

static void start_worker(struct swarm *self, const struct swarm_config *config, uint32_t index)
{
    char name[32], layers[64], coordinator[600], state[PROCESS_PATH_SIZE + 32];
    const char *args[ARGS_MAX] = {
        "--cpu", "--listen=127.0.0.1:0", "--kv-memory=16M", layers, coordinator, state};
    size_t count = 6;
    const uint32_t shard_count = config->shard_count ? config->shard_count : config->worker_count;
    const uint32_t shard = index % shard_count;
    const uint32_t first = shard * config->layer_count / shard_count;
    const uint32_t end = (shard + 1) * config->layer_count / shard_count;
    snprintf(name, sizeof name, "worker-%u", index);
    snprintf(layers, sizeof layers, "--layers=%u-%u", first, end - 1);
    snprintf(coordinator, sizeof coordinator, "--coordinator=%s", self->coordinator_address);
    snprintf(state, sizeof state, "--state-dir=%s/state", self->folder);
    args[count++] = "--model";
    args[count++] = config->model;
    args[count++] = "--threads=1";
    for (size_t i = 0; config->worker_args && config->worker_args[i]; i++)
        args[count++] = config->worker_args[i];
    args[count] = NULL;
    self->workers[index] = start(self, "odsi-worker", name, args, self->worker_addresses[index]);
}

void swarm_open(struct swarm *self, const struct swarm_config *config)
{
    char store[PROCESS_PATH_SIZE + 32], coordinator[600], state[PROCESS_PATH_SIZE + 32];
    memset(self, 0, sizeof *self);
    self->worker_count = config->worker_count;
    cr_assert_eq(process_folder_make(self->folder), ODSI_OK);
    snprintf(store, sizeof store, "--store=sqlite:%s/odsi.db", self->folder);
    const char *const coordinator_args[] = {"--listen=127.0.0.1:0", store, "--heartbeat-ms=200",
                                            NULL};
    self->coordinator =
        start(self, "odsi-coordinator", "coordinator", coordinator_args, self->coordinator_address);
    for (uint32_t i = 0; i < config->worker_count; i++)
        start_worker(self, config, i);
    snprintf(coordinator, sizeof coordinator, "--coordinator=%s", self->coordinator_address);
    snprintf(state, sizeof state, "--state-dir=%s/gateway", self->folder);
    const char *const gateway_args[] = {"--listen=127.0.0.1:0", "--insecure", coordinator, state,
                                        NULL};
    self->gateway = start(self, "odsi-gateway", "gateway", gateway_args, self->gateway_address);
}

static void stop(struct process **process, const char *name)
{
    int code = -1;
    if (!*process)
        return;
    process_signal(*process, SIGTERM);
    cr_expect_eq(process_wait(*process, STOP_US, &code), ODSI_OK, "%s does not stop", name);
    cr_expect_eq(code, 0, "%s ended with %d", name, code);
    if (code != 0) {
        char *log = NULL;
        if (process_read_log(&log, *process) == ODSI_OK)
            cr_log_error("%s: %s", name, log);
        alloc_free(log);
    }
    process_close(process);
}

void swarm_close(struct swarm *self)
{
    char name[32];
    stop(&self->gateway, "gateway");
    for (uint32_t i = 0; i < self->worker_count; i++) {
        snprintf(name, sizeof name, "worker-%u", i);
        stop(&self->workers[i], name);
    }
    stop(&self->coordinator, "coordinator");
    process_folder_remove(self->folder);
}

int swarm_generate(struct swarm *self, const char *const *args, char **out_output, char **out_log)
{
    char name[32];
    const char *all[ARGS_MAX] = {"generate", "--json", "--insecure", "--gateway",
                                 self->gateway_address};
    struct process *process = NULL;
    size_t count = 5;
    int code = -1;
    for (size_t i = 0; args[i]; i++) {
        ODSI_ASSERT(count + 1 < ARGS_MAX);
        all[count++] = args[i];
    }
    all[count] = NULL;
    snprintf(name, sizeof name, "generate-%u", self->call_count++);
    const struct process_config config = {
        .program = "odsi", .args = all, .folder = self->folder, .name = name};
    cr_assert_eq(process_start(&process, &config), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_wait(process, START_US, &code), ODSI_OK, "%s", odsi_err_text());
    if (out_output)
        cr_assert_eq(process_read_output(out_output, process), ODSI_OK);
    if (out_log)
        cr_assert_eq(process_read_log(out_log, process), ODSI_OK);
    process_close(&process);
    return code;
}
