#include "common/net/rpc_loop.h"

#include "common/base/alloc.h"
#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/net/rpc_private.h"

#include <grpc/support/log.h>
#include <grpc/support/sync.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

struct post {
    struct post *next;
    void (*fn)(void *context);
    void *context;
};

struct rpc_loop {
    grpc_completion_queue *queue;
    /* A call that never starts: C-core puts the tag of an empty batch straight into the queue of
     * its call, which is the only public way to wake grpc_completion_queue_next from outside. */
    grpc_channel *wake_channel;
    grpc_call *wake_call;
    struct rpc_tag wake;
    atomic_int stopping;
    atomic_int has_posts; /* so that a turn without posts takes no lock */
    uint32_t spin_us;

    /* Loop thread. */
    int is_waiting; /* in the queue's hands, which call back into us during handshakes */
    struct rpc_tag *deferred;
    struct rpc_tag **deferred_end;
    struct rpc_timer_heap timers;
    struct rpc_signal *signal;
    size_t hold_count;
    size_t attached_count;
    int is_initialized; /* grpc_init was called */

    pthread_mutex_t lock; /* guards what follows */
    struct post *posts;
    struct post **posts_end;
    pthread_t thread;
    int has_thread; /* thread is running the loop */
    int is_woken;   /* the wake tag is in the queue */
    int is_closed;
};

/* gRPC writes a line for each handshake that a stranger spoils; whatever matters to us arrives as a
 * status, so its own log is for debugging only. */
static void log_grpc(gpr_log_func_args *args)
{
    log_line(LOG_DEBUG, "grpc: %s", args->message);
}

static void on_wake(struct rpc_tag *tag, int ok)
{
    (void)ok;
    struct rpc_loop *self = RPC_OWNER_OF(tag, struct rpc_loop, wake);
    pthread_mutex_lock(&self->lock);
    self->is_woken = 0;
    pthread_mutex_unlock(&self->lock);
}

/* Under the lock. */
static void wake(struct rpc_loop *self)
{
    const int is_own = self->has_thread && pthread_equal(self->thread, pthread_self());
    if ((is_own && !self->is_waiting) || !self->has_thread || self->is_woken)
        return; /* a turn looks at posts and at stopping before it waits */
    self->is_woken = 1;
    const grpc_call_error error =
        grpc_call_start_batch(self->wake_call, NULL, 0, &self->wake, NULL);
    ODSI_ASSERT(error == GRPC_CALL_OK);
}

struct contention {
    gpr_mu lock;
    atomic_int is_held;
};

static void *hold_a_moment(void *context)
{
    struct contention *self = context;
    const struct timespec moment = {.tv_nsec = 200000};
    gpr_mu_lock(&self->lock);
    atomic_store(&self->is_held, 1);
    nanosleep(&moment, NULL);
    gpr_mu_unlock(&self->lock);
    return NULL;
}

/* gRPC 1.51 reads errno several calls after connect(2), and the first contended mutex of a process
 * opens a file below /sys in between: where there is none, as in a bare chroot, a connection then
 * fails with "No such file or directory". So that reading is made to happen here, before any
 * connection. Best effort. */
static void settle_mutexes(void)
{
    struct contention contention;
    pthread_t thread;
    gpr_mu_init(&contention.lock);
    atomic_init(&contention.is_held, 0);
    if (pthread_create(&thread, NULL, hold_a_moment, &contention) == 0) {
        while (!atomic_load(&contention.is_held))
            sched_yield();
        gpr_mu_lock(&contention.lock);
        gpr_mu_unlock(&contention.lock);
        pthread_join(thread, NULL);
    }
    gpr_mu_destroy(&contention.lock);
}

/* gRPC's helper threads inherit the signal mask: with everything blocked in them, a SIGTERM always
 * finds one of our own threads, which know what to do with it. */
static void init_grpc(sigset_t *saved)
{
    sigset_t all;
    sigfillset(&all);
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGTRAP, SIGPROF};
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        sigdelset(&all, faults[i]);
    pthread_sigmask(SIG_SETMASK, &all, saved);
    rpc_tls_enforce_version();
    gpr_set_log_function(log_grpc);
    grpc_init();
    settle_mutexes();
}

enum odsi_err rpc_loop_open(struct rpc_loop **out)
{
    struct rpc_loop *self = NULL;
    sigset_t mask;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    pthread_mutex_init(&self->lock, NULL);
    self->posts_end = &self->posts;
    self->deferred_end = &self->deferred;
    self->wake.fn = on_wake;
    init_grpc(&mask);
    self->is_initialized = 1;
    self->queue = grpc_completion_queue_create_for_next(NULL);
    self->wake_channel =
        grpc_lame_client_channel_create("wake", GRPC_STATUS_UNAVAILABLE, "never connected");
    if (self->queue && self->wake_channel)
        self->wake_call =
            grpc_channel_create_call(self->wake_channel, NULL, GRPC_PROPAGATE_DEFAULTS, self->queue,
                                     grpc_slice_from_static_string("/wake"), NULL,
                                     gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    pthread_sigmask(SIG_SETMASK, &mask, NULL);
    if (!self->wake_call) {
        rpc_loop_close(&self);
        return odsi_fail(ODSI_ERR_NO_MEMORY, "gRPC gives no completion queue");
    }
    *out = self;
    return ODSI_OK;
}

static void run_posts(struct rpc_loop *self)
{
    if (!atomic_load_explicit(&self->has_posts, memory_order_acquire))
        return;
    pthread_mutex_lock(&self->lock);
    struct post *post = self->posts;
    self->posts = NULL;
    self->posts_end = &self->posts;
    atomic_store_explicit(&self->has_posts, 0, memory_order_relaxed);
    pthread_mutex_unlock(&self->lock);
    while (post) { /* what they post in turn waits for the next turn */
        struct post *next = post->next;
        post->fn(post->context);
        alloc_free(post);
        post = next;
    }
}

static void run_deferred(struct rpc_loop *self)
{
    struct rpc_tag *tag = self->deferred;
    self->deferred = NULL;
    self->deferred_end = &self->deferred;
    while (tag) {
        struct rpc_tag *next = tag->next;
        tag->next = NULL;
        tag->fn(tag, 1);
        tag = next;
    }
}

/* When to stop waiting for an event. */
static gpr_timespec wait_until(struct rpc_loop *self, uint64_t now_us)
{
    if (self->deferred || atomic_load(&self->has_posts) || atomic_load(&self->stopping))
        return gpr_inf_past(GPR_CLOCK_MONOTONIC);
    const uint64_t next_us = rpc_timer_next_us(&self->timers);
    if (next_us == UINT64_MAX)
        return gpr_inf_future(GPR_CLOCK_MONOTONIC);
    const uint64_t wait_us = next_us > now_us ? next_us - now_us : 0;
    return gpr_time_add(
        gpr_now(GPR_CLOCK_MONOTONIC),
        gpr_time_from_micros((int64_t)(wait_us < INT64_MAX ? wait_us : INT64_MAX), GPR_TIMESPAN));
}

static int dispatch(grpc_event event)
{
    if (event.type != GRPC_OP_COMPLETE)
        return 0;
    struct rpc_tag *tag = event.tag;
    tag->fn(tag, event.success);
    return 1;
}

/* After an event the next one is often only microseconds away, while waking a sleeping CPU takes
 * tens of them: look a little longer before going to sleep. */
static int spin(struct rpc_loop *self, uint64_t until_us)
{
    while (!self->deferred && !atomic_load(&self->has_posts) && !atomic_load(&self->stopping)) {
        if (dispatch(
                grpc_completion_queue_next(self->queue, gpr_inf_past(GPR_CLOCK_MONOTONIC), NULL)))
            return 1;
        const uint64_t now_us = clock_monotonic_us();
        if (now_us >= until_us || now_us >= rpc_timer_next_us(&self->timers))
            return 0;
    }
    return 0;
}

/* Everything that can be done without waiting. */
static void work(struct rpc_loop *self)
{
    run_posts(self);
    run_deferred(self);
    rpc_timer_fire(&self->timers, clock_monotonic_us());
}

/* Takes at most one event, waiting for it if there is nothing else to do. Returns whether there
 * was one. */
static int wait_and_dispatch(struct rpc_loop *self, int may_spin)
{
    const uint64_t now_us = clock_monotonic_us();
    if (may_spin && self->spin_us > 0 && spin(self, now_us + self->spin_us))
        return 1;
    self->is_waiting = 1;
    const grpc_event event =
        grpc_completion_queue_next(self->queue, wait_until(self, clock_monotonic_us()), NULL);
    self->is_waiting = 0;
    return dispatch(event);
}

static void set_thread(struct rpc_loop *self, int has_thread)
{
    pthread_mutex_lock(&self->lock);
    self->thread = pthread_self();
    self->has_thread = has_thread;
    pthread_mutex_unlock(&self->lock);
}

void rpc_loop_run(struct rpc_loop *self)
{
    set_thread(self, 1);
    int had_event = 0;
    while (!atomic_load(&self->stopping)) {
        work(self);
        had_event = wait_and_dispatch(self, had_event);
    }
    set_thread(self, 0);
    atomic_store(&self->stopping, 0); /* it may be run again */
}

void rpc_loop_stop(struct rpc_loop *self)
{
    atomic_store(&self->stopping, 1);
    pthread_mutex_lock(&self->lock);
    if (!self->is_closed)
        wake(self);
    pthread_mutex_unlock(&self->lock);
}

void rpc_loop_set_spin(struct rpc_loop *self, uint32_t spin_us)
{
    self->spin_us = spin_us;
}

/* Turns the loop until nothing waits for events any more and the posts are done. */
static void drain(struct rpc_loop *self)
{
    set_thread(self, 1);
    atomic_store(&self->stopping, 0);
    for (;;) {
        work(self);
        if (self->hold_count == 0 && !self->deferred && !atomic_load(&self->has_posts))
            break;
        wait_and_dispatch(self, 0);
    }
    set_thread(self, 0);
    pthread_mutex_lock(&self->lock);
    self->is_closed = 1; /* a start_batch after the queue's shutdown would abort */
    pthread_mutex_unlock(&self->lock);
    run_posts(self);
}

void rpc_loop_close(struct rpc_loop **self)
{
    struct rpc_loop *loop = *self;
    if (!loop)
        return;
    *self = NULL;
    ODSI_ASSERT(loop->attached_count == 0); /* a server or a channel is still open */
    rpc_signal_close(&loop->signal);
    if (loop->wake_call)
        drain(loop);
    ODSI_ASSERT(loop->hold_count == 0);
    rpc_timer_drop_all(&loop->timers);
    if (loop->wake_call)
        grpc_call_unref(loop->wake_call);
    if (loop->wake_channel)
        grpc_channel_destroy(loop->wake_channel);
    if (loop->queue) {
        grpc_completion_queue_shutdown(loop->queue);
        grpc_event event;
        do
            event =
                grpc_completion_queue_next(loop->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
        while (event.type != GRPC_QUEUE_SHUTDOWN);
        grpc_completion_queue_destroy(loop->queue);
    }
    if (loop->is_initialized)
        grpc_shutdown_blocking(); /* so that nothing of gRPC runs on afterwards */
    pthread_mutex_destroy(&loop->lock);
    alloc_free(loop);
}

enum odsi_err rpc_loop_post(struct rpc_loop *self, void (*fn)(void *context), void *context)
{
    struct post *post = NULL;
    enum odsi_err err = alloc_zeroed(&post, 1, sizeof *post);
    if (err != ODSI_OK)
        return err;
    post->fn = fn;
    post->context = context;
    pthread_mutex_lock(&self->lock);
    const int is_closed = self->is_closed;
    if (!is_closed) {
        *self->posts_end = post;
        self->posts_end = &post->next;
        atomic_store_explicit(&self->has_posts, 1, memory_order_release);
        wake(self);
    }
    pthread_mutex_unlock(&self->lock);
    if (!is_closed)
        return ODSI_OK;
    alloc_free(post);
    return odsi_fail(ODSI_ERR_STATE, "the event loop is closing");
}

enum odsi_err rpc_loop_on_terminate(struct rpc_loop *self, void (*fn)(void *context), void *context)
{
    ODSI_ASSERT(!self->signal);
    return rpc_signal_open(&self->signal, self, fn, context);
}

grpc_completion_queue *rpc_loop_queue(struct rpc_loop *self)
{
    return self->queue;
}

struct rpc_timer_heap *rpc_loop_timers(struct rpc_loop *self)
{
    return &self->timers;
}

void rpc_loop_defer(struct rpc_loop *self, struct rpc_tag *tag)
{
    tag->next = NULL;
    *self->deferred_end = tag;
    self->deferred_end = &tag->next;
}

void rpc_loop_hold(struct rpc_loop *self)
{
    self->hold_count++;
}

void rpc_loop_release(struct rpc_loop *self)
{
    ODSI_ASSERT(self->hold_count > 0);
    self->hold_count--;
}

void rpc_loop_attach(struct rpc_loop *self)
{
    self->attached_count++;
}

void rpc_loop_detach(struct rpc_loop *self)
{
    ODSI_ASSERT(self->attached_count > 0);
    self->attached_count--;
}
