/* protobuf-c under a memory limit. */
#include "common/base/alloc.h"
#include "common/base/limits.h"
#include "common/net/rpc_pack.h"
#include "grpc/health/v1/health.pb-c.h"
#include "grpc/reflection/v1/reflection.pb-c.h"

#include <criterion/criterion.h>
#include <string.h>

static const ProtobufCMessageDescriptor *const request_type =
    &grpc__health__v1__health_check_request__descriptor;

Test(rpc_pack, what_is_packed_unpacks_to_the_same)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    Grpc__Health__V1__HealthCheckRequest *read = NULL;
    char name[] = "some.Service";
    struct buf packed;
    buf_init(&packed, 1024);
    request.service = name;
    cr_assert_eq(rpc_pack(&packed, &request.base), ODSI_OK);
    cr_expect_eq(packed.size, 2 + strlen(name));
    cr_assert_eq(rpc_unpack_bytes(&read, request_type, packed.data, packed.size), ODSI_OK);
    cr_expect_str_eq(read->service, name);
    rpc_unpack_free(read);
    rpc_unpack_free(NULL);
    buf_free(&packed);
}

Test(rpc_pack, packing_resets_the_buffer_and_respects_its_ceiling)
{
    Grpc__Health__V1__HealthCheckRequest request = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    char name[] = "12345678";
    struct buf packed;
    buf_init(&packed, 10);
    request.service = name;
    cr_expect_eq(rpc_pack(&packed, &request.base), ODSI_OK);
    cr_expect_eq(rpc_pack(&packed, &request.base), ODSI_OK);
    cr_expect_eq(packed.size, 10);
    buf_free(&packed);
    buf_init(&packed, 9);
    cr_expect_eq(rpc_pack(&packed, &request.base), ODSI_ERR_RANGE);
    buf_free(&packed);
}

Test(rpc_pack, malformed_bytes_are_invalid_and_leave_null)
{
    static const struct {
        const char *bytes;
        size_t size;
    } cases[] = {{"\x0a\x05hi", 4}, {"\x0a", 1}, {"\xff", 1}, {"\x0b\x0c", 2}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int not_null = 0;
        void *message = &not_null;
        cr_expect_eq(rpc_unpack_bytes(&message, request_type, (const uint8_t *)cases[i].bytes,
                                      cases[i].size),
                     ODSI_ERR_INVALID, "case %zu", i);
        cr_expect_null(message);
    }
}

/* Goal: a message may not take more memory than the limit, however small it is on the wire.
 * How: repeated empty submessages; each two bytes become some 40 bytes of memory. */
Test(rpc_pack, a_message_that_grows_over_the_limit_is_refused)
{
    const size_t counts[] = {1000, 100000, LIMIT_CONTROL_MESSAGE_SIZE / 2};
    for (size_t i = 0; i < 3; i++) {
        uint8_t *bytes = NULL;
        Grpc__Reflection__V1__ListServiceResponse *list = NULL;
        cr_assert_eq(alloc_zeroed(&bytes, counts[i], 2), ODSI_OK);
        for (size_t k = 0; k < counts[i]; k++)
            bytes[2 * k] = 0x0a;
        enum odsi_err err = rpc_unpack_bytes(
            &list, &grpc__reflection__v1__list_service_response__descriptor, bytes, 2 * counts[i]);
        cr_expect_eq(err, i < 2 ? ODSI_OK : ODSI_ERR_INVALID, "%zu messages", counts[i]);
        if (err == ODSI_OK)
            cr_expect_eq(list->n_service, counts[i]);
        rpc_unpack_free(list);
        alloc_free(bytes);
    }
}

Test(rpc_pack, every_failed_allocation_of_an_unpack_is_an_error_without_a_leak)
{
    static const uint8_t bytes[] = "\x0a\x03\x0a\x01"
                                   "a\x0a\x03\x0a\x01"
                                   "b\x0a\x00";
    long failed = 0;
    for (enum odsi_err err = ODSI_ERR_NO_MEMORY; err != ODSI_OK; failed++) {
        Grpc__Reflection__V1__ListServiceResponse *list = NULL;
        alloc_fail_after(failed);
        err = rpc_unpack_bytes(&list, &grpc__reflection__v1__list_service_response__descriptor,
                               bytes, sizeof bytes - 1);
        alloc_fail_after(-1);
        cr_expect(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY);
        rpc_unpack_free(list);
        cr_assert_lt(failed, 50);
    }
    cr_expect_gt(failed, 4);
}
