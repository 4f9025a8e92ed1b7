#include "worker/gateway/worker_book.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

#include <string.h>

/* Assumed of a worker nobody knows anything about: the order of a home machine and line. */
#define LAYER_DEFAULT_US   1000u
#define NETWORK_DEFAULT_US 500u
#define LAYER_MAX_US       10000000u
#define WAIT_MAX_US        60000000u
/* A position of a prompt costs about this part of a decode step, when nothing better is known. */
#define PREFILL_PART 4u
/* A session of others slows a step by about this part of it: they compute in turns. */
#define SESSION_PART 4u

struct entry {
    struct digest worker_id;
    struct deadline_estimate layer;
    struct deadline_estimate network;
    uint32_t session_count;
    uint64_t avoid_until_us;
};

struct worker_book {
    struct entry *entries; /* [count], ascending by id */
    uint32_t count;
    uint32_t capacity;
};

enum odsi_err worker_book_open(struct worker_book **out)
{
    return alloc_zeroed(out, 1, sizeof **out);
}

void worker_book_close(struct worker_book **self)
{
    if (!*self)
        return;
    alloc_free((*self)->entries);
    alloc_free(*self);
    *self = NULL;
}

/* Where id is or belongs. */
static uint32_t position_of(const struct worker_book *self, const struct digest *id)
{
    uint32_t low = 0;
    uint32_t high = self->count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (memcmp(self->entries[middle].worker_id.bytes, id->bytes, DIGEST_SIZE) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct entry *find(const struct worker_book *self, const struct digest *id)
{
    const uint32_t at = position_of(self, id);
    return at < self->count && digest_equal(&self->entries[at].worker_id, id) ? &self->entries[at]
                                                                              : NULL;
}

/* NULL when there is no room: an observation less, and no harm. */
static struct entry *find_or_add(struct worker_book *self, const struct digest *id)
{
    struct entry *entry = find(self, id);
    if (entry || self->count >= 2 * LIMIT_MEMBERS_MAX)
        return entry;
    if (self->count == self->capacity) {
        const uint32_t wanted = self->capacity ? 2 * self->capacity : 16;
        if (alloc_resize(&self->entries, wanted, sizeof *self->entries) != ODSI_OK)
            return NULL;
        self->capacity = wanted;
    }
    ODSI_ASSERT(self->entries);
    const uint32_t at = position_of(self, id);
    memmove(&self->entries[at + 1], &self->entries[at], (self->count - at) * sizeof *entry);
    self->count++;
    self->entries[at] = (struct entry){.worker_id = *id};
    return &self->entries[at];
}

void worker_book_add_step(struct worker_book *self, const struct digest *worker_id,
                          uint32_t layer_count, uint32_t compute_us, uint32_t network_us)
{
    struct entry *entry = find_or_add(self, worker_id);
    if (!entry || layer_count == 0)
        return;
    const uint32_t layer_us = compute_us / layer_count;
    deadline_estimate_add(&entry->layer, layer_us < LAYER_MAX_US ? layer_us : LAYER_MAX_US);
    deadline_estimate_add(&entry->network, network_us < WAIT_MAX_US ? network_us : WAIT_MAX_US);
}

void worker_book_count_session(struct worker_book *self, const struct digest *worker_id, int change)
{
    struct entry *entry = find_or_add(self, worker_id);
    if (entry && (change > 0 || entry->session_count > 0))
        entry->session_count += change > 0 ? 1u : -1u;
}

void worker_book_add_failure(struct worker_book *self, const struct digest *worker_id,
                             uint64_t now_us)
{
    struct entry *entry = find_or_add(self, worker_id);
    if (entry)
        entry->avoid_until_us = now_us + WORKER_BOOK_AVOID_US;
}

void worker_book_prune(struct worker_book *self, const struct directory *directory)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < self->count; i++)
        if (self->entries[i].session_count > 0 ||
            directory_find(directory, &self->entries[i].worker_id))
            self->entries[kept++] = self->entries[i];
    self->count = kept;
}

/* Microseconds of one layer for one of rate tokens per second through all the layers held. */
static uint32_t layer_time_us(float rate, uint32_t layers_held, uint32_t fallback_us)
{
    if (!(rate > 0.0f))
        return fallback_us;
    const double us = 1e6 / ((double)rate * layers_held);
    if (us < 1.0)
        return 1;
    return us < LAYER_MAX_US ? (uint32_t)us : LAYER_MAX_US;
}

static uint32_t decode_layer_us(const struct entry *entry, const struct directory_member *member)
{
    if (entry && entry->layer.sample_count > 0)
        return entry->layer.mean_us ? entry->layer.mean_us : 1;
    return layer_time_us(member->decode_tokens_per_s, member->layer_end - member->layer_first,
                         LAYER_DEFAULT_US);
}

static uint32_t network_us(const struct entry *entry)
{
    return entry && entry->network.sample_count > 0 ? entry->network.mean_us : NETWORK_DEFAULT_US;
}

void worker_book_member(const struct worker_book *self, const struct directory_member *member,
                        uint64_t now_us, struct path_member *out)
{
    const struct entry *entry = find(self, &member->worker_id);
    /* The directory is some seconds old; our own sessions are known at once. */
    uint64_t sessions = member->session_count;
    if (entry && entry->session_count > sessions)
        sessions = entry->session_count;
    out->layer_first = member->layer_first;
    out->layer_end = member->layer_end;
    out->layer_us = decode_layer_us(entry, member);
    out->hop_us = network_us(entry);
    const uint64_t step_us = (uint64_t)out->layer_us * (member->layer_end - member->layer_first);
    const uint64_t turns = sessions + (uint64_t)SESSION_PART * member->queued_step_count;
    uint64_t wait_us = turns < WAIT_MAX_US ? turns * step_us / SESSION_PART : WAIT_MAX_US;
    if (wait_us > WAIT_MAX_US)
        wait_us = WAIT_MAX_US;
    if (entry && entry->avoid_until_us > now_us)
        wait_us += WAIT_MAX_US;
    out->wait_us = (uint32_t)wait_us;
}

void worker_book_expect(const struct worker_book *self, const struct directory_member *member,
                        uint32_t layer_count, struct deadline_stage *out)
{
    const struct entry *entry = find(self, &member->worker_id);
    const uint64_t step_us = (uint64_t)decode_layer_us(entry, member) * layer_count;
    const uint32_t held = member->layer_end - member->layer_first;
    out->step_us = step_us < UINT32_MAX ? (uint32_t)step_us : UINT32_MAX;
    out->network_us = network_us(entry);
    out->token_ns = step_us * 1000 / PREFILL_PART;
    if (member->prefill_tokens_per_s > 1e-3f)
        out->token_ns = (uint64_t)(1e9 / (double)member->prefill_tokens_per_s * layer_count / held);
}
