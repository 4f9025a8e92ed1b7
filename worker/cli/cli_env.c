#include "worker/cli/cli_env.h"

#include "common/base/alloc.h"

#include <string.h>

static enum odsi_err append(struct cli_env *self, const char *text, size_t size)
{
    enum odsi_err err = ODSI_OK;
    if (self->count + 1 >= self->capacity) {
        const size_t capacity = self->capacity ? self->capacity * 2 : 64;
        err = alloc_resize(&self->items, capacity, sizeof *self->items);
        if (err != ODSI_OK)
            return err;
        self->capacity = capacity;
    }
    err = alloc_text(&self->items[self->count], text, size);
    if (err == ODSI_OK)
        self->count++;
    self->items[self->count] = NULL;
    return err;
}

enum odsi_err cli_env_copy(struct cli_env *self, char *const *from,
                           int (*keep)(const char *name, size_t name_size))
{
    for (; *from; from++) {
        const char *equals = strchr(*from, '=');
        if (!equals || (keep && !keep(*from, (size_t)(equals - *from))))
            continue;
        const enum odsi_err err = append(self, *from, strlen(*from));
        if (err != ODSI_OK)
            return err;
    }
    return ODSI_OK;
}

/* The index of name, or count. */
static size_t find(const struct cli_env *self, const char *name)
{
    const size_t size = strlen(name);
    size_t i = 0;
    while (i < self->count &&
           (strncmp(self->items[i], name, size) != 0 || self->items[i][size] != '='))
        i++;
    return i;
}

enum odsi_err cli_env_set(struct cli_env *self, const char *name, const char *value)
{
    const size_t name_size = strlen(name), value_size = strlen(value);
    const size_t index = find(self, name);
    char *item = NULL;
    enum odsi_err err = alloc_zeroed(&item, name_size + value_size + 2, 1);
    if (err != ODSI_OK)
        return err;
    memcpy(item, name, name_size);
    item[name_size] = '=';
    memcpy(item + name_size + 1, value, value_size);
    if (index < self->count) {
        alloc_free(self->items[index]);
        self->items[index] = item;
        return ODSI_OK;
    }
    err = append(self, item, name_size + 1 + value_size);
    alloc_free(item);
    return err;
}

const char *cli_env_get_view(const struct cli_env *self, const char *name)
{
    const size_t index = find(self, name);
    return index < self->count ? self->items[index] + strlen(name) + 1 : NULL;
}

void cli_env_free(struct cli_env *self)
{
    for (size_t i = 0; i < self->count; i++)
        alloc_free(self->items[i]);
    alloc_free(self->items);
    memset(self, 0, sizeof *self);
}

int cli_env_keep_for_server(const char *name, size_t name_size)
{
    static const char allowed[] = "ODSI_CPU";
    if (name_size < 5 || memcmp(name, "ODSI_", 5) != 0)
        return 1;
    return name_size == sizeof allowed - 1 && memcmp(name, allowed, name_size) == 0;
}
