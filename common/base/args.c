#include "common/base/args.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "odsi_version.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_SIZE_MAX 64u

/* Where an option's value came from; a larger one is never replaced by a smaller one. */
enum source { SOURCE_CALLER = 0, SOURCE_FILE, SOURCE_ENVIRONMENT, SOURCE_COMMAND_LINE };

struct value {
    enum source source;
    char *text; /* what *out points to when it came from the environment or the file */
    char *items[ARGS_LIST_MAX]; /* the same for a list */
};

struct args {
    const struct args_program *program;
    size_t option_count;
    struct value *values;    /* [option_count] */
    const char *config_path; /* NULL: none */
};

const char *args_version(void)
{
    return ODSI_VERSION_TEXT;
}

/* ---- values ------------------------------------------------------------------------------- */

static int read_digits(uint64_t *out, const char **text)
{
    const char *at = *text;
    uint64_t value = 0;
    for (; *at >= '0' && *at <= '9'; at++)
        if (__builtin_mul_overflow(value, (uint64_t)10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*at - '0'), &value))
            return 0;
    if (at == *text)
        return 0;
    *out = value;
    *text = at;
    return 1;
}

static enum odsi_err read_u32(uint32_t *out, const char *text)
{
    const char *at = text;
    uint64_t value = 0;
    if (!read_digits(&value, &at) || *at != '\0' || value > UINT32_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "'%s' is not a whole number from 0 to 4294967295", text);
    *out = (uint32_t)value;
    return ODSI_OK;
}

static enum odsi_err read_u64(uint64_t *out, const char *text)
{
    static const char suffixes[] = "KMGT";
    const char *at = text;
    uint64_t value = 0;
    int is_read = read_digits(&value, &at);
    if (is_read && *at != '\0') {
        const char *suffix = strchr(suffixes, *at);
        const uint64_t unit = suffix ? (uint64_t)1 << (10 * (suffix - suffixes + 1)) : 0;
        is_read = suffix && at[1] == '\0' && !__builtin_mul_overflow(value, unit, &value);
    }
    if (!is_read)
        return odsi_fail(ODSI_ERR_INVALID,
                         "'%s' is not a whole number below 2^64 (a suffix K, M, G or T multiplies "
                         "by 1024 and its powers)",
                         text);
    *out = value;
    return ODSI_OK;
}

static enum odsi_err read_f32(float *out, const char *text)
{
    char *end = NULL;
    const float value = strtof(text, &end);
    if (end == text || *end != '\0' || isspace((unsigned char)*text) || !isfinite(value))
        return odsi_fail(ODSI_ERR_INVALID, "'%s' is not a number such as 0.7", text);
    *out = value;
    return ODSI_OK;
}

static enum odsi_err read_flag(int *out, const char *text)
{
    if (strcmp(text, "1") == 0 || strcmp(text, "true") == 0) {
        *out = 1;
        return ODSI_OK;
    }
    if (strcmp(text, "0") == 0 || strcmp(text, "false") == 0) {
        *out = 0;
        return ODSI_OK;
    }
    return odsi_fail(ODSI_ERR_INVALID, "'%s' is neither 1 or true nor 0 or false", text);
}

/* Adds text to a list; a first one of its source empties it, so that a stronger source replaces a
 * weaker one. */
static enum odsi_err add_item(struct args_list *list, struct value *value, int is_first,
                              enum source source, const char *text)
{
    if (is_first)
        list->count = 0;
    if (list->count == ARGS_LIST_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "given more than %u times", ARGS_LIST_MAX);
    if (source == SOURCE_COMMAND_LINE) {
        list->items[list->count++] = text;
        return ODSI_OK;
    }
    char **item = &value->items[list->count];
    alloc_free(*item);
    *item = NULL;
    const enum odsi_err err = alloc_text(item, text, strlen(text));
    if (err == ODSI_OK)
        list->items[list->count++] = *item;
    return err;
}

/* Gives option the value text unless a stronger source gave it one. Text of the command line is
 * borrowed, since argv outlives everything; other text is copied. */
static enum odsi_err set_value(struct args *self, size_t index, enum source source,
                               const char *text)
{
    const struct args_option *option = &self->program->options[index];
    struct value *value = &self->values[index];
    if (value->source > source)
        return ODSI_OK;
    const int is_first = value->source < source;
    value->source = source;
    switch (option->kind) {
    case ARGS_FLAG:
        return read_flag(option->out, text);
    case ARGS_U32:
        return read_u32(option->out, text);
    case ARGS_U64:
        return read_u64(option->out, text);
    case ARGS_F32:
        return read_f32(option->out, text);
    case ARGS_TEXT_LIST:
        return add_item(option->out, value, is_first, source, text);
    case ARGS_TEXT:
        break;
    }
    const char **out = option->out;
    if (source == SOURCE_COMMAND_LINE) {
        *out = text;
        return ODSI_OK;
    }
    alloc_free(value->text);
    value->text = NULL;
    const enum odsi_err err = alloc_text(&value->text, text, strlen(text));
    if (err == ODSI_OK)
        *out = value->text;
    return err;
}

/* ---- finding options ---------------------------------------------------------------------- */

static int has_name(const struct args_option *option, const char *name, size_t name_size)
{
    return strlen(option->name) == name_size && memcmp(option->name, name, name_size) == 0;
}

/* The index of the option called name, or option_count. */
static size_t find_name(const struct args *self, const char *name, size_t name_size)
{
    size_t i = 0;
    while (i < self->option_count && !has_name(&self->program->options[i], name, name_size))
        i++;
    return i;
}

static size_t find_short(const struct args *self, char short_name)
{
    size_t i = 0;
    while (i < self->option_count && self->program->options[i].short_name != short_name)
        i++;
    return i;
}

static enum odsi_err fail_unknown(const char *argument, size_t size)
{
    return odsi_fail(ODSI_ERR_INVALID, "%.*s is not an option of this program", (int)size,
                     argument);
}

/* ---- the command line --------------------------------------------------------------------- */

/* A walk over argv. `value` is the text behind '=', or NULL. */
struct cursor {
    int argc;
    char **argv;
    int index;
    const char *argument; /* argv[index], for messages */
    const char *value;
    enum args_outcome outcome; /* ARGS_EXIT_OK once --help or --version is seen */
};

/* The value of the option at the cursor: behind '=', or the next argument. */
static enum odsi_err take_value(struct cursor *at, const char **out)
{
    if (at->value) {
        *out = at->value;
        return ODSI_OK;
    }
    if (at->index + 1 >= at->argc)
        return odsi_fail(ODSI_ERR_INVALID, "%s needs a value behind it", at->argument);
    *out = at->argv[++at->index];
    return ODSI_OK;
}

static enum odsi_err set_from_cursor(struct args *self, struct cursor *at, size_t index)
{
    const char *text = "1";
    enum odsi_err err = ODSI_OK;
    if (at->value || self->program->options[index].kind != ARGS_FLAG)
        err = take_value(at, &text);
    if (err != ODSI_OK)
        return err;
    err = set_value(self, index, SOURCE_COMMAND_LINE, text);
    if (err != ODSI_OK)
        odsi_fail_prefix(err, "--%s", self->program->options[index].name);
    return err;
}

static void print_help(const struct args *self);

/* --help, --version and --config, unless the program has its own of that name. *known is 0 when
 * the name is none of them. */
static enum odsi_err read_built_in(struct args *self, struct cursor *at, const char *name,
                                   size_t name_size, int *known)
{
    *known = 1;
    if (name_size == strlen("config") && memcmp(name, "config", name_size) == 0)
        return take_value(at, &self->config_path);
    if (!at->value && name_size == strlen("help") && memcmp(name, "help", name_size) == 0) {
        print_help(self);
        at->outcome = ARGS_EXIT_OK;
    } else if (!at->value && name_size == strlen("version") &&
               memcmp(name, "version", name_size) == 0) {
        printf("%s: %s\n", self->program->name, args_version());
        at->outcome = ARGS_EXIT_OK;
    } else {
        *known = 0;
    }
    return ODSI_OK;
}

static enum odsi_err read_long(struct args *self, struct cursor *at)
{
    const char *name = at->argument + 2;
    const char *equals = strchr(name, '=');
    const size_t name_size = equals ? (size_t)(equals - name) : strlen(name);
    at->value = equals ? equals + 1 : NULL;
    size_t index = find_name(self, name, name_size);
    if (index < self->option_count)
        return set_from_cursor(self, at, index);

    int known = 0;
    const enum odsi_err err = read_built_in(self, at, name, name_size, &known);
    if (known)
        return err;
    if (!at->value && name_size > 3 && memcmp(name, "no-", 3) == 0) {
        index = find_name(self, name + 3, name_size - 3);
        if (index < self->option_count && self->program->options[index].kind == ARGS_FLAG)
            return set_value(self, index, SOURCE_COMMAND_LINE, "0");
    }
    return fail_unknown(at->argument, name_size + 2);
}

static enum odsi_err read_short(struct args *self, struct cursor *at)
{
    const char *argument = at->argument;
    if (argument[2] != '\0')
        return odsi_fail(ODSI_ERR_INVALID,
                         "%s is not an option: short options stand alone, as in -%c VALUE",
                         argument, argument[1]);
    at->value = NULL;
    const size_t index = find_short(self, argument[1]);
    if (index < self->option_count)
        return set_from_cursor(self, at, index);
    if (argument[1] != 'h')
        return fail_unknown(argument, 2);
    int known = 0;
    return read_built_in(self, at, "help", strlen("help"), &known);
}

/* Reads up to the first argument that is not an option, which becomes at->index. */
static enum odsi_err read_command_line(struct args *self, struct cursor *at)
{
    for (at->index = 1; at->index < at->argc; at->index++) {
        at->argument = at->argv[at->index];
        if (at->argument[0] != '-' || at->argument[1] == '\0')
            return ODSI_OK;
        if (strcmp(at->argument, "--") == 0) {
            at->index++;
            return ODSI_OK;
        }
        const enum odsi_err err =
            at->argument[1] == '-' ? read_long(self, at) : read_short(self, at);
        if (err != ODSI_OK || at->outcome != ARGS_RUN)
            return err;
    }
    return ODSI_OK;
}

/* ---- the environment ---------------------------------------------------------------------- */

/* NULL when ODSI_NAME is not set or empty. */
static const char *environment_value(char variable[static NAME_SIZE_MAX + 6], const char *name)
{
    size_t size = (size_t)snprintf(variable, 6, "ODSI_");
    for (size_t i = 0; name[i] != '\0' && i < NAME_SIZE_MAX; i++)
        variable[size++] = name[i] == '-' ? '_' : (char)toupper((unsigned char)name[i]);
    variable[size] = '\0';
    const char *value = getenv(variable);
    return value && *value ? value : NULL;
}

static enum odsi_err read_environment(struct args *self)
{
    char variable[NAME_SIZE_MAX + 6];
    if (!self->config_path)
        self->config_path = environment_value(variable, "config");
    for (size_t i = 0; i < self->option_count; i++) {
        const struct args_option *option = &self->program->options[i];
        const char *text = environment_value(variable, option->name);
        if (!text || option->no_environment)
            continue;
        const enum odsi_err err = set_value(self, i, SOURCE_ENVIRONMENT, text);
        if (err != ODSI_OK)
            return odsi_fail_prefix(err, "environment variable %s", variable);
    }
    return ODSI_OK;
}

/* ---- the config file ---------------------------------------------------------------------- */

/* Reads the whole file into *out, NUL-terminated; *out is the caller's even on error. */
static enum odsi_err load_file(char **out, const char *path)
{
    size_t size = 0;
    int read_errno = 0;
    FILE *file = fopen(path, "rb");
    if (!file)
        return odsi_fail(ODSI_ERR_IO, "cannot be opened: %s", strerror(errno));
    const enum odsi_err err = alloc_zeroed(out, ARGS_FILE_SIZE_MAX + 2, 1);
    if (err == ODSI_OK) {
        errno = 0;
        size = fread(*out, 1, ARGS_FILE_SIZE_MAX + 1, file);
        read_errno = ferror(file) ? errno : 0;
    }
    fclose(file);
    if (err != ODSI_OK)
        return err;
    if (read_errno)
        return odsi_fail(ODSI_ERR_IO, "cannot be read: %s", strerror(read_errno));
    if (size > ARGS_FILE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_INVALID, "larger than %u bytes: not a config file",
                         ARGS_FILE_SIZE_MAX);
    if (memchr(*out, '\0', size))
        return odsi_fail(ODSI_ERR_INVALID, "has NUL bytes: not a text file");
    return ODSI_OK;
}

/* Cuts white space off both ends of text, in place. */
static char *trim(char *text)
{
    while (isspace((unsigned char)*text))
        text++;
    size_t size = strlen(text);
    while (size > 0 && isspace((unsigned char)text[size - 1]))
        size--;
    text[size] = '\0';
    return text;
}

static enum odsi_err read_line(struct args *self, char *line)
{
    char *name = trim(line);
    if (*name == '\0' || *name == '#')
        return ODSI_OK;
    char *equals = strchr(name, '=');
    if (!equals)
        return odsi_fail(ODSI_ERR_INVALID, "'%.80s' is not of the form name = value", name);
    *equals = '\0';
    const char *value = trim(equals + 1);
    name = trim(name);
    const size_t index = find_name(self, name, strlen(name));
    if (index == self->option_count)
        return odsi_fail(ODSI_ERR_INVALID, "'%.80s' is not an option of this program", name);
    const enum odsi_err err = set_value(self, index, SOURCE_FILE, value);
    if (err != ODSI_OK)
        odsi_fail_prefix(err, "%s", name);
    return err;
}

static enum odsi_err read_file(struct args *self)
{
    const size_t index = find_name(self, "config", strlen("config"));
    if (index < self->option_count && self->program->options[index].kind == ARGS_TEXT)
        self->config_path = *(const char **)self->program->options[index].out;
    if (!self->config_path)
        return ODSI_OK;
    char *text = NULL;
    enum odsi_err err = load_file(&text, self->config_path);
    char *line = text;
    for (unsigned number = 1; err == ODSI_OK && line; number++) {
        char *end = strchr(line, '\n');
        if (end)
            *end = '\0';
        err = read_line(self, line);
        if (err != ODSI_OK)
            odsi_fail_prefix(err, "line %u", number);
        line = end ? end + 1 : NULL;
    }
    if (err != ODSI_OK)
        odsi_fail_prefix(err, "config file %s", self->config_path);
    alloc_free(text);
    return err;
}

/* ---- help --------------------------------------------------------------------------------- */

static void print_option(const struct args_option *option, int width)
{
    char left[2 * NAME_SIZE_MAX];
    if (option->short_name)
        printf("  -%c, ", option->short_name);
    else
        printf("      ");
    snprintf(left, sizeof left, "--%s%s%s", option->name, option->value_name ? " " : "",
             option->value_name ? option->value_name : "");
    printf("%-*s  %s\n", width, left, option->help);
}

static int option_width(const struct args_option *option)
{
    return (int)(2 + strlen(option->name) +
                 (option->value_name ? 1 + strlen(option->value_name) : 0));
}

static void print_help(const struct args *self)
{
    static const struct args_option built_in[] = {
        {.name = "config", .value_name = "FILE", .help = "read lines `name = value` from FILE"},
        {.name = "help", .short_name = 'h', .help = "print this and exit"},
        {.name = "version", .help = "print the version and exit"},
    };
    const size_t built_in_count = sizeof built_in / sizeof *built_in;
    const struct args_program *program = self->program;
    int width = option_width(&built_in[0]);
    for (size_t i = 0; i < self->option_count; i++)
        if (option_width(&program->options[i]) > width)
            width = option_width(&program->options[i]);

    printf("%s\n\nUsage: %s %s\n\nOptions:\n", program->summary, program->name, program->usage);
    for (size_t i = 0; i < self->option_count; i++)
        print_option(&program->options[i], width);
    for (size_t i = 0; i < built_in_count; i++)
        if (find_name(self, built_in[i].name, strlen(built_in[i].name)) == self->option_count)
            print_option(&built_in[i], width);
    if (program->examples)
        printf("\nExamples:\n%s%s", program->examples,
               program->examples[0] && program->examples[strlen(program->examples) - 1] == '\n'
                   ? ""
                   : "\n");
    printf(
        "\nAn option --some-name can also be given as the environment variable ODSI_SOME_NAME or "
        "as\nthe line `some-name = value` of the config file; the command line wins over the\n"
        "environment, and the environment over the file.\n");
}

/* ---- public ------------------------------------------------------------------------------- */

static enum odsi_err open_args(struct args **out, const struct args_program *program)
{
    struct args *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    *out = self;
    self->program = program;
    for (; program->options[self->option_count].name; self->option_count++)
        ODSI_ASSERT(strlen(program->options[self->option_count].name) <= NAME_SIZE_MAX);
    return alloc_zeroed(&self->values, self->option_count, sizeof *self->values);
}

enum args_outcome args_read(struct args **out, const struct args_program *program, int argc,
                            char **argv, int *rest)
{
    struct cursor at = {.argc = argc, .argv = argv, .outcome = ARGS_RUN};
    *out = NULL;
    *rest = argc;
    enum odsi_err err = open_args(out, program);
    if (err != ODSI_OK)
        goto fail;
    err = read_command_line(*out, &at);
    if (err == ODSI_OK && at.outcome == ARGS_RUN)
        err = read_environment(*out);
    if (err == ODSI_OK && at.outcome == ARGS_RUN)
        err = read_file(*out);
    if (err != ODSI_OK)
        goto fail;
    *rest = at.index;
    return at.outcome;
fail:
    fprintf(stderr, "%s: %s; see %s --help\n", program->name, odsi_err_text(), program->name);
    return ARGS_EXIT_USAGE;
}

void args_close(struct args **self)
{
    if (!*self)
        return;
    for (size_t i = 0; (*self)->values && i < (*self)->option_count; i++) {
        struct value *value = &(*self)->values[i];
        alloc_free(value->text);
        for (size_t item = 0; item < ARGS_LIST_MAX; item++)
            alloc_free(value->items[item]);
    }
    alloc_free((*self)->values);
    alloc_free(*self);
    *self = NULL;
}
