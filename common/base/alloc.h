/* Memory: the only door to malloc, so that sizes are checked once and tests can refuse the Nth
 * call. All functions may be called from any thread. */
#ifndef ODSI_COMMON_BASE_ALLOC_H
#define ODSI_COMMON_BASE_ALLOC_H
#include "common/base/err.h"
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Cache line and widest vector; alloc_aligned uses it. */
#define ALLOC_ALIGNMENT 64u

/* Zeroed memory for count elements of element_size bytes. *out is NULL on error.
 * count may be 0: *out is then a pointer that alloc_free accepts.
 * Errors: ODSI_ERR_NO_MEMORY (also when the product overflows).
 * Owned: by the caller, ended with alloc_free. */
ODSI_MUST_USE enum odsi_err alloc_zeroed(void *out_pointer, size_t count, size_t element_size);

/* As alloc_zeroed, aligned to ALLOC_ALIGNMENT; also ended with alloc_free. */
ODSI_MUST_USE enum odsi_err alloc_aligned(void *out_pointer, size_t count, size_t element_size);

/* Zeroed memory in pages of its own that the system is asked to make large ones: size bytes,
 * aligned to ALLOC_LARGE_PAGE. Nothing of it is there before it is touched.
 * Errors: ODSI_ERR_NO_MEMORY. Ended with alloc_pages_free, which takes the same size. */
#define ALLOC_LARGE_PAGE ((size_t)2 << 20)
ODSI_MUST_USE enum odsi_err alloc_pages(void *out_pointer, size_t size);
void alloc_pages_free(void *memory, size_t size);

/* Makes *pointer hold count elements, keeping its content; new bytes are not cleared.
 * On error *pointer is unchanged and still owned. */
ODSI_MUST_USE enum odsi_err alloc_resize(void *pointer, size_t count, size_t element_size);

/* A NUL-terminated copy of the first size bytes of text. */
ODSI_MUST_USE enum odsi_err alloc_text(char **out, const char *text, size_t size);

/* Accepts NULL. */
void alloc_free(void *memory);

/* For tests: the call after the next `count` ones fails; negative means never (the default). */
void alloc_fail_after(long count);

#ifdef __cplusplus
}
#endif
#endif
