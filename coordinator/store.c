#include "coordinator/store.h"

#include "coordinator/store_sqlite.h"

#include <string.h>

/* What follows prefix in text, or NULL. */
static const char *after(const char *text, const char *prefix)
{
    const size_t size = strlen(prefix);
    return strncmp(text, prefix, size) == 0 ? text + size : NULL;
}

enum odsi_err store_open(struct store **out, const char *url)
{
    const char *path = after(url, "sqlite:");
    *out = NULL;
    if (path && *path)
        return store_sqlite_open(out, path, 0);
    if (after(url, "postgresql://") || after(url, "postgres://"))
        /* Not the url itself: it may hold a password. */
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "this build has no PostgreSQL store; use --store sqlite:FILE");
    return odsi_fail(ODSI_ERR_INVALID, "store '%s': use sqlite:FILE", url);
}

void store_close(struct store **self)
{
    if (!*self)
        return;
    (*self)->kind->close(*self);
    *self = NULL;
}

enum odsi_err store_join(struct store *self, const struct members_wish *wish, uint32_t heartbeat_ms,
                         uint64_t now_us, struct member *out)
{
    return self->kind->join(self, wish, heartbeat_ms, now_us, out);
}

enum odsi_err store_heartbeat(struct store *self, const struct digest *worker_id,
                              const struct members_beat *beat, uint64_t now_us, int *out_known)
{
    return self->kind->heartbeat(self, worker_id, beat, now_us, out_known);
}

enum odsi_err store_leave(struct store *self, const struct digest *worker_id, int *out_known)
{
    return self->kind->leave(self, worker_id, out_known);
}

enum odsi_err store_expire(struct store *self, uint64_t since_us, uint64_t now_us,
                           uint32_t *out_removed)
{
    return self->kind->expire(self, since_us, now_us, out_removed);
}

enum odsi_err store_version(struct store *self, uint64_t *out_version)
{
    return self->kind->version(self, out_version);
}

enum odsi_err store_read(struct store *self, uint64_t *out_version,
                         enum odsi_err (*visit)(void *context, const struct member *row),
                         void *context)
{
    return self->kind->read(self, out_version, visit, context);
}
