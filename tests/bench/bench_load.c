/* How long a model takes until it can run, beside how long its file takes to read:
 *
 *     build/release/bench/bench_load MODEL [THREADS]
 *
 * The file is read first, so it comes from the page cache. The first load finds memory that the
 * system may have to make, clear or, in a virtual machine, ask the host for; the later ones find
 * what the one before gave back. The manifest is kept in $TMPDIR, so only its making hashes the
 * file without loading it. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "worker/model/model.h"
#include "worker/model/parallel.h"
#include "worker/model/source.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <unistd.h>

#define CHUNK_SIZE (1u << 20)
#define LOADS      3

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

struct timing {
    uint64_t started_us;
    double cpu;
};

static struct timing timing_start(void)
{
    return (struct timing){.started_us = clock_monotonic_us(), .cpu = cpu_seconds()};
}

static double timing_show(const struct timing *self, const char *what, uint64_t size)
{
    const double seconds = (double)(clock_monotonic_us() - self->started_us + 1) / 1e6;
    printf("%-34s %7.3f s  %6.2f GB/s  (%.3f s of processor time)\n", what, seconds,
           (double)size / 1e9 / seconds, cpu_seconds() - self->cpu);
    return seconds;
}

struct reading {
    const struct source *source;
    uint64_t size; /* of the part of each thread */
};

/* Part index of the first file. */
static enum odsi_err read_part(void *context, uint32_t index, uint32_t thread)
{
    const struct reading *self = context;
    uint8_t *chunk = NULL;
    const enum odsi_err err = alloc_zeroed(&chunk, CHUNK_SIZE, 1);
    (void)thread;
    for (uint64_t at = 0; err == ODSI_OK && at < self->size; at += CHUNK_SIZE)
        if (pread(self->source->files[0].fd, chunk, CHUNK_SIZE, (off_t)(index * self->size + at)) <=
            0)
            break;
    alloc_free(chunk);
    return err;
}

/* Seconds for reading the first file by so many threads. */
static enum odsi_err time_reading(const char *path, uint32_t thread_count, double *seconds)
{
    struct source *source = NULL;
    struct parallel *threads = NULL;
    char what[64];
    enum odsi_err err = source_open(&source, path);
    if (err == ODSI_OK)
        err = parallel_open(&threads, thread_count);
    for (int round = 0; err == ODSI_OK && round < 2; round++) { /* the first may be from the disk */
        const struct reading reading = {.source = source,
                                        .size = source->files[0].size / thread_count};
        const struct timing timing = timing_start();
        err = parallel_run(threads, read_part, (void *)(uintptr_t)&reading, thread_count);
        snprintf(what, sizeof what, "reading the file, %" PRIu32 " thread%s", thread_count,
                 thread_count > 1 ? "s" : "");
        if (round == 1)
            *seconds = timing_show(&timing, what, source->files[0].size);
    }
    parallel_close(&threads);
    source_close(&source);
    return err;
}

static enum odsi_err time_loading(const char *path, uint32_t thread_count, double reading)
{
    const struct backend_config config = {.thread_count = thread_count};
    const char *tmp = getenv("TMPDIR");
    struct backend *backend = NULL;
    struct model *model = NULL;
    struct model_span *span = NULL;
    struct timing timing = timing_start();
    enum odsi_err err = model_open(&model, path, tmp ? tmp : "/tmp", NULL, NULL);
    if (err == ODSI_OK)
        err = backend_open(&backend, &config);
    if (err == ODSI_OK)
        (void)timing_show(&timing, "opening (hashing, the first time)",
                          model_params_view(model)->weight_size);
    for (int round = 0; err == ODSI_OK && round < LOADS; round++) {
        const struct model_params *params = model_params_view(model);
        timing = timing_start();
        err = model_span_open(&span, model, backend, 0, params->layer_count, params->context_length,
                              NULL, NULL);
        if (err == ODSI_OK) {
            const double seconds = timing_show(
                &timing, round == 0 ? "loading into new memory" : "loading into memory used before",
                params->weight_size);
            printf("%-34s %7.2f x reading\n", "", seconds / reading);
        }
        model_span_close(&span);
    }
    backend_close(&backend);
    model_close(&model);
    return err;
}

int main(int argc, char **argv)
{
    const long threads = argc > 2 ? strtol(argv[2], NULL, 10) : sysconf(_SC_NPROCESSORS_ONLN);
    double alone = 0, together = 0;
    if (argc < 2 || threads < 1 || threads > 1024) {
        fprintf(stderr, "usage: bench_load MODEL [THREADS]\n");
        return 2;
    }
    enum odsi_err err = time_reading(argv[1], 1, &alone);
    if (err == ODSI_OK)
        err = time_reading(argv[1], (uint32_t)threads, &together);
    if (err == ODSI_OK)
        err = time_loading(argv[1], (uint32_t)threads, alone);
    if (err != ODSI_OK)
        fprintf(stderr, "bench_load: %s\n", odsi_err_text());
    return err == ODSI_OK ? 0 : 1;
}
