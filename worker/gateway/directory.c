#include "worker/gateway/directory.h"

#include "common/base/alloc.h"
#include "common/base/bytes.h"
#include "common/base/io.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAGIC           "ODSIDIR1"
#define MAGIC_SIZE      8u
#define MEMBER_SIZE_MAX (2 * DIGEST_SIZE + 36u + 4u + LIMIT_ADDRESS_SIZE + LIMIT_NAME_SIZE)
#define FILE_SIZE_MAX   (MAGIC_SIZE + 12u + LIMIT_MEMBERS_MAX * MEMBER_SIZE_MAX + DIGEST_SIZE)

struct members {
    struct directory_member *data; /* [count] */
    uint32_t count;
    uint32_t capacity;
    uint64_t version;
};

struct directory {
    struct members now;
    struct members next; /* between begin and commit */
    int known;
};

enum odsi_err directory_open(struct directory **out)
{
    return alloc_zeroed(out, 1, sizeof **out);
}

void directory_close(struct directory **self)
{
    if (!*self)
        return;
    alloc_free((*self)->now.data);
    alloc_free((*self)->next.data);
    alloc_free(*self);
    *self = NULL;
}

void directory_begin(struct directory *self, uint64_t version)
{
    self->next.count = 0;
    self->next.version = version;
}

/* Texts go into messages and logs, so only plain printable ones are let in. */
static int is_printable(const char *text, size_t size)
{
    const size_t length = strnlen(text, size);
    if (length == size)
        return 0;
    for (size_t i = 0; i < length; i++)
        if ((unsigned char)text[i] < 0x20 || (unsigned char)text[i] == 0x7F)
            return 0;
    return 1;
}

static int is_rate(float value)
{
    return isfinite(value) && value >= 0.0f;
}

static enum odsi_err check_member(const struct directory_member *member)
{
    if (!is_printable(member->address, sizeof member->address) || member->address[0] == '\0' ||
        strchr(member->address, ' '))
        return odsi_fail(ODSI_ERR_INVALID, "a worker's address is empty or not printable");
    if (!is_printable(member->model_name, sizeof member->model_name))
        return odsi_fail(ODSI_ERR_INVALID, "the model name of %s is not printable",
                         member->address);
    if (member->layer_count == 0 || member->layer_count > LIMIT_LAYERS_MAX ||
        member->layer_first >= member->layer_end || member->layer_end > member->layer_count)
        return odsi_fail(ODSI_ERR_INVALID, "%s says it has layers [%u, %u) of %u", member->address,
                         member->layer_first, member->layer_end, member->layer_count);
    if (member->context_length == 0 || member->context_length > LIMIT_CONTEXT_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "%s says its context has %u positions", member->address,
                         member->context_length);
    if (!is_rate(member->prefill_tokens_per_s) || !is_rate(member->decode_tokens_per_s))
        return odsi_fail(ODSI_ERR_INVALID, "the speed of %s is not a number", member->address);
    return ODSI_OK;
}

enum odsi_err directory_add(struct directory *self, const struct directory_member *member)
{
    struct members *next = &self->next;
    enum odsi_err err = check_member(member);
    if (err != ODSI_OK)
        return err;
    if (next->count == LIMIT_MEMBERS_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "more than %u workers", LIMIT_MEMBERS_MAX);
    if (next->count == next->capacity) {
        const uint32_t wanted = next->capacity ? 2 * next->capacity : 16;
        err = alloc_resize(&next->data, wanted, sizeof *next->data);
        if (err != ODSI_OK)
            return err;
        next->capacity = wanted;
    }
    next->data[next->count++] = *member;
    return ODSI_OK;
}

static int compare_ids(const struct digest *a, const struct digest *b)
{
    return memcmp(a->bytes, b->bytes, DIGEST_SIZE);
}

static int compare_workers(const void *a, const void *b)
{
    const struct directory_member *one = a;
    const struct directory_member *other = b;
    return compare_ids(&one->worker_id, &other->worker_id);
}

static int is_same(const struct directory_member *a, const struct directory_member *b)
{
    return compare_ids(&a->worker_id, &b->worker_id) == 0 &&
           compare_ids(&a->model_id, &b->model_id) == 0 && strcmp(a->address, b->address) == 0 &&
           strcmp(a->model_name, b->model_name) == 0 && a->layer_count == b->layer_count &&
           a->context_length == b->context_length && a->numerics_version == b->numerics_version &&
           a->layer_first == b->layer_first && a->layer_end == b->layer_end;
}

int directory_commit(struct directory *self)
{
    struct members *next = &self->next;
    if (next->count > 0)
        qsort(next->data, next->count, sizeof *next->data, compare_workers);
    uint32_t kept = 0;
    for (uint32_t i = 0; i < next->count; i++)
        if (kept == 0 || compare_workers(&next->data[kept - 1], &next->data[i]) != 0)
            next->data[kept++] = next->data[i];
    next->count = kept;
    int changed = !self->known || kept != self->now.count;
    for (uint32_t i = 0; i < kept && !changed; i++)
        changed = !is_same(&next->data[i], &self->now.data[i]);
    const struct members old = self->now;
    self->now = *next;
    *next = old;
    self->known = 1;
    return changed;
}

int directory_is_known(const struct directory *self)
{
    return self->known;
}

uint64_t directory_version(const struct directory *self)
{
    return self->now.version;
}

const struct directory_member *directory_members_view(const struct directory *self, uint32_t *count)
{
    *count = self->now.count;
    return self->now.data;
}

const struct directory_member *directory_find(const struct directory *self,
                                              const struct digest *worker_id)
{
    struct directory_member key;
    if (self->now.count == 0)
        return NULL;
    key.worker_id = *worker_id;
    return bsearch(&key, self->now.data, self->now.count, sizeof key, compare_workers);
}

/* ---- models ---------------------------------------------------------------------------------- */

static int compare_models(const void *a, const void *b)
{
    const struct directory_member *one = *(const struct directory_member *const *)a;
    const struct directory_member *other = *(const struct directory_member *const *)b;
    const int ids = compare_ids(&one->model_id, &other->model_id);
    if (ids != 0)
        return ids;
    if (one->layer_count != other->layer_count)
        return one->layer_count < other->layer_count ? -1 : 1;
    if (one->context_length != other->context_length)
        return one->context_length < other->context_length ? -1 : 1;
    if (one->numerics_version != other->numerics_version)
        return one->numerics_version < other->numerics_version ? -1 : 1;
    return compare_ids(&one->worker_id, &other->worker_id);
}

static int is_same_model(const struct directory_member *a, const struct directory_member *b)
{
    return compare_ids(&a->model_id, &b->model_id) == 0 && a->layer_count == b->layer_count &&
           a->context_length == b->context_length && a->numerics_version == b->numerics_version;
}

/* Sums up members[count], which are all of one model. */
static struct directory_model sum_up(const struct directory_member *const *members, uint32_t count)
{
    int change[LIMIT_LAYERS_MAX + 1] = {0}; /* how many ranges begin less how many end here */
    for (uint32_t i = 0; i < count; i++) {
        change[members[i]->layer_first]++;
        change[members[i]->layer_end]--;
    }
    int complete = 1;
    int held = 0;
    for (uint32_t layer = 0; layer < members[0]->layer_count; layer++) {
        held += change[layer];
        complete = complete && held > 0;
    }
    return (struct directory_model){
        .model_id = members[0]->model_id,
        .name = members[0]->model_name,
        .layer_count = members[0]->layer_count,
        .context_length = members[0]->context_length,
        .numerics_version = members[0]->numerics_version,
        .worker_count = count,
        .complete = complete,
    };
}

enum odsi_err directory_models(const struct directory *self, struct directory_model **out,
                               uint32_t *count)
{
    const uint32_t member_count = self->now.count;
    const struct directory_member **sorted = NULL;
    *count = 0;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&sorted, member_count, sizeof(void *));
    if (err == ODSI_OK)
        err = alloc_zeroed(out, member_count, sizeof **out);
    if (err != ODSI_OK) {
        alloc_free(sorted);
        return err;
    }
    for (uint32_t i = 0; i < member_count; i++)
        sorted[i] = &self->now.data[i];
    if (member_count > 0)
        qsort(sorted, member_count, sizeof(void *), compare_models);
    for (uint32_t first = 0; first < member_count;) {
        uint32_t end = first + 1;
        while (end < member_count && is_same_model(sorted[first], sorted[end]))
            end++;
        (*out)[(*count)++] = sum_up(sorted + first, end - first);
        first = end;
    }
    alloc_free(sorted);
    return ODSI_OK;
}

/* ---- file ------------------------------------------------------------------------------------ */

static uint32_t float_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_of_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void append_text(struct buf *out, const char *text)
{
    const size_t size = strlen(text);
    buf_append_u8(out, (uint8_t)size);
    buf_append_u8(out, (uint8_t)(size >> 8));
    buf_append(out, text, size);
}

enum odsi_err directory_encode(const struct directory *self, struct buf *out)
{
    const size_t start = out->size;
    buf_append(out, MAGIC, MAGIC_SIZE);
    buf_append_u64(out, self->now.version);
    buf_append_u32(out, self->now.count);
    for (uint32_t i = 0; i < self->now.count; i++) {
        const struct directory_member *member = &self->now.data[i];
        buf_append(out, member->worker_id.bytes, DIGEST_SIZE);
        buf_append(out, member->model_id.bytes, DIGEST_SIZE);
        buf_append_u32(out, member->layer_count);
        buf_append_u32(out, member->context_length);
        buf_append_u32(out, member->numerics_version);
        buf_append_u32(out, member->layer_first);
        buf_append_u32(out, member->layer_end);
        buf_append_u32(out, float_bits(member->prefill_tokens_per_s));
        buf_append_u32(out, float_bits(member->decode_tokens_per_s));
        buf_append_u64(out, member->kv_token_capacity);
        append_text(out, member->address);
        append_text(out, member->model_name);
    }
    const enum odsi_err err = buf_status(out);
    if (err != ODSI_OK)
        return err;
    struct digest digest;
    digest_of(&digest, out->data + start, out->size - start);
    return buf_append(out, digest.bytes, DIGEST_SIZE);
}

/* Reads forward; a read past the end marks it bad and yields zeros. */
struct reader {
    const uint8_t *data;
    size_t left;
    int bad;
};

static const uint8_t *read_bytes(struct reader *reader, size_t size)
{
    static const uint8_t zeros[DIGEST_SIZE];
    if (reader->bad || size > reader->left) {
        reader->bad = 1;
        return zeros;
    }
    const uint8_t *at = reader->data;
    reader->data += size;
    reader->left -= size;
    return at;
}

static uint32_t read_u32(struct reader *reader)
{
    return bytes_load_u32(read_bytes(reader, 4));
}

static void read_text(struct reader *reader, char *out, size_t out_size)
{
    const uint8_t *size_bytes = read_bytes(reader, 2);
    const size_t size = (size_t)size_bytes[0] | (size_t)size_bytes[1] << 8;
    if (size >= out_size || size > reader->left) {
        reader->bad = 1;
        return;
    }
    memcpy(out, read_bytes(reader, size), size);
    out[size] = '\0';
}

static void read_member(struct reader *reader, struct directory_member *out)
{
    memset(out, 0, sizeof *out);
    memcpy(out->worker_id.bytes, read_bytes(reader, DIGEST_SIZE), DIGEST_SIZE);
    memcpy(out->model_id.bytes, read_bytes(reader, DIGEST_SIZE), DIGEST_SIZE);
    out->layer_count = read_u32(reader);
    out->context_length = read_u32(reader);
    out->numerics_version = read_u32(reader);
    out->layer_first = read_u32(reader);
    out->layer_end = read_u32(reader);
    out->prefill_tokens_per_s = float_of_bits(read_u32(reader));
    out->decode_tokens_per_s = float_of_bits(read_u32(reader));
    out->kv_token_capacity = bytes_load_u64(read_bytes(reader, 8));
    read_text(reader, out->address, sizeof out->address);
    read_text(reader, out->model_name, sizeof out->model_name);
    out->kv_tokens_free = out->kv_token_capacity;
}

enum odsi_err directory_decode(struct directory *self, const uint8_t *data, size_t size)
{
    struct digest digest;
    if (size < MAGIC_SIZE + 12 + DIGEST_SIZE || memcmp(data, MAGIC, MAGIC_SIZE) != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "not a directory: %zu bytes without its mark", size);
    digest_of(&digest, data, size - DIGEST_SIZE);
    if (memcmp(digest.bytes, data + size - DIGEST_SIZE, DIGEST_SIZE) != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "a damaged directory: its digest does not match");
    struct reader reader = {data + MAGIC_SIZE, size - MAGIC_SIZE - DIGEST_SIZE, 0};
    const uint64_t version = bytes_load_u64(read_bytes(&reader, 8));
    const uint32_t count = read_u32(&reader);
    directory_begin(self, version);
    for (uint32_t i = 0; i < count; i++) {
        struct directory_member member;
        read_member(&reader, &member);
        if (reader.bad)
            return odsi_fail(ODSI_ERR_CORRUPT, "a damaged directory: it ends in worker %u of %u", i,
                             count);
        const enum odsi_err err = directory_add(self, &member);
        if (err != ODSI_OK)
            return err == ODSI_ERR_NO_MEMORY ? err
                                             : odsi_fail_prefix(ODSI_ERR_CORRUPT, "directory");
    }
    if (reader.left > 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "a damaged directory: %zu bytes too many", reader.left);
    directory_commit(self);
    return ODSI_OK;
}

enum odsi_err directory_load(struct directory *self, const char *path)
{
    struct buf content;
    buf_init(&content, FILE_SIZE_MAX);
    enum odsi_err err = io_read_file(path, &content);
    if (err == ODSI_OK) {
        err = directory_decode(self, content.data, content.size);
        if (err != ODSI_OK)
            odsi_fail_prefix(err, "%s", path);
    }
    buf_free(&content);
    return err;
}

enum odsi_err directory_save(const struct directory *self, const char *path)
{
    struct buf content;
    buf_init(&content, FILE_SIZE_MAX);
    enum odsi_err err = directory_encode(self, &content);
    if (err == ODSI_OK)
        err = io_write_file(path, content.data, content.size, 0600, 0);
    buf_free(&content);
    return err;
}
