#include "worker/cli/cli_chat.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

#include <string.h>

void cli_chat_free(struct cli_chat *self)
{
    cli_chat_reset(self);
    alloc_free(self->turns);
    alloc_free(self->system);
    memset(self, 0, sizeof *self);
}

enum odsi_err cli_chat_set_system(struct cli_chat *self, const char *text, size_t size)
{
    char *copy = NULL;
    if (size > 0) {
        const enum odsi_err err = alloc_text(&copy, text, size);
        if (err != ODSI_OK)
            return err;
    }
    alloc_free(self->system);
    self->system = copy;
    return ODSI_OK;
}

/* Room for one more turn, and for the system message in front of the first. */
static enum odsi_err grow(struct cli_chat *self)
{
    if (self->turn_count < self->turn_capacity)
        return ODSI_OK;
    const uint32_t capacity = self->turn_capacity ? 2 * self->turn_capacity : 16;
    const enum odsi_err err = alloc_resize(&self->turns, (size_t)capacity + 1, sizeof *self->turns);
    if (err == ODSI_OK)
        self->turn_capacity = capacity;
    return err;
}

enum odsi_err cli_chat_add(struct cli_chat *self, const char *role, const char *text, size_t size)
{
    struct cli_message turn = {.role = role};
    if (self->turn_count + 1 >= LIMIT_CHAT_MESSAGES)
        return odsi_fail(ODSI_ERR_RANGE,
                         "the conversation has %u turns, which is the most; begin anew",
                         self->turn_count);
    enum odsi_err err = grow(self);
    if (err == ODSI_OK)
        err = alloc_text(&turn.content, text, size);
    if (err == ODSI_OK)
        self->turns[++self->turn_count] = turn;
    return err;
}

void cli_chat_drop_last(struct cli_chat *self)
{
    ODSI_ASSERT(self->turn_count > 0);
    alloc_free(self->turns[self->turn_count--].content);
}

void cli_chat_reset(struct cli_chat *self)
{
    while (self->turn_count > 0)
        cli_chat_drop_last(self);
}

const struct cli_message *cli_chat_view(struct cli_chat *self, uint32_t *count)
{
    *count = self->turn_count;
    if (self->turn_count == 0)
        return NULL;
    if (!self->system)
        return self->turns + 1;
    self->turns[0] = (struct cli_message){"system", self->system};
    ++*count;
    return self->turns;
}

/* Whether line is the command name, alone or before a space; *rest is what follows. */
static int is_command(const char *line, size_t size, const char *name, const char **rest,
                      size_t *rest_size)
{
    const size_t name_size = strlen(name);
    if (size < name_size || memcmp(line, name, name_size) != 0)
        return 0;
    if (size > name_size && line[name_size] != ' ')
        return 0;
    size_t at = name_size;
    while (at < size && line[at] == ' ')
        at++;
    *rest = line + at;
    *rest_size = size - at;
    return 1;
}

enum cli_chat_line cli_chat_read(const char *line, size_t size, const char **rest,
                                 size_t *rest_size)
{
    static const struct {
        const char *name;
        enum cli_chat_line is;
    } commands[] = {
        {"/quit", CLI_CHAT_QUIT},
        {"/reset", CLI_CHAT_RESET},
        {"/system", CLI_CHAT_SYSTEM},
        {"/help", CLI_CHAT_HELP},
    };
    size_t blank = 0;
    *rest = line;
    *rest_size = size;
    while (blank < size && (line[blank] == ' ' || line[blank] == '\t'))
        blank++;
    if (blank == size)
        return CLI_CHAT_NOTHING;
    if (line[0] != '/')
        return CLI_CHAT_SAY;
    if (size > 1 && line[1] == '/') {
        *rest = line + 1;
        *rest_size = size - 1;
        return CLI_CHAT_SAY;
    }
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (is_command(line, size, commands[i].name, rest, rest_size))
            return commands[i].is;
    return CLI_CHAT_UNKNOWN;
}
