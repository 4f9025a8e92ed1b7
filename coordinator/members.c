#include "coordinator/members.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

/* Bytes of a packed Member but for its three texts, at their longest: tags, lengths and varints of
 * proto/odsi/v1/coordinator.proto counted one by one. */
#define ENTRY_FIXED_SIZE 180u

/* Stores keep integers as 64-bit signed. */
#define COUNT_MAX ((uint64_t)INT64_MAX)

ODSI_STATIC_ASSERT(ENTRY_FIXED_SIZE + LIMIT_ADDRESS_SIZE + LIMIT_NAME_SIZE + MEMBERS_BACKEND_SIZE <
                       MEMBERS_DIRECTORY_SIZE_MAX,
                   "a directory carries at least one member");

/* ---- fields ---------------------------------------------------------------------------------- */

static int is_printable_ascii(const char *text, size_t size_max)
{
    size_t i = 0;
    for (; i < size_max && text[i]; i++)
        if (text[i] < ' ' || text[i] > '~')
            return 0;
    return i < size_max;
}

/* The length of the UTF-8 sequence at text that is no control character; 0 when it is none. */
static size_t character_size(const unsigned char *text)
{
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000}; /* by length; less is overlong */
    const size_t size = text[0] < 0x80   ? 1
                        : text[0] < 0xc0 ? 0
                        : text[0] < 0xe0 ? 2
                        : text[0] < 0xf0 ? 3
                        : text[0] < 0xf8 ? 4
                                         : 0;
    if (size <= 1)
        return text[0] < ' ' || text[0] == 0x7f ? 0 : size;
    uint32_t code = text[0] & (0x7fu >> size);
    for (size_t i = 1; i < size; i++) {
        if ((text[i] & 0xc0) != 0x80) /* also stops at the NUL */
            return 0;
        code = code << 6 | (text[i] & 0x3fu);
    }
    if (code < least[size] || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff) ||
        (code >= 0x80 && code < 0xa0))
        return 0;
    return size;
}

/* Directory readers of other languages refuse a whole message for one text that is not UTF-8. */
static int is_clean_utf8(const char *text, size_t size_max)
{
    size_t i = 0;
    if (!memchr(text, '\0', size_max))
        return 0;
    while (text[i]) {
        const size_t size = character_size((const unsigned char *)text + i);
        if (size == 0)
            return 0;
        i += size;
    }
    return 1;
}

/* "PORT", 1 to 65535, no leading zero. */
static int is_port(const char *text)
{
    uint32_t port = 0;
    size_t i = 0;
    for (; i < 6 && text[i] >= '0' && text[i] <= '9'; i++)
        port = port * 10 + (uint32_t)(text[i] - '0');
    return i > 0 && text[i] == '\0' && text[0] != '0' && port <= 65535;
}

/* A name, an IPv4 address or an IPv6 address in brackets, that others can connect to. */
static int is_host(const char *text, size_t size)
{
    static const char name[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_";
    static const char ipv6[] = "0123456789abcdefABCDEF:.";
    if (size > 2 && text[0] == '[' && text[size - 1] == ']')
        return strspn(text + 1, ipv6) == size - 2 && !(size == 4 && memcmp(text, "[::]", 4) == 0);
    return size > 0 && strspn(text, name) == size &&
           !(size == 7 && memcmp(text, "0.0.0.0", 7) == 0);
}

static enum odsi_err check_address(const char *address)
{
    const char *colon = NULL;
    if (is_printable_ascii(address, LIMIT_ADDRESS_SIZE))
        colon = strrchr(address, ':');
    if (!colon || !is_host(address, (size_t)(colon - address)) || !is_port(colon + 1))
        return odsi_fail(ODSI_ERR_INVALID,
                         "address '%.*s': give the host:port under which others reach this worker",
                         (int)LIMIT_ADDRESS_SIZE, address);
    return ODSI_OK;
}

static enum odsi_err check_model(const struct members_model *model)
{
    if (!is_clean_utf8(model->name, sizeof model->name) || !model->name[0])
        return odsi_fail(ODSI_ERR_INVALID, "model name: must be 1 to %u bytes of printable UTF-8",
                         LIMIT_NAME_SIZE - 1);
    if (model->layer_count == 0 || model->layer_count > LIMIT_LAYERS_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "model layer_count %u: must be 1 to %u",
                         model->layer_count, LIMIT_LAYERS_MAX);
    if (model->context_length == 0 || model->context_length > LIMIT_CONTEXT_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "model context_length %u: must be 1 to %u",
                         model->context_length, LIMIT_CONTEXT_MAX);
    if (model->numerics_version == 0)
        return odsi_fail(ODSI_ERR_INVALID, "model numerics_version: must not be 0");
    return ODSI_OK;
}

static int is_speed(float value)
{
    return isfinite(value) && value >= 0.0f;
}

static enum odsi_err check_capability(const struct members_capability *capability)
{
    if (capability->memory_size > COUNT_MAX || capability->kv_token_capacity > COUNT_MAX)
        return odsi_fail(ODSI_ERR_INVALID,
                         "capability: memory_size and kv_token_capacity must be below 2^63");
    if (!is_speed(capability->prefill_tokens_per_s) || !is_speed(capability->decode_tokens_per_s))
        return odsi_fail(ODSI_ERR_INVALID, "capability: a speed must be finite and not negative");
    if (!is_printable_ascii(capability->backend, sizeof capability->backend))
        return odsi_fail(ODSI_ERR_INVALID,
                         "capability: backend must be at most %u printable characters",
                         MEMBERS_BACKEND_SIZE - 1);
    return ODSI_OK;
}

static enum odsi_err check_load(const struct members_load *load)
{
    if (load->kv_tokens_free > COUNT_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "load: kv_tokens_free must be below 2^63");
    return ODSI_OK;
}

static enum odsi_err check_layers(uint32_t first, uint32_t end, uint32_t layer_count)
{
    if (first >= end || end > layer_count)
        return odsi_fail(ODSI_ERR_INVALID, "layers [%u, %u): the model has [0, %u)", first, end,
                         layer_count);
    return ODSI_OK;
}

int members_wants_choice(const struct members_wish *wish)
{
    return wish->layer_first == 0 && wish->layer_end == 0;
}

enum odsi_err members_check_wish(const struct members_wish *wish)
{
    enum odsi_err err = check_address(wish->address);
    if (err == ODSI_OK)
        err = check_model(&wish->model);
    if (err == ODSI_OK)
        err = check_capability(&wish->capability);
    if (err != ODSI_OK)
        return err;
    if (!members_wants_choice(wish))
        return check_layers(wish->layer_first, wish->layer_end, wish->model.layer_count);
    if (wish->layer_capacity == 0)
        return odsi_fail(ODSI_ERR_INVALID,
                         "layer_capacity is 0: say which layers, or how many fit");
    return ODSI_OK;
}

enum odsi_err members_check_beat(const struct members_beat *beat)
{
    const enum odsi_err err = check_load(&beat->load);
    if (err != ODSI_OK || !beat->has_capability)
        return err;
    return check_capability(&beat->capability);
}

enum odsi_err members_check_row(const struct member *row)
{
    enum odsi_err err = check_address(row->address);
    if (err == ODSI_OK)
        err = check_model(&row->model);
    if (err == ODSI_OK)
        err = check_layers(row->layer_first, row->layer_end, row->model.layer_count);
    if (err == ODSI_OK)
        err = check_capability(&row->capability);
    if (err == ODSI_OK)
        err = check_load(&row->load);
    if (err == ODSI_OK && (row->heartbeat_ms < MEMBERS_HEARTBEAT_MS_MIN ||
                           row->heartbeat_ms > MEMBERS_HEARTBEAT_MS_MAX))
        err = odsi_fail(ODSI_ERR_INVALID, "heartbeat_ms %u", row->heartbeat_ms);
    if (err != ODSI_OK)
        return odsi_fail_prefix(ODSI_ERR_CORRUPT, "stored member");
    return ODSI_OK;
}

/* ---- time ------------------------------------------------------------------------------------ */

uint64_t members_overdue_us(uint32_t heartbeat_ms)
{
    return (uint64_t)heartbeat_ms * 1500;
}

uint64_t members_expiry_us(uint32_t heartbeat_ms)
{
    return (uint64_t)heartbeat_ms * 3500;
}

uint64_t members_silence_us(const struct member *row, uint64_t now_us)
{
    return now_us > row->heard_at_us ? now_us - row->heard_at_us : 0;
}

int members_is_expired(const struct member *row, uint64_t since_us, uint64_t now_us)
{
    const uint64_t patience_us = members_expiry_us(row->heartbeat_ms);
    return members_silence_us(row, now_us) > patience_us && now_us > since_us &&
           now_us - since_us > patience_us;
}

void members_listener_init(struct members_listener *self, uint64_t period_us, uint64_t now_us)
{
    self->period_us = period_us;
    self->last_us = now_us;
    self->since_us = now_us;
}

uint64_t members_listen(struct members_listener *self, uint64_t now_us)
{
    if (now_us < self->last_us || now_us - self->last_us > 3 * self->period_us)
        self->since_us = now_us;
    self->last_us = now_us;
    return self->since_us;
}

/* ---- joining and heartbeats ------------------------------------------------------------------ */

uint32_t members_entry_size(const struct member *row)
{
    /* The backend at its longest, because a heartbeat may change it and must not need room. */
    return ENTRY_FIXED_SIZE + MEMBERS_BACKEND_SIZE +
           (uint32_t)(strlen(row->address) + strlen(row->model.name));
}

int members_same_model(const struct members_model *a, const struct members_model *b)
{
    return digest_equal(&a->id, &b->id) && a->layer_count == b->layer_count &&
           a->numerics_version == b->numerics_version;
}

int members_same_capability(const struct members_capability *a, const struct members_capability *b)
{
    return a->memory_size == b->memory_size && a->kv_token_capacity == b->kv_token_capacity &&
           memcmp(&a->prefill_tokens_per_s, &b->prefill_tokens_per_s, sizeof(float)) == 0 &&
           memcmp(&a->decode_tokens_per_s, &b->decode_tokens_per_s, sizeof(float)) == 0 &&
           strcmp(a->backend, b->backend) == 0 && a->thread_count == b->thread_count;
}

static enum odsi_err choose_layers(struct member *out, const struct members_wish *wish,
                                   const struct members_facts *facts)
{
    const uint32_t layer_count = wish->model.layer_count;
    const uint32_t size = wish->layer_capacity < layer_count ? wish->layer_capacity : layer_count;
    const struct member *before = facts->self;
    if (before && members_same_model(&before->model, &wish->model) &&
        before->layer_end - before->layer_first == size) {
        out->layer_first = before->layer_first;
        out->layer_end = before->layer_end;
        return ODSI_OK;
    }
    return assign_choose(&out->layer_first, &out->layer_end, facts->peers, facts->peer_count,
                         layer_count, size);
}

static enum odsi_err check_room(const struct member *row, const struct members_facts *facts)
{
    if (facts->member_count >= LIMIT_MEMBERS_MAX ||
        facts->directory_size + members_entry_size(row) > MEMBERS_DIRECTORY_SIZE_MAX)
        return odsi_fail(ODSI_ERR_BUSY,
                         "the directory is full (%u members); join another coordinator's swarm or "
                         "try again later",
                         facts->member_count);
    return ODSI_OK;
}

enum odsi_err members_join(struct member *out, const struct members_wish *wish,
                           const struct members_facts *facts, uint32_t heartbeat_ms,
                           uint64_t now_us)
{
    const struct member *holder = facts->holder;
    memset(out, 0, sizeof *out);
    if (holder && members_silence_us(holder, now_us) <= members_overdue_us(holder->heartbeat_ms)) {
        char id[DIGEST_HEX_SIZE];
        digest_to_hex(id, &holder->worker_id);
        return odsi_fail(ODSI_ERR_EXISTS,
                         "address %s belongs to member %.12s, whose heartbeats arrive; advertise "
                         "your own address or stop the other worker",
                         wish->address, id);
    }
    out->worker_id = wish->worker_id;
    memcpy(out->address, wish->address, sizeof out->address);
    out->model = wish->model;
    out->capability = wish->capability;
    out->layer_first = wish->layer_first;
    out->layer_end = wish->layer_end;
    out->load.kv_tokens_free = wish->capability.kv_token_capacity;
    out->heartbeat_ms = heartbeat_ms;
    out->heard_at_us = now_us;
    const enum odsi_err err = check_room(out, facts);
    if (err != ODSI_OK || !members_wants_choice(wish))
        return err;
    return choose_layers(out, wish, facts);
}

int members_hear(struct member *row, const struct members_beat *beat, uint64_t now_us)
{
    const int changed = !row->ready != !beat->ready;
    row->ready = beat->ready != 0;
    row->load = beat->load;
    row->heard_at_us = now_us;
    if (beat->has_capability)
        row->capability = beat->capability;
    return changed;
}
