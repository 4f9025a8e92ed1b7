/* The JSON files of a Hugging Face folder and of safetensors, which strangers wrote: read under
 * ceilings, and asked for members by type.
 *
 * struct hf_json asks one object for its members. The first mistake sticks: later questions answer
 * their fallback, so that a series of questions needs one check at its end.
 *
 * Threads: pure functions; any thread. */
#ifndef ODSI_WORKER_MODEL_HF_JSON_H
#define ODSI_WORKER_MODEL_HF_JSON_H
#include "common/base/err.h"

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>

/* Values in one text: 8 for each of LIMIT_TENSORS_MAX tensors, and as many again. */
#define HF_JSON_VALUES_MAX (1u << 20)
#define HF_JSON_SHOWN_SIZE 96u

struct hf_json {
    const json_t *object; /* NULL: an object without members */
    enum odsi_err err;
};

/* Parses an object, refusing one that says the same thing twice. Memory is bounded by a count of
 * the values before anything is built. Owned: *out by the caller, ended with json_decref.
 * Errors: ODSI_ERR_CORRUPT, ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err hf_json_parse(json_t **out, const void *text, size_t size);

/* The same of a file in folder. Errors: also ODSI_ERR_NOT_FOUND, ODSI_ERR_IO, ODSI_ERR_RANGE
 * (more than size_max bytes, or the path is too long). */
ODSI_MUST_USE enum odsi_err hf_json_load(json_t **out, const char *folder, const char *name,
                                         size_t size_max);

/* text as people may be shown it: cut, and with '?' for what is not printable ASCII. out has
 * HF_JSON_SHOWN_SIZE bytes. Returns out. */
const char *hf_json_shown(char *out, const char *text);

/* Each answers the member, or fallback when it is missing or null; anything else is
 * ODSI_ERR_CORRUPT. A whole number may be written as a real one. */
uint32_t hf_json_u32(struct hf_json *self, const char *key, uint32_t fallback);
double hf_json_f64(struct hf_json *self, const char *key, double fallback);
int hf_json_bool(struct hf_json *self, const char *key, int fallback);
/* Valid as long as the object. */
const char *hf_json_text_view(struct hf_json *self, const char *key, const char *fallback);
/* The member when it is an object (or an array), else NULL. */
const json_t *hf_json_object_view(struct hf_json *self, const char *key);
const json_t *hf_json_array_view(struct hf_json *self, const char *key);
/* A member that must be there. */
uint32_t hf_json_required_u32(struct hf_json *self, const char *key);
double hf_json_required_f64(struct hf_json *self, const char *key);
/* Whether the member is there, null included. */
int hf_json_has(const struct hf_json *self, const char *key);
#endif
