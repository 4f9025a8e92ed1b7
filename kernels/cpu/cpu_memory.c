#include "kernels/cpu/cpu_memory.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"

#include <stdint.h>
#include <string.h>

#define REGION_SIZE ((size_t)64 << 20)

/* Pieces are taken one behind another and never again from where one was: weights come and go
 * together, and what has been touched would not be zero any more. */
struct cpu_region {
    struct cpu_region *next;
    uint8_t *memory;
    size_t size;
    size_t used;
    size_t piece_count; /* that have not been given back */
    int shares;
};

void cpu_memory_init(struct cpu_memory *self)
{
    pthread_mutex_init(&self->lock, NULL); /* with these attributes it cannot fail */
    self->regions = NULL;
}

void cpu_memory_close(struct cpu_memory *self)
{
    ODSI_ASSERT(!self->regions);
    pthread_mutex_destroy(&self->lock);
}

static enum odsi_err region_open(struct cpu_region **out, size_t size, int shares)
{
    struct cpu_region *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->shares = shares;
    self->size = shares && size < REGION_SIZE ? REGION_SIZE : size;
    err = alloc_pages(&self->memory, self->size);
    if (err != ODSI_OK) {
        alloc_free(self);
        return err;
    }
    *out = self;
    return ODSI_OK;
}

/* The newest of the regions that pieces share, when it has room; else a new one. */
static enum odsi_err region_with_room(struct cpu_memory *self, struct cpu_region **out, size_t size,
                                      int shares)
{
    struct cpu_region *region = self->regions;
    while (region && !region->shares)
        region = region->next;
    *out = region;
    if (shares && region && region->size - region->used >= size)
        return ODSI_OK;
    const enum odsi_err err = region_open(&region, size, shares);
    if (err != ODSI_OK)
        return err;
    region->next = self->regions;
    self->regions = region;
    *out = region;
    return ODSI_OK;
}

enum odsi_err cpu_memory_take(struct cpu_memory *self, void *out_pointer, size_t size, int shares)
{
    void *memory = NULL;
    struct cpu_region *region = NULL;
    if (size < CPU_MEMORY_LARGE)
        return alloc_aligned(out_pointer, size, 1);
    memcpy(out_pointer, &memory, sizeof memory);
    if (size > SIZE_MAX - ALLOC_ALIGNMENT)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for %zu bytes", size);
    size = (size + ALLOC_ALIGNMENT - 1) / ALLOC_ALIGNMENT * ALLOC_ALIGNMENT;
    pthread_mutex_lock(&self->lock);
    const enum odsi_err err = region_with_room(self, &region, size, shares);
    if (err == ODSI_OK) {
        memory = region->memory + region->used;
        region->used += size;
        region->piece_count++;
    }
    pthread_mutex_unlock(&self->lock);
    memcpy(out_pointer, &memory, sizeof memory);
    return err;
}

/* The link to the region that memory lies in; to NULL when it lies in none. */
static struct cpu_region **region_of(struct cpu_memory *self, const void *memory)
{
    struct cpu_region **link = &self->regions;
    while (*link && ((uintptr_t)memory < (uintptr_t)(*link)->memory ||
                     (uintptr_t)memory >= (uintptr_t)(*link)->memory + (*link)->size))
        link = &(*link)->next;
    return link;
}

void cpu_memory_give_back(struct cpu_memory *self, void *memory)
{
    if (!memory)
        return;
    pthread_mutex_lock(&self->lock);
    struct cpu_region **link = region_of(self, memory);
    struct cpu_region *region = *link;
    if (region && --region->piece_count == 0) {
        *link = region->next;
        alloc_pages_free(region->memory, region->size);
        alloc_free(region);
    }
    pthread_mutex_unlock(&self->lock);
    if (!region)
        alloc_free(memory);
}
