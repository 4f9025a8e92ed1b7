#include "worker/model/model.h"

#include "common/base/alloc.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/manifest.h"
#include "worker/model/manifest_cache.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct fixture_recipe plain = {.skip_key = NULL};

/* Writes the model of recipe to folder/name and returns the path. */
static const char *write_model(const char *folder, const char *name,
                               const struct fixture_recipe *recipe)
{
    struct buf bytes;
    const char *path = fixture_path(folder, name);
    buf_init(&bytes, 1u << 20);
    fixture_model(&bytes, recipe);
    fixture_write(path, &bytes);
    buf_free(&bytes);
    return path;
}

static struct model *open_model(const char *path, const char *cache)
{
    struct model *model = NULL;
    cr_assert_eq(model_open(&model, path, cache, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    return model;
}

static struct digest id_of(const char *path, const char *cache)
{
    struct model *model = open_model(path, cache);
    const struct digest id = *model_id_view(model);
    model_close(&model);
    return id;
}

/* ---- what a model is ------------------------------------------------------------------------ */

Test(model, describes_the_demo)
{
    struct model *model = open_model(FIXTURE_DEMO, NULL);
    const struct model_params *params = model_params_view(model);
    cr_expect_str_eq(params->name, "odsi-tiny");
    cr_expect_eq(params->arch, MODEL_ARCH_LLAMA);
    cr_expect_eq(params->dim, 128);
    cr_expect_eq(params->layer_count, 6);
    cr_expect_eq(params->head_count, 4);
    cr_expect_eq(params->kv_head_count, 2);
    cr_expect_eq(params->head_dim, 32);
    cr_expect_eq(params->ffn_dim, 384);
    cr_expect_eq(params->vocab_size, 1024);
    cr_expect_eq(params->context_length, 512);
    cr_expect_eq(params->rms_eps, 1e-5f);
    cr_expect_eq(params->rope_base, 10000.0f);
    cr_expect_eq(params->weight_size, 1538560);
    model_close(&model);
    cr_expect_null(model);
    model_close(&model);
}

/* Goal: the id of a model never changes by accident: a network is found by it. */
Test(model, id_of_the_demo_is_the_published_one)
{
    char hex[DIGEST_HEX_SIZE];
    const struct digest q8_0 = id_of(FIXTURE_DEMO, NULL);
    digest_to_hex(hex, &q8_0);
    cr_expect_str_eq(hex, "08347f41333f338c36d0f32e9fc93532a01adf3ff66230698b696e58a4cdcb06");
    const struct digest f32 = id_of(FIXTURE_DEMO_F32, NULL);
    digest_to_hex(hex, &f32);
    cr_expect_str_eq(hex, "3471344ae09bde39f77f33f9f8af1f715d5f24b1b716518e9285b7b8e0580616");
}

Test(model, id_is_the_digest_of_a_manifest_that_reads_back)
{
    struct model *model = open_model(FIXTURE_DEMO, NULL);
    const uint8_t *manifest, *tokenizer;
    size_t manifest_size, tokenizer_size;
    struct model_params params;
    struct digest id, tokenizer_digest, wanted;
    model_manifest_view(model, &manifest, &manifest_size);
    model_tokenizer_view(model, &tokenizer, &tokenizer_size);
    digest_of(&id, manifest, manifest_size);
    cr_expect(digest_equal(&id, model_id_view(model)));
    cr_assert_eq(manifest_read(manifest, manifest_size, &params, &tokenizer_digest), ODSI_OK, "%s",
                 odsi_err_text());
    cr_expect_eq(memcmp(&params, model_params_view(model), sizeof params), 0);
    digest_of(&wanted, tokenizer, tokenizer_size);
    cr_expect(digest_equal(&tokenizer_digest, &wanted));
    model_close(&model);
}

/* Goal: a peer's manifest cannot misbehave. How: cut everywhere, and each byte changed; what is
 * accepted is within limits. */
Test(model, manifest_read_survives_cuts_and_changed_bytes)
{
    struct model *model = open_model(FIXTURE_DEMO, NULL);
    const uint8_t *manifest;
    size_t size;
    struct model_params params;
    struct digest digest;
    uint8_t *copy = NULL;
    size_t refused = 0;
    model_manifest_view(model, &manifest, &size);
    for (size_t cut = 0; cut < size; cut++) {
        cr_assert_eq(alloc_zeroed(&copy, cut, 1), ODSI_OK);
        memcpy(copy, manifest, cut);
        cr_expect_eq(manifest_read(copy, cut, &params, &digest), ODSI_ERR_CORRUPT, "cut at %zu",
                     cut);
        alloc_free(copy);
    }
    cr_assert_eq(alloc_zeroed(&copy, size + 1, 1), ODSI_OK);
    memcpy(copy, manifest, size);
    cr_expect_eq(manifest_read(copy, size + 1, &params, &digest), ODSI_ERR_CORRUPT,
                 "one byte more");
    for (size_t at = 0; at < size; at++) {
        copy[at] ^= 0x80;
        const enum odsi_err err = manifest_read(copy, size, &params, &digest);
        cr_expect(err == ODSI_OK || err == ODSI_ERR_CORRUPT);
        refused += err != ODSI_OK;
        if (err == ODSI_OK)
            cr_expect(params.layer_count <= LIMIT_LAYERS_MAX && params.dim <= LIMIT_DIM_MAX &&
                      params.head_count % params.kv_head_count == 0);
        copy[at] ^= 0x80;
    }
    cr_expect(refused > size / 4, "%zu of %zu", refused, size);
    alloc_free(copy);
    model_close(&model);
}

/* ---- identity ------------------------------------------------------------------------------- */

static void other_score(struct buf *out, uint32_t *count)
{
    fixture_bool(out, "tokenizer.ggml.add_space_prefix", 0);
    ++*count;
}

static void no_bos(struct buf *out, uint32_t *count)
{
    fixture_bool(out, "tokenizer.ggml.add_bos_token", 0);
    ++*count;
}

static void other_base(struct buf *out, uint32_t *count)
{
    fixture_f32(out, "llama.rope.freq_base", 20000.0f);
    ++*count;
}

static void the_defaults(struct buf *out, uint32_t *count)
{
    fixture_f32(out, "llama.rope.freq_base", 10000.0f);
    fixture_u32(out, "llama.attention.key_length", 16);
    fixture_u32(out, "llama.expert_count", 0);
    fixture_string(out, "llama.rope.scaling.type", "linear");
    fixture_f32(out, "llama.rope.scaling.factor", 1.0f);
    fixture_bool(out, "tokenizer.ggml.add_bos_token", 1);
    fixture_u32(out, "tokenizer.ggml.bos_token_id", 1);
    fixture_string(out, "general.description", "of no consequence");
    *count += 8;
}

/* Goal: whatever changes an answer changes the id, and nothing else does. */
Test(model, id_depends_on_weights_tokenizer_and_hyper_parameters)
{
    char *folder = fixture_folder();
    const struct digest id = id_of(write_model(folder, "a.gguf", &plain), NULL);
    const struct digest same = id_of(write_model(folder, "b.gguf", &plain), NULL);
    cr_expect(digest_equal(&id, &same));
    const struct fixture_recipe others[] = {
        {.more_keys = other_score},  {.more_keys = no_bos},
        {.more_keys = other_base},   {.skip_tensor = "output.weight"},
        {.weight_type = TENSOR_F16}, {.skip_key = "general.name"}};
    for (size_t i = 0; i < sizeof others / sizeof others[0]; i++) {
        const struct digest other = id_of(write_model(folder, "c.gguf", &others[i]), NULL);
        cr_expect_not(digest_equal(&id, &other), "recipe %zu", i);
    }
    const struct fixture_recipe defaults = {.more_keys = the_defaults};
    const struct digest spelt_out = id_of(write_model(folder, "d.gguf", &defaults), NULL);
    cr_expect(digest_equal(&id, &spelt_out), "defaults that are spelt out change nothing");
    fixture_folder_remove(folder);
}

Test(model, id_depends_on_every_tensor)
{
    char *folder = fixture_folder();
    const char *path = write_model(folder, "a.gguf", &plain);
    const struct digest id = id_of(path, NULL);
    struct gguf *gguf = NULL;
    cr_assert_eq(gguf_open(&gguf, path), ODSI_OK);
    for (uint64_t i = 0; i < gguf_tensor_count(gguf); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(gguf, i);
        const uint64_t at = tensor->offset + (i % 2 ? tensor->size - 1 : 0);
        fixture_flip(path, at, 1);
        const struct digest other = id_of(path, NULL);
        cr_expect_not(digest_equal(&id, &other), "%.*s", (int)tensor->name.size, tensor->name.data);
        fixture_flip(path, at, 1);
    }
    const struct digest again = id_of(path, NULL);
    cr_expect(digest_equal(&id, &again));
    gguf_close(&gguf);
    fixture_folder_remove(folder);
}

Test(model, without_a_name_is_called_like_its_file_but_keeps_its_id)
{
    char *folder = fixture_folder();
    const struct fixture_recipe nameless = {.skip_key = "general.name"};
    const char *a = write_model(folder, "first.gguf", &nameless);
    const char *b = write_model(folder, "second", &nameless);
    struct model *first = open_model(a, NULL);
    struct model *second = open_model(b, NULL);
    cr_expect_str_eq(model_params_view(first)->name, "first");
    cr_expect_str_eq(model_params_view(second)->name, "second");
    cr_expect(digest_equal(model_id_view(first), model_id_view(second)));
    model_close(&first);
    model_close(&second);
    fixture_folder_remove(folder);
}

static void long_name(struct buf *out, uint32_t *count)
{
    char name[300];
    memset(name, 'n', sizeof name);
    memcpy(name, "a\n\x1b\xc3", 4);
    name[299] = '\0';
    fixture_string(out, "general.name", name);
    ++*count;
}

Test(model, name_is_made_printable)
{
    char *folder = fixture_folder();
    const struct fixture_recipe recipe = {.skip_key = "general.name", .more_keys = long_name};
    struct model *model = open_model(write_model(folder, "a.gguf", &recipe), NULL);
    const char *name = model_params_view(model)->name;
    cr_expect_eq(strlen(name), 127);
    cr_expect_eq(memcmp(name, "a???n", 5), 0);
    model_close(&model);
    fixture_folder_remove(folder);
}

/* ---- the cache of manifests ----------------------------------------------------------------- */

struct seen {
    uint64_t calls, done, total;
};

static void see(void *context, uint64_t done, uint64_t total)
{
    struct seen *seen = context;
    cr_expect(done > seen->done && done <= total);
    *seen = (struct seen){seen->calls + 1, done, total};
}

/* Bytes hashed by opening path. */
static uint64_t hashed(const char *path, const char *cache, struct digest *id)
{
    struct model *model = NULL;
    struct seen seen = {0};
    cr_assert_eq(model_open(&model, path, cache, see, &seen), ODSI_OK, "%s", odsi_err_text());
    if (seen.calls > 0) {
        cr_expect_eq(seen.done, seen.total);
        cr_expect_eq(seen.total, model_params_view(model)->weight_size);
    }
    *id = *model_id_view(model);
    model_close(&model);
    return seen.done;
}

/* The only file of the cache. */
static const char *cache_file(const char *path, const char *cache)
{
    static char name[1024];
    struct buf found;
    struct source *source = NULL;
    buf_init(&found, sizeof name);
    cr_assert_eq(source_open(&source, path), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(manifest_cache_path(&found, cache, source), ODSI_OK);
    snprintf(name, sizeof name, "%s", buf_text_view(&found));
    source_close(&source);
    buf_free(&found);
    return name;
}

Test(model, hashes_a_file_once)
{
    char *folder = fixture_folder();
    const char *cache = fixture_path(folder, "deep/cache");
    const char *path = write_model(folder, "a.gguf", &plain);
    struct digest id, again;
    cr_expect(hashed(path, cache, &id) > 0);
    cr_expect_eq(hashed(path, cache, &again), 0);
    cr_expect(digest_equal(&id, &again));
    cr_expect(hashed(path, NULL, &again) > 0, "no cache, no memory");
    /* Another path to the same file is the same file. */
    const char *link = fixture_path(folder, "link.gguf");
    cr_assert_eq(symlink(path, link), 0);
    cr_expect_eq(hashed(link, cache, &again), 0);
    /* Another time of change is another file. */
    const struct timespec times[2] = {{.tv_sec = 1}, {.tv_sec = 1}};
    cr_assert_eq(utimensat(AT_FDCWD, path, times, 0), 0);
    cr_expect(hashed(path, cache, &again) > 0);
    cr_expect(digest_equal(&id, &again));
    fixture_folder_remove(folder);
}

/* Goal: a damaged cache costs time and nothing else. How: bytes all over it
 * changed, and cut. */
Test(model, remakes_a_damaged_manifest)
{
    char *folder = fixture_folder();
    const char *cache = fixture_path(folder, "cache");
    const char *path = write_model(folder, "a.gguf", &plain);
    struct digest id, again;
    struct buf whole;
    (void)hashed(path, cache, &id);
    const char *file = cache_file(path, cache);
    buf_init(&whole, 1u << 20);
    fixture_read(file, &whole);
    for (size_t at = 0; at < whole.size; at += 7) {
        fixture_flip(file, at, 0x40);
        cr_assert(hashed(path, cache, &again) > 0, "byte %zu", at);
        cr_assert(digest_equal(&id, &again));
        cr_assert_eq(hashed(path, cache, &again), 0, "byte %zu: it was not remade", at);
    }
    for (size_t size = 0; size < whole.size; size += 31) {
        cr_assert_eq(truncate(file, (off_t)size), 0);
        cr_assert(hashed(path, cache, &again) > 0, "cut at %zu", size);
        cr_assert(digest_equal(&id, &again));
    }
    buf_free(&whole);
    fixture_folder_remove(folder);
}

/* Goal: a manifest of other hyper-parameters is not taken, though its own digest is right. */
Test(model, takes_no_manifest_of_another_model)
{
    char *folder = fixture_folder();
    const char *cache = fixture_path(folder, "cache");
    const struct fixture_recipe other = {.more_keys = other_base};
    struct digest id, again;
    struct buf content;
    buf_init(&content, 1u << 20);
    const char *b = write_model(folder, "b.gguf", &other);
    (void)hashed(b, cache, &id);
    fixture_read(cache_file(b, cache), &content);
    const char *a = write_model(folder, "a.gguf", &plain);
    const struct digest right = id_of(a, NULL);
    fixture_write(cache_file(a, cache), &content);
    cr_expect(hashed(a, cache, &again) > 0);
    cr_expect(digest_equal(&right, &again));
    buf_free(&content);
    fixture_folder_remove(folder);
}

Test(model, opens_without_a_cache_that_cannot_be_written)
{
    char *folder = fixture_folder();
    const char *path = write_model(folder, "a.gguf", &plain);
    struct digest id;
    cr_expect(hashed(path, path, &id) > 0, "a file stands where the folder should be");
    cr_expect(hashed(path, "/proc/nothing/here", &id) > 0);
    fixture_folder_remove(folder);
}

/* ---- refusals ------------------------------------------------------------------------------- */

static void key_gqa_3(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "llama.attention.head_count_kv", 3);
    ++*count;
}

static void key_layers_many(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "llama.block_count", 1025);
    ++*count;
}

static void key_heads_0(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "llama.attention.head_count", 0);
    ++*count;
}

static void key_eps_nan(struct buf *out, uint32_t *count)
{
    fixture_f32(out, "llama.attention.layer_norm_rms_epsilon", __builtin_nanf(""));
    ++*count;
}

static void key_base_0(struct buf *out, uint32_t *count)
{
    fixture_f32(out, "llama.rope.freq_base", 0.0f);
    ++*count;
}

static void key_vocab(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "llama.vocab_size", 265);
    ++*count;
}

static void key_rotated_8(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "llama.rope.dimension_count", 8);
    ++*count;
}

static void key_value_length(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "llama.attention.value_length", 32);
    ++*count;
}

static void key_yarn(struct buf *out, uint32_t *count)
{
    fixture_string(out, "llama.rope.scaling.type", "yarn");
    ++*count;
}

static void key_linear_half(struct buf *out, uint32_t *count)
{
    fixture_string(out, "llama.rope.scaling.type", "linear");
    fixture_f32(out, "llama.rope.scaling.factor", 0.5f);
    *count += 2;
}

static void key_experts(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "llama.expert_count", 8);
    ++*count;
}

static void key_unheard_of(struct buf *out, uint32_t *count)
{
    fixture_f32(out, "llama.attention.new_trick", 1.0f);
    ++*count;
}

static void key_arch(struct buf *out, uint32_t *count)
{
    fixture_string(out, "general.architecture", "gemma");
    ++*count;
}

static void key_adapter(struct buf *out, uint32_t *count)
{
    fixture_string(out, "general.type", "adapter");
    ++*count;
}

static void key_split(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "split.count", 2);
    ++*count;
}

static void key_other_kind(struct buf *out, uint32_t *count)
{
    fixture_string(out, "tokenizer.ggml.model", "t5");
    ++*count;
}

static void key_whitespace(struct buf *out, uint32_t *count)
{
    fixture_bool(out, "tokenizer.ggml.remove_extra_whitespaces", 1);
    ++*count;
}

static void key_bos_outside(struct buf *out, uint32_t *count)
{
    fixture_u32(out, "tokenizer.ggml.bos_token_id", 264);
    ++*count;
}

static void key_scores_few(struct buf *out, uint32_t *count)
{
    fixture_key(out, "tokenizer.ggml.scores", GGUF_ARRAY);
    (void)buf_append_u32(out, GGUF_F32);
    (void)buf_append_u64(out, 1);
    (void)buf_append_u32(out, 0);
    ++*count;
}

#define CORRUPT     ODSI_ERR_CORRUPT
#define UNSUPPORTED ODSI_ERR_UNSUPPORTED
#define HEADS_KV    "llama.attention.head_count_kv"
#define NORM_EPS    "llama.attention.layer_norm_rms_epsilon"

/* Goal: what this build would compute wrongly it refuses, and names it. */
Test(model, refuses_what_it_cannot_run)
{
    static const struct {
        struct fixture_recipe recipe;
        enum odsi_err err;
        const char *says;
    } cases[] = {
        {{.skip_key = "general.architecture"}, CORRUPT, "general.architecture"},
        {{.skip_key = "general.architecture", .more_keys = key_arch}, UNSUPPORTED, "\"gemma\""},
        {{.more_keys = key_adapter}, UNSUPPORTED, "general.type"},
        {{.more_keys = key_split}, ODSI_ERR_INVALID, "one of 2 parts"},
        {{.skip_key = "llama.context_length"}, CORRUPT, "llama.context_length"},
        {{.skip_key = "llama.embedding_length"}, CORRUPT, "llama.embedding_length"},
        {{.skip_key = "llama.block_count"}, CORRUPT, "llama.block_count"},
        {{.skip_key = "llama.feed_forward_length"}, CORRUPT, "llama.feed_forward_length"},
        {{.skip_key = "llama.attention.head_count"}, CORRUPT, "llama.attention.head_count"},
        {{.skip_key = NORM_EPS}, CORRUPT, NORM_EPS},
        {{.skip_key = NORM_EPS, .more_keys = key_eps_nan}, CORRUPT, "epsilon"},
        {{.skip_key = HEADS_KV, .more_keys = key_gqa_3}, CORRUPT, "evenly"},
        {{.skip_key = HEADS_KV}, CORRUPT, "attn_k.weight"}, /* the default is head_count */
        {{.skip_key = "llama.block_count", .more_keys = key_layers_many}, CORRUPT, "layers"},
        {{.skip_key = "llama.attention.head_count", .more_keys = key_heads_0}, CORRUPT, "is 0"},
        {{.more_keys = key_base_0}, CORRUPT, "rotation base"},
        {{.more_keys = key_vocab}, CORRUPT, "vocab_size is 265"},
        {{.skip_key = "llama.rope.dimension_count", .more_keys = key_rotated_8},
         UNSUPPORTED,
         "llama.rope.dimension_count 8"},
        {{.more_keys = key_value_length}, UNSUPPORTED, "llama.attention.value_length 32"},
        {{.more_keys = key_yarn}, UNSUPPORTED, "llama.rope.scaling.type"},
        {{.more_keys = key_linear_half}, CORRUPT, "linear factor is 0.5"},
        {{.more_keys = key_experts}, CORRUPT, "experts used is 0"},
        {{.more_keys = key_unheard_of}, UNSUPPORTED, "llama.attention.new_trick"},
        {{.skip_key = "tokenizer.ggml.model"}, CORRUPT, "tokenizer.ggml.model"},
        {{.skip_key = "tokenizer.ggml.model", .more_keys = key_other_kind},
         UNSUPPORTED,
         "\"t5\" is not"},
        {{.more_keys = key_whitespace}, UNSUPPORTED, "remove_extra_whitespaces"},
        {{.more_keys = key_bos_outside}, CORRUPT, "outside the vocabulary"},
        {{.skip_key = "tokenizer.ggml.tokens"}, CORRUPT, "tokenizer.ggml.tokens"},
        {{.skip_key = "tokenizer.ggml.scores"}, CORRUPT, "tokenizer.ggml.scores"},
        {{.skip_key = "tokenizer.ggml.token_type"}, CORRUPT, "tokenizer.ggml.token_type"},
        {{.skip_key = "tokenizer.ggml.scores", .more_keys = key_scores_few}, CORRUPT, "1 scores"},
        {{.skip_tensor = "token_embd.weight"}, CORRUPT, "token_embd.weight is missing"},
        {{.skip_tensor = "output_norm.weight"}, CORRUPT, "output_norm.weight is missing"},
        {{.skip_tensor = "blk.1.ffn_up.weight"}, CORRUPT, "blk.1.ffn_up.weight is missing"},
        {{.extra_tensor = "blk.0.attn_q.bias"}, CORRUPT, "blk.1.attn_q.bias is missing"},
        {{.extra_tensor = "blk.0.attn_output.bias"}, UNSUPPORTED, "blk.0.attn_output.bias"},
        {{.extra_tensor = "rope_freqs.weight"},
         CORRUPT,
         "rope_freqs.weight is [1][32], not [1][8]"},
        {{.extra_tensor = "blk.2.attn_norm.weight"}, UNSUPPORTED, "blk.2.attn_norm.weight"},
        {{.wide_tensor = "blk.0.attn_q.weight"}, CORRUPT, "blk.0.attn_q.weight is [32][64]"},
        {{.wide_tensor = "blk.1.attn_norm.weight"}, CORRUPT, "blk.1.attn_norm.weight is"},
        {{.wide_tensor = "token_embd.weight"}, CORRUPT, "token_embd.weight is"},
        {{.typed_tensor = "blk.0.attn_v.weight", .tensor_type = 20},
         UNSUPPORTED,
         "blk.0.attn_v.weight is iq4_nl"},
        {{.typed_tensor = "output_norm.weight", .tensor_type = TENSOR_Q8_0},
         UNSUPPORTED,
         "output_norm.weight is q8_0"},
    };
    char *folder = fixture_folder();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        struct model *model = NULL;
        const char *path = write_model(folder, "a.gguf", &cases[i].recipe);
        cr_expect_eq(model_open(&model, path, NULL, NULL, NULL), cases[i].err, "%s", cases[i].says);
        cr_expect_null(model);
        cr_expect_not_null(strstr(odsi_err_text(), cases[i].says), "\"%s\" does not say \"%s\"",
                           odsi_err_text(), cases[i].says);
        cr_expect_not_null(strstr(odsi_err_text(), path), "\"%s\" does not name the file",
                           odsi_err_text());
    }
    fixture_folder_remove(folder);
}

/* Goal: no changed byte of a header brings opening to misbehave. How: every byte in turn, in a
 * file in memory; what opens is within limits. */
Test(model, survives_any_changed_byte_of_the_header, .timeout = 600)
{
    struct buf bytes;
    char path[64];
    struct gguf *gguf = NULL;
    buf_init(&bytes, 1u << 20);
    fixture_model(&bytes, &plain);
    const int fd = memfd_create("model", MFD_CLOEXEC);
    cr_assert(fd >= 0);
    cr_assert_eq(write(fd, bytes.data, bytes.size), (ssize_t)bytes.size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    cr_assert_eq(gguf_open_memory(&gguf, bytes.data, bytes.size), ODSI_OK);
    const size_t header = (size_t)gguf_tensor_at(gguf, 0)->offset;
    gguf_close(&gguf);
    for (size_t at = 0; at < header; at++) {
        struct model *model = NULL;
        const uint8_t other = bytes.data[at] ^ (at % 2 ? 0x01 : 0x80);
        cr_assert_eq(pwrite(fd, &other, 1, (off_t)at), 1);
        const enum odsi_err err = model_open(&model, path, NULL, NULL, NULL);
        cr_expect(err == ODSI_OK || err == ODSI_ERR_CORRUPT || err == ODSI_ERR_UNSUPPORTED,
                  "byte %zu: %s", at, odsi_err_text());
        if (err == ODSI_OK)
            cr_expect_eq(model_params_view(model)->layer_count, 2);
        model_close(&model);
        cr_assert_eq(pwrite(fd, &bytes.data[at], 1, (off_t)at), 1);
    }
    close(fd);
    buf_free(&bytes);
}

Test(model, reports_every_allocation_that_fails)
{
    char *folder = fixture_folder();
    const char *cache = fixture_path(folder, "cache");
    const char *path = write_model(folder, "a.gguf", &plain);
    const struct digest id = id_of(path, NULL);
    long failing = 0;
    for (;; failing++) {
        struct model *model = NULL;
        alloc_fail_after(failing);
        const enum odsi_err err = model_open(&model, path, cache, NULL, NULL);
        alloc_fail_after(-1);
        if (err == ODSI_OK) {
            /* Keeping the manifest may fail without failing the open; the id is right anyway. */
            cr_assert(digest_equal(&id, model_id_view(model)));
            model_close(&model);
            if (access(cache_file(path, cache), F_OK) == 0)
                break;
            continue;
        }
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY, "allocation %ld: %s", failing, odsi_err_text());
        cr_assert_null(model);
    }
    cr_expect(failing > 15);
    fixture_folder_remove(folder);
}
