/* Assertions for our own mistakes, on in every build. Nothing that a peer, a file or a flag can
 * cause may reach one: bad input is an enum odsi_err. */
#ifndef ODSI_COMMON_BASE_ASSERT_H
#define ODSI_COMMON_BASE_ASSERT_H
#include <stdio.h>
#include <stdlib.h>

#define ODSI_ASSERT(condition)                                                                     \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "odsi: bug: %s:%d: %s\n", __FILE__, __LINE__, #condition);             \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#ifdef __cplusplus
#define ODSI_STATIC_ASSERT(condition, why) static_assert(condition, why)
#else
#define ODSI_STATIC_ASSERT(condition, why) _Static_assert(condition, why)
#endif
#endif
