#include "kernels/det.h"
#include "kernels/ref/ref.h"

static int row_is_finite(const float *logits, uint32_t experts)
{
    for (uint32_t e = 0; e < experts; e++)
        if (!det_finite(logits[e]))
            return 0;
    return 1;
}

/* Whether expert e comes behind the pair (before, before_id) in descending order. */
static int follows(const float *logits, uint32_t e, float before, uint32_t before_id)
{
    return logits[e] < before || (logits[e] == before && e > before_id);
}

/* Which of those that follow the rank before comes first; for rank 0 all do. */
static uint32_t next_id(const float *logits, uint32_t experts, const uint32_t *ids, uint32_t rank)
{
    uint32_t best = experts;
    for (uint32_t e = 0; e < experts; e++) {
        if (rank > 0 && !follows(logits, e, logits[ids[rank - 1]], ids[rank - 1]))
            continue;
        if (best == experts || logits[e] > logits[best])
            best = e;
    }
    return best;
}

void ref_route(uint32_t *ids, float *weights, const float *logits, uint32_t experts, uint32_t used)
{
    if (!row_is_finite(logits, experts)) {
        for (uint32_t j = 0; j < used; j++) {
            ids[j] = j;
            weights[j] = det_from_bits(0x7fc00000u);
        }
        return;
    }
    float sum = 0.0f;
    for (uint32_t j = 0; j < used; j++) {
        ids[j] = next_id(logits, experts, ids, j);
        weights[j] = det_exp(logits[ids[j]] - logits[ids[0]]);
        sum += weights[j];
    }
    for (uint32_t j = 0; j < used; j++)
        weights[j] = weights[j] / sum;
}

void ref_combine(float *out, const float *y, const float *weights, uint32_t used, uint32_t cols)
{
    for (uint32_t c = 0; c < cols; c++) {
        float sum = 0.0f;
        for (uint32_t j = 0; j < used; j++)
            sum = det_fma(weights[j], y[(size_t)j * cols + c], sum);
        out[c] = sum;
    }
}
