#include "kernels/cpu/cpu_attention.h"

#include "kernels/ref/ref.h"

/* Scores that a piece holds at once (4 MiB), unless a single head of a single row has more: what
 * bounds the memory of a thread, and what still finds its place in a cache. */
#define SCORES_COUNT_MAX (1024u * 1024u)

/* The widest panel of values of any instruction set, in columns. */
#define PANEL_COLS 32u

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

static uint32_t ceil_div(uint64_t count, uint32_t by)
{
    return (uint32_t)((count + by - 1) / by);
}

/* Enough for every instruction set; the scalar loops need the scores of one vector alone. */
static size_t scratch_count(uint32_t vectors, uint32_t tiles, uint32_t head_dim)
{
    const size_t cols = (size_t)ceil_div(head_dim, PANEL_COLS) * PANEL_COLS;
    const size_t panel = OPS_TILE_TOKENS * cols;
    const size_t scores = (size_t)vectors * tiles * OPS_TILE_TOKENS;
    const size_t queries = cpu_attention_line_round((size_t)vectors * head_dim);
    const size_t totals = (size_t)vectors * cols;
    const size_t tile_weights = cpu_attention_line_round((size_t)vectors * tiles);
    return panel + scores + queries + totals + tile_weights;
}

/* One session's rows share a page table and ascend. */
static int joins(const struct op_batch *batch, uint32_t row)
{
    return batch->page_table[row] == batch->page_table[row - 1] &&
           batch->position[row] > batch->position[row - 1];
}

/* A row's place in a part of its own. */
static struct cpu_attention_part part_of(const struct cpu_attention_plan *plan, uint32_t row)
{
    const uint32_t position = plan->batch->position[row];
    const uint32_t first = ref_window_first(position, plan->params->window) / OPS_TILE_TOKENS;
    return (struct cpu_attention_part){.row_first = row,
                                       .row_count = 1,
                                       .tile_first = first,
                                       .tile_count = position / OPS_TILE_TOKENS + 1 - first};
}

/* Puts the rows into parts; returns the most tiles that a part of one row looks at. */
static uint32_t parts_fill(struct cpu_attention_plan *plan, struct cpu_attention_part *parts,
                           uint32_t group)
{
    const uint32_t rows_max = max_u32(1, CPU_ATTENTION_VECTORS_MAX / group);
    uint32_t tiles_most = 0;
    uint32_t count = 0;
    for (uint32_t row = 0; row < plan->batch->rows; row++) {
        const struct cpu_attention_part alone = part_of(plan, row);
        struct cpu_attention_part *last = count > 0 ? &parts[count - 1] : NULL;
        tiles_most = max_u32(tiles_most, alone.tile_count);
        plan->tile_rows += alone.tile_count;
        if (last && joins(plan->batch, row) && last->row_count < rows_max) {
            const uint32_t tiles = alone.tile_first + alone.tile_count - last->tile_first;
            const uint64_t vectors = (uint64_t)(last->row_count + 1) * group;
            if (vectors * tiles * OPS_TILE_TOKENS <= SCORES_COUNT_MAX) {
                last->row_count++;
                last->tile_count = tiles;
                continue;
            }
        }
        parts[count++] = alone;
    }
    plan->part_count = count;
    return tiles_most;
}

void cpu_attention_plan(struct cpu_attention_plan *plan, struct cpu_attention_part *parts,
                        uint32_t thread_count)
{
    const uint32_t group = plan->params->heads / plan->pool->kv_heads;
    plan->parts = parts;
    plan->tile_rows = 0;
    const uint64_t positions = (uint64_t)parts_fill(plan, parts, group) * OPS_TILE_TOKENS;

    /* as many heads together as their scores may be kept of, in enough pieces for all threads */
    uint32_t split = max_u32(ceil_div(group, CPU_ATTENTION_VECTORS_MAX),
                             ceil_div(group * positions, SCORES_COUNT_MAX));
    const uint64_t whole = (uint64_t)plan->part_count * plan->pool->kv_heads;
    const uint64_t wanted = thread_count > 1 ? 2ull * thread_count : 1;
    if (whole > 0 && whole < wanted)
        split = max_u32(split, (uint32_t)((wanted + whole - 1) / whole));
    plan->head_split = min_u32(group, split);

    plan->scratch_count = 0;
    for (uint32_t i = 0; i < plan->part_count; i++) {
        const uint32_t vectors = parts[i].row_count * ceil_div(group, plan->head_split);
        const size_t count = scratch_count(vectors, parts[i].tile_count, plan->pool->head_dim);
        plan->scratch_count = count > plan->scratch_count ? count : plan->scratch_count;
    }
}

uint64_t cpu_attention_piece_count(const struct cpu_attention_plan *plan)
{
    return (uint64_t)plan->part_count * plan->pool->kv_heads * plan->head_split;
}

void cpu_attention_piece(struct cpu_attention *out, const struct cpu_attention_plan *plan,
                         uint64_t index)
{
    const uint32_t kv_heads = plan->pool->kv_heads;
    const uint32_t group = plan->params->heads / kv_heads;
    const uint32_t split = (uint32_t)(index % plan->head_split);
    const uint32_t kv_head = (uint32_t)(index / plan->head_split % kv_heads);
    const struct cpu_attention_part *part = &plan->parts[index / plan->head_split / kv_heads];
    const uint32_t first = (uint32_t)((uint64_t)split * group / plan->head_split);
    const uint32_t end = (uint32_t)((uint64_t)(split + 1) * group / plan->head_split);
    const size_t offset = (size_t)part->row_first * plan->params->heads * plan->pool->head_dim;
    out->out = plan->out + offset;
    out->q = plan->q + offset;
    out->pool = plan->pool;
    out->page_table = plan->batch->page_table[part->row_first];
    out->position = plan->batch->position + part->row_first;
    out->rows = part->row_count;
    out->params = plan->params;
    out->layer = plan->layer;
    out->kv_head = kv_head;
    out->head_first = kv_head * group + first;
    out->head_count = end - first;
    out->tile_first = part->tile_first;
    out->tile_count = part->tile_count;
}
