#include "worker/model/parallel.h"

#include "common/base/alloc.h"
#include "kernels/cpu/pool.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

struct parallel {
    struct pool *pool;
    enum odsi_err (*job)(void *context, uint32_t index, uint32_t thread);
    void *context;
    atomic_int has_failed;
    pthread_mutex_t lock;        /* of failure */
    struct odsi_failure failure; /* the first one */
};

enum odsi_err parallel_open(struct parallel **out, uint32_t thread_count)
{
    struct parallel *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    pthread_mutex_init(&self->lock, NULL); /* with these attributes it cannot fail */
    err = pool_open(&self->pool, thread_count ? thread_count : pool_cpu_count());
    if (err != ODSI_OK)
        parallel_close(&self);
    *out = self;
    return err;
}

void parallel_close(struct parallel **self)
{
    if (!*self)
        return;
    pool_close(&(*self)->pool);
    pthread_mutex_destroy(&(*self)->lock);
    alloc_free(*self);
    *self = NULL;
}

uint32_t parallel_thread_count(const struct parallel *self)
{
    return pool_thread_count(self->pool);
}

static void run_one(void *context, uint32_t index, uint32_t thread)
{
    struct parallel *self = context;
    if (atomic_load(&self->has_failed))
        return;
    const enum odsi_err err = self->job(self->context, index, thread);
    if (err == ODSI_OK)
        return;
    pthread_mutex_lock(&self->lock);
    if (!atomic_exchange(&self->has_failed, 1))
        odsi_failure_take(&self->failure, err); /* the sentence is this thread's */
    pthread_mutex_unlock(&self->lock);
}

enum odsi_err parallel_run(struct parallel *self,
                           enum odsi_err (*job)(void *context, uint32_t index, uint32_t thread),
                           void *context, uint32_t count)
{
    self->job = job;
    self->context = context;
    atomic_store(&self->has_failed, 0);
    pool_run(self->pool, run_one, self, count);
    if (!atomic_load(&self->has_failed))
        return ODSI_OK;
    return odsi_fail(self->failure.err, "%s", self->failure.text);
}
