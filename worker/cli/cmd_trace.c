#include "worker/cli/cmd.h"

#include "common/base/alloc.h"
#include "common/base/args.h"
#include "worker/cli/cli_engine.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_json.h"
#include "worker/cli/cli_text.h"
#include "worker/cli/cli_trace.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define TOP_COUNT 5u

static const char command_name[] = "trace";

struct options {
    const char *model;
    const char *tokens;
    const char *prompt;
    const char *prompt_file;
    const char *backend;
    uint32_t thread_count;
    uint32_t chunk;
    uint32_t new_tokens_max;
    uint32_t neighbour_count;
    struct cli_sampling sampling;
    int is_json;
    int with_positions;
};

/* What --positions collects: a list of the largest logits for each token. */
struct positions {
    uint32_t vocab_size;
    json_t *list;
};

/* The tokens to trace; *out is ended with alloc_free. */
static enum odsi_err read_tokens(const struct options *options, const struct cli_engine *engine,
                                 const struct buf *prompt, uint32_t **out, uint32_t *count)
{
    const uint32_t context = model_params_view(engine->model)->context_length;
    const char *text = prompt->size ? (const char *)prompt->data : "";
    enum odsi_err err = alloc_zeroed(out, context, sizeof **out);
    *count = context;
    if (err != ODSI_OK)
        return err;
    if (options->tokens)
        err = cli_text_read_ids(options->tokens, *out, count);
    else
        err = tokenizer_encode(engine->tokenizer, text, prompt->size,
                               TOKENIZER_BOS | TOKENIZER_SPECIAL, *out, count);
    if (err == ODSI_ERR_RANGE)
        odsi_fail(err, "more tokens than the %" PRIu32 " positions of this model", context);
    if (err == ODSI_OK && *count == 0)
        err = odsi_fail(ODSI_ERR_INVALID, "no tokens to trace");
    if (err == ODSI_OK && options->new_tokens_max > context - *count)
        err = odsi_fail(ODSI_ERR_RANGE,
                        "%" PRIu32 " tokens and %" PRIu32 " new ones: this model has %" PRIu32
                        " positions",
                        *count, options->new_tokens_max, context);
    return err;
}

/* ---- output ---------------------------------------------------------------------------------- */

static enum odsi_err add_position(void *context, const float *logits)
{
    struct positions *self = context;
    if (json_array_append_new(self->list, cli_json_top(logits, self->vocab_size, TOP_COUNT)) != 0)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for the logits of all positions");
    return ODSI_OK;
}

/* One line of "id logit" pairs for each position. */
static void print_positions(const json_t *list)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *top = json_array_get(list, i);
        printf("%-9zu", i);
        for (size_t k = 0; k < json_array_size(top); k++) {
            const json_t *pair = json_array_get(top, k);
            printf(" %" JSON_INTEGER_FORMAT " %.4f ", json_integer_value(json_array_get(pair, 0)),
                   json_number_value(json_array_get(pair, 1)));
        }
        putchar('\n');
    }
}

static json_t *layers_json(const struct cli_trace *trace, uint32_t layer_count)
{
    json_t *list = json_array();
    int bad = 0;
    for (uint32_t i = 0; i < layer_count; i++)
        bad |= json_array_append_new(list, cli_json_digest(&trace->layers[i]));
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static uint32_t argmax(const float *logits, uint32_t count)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < count; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

static enum odsi_err print_json(const struct cli_engine *engine,
                                const struct cli_trace_config *config, struct cli_trace *trace,
                                json_t *positions)
{
    const struct model_params *params = model_params_view(engine->model);
    json_t *object = json_pack(
        "{s:o, s:I, s:s, s:I, s:I, s:o, s:o, s:o, s:I, s:o}", "model_id",
        cli_json_digest(model_id_view(engine->model)), "numerics", (json_int_t)NUMERICS_VERSION,
        "backend", cli_engine_backend_view(engine), "threads",
        (json_int_t)cli_engine_thread_count(engine), "chunk", (json_int_t)config->chunk,
        "prompt_tokens", cli_json_ids(config->tokens, config->token_count), "layers",
        layers_json(trace, params->layer_count), "logits_sha256",
        cli_json_digest(&trace->logits_id), "argmax",
        (json_int_t)argmax(trace->logits, params->vocab_size), "top",
        cli_json_top(trace->logits, params->vocab_size, TOP_COUNT));
    if (object && config->new_tokens_max > 0) {
        const char *text = buf_text_view(&trace->text);
        json_t *answer = json_pack(
            "{s:o, s:o, s:s}", "tokens", cli_json_ids(trace->new_tokens, trace->new_token_count),
            "text", cli_json_text(text, trace->text.size), "finish_reason", trace->finish_reason);
        const int bad = json_object_update(object, answer);
        json_decref(answer);
        if (bad) {
            json_decref(object);
            object = NULL;
        }
    }
    if (object && positions && json_object_set(object, "positions", positions) != 0) {
        json_decref(object);
        object = NULL;
    }
    return cli_json_print(object, stdout);
}

static enum odsi_err print_text(const struct cli_engine *engine,
                                const struct cli_trace_config *config, struct cli_trace *trace,
                                const json_t *positions)
{
    const struct model_params *params = model_params_view(engine->model);
    char hex[DIGEST_HEX_SIZE];
    digest_to_hex(hex, model_id_view(engine->model));
    printf("model     %s\nbackend   %s, %" PRIu32 " threads\n", hex,
           cli_engine_backend_view(engine), cli_engine_thread_count(engine));
    for (uint32_t i = 0; i < params->layer_count; i++) {
        digest_to_hex(hex, &trace->layers[i]);
        printf("layer %-3" PRIu32 " %s\n", i, hex);
    }
    digest_to_hex(hex, &trace->logits_id);
    printf("logits    %s\nargmax    %" PRIu32 "\n", hex, argmax(trace->logits, params->vocab_size));
    print_positions(positions);
    if (config->new_tokens_max > 0) {
        printf("tokens    ");
        for (uint32_t i = 0; i < trace->new_token_count; i++)
            printf("%s%" PRIu32, i ? "," : "", trace->new_tokens[i]);
        printf(" (%s)\ntext      ", trace->finish_reason);
        const char *text = buf_text_view(&trace->text);
        cli_text_show(stdout, 1, text, trace->text.size);
        putchar('\n');
    }
    return fflush(stdout) == 0 ? ODSI_OK : odsi_fail(ODSI_ERR_IO, "writing the output failed");
}

/* ---- the command ----------------------------------------------------------------------------- */

static enum odsi_err trace_tokens(const struct options *options, const struct buf *prompt)
{
    struct cli_engine engine = {0};
    struct cli_trace trace = {0};
    uint32_t *tokens = NULL;
    struct cli_trace_config config = {.chunk = options->chunk,
                                      .neighbour_count = options->neighbour_count,
                                      .new_tokens_max = options->new_tokens_max,
                                      .sampling = &options->sampling};
    struct positions positions = {0};
    enum odsi_err err = cli_engine_describe(&engine, options->model);
    if (err == ODSI_OK)
        err = read_tokens(options, &engine, prompt, &tokens, &config.token_count);
    config.tokens = tokens;
    if (err == ODSI_OK && options->with_positions) {
        positions.vocab_size = model_params_view(engine.model)->vocab_size;
        positions.list = json_array();
        config.each_position = add_position;
        config.context = &positions;
    }
    if (err == ODSI_OK)
        err = cli_engine_load(&engine, options->backend, options->thread_count,
                              1 + config.neighbour_count,
                              cli_trace_positions(&config, model_params_view(engine.model)));
    if (err == ODSI_OK)
        err = cli_trace_run(&trace, &engine, &config);
    if (err == ODSI_OK)
        err = options->is_json ? print_json(&engine, &config, &trace, positions.list)
                               : print_text(&engine, &config, &trace, positions.list);
    json_decref(positions.list);
    cli_trace_free(&trace);
    alloc_free(tokens);
    cli_engine_close(&engine);
    return err;
}

static int check_and_run(const struct options *options)
{
    struct buf prompt;
    buf_init(&prompt, LIMIT_PROMPT_SIZE);
    if (!options->model)
        return cli_input_usage(command_name, "which model? use --model FILE");
    if (options->tokens && (options->prompt || options->prompt_file))
        return cli_input_usage(command_name, "use either --tokens or a prompt");
    if (options->neighbour_count > CLI_TRACE_NEIGHBOURS_MAX)
        return cli_input_usage(command_name, "at most %u neighbours", CLI_TRACE_NEIGHBOURS_MAX);
    enum odsi_err err = cli_sampling_check(&options->sampling);
    if (err == ODSI_OK && !options->tokens)
        err = cli_input_prompt(&prompt, options->prompt, options->prompt_file);
    int code = CMD_OK;
    if (err == ODSI_ERR_INVALID)
        code = cli_input_usage(command_name, "%s", odsi_err_text());
    else if (err != ODSI_OK || (err = trace_tokens(options, &prompt)) != ODSI_OK)
        code = cli_input_failed(command_name, err);
    buf_free(&prompt);
    return code;
}

int cmd_trace_run(int argc, char **argv)
{
    struct options options = {0};
    const struct args_option table[] = {
        {"model", 'm', ARGS_TEXT, &options.model, "FILE", "the model (GGUF file or folder)", 0},
        {"tokens", 0, ARGS_TEXT, &options.tokens, "1,5,7", "the tokens to run", 0},
        {"prompt", 'p', ARGS_TEXT, &options.prompt, "TEXT", "or a text of which to make them", 0},
        {"prompt-file", 'f', ARGS_TEXT, &options.prompt_file, "FILE",
         "or a file; '-': standard input", 0},
        {"backend", 'b', ARGS_TEXT, &options.backend, "NAME",
         "scalar, avx2, avx512 or cuda (the fastest CPU one)", 0},
        {"threads", 0, ARGS_U32, &options.thread_count, "N", "0 (default): one per CPU", 0},
        {"chunk", 'c', ARGS_U32, &options.chunk, "C",
         "tokens per step; 0 (default): as many as fit", 0},
        {"neighbours", 0, ARGS_U32, &options.neighbour_count, "N",
         "sessions of other texts and lengths in the same batches; changes nothing", 0},
        {"generate", 'n', ARGS_U32, &options.new_tokens_max, "N",
         "then generate N tokens, in this one process", 0},
        {"positions", 0, ARGS_FLAG, &options.with_positions, NULL,
         "the largest logits of every token, not only of the last", 0},
        CLI_SAMPLING_OPTIONS(options.sampling),
        {"json", 0, ARGS_FLAG, &options.is_json, NULL, "one object", 0},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi trace",
        .summary =
            "Prints the SHA-256 of the residual stream after every layer and of the logits."
            "\nThey are the same on every machine, whatever the backend, the threads and the "
            "chunks.",
        .usage = "[options] --model FILE --tokens IDS | --prompt TEXT",
        .examples = "  odsi trace --model odsi-tiny-q8_0.gguf --tokens 1,5,7 --json\n"
                    "  odsi trace --model F --prompt \"One day\" --backend scalar --chunk 1\n"
                    "  odsi trace --model F --prompt \"One day\" --generate 64 -t 0.8 --seed 7\n",
        .options = table,
    };
    struct args *args = NULL;
    int rest = 0;
    int code = CMD_USAGE;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    if (outcome == ARGS_EXIT_OK)
        code = CMD_OK;
    else if (outcome == ARGS_RUN && rest < argc)
        code = cli_input_usage(command_name, "'%s' is not an option", argv[rest]);
    else if (outcome == ARGS_RUN)
        code = check_and_run(&options);
    args_close(&args);
    return code;
}
