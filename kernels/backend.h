/* A backend: the machine that runs the ops of ops.h. Chosen once at start, then only called.
 *
 * Every backend gives the same bits for the same calls (kernels/NUMERICS.md). Device memory is a
 * plain pointer with suffix _dev; on the CPU backends it is host memory. Calls queue work in
 * order; results may be read on the host after backend_sync.
 *
 * Threads: one owner thread calls a backend. A CPU backend runs each op on its own pool of
 * thread_count threads (the caller is one of them) and returns when the op is done. While no op
 * runs, several threads may call mem_alloc, upload, weight_open and weight_fill at once: for
 * different weights, for different matrices of one, or for different memory.
 * Memory: upload and weight_fill have copied data (repacked) when they return. Ops
 * keep working memory that grows to the largest call so far and is then reused; until then an op
 * may answer ODSI_ERR_NO_MEMORY.
 * Limits: the caller keeps to the shapes that ops.h states; they are asserted, since everything
 * that comes from a file or a peer was checked before (worker/model, worker/engine). */
#ifndef ODSI_KERNELS_BACKEND_H
#define ODSI_KERNELS_BACKEND_H
#include "common/base/err.h"
#include "kernels/ops.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct backend;

struct backend_config {
    const char *name;      /* "auto", "scalar", "avx2", "avx512", "cuda"; NULL is "auto" */
    uint32_t thread_count; /* 0: one per CPU this process may run on */
};

/* Table of one backend. Each function is specified by the wrapper of the same name below or by the
 * op of the same name in ops.h. */
struct backend_ops {
    const char *name;
    void (*close)(struct backend *self);
    enum odsi_err (*mem_alloc)(struct backend *self, void **out_dev, size_t size);
    void (*mem_free)(struct backend *self, void *memory_dev);
    enum odsi_err (*upload)(struct backend *self, void *to_dev, const void *from, size_t size);
    enum odsi_err (*download)(struct backend *self, void *to, const void *from_dev, size_t size);
    enum odsi_err (*sync)(struct backend *self);
    enum odsi_err (*weight_open)(struct backend *self, struct weight **out, enum tensor_type type,
                                 uint32_t rows, uint32_t cols, uint32_t matrix_count);
    enum odsi_err (*weight_fill)(struct backend *self, struct weight *weight, uint32_t row_first,
                                 const void *data, uint32_t rows);
    void (*weight_free)(struct backend *self, struct weight *weight);

    enum odsi_err (*embed)(struct backend *self, float *out_dev, const struct weight *table,
                           const uint32_t *tokens, uint32_t rows);
    enum odsi_err (*rmsnorm)(struct backend *self, float *out_dev, const float *x_dev,
                             const float *weight_dev, uint32_t rows, uint32_t cols, float eps);
    enum odsi_err (*matmul)(struct backend *self, float *out_dev, const struct weight *weight,
                            const float *x_dev, uint32_t rows);
    enum odsi_err (*matmul_experts)(struct backend *self, float *out_dev,
                                    const struct weight *weight, const float *x_dev,
                                    const uint32_t *ids_dev, uint32_t slots,
                                    uint32_t slots_per_row);
    enum odsi_err (*add_bias)(struct backend *self, float *x_dev, const float *bias_dev,
                              uint32_t rows, uint32_t cols);
    enum odsi_err (*rope)(struct backend *self, float *x_dev, const struct rope_table *table,
                          const struct op_batch *batch, uint32_t heads, uint32_t head_dim);
    enum odsi_err (*kv_write)(struct backend *self, const struct kv_pool *pool, uint32_t layer,
                              const struct op_batch *batch, const float *k_dev, const float *v_dev);
    enum odsi_err (*attention)(struct backend *self, float *out_dev, const float *q_dev,
                               const struct kv_pool *pool, uint32_t layer,
                               const struct op_batch *batch, const struct attention_params *params);
    enum odsi_err (*act_mul)(struct backend *self, float *out_dev, const float *gate_dev,
                             const float *up_dev, size_t count, enum act_kind kind);
    enum odsi_err (*scale)(struct backend *self, float *x_dev, size_t count, float factor);
    enum odsi_err (*softcap)(struct backend *self, float *x_dev, size_t count, float cap);
    enum odsi_err (*route)(struct backend *self, uint32_t *ids_dev, float *weights_dev,
                           const float *logits_dev, uint32_t rows, uint32_t experts, uint32_t used);
    enum odsi_err (*combine)(struct backend *self, float *out_dev, const float *y_dev,
                             const float *weights_dev, uint32_t rows, uint32_t used, uint32_t cols);
    enum odsi_err (*add)(struct backend *self, float *out_dev, const float *a_dev,
                         const float *b_dev, size_t count);
    enum odsi_err (*all_finite)(struct backend *self, int *out, const float *x_dev, size_t count);
};

/* First member of every implementation's own struct. */
struct backend {
    const struct backend_ops *ops;
    uint32_t thread_count;
};

/* Opens the named backend; "auto" takes the fastest CPU variant this processor has, among those
 * that the environment variable ODSI_CPU (comma-separated: scalar,avx2,avx512) leaves.
 * Errors: ODSI_ERR_NOT_FOUND (unknown name), ODSI_ERR_UNSUPPORTED (this processor or build does
 * not have it; the text says what it lacks), ODSI_ERR_NO_MEMORY.
 * Owned: by the caller, ended with backend_close. */
ODSI_MUST_USE enum odsi_err backend_open(struct backend **out, const struct backend_config *config);
/* Frees everything; weights and memory must be gone already. *self may be NULL. */
void backend_close(struct backend **self);

/* Names of the backends that backend_open would accept here, slowest first, NULL-terminated.
 * Static storage. */
const char *const *backend_names(void);

#ifdef __cplusplus
}
#endif
#endif
