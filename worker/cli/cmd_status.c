#include "worker/cli/cmd.h"

#include "common/base/alloc.h"
#include "common/base/args.h"
#include "worker/cli/cli_client.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_json.h"
#include "worker/cli/cli_table.h"
#include "worker/cli/cli_text.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define COORDINATOR_DEFAULT "127.0.0.1:7600"
#define TIMEOUT_US          10000000u

static const char command_name[] = "status";

struct directory {
    uint64_t version;
    struct cli_member_row *rows; /* sorted by model and layers */
    uint32_t row_count;
};

/* ---- a table for each model ------------------------------------------------------------------ */

/* The first layer that no ready worker of rows[0..count) serves; model_layers when there is
 * none. The rows are sorted by their first layer. */
static uint32_t first_gap(const struct cli_member_row *rows, uint32_t count)
{
    uint32_t next = 0;
    for (uint32_t i = 0; i < count; i++)
        if (rows[i].is_ready && rows[i].layer_first <= next && rows[i].layer_end > next)
            next = rows[i].layer_end;
    return next < rows[0].model_layers ? next : rows[0].model_layers;
}

static void add_row(struct cli_table *table, const struct cli_member_row *row)
{
    char id[DIGEST_HEX_SIZE], text[CLI_TEXT_SIZE];
    digest_to_hex(id, &row->worker_id);
    cli_text_layers(text, row->layer_first, row->layer_end);
    cli_table_cell(table, "%s", text);
    cli_table_cell(table, "%.8s", id);
    cli_table_cell(table, "%s", row->address);
    cli_table_cell(table, "%s x%" PRIu32, row->backend[0] ? row->backend : "?", row->thread_count);
    cli_table_cell(table, "%s", row->is_ready ? "ready" : "loading");
    cli_table_cell(table, "%" PRIu32, row->session_count);
    cli_table_cell(table, "%" PRIu32, row->queued_step_count);
    cli_table_cell(table, "%" PRIu64, row->kv_tokens_free);
    cli_table_cell(table, "%.0f", row->decode_tps);
    cli_text_duration(text, (int64_t)row->silent_ms * 1000);
    cli_table_cell(table, "%s", text);
}

static enum odsi_err print_model(const struct cli_member_row *rows, uint32_t count)
{
    static const struct cli_column columns[] = {
        {"layers", 0},   {"worker", 0}, {"address", 0}, {"backend", 0},  {"state", 0},
        {"sessions", 1}, {"queue", 1},  {"KV free", 1}, {"tokens/s", 1}, {"silent", 1},
    };
    char id[DIGEST_HEX_SIZE];
    struct cli_table table;
    const uint32_t gap = first_gap(rows, count);
    digest_to_hex(id, &rows[0].model_id);
    cli_text_show(stdout, 1, rows[0].model_name, strlen(rows[0].model_name));
    printf("  %.16s  %" PRIu32 " layers, ", id, rows[0].model_layers);
    if (gap < rows[0].model_layers)
        printf("nobody serves layer %" PRIu32 "\n", gap);
    else
        printf("all served\n");
    cli_table_init(&table, columns, sizeof columns / sizeof *columns);
    for (uint32_t i = 0; i < count; i++)
        add_row(&table, &rows[i]);
    const enum odsi_err err = cli_table_print(&table, stdout);
    cli_table_free(&table);
    return err;
}

static enum odsi_err print_tables(const struct directory *directory)
{
    enum odsi_err err = ODSI_OK;
    if (directory->row_count == 0)
        printf("no workers\n");
    for (uint32_t at = 0, end = 0; err == ODSI_OK && at < directory->row_count; at = end) {
        while (end < directory->row_count &&
               digest_equal(&directory->rows[at].model_id, &directory->rows[end].model_id))
            end++;
        if (at > 0)
            putchar('\n');
        err = print_model(directory->rows + at, end - at);
    }
    return err;
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static json_t *member_json(const struct cli_member_row *row)
{
    json_t *model = json_pack("{s:o, s:o, s:I}", "id", cli_json_digest(&row->model_id), "name",
                              cli_json_text(row->model_name, strlen(row->model_name)), "layers",
                              (json_int_t)row->model_layers);
    json_t *load =
        json_pack("{s:I, s:I, s:o, s:o}", "sessions", (json_int_t)row->session_count,
                  "queued_steps", (json_int_t)row->queued_step_count, "kv_tokens_free",
                  cli_json_u64(row->kv_tokens_free), "kv_tokens", cli_json_u64(row->kv_tokens));
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:I, s:o, s:o, s:o, s:b, s:I, s:o}", "worker",
                     cli_json_digest(&row->worker_id), "address",
                     cli_json_text(row->address, strlen(row->address)), "model", model, "layers",
                     cli_json_layers(row->layer_first, row->layer_end), "backend",
                     cli_json_text(row->backend, strlen(row->backend)), "threads",
                     (json_int_t)row->thread_count, "memory", cli_json_u64(row->memory_size),
                     "prefill_tps", cli_json_f64(row->prefill_tps), "decode_tps",
                     cli_json_f64(row->decode_tps), "ready", row->is_ready, "silent_ms",
                     (json_int_t)row->silent_ms, "load", load);
}

static enum odsi_err print_json(const struct directory *directory)
{
    json_t *members = json_array();
    int bad = 0;
    for (uint32_t i = 0; i < directory->row_count; i++)
        bad |= json_array_append_new(members, member_json(&directory->rows[i]));
    if (bad) {
        json_decref(members);
        members = NULL;
    }
    return cli_json_print(
        json_pack("{s:o, s:o}", "version", cli_json_u64(directory->version), "members", members),
        stdout);
}

/* ---- the command ----------------------------------------------------------------------------- */

static int run(const struct cli_client_config *config, int is_json)
{
    struct cli_client *client = NULL;
    struct directory directory = {0};
    enum odsi_err err = cli_client_open(&client, config);
    if (err == ODSI_OK)
        err = cli_client_members(client, TIMEOUT_US, &directory.version, &directory.rows,
                                 &directory.row_count);
    if (err == ODSI_OK)
        err = is_json ? print_json(&directory) : print_tables(&directory);
    alloc_free(directory.rows);
    cli_client_close(&client);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

int cmd_status_run(int argc, char **argv)
{
    struct cli_client_config config = {.peer = COORDINATOR_DEFAULT};
    int is_json = 0;
    const struct args_option table[] = {
        {"coordinator", 'c', ARGS_TEXT, &config.peer, "[ID@]HOST:PORT",
         "where to ask (" COORDINATOR_DEFAULT ")", 0},
        /* ODSI_INSECURE speaks of the gateway, which a local swarm has in plaintext. */
        {"insecure", 0, ARGS_FLAG, &config.is_insecure, NULL, "no encryption; only to this machine",
         1},
        {"identity", 0, ARGS_TEXT, &config.identity_path, "FILE", "our key (identity.pem at home)",
         0},
        {"json", 0, ARGS_FLAG, &is_json, NULL, "one object", 0},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi status",
        .summary = "Shows who serves which layers of which model, and how busy they are.",
        .usage = "[options]",
        .examples = "  odsi status --coordinator coord.example:7600\n"
                    "  odsi local --model F -- odsi status --json\n",
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
        code = run(&config, is_json);
    args_close(&args);
    return code;
}
