#include "common/base/alloc.h"
#include "common/base/args.h"

#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* What a program that has one option of each kind would keep. */
struct settings {
    const char *model;
    uint32_t threads;
    uint64_t memory;
    float temperature;
    int json;
    int cpu;
    struct args_list stop;
};

struct fixture {
    struct settings settings;
    struct args_option options[8];
    struct args_program program;
    struct args *args;
    int rest;
};

static void fixture_init(struct fixture *self)
{
    struct settings *to = &self->settings;
    *to = (struct settings){.model = "none", .threads = 4, .memory = 7, .temperature = 1.0f};
    const struct args_option options[] = {
        {"model", 'm', ARGS_TEXT, &to->model, "FILE", "model to read", 0},
        {"threads", 't', ARGS_U32, &to->threads, "N", "threads (default 4)", 0},
        {"kv-memory", 0, ARGS_U64, &to->memory, "SIZE", "bytes of KV cache", 0},
        {"temperature", 0, ARGS_F32, &to->temperature, "T", "0 takes the likeliest token", 0},
        {"json", 'j', ARGS_FLAG, &to->json, NULL, "print JSON", 0},
        {"cpu", 0, ARGS_FLAG, &to->cpu, NULL, "leave the GPU alone", 1},
        {"stop", 0, ARGS_TEXT_LIST, &to->stop, "TEXT", "stop at TEXT", 0},
        {NULL, 0, ARGS_FLAG, NULL, NULL, NULL, 0},
    };
    memcpy(self->options, options, sizeof options);
    self->program = (struct args_program){
        .name = "odsi-test",
        .summary = "Tests how options are read.",
        .usage = "[options] --model FILE",
        .examples = "  odsi-test --model a.gguf",
        .options = self->options,
    };
}

static enum args_outcome read_args(struct fixture *self, int argc, const char *const *argv)
{
    fixture_init(self);
    return args_read(&self->args, &self->program, argc, (char **)argv, &self->rest);
}

/* Reads the given arguments behind a program name. */
#define READ(fixture, ...)                                                                         \
    read_args(fixture, (int)(sizeof((const char *[]){"odsi-test", __VA_ARGS__}) / sizeof(char *)), \
              (const char *[]){"odsi-test", __VA_ARGS__})

/* Writes a config file and returns its path, which the caller unlinks. */
static const char *config_file(const char *text, size_t size)
{
    static char path[] = "/tmp/odsi-test-args-XXXXXX";
    memcpy(path + sizeof path - 7, "XXXXXX", 6);
    const int fd = mkstemp(path);
    cr_assert_geq(fd, 0);
    cr_assert_eq(write(fd, text, size), (ssize_t)size);
    close(fd);
    return path;
}

static enum args_outcome read_with_file(struct fixture *self, const char *text, size_t size)
{
    const char *path = config_file(text, size);
    const enum args_outcome outcome = READ(self, "--config", path);
    unlink(path);
    return outcome;
}

/* Asserts that a usage error was printed as one line which contains part. */
static void assert_complaint(const char *part)
{
    char text[2048] = "";
    fflush(stderr);
    FILE *stream = cr_get_redirected_stderr();
    const size_t size = fread(text, 1, sizeof text - 1, stream);
    cr_assert(strstr(text, part), "'%s' does not say '%s'", text, part);
    cr_assert(strstr(text, "see odsi-test --help"));
    cr_assert_eq(strchr(text, '\n'), text + size - 1, "more than one line: %s", text);
}

Test(args, reads_every_kind_in_long_form)
{
    struct fixture f;
    cr_assert_eq(READ(&f, "--model", "a.gguf", "--threads", "8", "--kv-memory", "3G",
                      "--temperature", "0.5", "--json"),
                 ARGS_RUN);
    cr_expect_str_eq(f.settings.model, "a.gguf");
    cr_expect_eq(f.settings.threads, 8);
    cr_expect_eq(f.settings.memory, (uint64_t)3 << 30);
    cr_expect_eq(f.settings.temperature, 0.5f);
    cr_expect_eq(f.settings.json, 1);
    cr_expect_eq(f.rest, 10);
    args_close(&f.args);
    cr_expect_null(f.args);
}

Test(args, reads_values_behind_equals_and_short_names)
{
    struct fixture f;
    cr_assert_eq(READ(&f, "--model=a=b", "-t", "9", "-j", "--kv-memory=18446744073709551615"),
                 ARGS_RUN);
    cr_expect_str_eq(f.settings.model, "a=b");
    cr_expect_eq(f.settings.threads, 9);
    cr_expect_eq(f.settings.json, 1);
    cr_expect_eq(f.settings.memory, UINT64_MAX);
    args_close(&f.args);
}

Test(args, leaves_what_nobody_set)
{
    struct fixture f;
    const char *const argv[] = {"odsi-test"};
    cr_assert_eq(read_args(&f, 1, argv), ARGS_RUN);
    cr_expect_str_eq(f.settings.model, "none");
    cr_expect_eq(f.settings.threads, 4);
    cr_expect_eq(f.settings.memory, 7);
    cr_expect_eq(f.settings.temperature, 1.0f);
    cr_expect_eq(f.settings.json, 0);
    cr_expect_eq(f.rest, 1);
    args_close(&f.args);
}

Test(args, no_name_clears_a_flag_and_the_later_one_holds)
{
    struct fixture f;
    cr_assert_eq(READ(&f, "--json", "--no-json", "--threads", "1", "--threads", "2"), ARGS_RUN);
    cr_expect_eq(f.settings.json, 0);
    cr_expect_eq(f.settings.threads, 2);
    args_close(&f.args);
    cr_assert_eq(READ(&f, "--json=false"), ARGS_RUN);
    cr_expect_eq(f.settings.json, 0);
    args_close(&f.args);
}

Test(args, stops_at_the_first_argument_that_is_not_an_option)
{
    struct fixture f;
    cr_assert_eq(READ(&f, "-j", "inspect", "--unknown"), ARGS_RUN);
    cr_expect_eq(f.rest, 2);
    args_close(&f.args);
    cr_assert_eq(READ(&f, "-j", "--", "--unknown"), ARGS_RUN);
    cr_expect_eq(f.rest, 3);
    args_close(&f.args);
    cr_assert_eq(READ(&f, "-"), ARGS_RUN);
    cr_expect_eq(f.rest, 1);
    args_close(&f.args);
}

/* Goal: flag over environment over file over default, for each option by itself. */
Test(args, takes_flag_over_environment_over_file)
{
    struct fixture f;
    const char text[] = "model = file.gguf\nthreads=2\n\n # a comment\n  kv-memory = 2K \njson=1\n";
    const char *path = config_file(text, sizeof text - 1);
    setenv("ODSI_MODEL", "environment.gguf", 1);
    setenv("ODSI_THREADS", "3", 1);
    setenv("ODSI_JSON", "", 1);
    cr_assert_eq(READ(&f, "--config", path, "--model", "flag.gguf"), ARGS_RUN);
    cr_expect_str_eq(f.settings.model, "flag.gguf");
    cr_expect_eq(f.settings.threads, 3);
    cr_expect_eq(f.settings.memory, 2048);
    cr_expect_eq(f.settings.json, 1, "an empty variable counts as not set");
    cr_expect_eq(f.settings.temperature, 1.0f);
    args_close(&f.args);

    setenv("ODSI_CONFIG", path, 1);
    cr_assert_eq(READ(&f, "--threads=5"), ARGS_RUN);
    cr_expect_str_eq(f.settings.model, "environment.gguf");
    cr_expect_eq(f.settings.threads, 5);
    cr_expect_eq(f.settings.memory, 2048);
    args_close(&f.args);
    unlink(path);
}

Test(args, does_not_read_a_variable_that_means_something_else)
{
    struct fixture f;
    setenv("ODSI_CPU", "scalar,avx2", 1);
    cr_assert_eq(READ(&f, "-j"), ARGS_RUN);
    cr_expect_eq(f.settings.cpu, 0);
    args_close(&f.args);
}

/* Goal: texts from the file stay readable after the file's own memory is gone. */
Test(args, keeps_texts_of_the_file_until_close)
{
    struct fixture f;
    const char text[] = "model = first\r\nmodel = two words # not a comment\r\ntemperature = 0.25";
    cr_assert_eq(read_with_file(&f, text, sizeof text - 1), ARGS_RUN);
    cr_expect_str_eq(f.settings.model, "two words # not a comment");
    cr_expect_eq(f.settings.temperature, 0.25f);
    args_close(&f.args);
}

Test(args, a_program_may_have_its_own_config_option)
{
    struct fixture f;
    fixture_init(&f);
    const char *config = NULL;
    f.options[0] = (struct args_option){"config", 'c', ARGS_TEXT, &config, "FILE", "settings", 0};
    const char *path = config_file("threads = 6\n", 12);
    const char *const argv[] = {"odsi-test", "-c", path};
    cr_assert_eq(args_read(&f.args, &f.program, 3, (char **)argv, &f.rest), ARGS_RUN);
    cr_expect_eq(f.settings.threads, 6);
    cr_expect_str_eq(config, path);
    args_close(&f.args);
    unlink(path);
}

#define COMPLAINT_TEST(claim, part, ...)                                                           \
    Test(args, claim, .init = cr_redirect_stderr)                                                  \
    {                                                                                              \
        struct fixture f;                                                                          \
        cr_assert_eq(READ(&f, __VA_ARGS__), ARGS_EXIT_USAGE);                                      \
        args_close(&f.args);                                                                       \
        assert_complaint(part);                                                                    \
    }

COMPLAINT_TEST(names_an_unknown_option, "--modle is not an option", "--modle=x")
COMPLAINT_TEST(names_an_unknown_short_option, "-q is not an option", "-q")
COMPLAINT_TEST(refuses_joined_short_options, "short options stand alone", "-jt")
COMPLAINT_TEST(refuses_a_value_that_is_missing, "--model needs a value", "--model")
COMPLAINT_TEST(refuses_no_before_an_option_with_a_value, "--no-model is not", "--no-model")
COMPLAINT_TEST(refuses_an_odd_value_of_a_flag, "--json: 'yes' is neither", "--json=yes")
COMPLAINT_TEST(refuses_help_with_a_value, "--help is not an option", "--help=me")

static int is_refused(const char *option, const char *value)
{
    struct fixture f;
    const enum args_outcome outcome = READ(&f, option, value);
    args_close(&f.args);
    return outcome == ARGS_EXIT_USAGE;
}

Test(args, refuses_what_is_not_a_number, .init = cr_redirect_stderr)
{
    const char *const not_u32[] = {"", "-1", "+1", " 1", "1 ", "0x10", "4294967296", "1K", "1.0"};
    for (size_t i = 0; i < sizeof not_u32 / sizeof *not_u32; i++)
        cr_expect(is_refused("--threads", not_u32[i]), "'%s'", not_u32[i]);
    const char *const not_u64[] = {"",          "K", "1k", "1KB", "1P", "18446744073709551616",
                                   "16777216T", "-1"};
    for (size_t i = 0; i < sizeof not_u64 / sizeof *not_u64; i++)
        cr_expect(is_refused("--kv-memory", not_u64[i]), "'%s'", not_u64[i]);
    const char *const not_f32[] = {"", "nan", "inf", "-inf", "1e39", " 1", "1x", "one"};
    for (size_t i = 0; i < sizeof not_f32 / sizeof *not_f32; i++)
        cr_expect(is_refused("--temperature", not_f32[i]), "'%s'", not_f32[i]);
    cr_expect_not(is_refused("--threads", "4294967295"));
    cr_expect_not(is_refused("--kv-memory", "16777215T"));
    cr_expect_not(is_refused("--temperature", "-1.5e-3"));
}

Test(args, names_the_variable_that_is_wrong, .init = cr_redirect_stderr)
{
    struct fixture f;
    setenv("ODSI_KV_MEMORY", "lots", 1);
    cr_assert_eq(READ(&f, "-j"), ARGS_EXIT_USAGE);
    args_close(&f.args);
    assert_complaint("environment variable ODSI_KV_MEMORY: 'lots' is not");
}

#define FILE_COMPLAINT_TEST(claim, part, text)                                                     \
    Test(args, claim, .init = cr_redirect_stderr)                                                  \
    {                                                                                              \
        struct fixture f;                                                                          \
        cr_assert_eq(read_with_file(&f, text, sizeof text - 1), ARGS_EXIT_USAGE);                  \
        args_close(&f.args);                                                                       \
        assert_complaint(part);                                                                    \
    }

FILE_COMPLAINT_TEST(names_the_line_with_an_unknown_name, "line 2: 'modle' is not", "\nmodle = x\n")
FILE_COMPLAINT_TEST(names_the_line_with_a_bad_value, "line 1: threads: 'x' is not", "threads = x")
FILE_COMPLAINT_TEST(names_the_line_without_equals, "line 3: 'json' is not of the", "#\n#\njson\n")
FILE_COMPLAINT_TEST(refuses_a_file_with_nul_bytes, "not a text file", "model = a\0b\n")
FILE_COMPLAINT_TEST(refuses_a_config_file_that_names_another, "'config' is not", "config = x\n")

Test(args, refuses_a_file_that_is_missing_too_large_or_a_folder, .init = cr_redirect_stderr)
{
    struct fixture f;
    cr_expect_eq(READ(&f, "--config", "/nonexistent/odsi.conf"), ARGS_EXIT_USAGE);
    args_close(&f.args);
    cr_expect_eq(READ(&f, "--config", "/"), ARGS_EXIT_USAGE);
    args_close(&f.args);

    const size_t size = ARGS_FILE_SIZE_MAX + 1;
    char *text = NULL;
    cr_assert_eq(alloc_zeroed(&text, size, 1), ODSI_OK);
    memset(text, '#', size);
    cr_expect_eq(read_with_file(&f, text, size), ARGS_EXIT_USAGE);
    args_close(&f.args);
    cr_expect_eq(read_with_file(&f, text, size - 1), ARGS_RUN);
    args_close(&f.args);
    alloc_free(text);
}

/* Reads what the program printed to standard output into text. */
static void read_stdout(char *text, size_t size)
{
    fflush(stdout);
    FILE *stream = cr_get_redirected_stdout();
    text[fread(text, 1, size - 1, stream)] = '\0';
}

Test(args, help_shows_every_option_and_exits_well, .init = cr_redirect_stdout)
{
    struct fixture f;
    char text[8192];
    cr_assert_eq(READ(&f, "--threads", "2", "--help", "--unknown"), ARGS_EXIT_OK);
    read_stdout(text, sizeof text);
    const char *const parts[] = {"Tests how options are read.\n",
                                 "Usage: odsi-test [options] --model FILE\n",
                                 "  -m, --model FILE",
                                 "      --kv-memory SIZE  bytes of KV cache\n",
                                 "  -j, --json",
                                 "      --config FILE",
                                 "  -h, --help",
                                 "      --version",
                                 "  odsi-test --model a.gguf\n"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        cr_expect(strstr(text, parts[i]), "'%s' is not in:\n%s", parts[i], text);
    args_close(&f.args);
    cr_expect_eq(READ(&f, "-h"), ARGS_EXIT_OK);
    args_close(&f.args);
}

Test(args, version_names_program_and_release, .init = cr_redirect_stdout)
{
    struct fixture f;
    char text[256];
    cr_assert_eq(READ(&f, "--version"), ARGS_EXIT_OK);
    args_close(&f.args);
    read_stdout(text, sizeof text);
    cr_expect_eq(strncmp(text, "odsi-test: odsi 0.1.0", 21), 0, "%s", text);
    cr_expect_eq(strncmp(args_version(), "odsi 0.1.0", 10), 0);
}

/* Goal: a list keeps all values of its strongest source in order, and none of a weaker one. */
Test(args, a_list_takes_every_value_of_its_strongest_source)
{
    struct fixture f;
    const char text[] = "stop = one\nstop = two\n";
    cr_assert_eq(read_with_file(&f, text, sizeof text - 1), ARGS_RUN);
    cr_assert_eq(f.settings.stop.count, 2);
    cr_expect_str_eq(f.settings.stop.items[0], "one");
    cr_expect_str_eq(f.settings.stop.items[1], "two");
    args_close(&f.args);

    setenv("ODSI_STOP", "three", 1);
    cr_assert_eq(read_with_file(&f, text, sizeof text - 1), ARGS_RUN);
    cr_assert_eq(f.settings.stop.count, 1);
    cr_expect_str_eq(f.settings.stop.items[0], "three");
    args_close(&f.args);

    cr_assert_eq(READ(&f, "--stop", "a", "--stop=b", "--stop", ""), ARGS_RUN);
    cr_assert_eq(f.settings.stop.count, 3);
    cr_expect_str_eq(f.settings.stop.items[0], "a");
    cr_expect_str_eq(f.settings.stop.items[1], "b");
    cr_expect_str_eq(f.settings.stop.items[2], "");
    args_close(&f.args);
}

/* Goal: a list has room for ARGS_LIST_MAX values; one more is a mistake, not an overflow. */
Test(args, refuses_more_values_than_a_list_holds, .init = cr_redirect_stderr)
{
    struct fixture f;
    char text[32 * (ARGS_LIST_MAX + 1)] = "";
    size_t size = 0;
    for (unsigned i = 0; i < ARGS_LIST_MAX; i++)
        size += (size_t)snprintf(text + size, sizeof text - size, "stop = %u\n", i);
    cr_expect_eq(read_with_file(&f, text, size), ARGS_RUN);
    cr_expect_eq(f.settings.stop.count, ARGS_LIST_MAX);
    args_close(&f.args);
    size += (size_t)snprintf(text + size, sizeof text - size, "stop = over\n");
    cr_expect_eq(read_with_file(&f, text, size), ARGS_EXIT_USAGE);
    args_close(&f.args);
}

/* Goal: no allocation failure crashes, leaks or goes unnoticed.
 * How: fail allocation 1, 2, 3 ... until a run passes untouched. */
Test(args, survives_every_refused_allocation, .init = cr_redirect_stderr)
{
    const char *path = config_file("model = m\nthreads = 2\n", 22);
    enum args_outcome outcome = ARGS_EXIT_USAGE;
    long count = 0;
    for (; outcome != ARGS_RUN && count < 20; count++) {
        struct fixture f;
        alloc_fail_after(count);
        outcome = READ(&f, "--config", path);
        alloc_fail_after(-1);
        args_close(&f.args);
    }
    unlink(path);
    cr_expect_eq(outcome, ARGS_RUN);
    cr_expect_geq(count, 5, "only %ld allocations were refused", count - 1);
}
