/* The event loop: one gRPC completion queue and the one thread that runs it, for the servers and
 * the clients of a process together (one loop measured faster than two).
 *
 * Time: timers fire up to about 2 ms late, never early (gRPC waits in whole milliseconds).
 *
 * All callbacks of common/net run on the loop's thread and must not block. From other threads only
 * rpc_loop_post, rpc_loop_stop and rpc_call_send (rpc_call.h) may be called.
 * A process opens at most one loop at a time in the usual case; tests may open several. */
#ifndef ODSI_COMMON_NET_RPC_LOOP_H
#define ODSI_COMMON_NET_RPC_LOOP_H
#include "common/base/err.h"

#include <stdint.h>

struct rpc_loop;

/* Errors: ODSI_ERR_NO_MEMORY. Initializes gRPC; ended with rpc_loop_close. */
ODSI_MUST_USE enum odsi_err rpc_loop_open(struct rpc_loop **out);
/* Runs callbacks until rpc_loop_stop. The calling thread becomes the loop's thread. */
void rpc_loop_run(struct rpc_loop *self);
/* Makes rpc_loop_run return soon. Any thread; also from a callback. Not from a signal handler. */
void rpc_loop_stop(struct rpc_loop *self);
/* After each event, look for the next one for spin_us without sleeping: saves the time to wake a
 * sleeping CPU, takes that much of one when events come seldom, and slows everything down where
 * there are more busy threads than CPUs. 0 (the default): sleep at once.
 * Before rpc_loop_run, or on the loop's thread. */
void rpc_loop_set_spin(struct rpc_loop *self, uint32_t spin_us);
/* Servers and channels of the loop must be closed already; calls and posts that are left run now,
 * on the calling thread. *self may be NULL. */
void rpc_loop_close(struct rpc_loop **self);

/* Runs fn(context) on the loop's thread as soon as possible, in the order of the calls of one
 * thread. Any thread. Errors: ODSI_ERR_NO_MEMORY, ODSI_ERR_STATE (the loop is closing). */
ODSI_MUST_USE enum odsi_err rpc_loop_post(struct rpc_loop *self, void (*fn)(void *context),
                                          void *context);

/* A one-shot timer; loop thread only. Zero-initialize it, and keep it until it fired or was
 * cancelled. */
struct rpc_timer {
    struct rpc_timer_state *state; /* NULL: idle */
};
/* (Re)starts: fn(context) runs after delay_us. Errors: ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err rpc_timer_start(struct rpc_timer *self, struct rpc_loop *loop,
                                            uint64_t delay_us, void (*fn)(void *context),
                                            void *context);
/* After it fn will not run. Harmless when idle. */
void rpc_timer_cancel(struct rpc_timer *self);

/* SIGTERM and SIGINT: fn(context) runs on the loop's thread for the first signal; a second signal
 * ends the process at once with status 130. Call once, before any other thread is started (it
 * blocks the signals for all threads and starts the one that waits for them); SIGPIPE is ignored.
 * Errors: ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err rpc_loop_on_terminate(struct rpc_loop *self, void (*fn)(void *context),
                                                  void *context);
#endif
