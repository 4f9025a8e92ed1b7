#include "kernels/cpu/pool.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>

/* Rounds of spinning before a sleep. A round is a pause instruction, 10 to 40 ns on current x86:
 * the longest spin is some tens of microseconds, about the gap between two ops of a forward. */
#define SPIN_MAX 1024u
#define SPIN_MIN 16u

/* The state of the job in one word, so that a claim is one compare-and-swap: the upper 40 bits
 * count jobs, the lower 24 the tasks nobody has claimed. Counting down to 0 matters: a late thread
 * that read the fields of a newer job cannot claim anything of the older one. */
#define REMAINING_BITS 24u
#define REMAINING_MASK ((UINT64_C(1) << REMAINING_BITS) - 1)

struct pool_thread {
    struct pool *pool;
    pthread_t handle;
    uint32_t index;
};

struct pool {
    _Alignas(ALLOC_ALIGNMENT) atomic_uint_fast64_t state;
    atomic_uint_fast32_t done; /* tasks of this job that have returned */
    _Atomic(pool_task *) task; /* this and the next two: written before state announces the job */
    _Atomic(void *) context;
    atomic_uint_fast32_t count;
    _Alignas(ALLOC_ALIGNMENT) atomic_uint_fast32_t sleepers;
    atomic_int owner_sleeps;
    atomic_int stop;
    pthread_mutex_t mutex; /* only for sleeping and waking */
    pthread_cond_t job_posted;
    pthread_cond_t job_done;
    uint32_t thread_count;
    uint32_t started; /* threads[1 .. started] run */
    struct pool_thread *threads;
};

ODSI_STATIC_ASSERT(POOL_TASKS_MAX - 1 <= REMAINING_MASK,
                   "the largest part of a job can be counted");

static inline void spin_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

/* Runs tasks of the current job until none is left to claim. Returns 1 when it ran any. */
static int run_tasks(struct pool *self, uint32_t thread)
{
    int ran = 0;
    uint64_t state = atomic_load_explicit(&self->state, memory_order_acquire);
    while ((state & REMAINING_MASK) != 0) {
        pool_task *task = atomic_load_explicit(&self->task, memory_order_relaxed);
        void *context = atomic_load_explicit(&self->context, memory_order_relaxed);
        const uint32_t count = (uint32_t)atomic_load_explicit(&self->count, memory_order_relaxed);
        const uint32_t remaining = (uint32_t)(state & REMAINING_MASK);
        if (!atomic_compare_exchange_weak_explicit(&self->state, &state, state - 1,
                                                   memory_order_acquire, memory_order_acquire))
            continue;
        task(context, count - remaining, thread);
        ran = 1;
        if (atomic_fetch_add(&self->done, 1) + 1 == count && atomic_load(&self->owner_sleeps)) {
            pthread_mutex_lock(&self->mutex);
            pthread_cond_signal(&self->job_done);
            pthread_mutex_unlock(&self->mutex);
        }
        state = atomic_load_explicit(&self->state, memory_order_acquire);
    }
    return ran;
}

static int has_work(struct pool *self)
{
    return (atomic_load(&self->state) & REMAINING_MASK) != 0 || atomic_load(&self->stop);
}

/* Sleeps until there is work. Counted in sleepers first, then looks again: pool_run announces
 * first and looks at sleepers afterwards, so one of the two sees the other. */
static void sleep_until_work(struct pool *self)
{
    pthread_mutex_lock(&self->mutex);
    atomic_fetch_add(&self->sleepers, 1);
    while (!has_work(self))
        pthread_cond_wait(&self->job_posted, &self->mutex);
    atomic_fetch_sub(&self->sleepers, 1);
    pthread_mutex_unlock(&self->mutex);
}

static void *thread_main(void *argument)
{
    struct pool_thread *thread = argument;
    struct pool *self = thread->pool;
    uint32_t spin = SPIN_MAX;
    while (!atomic_load(&self->stop)) {
        if (run_tasks(self, thread->index)) {
            spin = spin * 2 < SPIN_MAX ? spin * 2 : SPIN_MAX;
            continue;
        }
        uint32_t round = 0;
        while (round < spin && !has_work(self)) {
            spin_pause();
            round++;
        }
        if (round == spin) {
            spin = spin / 2 > SPIN_MIN ? spin / 2 : SPIN_MIN;
            sleep_until_work(self);
        }
    }
    return NULL;
}

static void wait_until_done(struct pool *self, uint32_t count)
{
    for (uint32_t round = 0; round < SPIN_MAX; round++) {
        if (atomic_load_explicit(&self->done, memory_order_acquire) == count)
            return;
        spin_pause();
    }
    pthread_mutex_lock(&self->mutex);
    atomic_store(&self->owner_sleeps, 1);
    while (atomic_load(&self->done) != count)
        pthread_cond_wait(&self->job_done, &self->mutex);
    atomic_store(&self->owner_sleeps, 0);
    pthread_mutex_unlock(&self->mutex);
}

void pool_run(struct pool *self, pool_task *task, void *context, uint32_t count)
{
    ODSI_ASSERT(count < POOL_TASKS_MAX);
    if (count == 0)
        return;
    if (count == 1 || self->thread_count == 1) {
        for (uint32_t i = 0; i < count; i++)
            task(context, i, 0);
        return;
    }
    atomic_store_explicit(&self->done, 0, memory_order_relaxed);
    atomic_store_explicit(&self->task, task, memory_order_relaxed);
    atomic_store_explicit(&self->context, context, memory_order_relaxed);
    atomic_store_explicit(&self->count, count, memory_order_relaxed);
    const uint64_t job = (atomic_load(&self->state) >> REMAINING_BITS) + 1;
    atomic_store(&self->state, job << REMAINING_BITS | count);
    if (atomic_load(&self->sleepers) > 0) {
        pthread_mutex_lock(&self->mutex);
        pthread_cond_broadcast(&self->job_posted);
        pthread_mutex_unlock(&self->mutex);
    }
    run_tasks(self, 0);
    wait_until_done(self, count);
}

uint32_t pool_thread_count(const struct pool *self)
{
    return self->thread_count;
}

uint32_t pool_cpu_count(void)
{
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return 1;
    const int count = CPU_COUNT(&set);
    return count > 0 ? (uint32_t)count : 1;
}

static enum odsi_err start_threads(struct pool *self)
{
    for (uint32_t i = 1; i < self->thread_count; i++) {
        struct pool_thread *thread = &self->threads[i];
        thread->pool = self;
        thread->index = i;
        const int code = pthread_create(&thread->handle, NULL, thread_main, thread);
        if (code != 0)
            return odsi_fail(ODSI_ERR_NO_MEMORY, "cannot start compute thread %u of %u: %s", i + 1,
                             self->thread_count, strerror(code));
        self->started = i;
    }
    return ODSI_OK;
}

enum odsi_err pool_open(struct pool **out, uint32_t thread_count)
{
    *out = NULL;
    if (thread_count == 0 || thread_count > POOL_THREADS_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "%u compute threads: choose 1 to %u", thread_count,
                         POOL_THREADS_MAX);
    struct pool *self = NULL;
    enum odsi_err err = alloc_aligned(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->thread_count = thread_count;
    pthread_mutex_init(&self->mutex, NULL);
    pthread_cond_init(&self->job_posted, NULL);
    pthread_cond_init(&self->job_done, NULL);
    err = alloc_zeroed(&self->threads, thread_count, sizeof *self->threads);
    if (err == ODSI_OK)
        err = start_threads(self);
    if (err != ODSI_OK) {
        pool_close(&self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

void pool_close(struct pool **self_pointer)
{
    struct pool *self = *self_pointer;
    if (!self)
        return;
    pthread_mutex_lock(&self->mutex);
    atomic_store(&self->stop, 1);
    pthread_cond_broadcast(&self->job_posted);
    pthread_mutex_unlock(&self->mutex);
    for (uint32_t i = 1; i <= self->started; i++)
        pthread_join(self->threads[i].handle, NULL);
    pthread_cond_destroy(&self->job_done);
    pthread_cond_destroy(&self->job_posted);
    pthread_mutex_destroy(&self->mutex);
    alloc_free(self->threads);
    alloc_free(self);
    *self_pointer = NULL;
}
