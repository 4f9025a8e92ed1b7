#include "worker/gateway/prefix_book.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"

#include <string.h>

struct known_path {
    uint64_t number; /* counts paths; 0: none yet */
    struct prefix_book_stage stages[LIMIT_STAGES_MAX];
    uint32_t stage_count;
};

/* Keys are hashes of our own making: 64 bits of them tell them apart, and a mistake would only cost
 * a detour. */
struct known_key {
    uint64_t tag;
    uint64_t path_number;
};

struct prefix_book {
    struct known_path paths[PREFIX_BOOK_PATHS]; /* number n is at n % PREFIX_BOOK_PATHS */
    struct known_key keys[PREFIX_BOOK_KEYS];    /* by tag % PREFIX_BOOK_KEYS */
    uint64_t path_count;                        /* noted so far */
};

enum odsi_err prefix_book_open(struct prefix_book **out)
{
    return alloc_zeroed(out, 1, sizeof **out);
}

void prefix_book_close(struct prefix_book **self)
{
    alloc_free(*self);
    *self = NULL;
}

static int is_path(const struct known_path *path, const struct prefix_book_stage *stages,
                   uint32_t stage_count)
{
    if (path->number == 0 || path->stage_count != stage_count)
        return 0;
    for (uint32_t i = 0; i < stage_count; i++)
        if (!digest_equal(&path->stages[i].worker_id, &stages[i].worker_id) ||
            path->stages[i].layer_first != stages[i].layer_first ||
            path->stages[i].layer_end != stages[i].layer_end)
            return 0;
    return 1;
}

/* The path's number; one that is new takes the place of the oldest. */
static uint64_t number_of(struct prefix_book *self, const struct prefix_book_stage *stages,
                          uint32_t stage_count)
{
    for (uint32_t i = 0; i < PREFIX_BOOK_PATHS; i++)
        if (is_path(&self->paths[i], stages, stage_count))
            return self->paths[i].number;
    const uint64_t number = ++self->path_count;
    struct known_path *path = &self->paths[number % PREFIX_BOOK_PATHS];
    path->number = number;
    path->stage_count = stage_count;
    memcpy(path->stages, stages, stage_count * sizeof *stages);
    return number;
}

void prefix_book_note(struct prefix_book *self, const struct digest *keys, uint32_t key_count,
                      const struct prefix_book_stage *stages, uint32_t stage_count)
{
    ODSI_ASSERT(stage_count > 0 && stage_count <= LIMIT_STAGES_MAX);
    if (key_count == 0)
        return;
    const uint64_t number = number_of(self, stages, stage_count);
    for (uint32_t i = 0; i < key_count; i++) {
        const uint64_t tag = bytes_load_u64(keys[i].bytes);
        self->keys[tag % PREFIX_BOOK_KEYS] = (struct known_key){tag, number};
    }
}

uint32_t prefix_book_find(const struct prefix_book *self, const struct digest *keys,
                          uint32_t key_count, const struct prefix_book_stage **stages,
                          uint32_t *stage_count)
{
    for (uint32_t count = key_count; count > 0; count--) {
        const uint64_t tag = bytes_load_u64(keys[count - 1].bytes);
        const struct known_key *key = &self->keys[tag % PREFIX_BOOK_KEYS];
        const struct known_path *path = &self->paths[key->path_number % PREFIX_BOOK_PATHS];
        if (key->path_number == 0 || key->tag != tag || path->number != key->path_number)
            continue;
        *stages = path->stages;
        *stage_count = path->stage_count;
        return count;
    }
    return 0;
}
