#include "worker/engine/prefix_key.h"

#include "common/base/bytes.h"

#define TAG_SIZE_MAX 16u

static const char prefix_tag[] = "odsi kv prefix 1";
static const char scope_tag[] = "odsi kv scope 1";
static const char page_tag[] = "odsi kv page 1";

void prefix_key_chain(struct digest *keys, const struct digest *seed, const uint32_t *tokens,
                      uint32_t key_count)
{
    uint8_t text[TAG_SIZE_MAX + DIGEST_SIZE + 4 * KV_PAGE_TOKENS];
    for (uint32_t i = 0; i < key_count; i++) {
        uint8_t *end = bytes_put(text, prefix_tag, sizeof prefix_tag - 1);
        end = bytes_put(end, (i == 0 ? seed : &keys[i - 1])->bytes, DIGEST_SIZE);
        for (uint32_t t = 0; t < KV_PAGE_TOKENS; t++)
            end = bytes_put_u32(end, tokens[(size_t)i * KV_PAGE_TOKENS + t]);
        digest_of(&keys[i], text, (size_t)(end - text));
    }
}

void prefix_key_pages(struct digest *pages, const struct digest *scope, uint32_t layer_first,
                      uint32_t layer_end, const struct digest *keys, uint32_t key_count)
{
    uint8_t text[TAG_SIZE_MAX + 2 * DIGEST_SIZE];
    struct digest before;
    uint8_t *end = bytes_put(text, scope_tag, sizeof scope_tag - 1);
    end = bytes_put(end, scope->bytes, DIGEST_SIZE);
    end = bytes_put_u32(bytes_put_u32(end, layer_first), layer_end);
    digest_of(&before, text, (size_t)(end - text));
    for (uint32_t i = 0; i < key_count; i++) {
        end = bytes_put(text, page_tag, sizeof page_tag - 1);
        end = bytes_put(end, before.bytes, DIGEST_SIZE);
        end = bytes_put(end, keys[i].bytes, DIGEST_SIZE);
        digest_of(&pages[i], text, (size_t)(end - text));
        before = pages[i];
    }
}
