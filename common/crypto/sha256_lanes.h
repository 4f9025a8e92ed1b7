/* The inner loop of SHA-256 for several messages at once, by the instructions that x86 has for it.
 * A message alone waits for each result before the next step can begin; the steps of the others
 * fill the wait, so that four take little longer than two. Pure; any thread. */
#ifndef ODSI_COMMON_CRYPTO_SHA256_LANES_H
#define ODSI_COMMON_CRYPTO_SHA256_LANES_H
#include <stddef.h>
#include <stdint.h>

#define SHA256_LANES_MAX  4u
#define SHA256_BLOCK_SIZE 64u

struct sha256_state {
    uint32_t h[8];
};

/* Whether this processor has the instructions; without them nothing below may be called. */
int sha256_lanes_available(void);
/* The state before the first block. */
void sha256_lanes_start(struct sha256_state *out);
/* Takes block_count blocks of each of lane_count messages, 1 to SHA256_LANES_MAX. */
void sha256_lanes_add(struct sha256_state *const *states, const uint8_t *const *data,
                      uint32_t lane_count, size_t block_count);
#endif
