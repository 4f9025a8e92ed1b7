/* Time that only moves forward, in microseconds, and a clock that tests can advance by hand.
 * State machines take a struct clock and never ask the system themselves. Any thread. */
#ifndef ODSI_COMMON_BASE_CLOCK_H
#define ODSI_COMMON_BASE_CLOCK_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct clock {
    uint64_t (*now_us)(void *context);
    void *context;
};

/* CLOCK_MONOTONIC; its zero is arbitrary, so only differences mean anything. */
uint64_t clock_monotonic_us(void);
/* Microseconds since 1970, for humans and for rows that outlive a process. */
uint64_t clock_unix_us(void);
/* The system's monotonic clock as a struct clock. */
struct clock clock_system(void);
/* A clock that shows *now_us, which the caller advances. */
struct clock clock_manual(uint64_t *now_us);

static inline uint64_t clock_now_us(const struct clock *self)
{
    return self->now_us(self->context);
}

#ifdef __cplusplus
}
#endif
#endif
