/* Jobs that can fail, on several threads: how models are hashed and loaded.
 *
 * Jobs start in the order of their indices, each on whichever thread is free. After one has failed
 * no other starts; its error and its sentence become those of parallel_run.
 * Threads: one owner opens, runs and closes; jobs run on any thread. */
#ifndef ODSI_WORKER_MODEL_PARALLEL_H
#define ODSI_WORKER_MODEL_PARALLEL_H
#include "common/base/err.h"

#include <stdint.h>

struct parallel;

/* thread_count counts the caller of parallel_run; 0: one for each CPU this process may run on.
 * Errors: ODSI_ERR_INVALID (too many), ODSI_ERR_NO_MEMORY. Ended with parallel_close. */
ODSI_MUST_USE enum odsi_err parallel_open(struct parallel **out, uint32_t thread_count);
void parallel_close(struct parallel **self);
uint32_t parallel_thread_count(const struct parallel *self);

/* Calls job for each index below count and returns when all are done. thread is below
 * thread_count, so that a job can own memory by thread. */
ODSI_MUST_USE enum odsi_err parallel_run(struct parallel *self,
                                         enum odsi_err (*job)(void *context, uint32_t index,
                                                              uint32_t thread),
                                         void *context, uint32_t count);
#endif
