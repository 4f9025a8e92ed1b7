/* The directory (draft 10.3): which workers serve which layers of which models, as the coordinator
 * last told it, in plain structs.
 *
 * It is kept in a file, so that a gateway that starts while every coordinator is down still finds
 * the workers. What is in it is only a hint: a worker that left fails when a session is opened on
 * it, and a model is checked against its id. Threads: one owner. */
#ifndef ODSI_WORKER_GATEWAY_DIRECTORY_H
#define ODSI_WORKER_GATEWAY_DIRECTORY_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"

#include <stddef.h>
#include <stdint.h>

/* One worker that is ready to serve. */
struct directory_member {
    struct digest worker_id;
    char address[LIMIT_ADDRESS_SIZE];
    struct digest model_id;
    char model_name[LIMIT_NAME_SIZE];
    uint32_t layer_count; /* of the model */
    uint32_t context_length;
    uint32_t numerics_version;
    uint32_t layer_first; /* holds [layer_first, layer_end) */
    uint32_t layer_end;
    float prefill_tokens_per_s; /* through the layers it holds; 0: not known */
    float decode_tokens_per_s;
    uint64_t kv_token_capacity; /* 0: not known */
    /* Load; not kept in the file. */
    uint64_t kv_tokens_free;
    uint32_t session_count;
    uint32_t queued_step_count;
};

/* All workers of one model. Workers that disagree about its shape count as different models;
 * which of them is right shows when the manifest is fetched. */
struct directory_model {
    struct digest model_id;
    const char *name; /* valid until the directory changes */
    uint32_t layer_count;
    uint32_t context_length;
    uint32_t numerics_version;
    uint32_t worker_count;
    int complete; /* every layer is served */
};

struct directory;

ODSI_MUST_USE enum odsi_err directory_open(struct directory **out);
void directory_close(struct directory **self);

/* A new directory is put together by begin, add for each member, and commit; until commit the old
 * one stays. Members beyond LIMIT_MEMBERS_MAX, with broken fields, or whose id came before are
 * left out, since one bad entry must not hide the others. */
void directory_begin(struct directory *self, uint64_t version);
/* Errors: ODSI_ERR_INVALID (left out; the sentence says why), ODSI_ERR_NO_MEMORY. */
enum odsi_err directory_add(struct directory *self, const struct directory_member *member);
/* Returns whether anything but load changed. */
int directory_commit(struct directory *self);

/* Whether there was ever a directory, even an empty one. */
int directory_is_known(const struct directory *self);
uint64_t directory_version(const struct directory *self);
/* In ascending order of worker id; valid until the next commit or load. */
const struct directory_member *directory_members_view(const struct directory *self,
                                                      uint32_t *count);
/* NULL when the worker is not in it; valid as above. */
const struct directory_member *directory_find(const struct directory *self,
                                              const struct digest *worker_id);
/* All models, in ascending order of id. Owned: by the caller, alloc_free.
 * Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err directory_models(const struct directory *self,
                                             struct directory_model **out, uint32_t *count);

/* Appends the file's bytes to out: integers little-endian,
 *   8 "ODSIDIR1", 8 version, 4 count, then per member: 32 worker id, 32 model id, 4 layer count,
 *   4 context length, 4 numerics version, 4 layer first, 4 layer end, 4 and 4 prefill and decode
 *   tokens per second (f32 bits), 8 KV capacity, 2+n address, 2+n model name;
 *   32 SHA-256 of everything before.
 * Errors: ODSI_ERR_RANGE, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err directory_encode(const struct directory *self, struct buf *out);
/* Replaces the directory by what encode wrote. Errors: ODSI_ERR_CORRUPT, ODSI_ERR_NO_MEMORY; the
 * directory is then as before. */
ODSI_MUST_USE enum odsi_err directory_decode(struct directory *self, const uint8_t *data,
                                             size_t size);
/* The same with a file. Errors: also ODSI_ERR_NOT_FOUND and ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err directory_load(struct directory *self, const char *path);
ODSI_MUST_USE enum odsi_err directory_save(const struct directory *self, const char *path);
#endif
