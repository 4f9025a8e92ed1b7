#include "worker/hop/hop_wire.h"

#include "common/base/alloc.h"
#include "common/net/rpc_pack.h"
#include "kernels/ops.h"

#include <string.h>

enum odsi_err hop_wire_read_id(struct hop_session_id *out, const ProtobufCBinaryData *bytes)
{
    if (bytes->len != HOP_SESSION_ID_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "session_id has %zu bytes: it must have %u", bytes->len,
                         HOP_SESSION_ID_SIZE);
    memcpy(out->bytes, bytes->data, HOP_SESSION_ID_SIZE);
    return ODSI_OK;
}

static enum odsi_err read_digest(struct digest *out, const ProtobufCBinaryData *bytes,
                                 const char *name)
{
    if (bytes->len != DIGEST_SIZE)
        return odsi_fail(ODSI_ERR_INVALID, "%s has %zu bytes: it must have %u", name, bytes->len,
                         DIGEST_SIZE);
    memcpy(out->bytes, bytes->data, DIGEST_SIZE);
    return ODSI_OK;
}

static enum odsi_err read_contract(struct hop_spec *out, const Odsi__V1__Contract *message)
{
    if (!message)
        return odsi_fail(ODSI_ERR_INVALID, "contract is missing");
    if (message->codec != ODSI__V1__ACTIVATION_CODEC__ACTIVATION_F32 ||
        message->kv_type != ODSI__V1__KV_TYPE__KV_F16)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "activation codec %d, KV type %d: this worker knows "
                         "f32 activations and f16 KV",
                         (int)message->codec, (int)message->kv_type);
    out->numerics_version = message->numerics_version;
    return read_digest(&out->model_id, &message->model_id, "contract.model_id");
}

static enum odsi_err read_stage(struct hop_stage *out, const Odsi__V1__Stage *message)
{
    const size_t size = message->address ? strlen(message->address) : 0;
    if (size == 0 || size >= LIMIT_ADDRESS_SIZE || !message->layers)
        return odsi_fail(ODSI_ERR_INVALID,
                         "path: a stage needs an address of 1 to %u bytes and "
                         "layers",
                         LIMIT_ADDRESS_SIZE - 1);
    memcpy(out->address, message->address, size + 1);
    out->layer_first = message->layers->first;
    out->layer_end = message->layers->end;
    return read_digest(&out->worker_id, &message->worker_id, "path.worker_id");
}

static enum odsi_err read_path(struct hop_spec *out, const Odsi__V1__OpenSession *message)
{
    if (message->n_path == 0 || message->n_path > LIMIT_STAGES_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "path has %zu stages: 1 to %u", message->n_path,
                         LIMIT_STAGES_MAX);
    if (message->n_stage_budget_us != 0 && message->n_stage_budget_us != message->n_path)
        return odsi_fail(ODSI_ERR_INVALID, "stage_budget_us has %zu entries for %zu stages",
                         message->n_stage_budget_us, message->n_path);
    enum odsi_err err = alloc_zeroed(&out->stages, message->n_path, sizeof *out->stages);
    for (size_t i = 0; err == ODSI_OK && i < message->n_path; i++) {
        err = read_stage(&out->stages[i], message->path[i]);
        if (message->n_stage_budget_us > 0 && message->stage_budget_us[i] > 0)
            out->stages[i].budget_us = message->stage_budget_us[i];
    }
    out->stage_count = (uint32_t)message->n_path;
    return err;
}

static enum odsi_err read_sampling(struct hop_spec *out, const Odsi__V1__Sampling *message)
{
    if (!message)
        return ODSI_OK; /* greedy, to the end */
    out->sampling = (struct sampler_params){
        .temperature = message->temperature,
        .top_k = message->top_k,
        .top_p = message->top_p,
        .min_p = message->min_p,
        .repetition_penalty = message->repetition_penalty,
        .penalty_window = message->penalty_window,
        .seed = message->seed,
    };
    out->ignore_end = message->ignore_end;
    out->new_tokens_max = message->new_tokens_max;
    if (message->n_penalty_tokens > LIMIT_PENALTY_TOKENS)
        return odsi_fail(ODSI_ERR_INVALID, "penalty_tokens has %zu entries: at most %u",
                         message->n_penalty_tokens, LIMIT_PENALTY_TOKENS);
    enum odsi_err err = ODSI_OK;
    for (size_t i = 0; err == ODSI_OK && i < message->n_stop; i++)
        err = stop_add(&out->stop, message->stop[i].data, message->stop[i].len);
    if (err == ODSI_OK && message->n_penalty_tokens > 0)
        err = alloc_zeroed(&out->penalty_tokens, message->n_penalty_tokens,
                           sizeof *out->penalty_tokens);
    if (err == ODSI_OK && message->n_penalty_tokens > 0) {
        memcpy(out->penalty_tokens, message->penalty_tokens,
               message->n_penalty_tokens * sizeof *out->penalty_tokens);
        out->penalty_count = (uint32_t)message->n_penalty_tokens;
    }
    return err;
}

/* The keys' number is bounded by the message's size; what they fit is checked by hop_check_spec. */
static enum odsi_err read_prefix(struct hop_spec *out, const Odsi__V1__OpenSession *message)
{
    const ProtobufCBinaryData *keys = &message->prefix_keys;
    out->prompt_count = message->prompt_token_count;
    if (keys->len % DIGEST_SIZE != 0)
        return odsi_fail(ODSI_ERR_INVALID, "prefix_keys has %zu bytes: a key has %u", keys->len,
                         DIGEST_SIZE);
    const size_t count = keys->len / DIGEST_SIZE;
    if (count > LIMIT_CONTEXT_MAX / KV_PAGE_TOKENS)
        return odsi_fail(ODSI_ERR_INVALID, "prefix_keys has %zu keys: at most %u", count,
                         LIMIT_CONTEXT_MAX / KV_PAGE_TOKENS);
    if (count == 0)
        return ODSI_OK;
    const enum odsi_err err = alloc_zeroed(&out->prefix_keys, count, sizeof *out->prefix_keys);
    if (err != ODSI_OK)
        return err;
    memcpy(out->prefix_keys, keys->data, keys->len);
    out->prefix_count = (uint32_t)count;
    return ODSI_OK;
}

enum odsi_err hop_wire_read_spec(struct hop_spec *out, const Odsi__V1__OpenSession *message)
{
    memset(out, 0, sizeof *out);
    out->epoch = message->epoch;
    out->stage = message->stage;
    out->token_limit = message->token_limit;
    out->step_budget_us = message->step_budget_us > 0 ? message->step_budget_us : 0;
    enum odsi_err err = hop_wire_read_id(&out->id, &message->session_id);
    if (err == ODSI_OK)
        err = read_contract(out, message->contract);
    if (err == ODSI_OK)
        err = read_path(out, message);
    if (err == ODSI_OK)
        err = read_sampling(out, message->sampling);
    if (err == ODSI_OK)
        err = read_prefix(out, message);
    return err;
}

enum odsi_err hop_wire_read_header(struct hop_header *out, const Odsi__V1__StepHeader *message)
{
    if (message->n_timings > LIMIT_STAGES_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "a step with %zu timings: at most %u",
                         message->n_timings, LIMIT_STAGES_MAX);
    out->epoch = message->epoch;
    out->stage = message->stage;
    out->position = message->position;
    out->token_count = message->token_count;
    out->kind = message->kind == ODSI__V1__STEP_KIND__STEP_TOKENS ? HOP_TOKENS : HOP_ACTIVATIONS;
    out->sample = message->sample;
    out->budget_us = message->budget_us > 0 ? message->budget_us : 0;
    out->stage_budget_us = message->stage_budget_us > 0 ? message->stage_budget_us : 0;
    out->network_us = message->network_us;
    out->timing_count = (uint32_t)message->n_timings;
    for (uint32_t i = 0; i < out->timing_count; i++) {
        const Odsi__V1__HopTiming *timing = message->timings[i];
        out->timings[i] = (struct hop_timing){timing->stage, timing->queue_us, timing->compute_us,
                                              timing->network_us, timing->slack_us};
    }
    return hop_wire_read_id(&out->id, &message->session_id);
}

/* The timings of header as messages, in the caller's arrays. */
static void fill_timings(Odsi__V1__HopTiming *messages, Odsi__V1__HopTiming **pointers,
                         const struct hop_header *header)
{
    for (uint32_t i = 0; i < header->timing_count; i++) {
        const struct hop_timing *timing = &header->timings[i];
        odsi__v1__hop_timing__init(&messages[i]);
        messages[i].stage = timing->stage;
        messages[i].queue_us = timing->queue_us;
        messages[i].compute_us = timing->compute_us;
        messages[i].network_us = timing->network_us;
        messages[i].slack_us = timing->slack_us;
        pointers[i] = &messages[i];
    }
}

static ProtobufCBinaryData id_view(const struct hop_session_id *id)
{
    return (ProtobufCBinaryData){.len = sizeof id->bytes, .data = (uint8_t *)(uintptr_t)id->bytes};
}

enum odsi_err hop_wire_write_header(struct buf *out, const struct hop_header *header)
{
    Odsi__V1__HopTiming messages[LIMIT_STAGES_MAX];
    Odsi__V1__HopTiming *pointers[LIMIT_STAGES_MAX];
    Odsi__V1__StepHeader message = ODSI__V1__STEP_HEADER__INIT;
    fill_timings(messages, pointers, header);
    message.session_id = id_view(&header->id);
    message.epoch = header->epoch;
    message.stage = header->stage;
    message.position = header->position;
    message.token_count = header->token_count;
    message.kind = header->kind == HOP_TOKENS ? ODSI__V1__STEP_KIND__STEP_TOKENS
                                              : ODSI__V1__STEP_KIND__STEP_ACTIVATIONS;
    message.sample = header->sample;
    message.budget_us = header->budget_us;
    message.stage_budget_us = header->stage_budget_us;
    message.network_us = header->network_us;
    message.n_timings = header->timing_count;
    message.timings = pointers;
    return rpc_pack(out, &message.base);
}

enum odsi_err hop_wire_write_token(struct buf *out, const struct hop_header *header, uint32_t token,
                                   float logprob, int finish)
{
    Odsi__V1__HopTiming messages[LIMIT_STAGES_MAX];
    Odsi__V1__HopTiming *pointers[LIMIT_STAGES_MAX];
    Odsi__V1__SessionToken message = ODSI__V1__SESSION_TOKEN__INIT;
    Odsi__V1__ControlEvent event = ODSI__V1__CONTROL_EVENT__INIT;
    fill_timings(messages, pointers, header);
    message.session_id = id_view(&header->id);
    message.epoch = header->epoch;
    message.position = header->position + header->token_count;
    message.token = token;
    message.logprob = logprob;
    message.finish = (Odsi__V1__FinishReason)finish;
    message.n_timings = header->timing_count;
    message.timings = pointers;
    event.kind_case = ODSI__V1__CONTROL_EVENT__KIND_TOKEN;
    event.token = &message;
    return rpc_pack(out, &event.base);
}
