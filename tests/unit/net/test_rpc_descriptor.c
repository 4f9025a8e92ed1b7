/* The embedded description of our services, and the hand-written reader of it. */
#include "common/base/alloc.h"
#include "common/net/rpc_descriptor.h"

#include <criterion/criterion.h>
#include <string.h>

/* Two files: "a.proto" of package p with message M (field f, nested N with enum E of value V) and
 * service S with method Do; "b.proto" without package, importing a.proto, with message M. */
static const uint8_t set[] = {
    0x0a, 0x3d,                                         /* file, 61 bytes */
    0x0a, 0x07, 'a',  '.',  'p',  'r',  'o',  't', 'o', /* name */
    0x12, 0x01, 'p',                                    /* package */
    0x22, 0x1d,                                         /* message_type, 29 bytes */
    0x0a, 0x01, 'M',                                    /*   name */
    0x12, 0x05, 0x0a, 0x01, 'f',  0x18, 0x01,           /*   field, with its number */
    0x1a, 0x11,                                         /*   nested_type, 17 bytes */
    0x0a, 0x01, 'N',                                    /*     name */
    0x22, 0x0c,                                         /*     enum_type, 12 bytes */
    0x0a, 0x01, 'E',  0x12, 0x07, 0x0a, 0x01, 'V', 0x10, 0x00, 0x18, 0x00, /* and a value */
    0x32, 0x0b,                                                            /* service, 11 bytes */
    0x0a, 0x01, 'S',  0x12, 0x06, 0x0a, 0x02, 'D', 'o',  0x12, 0x00, 0x2d,
    0x00, 0x00, 0x00, 0x00,                             /* an unknown fixed32 */
    0x0a, 0x17,                                         /* file, 23 bytes */
    0x0a, 0x07, 'b',  '.',  'p',  'r',  'o',  't', 'o', /* name */
    0x1a, 0x07, 'a',  '.',  'p',  'r',  'o',  't', 'o', /* dependency */
    0x22, 0x03, 0x0a, 0x01, 'M',                        /* message_type */
};

Test(rpc_descriptor, finds_files_by_name_and_by_every_kind_of_symbol)
{
    static const struct {
        const char *symbol;
        size_t file;
    } cases[] = {
        {"p.M", 0},
        {"p.M.f", 0},
        {"p.M.N", 0},
        {"p.M.N.E", 0},
        {"p.M.N.V", 0},
        {"p.S", 0},
        {"p.S.Do", 0},
        {"M", 1},
        {"p", RPC_DESCRIPTOR_NONE},
        {"", RPC_DESCRIPTOR_NONE},
        {"p.", RPC_DESCRIPTOR_NONE},
        {"p.M.", RPC_DESCRIPTOR_NONE},
        {"p.Mf", RPC_DESCRIPTOR_NONE},
        {"p.M.f.x", RPC_DESCRIPTOR_NONE},
        {"p.S.Don", RPC_DESCRIPTOR_NONE},
        {"p.N", RPC_DESCRIPTOR_NONE},
        {"p.M.N.E.V", RPC_DESCRIPTOR_NONE},
        {".p.M", RPC_DESCRIPTOR_NONE},
        {"M.f", RPC_DESCRIPTOR_NONE},
        {"q.M", RPC_DESCRIPTOR_NONE},
    };
    struct rpc_descriptor *self = NULL;
    cr_assert_eq(rpc_descriptor_open(&self, set, sizeof set), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(rpc_descriptor_file_count(self), 2);
    cr_expect_eq(rpc_descriptor_by_name(self, "a.proto"), 0);
    cr_expect_eq(rpc_descriptor_by_name(self, "b.proto"), 1);
    cr_expect_eq(rpc_descriptor_by_name(self, "c.proto"), RPC_DESCRIPTOR_NONE);
    cr_expect_eq(rpc_descriptor_by_name(self, ""), RPC_DESCRIPTOR_NONE);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        cr_expect_eq(rpc_descriptor_by_symbol(self, cases[i].symbol), cases[i].file, "'%s'",
                     cases[i].symbol);
    uint8_t marks[2] = {0};
    rpc_descriptor_mark_imports(self, 0, marks);
    cr_expect(marks[0] && !marks[1]);
    rpc_descriptor_mark_imports(self, 1, marks);
    cr_expect(marks[0] && marks[1]);
    rpc_descriptor_close(&self);
    rpc_descriptor_close(&self);
}

/* Goal: no bytes make the reader leave its input (the sanitizers watch).
 * How: each prefix, and each byte changed in turn, on the heap. */
Test(rpc_descriptor, damaged_sets_are_refused_or_read_without_harm)
{
    for (size_t i = 0; i < 2 * sizeof set; i++) {
        const size_t size = i < sizeof set ? i : sizeof set;
        uint8_t *copy = NULL;
        struct rpc_descriptor *self = NULL;
        cr_assert_eq(alloc_zeroed(&copy, size, 1), ODSI_OK);
        memcpy(copy, set, size);
        if (i >= sizeof set)
            copy[i - sizeof set] ^= 0xff;
        if (rpc_descriptor_open(&self, copy, size) == ODSI_OK) {
            uint8_t marks[2] = {0};
            (void)rpc_descriptor_by_symbol(self, "p.M.N.V");
            (void)rpc_descriptor_by_symbol(self, "p.S.Do");
            if (rpc_descriptor_file_count(self) == 2)
                rpc_descriptor_mark_imports(self, 1, marks);
            rpc_descriptor_close(&self);
        } else {
            cr_expect_null(self);
        }
        alloc_free(copy);
    }
}

Test(rpc_descriptor, our_own_set_knows_our_services_and_is_closed_under_import)
{
    static const char *const symbols[] = {"odsi.v1.Hop",
                                          "odsi.v1.Hop.Steps",
                                          "odsi.v1.Inference",
                                          "odsi.v1.StepHeader.budget_us",
                                          "grpc.health.v1.Health",
                                          "grpc.health.v1.HealthCheckResponse.ServingStatus",
                                          "grpc.reflection.v1.ServerReflection",
                                          "grpc.reflection.v1alpha.ServerReflection"};
    struct rpc_descriptor *self = NULL;
    cr_assert_eq(rpc_descriptor_open_own(&self), ODSI_OK, "%s", odsi_err_text());
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++)
        cr_expect_neq(rpc_descriptor_by_symbol(self, symbols[i]), RPC_DESCRIPTOR_NONE, "%s",
                      symbols[i]);
    const size_t hop = rpc_descriptor_by_name(self, "odsi/v1/hop.proto");
    const size_t types = rpc_descriptor_by_name(self, "odsi/v1/types.proto");
    uint8_t marks[256] = {0};
    cr_assert_neq(hop, RPC_DESCRIPTOR_NONE);
    cr_assert_neq(types, RPC_DESCRIPTOR_NONE);
    rpc_descriptor_mark_imports(self, hop, marks);
    cr_expect(marks[hop] && marks[types]);
    rpc_descriptor_close(&self);
}
