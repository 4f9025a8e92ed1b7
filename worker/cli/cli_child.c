#include "worker/cli/cli_child.h"

#include "common/base/alloc.h"
#include "worker/cli/cli_text.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define LOG_TAIL_SIZE  4096
#define LOG_TAIL_LINES 12u
#define EXEC_FAILED    127

/* ---- starting -------------------------------------------------------------------------------- */

static enum odsi_err write_pid(const struct cli_child *self, const char *dir)
{
    char path[CLI_CHILD_PATH_SIZE];
    snprintf(path, sizeof path, "%s/%s.pid", dir, self->name);
    FILE *file = fopen(path, "we");
    if (!file)
        return odsi_fail(ODSI_ERR_IO, "%s: %s", path, strerror(errno));
    const int is_written = fprintf(file, "%ld\n", (long)self->pid) > 0;
    if (fclose(file) != 0 || !is_written)
        return odsi_fail(ODSI_ERR_IO, "%s: %s", path, strerror(errno));
    return ODSI_OK;
}

/* posix_spawn's functions return their error. */
static int spawn_attributes(posix_spawnattr_t *attributes, int is_own_group)
{
    sigset_t none, defaults;
    int failed = 0;
    sigemptyset(&none);
    sigemptyset(&defaults);
    const int restored[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE, SIGCHLD};
    for (size_t i = 0; i < sizeof restored / sizeof *restored; i++)
        sigaddset(&defaults, restored[i]);
    failed |= posix_spawnattr_setsigmask(attributes, &none);
    failed |= posix_spawnattr_setsigdefault(attributes, &defaults);
    failed |= posix_spawnattr_setpgroup(attributes, 0);
    failed |= posix_spawnattr_setflags(attributes,
                                       (short)(POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF |
                                               (is_own_group ? POSIX_SPAWN_SETPGROUP : 0)));
    return failed;
}

static int spawn_files(posix_spawn_file_actions_t *files, const char *log_path)
{
    int failed = 0;
    if (log_path[0] == '\0')
        return 0;
    failed |= posix_spawn_file_actions_addopen(files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    failed |= posix_spawn_file_actions_addopen(files, STDOUT_FILENO, log_path,
                                               O_WRONLY | O_CREAT | O_APPEND, 0600);
    failed |= posix_spawn_file_actions_adddup2(files, STDOUT_FILENO, STDERR_FILENO);
    return failed;
}

static int spawn(struct cli_child *self, char *const *argv, char *const *environment)
{
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    int failed = posix_spawn_file_actions_init(&files);
    if (failed)
        return failed;
    failed = posix_spawnattr_init(&attributes);
    if (!failed) {
        failed = spawn_files(&files, self->log_path) ||
                 spawn_attributes(&attributes, self->log_path[0] != '\0');
        if (failed)
            failed = ENOMEM; /* their only cause here */
        else
            failed =
                posix_spawn(&self->pid, "/proc/self/exe", &files, &attributes, argv, environment);
        posix_spawnattr_destroy(&attributes);
    }
    posix_spawn_file_actions_destroy(&files);
    return failed;
}

enum odsi_err cli_child_start(struct cli_child *self, const struct cli_child_config *config)
{
    char parent[24], program[] = "odsi", command[] = CLI_CHILD_COMMAND;
    char **argv = NULL;
    size_t argc = 0;
    memset(self, 0, sizeof *self);
    snprintf(self->name, sizeof self->name, "%s", config->name);
    if (config->dir)
        snprintf(self->log_path, sizeof self->log_path, "%s/%s.log", config->dir, config->name);
    snprintf(parent, sizeof parent, "%ld", (long)getpid());

    while (config->argv[argc])
        argc++;
    enum odsi_err err = alloc_zeroed(&argv, argc + 4, sizeof *argv);
    if (err != ODSI_OK)
        return err;
    argv[0] = program;
    argv[1] = command;
    argv[2] = parent;
    memcpy(argv + 3, config->argv, argc * sizeof *argv);
    const int failed = spawn(self, argv, config->environment);
    alloc_free(argv);
    if (failed) {
        self->pid = 0;
        return odsi_fail(ODSI_ERR_IO, "%s could not be started: %s", config->name,
                         strerror(failed));
    }
    self->is_running = 1;
    return config->dir ? write_pid(self, config->dir) : ODSI_OK;
}

int cli_child_become(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "odsi: '%s' is how 'odsi local' starts its own processes\n",
                CLI_CHILD_COMMAND);
        return 2;
    }
    const long parent = strtol(argv[1], NULL, 10);
    /* A parent that died before this call sends no signal: so look for it afterwards. */
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || (long)getppid() != parent)
        return EXEC_FAILED;
    execvp(argv[2], argv + 2);
    fprintf(stderr, "odsi: %s: %s\n", argv[2], strerror(errno));
    return EXEC_FAILED;
}

/* ---- while it runs and after ----------------------------------------------------------------- */

int cli_child_ended(struct cli_child *self)
{
    int status = 0;
    if (!self->is_running || waitpid(self->pid, &status, WNOHANG) != self->pid)
        return 0;
    self->is_running = 0;
    self->wait_status = status;
    return 1;
}

void cli_child_signal(struct cli_child *self, int signal_number)
{
    /* Not reaped yet, so the number cannot belong to anybody else. */
    if (self->is_running)
        kill(self->pid, signal_number);
}

int cli_child_exit_code(const struct cli_child *self)
{
    if (WIFSIGNALED(self->wait_status))
        return 128 + WTERMSIG(self->wait_status);
    return WEXITSTATUS(self->wait_status);
}

void cli_child_tell_end(const struct cli_child *self, char *out, size_t size)
{
    if (WIFSIGNALED(self->wait_status)) {
        const int number = WTERMSIG(self->wait_status);
        snprintf(out, size, "%s was ended by signal %d (%s)", self->name, number,
                 strsignal(number));
    } else {
        snprintf(out, size, "%s ended with code %d", self->name, WEXITSTATUS(self->wait_status));
    }
}

void cli_child_show_log(const struct cli_child *self, FILE *to)
{
    char tail[LOG_TAIL_SIZE];
    FILE *file = self->log_path[0] ? fopen(self->log_path, "rbe") : NULL;
    if (!file)
        return;
    if (fseek(file, -(long)sizeof tail, SEEK_END) != 0)
        rewind(file); /* shorter than that */
    const size_t size = fread(tail, 1, sizeof tail, file);
    fclose(file);

    size_t start = size;
    for (unsigned lines = 0; start > 0; start--)
        if (tail[start - 1] == '\n' && start < size && ++lines == LOG_TAIL_LINES)
            break;
    while (start < size) {
        const char *end = memchr(tail + start, '\n', size - start);
        const size_t length = end ? (size_t)(end - tail) - start : size - start;
        fputs("    ", to);
        cli_text_show(to, 1, tail + start, length);
        fputc('\n', to);
        start += length + 1;
    }
}

/* ---- waiting --------------------------------------------------------------------------------- */

static void waited_signals(sigset_t *out)
{
    sigemptyset(out);
    sigaddset(out, SIGINT);
    sigaddset(out, SIGTERM);
    sigaddset(out, SIGHUP);
    sigaddset(out, SIGCHLD);
}

enum odsi_err cli_child_wait_setup(void)
{
    sigset_t set;
    waited_signals(&set);
    const int failed = pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (failed)
        return odsi_fail(ODSI_ERR_IO, "signals cannot be blocked: %s", strerror(failed));
    return ODSI_OK;
}

int cli_child_wait(uint32_t timeout_ms, int *is_terminal)
{
    sigset_t set;
    siginfo_t info = {0};
    const struct timespec timeout = {timeout_ms / 1000, (long)(timeout_ms % 1000) * 1000000};
    waited_signals(&set);
    const int number = sigtimedwait(&set, &info, &timeout);
    *is_terminal = number > 0 && info.si_code == SI_KERNEL;
    return number > 0 && number != SIGCHLD ? number : 0;
}
