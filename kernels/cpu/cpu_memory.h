/* The memory of a CPU backend. Large pieces lie in regions of large pages: a decode reads every
 * weight once per token, and walks through the tables of small pages would cost several percent of
 * that; and the first touch of small pages would take longer than all else that loading does.
 * Small ones come from alloc.h. All of it is zeroed.
 *
 * Threads: any, at once. */
#ifndef ODSI_KERNELS_CPU_CPU_MEMORY_H
#define ODSI_KERNELS_CPU_CPU_MEMORY_H
#include "common/base/err.h"

#include <pthread.h>
#include <stddef.h>

#define CPU_MEMORY_LARGE ((size_t)256 << 10) /* from this on */

struct cpu_region;

struct cpu_memory {
    pthread_mutex_t lock;
    struct cpu_region *regions; /* newest first */
};

/* In the caller's memory. What was taken must be given back before the close. */
void cpu_memory_init(struct cpu_memory *self);
void cpu_memory_close(struct cpu_memory *self);

/* size bytes, aligned to ALLOC_ALIGNMENT. shares: whether it may lie in one region with others,
 * whose memory the system then gets back together with it: for what comes and goes together, such
 * as weights. Errors: ODSI_ERR_NO_MEMORY. Given back with cpu_memory_give_back. */
ODSI_MUST_USE enum odsi_err cpu_memory_take(struct cpu_memory *self, void *out_pointer, size_t size,
                                            int shares);
/* Accepts NULL. */
void cpu_memory_give_back(struct cpu_memory *self, void *memory);
#endif
