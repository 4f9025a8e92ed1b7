#include "worker/model/tensor_scan.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/limits.h"
#include "kernels/ops.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

/* What is read at once of a tensor: enough for a system call not to matter, and little enough that
 * the pieces of all lanes are in the second-level cache still when they are hashed and repacked. */
#define CHUNK_SIZE     (128u << 10)
#define CHUNK_SIZE_MAX (2u << 20)
/* Repacking puts neighbouring rows together; whole groups of any CPU backend are in so many. */
#define CHUNK_ROWS 16u
#define LANES      DIGEST_TOGETHER_MAX
#define ROW_SIZE_MAX                                                                               \
    ((LIMIT_FFN_MAX > LIMIT_DIM_MAX ? LIMIT_FFN_MAX : LIMIT_DIM_MAX) * sizeof(float))

/* A tensor that is being read, and its place to read into. */
struct lane {
    uint8_t *chunk;
    struct digest_stream *stream;
    const struct source_tensor *tensor; /* NULL: none */
    uint64_t row_size;
    uint64_t row_count;
    uint64_t row;  /* of the chunk's first */
    uint64_t rows; /* in the chunk */
};

struct scan {
    const struct tensor_scan *wanted;
    const struct source_tensor **order; /* [tensor_count], largest first */
    atomic_uint next;                   /* in order */
    atomic_int has_failed;
    struct lane *lanes; /* [thread][LANES] */
    uint32_t lane_count;
    size_t chunk_size;
    pthread_mutex_t lock; /* of the next two */
    uint64_t done;
    uint64_t total;
};

static void add_progress(struct scan *self, uint64_t size)
{
    if (!self->wanted->progress)
        return;
    pthread_mutex_lock(&self->lock);
    self->done += size;
    self->wanted->progress(self->wanted->progress_context, self->done, self->total);
    pthread_mutex_unlock(&self->lock);
}

/* ---- one thread ------------------------------------------------------------------------------ */

/* Gives lanes that have none a tensor, as long as there are some. Returns how many have one; those
 * come first. */
static uint32_t take_tensors(struct scan *self, struct lane *lanes)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < LANES; i++) {
        struct lane *lane = &lanes[i];
        if (!lane->tensor) {
            const uint32_t index = atomic_fetch_add(&self->next, 1);
            if (index >= self->wanted->tensor_count) {
                atomic_store(&self->next, self->wanted->tensor_count); /* it must not wrap */
                continue;
            }
            lane->tensor = self->order[index];
            lane->row_count = lane->tensor->dims[1] * lane->tensor->dims[2];
            lane->row_size = lane->tensor->size / lane->row_count;
            lane->row = 0;
        }
        const struct lane moved = *lane;
        *lane = lanes[count];
        lanes[count++] = moved;
    }
    return count;
}

static enum odsi_err read_chunk(const struct scan *self, struct lane *lane)
{
    const uint64_t left = lane->row_count - lane->row;
    uint64_t rows = CHUNK_SIZE / lane->row_size / CHUNK_ROWS * CHUNK_ROWS;
    if (rows == 0)
        rows = CHUNK_ROWS;
    if (rows > self->chunk_size / lane->row_size)
        rows = self->chunk_size / lane->row_size;
    lane->rows = rows < left ? rows : left;
    const enum odsi_err err =
        source_read(self->wanted->source, lane->tensor, lane->row * lane->row_size, lane->chunk,
                    (size_t)(lane->rows * lane->row_size));
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "tensor %s", lane->tensor->name);
}

/* Hashes the chunks of all lanes, as long as possible of several at a time. */
static void hash_chunks(const struct lane *lanes, uint32_t count)
{
    size_t done[LANES] = {0};
    for (;;) {
        struct digest_stream *streams[LANES];
        const uint8_t *data[LANES];
        uint32_t which[LANES];
        uint32_t open = 0;
        size_t step = SIZE_MAX;
        for (uint32_t i = 0; i < count; i++) {
            const size_t left = (size_t)(lanes[i].rows * lanes[i].row_size) - done[i];
            if (left < DIGEST_BLOCK_SIZE) { /* the others stay on the border of a block */
                digest_stream_add(lanes[i].stream, lanes[i].chunk + done[i], left);
                done[i] += left;
                continue;
            }
            streams[open] = lanes[i].stream;
            data[open] = lanes[i].chunk + done[i];
            which[open++] = i;
            step = left < step ? left : step;
        }
        if (open == 0)
            return;
        step -= step % DIGEST_BLOCK_SIZE;
        digest_stream_add_together(streams, data, step, open);
        for (uint32_t i = 0; i < open; i++)
            done[which[i]] += step;
    }
}

/* Hands out the chunk, and the digest behind the last one. */
static enum odsi_err pass_on(struct scan *self, struct lane *lane)
{
    const struct tensor_scan *wanted = self->wanted;
    const uint32_t number = (uint32_t)(lane->tensor - wanted->source->tensors);
    enum odsi_err err = ODSI_OK;
    if (wanted->rows)
        err = wanted->rows(wanted->context, number, lane->row, lane->rows, lane->chunk);
    if (err != ODSI_OK)
        return err;
    add_progress(self, lane->rows * lane->row_size);
    lane->row += lane->rows;
    if (lane->row < lane->row_count)
        return ODSI_OK;
    struct digest digest;
    digest_stream_finish(lane->stream, &digest);
    lane->tensor = NULL;
    return wanted->digest(wanted->context, number, &digest);
}

/* What each thread does until no tensor is left. */
static enum odsi_err scan_tensors(void *context, uint32_t index, uint32_t thread)
{
    struct scan *self = context;
    struct lane *lanes = &self->lanes[(size_t)thread * LANES];
    (void)index;
    for (;;) {
        enum odsi_err err = ODSI_OK;
        const uint32_t count = take_tensors(self, lanes);
        if (count == 0 || atomic_load(&self->has_failed))
            return ODSI_OK;
        for (uint32_t i = 0; i < count && err == ODSI_OK; i++)
            err = read_chunk(self, &lanes[i]);
        if (err == ODSI_OK)
            hash_chunks(lanes, count);
        for (uint32_t i = 0; i < count && err == ODSI_OK; i++)
            err = pass_on(self, &lanes[i]);
        if (err != ODSI_OK) {
            atomic_store(&self->has_failed, 1); /* the others need not go on */
            return err;
        }
    }
}

/* ---- all threads ----------------------------------------------------------------------------- */

static int compare_sizes(const void *a, const void *b)
{
    const struct source_tensor *const *left = a;
    const struct source_tensor *const *right = b;
    if ((*left)->size != (*right)->size)
        return (*left)->size > (*right)->size ? -1 : 1;
    return (*left > *right) - (*left < *right); /* both in one array */
}

/* Fills order, total and chunk_size. */
static void make_order(struct scan *self)
{
    const struct tensor_scan *wanted = self->wanted;
    uint64_t largest_row = 1;
    for (uint32_t i = 0; i < wanted->tensor_count; i++) {
        const struct source_tensor *tensor = &wanted->source->tensors[wanted->tensors[i]];
        const uint64_t row_size = tensor->size / (tensor->dims[1] * tensor->dims[2]);
        self->order[i] = tensor;
        self->total += tensor->size; /* tensors do not overlap in their files */
        largest_row = row_size > largest_row ? row_size : largest_row;
    }
    ODSI_ASSERT(largest_row <= ROW_SIZE_MAX); /* arch_check_tensors */
    if (wanted->tensor_count > 1)
        qsort(self->order, wanted->tensor_count, sizeof *self->order, compare_sizes);
    const uint64_t group = largest_row * CHUNK_ROWS;
    self->chunk_size = (size_t)(group < CHUNK_SIZE_MAX ? group : CHUNK_SIZE_MAX);
    if (self->chunk_size < CHUNK_SIZE)
        self->chunk_size = CHUNK_SIZE;
}
ODSI_STATIC_ASSERT(ROW_SIZE_MAX <= CHUNK_SIZE_MAX, "a chunk holds any row");

static enum odsi_err open_lanes(struct scan *self)
{
    enum odsi_err err = alloc_zeroed(&self->lanes, self->lane_count, sizeof *self->lanes);
    for (uint32_t i = 0; i < self->lane_count && err == ODSI_OK; i++) {
        err = alloc_aligned(&self->lanes[i].chunk, self->chunk_size, 1);
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
    const uint32_t thread_count = parallel_thread_count(threads);
    struct scan scan = {.wanted = self, .lane_count = thread_count * LANES};
    pthread_mutex_init(&scan.lock, NULL); /* with these attributes it cannot fail */
    enum odsi_err err = alloc_zeroed(&scan.order, self->tensor_count, sizeof *scan.order);
    if (err == ODSI_OK) {
        make_order(&scan);
        err = open_lanes(&scan);
    }
    if (err == ODSI_OK)
        err = parallel_run(threads, scan_tensors, &scan, thread_count);
    close_lanes(&scan);
    alloc_free(scan.order);
    pthread_mutex_destroy(&scan.lock);
    return err;
}
