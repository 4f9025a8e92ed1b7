#include "kernels/backend.h"

#include "common/base/assert.h"
#include "kernels/cpu/cpu_backend.h"

#include <stdlib.h>
#include <string.h>

static enum odsi_err level_find(enum cpu_level *out, const char *name, size_t size)
{
    for (uint32_t i = 0; i < CPU_LEVEL_COUNT; i++) {
        const char *known = cpu_level_name((enum cpu_level)i);
        if (strlen(known) == size && memcmp(known, name, size) == 0) {
            *out = (enum cpu_level)i;
            return ODSI_OK;
        }
    }
    return odsi_fail(ODSI_ERR_NOT_FOUND, "no CPU variant \"%.*s\": there are scalar, avx2, avx512",
                     size < 64 ? (int)size : 64, name);
}

/* The bits of the levels that ODSI_CPU names; all when it is not set or empty. */
static enum odsi_err mask_read(uint32_t *out, const char *text)
{
    *out = 0;
    if (!text || !*text) {
        *out = (1u << CPU_LEVEL_COUNT) - 1;
        return ODSI_OK;
    }
    for (;;) {
        const size_t size = strcspn(text, ",");
        enum cpu_level level = CPU_SCALAR;
        enum odsi_err err = level_find(&level, text, size);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "environment variable ODSI_CPU");
        *out |= 1u << level;
        if (text[size] == '\0')
            return ODSI_OK;
        text += size + 1;
    }
}

static enum odsi_err open_auto(struct backend **out, uint32_t thread_count)
{
    const char *text = getenv("ODSI_CPU");
    uint32_t mask = 0;
    enum odsi_err err = mask_read(&mask, text);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = CPU_LEVEL_COUNT; i-- > 0;)
        if ((mask & 1u << i) && !cpu_level_lacks((enum cpu_level)i))
            return cpu_backend_open(out, (enum cpu_level)i, thread_count);
    return odsi_fail(ODSI_ERR_UNSUPPORTED,
                     "ODSI_CPU=%.64s leaves no variant that this processor can run: add scalar",
                     text);
}

enum odsi_err backend_open(struct backend **out, const struct backend_config *config)
{
    *out = NULL;
    const char *name = config->name ? config->name : "auto";
    if (strcmp(name, "auto") == 0)
        return open_auto(out, config->thread_count);
    if (strcmp(name, "cuda") == 0)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "this build has no CUDA backend");
    enum cpu_level level = CPU_SCALAR;
    if (level_find(&level, name, strlen(name)) != ODSI_OK)
        return odsi_fail(ODSI_ERR_NOT_FOUND,
                         "no backend \"%.64s\": there are auto, scalar, avx2, avx512, cuda", name);
    const char *lacks = cpu_level_lacks(level);
    if (lacks)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "backend %s needs %s, which this machine lacks; use --backend auto", name,
                         lacks);
    return cpu_backend_open(out, level, config->thread_count);
}

void backend_close(struct backend **self)
{
    if (!*self)
        return;
    (*self)->ops->close(*self);
    *self = NULL;
}

const char *const *backend_names(void)
{
    /* Each level includes the ones below it, so the lists are the prefixes of one another. */
    static const char *const lists[CPU_LEVEL_COUNT][CPU_LEVEL_COUNT + 1] = {
        {"scalar", NULL}, {"scalar", "avx2", NULL}, {"scalar", "avx2", "avx512", NULL}};
    uint32_t highest = CPU_LEVEL_COUNT - 1;
    while (cpu_level_lacks((enum cpu_level)highest))
        highest--;
    return lists[highest];
}
