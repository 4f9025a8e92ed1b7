/* Keys of prefixes: the bytes are those that the header says, and everything that matters is in. */
#include "worker/engine/prefix_key.h"

#include <criterion/criterion.h>
#include <string.h>

#define PAGES 3u

static void fill(uint32_t *tokens)
{
    for (uint32_t i = 0; i < PAGES * KV_PAGE_TOKENS; i++)
        tokens[i] = i * 2654435761u;
}

/* Method: the first two keys again, from the header's formula written out here. */
Test(prefix_key, is_the_chain_that_the_header_writes_down)
{
    uint32_t tokens[PAGES * KV_PAGE_TOKENS];
    struct digest seed, keys[PAGES], expected;
    uint8_t text[16 + DIGEST_SIZE + 256];
    fill(tokens);
    memset(seed.bytes, 7, sizeof seed.bytes);
    prefix_key_chain(keys, &seed, tokens, PAGES);
    for (uint32_t i = 0; i < 2; i++) {
        memcpy(text, "odsi kv prefix 1", 16);
        memcpy(text + 16, i == 0 ? seed.bytes : keys[0].bytes, DIGEST_SIZE);
        for (uint32_t t = 0; t < 64; t++)
            for (uint32_t byte = 0; byte < 4; byte++)
                text[48 + 4 * t + byte] = (uint8_t)(tokens[64 * i + t] >> (8 * byte));
        digest_of(&expected, text, sizeof text);
        cr_expect(digest_equal(&keys[i], &expected), "key %u", i);
    }
}

Test(prefix_key, a_token_changes_its_key_and_all_behind_it)
{
    uint32_t tokens[PAGES * KV_PAGE_TOKENS];
    struct digest seed, keys[PAGES], changed[PAGES];
    fill(tokens);
    memset(seed.bytes, 7, sizeof seed.bytes);
    prefix_key_chain(keys, &seed, tokens, PAGES);
    tokens[2 * KV_PAGE_TOKENS - 1] ^= 1u << 31;
    prefix_key_chain(changed, &seed, tokens, PAGES);
    cr_expect(digest_equal(&keys[0], &changed[0]));
    cr_expect_not(digest_equal(&keys[1], &changed[1]));
    cr_expect_not(digest_equal(&keys[2], &changed[2]));
    seed.bytes[31] ^= 1;
    prefix_key_chain(changed, &seed, tokens, PAGES);
    cr_expect_not(digest_equal(&keys[0], &changed[0]), "another seed");
}

/* Goal: pages are told apart by scope, layers and everything in front, even when a hostile gateway
 * makes its keys as it likes: here the second key is that of another chain. */
Test(prefix_key, pages_differ_by_scope_layers_and_all_keys_before)
{
    struct digest scope, keys[2], pages[2], other[2];
    memset(scope.bytes, 1, sizeof scope.bytes);
    memset(keys, 2, sizeof keys);
    prefix_key_pages(pages, &scope, 2, 4, keys, 2);
    cr_expect_not(digest_equal(&pages[0], &pages[1]), "equal keys give no equal pages");
    prefix_key_pages(other, &scope, 2, 4, keys, 2);
    cr_expect_arr_eq(other, pages, sizeof pages);
    prefix_key_pages(other, &scope, 2, 5, keys, 2);
    cr_expect_not(digest_equal(&other[0], &pages[0]));
    prefix_key_pages(other, &scope, 1, 4, keys, 2);
    cr_expect_not(digest_equal(&other[0], &pages[0]));
    scope.bytes[0] = 9;
    prefix_key_pages(other, &scope, 2, 4, keys, 2);
    cr_expect_not(digest_equal(&other[0], &pages[0]));
    scope.bytes[0] = 1;
    keys[0].bytes[5] ^= 1;
    prefix_key_pages(other, &scope, 2, 4, keys, 2);
    cr_expect_not(digest_equal(&other[1], &pages[1]), "the key before it differs");
}
