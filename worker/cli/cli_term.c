#include "worker/cli/cli_term.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define WIDTH_DEFAULT 80u
#define WIDTH_MIN     20u

int cli_term_is(FILE *to)
{
    const char *kind = getenv("TERM");
    return isatty(fileno(to)) && kind && kind[0] != '\0' && strcmp(kind, "dumb") != 0;
}

unsigned cli_term_width(FILE *to)
{
    struct winsize size = {0};
    if (ioctl(fileno(to), TIOCGWINSZ, &size) != 0 || size.ws_col < WIDTH_MIN)
        return WIDTH_DEFAULT;
    return size.ws_col;
}

static const char *if_colored(FILE *to, const char *sequence)
{
    const char *refused = getenv("NO_COLOR");
    return cli_term_is(to) && (!refused || refused[0] == '\0') ? sequence : "";
}

const char *cli_term_dim(FILE *to)
{
    return if_colored(to, "\033[2m");
}

const char *cli_term_plain(FILE *to)
{
    return if_colored(to, "\033[0m");
}
