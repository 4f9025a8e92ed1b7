/* A conversation at the command line: who said what so far, and what a typed line asks for.
 * Main thread only. */
#ifndef ODSI_WORKER_CLI_CLI_CHAT_H
#define ODSI_WORKER_CLI_CLI_CHAT_H
#include "common/base/err.h"
#include "common/base/limits.h"

#include <stddef.h>
#include <stdint.h>

struct cli_message {
    const char *role; /* "system", "user", "assistant" */
    char *content;
};

/* Zero-initialize; ended with cli_chat_free. */
struct cli_chat {
    struct cli_message *turns; /* [turn_count], after an entry for the system message */
    uint32_t turn_count;
    uint32_t turn_capacity;
    char *system; /* owned; NULL: none */
};

void cli_chat_free(struct cli_chat *self);
/* Copies size bytes of text; no text: no system message. Turns stay.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err cli_chat_set_system(struct cli_chat *self, const char *text,
                                                size_t size);
/* Copies a turn; role is a constant.
 * Errors: ODSI_ERR_RANGE (LIMIT_CHAT_MESSAGES), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err cli_chat_add(struct cli_chat *self, const char *role, const char *text,
                                         size_t size);
/* Takes back the last turn. */
void cli_chat_drop_last(struct cli_chat *self);
/* No turns; the system message stays. */
void cli_chat_reset(struct cli_chat *self);
/* All messages in order; valid until the next change. */
const struct cli_message *cli_chat_view(struct cli_chat *self, uint32_t *count);

enum cli_chat_line {
    CLI_CHAT_SAY,     /* rest is the user's turn */
    CLI_CHAT_NOTHING, /* blank */
    CLI_CHAT_QUIT,
    CLI_CHAT_RESET,
    CLI_CHAT_SYSTEM, /* rest is the new system message */
    CLI_CHAT_HELP,
    CLI_CHAT_UNKNOWN, /* begins with a '/', and is no command */
};
/* What line[size] is; two slashes in front stand for one that is said. */
enum cli_chat_line cli_chat_read(const char *line, size_t size, const char **rest,
                                 size_t *rest_size);
#endif
