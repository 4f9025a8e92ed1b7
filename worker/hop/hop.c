#include "worker/hop/hop.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "kernels/ops.h"

#include <string.h>

void hop_spec_free(struct hop_spec *self)
{
    alloc_free(self->stages);
    alloc_free(self->penalty_tokens);
    alloc_free(self->prefix_keys);
    memset(self, 0, sizeof *self);
}

static enum odsi_err check_path(const struct hop_spec *spec, const struct hop_worker *worker)
{
    uint32_t layer = 0;
    for (uint32_t i = 0; i < spec->stage_count; i++) {
        const struct hop_stage *stage = &spec->stages[i];
        if (stage->layer_first != layer || stage->layer_end <= layer ||
            stage->layer_end > worker->layer_count)
            return odsi_fail(ODSI_ERR_INVALID,
                             "path: stage %u has layers [%u, %u), expected to start at %u and to "
                             "end within %u",
                             i, stage->layer_first, stage->layer_end, layer, worker->layer_count);
        layer = stage->layer_end;
    }
    if (layer != worker->layer_count)
        return odsi_fail(ODSI_ERR_INVALID, "path: it ends at layer %u of %u", layer,
                         worker->layer_count);
    return ODSI_OK;
}

static enum odsi_err check_sampling(const struct hop_spec *spec, const struct hop_worker *worker)
{
    const enum odsi_err err = sampler_check(&spec->sampling);
    if (err != ODSI_OK)
        return err;
    for (uint32_t i = 0; i < spec->penalty_count; i++)
        if (spec->penalty_tokens[i] >= worker->vocab_size)
            return odsi_fail(ODSI_ERR_INVALID, "penalty token %u: the vocabulary has %u",
                             spec->penalty_tokens[i], worker->vocab_size);
    return ODSI_OK;
}

static enum odsi_err check_prefix(const struct hop_spec *spec)
{
    if (spec->prompt_count > spec->token_limit)
        return odsi_fail(ODSI_ERR_INVALID,
                         "prompt_token_count is %u: the session ends at token_limit %u",
                         spec->prompt_count, spec->token_limit);
    if (spec->prefix_count > spec->prompt_count / KV_PAGE_TOKENS)
        return odsi_fail(ODSI_ERR_INVALID,
                         "prefix_keys: %u keys for a prompt of %u tokens, which has %u whole pages",
                         spec->prefix_count, spec->prompt_count,
                         spec->prompt_count / KV_PAGE_TOKENS);
    return ODSI_OK;
}

enum odsi_err hop_check_spec(const struct hop_spec *spec, const struct hop_worker *worker)
{
    if (!digest_equal(&spec->model_id, &worker->model_id)) {
        char wanted[DIGEST_HEX_SIZE], held[DIGEST_HEX_SIZE];
        digest_to_hex(wanted, &spec->model_id);
        digest_to_hex(held, &worker->model_id);
        return odsi_fail(ODSI_ERR_NOT_FOUND, "model %.16s: this worker serves %.16s", wanted, held);
    }
    if (spec->numerics_version != NUMERICS_VERSION)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "numerics version %u: this worker computes %u",
                         spec->numerics_version, NUMERICS_VERSION);
    if (spec->stage_count == 0 || spec->stage_count > LIMIT_STAGES_MAX ||
        spec->stage >= spec->stage_count)
        return odsi_fail(ODSI_ERR_INVALID, "path: stage %u of %u, at most %u", spec->stage,
                         spec->stage_count, LIMIT_STAGES_MAX);
    enum odsi_err err = check_path(spec, worker);
    if (err != ODSI_OK)
        return err;
    const struct hop_stage *own = &spec->stages[spec->stage];
    if (!digest_equal(&own->worker_id, &worker->id))
        return odsi_fail(ODSI_ERR_DENIED,
                         "path: stage %u names another worker; the directory that "
                         "made this path is out of date",
                         spec->stage);
    if (own->layer_first < worker->layer_first || own->layer_end > worker->layer_end)
        return odsi_fail(ODSI_ERR_RANGE, "layers %u-%u: this worker holds %u-%u", own->layer_first,
                         own->layer_end - 1, worker->layer_first, worker->layer_end - 1);
    if (spec->token_limit == 0)
        return odsi_fail(ODSI_ERR_INVALID, "token_limit is 0: a session needs room for its prompt");
    err = check_prefix(spec);
    if (err == ODSI_OK && hop_is_last(spec))
        err = check_sampling(spec, worker);
    return err;
}

void hop_prefix_scope(struct digest *out, const struct hop_spec *spec,
                      const struct digest *gateway_id)
{
    static const char tag[] = "odsi hop scope 1";
    uint8_t text[sizeof tag + DIGEST_SIZE + 4 + LIMIT_STAGES_MAX * (DIGEST_SIZE + 8)];
    ODSI_ASSERT(spec->stage < LIMIT_STAGES_MAX);
    uint8_t *end = bytes_put(text, tag, sizeof tag - 1);
    end = bytes_put(end, gateway_id->bytes, DIGEST_SIZE);
    end = bytes_put_u32(end, spec->stage);
    for (uint32_t i = 0; i < spec->stage; i++) {
        end = bytes_put(end, spec->stages[i].worker_id.bytes, DIGEST_SIZE);
        end = bytes_put_u32(end, spec->stages[i].layer_first);
        end = bytes_put_u32(end, spec->stages[i].layer_end);
    }
    digest_of(out, text, (size_t)(end - text));
}

/* The stage before this one, or for the first stage the ring from the last; the gateway speaks to
 * the first stage only. The ring brings tokens of the answer: one that could put any into the
 * prompt would decide what is kept under the prompt's keys. */
static enum odsi_err check_sender(const struct hop_spec *spec, const struct hop_header *header,
                                  const struct digest *sender)
{
    if (!sender)
        return hop_is_first(spec) ? ODSI_OK
                                  : odsi_fail(ODSI_ERR_DENIED,
                                              "stage %u takes steps from the stage before it, "
                                              "not from the gateway",
                                              spec->stage);
    const uint32_t from = (hop_is_first(spec) ? spec->stage_count : spec->stage) - 1;
    if (!digest_equal(sender, &spec->stages[from].worker_id))
        return odsi_fail(ODSI_ERR_DENIED, "stage %u takes steps from stage %u of its path only",
                         spec->stage, from);
    if (hop_is_first(spec) && header->position < spec->prompt_count)
        return odsi_fail(ODSI_ERR_DENIED,
                         "position %u is one of the prompt's %u, which the gateway sends",
                         header->position, spec->prompt_count);
    return ODSI_OK;
}

static enum odsi_err check_shape(const struct hop_spec *spec, const struct hop_worker *worker,
                                 const struct hop_header *header, uint64_t payload_size)
{
    const enum hop_kind kind = hop_is_first(spec) ? HOP_TOKENS : HOP_ACTIVATIONS;
    const uint64_t row_size = sizeof(uint32_t) * (kind == HOP_TOKENS ? 1u : (uint64_t)worker->dim);
    if (header->stage != spec->stage || header->kind != kind)
        return odsi_fail(ODSI_ERR_INVALID, "a step of kind %d for stage %u reached stage %u",
                         (int)header->kind, header->stage, spec->stage);
    if (header->token_count == 0 || header->token_count > LIMIT_STEP_TOKENS)
        return odsi_fail(ODSI_ERR_RANGE, "a step of %u positions: 1 to %u", header->token_count,
                         LIMIT_STEP_TOKENS);
    if (payload_size != row_size * header->token_count)
        return odsi_fail(ODSI_ERR_INVALID, "a step of %u positions with %llu bytes: expected %llu",
                         header->token_count, (unsigned long long)payload_size,
                         (unsigned long long)(row_size * header->token_count));
    if (header->position > spec->token_limit ||
        header->token_count > spec->token_limit - header->position)
        return odsi_fail(
            ODSI_ERR_RANGE, "positions %u to %llu: the session ends at %u", header->position,
            (unsigned long long)header->position + header->token_count - 1, spec->token_limit);
    return ODSI_OK;
}

enum hop_verdict hop_accept(const struct hop_spec *spec, const struct hop_worker *worker,
                            struct hop_order *order, const struct hop_header *header,
                            const struct digest *sender, uint64_t payload_size, enum odsi_err *err)
{
    *err = check_sender(spec, header, sender);
    if (*err == ODSI_OK && header->epoch != spec->epoch)
        *err = odsi_fail(ODSI_ERR_STATE, "epoch %u: the session's path has epoch %u", header->epoch,
                         spec->epoch);
    if (*err == ODSI_OK)
        *err = check_shape(spec, worker, header, payload_size);
    if (*err != ODSI_OK)
        return HOP_REFUSE;
    if (!order->started) {
        if (header->position > order->held_count) {
            *err = odsi_fail(ODSI_ERR_STATE, "position %u: this stage holds %u", header->position,
                             order->held_count);
            return HOP_REFUSE;
        }
        order->started = 1;
        order->next_position = header->position;
    }
    if (header->position + header->token_count <= order->next_position)
        return HOP_DUPLICATE;
    if (header->position != order->next_position) {
        *err = odsi_fail(ODSI_ERR_STATE, "position %u: the next one is %u", header->position,
                         order->next_position);
        return HOP_REFUSE;
    }
    order->next_position += header->token_count;
    return HOP_TAKE;
}

void hop_rtt_add(struct hop_rtt *self, uint32_t sample_us)
{
    if (self->mean_us == 0) {
        self->mean_us = sample_us ? sample_us : 1;
        self->deviation_us = sample_us / 2;
        return;
    }
    const uint32_t off =
        sample_us > self->mean_us ? sample_us - self->mean_us : self->mean_us - sample_us;
    self->deviation_us = (uint32_t)((3ull * self->deviation_us + off) / 4);
    self->mean_us = (uint32_t)((7ull * self->mean_us + sample_us) / 8);
    if (self->mean_us == 0)
        self->mean_us = 1;
}
