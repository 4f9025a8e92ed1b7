/* grpc.health.v1: whether the server, or one of its services, takes requests now. */
#include "common/base/alloc.h"
#include "common/net/rpc_pack.h"
#include "common/net/rpc_private.h"
#include "grpc/health/v1/health.pb-c.h"

#include <string.h>

#define REQUEST_SIZE_MAX 1024u

#define SERVING         GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING     GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define SERVICE_UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN

/* One call of Check or Watch. */
struct watch {
    struct rpc_health *health;
    struct rpc_call *call;
    struct watch *next; /* of those that are told of changes */
    struct watch **link;
    int is_stream;
    int has_request;
    int is_known; /* the service it asks for is here */
};

struct rpc_health {
    const struct rpc_service *services;
    size_t service_count;
    int is_serving;
    struct watch *watches;
};

static int is_known(const struct rpc_health *self, const char *service)
{
    if (service[0] == '\0')
        return 1;
    for (size_t i = 0; i < self->service_count; i++)
        if (strcmp(self->services[i].name, service) == 0)
            return 1;
    return 0;
}

static Grpc__Health__V1__HealthCheckResponse answer(const struct watch *watch)
{
    Grpc__Health__V1__HealthCheckResponse reply = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    if (!watch->is_known)
        reply.status = SERVICE_UNKNOWN;
    else
        reply.status = watch->health->is_serving ? SERVING : NOT_SERVING;
    return reply;
}

static void tell(struct watch *watch)
{
    const Grpc__Health__V1__HealthCheckResponse reply = answer(watch);
    /* A watcher that does not read and one we have no memory for: it may ask again. */
    enum odsi_err err = rpc_send(watch->call, &reply.base);
    if (err != ODSI_OK)
        rpc_call_fail(watch->call, err);
}

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct watch *watch = user;
    Grpc__Health__V1__HealthCheckRequest *request = NULL;
    if (watch->has_request) {
        rpc_call_finish(call, RPC_INVALID_ARGUMENT, "one request per call");
        return;
    }
    enum odsi_err err =
        rpc_unpack(&request, &grpc__health__v1__health_check_request__descriptor, message);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return;
    }
    watch->has_request = 1;
    watch->is_known = is_known(watch->health, request->service);
    rpc_unpack_free(request);
    if (watch->is_stream) {
        tell(watch);
    } else if (!watch->is_known) {
        rpc_call_finish(call, RPC_NOT_FOUND, "no such service here");
    } else {
        const Grpc__Health__V1__HealthCheckResponse reply = answer(watch);
        rpc_reply(call, &reply.base);
    }
}

static void on_half_close(void *user, struct rpc_call *call)
{
    const struct watch *watch = user;
    if (!watch->has_request)
        rpc_call_finish(call, RPC_INVALID_ARGUMENT, "a request is missing");
}

static void on_done(void *user, struct rpc_call *call, enum rpc_status status, const char *text)
{
    struct watch *watch = user;
    (void)call;
    (void)status;
    (void)text;
    *watch->link = watch->next;
    if (watch->next)
        watch->next->link = watch->link;
    alloc_free(watch);
}

static void *open_watch(struct rpc_health *self, struct rpc_call *call, int is_stream,
                        const struct rpc_handler **handler)
{
    static const struct rpc_handler watch_handler = {
        .on_message = on_message, .on_half_close = on_half_close, .on_done = on_done};
    struct watch *watch = NULL;
    enum odsi_err err = alloc_zeroed(&watch, 1, sizeof *watch);
    if (err != ODSI_OK) {
        rpc_call_fail(call, err);
        return NULL;
    }
    watch->health = self;
    watch->call = call;
    watch->is_stream = is_stream;
    watch->next = self->watches;
    watch->link = &self->watches;
    if (watch->next)
        watch->next->link = &watch->next;
    self->watches = watch;
    *handler = &watch_handler;
    return watch;
}

static void *on_open_check(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    return open_watch(service, call, 0, handler);
}

static void *on_open_watch(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    return open_watch(service, call, 1, handler);
}

enum odsi_err rpc_health_open(struct rpc_health **out)
{
    enum odsi_err err = alloc_zeroed(out, 1, sizeof **out);
    if (err == ODSI_OK)
        (*out)->is_serving = 1;
    return err;
}

void rpc_health_close(struct rpc_health **self)
{
    alloc_free(*self);
    *self = NULL;
}

void rpc_health_set_services(struct rpc_health *self, const struct rpc_service *services,
                             size_t count)
{
    self->services = services;
    self->service_count = count;
}

void rpc_health_set_serving(struct rpc_health *self, int serving)
{
    if (self->is_serving == !!serving)
        return;
    self->is_serving = !!serving;
    for (struct watch *watch = self->watches; watch; watch = watch->next)
        if (watch->is_stream && watch->has_request && watch->is_known)
            tell(watch);
}

struct rpc_service rpc_health_service(struct rpc_health *self)
{
    static const struct rpc_method methods[] = {
        {"/grpc.health.v1.Health/Check", on_open_check, REQUEST_SIZE_MAX},
        {"/grpc.health.v1.Health/Watch", on_open_watch, REQUEST_SIZE_MAX},
    };
    return (struct rpc_service){.name = "grpc.health.v1.Health",
                                .methods = methods,
                                .method_count = sizeof methods / sizeof *methods,
                                .context = self};
}
