#include "worker/gateway/path.h"

#include "common/base/alloc.h"

#include <stdio.h>
#include <string.h>

#define COST_NONE UINT64_MAX

/* How [0, boundary) is covered at the least cost: the last stage and where it begins. */
struct reach {
    uint64_t cost_us;
    uint32_t member_index;
    uint32_t layer_first;
};

/* The best way into a member seen so far: entering at layer_first, less what its layers up to
 * there would have cost, so that ways in at different layers compare. */
struct entry {
    int64_t key;
    uint32_t layer_first;
    int open;
};

static uint32_t member_hop_us(const struct path_member *member)
{
    return member->hop_us ? member->hop_us : 1;
}

uint64_t path_stage_cost(const struct path_member *member, uint32_t layer_count)
{
    return (uint64_t)member_hop_us(member) + member->wait_us +
           (uint64_t)member->layer_us * layer_count;
}

static int holds(const struct path_member *member, uint32_t layer)
{
    return member->layer_first <= layer && layer < member->layer_end;
}

/* Lets every member that holds the layer before boundary end its stage there. */
static void close_stages(struct reach *reach, const struct entry *entries,
                         const struct path_member *members, uint32_t member_count,
                         uint32_t boundary)
{
    for (uint32_t i = 0; i < member_count; i++) {
        if (!holds(&members[i], boundary - 1) || !entries[i].open)
            continue;
        const uint64_t cost = (uint64_t)(entries[i].key + (int64_t)boundary * members[i].layer_us);
        if (cost >= reach[boundary].cost_us)
            continue;
        reach[boundary] = (struct reach){cost, i, entries[i].layer_first};
    }
}

/* Lets every member that holds the layer after boundary begin a stage there. */
static void open_stages(struct entry *entries, const struct reach *at,
                        const struct path_member *members, uint32_t member_count, uint32_t boundary)
{
    for (uint32_t i = 0; i < member_count; i++) {
        if (!holds(&members[i], boundary))
            continue;
        const int64_t key = (int64_t)at->cost_us + member_hop_us(&members[i]) + members[i].wait_us -
                            (int64_t)boundary * members[i].layer_us;
        if (!entries[i].open || key < entries[i].key)
            entries[i] = (struct entry){key, boundary, 1};
    }
}

static enum odsi_err fail_missing(const struct path_member *members, uint32_t member_count,
                                  uint32_t layer_count, uint32_t first)
{
    char text[128];
    path_missing(text, sizeof text, members, member_count, layer_count);
    return odsi_fail(ODSI_ERR_UNAVAILABLE,
                     "no path: layer %u of %u is served by no worker (missing: %s)", first,
                     layer_count, text);
}

static enum odsi_err search(struct reach *reach, struct entry *entries,
                            const struct path_member *members, uint32_t member_count,
                            uint32_t layer_count)
{
    reach[0] = (struct reach){0, 0, 0};
    for (uint32_t boundary = 0; boundary < layer_count; boundary++) {
        open_stages(entries, &reach[boundary], members, member_count, boundary);
        reach[boundary + 1].cost_us = COST_NONE;
        close_stages(reach, entries, members, member_count, boundary + 1);
        if (reach[boundary + 1].cost_us == COST_NONE)
            return fail_missing(members, member_count, layer_count, boundary);
    }
    return ODSI_OK;
}

/* A worker that the search used twice serves all that lies between as well, since it holds one
 * range: a session keeps its state in one place per worker. */
static void join_repeated(struct path_stage *stages, uint32_t *stage_count)
{
    for (uint32_t i = 0; i < *stage_count; i++) {
        uint32_t last = i;
        for (uint32_t j = i + 1; j < *stage_count; j++)
            if (stages[j].member_index == stages[i].member_index)
                last = j;
        stages[i].layer_end = stages[last].layer_end;
        memmove(&stages[i + 1], &stages[last + 1], (*stage_count - last - 1) * sizeof *stages);
        *stage_count -= last - i;
    }
}

/* Walks back from the last boundary. trail has layer_count places. */
static enum odsi_err collect(struct path_stage *stages, uint32_t *stage_count,
                             struct path_stage *trail, const struct reach *reach,
                             uint32_t layer_count)
{
    uint32_t count = 0;
    for (uint32_t boundary = layer_count; boundary > 0; boundary = reach[boundary].layer_first)
        trail[count++] = (struct path_stage){reach[boundary].member_index,
                                             reach[boundary].layer_first, boundary};
    for (uint32_t i = 0; i < count / 2; i++) {
        const struct path_stage swapped = trail[i];
        trail[i] = trail[count - 1 - i];
        trail[count - 1 - i] = swapped;
    }
    join_repeated(trail, &count);
    if (count > LIMIT_STAGES_MAX)
        return odsi_fail(ODSI_ERR_RANGE,
                         "no path: the workers' ranges are so short that a path needs %u stages; "
                         "at most %u are allowed",
                         count, LIMIT_STAGES_MAX);
    memcpy(stages, trail, count * sizeof *stages);
    *stage_count = count;
    return ODSI_OK;
}

static int in_path(const struct path_stage *stages, uint32_t stage_count, uint32_t member_index)
{
    for (uint32_t i = 0; i < stage_count; i++)
        if (stages[i].member_index == member_index)
            return 1;
    return 0;
}

/* Whether candidate could stand in for the stage's worker at about the same cost but for load. */
static int is_equal(const struct path_member *candidate, const struct path_member *chosen,
                    const struct path_stage *stage)
{
    if (candidate->layer_first > stage->layer_first || candidate->layer_end < stage->layer_end)
        return 0;
    const uint32_t layers = stage->layer_end - stage->layer_first;
    const uint64_t ours = path_stage_cost(chosen, layers) - chosen->wait_us;
    const uint64_t theirs = path_stage_cost(candidate, layers) - candidate->wait_us;
    const uint64_t more = ours > theirs ? ours : theirs;
    const uint64_t less = ours > theirs ? theirs : ours;
    return more - less <= more * PATH_EQUAL_PERCENT / 100;
}

/* Draws one of the stage's equals that is not skipped, by counting to a random place. */
static uint32_t draw(const struct path_stage *stages, uint32_t stage_count, uint32_t stage_index,
                     const struct path_member *members, uint32_t member_count,
                     const struct path_random *random, uint32_t equals, uint32_t skip)
{
    const struct path_stage *stage = &stages[stage_index];
    const struct path_member *chosen = &members[stage->member_index];
    uint32_t left = random->next(random->context) % equals;
    for (uint32_t i = 0; i < member_count; i++) {
        if (i == skip || !is_equal(&members[i], chosen, stage) ||
            (i != stage->member_index && in_path(stages, stage_count, i)))
            continue;
        if (left-- == 0)
            return i;
    }
    return stage->member_index;
}

static void spread_load(struct path_stage *stages, uint32_t stage_count, uint32_t stage_index,
                        const struct path_member *members, uint32_t member_count,
                        const struct path_random *random)
{
    struct path_stage *stage = &stages[stage_index];
    uint32_t equals = 0;
    for (uint32_t i = 0; i < member_count; i++)
        equals += is_equal(&members[i], &members[stage->member_index], stage) &&
                  (i == stage->member_index || !in_path(stages, stage_count, i));
    if (equals < 2)
        return;
    const uint32_t one =
        draw(stages, stage_count, stage_index, members, member_count, random, equals, UINT32_MAX);
    const uint32_t other =
        draw(stages, stage_count, stage_index, members, member_count, random, equals - 1, one);
    const uint32_t layers = stage->layer_end - stage->layer_first;
    stage->member_index =
        path_stage_cost(&members[other], layers) < path_stage_cost(&members[one], layers) ? other
                                                                                          : one;
}

enum odsi_err path_choose(struct path_stage *stages, uint32_t *stage_count,
                          const struct path_member *members, uint32_t member_count,
                          uint32_t layer_count, const struct path_random *random)
{
    struct reach *reach = NULL;
    struct entry *entries = NULL;
    struct path_stage *trail = NULL;
    *stage_count = 0;
    if (layer_count == 0 || layer_count > LIMIT_LAYERS_MAX)
        return odsi_fail(ODSI_ERR_RANGE, "no path: a model of %u layers is not within 1 to %u",
                         layer_count, LIMIT_LAYERS_MAX);
    enum odsi_err err = alloc_zeroed(&reach, layer_count + 1, sizeof *reach);
    if (err == ODSI_OK)
        err = alloc_zeroed(&entries, member_count, sizeof *entries);
    if (err == ODSI_OK)
        err = alloc_zeroed(&trail, layer_count, sizeof *trail);
    if (err == ODSI_OK)
        err = search(reach, entries, members, member_count, layer_count);
    if (err == ODSI_OK)
        err = collect(stages, stage_count, trail, reach, layer_count);
    if (err == ODSI_OK && random)
        for (uint32_t i = 0; i < *stage_count; i++)
            spread_load(stages, *stage_count, i, members, member_count, random);
    alloc_free(trail);
    alloc_free(entries);
    alloc_free(reach);
    return err;
}

uint32_t path_missing(char *out, size_t size, const struct path_member *members,
                      uint32_t member_count, uint32_t layer_count)
{
    uint32_t missing = 0;
    uint32_t run_first = 0;
    uint32_t run = 0;
    size_t used = 0;
    if (size > 0)
        out[0] = '\0';
    for (uint32_t layer = 0; layer <= layer_count; layer++) {
        int held = layer == layer_count;
        for (uint32_t i = 0; i < member_count && !held; i++)
            held = holds(&members[i], layer);
        if (!held) {
            run_first = run ? run_first : layer;
            run++;
            missing++;
            continue;
        }
        if (run == 0)
            continue;
        char piece[32];
        const char *comma = used ? ", " : "";
        if (run == 1)
            snprintf(piece, sizeof piece, "%s%u", comma, run_first);
        else
            snprintf(piece, sizeof piece, "%s%u-%u", comma, run_first, layer - 1);
        run = 0;
        const size_t piece_size = strlen(piece);
        if (used + piece_size + 4 < size) {
            memcpy(out + used, piece, piece_size + 1);
            used += piece_size;
        } else if (used + 3 < size && (used < 3 || memcmp(out + used - 3, "...", 3) != 0)) {
            memcpy(out + used, "...", 4);
            used += 3;
        }
    }
    return missing;
}
