/* The CPU backends: one implementation over a pool of threads and a table of inner loops; "scalar",
 * "avx2" and "avx512" differ in the table alone. */
#ifndef ODSI_KERNELS_CPU_CPU_BACKEND_H
#define ODSI_KERNELS_CPU_CPU_BACKEND_H
#include "common/base/err.h"
#include "kernels/backend.h"

#include <stdint.h>

enum cpu_level { CPU_SCALAR = 0, CPU_AVX2 = 1, CPU_AVX512 = 2 };
#define CPU_LEVEL_COUNT 3u

/* "scalar", "avx2", "avx512". */
const char *cpu_level_name(enum cpu_level level);
/* NULL when this processor and system run level; otherwise what they lack, as text. */
const char *cpu_level_lacks(enum cpu_level level);

/* level must not lack anything. thread_count 0: one per CPU this process may run on.
 * Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_INVALID (thread_count). Ended with backend_close. */
ODSI_MUST_USE enum odsi_err cpu_backend_open(struct backend **out, enum cpu_level level,
                                             uint32_t thread_count);
#endif
