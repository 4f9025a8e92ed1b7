/* Makers of valid wishes and rows, to be spoiled or varied by each test, and a repeatable source
 * of random numbers. */
#ifndef ODSI_TESTS_UNIT_COORDINATOR_COORDINATOR_FIXTURE_H
#define ODSI_TESTS_UNIT_COORDINATOR_COORDINATOR_FIXTURE_H
#include "coordinator/members.h"

#include <stdint.h>
#include <stdio.h>
#include <string.h>

/* A time in 2026, as rows have it. */
#define FIXTURE_NOW_US 1790000000000000u

struct fixture_random {
    uint64_t state;
};

static inline uint64_t fixture_next(struct fixture_random *self)
{
    self->state ^= self->state << 13;
    self->state ^= self->state >> 7;
    self->state ^= self->state << 17;
    return self->state;
}

/* 0 to bound - 1. */
static inline uint32_t fixture_below(struct fixture_random *self, uint32_t bound)
{
    return (uint32_t)(fixture_next(self) >> 33) % bound;
}

static inline struct digest fixture_id(uint32_t number)
{
    struct digest id;
    memset(&id, 0, sizeof id);
    for (unsigned i = 0; i < 4; i++)
        id.bytes[i] = (uint8_t)(number >> (24 - 8 * i));
    return id;
}

/* Worker `number` at 10.0.0.1:(1000 + number), all 12 layers of one model. */
static inline struct members_wish fixture_wish(uint32_t number)
{
    struct members_wish wish;
    memset(&wish, 0, sizeof wish);
    wish.worker_id = fixture_id(number);
    snprintf(wish.address, sizeof wish.address, "10.0.0.1:%u", 1000 + number);
    memset(wish.model.id.bytes, 7, DIGEST_SIZE);
    snprintf(wish.model.name, sizeof wish.model.name, "story-110m");
    wish.model.layer_count = 12;
    wish.model.context_length = 1024;
    wish.model.numerics_version = 1;
    wish.layer_end = 12;
    wish.capability.memory_size = (uint64_t)8 << 30;
    wish.capability.kv_token_capacity = 65536;
    wish.capability.prefill_tokens_per_s = 900.0f;
    wish.capability.decode_tokens_per_s = 80.0f;
    snprintf(wish.capability.backend, sizeof wish.capability.backend, "avx2");
    wish.capability.thread_count = 8;
    return wish;
}

/* The same, the coordinator to choose among 12 layers. */
static inline struct members_wish fixture_wish_auto(uint32_t number, uint32_t capacity)
{
    struct members_wish wish = fixture_wish(number);
    wish.layer_end = 0;
    wish.layer_capacity = capacity;
    return wish;
}
#endif
