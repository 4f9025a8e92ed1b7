#include "common/crypto/sha256_lanes.h"

#include "common/base/assert.h"

#include <string.h>

void sha256_lanes_start(struct sha256_state *out)
{
    static const struct sha256_state start = {{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                               0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}};
    *out = start;
}

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#define TARGET __attribute__((target("sha,sse4.1,ssse3")))

int sha256_lanes_available(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_SSSE3) || !(c & bit_SSE4_1))
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & bit_SHA) != 0;
}

/* FIPS 180-4, 4.2.2. */
static const uint32_t round_constants[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/* The eight words of a state as the instructions want them. */
struct halves {
    __m128i abef;
    __m128i cdgh;
};

TARGET static inline __attribute__((always_inline)) struct halves
load_state(const struct sha256_state *state)
{
    const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128((const void *)&state->h[0]), 0xb1);
    const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128((const void *)&state->h[4]), 0x1b);
    return (struct halves){.abef = _mm_alignr_epi8(badc, hgfe, 8),
                           .cdgh = _mm_blend_epi16(hgfe, badc, 0xf0)};
}

TARGET static inline __attribute__((always_inline)) void store_state(struct sha256_state *state,
                                                                     struct halves from)
{
    const __m128i feba = _mm_shuffle_epi32(from.abef, 0x1b);
    const __m128i dchg = _mm_shuffle_epi32(from.cdgh, 0xb1);
    _mm_storeu_si128((void *)&state->h[0], _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128((void *)&state->h[4], _mm_alignr_epi8(dchg, feba, 8));
}

/* Words 4 * group .. + 3 of the message schedule; words holds the last sixteen, and takes them. */
TARGET static inline __attribute__((always_inline)) __m128i
next_words(__m128i words[4], const uint8_t *block, uint32_t group)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    __m128i *at = &words[group % 4];
    if (group < 4) {
        const __m128i bytes = _mm_loadu_si128((const void *)(block + (size_t)group * 16));
        *at = _mm_shuffle_epi8(bytes, big_endian);
        return *at;
    }
    const __m128i last = words[(group + 3) % 4];
    const __m128i shifted = _mm_alignr_epi8(last, words[(group + 2) % 4], 4);
    const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(*at, words[(group + 1) % 4]), shifted);
    *at = _mm_sha256msg2_epu32(sum, last);
    return *at;
}

/* lanes is a constant where this is inlined. */
TARGET static inline __attribute__((always_inline)) void
add_blocks(struct sha256_state *const *states, const uint8_t *const *data, uint32_t lanes,
           size_t block_count)
{
    struct halves now[SHA256_LANES_MAX];
    __m128i words[SHA256_LANES_MAX][4];
    for (uint32_t lane = 0; lane < lanes; lane++)
        now[lane] = load_state(states[lane]);
    for (size_t block = 0; block < block_count; block++) {
        struct halves before[SHA256_LANES_MAX];
        for (uint32_t lane = 0; lane < lanes; lane++)
            before[lane] = now[lane];
#pragma GCC unroll 16
        for (uint32_t group = 0; group < 16; group++) {
            const __m128i constants = _mm_loadu_si128((const void *)&round_constants[4 * group]);
#pragma GCC unroll 4
            for (uint32_t lane = 0; lane < lanes; lane++) {
                struct halves *h = &now[lane];
                const uint8_t *at = data[lane] + block * SHA256_BLOCK_SIZE;
                const __m128i sum = _mm_add_epi32(next_words(words[lane], at, group), constants);
                h->cdgh = _mm_sha256rnds2_epu32(h->cdgh, h->abef, sum);
                h->abef = _mm_sha256rnds2_epu32(h->abef, h->cdgh, _mm_shuffle_epi32(sum, 0x0e));
            }
        }
        for (uint32_t lane = 0; lane < lanes; lane++) {
            now[lane].abef = _mm_add_epi32(now[lane].abef, before[lane].abef);
            now[lane].cdgh = _mm_add_epi32(now[lane].cdgh, before[lane].cdgh);
        }
    }
    for (uint32_t lane = 0; lane < lanes; lane++)
        store_state(states[lane], now[lane]);
}

TARGET void sha256_lanes_add(struct sha256_state *const *states, const uint8_t *const *data,
                             uint32_t lane_count, size_t block_count)
{
    ODSI_ASSERT(lane_count >= 1 && lane_count <= SHA256_LANES_MAX);
    switch (lane_count) {
    case 1:
        add_blocks(states, data, 1, block_count);
        return;
    case 2:
        add_blocks(states, data, 2, block_count);
        return;
    case 3:
        add_blocks(states, data, 3, block_count);
        return;
    default:
        add_blocks(states, data, 4, block_count);
    }
}

#else

int sha256_lanes_available(void)
{
    return 0;
}

void sha256_lanes_add(struct sha256_state *const *states, const uint8_t *const *data,
                      uint32_t lane_count, size_t block_count)
{
    (void)states, (void)data, (void)lane_count, (void)block_count;
    ODSI_ASSERT(0); /* not available */
}
#endif
