/* Listening, health and reflection, asked by hand-written client calls. */
#include "common/base/limits.h"
#include "common/net/rpc_pack.h"
#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"
#include "tests/unit/net/net_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#define SERVING         GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
#define NOT_SERVING     GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING
#define SERVICE_UNKNOWN GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN
#define ASK(kind)       GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_##kind
#define ANSWER(kind)    GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_##kind

/* ---- listening ----------------------------------------------------------------------------- */

static enum odsi_err try_listen(struct net *net, const char *listen, uint16_t *port)
{
    struct rpc_server *server = NULL;
    const struct rpc_server_config config = {.listen = listen, .identity = net->server_identity};
    enum odsi_err err = rpc_server_open(&server, net->loop, &config);
    cr_expect_eq(server != NULL, err == ODSI_OK);
    if (server) {
        *port = rpc_server_port(server);
        rpc_server_close(server, NULL, NULL);
    }
    return err;
}

Test(rpc_server, listens_on_every_way_to_write_an_address)
{
    static const struct {
        const char *listen;
        enum odsi_err err;
    } cases[] = {
        {"127.0.0.1:0", ODSI_OK},
        {"localhost:0", ODSI_OK},
        {":0", ODSI_OK},
        {"0.0.0.0:0", ODSI_OK},
        {"", ODSI_ERR_INVALID},
        {"127.0.0.1", ODSI_ERR_INVALID},
        {"127.0.0.1:", ODSI_ERR_INVALID},
        {"127.0.0.1:65536", ODSI_ERR_INVALID},
        {"127.0.0.1:-1", ODSI_ERR_INVALID},
        {"127.0.0.1:7x", ODSI_ERR_INVALID},
        {"a b:1", ODSI_ERR_INVALID},
        {"::1:7000", ODSI_ERR_INVALID},
        {"[::1:7000", ODSI_ERR_INVALID},
        {"[zz]:7000", ODSI_ERR_INVALID},
        {"192.0.2.1:0", ODSI_ERR_INVALID}, /* of documentation, so of no interface */
    };
    struct net net = {0};
    net_open_loop(&net);
    cr_assert_eq(identity_make(&net.server_identity), ODSI_OK);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint16_t port = 0;
        cr_expect_eq(try_listen(&net, cases[i].listen, &port), cases[i].err, "'%s': %s",
                     cases[i].listen, odsi_err_text());
        if (cases[i].err == ODSI_OK)
            cr_expect_neq(port, 0, "'%s'", cases[i].listen);
        else
            cr_expect_not_null(strstr(odsi_err_text(), cases[i].listen));
    }
    rpc_loop_close(&net.loop);
    identity_close(&net.server_identity);
}

Test(rpc_server, a_port_in_use_is_refused_with_a_sentence)
{
    struct net net = {0};
    uint16_t port = 0;
    net_open_loop(&net);
    net_open_server(&net);
    cr_expect_eq(try_listen(&net, net.address, &port), ODSI_ERR_EXISTS);
    cr_expect_not_null(strstr(odsi_err_text(), net.address), "%s", odsi_err_text());
    cr_expect_not_null(strstr(odsi_err_text(), "in use"), "%s", odsi_err_text());
    /* It is free again as soon as its server has closed. */
    net_open_channel(&net, NULL);
    struct net_call call = {0};
    net_call_unary(&call, &net, NET_PATH("Unary"), "x", 1, NET_CALL_US);
    cr_expect_eq(call.status, RPC_OK);
    net_call_free(&call);
    char address[64];
    memcpy(address, net.address, sizeof address);
    net_close(&net);
    struct net next = {0};
    net_open_loop(&next);
    cr_expect_eq(try_listen(&next, address, &port), ODSI_OK, "%s", odsi_err_text());
    rpc_loop_close(&next.loop);
}

static void *never_opened(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    (void)handler;
    rpc_call_finish(call, RPC_OK, NULL);
    return service;
}

Test(rpc_server, a_method_twice_in_the_tables_is_invalid)
{
    static const struct rpc_method methods[] = {{"/test.Twice/A", never_opened, 10},
                                                {"/test.Twice/A", never_opened, 10}};
    const struct rpc_service service = {
        .name = "test.Twice", .methods = methods, .method_count = 2};
    const struct rpc_server_config config = {
        .listen = "127.0.0.1:0", .services = &service, .service_count = 1};
    struct net net = {0};
    struct rpc_server *server = NULL;
    net_open_loop(&net);
    cr_expect_eq(rpc_server_open(&server, net.loop, &config), ODSI_ERR_INVALID);
    cr_expect_null(server);
    rpc_loop_close(&net.loop);
}

Test(rpc_server, close_accepts_null)
{
    rpc_server_close(NULL, NULL, NULL);
}

/* ---- addresses ----------------------------------------------------------------------------- */

Test(rpc_server, peers_are_read_as_id_at_host_and_port)
{
    static const char id_hex[] = "00112233445566778899aabbccddeeff00112233445566778899AABBCCDDEEFF";
    char text[512];
    char address[LIMIT_ADDRESS_SIZE];
    struct digest id;
    int has_id = 0;
    snprintf(text, sizeof text, "%s@example.org:7000", id_hex);
    cr_assert_eq(rpc_address_read(text, address, &id, &has_id), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(has_id, 1);
    cr_expect_str_eq(address, "example.org:7000");
    cr_expect_eq(id.bytes[1], 0x11);
    cr_expect_eq(id.bytes[31], 0xff);
    cr_assert_eq(rpc_address_read("[::1]:7000", address, &id, &has_id), ODSI_OK);
    cr_expect_eq(has_id, 0);
    cr_expect_str_eq(address, "[::1]:7000");
    static const char *const bad[] = {"", "@", "@a:1", "abc@a:1", "a:1@b:2", "a", "a:99999"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        cr_expect_eq(rpc_address_read(bad[i], address, &id, &has_id), ODSI_ERR_INVALID, "'%s'",
                     bad[i]);
    snprintf(text, sizeof text, "%.63sx@a:1", id_hex); /* a digit that is none */
    cr_expect_eq(rpc_address_read(text, address, &id, &has_id), ODSI_ERR_INVALID);
    memset(text, 'a', sizeof text);
    memcpy(text + 400, ":1", 3);
    cr_expect_eq(rpc_address_read(text, address, &id, &has_id), ODSI_ERR_INVALID);
    struct net net = {0};
    struct rpc_channel *channel = NULL;
    net_open_loop(&net);
    const struct rpc_channel_config config = {.address = "127.0.0.1:0"};
    cr_expect_eq(rpc_channel_open(&channel, net.loop, &config), ODSI_ERR_INVALID);
    rpc_loop_close(&net.loop);
}

/* ---- health -------------------------------------------------------------------------------- */

static struct buf health_request(const char *service)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    struct buf packed;
    char name[256];
    snprintf(name, sizeof name, "%s", service);
    request.service = name;
    buf_init(&packed, 1024);
    cr_assert_eq(rpc_pack(&packed, &request.base), ODSI_OK);
    return packed;
}

static int health_status(const struct buf *reply)
{
    Grpc__Health__V1__HealthCheckResponse *response = NULL;
    cr_assert_eq(rpc_unpack_bytes(&response, &grpc__health__v1__health_check_response__descriptor,
                                  reply->data, reply->size),
                 ODSI_OK);
    const int status = response->status;
    rpc_unpack_free(response);
    return status;
}

static enum rpc_status check_health(struct net *net, const char *service, int *serving)
{
    struct net_call call = {0};
    struct buf request = health_request(service);
    net_call_unary(&call, net, "/grpc.health.v1.Health/Check", request.data, request.size,
                   NET_CALL_US);
    if (call.status == RPC_OK)
        *serving = health_status(&call.last);
    buf_free(&request);
    net_call_free(&call);
    return call.status;
}

Test(rpc_server, health_answers_for_the_server_and_for_each_service)
{
    static const char *const known[] = {"", "test.Echo", "grpc.health.v1.Health",
                                        "grpc.reflection.v1.ServerReflection"};
    struct net net = {0};
    int serving = -1;
    net_open(&net, NULL);
    for (int is_serving = 1; is_serving >= 0; is_serving--) {
        rpc_server_set_serving(net.server, is_serving);
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
            cr_assert_eq(check_health(&net, known[i], &serving), RPC_OK, "'%s'", known[i]);
            cr_expect_eq(serving, is_serving ? (int)SERVING : (int)NOT_SERVING, "'%s'", known[i]);
        }
        cr_expect_eq(check_health(&net, "test.Nothing", &serving), RPC_NOT_FOUND);
    }
    net_close(&net);
}

static void wait_for_messages(struct net *net, const struct net_call *call, unsigned count)
{
    for (int i = 0; i < 500 && call->message_count < count; i++)
        net_run_for(net, 10000);
    cr_assert_eq(call->message_count, count);
}

Test(rpc_server, health_watch_tells_the_state_and_each_change)
{
    struct net net = {0};
    struct net_call known = {0};
    struct net_call unknown = {0};
    net_open(&net, NULL);
    struct buf request = health_request("test.Echo");
    net_call_open(&known, &net, "/grpc.health.v1.Health/Watch", 0);
    net_call_send(&known, request.data, request.size);
    buf_free(&request);
    request = health_request("test.Nothing");
    net_call_open(&unknown, &net, "/grpc.health.v1.Health/Watch", 0);
    net_call_send(&unknown, request.data, request.size);
    buf_free(&request);
    wait_for_messages(&net, &known, 1);
    wait_for_messages(&net, &unknown, 1);
    cr_expect_eq(health_status(&known.last), (int)SERVING);
    cr_expect_eq(health_status(&unknown.last), (int)SERVICE_UNKNOWN);
    rpc_server_set_serving(net.server, 1); /* no change */
    rpc_server_set_serving(net.server, 0);
    wait_for_messages(&net, &known, 2);
    cr_expect_eq(health_status(&known.last), (int)NOT_SERVING);
    rpc_server_set_serving(net.server, 1);
    wait_for_messages(&net, &known, 3);
    cr_expect_eq(health_status(&known.last), (int)SERVING);
    cr_expect_eq(unknown.message_count, 1);
    rpc_call_cancel(unknown.call);
    while (unknown.done_count == 0)
        net_run(&net);
    rpc_server_set_serving(net.server, 0);
    wait_for_messages(&net, &known, 4);
    net_close(&net); /* with a watch open */
    cr_expect_eq(known.done_count, 1);
    net_call_free(&known);
    net_call_free(&unknown);
}

Test(rpc_server, health_refuses_a_call_without_a_request_and_one_that_is_malformed)
{
    struct net net = {0};
    struct net_call empty = {0};
    struct net_call bad = {0};
    net_open(&net, NULL);
    net_call_open(&empty, &net, "/grpc.health.v1.Health/Check", NET_CALL_US);
    rpc_call_half_close(empty.call);
    net_run(&net);
    cr_expect_eq(empty.status, RPC_INVALID_ARGUMENT);
    net_call_unary(&bad, &net, "/grpc.health.v1.Health/Check", "\x0a\x09x", 3, NET_CALL_US);
    cr_expect_eq(bad.status, RPC_INVALID_ARGUMENT);
    net_call_free(&empty);
    net_call_free(&bad);
    net_close(&net);
}

/* ---- reflection ---------------------------------------------------------------------------- */

/* Asks on an open stream and returns the answer, ended with rpc_unpack_free. */
static Grpc__Reflection__V1__ServerReflectionResponse *
ask(struct net *net, struct net_call *call,
    const Grpc__Reflection__V1__ServerReflectionRequest *request)
{
    Grpc__Reflection__V1__ServerReflectionResponse *response = NULL;
    const unsigned count = call->message_count;
    cr_assert_eq(rpc_send(call->call, &request->base), ODSI_OK);
    wait_for_messages(net, call, count + 1);
    cr_assert_eq(rpc_unpack_bytes(&response,
                                  &grpc__reflection__v1__server_reflection_response__descriptor,
                                  call->last.data, call->last.size),
                 ODSI_OK);
    cr_expect_str_eq(response->valid_host, request->host);
    cr_assert_not_null(response->original_request);
    cr_expect_eq(response->original_request->message_request_case, request->message_request_case);
    return response;
}

static void expect_services(struct net *net, struct net_call *call)
{
    static const char *const expected[] = {"test.Echo", "grpc.health.v1.Health",
                                           "grpc.reflection.v1.ServerReflection",
                                           "grpc.reflection.v1alpha.ServerReflection"};
    char everything[] = "*";
    char host[] = "some.host";
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    request.host = host;
    request.message_request_case = ASK(LIST_SERVICES);
    request.list_services = everything;
    Grpc__Reflection__V1__ServerReflectionResponse *response = ask(net, call, &request);
    cr_assert_eq(response->message_response_case, ANSWER(LIST_SERVICES_RESPONSE));
    cr_assert_eq(response->list_services_response->n_service, 4);
    for (size_t i = 0; i < 4; i++)
        cr_expect_str_eq(response->list_services_response->service[i]->name, expected[i]);
    rpc_unpack_free(response);
}

/* The answer must hold count files, the first of them with that name near its beginning. */
static void expect_files(struct net *net, struct net_call *call, int is_symbol, const char *what,
                         const char *file, size_t count)
{
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    char text[128];
    snprintf(text, sizeof text, "%s", what);
    if (is_symbol) {
        request.message_request_case = ASK(FILE_CONTAINING_SYMBOL);
        request.file_containing_symbol = text;
    } else {
        request.message_request_case = ASK(FILE_BY_FILENAME);
        request.file_by_filename = text;
    }
    Grpc__Reflection__V1__ServerReflectionResponse *response = ask(net, call, &request);
    if (!file) {
        cr_assert_eq(response->message_response_case, ANSWER(ERROR_RESPONSE), "%s", what);
        cr_expect_eq(response->error_response->error_code, RPC_NOT_FOUND);
    } else {
        cr_assert_eq(response->message_response_case, ANSWER(FILE_DESCRIPTOR_RESPONSE), "%s", what);
        const Grpc__Reflection__V1__FileDescriptorResponse *files =
            response->file_descriptor_response;
        cr_assert_eq(files->n_file_descriptor_proto, count, "%s: %zu files", what,
                     files->n_file_descriptor_proto);
        cr_assert_gt(files->file_descriptor_proto[0].len, strlen(file) + 2);
        cr_expect(memcmp(files->file_descriptor_proto[0].data + 2, file, strlen(file)) == 0, "%s",
                  what);
    }
    rpc_unpack_free(response);
}

static void expect_no_extensions(struct net *net, struct net_call *call)
{
    Grpc__Reflection__V1__ServerReflectionRequest request =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__INIT;
    char type[] = "odsi.v1.StepHeader";
    char nothing[] = "odsi.v1.Nothing";
    request.message_request_case = ASK(ALL_EXTENSION_NUMBERS_OF_TYPE);
    request.all_extension_numbers_of_type = type;
    Grpc__Reflection__V1__ServerReflectionResponse *response = ask(net, call, &request);
    cr_assert_eq(response->message_response_case, ANSWER(ALL_EXTENSION_NUMBERS_RESPONSE));
    cr_expect_eq(response->all_extension_numbers_response->n_extension_number, 0);
    rpc_unpack_free(response);
    request.all_extension_numbers_of_type = nothing;
    response = ask(net, call, &request);
    cr_expect_eq(response->message_response_case, ANSWER(ERROR_RESPONSE));
    rpc_unpack_free(response);
    Grpc__Reflection__V1__ExtensionRequest extension =
        GRPC__REFLECTION__V1__EXTENSION_REQUEST__INIT;
    request.message_request_case = ASK(FILE_CONTAINING_EXTENSION);
    request.file_containing_extension = &extension;
    response = ask(net, call, &request);
    cr_expect_eq(response->message_response_case, ANSWER(ERROR_RESPONSE));
    rpc_unpack_free(response);
}

static void try_reflection(const char *path)
{
    struct net net = {0};
    struct net_call call = {0};
    net_open(&net, NULL);
    net_call_open(&call, &net, path, 0);
    expect_services(&net, &call);
    expect_files(&net, &call, 1, "odsi.v1.Hop", "odsi/v1/hop.proto", 2);
    expect_files(&net, &call, 1, "odsi.v1.Hop.Steps", "odsi/v1/hop.proto", 2);
    expect_files(&net, &call, 1, "odsi.v1.StepHeader", "odsi/v1/hop.proto", 2);
    expect_files(&net, &call, 1, "odsi.v1.ErrorCode", "odsi/v1/types.proto", 1);
    expect_files(&net, &call, 1, "grpc.health.v1.Health", "grpc/health/v1/health.proto", 1);
    expect_files(&net, &call, 0, "odsi/v1/types.proto", "odsi/v1/types.proto", 1);
    expect_files(&net, &call, 0, "odsi/v1/inference.proto", "odsi/v1/inference.proto", 3);
    expect_files(&net, &call, 1, "odsi.v1.Nothing", NULL, 0);
    expect_files(&net, &call, 1, "test.Echo", NULL, 0);
    expect_files(&net, &call, 0, "odsi/v1/nothing.proto", NULL, 0);
    expect_no_extensions(&net, &call);
    rpc_call_half_close(call.call);
    net_run(&net);
    cr_expect_eq(call.status, RPC_OK);
    net_call_free(&call);
    net_close(&net);
}

Test(rpc_server, reflection_v1_describes_the_services)
{
    try_reflection("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo");
}

Test(rpc_server, reflection_v1alpha_describes_the_services)
{
    try_reflection("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo");
}

/* ---- statuses ------------------------------------------------------------------------------ */

Test(rpc_server, every_error_has_a_status_and_the_statuses_lead_back)
{
    cr_expect_eq(rpc_status_of_err(ODSI_OK), RPC_OK);
    cr_expect_eq(rpc_err_of_status(RPC_OK), ODSI_OK);
    for (int i = 1; i < ODSI_ERR_COUNT; i++) {
        const enum rpc_status status = rpc_status_of_err((enum odsi_err)i);
        cr_expect_neq(status, RPC_OK, "error %d", i);
        cr_expect_neq(status, RPC_UNKNOWN, "error %d", i);
        cr_expect_neq(rpc_err_of_status(status), ODSI_OK, "error %d", i);
        cr_expect_eq(rpc_status_of_err(rpc_err_of_status(status)), status, "error %d", i);
    }
    for (int i = 1; i < 20; i++)
        cr_expect_neq(rpc_err_of_status((enum rpc_status)i), ODSI_OK, "status %d", i);
}
