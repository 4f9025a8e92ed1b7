#include "kernels/cpu/cpu_attention.h"

#include "common/base/alloc.h"

/* Query vectors of one piece: enough to make up for rearranging each tile of keys, few enough for
 * their scores to stay in the second-level cache. */
#define VECTORS_MAX      48u
#define SCORES_COUNT_MAX (512u * 1024u)

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static uint32_t max_u32(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

static size_t line_round(size_t count)
{
    const size_t line = ALLOC_ALIGNMENT / sizeof(float);
    return (count + line - 1) / line * line;
}

size_t cpu_attention_scratch(uint32_t vectors, uint32_t position_count, uint32_t head_dim)
{
    const size_t tiles = ((size_t)position_count + OPS_TILE_TOKENS - 1) / OPS_TILE_TOKENS;
    const size_t scores = tiles * OPS_TILE_TOKENS * vectors;
    const size_t keys = (size_t)OPS_TILE_TOKENS * head_dim;
    const size_t queries_and_sums = 2 * line_round((size_t)vectors * head_dim);
    return scores + keys + queries_and_sums + line_round(vectors);
}

/* One session's rows share a page table and ascend. */
static int joins(const struct op_batch *batch, uint32_t row)
{
    return batch->page_table[row] == batch->page_table[row - 1] &&
           batch->position[row] > batch->position[row - 1];
}

void cpu_attention_plan(struct cpu_attention_plan *plan, struct cpu_attention_part *parts,
                        uint32_t thread_count)
{
    const struct op_batch *batch = plan->batch;
    const uint32_t group = plan->params->heads / plan->pool->kv_heads;
    const uint32_t rows_max = max_u32(1, VECTORS_MAX / group);
    uint32_t count = 0;
    uint32_t rows_most = 1;
    plan->position_count = 0;
    for (uint32_t row = 0; row < batch->rows; row++) {
        const uint32_t looks = batch->position[row] + 1;
        struct cpu_attention_part *last = count > 0 ? &parts[count - 1] : NULL;
        plan->position_count = max_u32(plan->position_count, looks);
        if (last && joins(batch, row) && last->row_count < rows_max &&
            (uint64_t)(last->row_count + 1) * group * looks <= SCORES_COUNT_MAX) {
            last->row_count++;
            rows_most = max_u32(rows_most, last->row_count);
        } else {
            parts[count].row_first = row;
            parts[count].row_count = 1;
            count++;
        }
    }
    plan->parts = parts;
    plan->part_count = count;

    const uint64_t whole = (uint64_t)count * plan->pool->kv_heads;
    const uint64_t wanted = thread_count > 1 ? 2ull * thread_count : 1;
    plan->head_split = 1;
    if (whole > 0 && whole < wanted)
        plan->head_split = min_u32(group, (uint32_t)((wanted + whole - 1) / whole));
    plan->vectors_max = rows_most * ((group + plan->head_split - 1) / plan->head_split);
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
}
