/* The tensors of a synthetic model: names and dimensions of its family, and how the weights of each
 * are drawn. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_SYNTH_TENSOR_H
#define ODSI_WORKER_MODEL_SYNTH_TENSOR_H
#include "common/base/err.h"
#include "worker/model/synth_shape.h"

#include <stdint.h>

enum synth_draw {
    SYNTH_MATRIX,  /* around 0, with a deviation of about 1 / sqrt(inverse) */
    SYNTH_NORM,    /* gain times something between 0.75 and 1.25 */
    SYNTH_BIAS,    /* within -0.5 to 0.5 */
    SYNTH_FACTORS, /* from 1 for the fast pairs up to gain for the slow ones */
};

struct synth_tensor {
    char name[64];
    uint32_t dim_count;
    uint64_t dims[3]; /* fastest first; unused ones are 1 */
    enum synth_draw draw;
    uint64_t inverse;
    float gain;
};

/* All of them, in the order of the file. Errors: ODSI_ERR_NO_MEMORY.
 * Owned: by the caller, ended with alloc_free. */
ODSI_MUST_USE enum odsi_err synth_tensor_list(struct synth_tensor **out, uint32_t *count,
                                              const struct synth_shape *shape);
#endif
