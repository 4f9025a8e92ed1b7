#include "kernels/det.h"
#include "kernels/ref/ref.h"

/* The widest head that the definition is asked for (LIMIT_HEAD_DIM_MAX). */
#define HEAD_DIM_MAX 512u

void ref_kv_round(uint16_t *to, const float *from, size_t count)
{
    for (size_t i = 0; i < count; i++)
        to[i] = det_kv_from_f32(from[i]);
}

size_t ref_kv_offset(const struct kv_pool *pool, uint32_t page, uint32_t layer, uint32_t which,
                     uint32_t kv_head)
{
    size_t index = (size_t)page * pool->layers + layer;
    index = index * 2 + which;
    index = index * pool->kv_heads + kv_head;
    return index * KV_PAGE_TOKENS * pool->head_dim;
}

void ref_attention(float *out, const float *q, const struct kv_pool *pool, uint32_t layer,
                   uint32_t kv_head, const uint32_t *page_table, uint32_t position, float *scratch)
{
    const uint32_t head_dim = pool->head_dim;
    const float scale = 1.0f / det_sqrt((float)head_dim);
    float top = -det_from_bits(0x7f800000u);
    for (uint32_t p = 0; p <= position; p++) {
        const size_t keys = ref_kv_offset(pool, page_table[p / KV_PAGE_TOKENS], layer, 0, kv_head);
        const uint16_t *k = pool->pages_dev + keys + (size_t)(p % KV_PAGE_TOKENS) * head_dim;
        scratch[p] = ref_dot_f16(k, q, head_dim) * scale;
        top = scratch[p] > top ? scratch[p] : top;
    }

    float total[HEAD_DIM_MAX] = {0};
    float total_weight = 0.0f;
    for (uint32_t first = 0; first <= position; first += OPS_TILE_TOKENS) {
        const uint32_t page = page_table[first / KV_PAGE_TOKENS];
        const uint16_t *values = pool->pages_dev + ref_kv_offset(pool, page, layer, 1, kv_head);
        float tile[HEAD_DIM_MAX] = {0};
        float tile_weight = 0.0f;
        for (uint32_t p = first; p <= position && p < first + OPS_TILE_TOKENS; p++) {
            const uint16_t *v = values + (size_t)(p - first) * head_dim;
            const float e = det_exp(scratch[p] - top);
            tile_weight += e;
            for (uint32_t c = 0; c < head_dim; c++)
                tile[c] = det_fma(e, det_f32_from_f16(v[c]), tile[c]);
        }
        total_weight += tile_weight;
        for (uint32_t c = 0; c < head_dim; c++)
            total[c] += tile[c];
    }
    for (uint32_t c = 0; c < head_dim; c++)
        out[c] = total[c] / total_weight;
}
