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

uint32_t ref_window_first(uint32_t position, uint32_t window)
{
    return window > 0 && position >= window ? position - window + 1 : 0;
}

/* scores[p - first] for p in [first, position]; returns the largest. */
static float score(float *scores, const float *q, const struct kv_pool *pool, uint32_t layer,
                   uint32_t kv_head, const uint32_t *page_table, uint32_t first, uint32_t position,
                   const struct attention_params *params)
{
    float top = -det_from_bits(0x7f800000u);
    for (uint32_t p = first; p <= position; p++) {
        const size_t keys = ref_kv_offset(pool, page_table[p / KV_PAGE_TOKENS], layer, 0, kv_head);
        const uint16_t *k = pool->pages_dev + keys + (size_t)(p % KV_PAGE_TOKENS) * pool->head_dim;
        float value = ref_dot_f16(k, q, pool->head_dim) * params->scale;
        if (params->softcap > 0.0f)
            value = det_softcap(value, params->softcap);
        scores[p - first] = value;
        top = value > top ? value : top;
    }
    return top;
}

void ref_attention(float *out, const float *q, const struct kv_pool *pool, uint32_t layer,
                   uint32_t kv_head, const uint32_t *page_table, uint32_t position,
                   const struct attention_params *params, float *scratch)
{
    const uint32_t head_dim = pool->head_dim;
    const uint32_t first = ref_window_first(position, params->window);
    const float top = score(scratch, q, pool, layer, kv_head, page_table, first, position, params);
    float total[HEAD_DIM_MAX] = {0};
    float total_weight = 0.0f;
    for (uint32_t tile = first / OPS_TILE_TOKENS; tile <= position / OPS_TILE_TOKENS; tile++) {
        const uint16_t *values =
            pool->pages_dev + ref_kv_offset(pool, page_table[tile], layer, 1, kv_head);
        const uint32_t begin = tile * OPS_TILE_TOKENS;
        float sum[HEAD_DIM_MAX] = {0};
        float weight = 0.0f;
        for (uint32_t p = begin < first ? first : begin;
             p <= position && p < begin + OPS_TILE_TOKENS; p++) {
            const uint16_t *v = values + (size_t)(p - begin) * head_dim;
            const float e = det_exp(scratch[p - first] - top);
            weight += e;
            for (uint32_t c = 0; c < head_dim; c++)
                sum[c] = det_fma(e, det_f32_from_f16(v[c]), sum[c]);
        }
        total_weight += weight;
        for (uint32_t c = 0; c < head_dim; c++)
            total[c] += sum[c];
    }
    for (uint32_t c = 0; c < head_dim; c++)
        out[c] = total[c] / total_weight;
}
