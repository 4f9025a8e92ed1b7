#include "tests/support/process.h"

#include "common/base/alloc.h"
#include "common/base/buf.h"
#include "common/base/clock.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define FILE_SIZE_MAX ((size_t)16 << 20)
#define LOG_TAIL_SIZE 300u /* of a failed child's log, told with the error */
#define POLL_NS       2000000

extern char **environ;

struct process {
    pid_t pid;
    int ended; /* and reaped; code is valid */
    int code;
    char name[64];
    char log_path[PROCESS_PATH_SIZE];
    char output_path[PROCESS_PATH_SIZE];
};

enum odsi_err process_path(char out[PROCESS_PATH_SIZE], const char *folder, const char *name)
{
    const int length = snprintf(out, PROCESS_PATH_SIZE, "%s/%s", folder, name);
    if (length < 0 || (size_t)length >= PROCESS_PATH_SIZE)
        return odsi_fail(ODSI_ERR_RANGE, "path %s/%s is too long", folder, name);
    return ODSI_OK;
}

enum odsi_err process_folder_make(char out[PROCESS_PATH_SIZE])
{
    const char *parent = getenv("TMPDIR");
    const enum odsi_err err =
        process_path(out, parent && *parent ? parent : "/tmp", "odsi-test-XXXXXX");
    if (err != ODSI_OK)
        return err;
    if (!mkdtemp(out))
        return odsi_fail(ODSI_ERR_IO, "folder %s: %s", out, strerror(errno));
    return ODSI_OK;
}

static int remove_one(const char *path, const struct stat *status, int kind, struct FTW *place)
{
    (void)status;
    (void)kind;
    (void)place;
    (void)remove(path);
    return 0;
}

void process_folder_remove(const char *path)
{
    (void)nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

static enum odsi_err program_path(char out[PROCESS_PATH_SIZE], const char *program)
{
    enum odsi_err err;
    if (strchr(program, '/')) {
        err = process_path(out, strchr(program, '/') == program ? "" : ".",
                           *program == '/' ? program + 1 : program);
    } else {
        const char *folder = getenv("ODSI_BIN");
        err = process_path(out, folder && *folder ? folder : "build/release/bin", program);
    }
    if (err == ODSI_OK && access(out, X_OK) != 0)
        err = odsi_fail(ODSI_ERR_NOT_FOUND, "%s: %s; build it first or set ODSI_BIN", out,
                        strerror(errno));
    return err;
}

static size_t list_count(const char *const *list)
{
    size_t count = 0;
    while (list && list[count])
        count++;
    return count;
}

/* program, then args; the texts stay the caller's. */
static enum odsi_err make_argv(char ***out, char *program, const char *const *args)
{
    const size_t count = list_count(args);
    const enum odsi_err err = alloc_zeroed(out, count + 2, sizeof **out);
    if (err != ODSI_OK)
        return err;
    (*out)[0] = program;
    if (count > 0)
        memcpy(*out + 1, args, count * sizeof *args);
    return ODSI_OK;
}

/* Whether one of the entries sets the same name as entry does. */
static int is_overridden(const char *entry, const char *const *env)
{
    const size_t name_size = strcspn(entry, "=") + 1;
    for (size_t i = 0; env && env[i]; i++)
        if (strncmp(entry, env[i], name_size) == 0)
            return 1;
    return 0;
}

static enum odsi_err make_env(char ***out, const char *const *env)
{
    const size_t own_count = list_count((const char *const *)environ);
    const enum odsi_err err = alloc_zeroed(out, own_count + list_count(env) + 1, sizeof **out);
    if (err != ODSI_OK)
        return err;
    size_t count = 0;
    for (size_t i = 0; i < own_count; i++)
        if (!is_overridden(environ[i], env))
            (*out)[count++] = environ[i];
    if (env)
        memcpy(*out + count, env, list_count(env) * sizeof *env);
    return ODSI_OK;
}

static int open_output(const char *path)
{
    return open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

/* The child between fork and exec: only calls that are safe there. */
static void become(char **argv, char **env, pid_t parent, int output, int log)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL); /* a test with an event loop has SIGTERM blocked */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    const int input = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (getppid() == parent && input >= 0 && dup2(input, STDIN_FILENO) >= 0 &&
        dup2(output, STDOUT_FILENO) >= 0 && dup2(log, STDERR_FILENO) >= 0)
        execve(argv[0], argv, env);
    _exit(127);
}

static enum odsi_err spawn(struct process *self, char **argv, char **env)
{
    enum odsi_err err = ODSI_OK;
    const pid_t parent = getpid();
    const int output = open_output(self->output_path);
    const int log = open_output(self->log_path);
    if (output < 0 || log < 0) {
        err = odsi_fail(ODSI_ERR_IO, "%s: %s", self->log_path, strerror(errno));
    } else {
        self->pid = fork();
        if (self->pid == 0)
            become(argv, env, parent, output, log);
        if (self->pid < 0)
            err = odsi_fail(ODSI_ERR_IO, "fork: %s", strerror(errno));
    }
    if (output >= 0)
        close(output);
    if (log >= 0)
        close(log);
    return err;
}

static enum odsi_err name_files(struct process *self, const struct process_config *config)
{
    char file[80];
    const char *slash = strrchr(config->program, '/');
    const char *name = config->name ? config->name : slash ? slash + 1 : config->program;
    snprintf(self->name, sizeof self->name, "%s", name);
    snprintf(file, sizeof file, "%s.log", self->name);
    const enum odsi_err err = process_path(self->log_path, config->folder, file);
    if (err != ODSI_OK)
        return err;
    snprintf(file, sizeof file, "%s.out", self->name);
    return process_path(self->output_path, config->folder, file);
}

enum odsi_err process_start(struct process **out, const struct process_config *config)
{
    char program[PROCESS_PATH_SIZE];
    char **argv = NULL;
    char **env = NULL;
    struct process *self = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    *out = NULL;
    if (err != ODSI_OK)
        return err;
    self->ended = 1;
    err = name_files(self, config);
    if (err != ODSI_OK)
        goto fail;
    err = program_path(program, config->program);
    if (err != ODSI_OK)
        goto fail;
    err = make_argv(&argv, program, config->args);
    if (err != ODSI_OK)
        goto fail;
    err = make_env(&env, config->env);
    if (err != ODSI_OK)
        goto fail;
    err = spawn(self, argv, env);
    if (err != ODSI_OK)
        goto fail;
    self->ended = 0;
    *out = self;
    self = NULL;
fail:
    alloc_free(argv);
    alloc_free(env);
    process_close(&self);
    return err;
}

void process_close(struct process **self)
{
    if (!*self)
        return;
    if (!(*self)->ended) {
        (void)kill((*self)->pid, SIGKILL);
        while (waitpid((*self)->pid, NULL, 0) < 0 && errno == EINTR)
            ;
    }
    alloc_free(*self);
    *self = NULL;
}

pid_t process_pid(const struct process *self)
{
    return self->pid;
}

void process_signal(const struct process *self, int signal_number)
{
    if (!self->ended) /* an ended one is reaped, and its number may be somebody else's by now */
        (void)kill(self->pid, signal_number);
}

/* Whether it has ended; reaps it then. */
static int has_ended(struct process *self)
{
    int status = 0;
    if (!self->ended && waitpid(self->pid, &status, WNOHANG) == self->pid) {
        self->ended = 1;
        self->code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    return self->ended;
}

static void pause_briefly(void)
{
    const struct timespec pause = {.tv_nsec = POLL_NS};
    nanosleep(&pause, NULL);
}

/* Reads the first line of a file if it is whole: 1, else 0; -1 when it does not fit. */
static int read_line(const char *path, char *out, size_t size)
{
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return 0;
    const ssize_t got = read(file, out, size);
    close(file);
    const char *end = got > 0 ? memchr(out, '\n', (size_t)got) : NULL;
    if (!end)
        return got == (ssize_t)size ? -1 : 0;
    out[end - out] = '\0';
    return 1;
}

static enum odsi_err ended_early(const struct process *self, const char *doing)
{
    char *log = NULL;
    if (process_read_log(&log, self) != ODSI_OK)
        log = NULL;
    const size_t size = log ? strlen(log) : 0;
    const char *tail = !log ? "" : size > LOG_TAIL_SIZE ? log + size - LOG_TAIL_SIZE : log;
    const enum odsi_err err = odsi_fail(ODSI_ERR_UNAVAILABLE, "%s ended with %d before %s; log: %s",
                                        self->name, self->code, doing, tail);
    alloc_free(log);
    return err;
}

enum odsi_err process_wait_line(struct process *self, const char *path, uint64_t timeout_us,
                                char *out, size_t size)
{
    const uint64_t start_us = clock_monotonic_us();
    for (;;) {
        const int ended = has_ended(self);
        const int found = read_line(path, out, size);
        if (found == 1)
            return ODSI_OK;
        if (found < 0)
            return odsi_fail(ODSI_ERR_RANGE, "%s: its line is longer than %zu bytes", path, size);
        if (ended)
            return ended_early(self, path);
        if (clock_monotonic_us() - start_us > timeout_us)
            return odsi_fail(ODSI_ERR_TIMEOUT, "%s did not write %s in time", self->name, path);
        pause_briefly();
    }
}

enum odsi_err process_wait(struct process *self, uint64_t timeout_us, int *out_code)
{
    const uint64_t start_us = clock_monotonic_us();
    while (!has_ended(self)) {
        if (clock_monotonic_us() - start_us > timeout_us)
            return odsi_fail(ODSI_ERR_TIMEOUT, "%s still runs", self->name);
        pause_briefly();
    }
    *out_code = self->code;
    return ODSI_OK;
}

enum odsi_err process_run(const struct process_config *config, uint64_t timeout_us, int *out_code)
{
    struct process *self = NULL;
    enum odsi_err err = process_start(&self, config);
    if (err == ODSI_OK)
        err = process_wait(self, timeout_us, out_code);
    process_close(&self);
    return err;
}

enum odsi_err process_read_file(char **out, const char *path)
{
    struct buf text;
    uint8_t piece[4096];
    *out = NULL;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return odsi_fail(errno == ENOENT ? ODSI_ERR_NOT_FOUND : ODSI_ERR_IO, "%s: %s", path,
                         strerror(errno));
    buf_init(&text, FILE_SIZE_MAX);
    enum odsi_err err = ODSI_OK;
    ssize_t got = 0;
    while (err == ODSI_OK && (got = read(file, piece, sizeof piece)) > 0)
        err = buf_append(&text, piece, (size_t)got);
    if (got < 0)
        err = odsi_fail(ODSI_ERR_IO, "%s: %s", path, strerror(errno));
    close(file);
    if (err == ODSI_OK)
        err = alloc_text(out, buf_text_view(&text), text.size);
    buf_free(&text);
    return err;
}

enum odsi_err process_read_log(char **out, const struct process *self)
{
    return process_read_file(out, self->log_path);
}

enum odsi_err process_read_output(char **out, const struct process *self)
{
    return process_read_file(out, self->output_path);
}
