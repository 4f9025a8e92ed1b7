/* The whole path of a token through real processes: client, gateway, workers, coordinator. */
#include "tests/support/swarm.h"

#include "common/base/alloc.h"
#include "common/base/buf.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define MODEL_F32   "deploy/demo/odsi-tiny-f32.gguf"
#define MODEL_Q8    "deploy/demo/odsi-tiny-q8_0.gguf"
#define REFERENCE   "tests/vectors/odsi-tiny/reference.json"
#define DEMO_LAYERS 6u

static void open_demo(struct swarm *swarm, const char *model, uint32_t worker_count)
{
    const struct swarm_config config = {
        .model = model, .layer_count = DEMO_LAYERS, .worker_count = worker_count};
    swarm_open(swarm, &config);
}

/* The answer of `odsi generate --json` as an object; fails the test when there is none. */
static json_t *generate(struct swarm *swarm, const char *const *args)
{
    char *output = NULL, *log = NULL;
    const int code = swarm_generate(swarm, args, &output, &log);
    cr_assert_eq(code, 0, "odsi generate ended with %d: %s", code, log);
    json_t *answer = json_loads(output, 0, NULL);
    cr_assert_not_null(answer, "not JSON: %s", output);
    alloc_free(output);
    alloc_free(log);
    return answer;
}

/* One error line that mentions word, and this exit code. */
static void expect_refused(struct swarm *swarm, const char *const *args, int code, const char *word)
{
    char *output = NULL, *log = NULL;
    cr_expect_eq(swarm_generate(swarm, args, &output, &log), code);
    cr_expect(strstr(log, word) != NULL, "\"%s\" does not mention \"%s\"", log, word);
    alloc_free(output);
    alloc_free(log);
}

static size_t common_length(const json_t *a, const json_t *b)
{
    size_t i = 0;
    while (i < json_array_size(a) && i < json_array_size(b) &&
           json_equal(json_array_get(a, i), json_array_get(b, i)))
        i++;
    return i;
}

/* Goal: the answer is a function of model and prompt alone, and it is the reference's. Method: the
 * 12 reference prompts, greedy, over 1, 2, 3 and 6 workers; where the reference has a near-tie
 * (smallest gap at most 0.01) only the swarms are compared with each other. */
Test(swarm, greedy_text_is_the_references_over_any_number_of_workers, .timeout = 240)
{
    const uint32_t worker_counts[] = {1, 2, 3, 6};
    json_t *answers[4][12] = {{NULL}};
    json_t *reference = json_load_file(REFERENCE, 0, NULL);
    cr_assert_not_null(reference);
    json_t *cases = json_object_get(reference, "cases");
    cr_assert_eq(json_array_size(cases), 12);
    for (size_t w = 0; w < 4; w++) {
        struct swarm swarm;
        open_demo(&swarm, MODEL_F32, worker_counts[w]);
        for (size_t i = 0; i < 12; i++) {
            const json_t *entry = json_array_get(cases, i);
            const char *const args[] = {"--prompt",
                                        json_string_value(json_object_get(entry, "prompt")),
                                        "--max-tokens", "64", NULL};
            json_t *answer = generate(&swarm, args);
            answers[w][i] = json_incref(json_object_get(answer, "tokens"));
            json_decref(answer);
            const json_t *expected = json_object_get(entry, "greedy_tokens");
            if (json_real_value(json_object_get(entry, "smallest_top2_gap")) > 0.01)
                cr_expect(json_equal(answers[w][i], expected), "%s over %u workers: %zu of %zu",
                          json_string_value(json_object_get(entry, "name")), worker_counts[w],
                          common_length(answers[w][i], expected), json_array_size(expected));
            cr_expect(json_equal(answers[w][i], answers[0][i]), "%s: %u workers against 1",
                      json_string_value(json_object_get(entry, "name")), worker_counts[w]);
        }
        swarm_close(&swarm);
    }
    for (size_t w = 0; w < 4; w++)
        for (size_t i = 0; i < 12; i++)
            json_decref(answers[w][i]);
    json_decref(reference);
}

/* Goal: sampling is as reproducible as greedy decoding. Method: every sampling option, fixed seeds,
 * one worker against three. */
Test(swarm, sampled_text_depends_on_the_seed_not_on_the_workers, .timeout = 120)
{
    const char *const cases[][16] = {
        {"--prompt", "Once upon a time", "--temperature", "0.9", "--seed", "11", "--max-tokens",
         "60", NULL},
        {"--prompt", "Once upon a time", "--temperature", "1.2", "--seed", "12", "--top-k", "20",
         "--top-p", "0.95", "--max-tokens", "60", NULL},
        {"--prompt", "Once upon a time", "--temperature", "1.0", "--seed", "13", "--min-p", "0.05",
         "--repetition-penalty", "1.2", "--max-tokens", "60", NULL},
        {"--prompt", "One day", "--repetition-penalty", "1.5", "--max-tokens", "60", NULL},
    };
    json_t *texts[2][4];
    for (size_t w = 0; w < 2; w++) {
        struct swarm swarm;
        open_demo(&swarm, MODEL_Q8, w == 0 ? 1 : 3);
        for (size_t i = 0; i < 4; i++) {
            json_t *answer = generate(&swarm, cases[i]);
            texts[w][i] = json_incref(json_object_get(answer, "tokens"));
            json_decref(answer);
            cr_expect_gt(json_array_size(texts[w][i]), 5);
            if (w == 1)
                cr_expect(json_equal(texts[0][i], texts[1][i]), "case %zu", i);
        }
        swarm_close(&swarm);
    }
    cr_expect_not(json_equal(texts[0][0], texts[0][1]));
    for (size_t w = 0; w < 2; w++)
        for (size_t i = 0; i < 4; i++)
            json_decref(texts[w][i]);
}

Test(swarm, an_answer_tells_where_its_time_went, .timeout = 60)
{
    struct swarm swarm;
    open_demo(&swarm, MODEL_Q8, 3);
    const char *const args[] = {"--prompt", "Once upon a time", "--max-tokens", "20", NULL};
    json_t *answer = generate(&swarm, args);
    const json_t *hops = json_object_get(answer, "hops");
    cr_expect_eq(json_array_size(hops), 3);
    cr_expect_str_eq(json_string_value(json_object_get(answer, "finish_reason")), "length");
    cr_expect_eq(json_array_size(json_object_get(answer, "tokens")), 20);
    for (size_t i = 0; i < json_array_size(hops); i++) {
        const json_t *hop = json_array_get(hops, i);
        cr_expect_gt(json_number_value(json_object_get(hop, "compute_us")), 0, "hop %zu", i);
    }
    json_decref(answer);
    swarm_close(&swarm);
}

Test(swarm, echo_puts_the_prompt_in_front_and_hops_prints_the_table, .timeout = 60)
{
    struct swarm swarm;
    struct process *process = NULL;
    char *output = NULL, *log = NULL;
    int code = -1;
    open_demo(&swarm, MODEL_Q8, 3);
    const char *const args[] = {"generate", "--insecure",       "--gateway", swarm.gateway_address,
                                "--prompt", "Once upon a time", "--echo",    "--hops",
                                NULL};
    const struct process_config config = {
        .program = "odsi", .args = args, .folder = swarm.folder, .name = "echo"};
    cr_assert_eq(process_start(&process, &config), ODSI_OK);
    cr_assert_eq(process_wait(process, 20000000u, &code), ODSI_OK);
    cr_expect_eq(code, 0);
    cr_assert_eq(process_read_output(&output, process), ODSI_OK);
    cr_assert_eq(process_read_log(&log, process), ODSI_OK);
    cr_expect_eq(strncmp(output, "Once upon a time, there was", 27), 0, "%s", output);
    cr_expect(strstr(log, "compute") && strstr(log, "network"), "no table in: %s", log);
    alloc_free(output);
    alloc_free(log);
    process_close(&process);
    swarm_close(&swarm);
}

Test(swarm, stop_strings_end_the_text_before_them, .timeout = 60)
{
    struct swarm swarm;
    open_demo(&swarm, MODEL_Q8, 3);
    const char *const whole_args[] = {"--prompt", "Once upon a time", "--max-tokens", "64", NULL};
    json_t *answer = generate(&swarm, whole_args);
    char whole[2048], stop[32], expected[2048];
    snprintf(whole, sizeof whole, "%s", json_string_value(json_object_get(answer, "text")));
    json_decref(answer);
    cr_assert_gt(strlen(whole), 80);
    snprintf(stop, sizeof stop, "%.9s", whole + 40);
    snprintf(expected, sizeof expected, "%.*s", (int)(strstr(whole, stop) - whole), whole);
    const char *const args[] = {
        "--prompt", "Once upon a time", "--max-tokens", "64", "--stop", stop, NULL};
    answer = generate(&swarm, args);
    cr_expect_str_eq(json_string_value(json_object_get(answer, "text")), expected);
    cr_expect_str_eq(json_string_value(json_object_get(answer, "finish_reason")), "stop");
    json_decref(answer);
    swarm_close(&swarm);
}

/* Goal: each bad request gets one line that says what is wrong, and the next good one works. */
Test(swarm, bad_requests_are_refused_by_name_and_harm_nobody, .timeout = 60)
{
    struct swarm swarm;
    char *long_prompt = NULL;
    open_demo(&swarm, MODEL_Q8, 2);
    cr_assert_eq(alloc_zeroed(&long_prompt, 40001, 1), ODSI_OK);
    for (int i = 0; i < 40000; i++)
        long_prompt[i] = i % 6 == 5 ? ' ' : 'a';
    const char *const too_long[] = {"--prompt", long_prompt, NULL};
    const char *const unknown_model[] = {"--prompt", "a", "--model", "no-such-model", NULL};
    const char *const hot[] = {"--prompt", "a", "--temperature", "-1", NULL};
    const char *const wide[] = {"--prompt", "a", "--temperature", "1", "--top-p", "1.5", NULL};
    expect_refused(&swarm, too_long, 1, "512");
    expect_refused(&swarm, unknown_model, 1, "no-such-model");
    expect_refused(&swarm, hot, 1, "temperature");
    expect_refused(&swarm, wide, 1, "top_p");
    const char *const empty[] = {"--prompt", "", "--max-tokens", "8", NULL};
    json_t *answer = generate(&swarm, empty);
    cr_expect_eq(json_array_size(json_object_get(answer, "tokens")), 8, "an empty prompt is fine");
    json_decref(answer);
    alloc_free(long_prompt);
    swarm_close(&swarm);
}

/* Goal: several answers at once are each what they are alone. */
Test(swarm, sessions_at_once_do_not_disturb_each_other, .timeout = 120)
{
    enum { SESSIONS = 6 };
    struct swarm swarm;
    struct process *processes[SESSIONS];
    json_t *alone[SESSIONS];
    open_demo(&swarm, MODEL_Q8, 3);
    for (int i = 0; i < SESSIONS; i++) {
        char seed[16];
        snprintf(seed, sizeof seed, "%d", 100 + i);
        const char *const args[] = {
            "--prompt", "Once upon a time", "--temperature", "1", "--seed", seed, NULL};
        alone[i] = generate(&swarm, args);
    }
    for (int i = 0; i < SESSIONS; i++) {
        char seed[16], name[32];
        snprintf(seed, sizeof seed, "%d", 100 + i);
        snprintf(name, sizeof name, "together-%d", i);
        const char *const args[] = {"generate",
                                    "--json",
                                    "--insecure",
                                    "--gateway",
                                    swarm.gateway_address,
                                    "--prompt",
                                    "Once upon a time",
                                    "--temperature",
                                    "1",
                                    "--seed",
                                    seed,
                                    NULL};
        const struct process_config config = {
            .program = "odsi", .args = args, .folder = swarm.folder, .name = name};
        cr_assert_eq(process_start(&processes[i], &config), ODSI_OK);
    }
    for (int i = 0; i < SESSIONS; i++) {
        int code = -1;
        char *output = NULL;
        cr_assert_eq(process_wait(processes[i], 60000000u, &code), ODSI_OK);
        cr_assert_eq(code, 0);
        cr_assert_eq(process_read_output(&output, processes[i]), ODSI_OK);
        json_t *answer = json_loads(output, 0, NULL);
        cr_expect(
            json_equal(json_object_get(answer, "tokens"), json_object_get(alone[i], "tokens")),
            "session %d", i);
        json_decref(answer);
        json_decref(alone[i]);
        alloc_free(output);
        process_close(&processes[i]);
    }
    swarm_close(&swarm);
}

static char *long_prompt(const char *end)
{
    struct buf text;
    buf_init(&text, 1u << 16);
    for (uint32_t i = 0; i < 24; i++)
        buf_append_text(&text, "Once upon a time there was a big dog who liked to run. ");
    buf_append_text(&text, end);
    cr_assert_eq(buf_status(&text), ODSI_OK);
    char *out = NULL;
    cr_assert_eq(alloc_text(&out, buf_text_view(&text), text.size), ODSI_OK);
    buf_free(&text);
    return out;
}

static json_int_t number_of(const json_t *answer, const char *name)
{
    const json_t *value = json_object_get(answer, name);
    cr_assert(json_is_integer(value), "%s", name);
    return json_integer_value(value);
}

/* Goal: what an answer computed of its prompt is not computed again, and nobody can tell from the
 * text. Method: the same long prompt twice, then one that begins so and one that ends before, each
 * against a swarm that has not heard of it; over one worker and over three. */
Test(swarm, a_prompt_that_begins_as_another_is_computed_from_there, .timeout = 120)
{
    enum { CASES = 4 };
    char *prompts[CASES] = {long_prompt(""), long_prompt(""), long_prompt("Then it rained."), NULL};
    cr_assert_eq(alloc_text(&prompts[3], prompts[0], 700), ODSI_OK);
    json_t *fresh[CASES];
    for (uint32_t i = 0; i < CASES; i++) {
        struct swarm swarm;
        open_demo(&swarm, MODEL_Q8, 1);
        const char *const args[] = {"--prompt", prompts[i], "--max-tokens", "24", NULL};
        fresh[i] = generate(&swarm, args);
        cr_expect_eq(number_of(fresh[i], "reused_tokens"), 0);
        swarm_close(&swarm);
    }
    for (uint32_t workers = 1; workers <= 3; workers += 2) {
        struct swarm swarm;
        open_demo(&swarm, MODEL_Q8, workers);
        for (uint32_t i = 0; i < CASES; i++) {
            const char *const args[] = {"--prompt", prompts[i], "--max-tokens", "24", NULL};
            json_t *answer = generate(&swarm, args);
            const json_int_t prompt = number_of(answer, "prompt_tokens");
            const json_int_t reused = number_of(answer, "reused_tokens");
            cr_expect_gt(prompt, 130);
            if (i == 0)
                cr_expect_eq(reused, 0);
            else
                cr_expect(reused > prompt - 80 && reused < prompt, "case %u: %d of %d", i,
                          (int)reused, (int)prompt);
            cr_expect(
                json_equal(json_object_get(answer, "tokens"), json_object_get(fresh[i], "tokens")),
                "case %u over %u workers", i, workers);
            cr_expect(json_equal(json_object_get(answer, "logprobs"),
                                 json_object_get(fresh[i], "logprobs")));
            json_decref(answer);
        }
        swarm_close(&swarm);
    }
    for (uint32_t i = 0; i < CASES; i++) {
        json_decref(fresh[i]);
        alloc_free(prompts[i]);
    }
}

/* Goal: among replicas a prompt goes where its beginning is held. Method: three workers that each
 * hold everything, of which any would do as well; the same prompt again and again. */
Test(swarm, a_prompt_goes_to_the_replica_that_holds_its_beginning, .timeout = 60)
{
    const char *const whole[] = {"--layers=0-5", NULL};
    const struct swarm_config config = {
        .model = MODEL_Q8, .layer_count = DEMO_LAYERS, .worker_count = 3, .worker_args = whole};
    struct swarm swarm;
    char *prompt = long_prompt("");
    swarm_open(&swarm, &config);
    for (uint32_t i = 0; i < 12; i++) {
        const char *const args[] = {"--prompt", prompt, "--max-tokens", "4", NULL};
        json_t *answer = generate(&swarm, args);
        if (i > 0)
            cr_expect_gt(number_of(answer, "reused_tokens"), 100, "answer %u", i);
        json_decref(answer);
    }
    alloc_free(prompt);
    swarm_close(&swarm);
}

/* Starts a long answer in the background and waits until its first text is there. */
static struct process *start_long_answer(struct swarm *swarm, const char *name)
{
    struct process *process = NULL;
    const char *const args[] = {"generate",     "--insecure",
                                "--gateway",    swarm->gateway_address,
                                "--prompt",     "Once upon a time",
                                "--ignore-end", "--max-tokens",
                                "500",          NULL};
    const struct process_config config = {
        .program = "odsi", .args = args, .folder = swarm->folder, .name = name};
    cr_assert_eq(process_start(&process, &config), ODSI_OK);
    for (int i = 0; i < 2000; i++) {
        char *output = NULL;
        cr_assert_eq(process_read_output(&output, process), ODSI_OK);
        const size_t size = strlen(output);
        alloc_free(output);
        if (size > 0)
            return process;
        usleep(2000);
    }
    cr_assert_fail("no text came");
    return NULL;
}

/* Goal: a client that goes away leaves nothing behind. Method: kill one in the middle, again and
 * again; the KV memory (16 MiB a worker, some 40 full contexts) would run out if it leaked. */
Test(swarm, a_client_that_disconnects_frees_what_it_held, .timeout = 120)
{
    struct swarm swarm;
    const char *const args[] = {"--prompt", "Once upon a time", "--max-tokens", "8", NULL};
    const char *const small[] = {"--kv-memory=700K", NULL}; /* less than two sessions */
    const struct swarm_config config = {
        .model = MODEL_Q8, .layer_count = DEMO_LAYERS, .worker_count = 2, .worker_args = small};
    swarm_open(&swarm, &config);
    for (int i = 0; i < 8; i++) {
        char name[32];
        snprintf(name, sizeof name, "killed-%d", i);
        struct process *process = start_long_answer(&swarm, name);
        process_signal(process, SIGKILL);
        process_close(&process);
        usleep(100000); /* the gateway hears of it from the broken connection */
    }
    json_t *answer = generate(&swarm, args);
    cr_expect_eq(json_array_size(json_object_get(answer, "tokens")), 8);
    json_decref(answer);
    swarm_close(&swarm);
}

/* Goal: the loss of a worker is one named error, soon, and ends that session only. */
Test(swarm, a_killed_worker_is_named_and_ends_the_answer_soon, .timeout = 60)
{
    struct swarm swarm;
    char *log = NULL;
    int code = -1;
    open_demo(&swarm, MODEL_Q8, 3);
    struct process *process = start_long_answer(&swarm, "broken");
    process_close(&swarm.workers[1]); /* SIGKILL */
    cr_expect_eq(process_wait(process, 5000000u, &code), ODSI_OK, "it hangs");
    cr_expect_eq(code, 1);
    cr_assert_eq(process_read_log(&log, process), ODSI_OK);
    cr_expect(strstr(log, "layers") != NULL, "\"%s\" names no layers", log);
    alloc_free(log);
    process_close(&process);
    swarm_close(&swarm);
}

/* Goal: with a replica the loss of a worker changes no byte of the answer. Method: two workers that
 * each hold the whole model; one of the two serves, so each is killed once in the middle of a long
 * answer, and the text must be the same both times. */
Test(swarm, a_killed_worker_with_a_replica_changes_no_byte, .timeout = 120)
{
    const char *const whole[] = {"--layers=0-5", NULL};
    const struct swarm_config config = {
        .model = MODEL_Q8, .layer_count = DEMO_LAYERS, .worker_count = 2, .worker_args = whole};
    char *expected = NULL;
    for (uint32_t killed = 0; killed < 2; killed++) {
        struct swarm swarm;
        char *output = NULL, *log = NULL;
        int code = -1;
        swarm_open(&swarm, &config);
        if (!expected) {
            struct process *undisturbed = start_long_answer(&swarm, "undisturbed");
            cr_assert_eq(process_wait(undisturbed, 20000000u, &code), ODSI_OK);
            cr_assert_eq(process_read_output(&expected, undisturbed), ODSI_OK);
            process_close(&undisturbed);
        }
        struct process *process = start_long_answer(&swarm, "disturbed");
        process_close(&swarm.workers[killed]); /* SIGKILL */
        cr_expect_eq(process_wait(process, 20000000u, &code), ODSI_OK, "it hangs");
        cr_assert_eq(process_read_log(&log, process), ODSI_OK);
        cr_expect_eq(code, 0, "killed %u: %s", killed, log);
        cr_assert_eq(process_read_output(&output, process), ODSI_OK);
        cr_expect_str_eq(output, expected, "killed %u", killed);
        alloc_free(output);
        alloc_free(log);
        process_close(&process);
        swarm_close(&swarm);
    }
    alloc_free(expected);
}

Test(swarm, stops_cleanly_in_the_middle_of_an_answer, .timeout = 60)
{
    struct swarm swarm;
    int code = -1;
    open_demo(&swarm, MODEL_Q8, 3);
    struct process *process = start_long_answer(&swarm, "cut");
    swarm_close(&swarm); /* every program must end with 0 */
    cr_expect_eq(process_wait(process, 5000000u, &code), ODSI_OK, "the client hangs");
    cr_expect_eq(code, 1);
    process_close(&process);
}
