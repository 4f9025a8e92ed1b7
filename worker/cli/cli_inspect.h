/* `odsi model inspect`: what a model file or folder holds, for people or as JSON. */
#ifndef ODSI_WORKER_CLI_CLI_INSPECT_H
#define ODSI_WORKER_CLI_CLI_INSPECT_H
#include "common/base/err.h"
#include "worker/model/model.h"
#include "worker/model/source.h"

#include <stdio.h>

struct cli_inspect {
    const struct model *model;
    const struct source *source; /* of the same model */
    int with_metadata;           /* every key of a GGUF file and its value */
    int with_tensors;
};

/* Errors: ODSI_ERR_IO, ODSI_ERR_NO_MEMORY; ODSI_ERR_UNSUPPORTED (metadata of a model that is no
 * GGUF file). */
ODSI_MUST_USE enum odsi_err cli_inspect_text(const struct cli_inspect *self, FILE *to);
/* One object. */
ODSI_MUST_USE enum odsi_err cli_inspect_json(const struct cli_inspect *self, FILE *to);
#endif
