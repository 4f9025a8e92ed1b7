/* A Hugging Face folder through the programs: described, traced, and served by a swarm.
 *
 * tests/vectors/hf/tiny-gemma3 is what tests/unit/model/hf_fixture.c writes for
 * Gemma3ForCausalLM in BF16 and two parts: 4 layers, made-up weights. */
#include "tests/support/swarm.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <string.h>

#define FOLDER      "tests/vectors/hf/tiny-gemma3"
#define LAYERS      4u
#define PROMPT      "abcd efgh abcd, and a second time: abcd efgh."
#define NEW_TOKENS  "12"
#define TIMEOUT_US  (60u * 1000u * 1000u)
#define PROMPT_FLAG "--prompt"

/* What `odsi` with these arguments (NULL-terminated) prints, as an object. */
static json_t *run_odsi(const char *const *args)
{
    char folder[PROCESS_PATH_SIZE], path[PROCESS_PATH_SIZE];
    char *output = NULL, *log = NULL;
    int code = -1;
    cr_assert_eq(process_folder_make(folder), ODSI_OK);
    const struct process_config config = {.program = "odsi", .args = args, .folder = folder};
    cr_assert_eq(process_run(&config, TIMEOUT_US, &code), ODSI_OK);
    cr_assert_eq(process_path(path, folder, "odsi.log"), ODSI_OK);
    cr_assert_eq(process_read_file(&log, path), ODSI_OK);
    cr_assert_eq(code, 0, "odsi %s: %s", args[0], log);
    cr_assert_eq(process_path(path, folder, "odsi.out"), ODSI_OK);
    cr_assert_eq(process_read_file(&output, path), ODSI_OK);
    json_t *object = json_loads(output, 0, NULL);
    cr_assert_not_null(object, "not JSON: %s", output);
    alloc_free(output);
    alloc_free(log);
    process_folder_remove(folder);
    return object;
}

static void expect_same(const json_t *a, const json_t *b, const char *key, const char *how)
{
    const json_t *value = json_object_get(a, key);
    cr_assert_not_null(value, "%s", key);
    cr_expect(json_equal(value, json_object_get(b, key)), "%s differs with %s", key, how);
}

Test(hf_folder, is_described_as_what_it_is, .timeout = 60)
{
    const char *const args[] = {"model", "inspect", "--json", FOLDER, NULL};
    json_t *got = run_odsi(args);
    json_t *want =
        json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:[{s:s, s:i, s:i}]}", "family", "gemma3",
                  "layers", LAYERS, "window", 24, "windowed_layers", 3, "vocabulary", 264, "files",
                  2, "types", "type", "bf16", "tensors", 54, "size", 116544);
    const char *key;
    json_t *value;
    cr_assert_not_null(want);
    json_object_foreach(want, key, value)
        cr_expect(json_equal(value, json_object_get(got, key)), "%s", key);
    json_decref(want);
    json_decref(got);
}

/* Goal: a folder is a model like any other: the same bits however it is computed.
 * How: one trace against others with another instruction set, chunk and number of threads. */
Test(hf_folder, has_the_same_trace_however_computed, .timeout = 120)
{
    static const char *const ways[][2] = {{"--backend", "scalar"},
                                          {"--threads", "2"},
                                          {"--chunk", "1"},
                                          {"--chunk", "7"},
                                          {"--neighbours", "3"}};
    const char *const plain[] = {"trace", "--json", "--model", FOLDER, PROMPT_FLAG, PROMPT, NULL};
    json_t *first = run_odsi(plain);
    cr_expect_eq(json_array_size(json_object_get(first, "layers")), LAYERS);
    for (size_t i = 0; i < sizeof ways / sizeof ways[0]; i++) {
        const char *const args[] = {"trace", "--json",   "--model",  FOLDER, PROMPT_FLAG,
                                    PROMPT,  ways[i][0], ways[i][1], NULL};
        json_t *other = run_odsi(args);
        expect_same(first, other, "model_id", ways[i][1]);
        expect_same(first, other, "layers", ways[i][1]);
        expect_same(first, other, "logits_sha256", ways[i][1]);
        json_decref(other);
    }
    json_decref(first);
}

/* Goal: workers that load a part of a folder's layers each say what one process says.
 * How: greedy tokens of a trace against those of swarms of 1, 2 and 4 workers. */
Test(hf_folder, is_served_by_a_swarm, .timeout = 180)
{
    const char *const traced[] = {"trace", "--json",     "--model",  FOLDER, PROMPT_FLAG,
                                  PROMPT,  "--generate", NEW_TOKENS, NULL};
    const char *const asked[] = {PROMPT_FLAG, PROMPT, "--max-tokens", NEW_TOKENS, NULL};
    json_t *want = run_odsi(traced);
    for (uint32_t workers = 1; workers <= 4; workers *= 2) {
        const struct swarm_config config = {
            .model = FOLDER, .layer_count = LAYERS, .worker_count = workers};
        struct swarm swarm;
        char *output = NULL, *log = NULL;
        swarm_open(&swarm, &config);
        const int code = swarm_generate(&swarm, asked, &output, &log);
        cr_assert_eq(code, 0, "odsi generate ended with %d: %s", code, log);
        json_t *got = json_loads(output, 0, NULL);
        cr_assert_not_null(got, "not JSON: %s", output);
        cr_expect(json_array_size(json_object_get(got, "tokens")) > 0);
        expect_same(want, got, "tokens", "a swarm");
        json_decref(got);
        alloc_free(output);
        alloc_free(log);
        swarm_close(&swarm);
    }
    json_decref(want);
}
