#include "common/base/clock.h"

#include <time.h>

static uint64_t read_us(clockid_t id)
{
    struct timespec now;
    clock_gettime(id, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

uint64_t clock_monotonic_us(void)
{
    return read_us(CLOCK_MONOTONIC);
}

uint64_t clock_unix_us(void)
{
    return read_us(CLOCK_REALTIME);
}

static uint64_t system_now(void *context)
{
    (void)context;
    return clock_monotonic_us();
}

static uint64_t manual_now(void *context)
{
    return *(const uint64_t *)context;
}

struct clock clock_system(void)
{
    return (struct clock){.now_us = system_now, .context = NULL};
}

struct clock clock_manual(uint64_t *now_us)
{
    return (struct clock){.now_us = manual_now, .context = now_us};
}
