/* Conversations through real processes, with the demo model as if it had the chat template of
 * Zephyr: what it answers is nonsense, but always the same nonsense. */
#include "common/base/alloc.h"
#include "tests/support/chat_model.h"
#include "tests/support/swarm.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEMO        "deploy/demo/odsi-tiny-q8_0.gguf"
#define DEMO_LAYERS 6u
#define RUN_US      60000000u
#define WAIT_MS     30000
#define SECRET      "Zanzibar"

static char folder[PROCESS_PATH_SIZE];
static char model[PROCESS_PATH_SIZE];

static void set_up(void)
{
    cr_assert_eq(process_folder_make(folder), ODSI_OK);
    cr_assert_eq(process_path(model, folder, "chat.gguf"), ODSI_OK);
    chat_model_write(model, DEMO, CHAT_MODEL_ZEPHYR);
}

static void tear_down(void)
{
    process_folder_remove(folder);
}

TestSuite(chat, .init = set_up, .fini = tear_down, .timeout = 120);

static void open_swarm(struct swarm *swarm, const char *path)
{
    const struct swarm_config config = {
        .model = path, .layer_count = DEMO_LAYERS, .worker_count = 2};
    swarm_open(swarm, &config);
}

struct said {
    int code;
    char *output;
    char *log;
};

static void said_free(struct said *said)
{
    alloc_free(said->output);
    alloc_free(said->log);
}

/* Runs a script in which $odsi is the program and $at the flags that find the swarm. */
static struct said run(const struct swarm *swarm, const char *script)
{
    static unsigned run_count;
    char all[4096], name[32];
    struct said said = {0};
    struct process *process = NULL;
    snprintf(all, sizeof all,
             "odsi=\"${ODSI_BIN:-build/release/bin}/odsi\"; at='--insecure --gateway %s'; %s",
             swarm->gateway_address, script);
    snprintf(name, sizeof name, "run-%u", run_count++);
    const char *const args[] = {"-c", all, NULL};
    const struct process_config config = {
        .program = "/bin/sh", .args = args, .folder = folder, .name = name};
    cr_assert_eq(process_start(&process, &config), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_wait(process, RUN_US, &said.code), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(process_read_output(&said.output, process), ODSI_OK);
    cr_assert_eq(process_read_log(&said.log, process), ODSI_OK);
    process_close(&process);
    return said;
}

static json_t *object_of(const char *text, size_t line)
{
    for (; line > 0; line--) {
        text = strchr(text, '\n');
        cr_assert_not_null(text);
        text++;
    }
    json_t *object = json_loads(text, JSON_DISABLE_EOF_CHECK, NULL);
    cr_assert(json_is_object(object), "%s", text);
    return object;
}

static const char *text_of(const json_t *object)
{
    return json_string_value(json_object_get(object, "text"));
}

/* Goal: a conversation is its rendered text and nothing else: the same prompt, the same answer.
 * How: ask once in messages and once in the text that the template prints. */
Test(chat, a_question_is_answered_as_the_prompt_it_is_rendered_to)
{
    struct swarm swarm;
    open_swarm(&swarm, model);
    struct said said = run(
        &swarm, "\"$odsi\" generate $at --json -n 40 --chat 'Once upon a time' --system 'Sing.';"
                "\"$odsi\" generate $at --json -n 40 --prompt '<|system|>\nSing.</s>\n<|user|>\n"
                "Once upon a time</s>\n<|assistant|>\n'");
    cr_assert_eq(said.code, 0, "%s", said.log);
    json_t *asked = object_of(said.output, 0);
    json_t *prompted = object_of(said.output, 1);
    cr_expect(json_equal(json_object_get(asked, "tokens"), json_object_get(prompted, "tokens")));
    cr_expect(json_equal(json_object_get(asked, "prompt_tokens"),
                         json_object_get(prompted, "prompt_tokens")));
    cr_expect_gt(strlen(text_of(asked)), 0);
    json_decref(asked);
    json_decref(prompted);
    said_free(&said);
    swarm_close(&swarm);
}

Test(chat, a_conversation_from_a_pipe_is_kept_and_begun_anew)
{
    struct swarm swarm;
    open_swarm(&swarm, model);
    struct said said =
        run(&swarm, "printf 'Once upon a time\\n\\nAnd then?\\r\\n/reset\\n/system X\\n"
                    "/system\\nOnce upon a time\\n/quit\\nnever asked\\n'"
                    " | \"$odsi\" chat $at --json -n 12");
    cr_assert_eq(said.code, 0, "%s", said.log);
    json_t *first = object_of(said.output, 0);
    json_t *second = object_of(said.output, 1);
    json_t *again = object_of(said.output, 2);
    cr_expect_null(strchr(strchr(strchr(strchr(said.output, '\n') + 1, '\n') + 1, '\n') + 1, '\n'),
                   "three answers");
    cr_expect(json_equal(json_object_get(first, "tokens"), json_object_get(again, "tokens")));
    /* What the second question was asked behind. */
    char script[1024];
    snprintf(script, sizeof script,
             "\"$odsi\" generate $at --json -n 12 --prompt '<|user|>\nOnce upon a time</s>\n"
             "<|assistant|>\n%s</s>\n<|user|>\nAnd then?</s>\n<|assistant|>\n'",
             text_of(first));
    cr_assert_null(strchr(text_of(first), '\''), "%s", text_of(first));
    struct said whole = run(&swarm, script);
    json_t *wanted = object_of(whole.output, 0);
    cr_expect_str_eq(text_of(second), text_of(wanted));
    json_decref(first);
    json_decref(second);
    json_decref(again);
    json_decref(wanted);
    said_free(&whole);
    said_free(&said);
    swarm_close(&swarm);
}

Test(chat, prints_the_answers_alone_into_a_pipe)
{
    struct swarm swarm;
    open_swarm(&swarm, model);
    struct said said =
        run(&swarm, "printf 'Once upon a time' | \"$odsi\" chat $at -n 12;"
                    "\"$odsi\" generate $at -n 12 --quiet --chat 'Once upon a time'");
    cr_assert_eq(said.code, 0, "%s", said.log);
    const size_t half = strlen(said.output) / 2;
    cr_expect_eq(memcmp(said.output, said.output + half, half), 0, "%s", said.output);
    cr_expect_str_eq(said.log, "");
    said_free(&said);
    swarm_close(&swarm);
}

static void expect_failure(const struct swarm *swarm, const char *script, int code,
                           const char *words)
{
    struct said said = run(swarm, script);
    cr_expect_eq(said.code, code, "%s: %s", script, said.log);
    cr_expect(strstr(said.log, words), "\"%s\" does not say \"%s\"", said.log, words);
    cr_expect_str_eq(said.output, "");
    said_free(&said);
}

Test(chat, a_model_without_a_template_says_so)
{
    struct swarm swarm;
    open_swarm(&swarm, DEMO);
    expect_failure(&swarm, "echo hello | \"$odsi\" chat $at", 1,
                   "the model's file has no chat template; send a raw prompt instead");
    expect_failure(&swarm, "echo hello | \"$odsi\" chat $at", 1, "odsi generate --prompt TEXT");
    expect_failure(&swarm, "\"$odsi\" generate $at --chat hello", 1, "no chat template");
    swarm_close(&swarm);
}

Test(chat, mistakes_are_told_and_end_a_pipe)
{
    struct swarm swarm = {.gateway_address = "127.0.0.1:1"};
    expect_failure(&swarm, "\"$odsi\" generate $at --chat a --prompt b", 2, "use one of them");
    expect_failure(&swarm, "\"$odsi\" generate $at --system a --prompt b", 2, "goes with --chat");
    expect_failure(&swarm, "\"$odsi\" chat $at hello", 2, "come from standard input");
    expect_failure(&swarm, "\"$odsi\" chat $at --system \"$(printf '\\377')\"", 2, "not UTF-8");
    expect_failure(&swarm, "printf 'a\\377' | \"$odsi\" chat $at", 1, "see its byte 1");
    expect_failure(&swarm, "echo /what | \"$odsi\" chat $at", 1, "no such command");
    expect_failure(&swarm, "echo hello | \"$odsi\" chat $at", 1, "127.0.0.1:1");
    expect_failure(&swarm, "\"$odsi\" chat $at < /dev/null", 0, "");
}

/* Goal: what people write to each other and to a model is nobody's business. */
Test(chat, no_log_has_a_word_of_it)
{
    struct swarm swarm;
    cr_assert_eq(setenv("ODSI_LOG_LEVEL", "debug", 1), 0);
    open_swarm(&swarm, model);
    struct said said = run(&swarm, "printf '" SECRET "\\n" SECRET " again\\n' | \"$odsi\" chat $at "
                                   "-n 12 --system " SECRET);
    cr_assert_eq(said.code, 0, "%s", said.log);
    said_free(&said);
    struct process *const all[] = {swarm.gateway, swarm.coordinator, swarm.workers[0],
                                   swarm.workers[1]};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char *log = NULL;
        cr_assert_eq(process_read_log(&log, all[i]), ODSI_OK);
        cr_expect_null(strstr(log, SECRET), "%s", log);
        alloc_free(log);
    }
    swarm_close(&swarm);
}

/* ---- at a terminal --------------------------------------------------------------------------- */

struct terminal {
    int fd; /* our side */
    pid_t pid;
    char text[1u << 16];
    size_t size;
    size_t seen; /* bytes that an expectation has passed */
};

static void become_odsi(const char *name, const struct swarm *swarm)
{
    const char *bin = getenv("ODSI_BIN");
    char path[PROCESS_PATH_SIZE];
    snprintf(path, sizeof path, "%s/odsi", bin ? bin : "build/release/bin");
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int fd = setsid() > 0 ? open(name, O_RDWR) : -1;
    if (fd >= 0 && ioctl(fd, TIOCSCTTY, 0) == 0 && dup2(fd, 0) == 0 && dup2(fd, 1) == 1 &&
        dup2(fd, 2) == 2 && setenv("TERM", "xterm", 1) == 0)
        execl(path, path, "chat", "--insecure", "-n", "12", "--gateway", swarm->gateway_address,
              (char *)NULL);
    _exit(127);
}

static void terminal_open(struct terminal *self, const struct swarm *swarm)
{
    memset(self, 0, sizeof *self);
    self->fd = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    cr_assert_geq(self->fd, 0);
    cr_assert_eq(grantpt(self->fd), 0);
    cr_assert_eq(unlockpt(self->fd), 0);
    const char *name = ptsname(self->fd);
    cr_assert_not_null(name);
    self->pid = fork();
    cr_assert_geq(self->pid, 0);
    if (self->pid == 0)
        become_odsi(name, swarm);
}

/* Waits until words appear behind what was seen before. */
static void terminal_expect(struct terminal *self, const char *words)
{
    for (;;) {
        const char *found = strstr(self->text + self->seen, words);
        if (found) {
            self->seen = (size_t)(found - self->text) + strlen(words);
            return;
        }
        struct pollfd fd = {.fd = self->fd, .events = POLLIN};
        cr_assert_gt(poll(&fd, 1, WAIT_MS), 0, "no \"%s\" in: %s", words, self->text + self->seen);
        const ssize_t got =
            read(self->fd, self->text + self->size, sizeof self->text - 1 - self->size);
        cr_assert_gt(got, 0, "it ended without \"%s\": %s", words, self->text + self->seen);
        self->size += (size_t)got;
        self->text[self->size] = '\0';
    }
}

static void terminal_type(const struct terminal *self, const char *keys)
{
    cr_assert_eq(write(self->fd, keys, strlen(keys)), (ssize_t)strlen(keys));
}

static void terminal_close(struct terminal *self, int wanted_code)
{
    int status = 0;
    char rest[1024];
    /* What it still writes must be taken, or it cannot end. */
    while (read(self->fd, rest, sizeof rest) > 0)
        ;
    cr_assert_eq(waitpid(self->pid, &status, 0), self->pid);
    cr_expect(WIFEXITED(status) && WEXITSTATUS(status) == wanted_code, "status %x", status);
    close(self->fd);
}

/* Waits until the gateway chose the path of that many answers: then they are under way. */
static void wait_for_answers(const struct swarm *swarm, uint32_t wanted)
{
    for (int left_ms = WAIT_MS; left_ms > 0; left_ms -= 10) {
        char *log = NULL;
        uint32_t found = 0;
        cr_assert_eq(process_read_log(&log, swarm->gateway), ODSI_OK);
        for (const char *at = log; (at = strstr(at, ", stage 1: ")) != NULL; at++)
            found++;
        alloc_free(log);
        if (found >= wanted)
            return;
        poll(NULL, 0, 10);
    }
    cr_assert_fail("the gateway has not begun %u answers", wanted);
}

/* Goal: Ctrl-C stops an answer and nothing else; at the prompt it leaves.
 * How: a worker is held still, so that the answer cannot end by itself. */
Test(chat, ctrl_c_stops_an_answer_and_then_leaves)
{
    struct swarm swarm;
    static struct terminal terminal;
    cr_assert_eq(setenv("ODSI_LOG_LEVEL", "debug", 1), 0);
    open_swarm(&swarm, model);
    terminal_open(&terminal, &swarm);
    terminal_expect(&terminal, "/help lists");
    terminal_expect(&terminal, "> ");
    terminal_type(&terminal, "Once upon a time\n");
    terminal_expect(&terminal, "12 tokens after ");
    terminal_expect(&terminal, "tokens/s");
    terminal_expect(&terminal, "> ");
    process_signal(swarm.workers[1], SIGSTOP);
    terminal_type(&terminal, "And then?\n");
    terminal_expect(&terminal, "And then?");
    wait_for_answers(&swarm, 2);
    terminal_type(&terminal, "\003");
    terminal_expect(&terminal, "> ");
    process_signal(swarm.workers[1], SIGCONT);
    terminal_type(&terminal, "/what\n");
    terminal_expect(&terminal, "no such command");
    terminal_expect(&terminal, "> ");
    terminal_type(&terminal, "/reset\n");
    terminal_expect(&terminal, "(a new conversation)");
    terminal_expect(&terminal, "> ");
    terminal_type(&terminal, "Once upon a time\n");
    terminal_expect(&terminal, "12 tokens after ");
    terminal_expect(&terminal, "> ");
    terminal_type(&terminal, "half a line\003");
    terminal_close(&terminal, 0);
    swarm_close(&swarm);
}

Test(chat, the_end_of_input_and_a_signal_leave)
{
    struct swarm swarm;
    static struct terminal terminal;
    open_swarm(&swarm, model);
    terminal_open(&terminal, &swarm);
    terminal_expect(&terminal, "> ");
    terminal_type(&terminal, "\004");
    terminal_close(&terminal, 0);
    terminal_open(&terminal, &swarm);
    terminal_expect(&terminal, "> ");
    process_signal(swarm.workers[1], SIGSTOP);
    terminal_type(&terminal, "Once upon a time\n");
    terminal_expect(&terminal, "Once upon a time");
    cr_assert_eq(kill(terminal.pid, SIGTERM), 0);
    terminal_close(&terminal, 0);
    process_signal(swarm.workers[1], SIGCONT);
    swarm_close(&swarm);
}
