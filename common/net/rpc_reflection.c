/* Server reflection: which services are here and how their messages look, for tools that were never
 * given our .proto files. Versions v1 and v1alpha differ in their package only, so one set of
 * messages serves both. */
#include "common/base/alloc.h"
#include "common/net/rpc_descriptor.h"
#include "common/net/rpc_pack.h"
#include "common/net/rpc_private.h"
#include "grpc/reflection/v1/reflection.pb-c.h"

#define REQUEST_SIZE_MAX 4096u

/* The generated names leave no room on a line. */
#define REQUEST(kind)  GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##kind
#define RESPONSE(kind) GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##kind

struct rpc_reflection {
    struct rpc_descriptor *descriptor;
    const struct rpc_service *services;
    size_t service_count;
};

static enum odsi_err send_error(struct rpc_call *call,
                                Grpc__Reflection__V1__ServerReflectionResponse *reply,
                                enum rpc_status status, const char *text)
{
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    error.error_code = (int32_t)status;
    error.error_message = (char *)(uintptr_t)text;
    reply->message_response_case = RESPONSE(ERROR_RESPONSE);
    reply->error_response = &error;
    return rpc_send(call, &reply->base);
}

static enum odsi_err send_services(const struct rpc_reflection *self, struct rpc_call *call,
                                   Grpc__Reflection__V1__ServerReflectionResponse *reply)
{
    Grpc__Reflection__V1__ListServiceResponse list =
        GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    Grpc__Reflection__V1__ServiceResponse *services = NULL;
    Grpc__Reflection__V1__ServiceResponse **pointers = NULL;
    enum odsi_err err = alloc_zeroed(&services, self->service_count, sizeof *services);
    if (err == ODSI_OK)
        err = alloc_zeroed(&pointers, self->service_count, sizeof *pointers);
    if (err == ODSI_OK) {
        for (size_t i = 0; i < self->service_count; i++) {
            grpc__reflection__v1__service_response__init(&services[i]);
            services[i].name = (char *)(uintptr_t)self->services[i].name;
            pointers[i] = &services[i];
        }
        list.n_service = self->service_count;
        list.service = pointers;
        reply->message_response_case = RESPONSE(LIST_SERVICES_RESPONSE);
        reply->list_services_response = &list;
        err = rpc_send(call, &reply->base);
    }
    alloc_free(pointers);
    alloc_free(services);
    return err;
}

/* File index, then everything that it imports. */
static enum odsi_err send_files(const struct rpc_reflection *self, struct rpc_call *call,
                                Grpc__Reflection__V1__ServerReflectionResponse *reply, size_t index)
{
    Grpc__Reflection__V1__FileDescriptorResponse files =
        GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    const size_t count = rpc_descriptor_file_count(self->descriptor);
    uint8_t *marks = NULL;
    ProtobufCBinaryData *list = NULL;
    enum odsi_err err = alloc_zeroed(&marks, count, 1);
    if (err == ODSI_OK)
        err = alloc_zeroed(&list, count, sizeof *list);
    if (err == ODSI_OK) {
        rpc_descriptor_mark_imports(self->descriptor, index, marks);
        for (size_t i = 0; i <= count; i++) {
            /* The one that was asked for goes first. */
            const size_t file = i == 0 ? index : i - 1;
            if ((i > 0 && file == index) || !marks[file])
                continue;
            ProtobufCBinaryData *entry = &list[files.n_file_descriptor_proto++];
            entry->data =
                (uint8_t *)(uintptr_t)rpc_descriptor_file_view(self->descriptor, file, &entry->len);
        }
        files.file_descriptor_proto = list;
        reply->message_response_case = RESPONSE(FILE_DESCRIPTOR_RESPONSE);
        reply->file_descriptor_response = &files;
        err = rpc_send(call, &reply->base);
    }
    alloc_free(list);
    alloc_free(marks);
    return err;
}

/* None of our messages is extended, so the list is empty for every message there is. */
static enum odsi_err send_extensions(const struct rpc_reflection *self, struct rpc_call *call,
                                     Grpc__Reflection__V1__ServerReflectionResponse *reply,
                                     const char *type)
{
    Grpc__Reflection__V1__ExtensionNumberResponse numbers =
        GRPC__REFLECTION__V1__EXTENSION_NUMBER_RESPONSE__INIT;
    if (rpc_descriptor_by_symbol(self->descriptor, type) == RPC_DESCRIPTOR_NONE)
        return send_error(call, reply, RPC_NOT_FOUND, "no such type here");
    numbers.base_type_name = (char *)(uintptr_t)type;
    reply->message_response_case = RESPONSE(ALL_EXTENSION_NUMBERS_RESPONSE);
    reply->all_extension_numbers_response = &numbers;
    return rpc_send(call, &reply->base);
}

static enum odsi_err answer(const struct rpc_reflection *self, struct rpc_call *call,
                            Grpc__Reflection__V1__ServerReflectionRequest *request)
{
    Grpc__Reflection__V1__ServerReflectionResponse reply =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    size_t index = RPC_DESCRIPTOR_NONE;
    reply.valid_host = request->host;
    reply.original_request = request;
    switch (request->message_request_case) {
    case REQUEST(LIST_SERVICES):
        return send_services(self, call, &reply);
    case REQUEST(FILE_BY_FILENAME):
        index = rpc_descriptor_by_name(self->descriptor, request->file_by_filename);
        break;
    case REQUEST(FILE_CONTAINING_SYMBOL):
        index = rpc_descriptor_by_symbol(self->descriptor, request->file_containing_symbol);
        break;
    case REQUEST(ALL_EXTENSION_NUMBERS_OF_TYPE):
        return send_extensions(self, call, &reply, request->all_extension_numbers_of_type);
    case REQUEST(FILE_CONTAINING_EXTENSION):
        break; /* there are none */
    default:
        return send_error(call, &reply, RPC_INVALID_ARGUMENT, "the request asks for nothing");
    }
    if (index == RPC_DESCRIPTOR_NONE)
        return send_error(call, &reply, RPC_NOT_FOUND, "no such file or symbol here");
    return send_files(self, call, &reply, index);
}

static void on_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    Grpc__Reflection__V1__ServerReflectionRequest *request = NULL;
    enum odsi_err err =
        rpc_unpack(&request, &grpc__reflection__v1__server_reflection_request__descriptor, message);
    if (err == ODSI_OK)
        err = answer(user, call, request);
    if (err != ODSI_OK)
        rpc_call_fail(call, err);
    rpc_unpack_free(request);
}

static void on_half_close(void *user, struct rpc_call *call)
{
    (void)user;
    rpc_call_finish(call, RPC_OK, NULL);
}

static void *on_open(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler reflection = {.on_message = on_message,
                                                  .on_half_close = on_half_close};
    (void)call;
    *handler = &reflection;
    return service;
}

enum odsi_err rpc_reflection_open(struct rpc_reflection **out)
{
    struct rpc_reflection *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err == ODSI_OK)
        err = rpc_descriptor_open_own(&self->descriptor);
    if (err != ODSI_OK)
        rpc_reflection_close(&self);
    *out = self;
    return err;
}

void rpc_reflection_close(struct rpc_reflection **self)
{
    if (*self)
        rpc_descriptor_close(&(*self)->descriptor);
    alloc_free(*self);
    *self = NULL;
}

void rpc_reflection_set_services(struct rpc_reflection *self, const struct rpc_service *services,
                                 size_t count)
{
    self->services = services;
    self->service_count = count;
}

struct rpc_service rpc_reflection_service(struct rpc_reflection *self, int is_v1)
{
    static const struct rpc_method v1[] = {
        {"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", on_open, REQUEST_SIZE_MAX}};
    static const struct rpc_method v1alpha[] = {
        {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", on_open,
         REQUEST_SIZE_MAX}};
    return (struct rpc_service){.name = is_v1 ? "grpc.reflection.v1.ServerReflection"
                                              : "grpc.reflection.v1alpha.ServerReflection",
                                .methods = is_v1 ? v1 : v1alpha,
                                .method_count = 1,
                                .context = self};
}
