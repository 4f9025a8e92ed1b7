#include "worker/cli/cli_memory.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/clock.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define TIME_US    300000u
#define PASSES_MIN 3u
#define LANES      16u

/* One thread's share. */
struct reader {
    pthread_t thread;
    const uint64_t *words;
    size_t word_count; /* a multiple of LANES */
    uint64_t sum;      /* keeps the compiler from leaving the reads out */
};

static void *run_reader(void *context)
{
    struct reader *self = context;
    uint64_t lanes[LANES] = {0};
    for (size_t i = 0; i < self->word_count; i += LANES)
        for (size_t lane = 0; lane < LANES; lane++)
            lanes[lane] += self->words[i + lane];
    for (size_t lane = 0; lane < LANES; lane++)
        self->sum += lanes[lane];
    return NULL;
}

/* Reads everything once. Starting the threads takes some 20 us of a pass of milliseconds. */
static enum odsi_err run_pass(struct reader *readers, uint32_t count, uint64_t *used_us)
{
    const uint64_t begin_us = clock_monotonic_us();
    enum odsi_err err = ODSI_OK;
    uint32_t started = 1;
    while (started < count &&
           pthread_create(&readers[started].thread, NULL, run_reader, &readers[started]) == 0)
        started++;
    if (started < count)
        err = odsi_fail(ODSI_ERR_IO, "only %u of %u threads could be started", started, count);
    run_reader(&readers[0]);
    for (uint32_t i = 1; i < started; i++)
        pthread_join(readers[i].thread, NULL);
    *used_us = clock_monotonic_us() - begin_us;
    return err;
}

static enum odsi_err best_pass(struct reader *readers, uint32_t count, uint64_t *best_us)
{
    const uint64_t begin_us = clock_monotonic_us();
    enum odsi_err err = ODSI_OK;
    *best_us = UINT64_MAX;
    for (unsigned pass = 0;
         err == ODSI_OK && (pass < PASSES_MIN || clock_monotonic_us() - begin_us < TIME_US);
         pass++) {
        uint64_t used_us = 0;
        err = run_pass(readers, count, &used_us);
        if (used_us < *best_us)
            *best_us = used_us ? used_us : 1;
    }
    return err;
}

enum odsi_err cli_memory_read_gbps(double *out, uint32_t thread_count, size_t size)
{
    struct reader *readers = NULL;
    uint8_t *memory = NULL;
    uint64_t best_us = 0;
    ODSI_ASSERT(thread_count > 0);
    const size_t share = size / thread_count / (LANES * sizeof(uint64_t)) * LANES; /* words */
    enum odsi_err err = alloc_zeroed(&readers, thread_count, sizeof *readers);
    if (err == ODSI_OK)
        err = alloc_aligned(&memory, size, 1);
    if (err == ODSI_OK) {
        memset(memory, 1, size); /* untouched pages are all one page of zeros */
        for (uint32_t i = 0; i < thread_count; i++) {
            readers[i].words = (const uint64_t *)(const void *)memory + i * share;
            readers[i].word_count = share;
        }
        err = best_pass(readers, thread_count, &best_us);
    }
    if (err == ODSI_OK)
        *out = (double)(share * sizeof(uint64_t) * thread_count) / 1e3 / (double)best_us;
    alloc_free(memory);
    alloc_free(readers);
    return err;
}

int cli_memory_peak_reset(void)
{
    const int fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return 0;
    const int done = write(fd, "5", 1) == 1; /* proc(5): the peak resident set size */
    close(fd);
    return done;
}

uint64_t cli_memory_peak(void)
{
    unsigned long long kib = 0;
    char line[128];
    FILE *file = fopen("/proc/self/status", "re");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "VmHWM: %llu kB", &kib) == 1)
            break;
    if (file)
        fclose(file);
    return kib * 1024u;
}
