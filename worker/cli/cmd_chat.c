#include "worker/cli/cmd.h"

#include "common/base/args.h"
#include "worker/cli/cli_answer.h"
#include "worker/cli/cli_chat.h"
#include "worker/cli/cli_client.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_lines.h"
#include "worker/cli/cli_sampling.h"
#include "worker/cli/cli_term.h"
#include "worker/cli/cli_text.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

static const char command[] = "chat";

struct options {
    const char *gateway;
    int is_insecure;
    const char *identity;
    const char *model;
    const char *system;
    uint32_t max_tokens;
    uint32_t deadline_ms;
    struct cli_sampling sampling;
    int is_json;
};

struct talk {
    const struct options *options;
    struct cli_client *client;
    struct cli_chat chat;
    struct cli_lines lines;
    int signal_fd;      /* SIGINT and SIGTERM; -1: not open */
    int is_interactive; /* somebody types, and reads */
    int is_terminal;    /* standard output is one */
    int is_over;
};

/* ---- signals --------------------------------------------------------------------------------- */

/* The signals come by a descriptor, which may be looked at while a line is awaited and while an
 * answer comes. To be called before any thread is started, since threads inherit the mask. */
static enum odsi_err open_signals(struct talk *self)
{
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGTERM);
    if (pthread_sigmask(SIG_BLOCK, &set, NULL) == 0 && sigaction(SIGPIPE, &ignore, NULL) == 0)
        self->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (self->signal_fd >= 0)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_IO, "cannot wait for signals: %s", strerror(errno));
}

/* Takes the signals that came. Returns 1 when one of them ends the program in any case. */
static int take_signals(struct talk *self)
{
    struct signalfd_siginfo info;
    int is_end = 0;
    while (read(self->signal_fd, &info, sizeof info) == (ssize_t)sizeof info)
        is_end |= info.ssi_signo == SIGTERM;
    return is_end;
}

/* ---- one answer ------------------------------------------------------------------------------ */

/* A stopped answer stays as far as it came, since people refer to it; one that failed or never
 * began is taken back with its question, which may be asked again. */
static enum odsi_err keep_answer(struct talk *self, const struct cli_answer *answer)
{
    const struct buf *text = &answer->text;
    const int is_stopped = answer->err == ODSI_ERR_CANCELLED && text->size > 0;
    if (answer->err == ODSI_OK || is_stopped)
        return cli_chat_add(&self->chat, "assistant", (const char *)text->data, text->size);
    cli_chat_drop_last(&self->chat);
    return ODSI_OK;
}

static enum odsi_err show_end(struct talk *self, struct cli_answer *answer)
{
    if (self->options->is_json)
        return answer->err == ODSI_OK ? cli_answer_print_json(answer) : ODSI_OK;
    cli_answer_end_text(answer);
    if (answer->err == ODSI_OK && self->is_interactive && cli_term_is(stderr))
        return cli_answer_show_figures(answer, 0);
    return ODSI_OK;
}

/* Whether the conversation may go on after an answer that failed. */
static enum odsi_err judge(struct talk *self, const struct cli_answer *answer)
{
    const enum odsi_err err = answer->err;
    if (err == ODSI_ERR_CANCELLED && take_signals(self))
        self->is_over = 1;
    if (err == ODSI_OK || (err == ODSI_ERR_CANCELLED && self->is_interactive))
        return ODSI_OK;
    odsi_fail(err, "%s%s", answer->err_text,
              err == ODSI_ERR_UNSUPPORTED ? " ('odsi generate --prompt TEXT' does)" : "");
    /* Nobody is there to type something else, or no question to this model can be answered. */
    if (!self->is_interactive || err == ODSI_ERR_UNSUPPORTED)
        return err;
    cli_input_failed(command, err);
    if (err == ODSI_ERR_RANGE)
        fprintf(stderr, "(/reset begins a new conversation)\n");
    return ODSI_OK;
}

/* Lets the model answer the last turn. */
static enum odsi_err answer_turn(struct talk *self)
{
    const struct options *options = self->options;
    struct cli_answer answer = {0};
    const struct cli_answer_events events = {.on_piece =
                                                 options->is_json ? NULL : cli_answer_show_piece};
    struct cli_request request = {
        .model = options->model,
        .max_tokens = options->max_tokens,
        .deadline_ms = options->deadline_ms,
        .sampling = &options->sampling,
    };
    request.messages = cli_chat_view(&self->chat, &request.message_count);
    if (cli_client_generate_start(self->client, &answer, &request, &events, &self->is_terminal) ==
        ODSI_OK)
        cli_client_run_until(self->client, self->signal_fd);
    enum odsi_err err = show_end(self, &answer);
    if (err == ODSI_OK)
        err = keep_answer(self, &answer);
    if (err == ODSI_OK)
        err = judge(self, &answer);
    if (err == ODSI_OK && ferror(stdout))
        err = odsi_fail(ODSI_ERR_IO, "writing the text failed");
    cli_client_answer_free(&answer);
    return err;
}

/* ---- lines ----------------------------------------------------------------------------------- */

static enum odsi_err check_text(const char *text, size_t size)
{
    for (size_t at = 0; at < size;) {
        const size_t length = cli_text_utf8(text, size, at);
        if (length == 0 || text[at] == '\0')
            return odsi_fail(ODSI_ERR_INVALID, "this line is not UTF-8 text: see its byte %zu", at);
        at += length;
    }
    return ODSI_OK;
}

static void tell(const struct talk *self, const char *text)
{
    if (self->is_interactive)
        fprintf(stderr, "%s%s%s\n", cli_term_dim(stderr), text, cli_term_plain(stderr));
}

static enum odsi_err take_line(struct talk *self, const char *line, size_t line_size)
{
    const char *text = NULL;
    size_t size = 0;
    enum odsi_err err = check_text(line, line_size);
    if (err != ODSI_OK)
        return err;
    switch (cli_chat_read(line, line_size, &text, &size)) {
    case CLI_CHAT_SAY:
        err = cli_chat_add(&self->chat, "user", text, size);
        return err == ODSI_OK ? answer_turn(self) : err;
    case CLI_CHAT_NOTHING:
        return ODSI_OK;
    case CLI_CHAT_QUIT:
        self->is_over = 1;
        return ODSI_OK;
    case CLI_CHAT_RESET:
        cli_chat_reset(&self->chat);
        tell(self, "(a new conversation)");
        return ODSI_OK;
    case CLI_CHAT_SYSTEM:
        tell(self, size > 0 ? "(a new system message)" : "(no system message)");
        return cli_chat_set_system(&self->chat, text, size);
    case CLI_CHAT_HELP:
        tell(self, "/reset begins a new conversation, /system TEXT tells the model how to answer,\n"
                   "/quit or Ctrl-D leaves, Ctrl-C stops an answer; // begins a line with a /");
        return ODSI_OK;
    case CLI_CHAT_UNKNOWN:
        break;
    }
    return odsi_fail(ODSI_ERR_INVALID,
                     "no such command; /help lists them, and a line that is meant "
                     "to begin with a / begins with two");
}

/* Reads lines until the end, a command, a signal or a failure. */
static enum odsi_err talk_on(struct talk *self)
{
    enum odsi_err err = ODSI_OK;
    while (!self->is_over && err == ODSI_OK) {
        const char *line = NULL;
        size_t size = 0;
        if (self->is_interactive) {
            fputs("> ", stdout);
            fflush(stdout);
        }
        switch (cli_lines_next(&self->lines, &line, &size)) {
        case CLI_LINES_LINE:
            err = take_line(self, line, size);
            break;
        case CLI_LINES_END:
            self->is_over = 1;
            tell(self, "");
            break;
        case CLI_LINES_CALLED:
            take_signals(self);
            self->is_over = 1;
            tell(self, "");
            if (!self->is_interactive)
                err = odsi_fail(ODSI_ERR_CANCELLED, "cancelled");
            break;
        case CLI_LINES_FAILED:
            return ODSI_ERR_IO;
        }
        /* A slip of the one who types is told, and nothing else happens. */
        if (err == ODSI_ERR_INVALID && self->is_interactive) {
            cli_input_failed(command, err);
            err = ODSI_OK;
        }
    }
    return err;
}

/* ---- the command ----------------------------------------------------------------------------- */

static enum odsi_err run(const struct options *options, const struct buf *system)
{
    struct talk self = {.options = options, .signal_fd = -1};
    self.is_terminal = cli_term_is(stdout);
    self.is_interactive = self.is_terminal && isatty(STDIN_FILENO) && !options->is_json;
    const struct cli_client_config config = {
        .peer = options->gateway,
        .is_insecure = options->is_insecure,
        .identity_path = options->identity,
    };
    enum odsi_err err = open_signals(&self);
    cli_lines_init(&self.lines, STDIN_FILENO, self.signal_fd, LIMIT_PROMPT_SIZE);
    if (err == ODSI_OK)
        err = cli_client_open(&self.client, &config);
    if (err == ODSI_OK)
        err = cli_chat_set_system(&self.chat, (const char *)system->data, system->size);
    if (err == ODSI_OK) {
        tell(&self, "(/help lists the commands; Ctrl-D leaves)");
        err = talk_on(&self);
    }
    cli_client_close(&self.client);
    cli_chat_free(&self.chat);
    cli_lines_free(&self.lines);
    if (self.signal_fd >= 0)
        close(self.signal_fd);
    return err;
}

static int check_and_run(const struct options *options, int argc, char **argv, int rest)
{
    struct buf system;
    if (rest < argc)
        return cli_input_usage(command, "'%s' is not an option; questions come from standard input",
                               argv[rest]);
    enum odsi_err err = cli_input_prompt(&system, options->system ? options->system : "", NULL);
    int code = CMD_OK;
    if (err != ODSI_OK)
        code = cli_input_usage(command, "--system: %s", odsi_err_text());
    else if ((err = run(options, &system)) != ODSI_OK)
        code = cli_input_failed(command, err);
    buf_free(&system);
    return code;
}

int cmd_chat_run(int argc, char **argv)
{
    struct options options = {.gateway = CLI_GATEWAY_DEFAULT};
    const struct args_option table[] = {
        CLI_GATEWAY_OPTIONS(options),
        {"model", 'm', ARGS_TEXT, &options.model, "NAME",
         "name or id; needed when several are served", 1},
        {"system", 0, ARGS_TEXT, &options.system, "TEXT", "how it is to answer", 1},
        {"max-tokens", 'n', ARGS_U32, &options.max_tokens, "N",
         "of an answer; 0 (default): until the model ends"},
        {"deadline-ms", 0, ARGS_U32, &options.deadline_ms, "MS", "for a whole answer"},
        CLI_SAMPLING_OPTIONS(options.sampling),
        {"json", 0, ARGS_FLAG, &options.is_json, NULL, "one object per answer"},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi chat",
        .summary = "Talks with a model through a swarm: a line is a turn, and the answer streams.",
        .usage = "[options]",
        .examples = "  odsi chat --system \"You are brief.\" -t 0.7 --top-p 0.9\n"
                    "  odsi chat --gateway gate.example:7800 --json < questions.txt\n",
        .options = table,
    };
    struct args *args = NULL;
    int rest = 0;
    int code = CMD_USAGE;
    switch (args_read(&args, &program, argc, argv, &rest)) {
    case ARGS_RUN:
        code = check_and_run(&options, argc, argv, rest);
        break;
    case ARGS_EXIT_OK:
        code = CMD_OK;
        break;
    case ARGS_EXIT_USAGE:
        break;
    }
    args_close(&args);
    return code;
}
