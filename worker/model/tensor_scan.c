#include "worker/model/tensor_scan.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/limits.h"
#include "kernels/ops.h"

#include <pthread.h>
#include <stdlib.h>

/* What is read at once: enough for a system call not to matter, and little enough to be in the
 * second-level cache still when it is hashed and repacked. */
#define CHUNK_SIZE (256u << 10)
/* Repacking puts neighbouring rows together; whole groups of any backend are in so many. */
#define CHUNK_ROWS 64u
#define ROW_SIZE_MAX                                                                               \
    ((LIMIT_FFN_MAX > LIMIT_DIM_MAX ? LIMIT_FFN_MAX : LIMIT_DIM_MAX) * sizeof(float))

/* What one thread works in. */
struct lane {
    uint8_t *chunk;
    size_t chunk_size;
    struct digest_stream *stream;
};

struct scan {
    const struct tensor_scan *wanted;
    const struct source_tensor **order; /* [tensor_count], largest first */
    struct lane *lanes;
    uint32_t lane_count;
    pthread_mutex_t lock; /* of the next two */
    uint64_t done;
    uint64_t total;
};

static uint64_t row_size_of(const struct source_tensor *tensor)
{
    return tensor->size / (tensor->dims[1] * tensor->dims[2]);
}

static void add_progress(struct scan *self, uint64_t size)
{
    if (!self->wanted->progress)
        return;
    pthread_mutex_lock(&self->lock);
    self->done += size;
    self->wanted->progress(self->wanted->progress_context, self->done, self->total);
    pthread_mutex_unlock(&self->lock);
}

/* How many rows of a tensor to read at once. */
static uint64_t rows_at_once(const struct lane *lane, uint64_t row_size)
{
    const uint64_t rows = lane->chunk_size / row_size;
    ODSI_ASSERT(rows > 0);
    return rows < CHUNK_ROWS ? rows : rows / CHUNK_ROWS * CHUNK_ROWS;
}

static enum odsi_err scan_tensor(void *context, uint32_t index, uint32_t thread)
{
    struct scan *self = context;
    const struct tensor_scan *wanted = self->wanted;
    const struct source_tensor *tensor = self->order[index];
    const uint32_t number = (uint32_t)(tensor - wanted->source->tensors);
    const struct lane *lane = &self->lanes[thread];
    const uint64_t row_size = row_size_of(tensor);
    const uint64_t row_count = tensor->dims[1] * tensor->dims[2];
    const uint64_t step = rows_at_once(lane, row_size);
    struct digest digest;
    for (uint64_t row = 0; row < row_count; row += step) {
        const uint64_t rows = row_count - row < step ? row_count - row : step;
        const size_t size = (size_t)(rows * row_size);
        enum odsi_err err = source_read(wanted->source, tensor, row * row_size, lane->chunk, size);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "tensor %s", tensor->name);
        digest_stream_add(lane->stream, lane->chunk, size);
        if (wanted->rows)
            err = wanted->rows(wanted->context, number, row, rows, lane->chunk);
        if (err != ODSI_OK)
            return err;
        add_progress(self, size);
    }
    digest_stream_finish(lane->stream, &digest);
    return wanted->digest(wanted->context, number, &digest);
}

static int compare_sizes(const void *a, const void *b)
{
    const struct source_tensor *const *left = a;
    const struct source_tensor *const *right = b;
    if ((*left)->size != (*right)->size)
        return (*left)->size > (*right)->size ? -1 : 1;
    return (*left > *right) - (*left < *right); /* both in one array */
}

/* Fills order and total; returns how large a chunk must be. */
static size_t make_order(struct scan *self)
{
    const struct tensor_scan *wanted = self->wanted;
    uint64_t largest_row = 0;
    for (uint32_t i = 0; i < wanted->tensor_count; i++) {
        const struct source_tensor *tensor = &wanted->source->tensors[wanted->tensors[i]];
        const uint64_t row_size = row_size_of(tensor);
        self->order[i] = tensor;
        self->total += tensor->size; /* tensors do not overlap in their files */
        largest_row = row_size > largest_row ? row_size : largest_row;
    }
    ODSI_ASSERT(largest_row <= ROW_SIZE_MAX); /* arch_check_tensors */
    if (wanted->tensor_count > 1)
        qsort(self->order, wanted->tensor_count, sizeof *self->order, compare_sizes);
    return largest_row > CHUNK_SIZE ? (size_t)largest_row : CHUNK_SIZE;
}

static enum odsi_err open_lanes(struct scan *self, size_t chunk_size)
{
    enum odsi_err err = alloc_zeroed(&self->lanes, self->lane_count, sizeof *self->lanes);
    for (uint32_t i = 0; i < self->lane_count && err == ODSI_OK; i++) {
        self->lanes[i].chunk_size = chunk_size;
        err = alloc_aligned(&self->lanes[i].chunk, chunk_size, 1);
        if (err == ODSI_OK)
            err = digest_stream_open(&self->lanes[i].stream);
    }
    return err;
}

static void close_lanes(struct scan *self)
{
    for (uint32_t i = 0; self->lanes && i < self->lane_count; i++) {
        digest_stream_close(&self->lanes[i].stream);
        alloc_free(self->lanes[i].chunk);
    }
    alloc_free(self->lanes);
}

enum odsi_err tensor_scan_run(const struct tensor_scan *self, struct parallel *threads)
{
    struct scan scan = {.wanted = self, .lane_count = parallel_thread_count(threads)};
    pthread_mutex_init(&scan.lock, NULL); /* with these attributes it cannot fail */
    enum odsi_err err = alloc_zeroed(&scan.order, self->tensor_count, sizeof *scan.order);
    if (err == ODSI_OK)
        err = open_lanes(&scan, make_order(&scan));
    if (err == ODSI_OK)
        err = parallel_run(threads, scan_tensor, &scan, self->tensor_count);
    close_lanes(&scan);
    alloc_free(scan.order);
    pthread_mutex_destroy(&scan.lock);
    return err;
}
