#include "worker/cli/cmd.h"

#include "common/base/args.h"
#include "common/crypto/identity.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_json.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char command_name[] = "identity";

struct options {
    const char *path;
    int is_json;
    int is_pem;
};

static enum odsi_err print(const struct identity *identity, const char *path,
                           const struct options *options)
{
    char id[DIGEST_HEX_SIZE];
    digest_to_hex(id, identity_id_view(identity));
    const char *pem = identity_certificate_pem_view(identity);
    if (options->is_json)
        return cli_json_print(json_pack("{s:s, s:o, s:s}", "id", id, "file",
                                        cli_json_text(path, strlen(path)), "certificate", pem),
                              stdout);
    if (options->is_pem)
        fputs(pem, stdout);
    else
        printf("%s\n", id);
    if (fflush(stdout) != 0)
        return odsi_fail(ODSI_ERR_IO, "writing the output failed");
    return ODSI_OK;
}

static int run(const struct options *options, int is_new)
{
    char home_path[CLI_INPUT_PATH_SIZE];
    const char *path = options->path;
    struct identity *identity = NULL;
    enum odsi_err err = ODSI_OK;
    if (!path) {
        err = cli_input_home(home_path, "identity.pem");
        path = home_path;
    }
    if (err == ODSI_OK && is_new && access(path, F_OK) == 0)
        err = odsi_fail(ODSI_ERR_EXISTS,
                        "%s is there already; whoever loses a key loses the name and what it owns, "
                        "so move it away yourself",
                        path);
    if (err == ODSI_OK)
        err = identity_open(&identity, path, is_new, getenv("ODSI_PASSPHRASE"));
    if (err == ODSI_ERR_NOT_FOUND)
        odsi_fail(err, "%s: no key there; 'odsi identity new' makes one", path);
    if (err == ODSI_OK)
        err = print(identity, path, options);
    identity_close(&identity);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

/* The verb may stand before or behind the options. */
static int read_verb(const char *verb, const struct options *options)
{
    if (!verb || strcmp(verb, "show") == 0)
        return run(options, 0);
    if (strcmp(verb, "new") == 0)
        return run(options, 1);
    return cli_input_usage(command_name, "'%s': use show or new", verb);
}

int cmd_identity_run(int argc, char **argv)
{
    struct options options = {0};
    const struct args_option table[] = {
        {"identity", 'i', ARGS_TEXT, &options.path, "FILE", "the key (identity.pem at home)", 0},
        {"json", 0, ARGS_FLAG, &options.is_json, NULL, "id, file and certificate", 0},
        {"pem", 0, ARGS_FLAG, &options.is_pem, NULL,
         "the certificate, for TLS clients of other makers", 0},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi identity",
        .summary = "Shows or makes the key that names this participant: its id is the SHA-256 of "
                   "the\npublic key. ODSI_PASSPHRASE, when set, encrypts the file.",
        .usage = "show | new [options]",
        .examples = "  odsi identity new\n  odsi identity show --json\n"
                    "  odsi identity show --identity worker.pem --pem > worker.crt\n",
        .options = table,
    };
    struct args *args = NULL;
    int rest = 0;
    int code = CMD_USAGE;
    const int is_verb_first = argc > 1 && argv[1][0] != '-';
    const char *verb = is_verb_first ? argv[1] : NULL;
    argc -= is_verb_first;
    argv += is_verb_first;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    if (outcome == ARGS_RUN && !verb && rest < argc)
        verb = argv[rest++];
    if (outcome == ARGS_EXIT_OK)
        code = CMD_OK;
    else if (outcome == ARGS_RUN && rest < argc)
        code = cli_input_usage(command_name, "'%s' is not an option", argv[rest]);
    else if (outcome == ARGS_RUN)
        code = read_verb(verb, &options);
    args_close(&args);
    return code;
}
