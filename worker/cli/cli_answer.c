#include "worker/cli/cli_answer.h"

#include "worker/cli/cli_json.h"
#include "worker/cli/cli_table.h"
#include "worker/cli/cli_term.h"
#include "worker/cli/cli_text.h"

#include <stdio.h>
#include <string.h>

void cli_answer_show_piece(void *context, const struct cli_answer *answer, uint32_t token_count,
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

double cli_answer_tokens_per_s(const struct cli_answer *answer)
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

enum odsi_err cli_answer_show_figures(const struct cli_answer *answer, int with_hops)
{
    char first[CLI_TEXT_SIZE];
    fputs(cli_term_dim(stderr), stderr);
    const enum odsi_err err = with_hops ? show_hops(answer) : ODSI_OK;
    cli_text_duration(first, (int64_t)answer->first_token_us);
    fprintf(stderr, "%u tokens after %u of prompt (%s), first after %s, then %.1f tokens/s%s\n",
            answer->new_token_count, answer->prompt_token_count, answer->finish_reason, first,
            cli_answer_tokens_per_s(answer), cli_term_plain(stderr));
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

enum odsi_err cli_answer_print_json(struct cli_answer *answer)
{
    const char *text = buf_text_view(&answer->text);
    json_t *timings =
        json_pack("{s:o, s:o, s:o}", "first_token_us", cli_json_u64(answer->first_token_us),
                  "total_us", cli_json_u64(answer->total_us), "tokens_per_s",
                  cli_json_f64(cli_answer_tokens_per_s(answer)));
    return cli_json_print(
        json_pack("{s:s, s:o, s:I, s:I, s:I, s:o, s:o, s:o, s:s, s:o, s:o, s:o}", "session",
                  answer->session, "model_id", cli_json_digest(&answer->model_id), "numerics",
                  (json_int_t)answer->numerics_version, "prompt_tokens",
                  (json_int_t)answer->prompt_token_count, "reused_tokens",
                  (json_int_t)answer->reused_token_count, "tokens",
                  cli_json_ids(answer->tokens, answer->token_count), "logprobs",
                  logprobs_json(answer), "text", cli_json_text(text, answer->text.size),
                  "finish_reason", answer->finish_reason, "seed", cli_json_u64(answer->seed),
                  "timings", timings, "hops", hops_json(answer)),
        stdout);
}

void cli_answer_end_text(const struct cli_answer *answer)
{
    const struct buf *text = &answer->text;
    if (cli_term_is(stdout) || (text->size > 0 && text->data[text->size - 1] != '\n'))
        putchar('\n');
    fflush(stdout);
}
