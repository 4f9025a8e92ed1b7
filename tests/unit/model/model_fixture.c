#include "tests/unit/model/model_fixture.h"

#include "common/base/alloc.h"
#include "common/base/io.h"
#include "worker/model/arch.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

const struct synth_shape fixture_shape = {.name = "test",
                                          .dim = 64,
                                          .layer_count = 3,
                                          .head_count = 4,
                                          .kv_head_count = 2,
                                          .head_dim = 16,
                                          .ffn_dim = 96,
                                          .vocab_size = 300,
                                          .context_length = 128,
                                          .rms_eps = 1e-5f,
                                          .rope_base = 1e4f};

/* ---- pieces of GGUF ------------------------------------------------------------------------- */

void fixture_text(struct buf *out, const char *text)
{
    (void)buf_append_u64(out, strlen(text));
    (void)buf_append_text(out, text);
}

void fixture_head(struct buf *out, uint32_t version, uint64_t tensor_count, uint64_t key_count)
{
    (void)buf_append_text(out, "GGUF");
    (void)buf_append_u32(out, version);
    (void)buf_append_u64(out, tensor_count);
    (void)buf_append_u64(out, key_count);
}

void fixture_key(struct buf *out, const char *key, uint32_t type)
{
    fixture_text(out, key);
    (void)buf_append_u32(out, type);
}

void fixture_u32(struct buf *out, const char *key, uint32_t value)
{
    fixture_key(out, key, GGUF_U32);
    (void)buf_append_u32(out, value);
}

void fixture_f32(struct buf *out, const char *key, float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    fixture_key(out, key, GGUF_F32);
    (void)buf_append_u32(out, bits);
}

void fixture_bool(struct buf *out, const char *key, int value)
{
    fixture_key(out, key, GGUF_BOOL);
    (void)buf_append_u8(out, (uint8_t)value);
}

void fixture_string(struct buf *out, const char *key, const char *value)
{
    fixture_key(out, key, GGUF_TEXT);
    fixture_text(out, value);
}

void fixture_tensor(struct buf *out, const char *name, uint32_t dim_count, const uint64_t *dims,
                    uint32_t type, uint64_t offset)
{
    fixture_text(out, name);
    (void)buf_append_u32(out, dim_count);
    for (uint32_t i = 0; i < dim_count; i++)
        (void)buf_append_u64(out, dims[i]);
    (void)buf_append_u32(out, type);
    (void)buf_append_u64(out, offset);
}

void fixture_pad(struct buf *out)
{
    while (out->size % 32 != 0)
        cr_assert_eq(buf_append_u8(out, 0), ODSI_OK);
}

void fixture_zeros(struct buf *out, size_t size)
{
    for (size_t i = 0; i < size; i++)
        cr_assert_eq(buf_append_u8(out, 0), ODSI_OK);
}

/* ---- a whole model -------------------------------------------------------------------------- */

static const struct model_params small = {.arch = MODEL_ARCH_LLAMA,
                                          .dim = 32,
                                          .layer_count = 2,
                                          .head_count = 2,
                                          .kv_head_count = 1,
                                          .head_dim = 16,
                                          .ffn_dim = 64,
                                          .vocab_size = FIXTURE_VOCABULARY,
                                          .rope_dim = 16};

static int is(const char *a, const char *b)
{
    return b && strcmp(a, b) == 0;
}

/* Whether key is wanted; counts it. */
static int wants(const struct fixture_recipe *recipe, const char *key, uint32_t *count)
{
    if (is(key, recipe->skip_key))
        return 0;
    ++*count;
    return 1;
}

static void put_arrays(struct buf *out, const struct fixture_recipe *recipe, uint32_t *count)
{
    static const char *const made_up[] = {"\xe2\x96\x81", "a", "b", "ab",
                                          "\xe2\x96\x81"
                                          "ab"};
    if (wants(recipe, "tokenizer.ggml.tokens", count)) {
        fixture_key(out, "tokenizer.ggml.tokens", GGUF_ARRAY);
        (void)buf_append_u32(out, GGUF_TEXT);
        (void)buf_append_u64(out, small.vocab_size);
        for (uint32_t id = 0; id < small.vocab_size; id++) {
            char byte[8];
            snprintf(byte, sizeof byte, "<0x%02X>", (id - 3) & 255);
            fixture_text(out, id == 0    ? "<unk>"
                              : id == 1  ? "<s>"
                              : id == 2  ? "</s>"
                              : id < 259 ? byte
                                         : made_up[id - 259]);
        }
    }
    if (wants(recipe, "tokenizer.ggml.scores", count)) {
        fixture_key(out, "tokenizer.ggml.scores", GGUF_ARRAY);
        (void)buf_append_u32(out, GGUF_F32);
        (void)buf_append_u64(out, small.vocab_size);
        for (uint32_t id = 0; id < small.vocab_size; id++)
            (void)buf_append_u32(out, 0);
    }
    if (wants(recipe, "tokenizer.ggml.token_type", count)) {
        fixture_key(out, "tokenizer.ggml.token_type", GGUF_ARRAY);
        (void)buf_append_u32(out, GGUF_I32);
        (void)buf_append_u64(out, small.vocab_size);
        for (uint32_t id = 0; id < small.vocab_size; id++)
            (void)buf_append_u32(out, id == 0 ? 2 : id < 3 ? 3 : id < 259 ? 6 : 1);
    }
}

void fixture_vocabulary(struct buf *out, uint32_t *key_count)
{
    static const struct fixture_recipe plain = {.skip_key = NULL};
    fixture_string(out, "tokenizer.ggml.model", "llama");
    ++*key_count;
    put_arrays(out, &plain, key_count);
}

static void put_keys(struct buf *out, const struct fixture_recipe *recipe, uint32_t *count)
{
    const struct {
        const char *key;
        uint32_t value;
    } numbers[] = {
        {"llama.context_length", 64},       {"llama.embedding_length", small.dim},
        {"llama.block_count", 2},           {"llama.feed_forward_length", small.ffn_dim},
        {"llama.attention.head_count", 2},  {"llama.attention.head_count_kv", 1},
        {"llama.rope.dimension_count", 16},
    };
    if (wants(recipe, "general.architecture", count))
        fixture_string(out, "general.architecture", "llama");
    if (wants(recipe, "general.name", count))
        fixture_string(out, "general.name", "small");
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        if (wants(recipe, numbers[i].key, count))
            fixture_u32(out, numbers[i].key, numbers[i].value);
    if (wants(recipe, "llama.attention.layer_norm_rms_epsilon", count))
        fixture_f32(out, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    if (wants(recipe, "tokenizer.ggml.model", count))
        fixture_string(out, "tokenizer.ggml.model", "llama");
    put_arrays(out, recipe, count);
    if (recipe->more_keys)
        recipe->more_keys(out, count);
}

static void put_one_tensor(struct buf *out, const struct fixture_recipe *recipe, const char *name,
                           uint32_t rows, uint32_t cols, uint32_t type, uint64_t *offset)
{
    const uint64_t dims[4] = {cols + (is(name, recipe->wide_tensor) ? 32u : 0u), rows, 1, 1};
    uint64_t size = 0;
    if (is(name, recipe->typed_tensor))
        type = recipe->tensor_type;
    cr_assert(gguf_tensor_size(type, dims, &size), "tensor %s", name);
    fixture_tensor(out, name, rows > 1 ? 2 : 1, dims, type, *offset);
    *offset += (size + 31) / 32 * 32;
}

/* Returns the bytes of data. */
static uint64_t put_tensors(struct buf *out, const struct fixture_recipe *recipe, uint32_t *count)
{
    uint64_t offset = 0;
    for (uint32_t role = 0; role < ARCH_ROLE_COUNT; role++) {
        const uint32_t layers = role < ARCH_ROLE_LAYER_FIRST ? 1 : small.layer_count;
        for (uint32_t layer = 0; layer < layers; layer++) {
            struct arch_tensor tensor;
            if (!arch_tensor_of(&small, (enum arch_role)role, layer, &tensor) ||
                is(tensor.name, recipe->skip_tensor))
                continue;
            ++*count;
            put_one_tensor(out, recipe, tensor.name, tensor.rows, tensor.cols,
                           tensor.is_vector ? TENSOR_F32 : (uint32_t)recipe->weight_type, &offset);
        }
    }
    if (recipe->extra_tensor) {
        ++*count;
        put_one_tensor(out, recipe, recipe->extra_tensor, 1, 32, TENSOR_F32, &offset);
    }
    return offset;
}

void fixture_model(struct buf *out, const struct fixture_recipe *recipe)
{
    struct buf keys, tensors;
    uint32_t key_count = 0;
    uint32_t tensor_count = 0;
    buf_init(&keys, 1u << 20);
    buf_init(&tensors, 1u << 20);
    put_keys(&keys, recipe, &key_count);
    const uint64_t data_size = put_tensors(&tensors, recipe, &tensor_count);
    fixture_head(out, 3, tensor_count, key_count);
    (void)buf_append(out, keys.data, keys.size);
    (void)buf_append(out, tensors.data, tensors.size);
    fixture_pad(out);
    for (uint64_t i = 0; i < data_size; i++) /* small floats: the high byte is 0x3c or 0x3d */
        cr_assert_eq(buf_append_u8(out, i % 4 == 3   ? (uint8_t)(0x3c | (i >> 10 & 1))
                                        : i % 4 == 2 ? (uint8_t)(i >> 2)
                                                     : (uint8_t)(i >> 8)),
                     ODSI_OK);
    buf_free(&keys);
    buf_free(&tensors);
}

/* ---- files ---------------------------------------------------------------------------------- */

char *fixture_folder(void)
{
    const char *tmp = getenv("TMPDIR");
    char folder[256];
    char *out = NULL;
    snprintf(folder, sizeof folder, "%s/odsi-model-XXXXXX", tmp ? tmp : "/tmp");
    cr_assert_not_null(mkdtemp(folder));
    cr_assert_eq(alloc_text(&out, folder, strlen(folder)), ODSI_OK);
    return out;
}

static void remove_files(const char *folder)
{
    DIR *entries = opendir(folder);
    if (!entries)
        return;
    for (struct dirent *entry = readdir(entries); entry; entry = readdir(entries)) {
        char path[1024];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (unlink(path) != 0) {
            remove_files(path);
            rmdir(path);
        }
    }
    closedir(entries);
}

void fixture_folder_remove(char *folder)
{
    remove_files(folder);
    cr_expect_eq(rmdir(folder), 0);
    alloc_free(folder);
}

const char *fixture_path(const char *folder, const char *name)
{
    static char paths[4][1024];
    static unsigned turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

void fixture_write(const char *path, const struct buf *content)
{
    cr_assert_eq(buf_status(content), ODSI_OK);
    cr_assert_eq(io_write_file(path, content->data, content->size, 0644, 0), ODSI_OK, "%s",
                 odsi_err_text());
}

void fixture_read(const char *path, struct buf *out)
{
    cr_assert_eq(io_read_file(path, out), ODSI_OK, "%s", odsi_err_text());
}

void fixture_flip(const char *path, uint64_t offset, uint8_t mask)
{
    struct stat status;
    uint8_t byte;
    const int fd = open(path, O_RDWR);
    cr_assert(fd >= 0);
    cr_assert_eq(fstat(fd, &status), 0);
    cr_assert_eq(pread(fd, &byte, 1, (off_t)offset), 1);
    byte ^= mask;
    cr_assert_eq(pwrite(fd, &byte, 1, (off_t)offset), 1);
    const struct timespec times[2] = {status.st_atim, status.st_mtim};
    cr_assert_eq(futimens(fd, times), 0);
    close(fd);
}

struct backend *fixture_backend(void)
{
    struct backend *backend = NULL;
    const struct backend_config config = {.name = "scalar", .thread_count = 1};
    cr_assert_eq(backend_open(&backend, &config), ODSI_OK, "%s", odsi_err_text());
    return backend;
}

uint64_t fixture_random(uint64_t *state)
{
    *state += UINT64_C(0x9e3779b97f4a7c15);
    uint64_t bits = *state;
    bits = (bits ^ bits >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    bits = (bits ^ bits >> 27) * UINT64_C(0x94d049bb133111eb);
    return bits ^ bits >> 31;
}
