#include "common/base/alloc.h"
#include "kernels/rope_table.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/arch.h"
#include "worker/model/model.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* A synthetic F32 model, its file read by other means, and the backend under the spans. */
struct bench {
    char *folder;
    const char *path;
    struct model *model;
    struct gguf *gguf;
    struct backend *backend;
};

static void bench_open(struct bench *self, const struct synth_shape *shape)
{
    self->folder = fixture_folder();
    self->path = fixture_path(self->folder, "a.gguf");
    self->model = NULL;
    self->gguf = NULL;
    cr_assert_eq(synth_write(self->path, shape, TENSOR_F32, 1, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
    cr_assert_eq(model_open(&self->model, self->path, NULL, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
    cr_assert_eq(gguf_open(&self->gguf, self->path), ODSI_OK);
    self->backend = fixture_backend();
}

static void bench_close(struct bench *self)
{
    backend_close(&self->backend);
    gguf_close(&self->gguf);
    model_close(&self->model);
    fixture_folder_remove(self->folder);
}

static struct model_span *open_span(struct bench *self, uint32_t first, uint32_t end)
{
    struct model_span *span = NULL;
    cr_assert_eq(model_span_open(&span, self->model, self->backend, first, end, 16, NULL, NULL),
                 ODSI_OK, "%s", odsi_err_text());
    return span;
}

static const struct gguf_tensor *tensor_of(struct bench *self, enum arch_role role, uint32_t layer)
{
    struct arch_tensor want;
    cr_assert(arch_tensor_of(model_params_view(self->model), role, layer, &want));
    const struct gguf_tensor *tensor = gguf_tensor_find(self->gguf, want.name);
    cr_assert_not_null(tensor, "%s", want.name);
    return tensor;
}

/* ---- what is loaded ------------------------------------------------------------------------- */

static void expect_norm(struct bench *self, const float *norm_dev, enum arch_role role,
                        uint32_t layer)
{
    const struct gguf_tensor *tensor = tensor_of(self, role, layer);
    float values[256];
    cr_assert(tensor->size <= sizeof values);
    cr_assert_eq(self->backend->ops->download(self->backend, values, norm_dev, tensor->size),
                 ODSI_OK);
    cr_expect_eq(memcmp(values, tensor->data, tensor->size), 0, "%.*s", (int)tensor->name.size,
                 tensor->name.data);
}

/* A product with a unit vector is one column of the matrix, exactly. */
static void expect_weight(struct bench *self, const struct weight *weight, enum arch_role role,
                          uint32_t layer)
{
    const struct gguf_tensor *tensor = tensor_of(self, role, layer);
    const uint64_t cols = tensor->dims[0], rows = tensor->dims[1];
    void *x_dev = NULL, *out_dev = NULL;
    float x[512] = {0}, out[512];
    const struct backend_ops *ops = self->backend->ops;
    cr_assert(cols <= 512 && rows <= 512);
    cr_assert_eq(ops->mem_alloc(self->backend, &x_dev, cols * 4), ODSI_OK);
    cr_assert_eq(ops->mem_alloc(self->backend, &out_dev, rows * 4), ODSI_OK);
    for (uint64_t col = 0; col < cols; col += 7) {
        x[col] = 1.0f;
        cr_assert_eq(ops->upload(self->backend, x_dev, x, cols * 4), ODSI_OK);
        cr_assert_eq(ops->matmul(self->backend, out_dev, weight, x_dev, 1), ODSI_OK);
        cr_assert_eq(ops->download(self->backend, out, out_dev, rows * 4), ODSI_OK);
        x[col] = 0.0f;
        for (uint64_t row = 0; row < rows; row++) {
            float wanted;
            memcpy(&wanted, tensor->data + (row * cols + col) * 4, 4);
            cr_assert_eq(out[row], wanted, "%.*s [%" PRIu64 "][%" PRIu64 "]",
                         (int)tensor->name.size, tensor->name.data, row, col);
        }
    }
    ops->mem_free(self->backend, x_dev);
    ops->mem_free(self->backend, out_dev);
}

static void expect_layer(struct bench *self, const struct model_layer *layer, uint32_t number)
{
    expect_norm(self, layer->attn_norm_dev, ARCH_ATTN_NORM, number);
    expect_norm(self, layer->ffn_norm_dev, ARCH_FFN_NORM, number);
    expect_weight(self, layer->wq, ARCH_Q, number);
    expect_weight(self, layer->wk, ARCH_K, number);
    expect_weight(self, layer->wv, ARCH_V, number);
    expect_weight(self, layer->wo, ARCH_O, number);
    expect_weight(self, layer->w_gate, ARCH_GATE, number);
    expect_weight(self, layer->w_up, ARCH_UP, number);
    expect_weight(self, layer->w_down, ARCH_DOWN, number);
}

/* Goal: every weight of the file stands where the engine looks for it, in any span. */
Test(model_span, holds_the_weights_of_its_layers)
{
    struct bench bench;
    bench_open(&bench, &fixture_shape);
    for (uint32_t first = 0; first < 3; first++)
        for (uint32_t end = first + 1; end <= 3; end++) {
            struct model_span *span = open_span(&bench, first, end);
            cr_expect_eq(span->model, bench.model);
            cr_expect_eq(span->backend, bench.backend);
            cr_expect_eq(span->layer_first, first);
            cr_expect_eq(span->layer_end, end);
            for (uint32_t layer = first; layer < end; layer++)
                expect_layer(&bench, &span->layers[layer - first], layer);
            cr_expect_eq(span->embed != NULL, first == 0);
            cr_expect_eq(span->output != NULL, end == 3);
            cr_expect_eq(span->output_norm_dev != NULL, end == 3);
            if (first == 0)
                expect_weight(&bench, span->embed, ARCH_EMBED, 0);
            if (end == 3) {
                expect_weight(&bench, span->output, ARCH_OUTPUT, 0);
                expect_norm(&bench, span->output_norm_dev, ARCH_OUTPUT_NORM, 0);
            }
            model_span_close(&span);
            cr_expect_null(span);
            model_span_close(&span);
        }
    bench_close(&bench);
}

Test(model_span, has_the_rotation_tables_of_the_model)
{
    struct bench bench;
    bench_open(&bench, &fixture_shape);
    struct model_span *span = open_span(&bench, 1, 2);
    float cos_wanted[16 * 8], sin_wanted[16 * 8], got[16 * 8];
    cr_expect_eq(span->rope.position_count, 16);
    cr_assert_eq(span->rope.half_dim, 8);
    double frequency[8];
    rope_table_frequencies(frequency, 8, 10000.0, 1.0, NULL);
    rope_table_fill(cos_wanted, sin_wanted, 16, 8, frequency, 1.0);
    cr_assert_eq(bench.backend->ops->download(bench.backend, got, span->rope.cos_dev, sizeof got),
                 ODSI_OK);
    cr_expect_eq(memcmp(got, cos_wanted, sizeof got), 0);
    cr_assert_eq(bench.backend->ops->download(bench.backend, got, span->rope.sin_dev, sizeof got),
                 ODSI_OK);
    cr_expect_eq(memcmp(got, sin_wanted, sizeof got), 0);
    model_span_close(&span);
    bench_close(&bench);
}

static void write_recipe(struct bench *bench, const struct fixture_recipe *recipe,
                         const char *cache)
{
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    fixture_model(&bytes, recipe);
    bench->folder = fixture_folder();
    bench->path = fixture_path(bench->folder, "a.gguf");
    bench->model = NULL;
    bench->gguf = NULL;
    fixture_write(bench->path, &bytes);
    char cache_dir[512];
    snprintf(cache_dir, sizeof cache_dir, "%s/%s", bench->folder, cache ? cache : "");
    cr_assert_eq(model_open(&bench->model, bench->path, cache ? cache_dir : NULL, NULL, NULL),
                 ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(gguf_open(&bench->gguf, bench->path), ODSI_OK);
    bench->backend = fixture_backend();
    buf_free(&bytes);
}

/* Goal: a file that ties output and embedding gives every span what it needs, stored once. */
Test(model_span, takes_the_embedding_as_output_when_the_file_has_none)
{
    struct bench bench;
    const struct fixture_recipe tied = {.skip_tensor = "output.weight"};
    write_recipe(&bench, &tied, NULL);
    struct model_span *whole = open_span(&bench, 0, 2);
    cr_expect_not_null(whole->embed);
    cr_expect_eq(whole->output, whole->embed);
    struct model_span *head = open_span(&bench, 0, 1);
    cr_expect_null(head->output);
    struct model_span *tail = open_span(&bench, 1, 2);
    cr_expect_null(tail->embed);
    expect_weight(&bench, tail->output, ARCH_EMBED, 0);
    const uint64_t embed_size = tensor_of(&bench, ARCH_EMBED, 0)->size;
    const uint64_t all = model_params_view(bench.model)->weight_size;
    cr_expect_eq(model_span_weight_size(bench.model, 0, 2), all, "counted once");
    cr_expect_eq(model_span_weight_size(bench.model, 0, 1) +
                     model_span_weight_size(bench.model, 1, 2),
                 all + embed_size, "both ends need it");
    model_span_close(&whole);
    model_span_close(&head);
    model_span_close(&tail);
    bench_close(&bench);
}

Test(model_span, sizes_add_up_to_the_file)
{
    struct bench bench;
    bench_open(&bench, &fixture_shape);
    const uint64_t all = model_params_view(bench.model)->weight_size;
    cr_expect_eq(model_span_weight_size(bench.model, 0, 3), all);
    uint64_t sum = 0;
    for (uint32_t layer = 0; layer < 3; layer++)
        sum += model_span_weight_size(bench.model, layer, layer + 1);
    cr_expect_eq(sum, all);
    cr_expect_eq(model_span_weight_size(bench.model, 0, 4), 0);
    cr_expect_eq(model_span_weight_size(bench.model, 2, 2), 0);
    bench_close(&bench);
}

Test(model_span, refuses_layers_and_positions_outside_the_model)
{
    struct bench bench;
    bench_open(&bench, &fixture_shape);
    const uint32_t wrong[][3] = {
        {0, 0, 16}, {2, 1, 16},  {0, 4, 16},         {3, 3, 16},          {3, 4, 16},
        {0, 3, 0},  {0, 3, 129}, {0, 3, UINT32_MAX}, {0, UINT32_MAX, 16}, {UINT32_MAX, 0, 16}};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        struct model_span *span = NULL;
        cr_expect_eq(model_span_open(&span, bench.model, bench.backend, wrong[i][0], wrong[i][1],
                                     wrong[i][2], NULL, NULL),
                     ODSI_ERR_RANGE);
        cr_expect_null(span);
    }
    bench_close(&bench);
}

struct seen {
    uint64_t done, total;
};

static void see(void *context, uint64_t done, uint64_t total)
{
    struct seen *seen = context;
    cr_expect(done > seen->done && done <= total);
    *seen = (struct seen){done, total};
}

Test(model_span, tells_how_far_it_is)
{
    struct bench bench;
    struct seen seen = {0};
    struct model_span *span = NULL;
    bench_open(&bench, &fixture_shape);
    cr_assert_eq(model_span_open(&span, bench.model, bench.backend, 1, 3, 128, see, &seen),
                 ODSI_OK);
    cr_expect_eq(seen.total, model_span_weight_size(bench.model, 1, 3));
    cr_expect_eq(seen.done, seen.total);
    model_span_close(&span);
    bench_close(&bench);
}

/* ---- bytes that changed --------------------------------------------------------------------- */

/* Goal: a worker never computes with weights that its manifest does not name. How: one bit of each
 * tensor in turn, with the file's times kept, so that the kept manifest is taken. */
Test(model_span, refuses_weights_that_the_manifest_does_not_name)
{
    struct bench bench;
    write_recipe(&bench, &(struct fixture_recipe){.skip_key = NULL}, "cache");
    const struct digest id = *model_id_view(bench.model);
    char cache[512];
    snprintf(cache, sizeof cache, "%s/cache", bench.folder);
    for (uint64_t i = 0; i < gguf_tensor_count(bench.gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(bench.gguf, i);
        struct model *stale = NULL;
        char name[64] = "";
        memcpy(name, tensor->name.data, tensor->name.size);
        fixture_flip(bench.path, tensor->offset + tensor->size / 2, 0x10);
        cr_assert_eq(model_open(&stale, bench.path, cache, NULL, NULL), ODSI_OK);
        cr_expect(digest_equal(&id, model_id_view(stale)), "the kept manifest was not taken");
        for (uint32_t layer = 0; layer < 2; layer++) {
            struct model_span *span = NULL;
            char mine[16];
            snprintf(mine, sizeof mine, "blk.%" PRIu32 ".", layer);
            const int has = strncmp(name, mine, strlen(mine)) == 0 ||
                            strcmp(name, layer == 0 ? "token_embd.weight" : "output.weight") == 0 ||
                            (layer == 1 && strcmp(name, "output_norm.weight") == 0);
            cr_expect_eq(
                model_span_open(&span, stale, bench.backend, layer, layer + 1, 16, NULL, NULL),
                has ? ODSI_ERR_CORRUPT : ODSI_OK, "%s, layer %" PRIu32, name, layer);
            if (has)
                cr_expect(strstr(odsi_err_text(), name) && strstr(odsi_err_text(), "delete"), "%s",
                          odsi_err_text());
            model_span_close(&span);
        }
        model_close(&stale);
        fixture_flip(bench.path, tensor->offset + tensor->size / 2, 0x10);
    }
    bench_close(&bench);
}

Test(model_span, reports_a_file_cut_after_opening)
{
    struct bench bench;
    struct model_span *span = NULL;
    bench_open(&bench, &fixture_shape);
    struct stat status;
    cr_assert_eq(stat(bench.path, &status), 0);
    cr_assert_eq(truncate(bench.path, status.st_size / 2), 0);
    cr_expect_eq(model_span_open(&span, bench.model, bench.backend, 0, 3, 16, NULL, NULL),
                 ODSI_ERR_CORRUPT);
    cr_expect_not_null(strstr(odsi_err_text(), "shorter"), "%s", odsi_err_text());
    cr_expect_null(span);
    bench_close(&bench);
}

/* ---- only its own layers -------------------------------------------------------------------- */

/* Bytes that this process has read by system calls. */
static uint64_t bytes_read(void)
{
    FILE *file = fopen("/proc/self/io", "r");
    uint64_t count = 0;
    cr_assert_not_null(file);
    cr_assert_eq(fscanf(file, "rchar: %" SCNu64, &count), 1);
    fclose(file);
    return count;
}

/* Goal: a worker with a few layers does not read the rest of a large file. How: the kernel's count
 * of bytes read, around the opening of each layer. */
Test(model_span, reads_the_bytes_of_its_own_layers)
{
    struct bench bench;
    bench_open(&bench, synth_shape_find("llama-tiny"));
    (void)bytes_read(); /* whatever stdio reads the first time */
    for (uint32_t layer = 0; layer < 4; layer++) {
        const uint64_t own = model_span_weight_size(bench.model, layer, layer + 1);
        const uint64_t before = bytes_read();
        struct model_span *span = open_span(&bench, layer, layer + 1);
        const uint64_t read = bytes_read() - before;
        cr_expect(read >= own && read < own + 65536, "layer %" PRIu32 ": %" PRIu64 " for %" PRIu64,
                  layer, read, own);
        model_span_close(&span);
    }
    bench_close(&bench);
}

/* Pages of the file in [from, to) that the system holds in memory. */
static size_t pages_in_memory(const char *path, uint64_t from, uint64_t to)
{
    static unsigned char pages[65536];
    struct stat status;
    size_t count = 0;
    const int fd = open(path, O_RDONLY);
    cr_assert(fd >= 0 && fstat(fd, &status) == 0);
    const size_t size = (size_t)status.st_size;
    cr_assert(size / 4096 + 1 <= sizeof pages);
    void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
    cr_assert_neq(map, MAP_FAILED);
    cr_assert_eq(mincore(map, size, pages), 0);
    for (uint64_t page = from / 4096; page * 4096 < to; page++)
        count += pages[page] & 1;
    munmap(map, size);
    close(fd);
    return count;
}

/* Goal: not even the system reads the rest on our behalf (by reading ahead). How: which pages of
 * the file are in memory after everything was dropped and one layer opened. */
Test(model_span, brings_only_its_own_pages_into_memory)
{
    struct bench bench;
    bench_open(&bench, synth_shape_find("llama-tiny"));
    const uint64_t first = tensor_of(&bench, ARCH_ATTN_NORM, 2)->offset;
    const struct gguf_tensor *last = tensor_of(&bench, ARCH_DOWN, 2);
    const uint64_t end = last->offset + last->size;
    struct stat status;
    gguf_close(&bench.gguf); /* its mapping keeps pages */
    const int fd = open(bench.path, O_RDONLY);
    cr_assert(fd >= 0 && fstat(fd, &status) == 0);
    cr_assert_eq(fsync(fd), 0);
    cr_assert_eq(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED), 0);
    close(fd);
    if (pages_in_memory(bench.path, first, end) > 0) {
        bench_close(&bench);
        cr_skip_test("this file system keeps its pages in memory");
    }
    const size_t before = pages_in_memory(bench.path, 0, (uint64_t)status.st_size);
    struct model_span *span = open_span(&bench, 2, 3);
    const size_t own = pages_in_memory(bench.path, first, end);
    const size_t all = pages_in_memory(bench.path, 0, (uint64_t)status.st_size);
    cr_expect(own >= (end - first) / 4096, "%zu pages of its own", own);
    cr_expect(all <= before + own, "%zu pages before, %zu of its own, %zu in all", before, own,
              all);
    model_span_close(&span);
    bench_close(&bench);
}

Test(model_span, reports_every_allocation_that_fails)
{
    struct bench bench;
    bench_open(&bench, &fixture_shape);
    long failing = 0;
    for (;; failing++) {
        struct model_span *span = NULL;
        alloc_fail_after(failing);
        const enum odsi_err err =
            model_span_open(&span, bench.model, bench.backend, 0, 3, 16, NULL, NULL);
        alloc_fail_after(-1);
        if (err == ODSI_OK) {
            model_span_close(&span);
            break;
        }
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        cr_assert_null(span);
    }
    cr_expect(failing > 30, "%ld", failing);
    bench_close(&bench);
}
