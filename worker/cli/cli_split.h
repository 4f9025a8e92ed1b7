/* Cutting a model's layers into shards. Pure; any thread. */
#ifndef ODSI_WORKER_CLI_CLI_SPLIT_H
#define ODSI_WORKER_CLI_CLI_SPLIT_H
#include "common/base/err.h"
#include "common/base/limits.h"

#include <stdint.h>

struct cli_span {
    uint32_t layer_first;
    uint32_t layer_end;
};

/* shard_count spans without gaps over all layers, their sizes at most one apart. The longer ones
 * come first, since the last one also has the logits to compute.
 * Errors: ODSI_ERR_INVALID (no shards, more than layers or LIMIT_STAGES_MAX). */
ODSI_MUST_USE enum odsi_err cli_split_balanced(struct cli_span spans[LIMIT_STAGES_MAX],
                                               uint32_t layer_count, uint32_t shard_count);
/* Reads "0-11,12-21"; the spans must follow each other and cover all layers.
 * Errors: ODSI_ERR_INVALID, with what is wrong. */
ODSI_MUST_USE enum odsi_err cli_split_read(struct cli_span spans[LIMIT_STAGES_MAX],
                                           uint32_t *span_count, uint32_t layer_count,
                                           const char *text);
#endif
