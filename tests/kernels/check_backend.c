#include "common/base/alloc.h"
#include "kernels/backend.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/kernel_fixture.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

static enum odsi_err open_named(struct backend **out, const char *name)
{
    const struct backend_config config = {.name = name, .thread_count = 1};
    return backend_open(out, &config);
}

Test(backend, opens_every_name_it_lists)
{
    const char *const *names = backend_names();
    cr_assert_str_eq(names[0], "scalar");
    for (uint32_t i = 0; names[i]; i++) {
        struct backend *backend = NULL;
        cr_assert_eq(open_named(&backend, names[i]), ODSI_OK);
        cr_expect_str_eq(backend->ops->name, names[i]);
        backend_close(&backend);
        cr_expect_null(backend);
        backend_close(&backend);
    }
}

Test(backend, chooses_the_fastest_that_the_mask_leaves)
{
    const char *const *names = backend_names();
    uint32_t count = 0;
    while (names[count])
        count++;
    struct backend *backend = NULL;
    unsetenv("ODSI_CPU");
    cr_assert_eq(open_named(&backend, NULL), ODSI_OK);
    cr_expect_str_eq(backend->ops->name, names[count - 1]);
    backend_close(&backend);

    for (uint32_t i = 0; i < count; i++) {
        setenv("ODSI_CPU", names[i], 1);
        cr_assert_eq(open_named(&backend, "auto"), ODSI_OK);
        cr_expect_str_eq(backend->ops->name, names[i]);
        backend_close(&backend);
    }
    setenv("ODSI_CPU", "avx512,scalar,avx2", 1);
    cr_assert_eq(open_named(&backend, "auto"), ODSI_OK);
    cr_expect_str_eq(backend->ops->name, names[count - 1]);
    backend_close(&backend);
}

Test(backend, refuses_what_it_does_not_know)
{
    struct backend *backend = NULL;
    cr_expect_eq(open_named(&backend, "abacus"), ODSI_ERR_NOT_FOUND);
    cr_expect(strstr(odsi_err_text(), "abacus"));
    cr_expect_null(backend);
    setenv("ODSI_CPU", "scalar,avx3", 1);
    cr_expect_eq(open_named(&backend, "auto"), ODSI_ERR_NOT_FOUND);
    cr_expect(strstr(odsi_err_text(), "ODSI_CPU"));
    setenv("ODSI_CPU", "scalar,", 1);
    cr_expect_eq(open_named(&backend, "auto"), ODSI_ERR_NOT_FOUND);
    const struct backend_config many = {.name = "scalar", .thread_count = 1000000};
    cr_expect_eq(backend_open(&backend, &many), ODSI_ERR_INVALID);
    cr_expect_null(backend);
}

Test(backend, says_what_a_machine_lacks)
{
    for (uint32_t i = 0; i < CPU_LEVEL_COUNT; i++) {
        const char *lacks = cpu_level_lacks((enum cpu_level)i);
        struct backend *backend = NULL;
        const enum odsi_err err = open_named(&backend, cpu_level_name((enum cpu_level)i));
        cr_expect_eq(err, lacks ? ODSI_ERR_UNSUPPORTED : ODSI_OK);
        if (lacks)
            cr_expect(strstr(odsi_err_text(), lacks));
        backend_close(&backend);
    }
}

/* Everything a forward needs memory for, once. */
static enum odsi_err use_backend(const char *name)
{
    const struct backend_config config = {.name = name, .thread_count = 2};
    struct backend *backend = NULL;
    struct weight *weight = NULL;
    void *memory = NULL;
    float x[64] = {0};
    float out[24];
    float q[8] = {0};
    uint8_t source[24 * 2 * 34];
    uint16_t page[2 * KV_PAGE_TOKENS * 8] = {0};
    const uint32_t position[1] = {0};
    const uint32_t table[1] = {0};
    const uint32_t *tables[1] = {table};
    const struct op_batch batch = {.rows = 1, .position = position, .page_table = tables};
    const struct kv_pool pool = {page, 1, 1, 1, 8};
    const struct attention_params params = {.heads = 1, .scale = 1.0f};
    memset(source, 0, sizeof source);
    enum odsi_err err = backend_open(&backend, &config);
    if (err == ODSI_OK)
        err = backend->ops->mem_alloc(backend, &memory, 100);
    if (err == ODSI_OK)
        err = backend->ops->weight_open(backend, &weight, TENSOR_Q8_0, 24, 64, 1);
    if (err == ODSI_OK)
        err = backend->ops->weight_fill(backend, weight, 0, source, 24);
    if (err == ODSI_OK)
        err = backend->ops->matmul(backend, out, weight, x, 1);
    if (err == ODSI_OK)
        err = backend->ops->attention(backend, out, q, &pool, 0, &batch, &params);
    if (backend) {
        if (weight)
            backend->ops->weight_free(backend, weight);
        backend->ops->mem_free(backend, memory);
    }
    backend_close(&backend);
    return err;
}

/* Goal: no way of running out of memory crashes or leaks. How: the first, second, third ...
 * allocation fails until everything passes (the sanitizer build watches for leaks). */
Test(backend, answers_no_memory_wherever_it_runs_out)
{
    for (const char *const *name = backend_names(); *name; name++) {
        long failing = 0;
        for (;; failing++) {
            alloc_fail_after(failing);
            const enum odsi_err err = use_backend(*name);
            alloc_fail_after(-1);
            if (err == ODSI_OK)
                break;
            cr_assert_eq(err, ODSI_ERR_NO_MEMORY);
        }
        cr_expect_geq(failing, 8, "the test no longer reaches the allocations");
    }
}
