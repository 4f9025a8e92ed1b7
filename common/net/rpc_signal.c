/* SIGTERM and SIGINT as posts to the loop. A thread waits on a signalfd, because nothing useful is
 * allowed inside a signal handler; an eventfd ends it. */
#include "common/base/alloc.h"
#include "common/net/rpc_private.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#define EXIT_SECOND_SIGNAL 130 /* 128 + SIGINT, as shells write it */

struct rpc_signal {
    struct rpc_loop *loop;
    void (*fn)(void *context);
    void *context;
    int signal_fd;
    int end_fd;
    int has_thread;
    int has_mask;
    pthread_t thread;
    sigset_t saved_mask;
};

static void *wait_for_signals(void *context)
{
    struct rpc_signal *self = context;
    struct pollfd fds[2] = {{.fd = self->signal_fd, .events = POLLIN},
                            {.fd = self->end_fd, .events = POLLIN}};
    unsigned count = 0;
    for (;;) {
        if (poll(fds, 2, -1) < 0 && errno != EINTR)
            return NULL;
        if (fds[1].revents)
            return NULL;
        struct signalfd_siginfo info;
        if (!fds[0].revents || read(self->signal_fd, &info, sizeof info) != (ssize_t)sizeof info)
            continue;
        /* No memory to say it politely counts as the second signal. */
        if (++count > 1 || rpc_loop_post(self->loop, self->fn, self->context) != ODSI_OK)
            _exit(EXIT_SECOND_SIGNAL);
    }
}

enum odsi_err rpc_signal_open(struct rpc_signal **out, struct rpc_loop *loop,
                              void (*fn)(void *context), void *context)
{
    struct rpc_signal *self = NULL;
    sigset_t mask;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->loop = loop;
    self->fn = fn;
    self->context = context;
    self->signal_fd = self->end_fd = -1;
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    sigemptyset(&ignore.sa_mask);
    sigaction(SIGPIPE, &ignore, NULL);
    sigemptyset(&mask);
    sigaddset(&mask, SIGTERM);
    sigaddset(&mask, SIGINT);
    pthread_sigmask(SIG_BLOCK, &mask, &self->saved_mask);
    self->has_mask = 1;
    self->signal_fd = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    self->end_fd = eventfd(0, EFD_CLOEXEC);
    int error = self->signal_fd < 0 || self->end_fd < 0 ? errno : 0;
    if (!error)
        error = pthread_create(&self->thread, NULL, wait_for_signals, self);
    if (error) {
        rpc_signal_close(&self);
        return odsi_fail(ODSI_ERR_IO, "waiting for signals: %s", strerror(error));
    }
    self->has_thread = 1;
    *out = self;
    return ODSI_OK;
}

void rpc_signal_close(struct rpc_signal **self)
{
    struct rpc_signal *waiter = *self;
    if (!waiter)
        return;
    *self = NULL;
    if (waiter->has_thread) {
        const uint64_t one = 1;
        while (write(waiter->end_fd, &one, sizeof one) < 0 && errno == EINTR)
            ;
        pthread_join(waiter->thread, NULL);
    }
    if (waiter->signal_fd >= 0)
        close(waiter->signal_fd);
    if (waiter->end_fd >= 0)
        close(waiter->end_fd);
    /* From here on a signal ends the process as it would any other. */
    if (waiter->has_mask)
        pthread_sigmask(SIG_SETMASK, &waiter->saved_mask, NULL);
    alloc_free(waiter);
}
