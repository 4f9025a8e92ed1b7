/* A model in one GGUF file, or in several: NAME-00001-of-00003.gguf and so on, the first with the
 * metadata, each with tensors of its own. */
#include "common/base/alloc.h"
#include "kernels/quant.h"
#include "worker/model/arch_gguf.h"
#include "worker/model/source.h"
#include "worker/model/vocab.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define FACTORS       "rope_freqs.weight"
#define FACTORS_LONG  "rope_factors_long.weight"
#define FACTORS_SHORT "rope_factors_short.weight"
#define PART_SUFFIX   "-00001-of-00001.gguf"

/* One file while its header is read. */
struct part {
    const char *path;
    uint32_t file; /* index in the source */
    void *map;
    struct gguf *gguf;
};

/* What is known while the parts are read one by one. */
struct reading {
    struct source *source;
    struct arch_gguf_facts facts;
    uint32_t part_count;
    const char *factors; /* the name of the tensor that becomes FACTORS, of longrope's two */
    int other_factors;   /* whether longrope's other one was there */
};

/* ---- one part -------------------------------------------------------------------------------- */

static enum odsi_err part_open(struct part *self, struct source *source, const char *path)
{
    *self = (struct part){.path = path, .map = MAP_FAILED};
    enum odsi_err err = source_add_file(source, path, &self->file);
    if (err != ODSI_OK)
        return err;
    const struct source_file *file = &source->files[self->file];
    self->map = mmap(NULL, file->size, PROT_READ, MAP_PRIVATE, file->fd, 0);
    if (self->map == MAP_FAILED)
        return odsi_fail(ODSI_ERR_IO, "%s: cannot map: %s", path, strerror(errno));
    err = gguf_open_memory(&self->gguf, self->map, file->size);
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s", path);
}

static void part_close(struct part *self, const struct source *source)
{
    gguf_close(&self->gguf);
    if (self->map != MAP_FAILED)
        munmap(self->map, source->files[self->file].size);
}

/* A number of the split.* keys; absent is fallback. */
static enum odsi_err split_key(const struct gguf *gguf, const char *key, uint32_t fallback,
                               uint32_t *out)
{
    *out = fallback;
    const enum odsi_err err = gguf_get_u32(gguf, key, out);
    return err == ODSI_ERR_NOT_FOUND ? ODSI_OK : err;
}

/* Whether this is the index-th of part_count parts. */
static enum odsi_err check_part(const struct part *self, uint32_t index, uint32_t part_count)
{
    uint32_t number, count;
    enum odsi_err err = split_key(self->gguf, "split.no", 0, &number);
    if (err == ODSI_OK)
        err = split_key(self->gguf, "split.count", 1, &count);
    if (err != ODSI_OK)
        return err;
    if (count == 0) /* as good as no key */
        count = 1;
    if (count == part_count && number == index)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_CORRUPT,
                     "by its metadata this is part %" PRIu64 " of %" PRIu32 ", by its name part "
                     "%" PRIu32 " of %" PRIu32,
                     (uint64_t)number + 1, count, index + 1, part_count);
}

/* ---- tensors --------------------------------------------------------------------------------- */

static int name_is(const struct gguf_tensor *tensor, const char *name)
{
    return gguf_text_is(tensor->name, name);
}

static enum odsi_err check_tensor(const struct gguf_tensor *tensor)
{
    if (!quant_is_known(tensor->ggml_type))
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tensor %.*s is %s; this build takes f32, f16, bf16, q4_0, q4_1, q5_0, "
                         "q5_1, q8_0 and q2_k to q6_k",
                         (int)tensor->name.size, tensor->name.data,
                         gguf_type_name(tensor->ggml_type));
    if (tensor->dim_count > 3)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "tensor %.*s has 4 dimensions",
                         (int)tensor->name.size, tensor->name.data);
    return ODSI_OK;
}

/* Appends one tensor, for which there is room. Longrope has two lists of factors, one for texts
 * within the length of the training and one for longer ones. A model is one function here,
 * whatever the length of a text: the list is chosen by how long texts may get, and is then the
 * model's only one. */
static enum odsi_err take_tensor(struct reading *self, const struct part *part,
                                 const struct gguf_tensor *tensor)
{
    struct source *source = self->source;
    const int is_longrope = name_is(tensor, FACTORS_LONG) || name_is(tensor, FACTORS_SHORT);
    if (is_longrope && !name_is(tensor, self->factors)) {
        self->other_factors = 1;
        return ODSI_OK;
    }
    const enum odsi_err err = check_tensor(tensor);
    if (err != ODSI_OK)
        return err;
    struct source_tensor *to = &source->tensors[source->tensor_count++];
    memset(to, 0, sizeof *to);
    if (is_longrope)
        memcpy(to->name, FACTORS, sizeof FACTORS);
    else
        memcpy(to->name, tensor->name.data, tensor->name.size); /* gguf.h: it fits */
    to->type = (enum tensor_type)tensor->ggml_type;
    to->dim_count = tensor->dim_count;
    memcpy(to->dims, tensor->dims, sizeof to->dims);
    to->file = part->file;
    to->offset = tensor->offset;
    to->size = tensor->size;
    return ODSI_OK;
}

static enum odsi_err take_tensors(struct reading *self, const struct part *part)
{
    struct source *source = self->source;
    const uint64_t count = gguf_tensor_count(part->gguf);
    if (count > LIMIT_TENSORS_MAX - source->tensor_count)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "the model has more than %u tensors",
                         LIMIT_TENSORS_MAX);
    enum odsi_err err = alloc_resize(&source->tensors, source->tensor_count + (size_t)count,
                                     sizeof *source->tensors);
    for (uint64_t i = 0; i < count && err == ODSI_OK; i++)
        err = take_tensor(self, part, gguf_tensor_at(part->gguf, i));
    return err;
}

static int compare_names(const void *a, const void *b)
{
    const struct source_tensor *left = a;
    const struct source_tensor *right = b;
    return strcmp(left->name, right->name);
}

static int has_tensor(const struct source *source, const char *name)
{
    for (uint32_t i = 0; i < source->tensor_count; i++)
        if (strcmp(source->tensors[i].name, name) == 0)
            return 1;
    return 0;
}

/* All parts have been read. */
static enum odsi_err finish_tensors(struct reading *self)
{
    struct source *source = self->source;
    struct model_params *p = &source->params;
    if (source->tensor_count > 1)
        qsort(source->tensors, source->tensor_count, sizeof *source->tensors, compare_names);
    for (uint32_t i = 1; i < source->tensor_count; i++)
        if (compare_names(&source->tensors[i - 1], &source->tensors[i]) == 0)
            return odsi_fail(ODSI_ERR_CORRUPT, "%s: two tensors are named %s",
                             source->files[0].path, source->tensors[i].name);
    if (has_tensor(source, FACTORS))
        p->features |= MODEL_ROPE_FACTORS;
    else if (self->other_factors)
        return odsi_fail(ODSI_ERR_CORRUPT, "%s: tensor %s is missing", source->files[0].path,
                         self->factors);
    if (has_tensor(source, "blk.0.attn_q.bias"))
        p->features |= MODEL_QKV_BIAS;
    return ODSI_OK;
}

/* ---- the first part -------------------------------------------------------------------------- */

static enum odsi_err read_name(const struct gguf *gguf, struct model_params *params)
{
    struct gguf_text text = {.size = 0};
    const enum odsi_err err = gguf_get_text(gguf, "general.name", &text);
    if (err != ODSI_OK && err != ODSI_ERR_NOT_FOUND)
        return err;
    size_t size = text.size < sizeof params->name ? text.size : sizeof params->name - 1;
    for (size_t i = 0; i < size; i++)
        params->name[i] = text.data[i] >= ' ' && text.data[i] <= '~' ? text.data[i] : '?';
    params->name[size] = '\0';
    return ODSI_OK;
}

static enum odsi_err read_description(struct reading *self, const struct gguf *gguf)
{
    struct model_params *p = &self->source->params;
    enum odsi_err err = arch_gguf_read(gguf, p, &self->facts);
    if (err == ODSI_OK)
        err = read_name(gguf, p);
    if (err == ODSI_OK)
        err = vocab_canonical(gguf, &self->source->tokenizer, &p->vocab_size);
    if (err != ODSI_OK)
        return err;
    if (self->facts.vocab_size != 0 && self->facts.vocab_size != p->vocab_size)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "the key vocab_size is %" PRIu32 ", but there are %" PRIu32 " tokens",
                         self->facts.vocab_size, p->vocab_size);
    const uint32_t original = self->facts.original_context_length;
    self->factors = original != 0 && p->context_length > original ? FACTORS_LONG : FACTORS_SHORT;
    return ODSI_OK;
}

static enum odsi_err take_part(struct reading *self, const struct part *part, uint32_t index)
{
    enum odsi_err err = check_part(part, index, self->part_count);
    if (err == ODSI_OK && index == 0)
        err = read_description(self, part->gguf);
    if (err == ODSI_OK)
        err = take_tensors(self, part);
    return err;
}

/* The first part says how many tensors there are in all. */
static enum odsi_err check_tensor_count(const struct reading *self, uint32_t stated)
{
    const uint32_t have = self->source->tensor_count + (self->other_factors ? 1 : 0);
    if (stated == 0 || stated == have)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_CORRUPT,
                     "%s: split.tensors.count is %" PRIu32 ", but the parts have %" PRIu32,
                     self->source->files[0].path, stated, have);
}

/* ---- all parts ------------------------------------------------------------------------------- */

/* Where "-00001-of-00003.gguf" begins in path, when its second number is part_count; 0 when the
 * path does not end so. */
static size_t stem_of(const char *path, uint32_t part_count)
{
    static const char pattern[] = PART_SUFFIX;
    const size_t size = strlen(path);
    char ending[32];
    if (size < sizeof pattern)
        return 0;
    const size_t stem = size - (sizeof pattern - 1);
    for (size_t i = 0; pattern[i]; i++) {
        const char c = path[stem + i];
        const int is_digit = c >= '0' && c <= '9';
        if (pattern[i] >= '0' && pattern[i] <= '9' ? !is_digit : c != pattern[i])
            return 0;
    }
    snprintf(ending, sizeof ending, "-of-%05" PRIu32 ".gguf", part_count);
    return strcmp(path + size - strlen(ending), ending) == 0 ? stem : 0;
}

/* How many parts the model has by one of them, any. */
static enum odsi_err count_parts(const char *path, uint32_t *out)
{
    struct gguf *gguf = NULL;
    enum odsi_err err = gguf_open(&gguf, path);
    if (err != ODSI_OK)
        return err;
    err = split_key(gguf, "split.count", 1, out);
    gguf_close(&gguf);
    if (err == ODSI_OK && *out > SOURCE_FILES_MAX)
        err = odsi_fail(ODSI_ERR_UNSUPPORTED, "split.count is %" PRIu32 ", more than %u", *out,
                        SOURCE_FILES_MAX);
    if (*out == 0)
        *out = 1;
    return err == ODSI_OK ? ODSI_OK : odsi_fail_prefix(err, "%s", path);
}

static enum odsi_err open_parts(struct reading *self, const char *path, size_t stem,
                                struct buf *part_path)
{
    uint32_t tensor_count = 0;
    for (uint32_t i = 0; i < self->part_count; i++) {
        struct part part;
        buf_reset(part_path);
        enum odsi_err err = self->part_count == 1
                                ? buf_append_text(part_path, path)
                                : buf_printf(part_path, "%.*s-%05" PRIu32 "-of-%05" PRIu32 ".gguf",
                                             (int)stem, path, i + 1, self->part_count);
        if (err != ODSI_OK)
            return err;
        err = part_open(&part, self->source, buf_text_view(part_path));
        if (err == ODSI_OK) {
            err = take_part(self, &part, i);
            if (err == ODSI_OK && i == 0)
                err = split_key(part.gguf, "split.tensors.count", 0, &tensor_count);
            if (err != ODSI_OK)
                err = odsi_fail_prefix(err, "%s", part.path);
        } else if (self->part_count > 1) {
            err = odsi_fail_prefix(err, "part %" PRIu32 " of %" PRIu32, i + 1, self->part_count);
        }
        part_close(&part, self->source);
        if (err != ODSI_OK)
            return err;
    }
    return check_tensor_count(self, tensor_count);
}

enum odsi_err source_gguf_open(struct source *self, const char *path)
{
    struct reading reading = {.source = self};
    struct buf part_path;
    size_t stem = 0;
    enum odsi_err err = count_parts(path, &reading.part_count);
    if (err != ODSI_OK)
        return err;
    if (reading.part_count > 1) {
        stem = stem_of(path, reading.part_count);
        if (stem == 0)
            return odsi_fail(ODSI_ERR_INVALID,
                             "%s is one of %" PRIu32 " parts; its name must be the one it came "
                             "with, NAME-00001-of-%05" PRIu32 ".gguf, so that the others are found",
                             path, reading.part_count, reading.part_count);
    }
    buf_init(&part_path, strlen(path) + 64);
    err = open_parts(&reading, path, stem, &part_path);
    buf_free(&part_path);
    return err == ODSI_OK ? finish_tensors(&reading) : err;
}
