/* The threads of a CPU backend: runs `count` tasks of one job on all of them and returns when the
 * last one is done.
 *
 * Tasks are claimed one by one by whoever is free, so a thread that the system has put aside holds
 * up at most the task it has in hand; which thread ran what never shows in the results, because a
 * task writes only what belongs to its index. Idle threads spin for some microseconds (less after
 * each time that it was in vain) and then sleep, so that several workers can share a machine.
 *
 * Threads: one owner calls open, run and close; jobs run on any thread of the pool. */
#ifndef ODSI_KERNELS_CPU_POOL_H
#define ODSI_KERNELS_CPU_POOL_H
#include "common/base/err.h"

#include <stdint.h>

#define POOL_THREADS_MAX 1024u
#define POOL_TASKS_MAX   (1u << 24) /* tasks of one job are fewer than this */

struct pool;

/* thread: 0 .. thread_count - 1, so that a job can own scratch memory by thread. */
typedef void pool_task(void *context, uint32_t index, uint32_t thread);

/* thread_count counts the caller of pool_run: one thread fewer is started.
 * Errors: ODSI_ERR_INVALID (thread_count 0 or above POOL_THREADS_MAX), ODSI_ERR_NO_MEMORY (also
 * when the system starts no more threads). */
ODSI_MUST_USE enum odsi_err pool_open(struct pool **out, uint32_t thread_count);
/* Ends the threads; *self may be NULL. */
void pool_close(struct pool **self);

uint32_t pool_thread_count(const struct pool *self);

/* Calls task(context, index, thread) for every index below count, in any order. */
void pool_run(struct pool *self, pool_task *task, void *context, uint32_t count);

/* How many CPUs this process may run on; at least 1. */
uint32_t pool_cpu_count(void);
#endif
