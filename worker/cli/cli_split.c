#include "worker/cli/cli_split.h"

#include "worker/cli/cli_text.h"

enum odsi_err cli_split_balanced(struct cli_span spans[LIMIT_STAGES_MAX], uint32_t layer_count,
                                 uint32_t shard_count)
{
    if (shard_count == 0 || shard_count > layer_count || shard_count > LIMIT_STAGES_MAX)
        return odsi_fail(ODSI_ERR_INVALID,
                         "%u layers cannot be cut into %u shards: use 1 to %u, and further workers "
                         "as replicas",
                         layer_count, shard_count,
                         layer_count < LIMIT_STAGES_MAX ? layer_count : LIMIT_STAGES_MAX);
    uint32_t first = 0;
    for (uint32_t i = 0; i < shard_count; i++) {
        const uint32_t size = layer_count / shard_count + (i < layer_count % shard_count);
        spans[i] = (struct cli_span){first, first + size};
        first += size;
    }
    return ODSI_OK;
}

enum odsi_err cli_split_read(struct cli_span spans[LIMIT_STAGES_MAX], uint32_t *span_count,
                             uint32_t layer_count, const char *text)
{
    const char *at = text;
    uint32_t next = 0;
    *span_count = 0;
    for (;;) {
        struct cli_span span = {0};
        const enum odsi_err err = cli_text_read_layers(&at, &span.layer_first, &span.layer_end);
        if (err != ODSI_OK)
            return err;
        if (span.layer_first != next)
            return odsi_fail(ODSI_ERR_INVALID,
                             "layers '%.64s': a range begins at %u where layer %u is next", text,
                             span.layer_first, next);
        if (*span_count == LIMIT_STAGES_MAX)
            return odsi_fail(ODSI_ERR_INVALID, "layers '%.64s': more than %u ranges", text,
                             LIMIT_STAGES_MAX);
        spans[(*span_count)++] = span;
        next = span.layer_end;
        if (*at != ',')
            break;
        at++;
    }
    if (*at != '\0')
        return odsi_fail(ODSI_ERR_INVALID, "layers '%.64s': expected ',' before '%.16s'", text, at);
    if (next != layer_count)
        return odsi_fail(ODSI_ERR_INVALID,
                         "layers '%.64s' end with layer %u; the last one of this model is %u", text,
                         next - 1, layer_count - 1);
    return ODSI_OK;
}
