#include "worker/cli/cmd.h"

#include "common/base/args.h"
#include "worker/cli/cli_client.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_json.h"
#include "worker/cli/cli_sampling.h"
#include "worker/cli/cli_table.h"
#include "worker/cli/cli_term.h"
#include "worker/cli/cli_text.h"

#include <stdio.h>
#include <string.h>

#define GATEWAY_DEFAULT "127.0.0.1:7800"

struct options {
    const char *gateway;
    int is_insecure;
    const char *identity;
    const char *prompt;
    const char *prompt_file;
    const char *model;
    uint32_t max_tokens;
    uint32_t deadline_ms;
    struct cli_sampling sampling;
    int is_json;
    int is_quiet;
    int with_hops;
    int is_echo;
};

/* ---- output ---------------------------------------------------------------------------------- */

static void show_piece(void *context, const struct cli_answer *answer, uint32_t token_count,
                       size_t text_size)
{
    const int *is_terminal = context;
    (void)token_count;
    if (text_size == 0)
        return;
    const char *text = (const char *)answer->text.data + answer->text.size - text_size;
    cli_text_show(stdout, *is_terminal, text, text_size);
    fflush(stdout);
}

static double tokens_per_s(const struct cli_answer *answer)
{
    /* The first token belongs to the prompt's time. */
    if (answer->new_token_count < 2 || answer->total_us <= answer->first_token_us)
        return 0;
    return (double)(answer->new_token_count - 1) * 1e6 /
           (double)(answer->total_us - answer->first_token_us);
}

static enum odsi_err show_hops(const struct cli_answer *answer)
{
    static const struct cli_column columns[] = {{"stage", 1}, {"worker", 0},  {"layers", 0},
                                                {"queue", 1}, {"compute", 1}, {"network", 1},
                                                {"slack", 1}};
    struct cli_table table;
    cli_table_init(&table, columns, sizeof columns / sizeof *columns);
    for (uint32_t i = 0; i < answer->hop_count; i++) {
        const struct cli_hop_row *hop = &answer->hops[i];
        char id[DIGEST_HEX_SIZE], text[CLI_TEXT_SIZE];
        digest_to_hex(id, &hop->worker_id);
        cli_table_cell(&table, "%u", i);
        cli_table_cell(&table, "%.8s", id);
        cli_text_layers(text, hop->layer_first, hop->layer_end);
        cli_table_cell(&table, "%s", text);
        const int64_t times[] = {hop->queue_us, hop->compute_us, hop->network_us, hop->slack_us};
        for (size_t t = 0; t < sizeof times / sizeof *times; t++) {
            cli_text_duration(text, times[t]);
            cli_table_cell(&table, "%s", text);
        }
    }
    const enum odsi_err err = cli_table_print(&table, stderr);
    cli_table_free(&table);
    return err;
}

static enum odsi_err show_summary(const struct cli_answer *answer)
{
    char first[CLI_TEXT_SIZE];
    fputs(cli_term_dim(stderr), stderr);
    const enum odsi_err err = show_hops(answer);
    cli_text_duration(first, (int64_t)answer->first_token_us);
    fprintf(stderr, "%u tokens after %u of prompt (%s), first after %s, then %.1f tokens/s%s\n",
            answer->new_token_count, answer->prompt_token_count, answer->finish_reason, first,
            tokens_per_s(answer), cli_term_plain(stderr));
    return err;
}

static json_t *hops_json(const struct cli_answer *answer)
{
    json_t *list = json_array();
    int bad = 0;
    for (uint32_t i = 0; i < answer->hop_count; i++) {
        const struct cli_hop_row *hop = &answer->hops[i];
        bad |= json_array_append_new(
            list, json_pack("{s:I, s:o, s:o, s:o, s:I, s:I, s:I, s:I, s:I}", "stage", (json_int_t)i,
                            "worker", cli_json_digest(&hop->worker_id), "address",
                            cli_json_text(hop->address, strlen(hop->address)), "layers",
                            cli_json_layers(hop->layer_first, hop->layer_end), "queue_us",
                            (json_int_t)hop->queue_us, "compute_us", (json_int_t)hop->compute_us,
                            "network_us", (json_int_t)hop->network_us, "slack_us",
                            (json_int_t)hop->slack_us, "steps", (json_int_t)hop->step_count));
    }
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static json_t *logprobs_json(const struct cli_answer *answer)
{
    json_t *list = json_array();
    int bad = 0;
    for (uint32_t i = 0; i < answer->token_count; i++)
        bad |= json_array_append_new(list, cli_json_f64((double)answer->logprobs[i]));
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static enum odsi_err print_json(struct cli_answer *answer)
{
    const char *text = buf_text_view(&answer->text);
    json_t *timings = json_pack(
        "{s:o, s:o, s:o}", "first_token_us", cli_json_u64(answer->first_token_us), "total_us",
        cli_json_u64(answer->total_us), "tokens_per_s", cli_json_f64(tokens_per_s(answer)));
    return cli_json_print(
        json_pack("{s:s, s:o, s:I, s:I, s:o, s:o, s:o, s:s, s:o, s:o, s:o}", "session",
                  answer->session, "model_id", cli_json_digest(&answer->model_id), "numerics",
                  (json_int_t)answer->numerics_version, "prompt_tokens",
                  (json_int_t)answer->prompt_token_count, "tokens",
                  cli_json_ids(answer->tokens, answer->token_count), "logprobs",
                  logprobs_json(answer), "text", cli_json_text(text, answer->text.size),
                  "finish_reason", answer->finish_reason, "seed", cli_json_u64(answer->seed),
                  "timings", timings, "hops", hops_json(answer)),
        stdout);
}

/* ---- the call -------------------------------------------------------------------------------- */

static void finish_text(const struct cli_answer *answer)
{
    const struct buf *text = &answer->text;
    if (cli_term_is(stdout) || (text->size > 0 && text->data[text->size - 1] != '\n'))
        putchar('\n');
    fflush(stdout);
}

static enum odsi_err run(const struct options *options, const struct buf *prompt)
{
    int is_terminal = cli_term_is(stdout);
    struct cli_client *client = NULL;
    struct cli_answer answer = {0};
    const struct cli_answer_events events = {.on_piece = options->is_json ? NULL : show_piece};
    const struct cli_request request = {
        .model = options->model,
        .prompt = prompt->size ? (const char *)prompt->data : "",
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
    enum odsi_err err = cli_client_open(&client, &config);
    if (err == ODSI_OK && !options->is_json && !options->is_quiet &&
        (is_terminal || options->is_echo)) {
        fputs(cli_term_dim(stdout), stdout);
        cli_text_show(stdout, is_terminal, request.prompt, prompt->size);
        fputs(cli_term_plain(stdout), stdout);
        fflush(stdout);
    }
    if (err == ODSI_OK)
        err = cli_client_generate_start(client, &answer, &request, &events, &is_terminal);
    if (err == ODSI_OK) {
        cli_client_run(client);
        err = answer.err;
        if (!options->is_json)
            finish_text(&answer);
        if (err != ODSI_OK)
            odsi_fail(err, "%s", answer.err_text);
    }
    if (err == ODSI_OK && options->is_json)
        err = print_json(&answer);
    else if (err == ODSI_OK && !options->is_quiet && (options->with_hops || cli_term_is(stderr)))
        err = show_summary(&answer);
    if (err == ODSI_OK && ferror(stdout))
        err = odsi_fail(ODSI_ERR_IO, "writing the text failed");
    cli_client_answer_free(&answer);
    cli_client_close(&client);
    return err;
}

static int check_and_run(struct options *options, int argc, char **argv, int rest)
{
    static const char command[] = "generate";
    struct buf prompt;
    if (rest < argc && strcmp(argv[rest], "-") == 0 && !options->prompt_file)
        options->prompt_file = argv[rest++];
    if (rest < argc)
        return cli_input_usage(command, "'%s' is not an option; the text goes behind --prompt",
                               argv[rest]);
    enum odsi_err err = cli_input_prompt(&prompt, options->prompt, options->prompt_file);
    int code = CMD_OK;
    if (err == ODSI_ERR_INVALID)
        code = cli_input_usage(command, "%s", odsi_err_text());
    else if (err != ODSI_OK || (err = run(options, &prompt)) != ODSI_OK)
        code = cli_input_failed(command, err);
    buf_free(&prompt);
    return code;
}

int cmd_generate_run(int argc, char **argv)
{
    struct options options = {.gateway = GATEWAY_DEFAULT};
    const struct args_option table[] = {
        {"gateway", 'g', ARGS_TEXT, &options.gateway, "[ID@]HOST:PORT",
         "where to ask (" GATEWAY_DEFAULT ")"},
        {"insecure", 0, ARGS_FLAG, &options.is_insecure, NULL,
         "no encryption; only to this machine"},
        {"identity", 0, ARGS_TEXT, &options.identity, "FILE", "our key (identity.pem at home)"},
        {"prompt", 'p', ARGS_TEXT, &options.prompt, "TEXT", "the text to continue"},
        {"prompt-file", 'f', ARGS_TEXT, &options.prompt_file, "FILE",
         "the same from a file; '-': standard input"},
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
        .usage = "[options] --prompt TEXT | --prompt-file FILE | -",
        .examples = "  odsi generate --prompt \"Once upon a time\" --max-tokens 64\n"
                    "  odsi generate -t 0.8 --top-p 0.95 --seed 7 -p \"One windy day\" --json\n"
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
