/* An environment for a child: ours, with some names left out and others set. One owner. */
#ifndef ODSI_WORKER_CLI_CLI_ENV_H
#define ODSI_WORKER_CLI_CLI_ENV_H
#include "common/base/err.h"

#include <stddef.h>

/* Zero-initialize. */
struct cli_env {
    char **items; /* "NAME=VALUE", NULL at the end; for exec */
    size_t count;
    size_t capacity;
};

/* Copies from (NULL-terminated, such as environ). keep says which names come along; NULL: all.
 * Errors: ODSI_ERR_NO_MEMORY; cli_env_free is due all the same. */
ODSI_MUST_USE enum odsi_err cli_env_copy(struct cli_env *self, char *const *from,
                                         int (*keep)(const char *name, size_t name_size));
/* Sets or replaces. */
ODSI_MUST_USE enum odsi_err cli_env_set(struct cli_env *self, const char *name, const char *value);
/* NULL when it is not set. Valid until it is set again. */
const char *cli_env_get_view(const struct cli_env *self, const char *name);
void cli_env_free(struct cli_env *self);

/* For a server of a local swarm: nothing that would set its flags (ODSI_NAME) from outside but
 * ODSI_CPU, which chooses the instruction sets. */
int cli_env_keep_for_server(const char *name, size_t name_size);
#endif
