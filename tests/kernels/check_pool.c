#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "kernels/cpu/pool.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>

#define TASKS_MAX 600u

struct job {
    uint32_t runs[TASKS_MAX]; /* written by the task of that index alone */
    uint32_t thread_count;
    atomic_uint wrong_threads;
    uint64_t spin_us;
};

static void count_task(void *context, uint32_t index, uint32_t thread)
{
    struct job *job = context;
    job->runs[index]++;
    if (thread >= job->thread_count)
        atomic_fetch_add(&job->wrong_threads, 1);
    const uint64_t end_us = clock_monotonic_us() + job->spin_us;
    while (job->spin_us > 0 && clock_monotonic_us() < end_us)
        ;
}

static void run_and_check(struct pool *pool, struct job *job, uint32_t count)
{
    memset(job->runs, 0, sizeof job->runs);
    pool_run(pool, count_task, job, count);
    for (uint32_t i = 0; i < TASKS_MAX; i++)
        cr_assert_eq(job->runs[i], i < count, "task %u of %u ran %u times", i, count, job->runs[i]);
}

/* Goal: every task runs once and is seen done when pool_run returns, over very many jobs that are
 * shorter than it takes to wake a thread. */
Test(pool, runs_every_task_once_over_many_tiny_jobs)
{
    struct rng rng = rng_make("pool");
    for (uint32_t threads = 1; threads <= 5; threads++) {
        struct pool *pool = NULL;
        struct job job = {.thread_count = threads};
        cr_assert_eq(pool_open(&pool, threads), ODSI_OK);
        cr_expect_eq(pool_thread_count(pool), threads);
        for (uint32_t i = 0; i < 20000; i++)
            run_and_check(pool, &job, rng_range(&rng, 0, i % 100 ? 12 : TASKS_MAX));
        cr_expect_eq(job.wrong_threads, 0);
        pool_close(&pool);
        cr_expect_null(pool);
    }
}

/* Goal: both sides wake up again after they went to sleep. How: tasks that outlast every spin, so
 * that the owner sleeps on the last one and the others sleep during the owner's single tasks. */
Test(pool, wakes_threads_that_sleep)
{
    struct pool *pool = NULL;
    struct job job = {.thread_count = 4, .spin_us = 2000};
    cr_assert_eq(pool_open(&pool, 4), ODSI_OK);
    for (uint32_t i = 0; i < 30; i++) {
        run_and_check(pool, &job, 1 + i % 7);
        run_and_check(pool, &job, 1);
    }
    pool_close(&pool);
}

static void *own_pool(void *context)
{
    struct job job = {.thread_count = 2};
    (void)context;
    for (uint32_t round = 0; round < 20; round++) {
        struct pool *pool = NULL;
        cr_assert_eq(pool_open(&pool, 2), ODSI_OK);
        for (uint32_t i = 0; i < 200; i++)
            run_and_check(pool, &job, i % 9);
        pool_close(&pool);
    }
    return NULL;
}

Test(pool, does_not_disturb_other_pools)
{
    pthread_t threads[3];
    for (uint32_t i = 0; i < 3; i++)
        cr_assert_eq(pthread_create(&threads[i], NULL, own_pool, NULL), 0);
    for (uint32_t i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
}

Test(pool, refuses_thread_counts_out_of_range)
{
    struct pool *pool = NULL;
    cr_expect_eq(pool_open(&pool, 0), ODSI_ERR_INVALID);
    cr_expect_null(pool);
    cr_expect_eq(pool_open(&pool, POOL_THREADS_MAX + 1), ODSI_ERR_INVALID);
    cr_expect_null(pool);
    pool_close(&pool);
    cr_expect_geq(pool_cpu_count(), 1u);
}
