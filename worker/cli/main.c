/* odsi: the command line of a participant. Each command is one file cmd_NAME.c. */
#include "common/base/args.h"
#include "worker/cli/cli_child.h"
#include "worker/cli/cmd.h"

#include <stdio.h>
#include <string.h>

static void print_help(FILE *to)
{
    fprintf(to, "usage: odsi COMMAND [options]\n\n"
                "Large language models on a swarm of strangers' machines, layer by layer,\n"
                "with the same bits everywhere.\n\ncommands:\n");
    for (const struct cmd *at = cmd_table(); at->name; at++)
        fprintf(to, "  %-10s %s\n", at->name, at->summary);
    fprintf(to, "\n'odsi COMMAND --help' explains a command; 'odsi --version' names this build.\n");
}

static int refuse(const char *name)
{
    const struct cmd *near = cmd_nearest(name);
    if (near)
        fprintf(stderr, "odsi: there is no command '%s'; did you mean '%s'?\n", name, near->name);
    else
        fprintf(stderr, "odsi: there is no command '%s'; 'odsi --help' lists them\n", name);
    return CMD_USAGE;
}

static int help(int argc, char **argv)
{
    if (argc < 3) {
        print_help(stdout);
        return CMD_OK;
    }
    const struct cmd *command = cmd_find(argv[2]);
    if (!command)
        return refuse(argv[2]);
    char flag[] = "--help";
    char *command_argv[] = {argv[2], flag, NULL};
    return command->run(2, command_argv);
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_help(stderr);
        return CMD_USAGE;
    }
    const char *name = argv[1];
    if (strcmp(name, CLI_CHILD_COMMAND) == 0)
        return cli_child_become(argc - 1, argv + 1);
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0)
        return help(argc, argv);
    if (strcmp(name, "--version") == 0) {
        printf("%s\n", args_version());
        return CMD_OK;
    }
    const struct cmd *command = cmd_find(name);
    if (!command)
        return refuse(name);
    return command->run(argc - 1, argv + 1);
}
