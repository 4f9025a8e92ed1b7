#include "worker/cli/cmd.h"

#include "worker/cli/cli_text.h"

#include <string.h>

static const struct cmd commands[] = {
    {"generate", "continue a text through a swarm", cmd_generate_run},
    {"chat", "talk with a model through a swarm", cmd_chat_run},
    {"local", "run a whole swarm on this machine", cmd_local_run},
    {"status", "show who serves which layers", cmd_status_run},
    {"bench", "measure the engine, or a swarm under load", cmd_bench_run},
    {"trace", "hash the residual stream after every layer", cmd_trace_run},
    {"model", "inspect a model file, or make a synthetic one", cmd_model_run},
    {"identity", "show or make the key that names this participant", cmd_identity_run},
    {NULL, NULL, NULL},
};

const struct cmd *cmd_table(void)
{
    return commands;
}

const struct cmd *cmd_find(const char *name)
{
    for (const struct cmd *at = commands; at->name; at++)
        if (strcmp(at->name, name) == 0)
            return at;
    return NULL;
}

const struct cmd *cmd_nearest(const char *name)
{
    const struct cmd *best = NULL;
    unsigned best_distance = UINT32_MAX;
    for (const struct cmd *at = commands; at->name; at++) {
        const size_t size = strlen(name);
        /* "gen" is four slips away from "generate", but its meaning is plain. */
        const int is_start = size >= 2 && strncmp(at->name, name, size) == 0;
        const unsigned distance = is_start ? 0 : cli_text_distance(at->name, name);
        const unsigned distance_max = strlen(at->name) <= 5 ? 2 : 3;
        if (distance <= distance_max && distance < best_distance) {
            best = at;
            best_distance = distance;
        }
    }
    return best;
}
