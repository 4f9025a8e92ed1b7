/* The command line as people and scripts use it: the real `odsi`, its output and exit codes. */
#include "common/base/alloc.h"
#include "common/base/clock.h"
#include "kernels/backend.h"
#include "tests/support/process.h"
#include "worker/cli/cmd.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MODEL_F32 "deploy/demo/odsi-tiny-f32.gguf"
#define MODEL_Q8  "deploy/demo/odsi-tiny-q8_0.gguf"
#define RUN_US    120000000u
#define ARGS_MAX  64u
#define PROMPT    "One windy day, a little fox named Pip"
#define IDS_SIZE  16384u

static char folder[PROCESS_PATH_SIZE];

/* What one run of odsi said; ended with said_free. */
struct said {
    int code;
    char *output;
    char *log;
};

static void setup(void)
{
    cr_assert_eq(process_folder_make(folder), ODSI_OK);
}

static void teardown(void)
{
    process_folder_remove(folder);
}

TestSuite(cli, .init = setup, .fini = teardown, .timeout = 240);

static void said_free(struct said *said)
{
    alloc_free(said->output);
    alloc_free(said->log);
}

/* Files and keys of a run go into the test's folder. */
static struct process *start_odsi(const char *const *args)
{
    static unsigned run_count; /* output of each run has files of its own */
    char home[PROCESS_PATH_SIZE + 16], tmp[PROCESS_PATH_SIZE + 16], name[32];
    struct process *process = NULL;
    snprintf(home, sizeof home, "ODSI_HOME=%s", folder);
    snprintf(tmp, sizeof tmp, "TMPDIR=%s", folder);
    snprintf(name, sizeof name, "run-%u", run_count++);
    const char *const env[] = {home, tmp, NULL};
    const struct process_config config = {
        .program = "odsi", .args = args, .env = env, .folder = folder, .name = name};
    cr_assert_eq(process_start(&process, &config), ODSI_OK, "%s", odsi_err_text());
    return process;
}

static struct said run_odsi(const char *const *args)
{
    struct said said = {0};
    struct process *process = start_odsi(args);
    cr_assert_eq(process_wait(process, RUN_US, &said.code), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_read_output(&said.output, process), ODSI_OK);
    cr_assert_eq(process_read_log(&said.log, process), ODSI_OK);
    process_close(&process);
    return said;
}

#define RUN(...) run_odsi((const char *const[]){__VA_ARGS__, NULL})

/* The object that a successful run printed. */
static json_t *object_of(const char *const *args)
{
    struct said said = run_odsi(args);
    cr_assert_eq(said.code, 0, "odsi %s: %s", args[0], said.log);
    json_t *object = json_loads(said.output, 0, NULL);
    cr_assert(json_is_object(object), "not an object: %s", said.output);
    said_free(&said);
    return object;
}

#define OBJECT(...) object_of((const char *const[]){__VA_ARGS__, NULL})

static void expect_number(const json_t *object, const char *key)
{
    cr_expect(json_is_number(json_object_get(object, key)), "no number '%s'", key);
}

/* ---- help, mistakes, exit codes -------------------------------------------------------------- */

Test(cli, help_lists_every_command_and_every_command_explains_itself)
{
    struct said said = RUN("--help");
    cr_expect_eq(said.code, 0);
    for (const struct cmd *at = cmd_table(); at->name; at++) {
        cr_expect(strstr(said.output, at->name), "help does not list %s", at->name);
        struct said own = RUN(at->name, "--help");
        cr_expect_eq(own.code, 0, "%s", at->name);
        cr_expect(strstr(own.output, "Usage: odsi "), "%s", at->name);
        cr_expect(strstr(own.output, "Examples:\n  odsi "), "%s has no examples", at->name);
        cr_expect_str_eq(own.log, "", "%s", at->name);
        struct said other = RUN("help", at->name);
        cr_expect_str_eq(other.output, own.output);
        said_free(&own);
        said_free(&other);
    }
    said_free(&said);
    said = RUN("--version");
    cr_expect_eq(said.code, 0);
    cr_expect_eq(strncmp(said.output, "odsi ", 5), 0, "%s", said.output);
    said_free(&said);
}

Test(cli, no_command_is_a_mistake_that_shows_the_help)
{
    struct said said = run_odsi((const char *const[]){NULL});
    cr_expect_eq(said.code, 2);
    cr_expect_str_eq(said.output, "");
    cr_expect(strstr(said.log, "commands:"));
    said_free(&said);
}

Test(cli, an_unknown_command_gets_a_suggestion_on_one_line)
{
    struct said said = RUN("genrate");
    cr_expect_eq(said.code, 2);
    cr_expect_str_eq(said.log, "odsi: there is no command 'genrate'; did you mean 'generate'?\n");
    said_free(&said);
    said = RUN("help", "nothing-near");
    cr_expect_eq(said.code, 2);
    cr_expect(strstr(said.log, "'odsi --help' lists them"), "%s", said.log);
    said_free(&said);
}

/* Goal: every mistake in the flags is told in one line before anything is done, with code 2. */
Test(cli, mistakes_in_the_flags_end_with_2_and_one_line)
{
    const char *const runs[][8] = {
        {"generate"},
        {"generate", "--prompt", "a", "--prompt-file", "b"},
        {"generate", "--prompt", "a", "--max-tokens", "x"},
        {"generate", "--nope"},
        {"generate", "text"},
        {"local"},
        {"local", "--model", MODEL_Q8, "--workers", "0"},
        {"local", "--model", MODEL_Q8, "--workers", "7"},
        {"local", "--model", MODEL_Q8, "--workers", "65", "--shards", "3"},
        {"local", "--model", MODEL_Q8, "--workers", "2", "--shards", "3"},
        {"local", "--model", MODEL_Q8, "--workers", "2", "--layers", "0-2,4-5"},
        {"trace", "--tokens", "1"},
        {"trace", "--model", MODEL_Q8},
        {"trace", "--model", MODEL_Q8, "--tokens", "1", "--temperature", "-1"},
        {"trace", "--model", MODEL_Q8, "--tokens", "1", "--stop", ""},
        {"trace", "--model", MODEL_Q8, "--tokens", "1", "--prompt", "a"},
        {"bench", "--model", MODEL_Q8, "--batch", "0"},
        {"model"},
        {"model", "inspect"},
        {"model", "transmute", "a"},
        {"model", "synth", "a", "--shape", "none"},
        {"model", "synth", "a", "--shape", "llama-tiny", "--type", "q9"},
        {"model", "inspect", "a", "b"},
        {"model", "quantize", "a", "--type", "q4_k_m"},
        {"model", "quantize", "a", "b"},
        {"model", "quantize", "a", "b", "c", "--type", "q4_k_m"},
        {"model", "quantize", "a", "b", "--type", "q4_k_m", "--threads", "5000"},
        {"identity", "borrow"},
        {"status", "now"},
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        struct said said = run_odsi(runs[i]);
        cr_expect_eq(said.code, 2, "run %zu: %d %s", i, said.code, said.log);
        cr_expect_str_eq(said.output, "", "run %zu", i);
        const char *end = strchr(said.log, '\n');
        cr_expect(end && end[1] == '\0', "run %zu: not one line: %s", i, said.log);
        said_free(&said);
    }
}

/* Goal: what the world refuses ends with 1 and one line that names it. */
Test(cli, failures_end_with_1_and_name_what_failed)
{
    const struct {
        const char *args[8];
        const char *word;
    } runs[] = {
        {{"generate", "--insecure", "--gateway", "127.0.0.1:1", "--prompt", "a"}, "UNAVAILABLE"},
        {{"generate", "--insecure", "--gateway", "192.0.2.1:1", "--prompt", "a"}, "192.0.2.1:1"},
        {{"generate", "--gateway", "x@y@z", "--prompt", "a"}, "x@y@z"},
        {{"generate", "--prompt-file", "/nonexistent/p"}, "/nonexistent/p"},
        {{"status", "--coordinator", "127.0.0.1:1"}, "UNAVAILABLE"},
        {{"trace", "--model", "/nonexistent/m", "--tokens", "1"}, "/nonexistent/m"},
        {{"trace", "--model", MODEL_Q8, "--tokens", "1,1024"}, "1024"},
        {{"trace", "--model", MODEL_Q8, "--tokens", "1,x"}, "1,x"},
        {{"trace", "--model", MODEL_Q8, "--tokens", "1", "--backend", "abacus"}, "abacus"},
        {{"trace", "--model", MODEL_Q8, "--tokens", "1", "--generate", "512"}, "512 positions"},
        {{"bench", "--model", MODEL_Q8, "--prompt-tokens", "512"}, "512"},
        {{"model", "inspect", "Makefile"}, "Makefile"},
        {{"identity", "show", "--identity", "/nonexistent/k"}, "odsi identity new"},
        {{"local", "--model", "Makefile"}, "Makefile"},
    };
    for (size_t i = 0; i < sizeof runs / sizeof *runs; i++) {
        struct said said = run_odsi(runs[i].args);
        cr_expect_eq(said.code, 1, "run %zu: %d %s", i, said.code, said.log);
        cr_expect(strstr(said.log, runs[i].word), "'%s' does not name %s", said.log, runs[i].word);
        const char *end = strchr(said.log, '\n');
        cr_expect(end && end[1] == '\0', "run %zu: not one line: %s", i, said.log);
        said_free(&said);
    }
}

/* ---- trace ----------------------------------------------------------------------------------- */

/* "1,5,7" from a JSON array. */
static void write_ids(char out[IDS_SIZE], const json_t *ids)
{
    size_t size = 0;
    size_t i;
    json_t *id;
    json_array_foreach((json_t *)(uintptr_t)ids, i, id)
    {
        size += (size_t)snprintf(out + size, IDS_SIZE - size, "%s%lld", i ? "," : "",
                                 (long long)json_integer_value(id));
        cr_assert_lt(size, IDS_SIZE);
    }
}

static void expect_golden(const char *model, const char *golden_path)
{
    static const char *const compared[] = {
        "model_id", "numerics", "prompt_tokens", "layers", "logits_sha256", "argmax", "top"};
    static const char *const chunks[] = {"1", "7", "64", "0"};
    static const char *const threads[] = {"1", "2"};
    static const char *const neighbours[] = {"0", "7"};
    static char ids[IDS_SIZE];
    json_t *golden = json_load_file(golden_path, 0, NULL);
    cr_assert_not_null(golden, "%s", golden_path);
    write_ids(ids, json_object_get(golden, "prompt_tokens"));
    for (const char *const *backend = backend_names(); *backend; backend++) {
        if (strcmp(*backend, "cuda") == 0)
            continue; /* make gpu-check compares it where there is one */
        for (size_t i = 0; i < sizeof chunks / sizeof *chunks * 2; i++) {
            const char *const beside = neighbours[(i + i / 2) % 2];
            json_t *got = OBJECT("trace", "--json", "--model", model, "--tokens", ids, "--backend",
                                 *backend, "--threads", threads[i % 2], "--chunk", chunks[i / 2],
                                 "--neighbours", beside);
            cr_expect_str_eq(json_string_value(json_object_get(got, "backend")), *backend);
            for (size_t k = 0; k < sizeof compared / sizeof *compared; k++)
                cr_expect(json_equal(json_object_get(got, compared[k]),
                                     json_object_get(golden, compared[k])),
                          "%s, %s threads, chunk %s, %s neighbours: another '%s' than in %s",
                          *backend, threads[i % 2], chunks[i / 2], beside, compared[k],
                          golden_path);
            json_decref(got);
        }
    }
    json_decref(golden);
}

/* Goal: numerics version 1 is these bits, on every machine and for all time: 138 tokens, so that
 * three pages of the KV cache and their border cases take part.
 * How: the golden trace (made with the scalar backend, one thread, token by token) against every
 * backend of this machine, 1 and 2 threads, chunks of 1, 7, 64 and all, alone and in batches with
 * seven other sessions. */
Test(cli, traces_of_the_q8_0_model_are_the_golden_bits_however_computed)
{
    expect_golden(MODEL_Q8, "tests/vectors/odsi-tiny/trace-q8_0.json");
}

Test(cli, traces_of_the_f32_model_are_the_golden_bits_however_computed)
{
    expect_golden(MODEL_F32, "tests/vectors/odsi-tiny/trace-f32.json");
}

Test(cli, a_trace_goes_on_as_the_reference_does)
{
    json_t *reference = json_load_file("tests/vectors/odsi-tiny/reference.json", 0, NULL);
    json_t *cases = json_object_get(reference, "cases");
    size_t compared = 0, i;
    json_t *item;
    json_array_foreach(cases, i, item)
    {
        /* Below that gap a binary32 engine may choose otherwise than the binary64 reference. */
        if (json_real_value(json_object_get(item, "smallest_top2_gap")) < 0.01)
            continue;
        const json_t *expected = json_object_get(item, "greedy_tokens");
        char count[16];
        snprintf(count, sizeof count, "%zu", json_array_size(expected));
        json_t *got =
            OBJECT("trace", "--json", "--model", MODEL_F32, "--prompt",
                   json_string_value(json_object_get(item, "prompt")), "--generate", count);
        cr_expect(json_equal(json_object_get(got, "tokens"), expected), "case %zu", i);
        cr_expect(json_equal(json_object_get(got, "prompt_tokens"),
                             json_object_get(item, "prompt_tokens")),
                  "case %zu", i);
        json_decref(got);
        compared++;
    }
    cr_expect_geq(compared, 6);
    json_decref(reference);
}

Test(cli, a_seed_and_a_stop_string_decide_where_a_text_goes_and_ends)
{
    json_t *one = OBJECT("trace", "--json", "--model", MODEL_Q8, "--prompt", PROMPT, "--generate",
                         "60", "-t", "1", "--seed", "1");
    json_t *same = OBJECT("trace", "--json", "--model", MODEL_Q8, "--prompt", PROMPT, "--generate",
                          "60", "-t", "1", "--seed", "1");
    json_t *other = OBJECT("trace", "--json", "--model", MODEL_Q8, "--prompt", PROMPT, "--generate",
                           "60", "-t", "1", "--seed", "2");
    cr_expect(json_equal(json_object_get(one, "tokens"), json_object_get(same, "tokens")));
    cr_expect(!json_equal(json_object_get(one, "tokens"), json_object_get(other, "tokens")));
    json_t *stopped = OBJECT("trace", "--json", "--model", MODEL_Q8, "--prompt", PROMPT,
                             "--generate", "60", "--stop", "zzz", "--stop", ".");
    const char *text = json_string_value(json_object_get(stopped, "text"));
    cr_expect_str_eq(json_string_value(json_object_get(stopped, "finish_reason")), "stop");
    cr_expect_eq(strchr(text, '.'), text + strlen(text) - 1, "%s", text);
    json_decref(one);
    json_decref(same);
    json_decref(other);
    json_decref(stopped);
}

/* ---- files ----------------------------------------------------------------------------------- */

Test(cli, model_inspect_describes_the_demo_model)
{
    json_t *got = OBJECT("model", "inspect", MODEL_Q8, "--json", "--tensors");
    const struct {
        const char *key;
        json_int_t value;
    } expected[] = {{"numerics", 1},      {"layers", 6},    {"dim", 128},
                    {"heads", 4},         {"kv_heads", 2},  {"ffn", 384},
                    {"vocabulary", 1024}, {"context", 512}, {"head_dim", 32}};
    for (size_t i = 0; i < sizeof expected / sizeof *expected; i++)
        cr_expect_eq(json_integer_value(json_object_get(got, expected[i].key)), expected[i].value,
                     "%s", expected[i].key);
    json_t *golden = json_load_file("tests/vectors/odsi-tiny/trace-q8_0.json", 0, NULL);
    cr_expect(json_equal(json_object_get(got, "model_id"), json_object_get(golden, "model_id")));
    cr_expect_eq(json_real_value(json_object_get(got, "rope_base")), 10000.0);
    cr_expect_gt(json_integer_value(json_object_get(got, "weight_size")), 1000000);
    cr_expect_eq(json_array_size(json_object_get(got, "tensors")), 6 * 9 + 3);
    json_decref(golden);
    json_decref(got);
    struct said said = RUN("model", "inspect", MODEL_Q8, "--metadata", "--tensors");
    cr_expect_eq(said.code, 0);
    cr_expect(strstr(said.output, "llama.block_count = 6"), "%s", said.output);
    cr_expect(strstr(said.output, "blk.5.ffn_down.weight  q8_0  [128][384]"), "%s", said.output);
    said_free(&said);
}

Test(cli, model_synth_makes_the_same_bytes_from_the_same_seed)
{
    char path[3][PROCESS_PATH_SIZE];
    const char *const seeds[] = {"7", "7", "8"};
    json_t *got[3];
    for (int i = 0; i < 3; i++) {
        char name[16];
        snprintf(name, sizeof name, "m%d.gguf", i);
        cr_assert_eq(process_path(path[i], folder, name), ODSI_OK);
        struct said said =
            RUN("model", "synth", path[i], "--shape", "llama-tiny", "--seed", seeds[i]);
        cr_assert_eq(said.code, 0, "%s", said.log);
        said_free(&said);
        got[i] = OBJECT("model", "inspect", path[i], "--json");
    }
    cr_expect(json_equal(json_object_get(got[0], "model_id"), json_object_get(got[1], "model_id")));
    cr_expect(
        !json_equal(json_object_get(got[0], "model_id"), json_object_get(got[2], "model_id")));
    for (int i = 0; i < 3; i++)
        json_decref(got[i]);
    struct said said = RUN("model", "synth", path[0], "--shape", "llama-tiny");
    cr_expect_eq(said.code, 1, "an existing file must stay");
    said_free(&said);
}

static const char *text_at(const json_t *object, const char *outer, const char *key)
{
    const char *text = json_string_value(json_object_get(json_object_get(object, outer), key));
    return text ? text : "";
}

Test(cli, model_quantize_writes_what_inspect_describes)
{
    char from[PROCESS_PATH_SIZE], to[PROCESS_PATH_SIZE];
    cr_assert_eq(process_path(from, folder, "g16.gguf"), ODSI_OK);
    cr_assert_eq(process_path(to, folder, "g4.gguf"), ODSI_OK);
    struct said said = RUN("model", "synth", from, "--shape", "gemma3-tiny", "--type", "f16");
    cr_assert_eq(said.code, 0, "%s", said.log);
    said_free(&said);
    json_t *made =
        OBJECT("model", "quantize", from, to, "--type", "q4_k_m", "--threads", "2", "--json");
    json_t *got = OBJECT("model", "inspect", to, "--json");
    cr_expect_eq(json_integer_value(json_object_get(made, "tensors")), 93);
    cr_expect(json_equal(json_object_get(made, "size_after"), json_object_get(got, "weight_size")));
    cr_expect(json_equal(json_object_get(made, "bits_per_weight"),
                         json_object_get(got, "bits_per_weight")));
    cr_expect_str_eq(json_string_value(json_object_get(got, "family")), "gemma3");
    cr_expect_eq(json_integer_value(json_object_get(got, "window")), 24);
    cr_expect_eq(json_integer_value(json_object_get(got, "windowed_layers")), 6);
    cr_expect_eq(json_integer_value(json_object_get(got, "kv_size_per_token")), 7 * 2 * 64 * 2);
    cr_expect_str_eq(text_at(got, "tokenizer", "kind"), "SentencePiece");
    cr_expect_str_eq(text_at(got, "tokenizer", "chat_layout"), "gemma");
    json_t *types = json_object_get(got, "types");
    cr_assert_eq(json_array_size(types), 3);
    cr_expect_str_eq(json_string_value(json_object_get(json_array_get(types, 1), "type")), "q4_k");
    cr_expect_eq(json_integer_value(json_object_get(json_array_get(types, 1), "tensors")), 43);
    json_decref(made);
    json_decref(got);
    said = RUN("model", "quantize", to, from, "--type", "q8_0");
    cr_expect_eq(said.code, 1, "an existing file must stay");
    said_free(&said);
    said = RUN("model", "inspect", to);
    cr_expect(strstr(said.output, "  q4_k      43 tensors, "), "%s", said.output);
    cr_expect(strstr(said.output, "window      24 positions, in 6 layers"), "%s", said.output);
    said_free(&said);
}

Test(cli, trace_tells_the_best_tokens_of_every_position)
{
    json_t *got =
        OBJECT("trace", "--model", MODEL_Q8, "--tokens", "1,5,7,9", "--positions", "--json");
    json_t *whole = OBJECT("trace", "--model", MODEL_Q8, "--tokens", "1,5,7,9", "--json");
    json_t *part = OBJECT("trace", "--model", MODEL_Q8, "--tokens", "1,5", "--json");
    json_t *positions = json_object_get(got, "positions");
    cr_assert_eq(json_array_size(positions), 4);
    cr_expect(json_equal(json_array_get(positions, 3), json_object_get(whole, "top")));
    cr_expect(json_equal(json_array_get(positions, 1), json_object_get(part, "top")));
    cr_expect(json_equal(json_object_get(got, "layers"), json_object_get(whole, "layers")));
    cr_expect_null(json_object_get(whole, "positions"));
    json_decref(got);
    json_decref(whole);
    json_decref(part);
}

Test(cli, identity_is_made_once_and_shown_in_three_forms)
{
    struct said made = RUN("identity", "new");
    cr_assert_eq(made.code, 0, "%s", made.log);
    cr_expect_eq(strlen(made.output), 65);
    struct said shown = RUN("identity");
    cr_expect_str_eq(shown.output, made.output);
    struct said pem = RUN("identity", "show", "--pem");
    cr_expect_eq(strncmp(pem.output, "-----BEGIN CERTIFICATE-----\n", 28), 0);
    cr_expect_null(strstr(pem.output, "PRIVATE"), "a key must never be printed");
    json_t *object = OBJECT("identity", "--json", "show");
    cr_expect_eq(strncmp(json_string_value(json_object_get(object, "id")), made.output, 64), 0);
    /* Made anew at every start, so only its form is always the same. */
    cr_expect_eq(strncmp(json_string_value(json_object_get(object, "certificate")), pem.output, 28),
                 0);
    struct said again = RUN("identity", "new");
    cr_expect_eq(again.code, 1);
    cr_expect(strstr(again.log, "is there already"), "%s", again.log);
    json_decref(object);
    said_free(&made);
    said_free(&shown);
    said_free(&pem);
    said_free(&again);
}

Test(cli, bench_prints_every_figure)
{
    static const char *const keys[] = {
        "threads", "batch",     "prompt_tokens",   "gen_tokens", "prefill_tps", "decode_tps",
        "ttft_ms", "read_gbps", "bytes_per_token", "copy_gbps",  "mixed_tps",   "mixed_token_ms"};
    json_t *got = OBJECT("bench", "--model", MODEL_Q8, "--threads", "2", "--prompt-tokens", "20",
                         "--gen-tokens", "4", "--batch", "2", "--json");
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        expect_number(got, keys[i]);
        cr_expect_gt(json_number_value(json_object_get(got, keys[i])), 0, "%s", keys[i]);
    }
    expect_number(json_object_get(got, "per_token_ms"), "p50");
    expect_number(json_object_get(got, "per_token_ms"), "p99");
    cr_expect_str_eq(json_string_value(json_object_get(got, "model")), "odsi-tiny");
    cr_expect_str_eq(json_string_value(json_object_get(got, "backend")), "cpu");
    cr_expect(json_is_string(json_object_get(got, "isa")));
    /* Two sequences share the weights: 1.4 MB without the embedding, half for each. */
    const json_int_t size = json_integer_value(json_object_get(got, "bytes_per_token"));
    cr_expect(size > 690000 && size < 800000, "%lld bytes per token", (long long)size);
    json_decref(got);
}

Test(cli, bench_shows_what_a_shared_prefix_saves)
{
    static const char *const keys[] = {"ttft_first_ms", "ttft_second_ms", "speedup"};
    json_t *got = OBJECT("bench", "--model", MODEL_Q8, "--shared-prefix", "300", "--json");
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        cr_expect_gt(json_number_value(json_object_get(got, keys[i])), 0, "%s", keys[i]);
    cr_expect_eq(json_integer_value(json_object_get(got, "shared_tokens")), 300);
    cr_expect_eq(json_integer_value(json_object_get(got, "prompt_tokens")), 316);
    cr_expect_eq(json_integer_value(json_object_get(got, "reused_tokens")), 256);
    json_decref(got);
    struct said said =
        RUN("bench", "--model", MODEL_Q8, "--shared-prefix", "300", "--prompt-tokens", "300");
    cr_expect_eq(said.code, 2);
    cr_expect(strstr(said.log, "--shared-prefix"), "%s", said.log);
    said_free(&said);
}

/* ---- a local swarm --------------------------------------------------------------------------- */

static unsigned count_entries(const char *prefix)
{
    unsigned count = 0;
    DIR *dir = opendir(folder);
    cr_assert_not_null(dir);
    for (const struct dirent *entry = readdir(dir); entry; entry = readdir(dir))
        count += strncmp(entry->d_name, prefix, strlen(prefix)) == 0;
    closedir(dir);
    return count;
}

Test(cli, local_ends_with_the_command_and_its_exit_code)
{
    static const char script[] =
        "for n in coordinator gateway worker-0 worker-1; do"
        " kill -0 $(cat $ODSI_LOCAL_DIR/$n.pid) || exit 1; test -s $ODSI_LOCAL_DIR/$n.log ||"
        " exit 1; cat $ODSI_LOCAL_DIR/$n.pid; done;"
        " test -n \"$ODSI_GATEWAY\" && test -n \"$ODSI_COORDINATOR\" && exit 7";
    struct said said =
        RUN("local", "--model", MODEL_Q8, "--workers", "2", "--", "sh", "-c", script);
    cr_assert_eq(said.code, 7, "%s", said.log);
    char *at = said.output;
    for (int i = 0; i < 4; i++) {
        const long pid = strtol(at, &at, 10);
        cr_assert_gt(pid, 1);
        cr_expect(kill((pid_t)pid, 0) != 0 && errno == ESRCH, "process %ld is left behind", pid);
    }
    cr_expect_eq(count_entries("odsi-local-"), 0, "the folder is left behind");
    said_free(&said);
}

/* Goal: a swarm gives the tokens of one process, sampled ones too, with replicas and odd cuts. */
Test(cli, a_swarm_writes_what_one_process_writes)
{
    static const char *const sampling[] = {"0", "0.9"};
    for (size_t i = 0; i < 2; i++) {
        json_t *one = OBJECT("trace", "--json", "--model", MODEL_Q8, "--prompt", PROMPT,
                             "--generate", "48", "-t", sampling[i], "--seed", "5", "--top-k", "40",
                             "--repetition-penalty", "1.1");
        char command[512];
        snprintf(command, sizeof command,
                 "exec \"${ODSI_BIN:-build/release/bin}/odsi\" generate --json --prompt '" PROMPT
                 "' --max-tokens 48 -t %s --seed 5 --top-k 40 --repetition-penalty 1.1",
                 sampling[i]);
        json_t *swarm = OBJECT("local", "--quiet", "--model", MODEL_Q8, "--workers", "3",
                               "--layers", "0-3,4-5", "--", "sh", "-c", command);
        cr_expect(json_equal(json_object_get(one, "tokens"), json_object_get(swarm, "tokens")),
                  "temperature %s", sampling[i]);
        cr_expect(json_equal(json_object_get(one, "text"), json_object_get(swarm, "text")));
        cr_expect(json_equal(json_object_get(one, "model_id"), json_object_get(swarm, "model_id")));
        cr_expect(json_equal(json_object_get(one, "finish_reason"),
                             json_object_get(swarm, "finish_reason")));
        const json_t *hops = json_object_get(swarm, "hops");
        cr_assert_eq(json_array_size(hops), 2);
        cr_expect_str_eq(json_string_value(json_object_get(json_array_get(hops, 1), "layers")),
                         "4-5");
        cr_expect_eq(json_integer_value(json_object_get(swarm, "seed")), 5);
        cr_expect_eq(json_array_size(json_object_get(swarm, "logprobs")),
                     json_array_size(json_object_get(swarm, "tokens")));
        expect_number(json_object_get(swarm, "timings"), "first_token_us");
        expect_number(json_object_get(swarm, "timings"), "total_us");
        json_decref(one);
        json_decref(swarm);
    }
}

Test(cli, status_shows_every_worker_of_a_swarm)
{
    static const char script[] = "odsi=\"${ODSI_BIN:-build/release/bin}/odsi\";"
                                 " \"$odsi\" status --json && \"$odsi\" status";
    struct said said = RUN("local", "--quiet", "--model", MODEL_Q8, "--workers", "3", "--shards",
                           "2", "--", "sh", "-c", script);
    cr_assert_eq(said.code, 0, "%s", said.log);
    json_t *directory = json_loads(said.output, JSON_DISABLE_EOF_CHECK, NULL);
    const json_t *members = json_object_get(directory, "members");
    static const char *const layers[] = {"0-2", "0-2", "3-5"};
    cr_assert_eq(json_array_size(members), 3);
    for (size_t i = 0; i < 3; i++) {
        const json_t *member = json_array_get(members, i);
        cr_expect_str_eq(json_string_value(json_object_get(member, "layers")), layers[i]);
        cr_expect(json_is_true(json_object_get(member, "ready")));
        cr_expect_eq(strlen(json_string_value(json_object_get(member, "worker"))), 64);
    }
    cr_expect(strstr(said.output, "6 layers, all served"), "%s", said.output);
    json_decref(directory);
    said_free(&said);
}

/* Goal: a peer without an ID is trusted at its first connection, and only with that key later. */
Test(cli, a_peer_that_changes_its_key_is_refused)
{
    static const char script[] =
        "odsi=\"${ODSI_BIN:-build/release/bin}/odsi\"; at=${ODSI_COORDINATOR#*@};"
        " known=$ODSI_HOME/known_peers;"
        " \"$odsi\" status --coordinator $at >/dev/null || exit 3;"
        " grep -q \"^$at ${ODSI_COORDINATOR%@*}$\" $known || exit 4;"
        " \"$odsi\" status --coordinator $at >/dev/null || exit 5;"
        " echo \"$at $(printf 'ab%.0s' $(seq 32))\" >$known;"
        " exec \"$odsi\" status --coordinator $at";
    struct said said =
        RUN("local", "--quiet", "--model", MODEL_Q8, "--workers", "1", "--", "sh", "-c", script);
    cr_expect_eq(said.code, 1, "%d %s", said.code, said.log);
    cr_expect_str_eq(said.output, "");
    cr_expect(strstr(said.log, "is not who it was"), "%s", said.log);
    said_free(&said);
}

Test(cli, bench_measures_a_swarm_under_load)
{
    static const char script[] = "exec \"${ODSI_BIN:-build/release/bin}/odsi\" bench --sessions 3"
                                 " --prompt-tokens 20 --gen-tokens 10 --json";
    json_t *got =
        OBJECT("local", "--quiet", "--model", MODEL_Q8, "--workers", "2", "--", "sh", "-c", script);
    cr_expect_str_eq(json_string_value(json_object_get(got, "model")), "odsi-tiny");
    cr_expect_eq(json_integer_value(json_object_get(got, "sessions")), 3);
    cr_expect_gt(json_number_value(json_object_get(got, "prefill_tps")), 0);
    cr_expect_gt(json_number_value(json_object_get(got, "decode_tps")), 0);
    cr_expect_gt(json_number_value(json_object_get(got, "ttft_ms")), 0);
    expect_number(json_object_get(got, "per_token_ms"), "p50");
    json_decref(got);
}

Test(cli, local_tells_which_process_failed_and_why)
{
    struct said said = RUN("local", "--model", MODEL_Q8, "--workers", "2", "--threads", "1000000");
    cr_expect_eq(said.code, 1);
    cr_expect(strstr(said.log, "ended with code"), "%s", said.log);
    cr_expect(strstr(said.log, "compute threads"), "not the end of its log: %s", said.log);
    cr_expect_eq(count_entries("odsi-local-"), 0);
    said_free(&said);
}

/* Waits until `odsi local` without a command has said that it is up; returns the pid of the
 * gateway from its folder. */
static pid_t wait_until_up(struct process *local)
{
    const uint64_t deadline_us = clock_monotonic_us() + RUN_US;
    char path[PROCESS_PATH_SIZE + 64] = "";
    for (;;) {
        char *output = NULL;
        cr_assert_lt(clock_monotonic_us(), deadline_us);
        cr_assert_eq(process_read_output(&output, local), ODSI_OK);
        const char *at = strstr(output, "Logs are in ");
        const char *end = at ? strstr(at, ". Ctrl-C") : NULL;
        if (end) {
            at += strlen("Logs are in ");
            snprintf(path, sizeof path, "%.*s/gateway.pid", (int)(end - at), at);
        }
        alloc_free(output);
        if (end)
            break;
        usleep(20000);
    }
    char *text = NULL;
    cr_assert_eq(process_read_file(&text, path), ODSI_OK);
    const pid_t pid = (pid_t)strtol(text, NULL, 10);
    alloc_free(text);
    return pid;
}

static void wait_until_gone(pid_t pid)
{
    const uint64_t deadline_us = clock_monotonic_us() + 20000000;
    char path[64], text[256];
    snprintf(path, sizeof path, "/proc/%ld/stat", (long)pid);
    for (;;) {
        FILE *file = fopen(path, "r");
        if (!file)
            return;
        const char *line = fgets(text, sizeof text, file);
        fclose(file);
        if (!line || strstr(text, ") Z ")) /* nobody reaps orphans in some containers */
            return;
        cr_assert_lt(clock_monotonic_us(), deadline_us, "process %ld lives on", (long)pid);
        usleep(20000);
    }
}

Test(cli, local_without_a_command_runs_until_it_is_told_to_end)
{
    const char *const args[] = {"local", "--model", MODEL_Q8, "--workers", "2", NULL};
    struct process *local = start_odsi(args);
    int code = -1;
    const pid_t gateway = wait_until_up(local);
    cr_expect_eq(kill(gateway, 0), 0);
    process_signal(local, SIGTERM);
    cr_assert_eq(process_wait(local, RUN_US, &code), ODSI_OK);
    cr_expect_eq(code, 0);
    cr_expect(kill(gateway, 0) != 0, "the gateway is left behind");
    cr_expect_eq(count_entries("odsi-local-"), 0);
    process_close(&local);
}

/* Goal: even a killed `odsi local`, which can clean nothing up, leaves no process behind. */
Test(cli, nothing_of_a_swarm_survives_a_killed_odsi_local)
{
    const char *const args[] = {"local", "--model", MODEL_Q8, "--workers", "2", NULL};
    struct process *local = start_odsi(args);
    const pid_t gateway = wait_until_up(local);
    process_signal(local, SIGKILL);
    process_close(&local);
    wait_until_gone(gateway);
}
