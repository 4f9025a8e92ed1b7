#include "worker/gateway/model_choice.h"

#include "common/base/assert.h"

#include <stdio.h>
#include <string.h>

/* Appends "name (id)" of each model that fits, as far as there is room. */
static void list(char *out, size_t size, const struct directory_model *models, uint32_t count,
                 const char *name)
{
    size_t used = 0;
    out[0] = '\0';
    for (uint32_t i = 0; i < count; i++) {
        char hex[DIGEST_HEX_SIZE];
        char one[LIMIT_NAME_SIZE + 32];
        if (name && strcmp(models[i].name, name) != 0)
            continue;
        digest_to_hex(hex, &models[i].model_id);
        snprintf(one, sizeof one, "%s%s (%.16s...)", used ? ", " : "", models[i].name, hex);
        const size_t one_size = strlen(one);
        if (used + one_size + 4 >= size) {
            snprintf(out + used, size - used, "...");
            return;
        }
        memcpy(out + used, one, one_size + 1);
        used += one_size;
    }
}

/* Whether a stands before b; 0 when neither does. */
static int is_better(const struct directory_model *a, const struct directory_model *b)
{
    if (a->complete != b->complete)
        return a->complete;
    return a->worker_count > b->worker_count;
}

static int fits(const struct directory_model *model, const char *wanted, const struct digest *id)
{
    if (!wanted)
        return 1;
    return id ? digest_equal(&model->model_id, id) : strcmp(model->name, wanted) == 0;
}

enum odsi_err model_choice_find(const struct directory_model *models, uint32_t count,
                                const char *wanted, const struct directory_model **out)
{
    char names[256];
    struct digest id;
    const struct directory_model *best = NULL;
    const struct directory_model *rival = NULL;
    wanted = wanted && *wanted ? wanted : NULL;
    const int by_id =
        wanted && strlen(wanted) == 2 * DIGEST_SIZE && digest_from_hex(&id, wanted) == ODSI_OK;
    *out = NULL;
    if (count == 0)
        return odsi_fail(ODSI_ERR_UNAVAILABLE, "no worker serves any model now");
    ODSI_ASSERT(models);
    for (uint32_t i = 0; i < count; i++) {
        if (!fits(&models[i], wanted, by_id ? &id : NULL))
            continue;
        if (!best || is_better(&models[i], best)) {
            best = &models[i];
            rival = NULL;
        } else if (!is_better(best, &models[i])) {
            rival = &models[i];
        }
    }
    list(names, sizeof names, models, count, NULL);
    if (!best)
        return odsi_fail(ODSI_ERR_NOT_FOUND, "model %s is not served; these are: %s", wanted,
                         names);
    if (!wanted && count > 1)
        return odsi_fail(ODSI_ERR_INVALID, "model: several are served, name one of: %s", names);
    if (rival && !by_id) {
        list(names, sizeof names, models, count, wanted);
        return odsi_fail(ODSI_ERR_INVALID, "model: %s may mean any of %s; give the id", wanted,
                         names);
    }
    *out = best;
    return ODSI_OK;
}
