/* The header of a safetensors file: which tensors it holds, and where.
 *
 * A file is: u64 little-endian size of the header, the header (a JSON object: a name, then dtype,
 * shape with the slowest dimension first, and data_offsets [begin, end) behind the header;
 * "__metadata__" holds texts), then the data, which the tensors fill without gap or overlap to the
 * last byte of the file.
 *
 * All of that is checked; a tensor may be of any type that safetensors has, so that the reader of a
 * model decides which tensors matter to it. Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_SAFETENSORS_H
#define ODSI_WORKER_MODEL_SAFETENSORS_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

#define SAFETENSORS_PREFIX_SIZE     8u          /* the size of the header */
#define SAFETENSORS_HEADER_SIZE_MAX (64u << 20) /* some 300,000 tensors */
#define SAFETENSORS_NAME_SIZE_MAX   255u
#define SAFETENSORS_DIMS_MAX        8u

struct safetensors;

struct safetensors_tensor {
    const char *name;  /* printable ASCII without spaces */
    const char *dtype; /* as in the file: "BF16" */
    int type;          /* enum tensor_type, or -1 when ops do not take it */
    uint32_t dim_count;
    uint64_t dims[SAFETENSORS_DIMS_MAX]; /* slowest first */
    uint64_t offset;                     /* from the start of the file */
    uint64_t size;                       /* bytes */
};

/* prefix: the first 8 bytes of a file of file_size bytes. *out is the size of the header behind
 * them, which ends within the file. Errors: ODSI_ERR_CORRUPT. */
ODSI_MUST_USE enum odsi_err safetensors_header_size(const uint8_t *prefix, uint64_t file_size,
                                                    size_t *out);

/* header: the bytes behind those 8. Errors: ODSI_ERR_CORRUPT (the text names the tensor),
 * ODSI_ERR_UNSUPPORTED (a dtype or a number of dimensions that this build does not know),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err safetensors_open(struct safetensors **out, const uint8_t *header,
                                             size_t header_size, uint64_t file_size);
void safetensors_close(struct safetensors **self);

uint32_t safetensors_count(const struct safetensors *self);
/* In ascending byte order of their names. Valid until safetensors_close. */
const struct safetensors_tensor *safetensors_at(const struct safetensors *self, uint32_t index);
#endif
