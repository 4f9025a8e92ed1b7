#include "worker/gateway/gateway.h"

#include "common/base/alloc.h"
#include "common/base/io.h"
#include "common/base/log.h"
#include "worker/gateway/directory_client.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>

/* Paths tried in a row before an answer fails. */
#define REROUTE_MAX 4u

struct gateway {
    struct gateway_config config;
    struct directory *directory;
    struct directory_client *directory_client;
    struct worker_book *book;
    struct prefix_book *prefixes;
    struct worker_link_client *links;
    struct model_store *store;
    struct model_fetch *fetch;
    struct encoder *encoder;
    struct answer_context answers;
    int ready_told;
    uint32_t closing_parts;
    void (*on_closed)(void *context);
    void *closed_context;
};

/* Guessable, it would let workers test guesses at a prompt. */
static enum odsi_err make_seed(struct digest *out)
{
    if (getrandom(out->bytes, sizeof out->bytes, 0) == (ssize_t)sizeof out->bytes)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_IO, "the system gives no random bytes: %s", strerror(errno));
}

static uint32_t random_next(void *context)
{
    uint32_t value = 0;
    (void)context;
    /* Only spreads load: without random bytes the first of equals is taken. */
    if (getrandom(&value, sizeof value, 0) != (ssize_t)sizeof value)
        value = 0;
    return value;
}

static void tell_ready(struct gateway *self)
{
    if (self->ready_told)
        return;
    self->ready_told = 1;
    if (self->config.on_ready)
        self->config.on_ready(self->config.context);
}

static void on_update(void *context, int members_changed)
{
    struct gateway *self = context;
    if (members_changed)
        worker_book_prune(self->book, self->directory);
    tell_ready(self);
}

static enum odsi_err state_path(const struct gateway_config *config, char *out, const char *name)
{
    const int size = snprintf(out, IO_PATH_SIZE, "%s/%s", config->state_dir, name);
    if (size < 0 || (unsigned)size >= IO_PATH_SIZE)
        return odsi_fail(ODSI_ERR_RANGE, "--state-dir: the path is too long");
    return ODSI_OK;
}

static enum odsi_err open_directory(struct gateway *self)
{
    char cache[IO_PATH_SIZE];
    char known_peers[IO_PATH_SIZE];
    enum odsi_err err = state_path(&self->config, cache, "directory");
    if (err == ODSI_OK)
        err = state_path(&self->config, known_peers, "known_peers");
    if (err == ODSI_OK)
        err = directory_open(&self->directory);
    if (err != ODSI_OK)
        return err;
    const struct directory_client_config config = {
        .coordinators = self->config.coordinators,
        .identity = self->config.identity,
        .known_peers_path = known_peers,
        .cache_path = cache,
        .directory = self->directory,
        .on_update = on_update,
        .context = self,
    };
    /* What was kept serves until a coordinator answers. */
    const enum odsi_err loaded = directory_load(self->directory, cache);
    if (loaded != ODSI_OK && loaded != ODSI_ERR_NOT_FOUND)
        log_line(LOG_WARN, "the kept directory is not used: %s", odsi_err_text());
    return directory_client_open(&self->directory_client, self->config.loop, &config);
}

static enum odsi_err open_parts(struct gateway *self)
{
    char models[IO_PATH_SIZE];
    struct rpc_loop *loop = self->config.loop;
    enum odsi_err err = state_path(&self->config, models, "models");
    if (err == ODSI_OK)
        err = worker_book_open(&self->book);
    if (err == ODSI_OK)
        err = prefix_book_open(&self->prefixes);
    if (err == ODSI_OK)
        err = model_store_open(&self->store, models);
    if (err == ODSI_OK)
        err = worker_link_client_open(&self->links, loop, self->config.identity);
    if (err == ODSI_OK)
        err = encoder_open(&self->encoder, loop);
    if (err == ODSI_OK)
        err = open_directory(self);
    if (err == ODSI_OK)
        err = model_fetch_open(&self->fetch, self->store, self->directory, self->links);
    return err;
}

static void free_parts(struct gateway *self)
{
    encoder_close(&self->encoder);
    model_fetch_close(&self->fetch);
    model_store_close(&self->store);
    worker_book_close(&self->book);
    prefix_book_close(&self->prefixes);
    directory_close(&self->directory);
    alloc_free(self);
}

enum odsi_err gateway_open(struct gateway **out, const struct gateway_config *config)
{
    struct gateway *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->config = *config;
    err = make_seed(&self->answers.prefix_seed);
    if (err == ODSI_OK)
        err = open_parts(self);
    if (err != ODSI_OK) {
        directory_client_close(&self->directory_client, NULL, NULL);
        worker_link_client_close(&self->links, NULL, NULL);
        free_parts(self);
        return err;
    }
    self->answers = (struct answer_context){
        .loop = config->loop,
        .directory = self->directory,
        .book = self->book,
        .prefixes = self->prefixes,
        .links = self->links,
        .models = self->fetch,
        .encoder = self->encoder,
        .random = {random_next, NULL},
        .prefix_seed = self->answers.prefix_seed,
        .open_timeout_us = config->open_timeout_us,
        .stall_timeout_us = config->stall_timeout_us,
        .reroute_max = REROUTE_MAX,
        .count_max = config->answers_max,
    };
    *out = self;
    if (directory_is_known(self->directory))
        tell_ready(self);
    return ODSI_OK;
}

static void finish_close(void *context)
{
    struct gateway *self = context;
    void (*on_closed)(void *context) = self->on_closed;
    void *closed_context = self->closed_context;
    free_parts(self);
    if (on_closed)
        on_closed(closed_context);
}

/* A part has closed; what the encoder posted before runs before the last of us. */
static void part_closed(void *context)
{
    struct gateway *self = context;
    if (--self->closing_parts > 0)
        return;
    if (rpc_loop_post(self->config.loop, finish_close, self) != ODSI_OK)
        finish_close(self);
}

void gateway_close(struct gateway **self_pointer, void (*on_closed)(void *context), void *context)
{
    struct gateway *self = *self_pointer;
    *self_pointer = NULL;
    if (!self)
        return;
    self->on_closed = on_closed;
    self->closed_context = context;
    self->closing_parts = 3;
    self->ready_told = 1;
    answer_abort_all(&self->answers, ODSI_ERR_UNAVAILABLE, "the gateway is stopping");
    encoder_close(&self->encoder);
    directory_client_close(&self->directory_client, part_closed, self);
    worker_link_client_close(&self->links, part_closed, self);
    part_closed(self);
}

struct answer_context *gateway_answers(struct gateway *self)
{
    return &self->answers;
}

const struct directory *gateway_directory_view(const struct gateway *self)
{
    return self->directory;
}

const char *gateway_trouble_view(const struct gateway *self)
{
    return directory_client_trouble_view(self->directory_client);
}
