#include "worker/cli/cmd.h"

#include "common/base/args.h"
#include "worker/cli/cli_answer.h"
#include "worker/cli/cli_chat.h"
#include "worker/cli/cli_client.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_sampling.h"
#include "worker/cli/cli_term.h"
#include "worker/cli/cli_text.h"

#include <stdio.h>
#include <string.h>

struct options {
    const char *gateway;
    int is_insecure;
    const char *identity;
    const char *prompt;
    const char *prompt_file;
    const char *chat;
    const char *system;
    const char *model;
    uint32_t max_tokens;
    uint32_t deadline_ms;
    struct cli_sampling sampling;
    int is_json;
    int is_quiet;
    int with_hops;
    int is_echo;
};

/* prompt is the text to continue, or with a chat the question in it. */
static enum odsi_err run(const struct options *options, const struct buf *prompt,
                         struct cli_chat *chat)
{
    int is_terminal = cli_term_is(stdout);
    struct cli_client *client = NULL;
    struct cli_answer answer = {0};
    const struct cli_answer_events events = {.on_piece =
                                                 options->is_json ? NULL : cli_answer_show_piece};
    const char *text = prompt->size ? (const char *)prompt->data : "";
    struct cli_request request = {
        .model = options->model,
        .prompt = options->chat ? NULL : text,
        .max_tokens = options->max_tokens,
        .deadline_ms = options->deadline_ms,
        .sampling = &options->sampling,
    };
    const struct cli_client_config config = {
        .peer = options->gateway,
        .is_insecure = options->is_insecure,
        .identity_path = options->identity,
        .is_cancelled_by_signal = 1,
    };
    request.messages = cli_chat_view(chat, &request.message_count);
    enum odsi_err err = cli_client_open(&client, &config);
    if (err == ODSI_OK && !options->is_json && !options->is_quiet &&
        (is_terminal || options->is_echo)) {
        fputs(cli_term_dim(stdout), stdout);
        cli_text_show(stdout, is_terminal, text, prompt->size);
        fputs(options->chat ? "\n" : "", stdout);
        fputs(cli_term_plain(stdout), stdout);
        fflush(stdout);
    }
    if (err == ODSI_OK)
        err = cli_client_generate_start(client, &answer, &request, &events, &is_terminal);
    if (err == ODSI_OK) {
        cli_client_run(client);
        err = answer.err;
        if (!options->is_json)
            cli_answer_end_text(&answer);
        if (err != ODSI_OK)
            odsi_fail(err, "%s", answer.err_text);
    }
    if (err == ODSI_OK && options->is_json)
        err = cli_answer_print_json(&answer);
    else if (err == ODSI_OK && !options->is_quiet && (options->with_hops || cli_term_is(stderr)))
        err = cli_answer_show_figures(&answer, 1);
    if (err == ODSI_OK && ferror(stdout))
        err = odsi_fail(ODSI_ERR_IO, "writing the text failed");
    cli_client_answer_free(&answer);
    cli_client_close(&client);
    return err;
}

static enum odsi_err make_chat(struct cli_chat *out, const struct options *options,
                               const struct buf *question)
{
    struct buf system;
    enum odsi_err err = cli_input_prompt(&system, options->system ? options->system : "", NULL);
    if (err == ODSI_OK)
        err = cli_chat_set_system(out, (const char *)system.data, system.size);
    else
        odsi_fail_prefix(err, "--system");
    buf_free(&system);
    if (err == ODSI_OK)
        err = cli_chat_add(out, "user", (const char *)question->data, question->size);
    return err;
}

static int check_and_run(struct options *options, int argc, char **argv, int rest)
{
    static const char command[] = "generate";
    struct buf prompt;
    struct cli_chat chat = {0};
    if (rest < argc && strcmp(argv[rest], "-") == 0 && !options->prompt_file)
        options->prompt_file = argv[rest++];
    if (rest < argc)
        return cli_input_usage(command, "'%s' is not an option; the text goes behind --prompt",
                               argv[rest]);
    if (options->chat && (options->prompt || options->prompt_file))
        return cli_input_usage(command, "--chat is a prompt already; use one of them");
    if (options->system && !options->chat)
        return cli_input_usage(command, "--system goes with --chat");
    enum odsi_err err = cli_input_prompt(&prompt, options->chat ? options->chat : options->prompt,
                                         options->prompt_file);
    if (err == ODSI_OK && options->chat)
        err = make_chat(&chat, options, &prompt);
    int code = CMD_OK;
    if (err == ODSI_ERR_INVALID)
        code = cli_input_usage(command, "%s", odsi_err_text());
    else if (err != ODSI_OK || (err = run(options, &prompt, &chat)) != ODSI_OK)
        code = cli_input_failed(command, err);
    cli_chat_free(&chat);
    buf_free(&prompt);
    return code;
}

int cmd_generate_run(int argc, char **argv)
{
    struct options options = {.gateway = CLI_GATEWAY_DEFAULT};
    const struct args_option table[] = {
        CLI_GATEWAY_OPTIONS(options),
        {"prompt", 'p', ARGS_TEXT, &options.prompt, "TEXT", "the text to continue"},
        {"prompt-file", 'f', ARGS_TEXT, &options.prompt_file, "FILE",
         "the same from a file; '-': standard input"},
        {"chat", 'c', ARGS_TEXT, &options.chat, "TEXT",
         "a question instead, asked the way the model was trained", 1},
        {"system", 0, ARGS_TEXT, &options.system, "TEXT", "with --chat: how it is to answer", 1},
        {"model", 'm', ARGS_TEXT, &options.model, "NAME",
         "name or id; needed when several are served", 1},
        {"max-tokens", 'n', ARGS_U32, &options.max_tokens, "N",
         "0 (default): until the model ends"},
        {"deadline-ms", 0, ARGS_U32, &options.deadline_ms, "MS", "for the whole answer"},
        CLI_SAMPLING_OPTIONS(options.sampling),
        {"json", 0, ARGS_FLAG, &options.is_json, NULL, "one object when the answer is whole"},
        {"quiet", 'q', ARGS_FLAG, &options.is_quiet, NULL, "the text alone"},
        {"hops", 0, ARGS_FLAG, &options.with_hops, NULL,
         "where the time went, also without a terminal"},
        {"echo", 0, ARGS_FLAG, &options.is_echo, NULL,
         "the prompt in front, also without a terminal"},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi generate",
        .summary = "Continues a text through a swarm and prints it as it comes.",
        .usage = "[options] --prompt TEXT | --prompt-file FILE | --chat TEXT | -",
        .examples =
            "  odsi generate --prompt \"Once upon a time\" --max-tokens 64\n"
            "  odsi generate -t 0.8 --top-p 0.95 --seed 7 -p \"One windy day\" --json\n"
            "  odsi generate --chat \"Why is the sky blue?\" --system \"Answer in one line.\"\n"
            "  odsi generate --gateway gate.example:7800 --stop \"###\" - < question.txt\n",
        .options = table,
    };
    struct args *args = NULL;
    int rest = 0;
    int code = CMD_USAGE;
    /* "-" may stand before the options too. */
    if (argc > 1 && strcmp(argv[1], "-") == 0) {
        options.prompt_file = argv[1];
        argc--;
        argv++;
    }
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
