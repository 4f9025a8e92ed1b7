#include "coordinator/assign.h"

#include "common/base/alloc.h"
#include "common/base/limits.h"

/* One per layer. */
struct layer {
    uint32_t holder_count;
    uint32_t gap_size; /* layers of the run of least replicated ones that this one is in; else 0 */
    double speed;      /* of all holders together */
};

/* What the order of comparison in the header looks at. */
struct window {
    uint32_t first;
    uint32_t weak_count; /* least replicated layers inside: more is better */
    uint64_t holder_sum; /* less is better */
    double speed_min;    /* less is better */
    double speed_sum;    /* less is better */
    uint32_t gap_size;   /* of the gap that holds all of it, 0 if none does: less is better */
};

static enum odsi_err count_holders(struct layer *layers, uint32_t layer_count,
                                   const struct assign_range *ranges, size_t range_count)
{
    for (size_t i = 0; i < range_count; i++) {
        if (ranges[i].first >= ranges[i].end || ranges[i].end > layer_count)
            return odsi_fail(ODSI_ERR_INVALID, "layers %u-%u lie outside a model of %u",
                             ranges[i].first, ranges[i].end, layer_count);
        for (uint32_t layer = ranges[i].first; layer < ranges[i].end; layer++) {
            layers[layer].holder_count++;
            layers[layer].speed += (double)ranges[i].speed;
        }
    }
    return ODSI_OK;
}

static uint32_t least_holders(const struct layer *layers, uint32_t layer_count)
{
    uint32_t least = layers[0].holder_count;
    for (uint32_t i = 1; i < layer_count; i++)
        if (layers[i].holder_count < least)
            least = layers[i].holder_count;
    return least;
}

static void measure_gaps(struct layer *layers, uint32_t layer_count, uint32_t least)
{
    for (uint32_t first = 0; first < layer_count;) {
        uint32_t end = first;
        while (end < layer_count && layers[end].holder_count == least)
            end++;
        for (uint32_t i = first; i < end; i++)
            layers[i].gap_size = end - first;
        first = end > first ? end : first + 1;
    }
}

static struct window measure_window(const struct layer *layers, uint32_t first, uint32_t size,
                                    uint32_t least)
{
    struct window window = {.first = first, .speed_min = layers[first].speed};
    for (uint32_t i = first; i < first + size; i++) {
        window.weak_count += layers[i].holder_count == least;
        window.holder_sum += layers[i].holder_count;
        window.speed_sum += layers[i].speed;
        if (layers[i].speed < window.speed_min)
            window.speed_min = layers[i].speed;
    }
    if (window.weak_count == size)
        window.gap_size = layers[first].gap_size;
    return window;
}

/* Whether a is strictly better than b. */
static int is_better(const struct window *a, const struct window *b)
{
    if (a->weak_count != b->weak_count)
        return a->weak_count > b->weak_count;
    if (a->holder_sum != b->holder_sum)
        return a->holder_sum < b->holder_sum;
    if (a->speed_min < b->speed_min || a->speed_min > b->speed_min)
        return a->speed_min < b->speed_min;
    if (a->speed_sum < b->speed_sum || a->speed_sum > b->speed_sum)
        return a->speed_sum < b->speed_sum;
    return a->gap_size < b->gap_size;
}

enum odsi_err assign_choose(uint32_t *out_first, uint32_t *out_end,
                            const struct assign_range *ranges, size_t range_count,
                            uint32_t layer_count, uint32_t capacity)
{
    struct layer *layers = NULL;
    if (layer_count == 0 || layer_count > LIMIT_LAYERS_MAX || capacity == 0)
        return odsi_fail(ODSI_ERR_INVALID, "%u layers of a model of %u cannot be assigned",
                         capacity, layer_count);
    const uint32_t size = capacity < layer_count ? capacity : layer_count;
    enum odsi_err err = alloc_zeroed(&layers, layer_count, sizeof *layers);
    if (err != ODSI_OK)
        return err;
    err = count_holders(layers, layer_count, ranges, range_count);
    if (err != ODSI_OK)
        goto fail;
    const uint32_t least = least_holders(layers, layer_count);
    measure_gaps(layers, layer_count, least);
    struct window best = measure_window(layers, 0, size, least);
    for (uint32_t first = 1; first + size <= layer_count; first++) {
        const struct window window = measure_window(layers, first, size, least);
        if (is_better(&window, &best))
            best = window;
    }
    *out_first = best.first;
    *out_end = best.first + size;
fail:
    alloc_free(layers);
    return err;
}
