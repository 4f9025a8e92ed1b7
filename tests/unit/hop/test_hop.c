#include "worker/hop/hop.h"

#include "kernels/ops.h"

#include <criterion/criterion.h>
#include <string.h>

/* A path of three stages over six layers; worker i has an id of bytes i + 1. */
struct fixture {
    struct hop_stage stages[3];
    struct hop_spec spec;
    struct hop_worker worker;
    struct hop_order order;
};

static struct digest id_of(uint8_t value)
{
    struct digest id;
    memset(id.bytes, value, sizeof id.bytes);
    return id;
}

static void set_up(struct fixture *f, uint32_t stage)
{
    memset(f, 0, sizeof *f);
    for (uint32_t i = 0; i < 3; i++) {
        f->stages[i].worker_id = id_of((uint8_t)(i + 1));
        f->stages[i].layer_first = 2 * i;
        f->stages[i].layer_end = 2 * i + 2;
    }
    f->spec.stages = f->stages;
    f->spec.stage_count = 3;
    f->spec.stage = stage;
    f->spec.epoch = 4;
    f->spec.model_id = id_of(9);
    f->spec.numerics_version = NUMERICS_VERSION;
    f->spec.token_limit = 100;
    f->worker = (struct hop_worker){.id = id_of((uint8_t)(stage + 1)),
                                    .model_id = id_of(9),
                                    .layer_count = 6,
                                    .layer_first = 2 * stage,
                                    .layer_end = 2 * stage + 2,
                                    .dim = 8,
                                    .vocab_size = 16};
}

static struct hop_header step_at(const struct fixture *f, uint32_t position, uint32_t token_count)
{
    return (struct hop_header){.epoch = 4,
                               .stage = f->spec.stage,
                               .position = position,
                               .token_count = token_count,
                               .kind = f->spec.stage == 0 ? HOP_TOKENS : HOP_ACTIVATIONS};
}

static enum hop_verdict send_step(struct fixture *f, const struct hop_header *header,
                                  uint8_t sender, enum odsi_err *err)
{
    const struct digest id = id_of(sender);
    const uint64_t row_size = f->spec.stage == 0 ? 4 : 4 * 8;
    return hop_accept(&f->spec, &f->worker, &f->order, header, sender ? &id : NULL,
                      row_size * header->token_count, err);
}

Test(hop, takes_each_position_once_and_in_order)
{
    struct fixture f;
    enum odsi_err err;
    set_up(&f, 1);
    struct hop_header header = step_at(&f, 0, 5);
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_TAKE);
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_DUPLICATE);
    cr_expect_eq(err, ODSI_OK);
    header = step_at(&f, 6, 1);
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE, "a gap");
    cr_expect_eq(err, ODSI_ERR_STATE);
    header = step_at(&f, 3, 4);
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE, "an overlap that is no duplicate");
    header = step_at(&f, 5, 1);
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_TAKE);
    cr_expect_eq(f.order.next_position, 6);
}

Test(hop, begins_at_any_position_that_is_held_and_goes_on_in_order)
{
    for (uint32_t begin = 0; begin <= 10; begin += 5) {
        struct fixture f;
        enum odsi_err err;
        set_up(&f, 1);
        f.order.held_count = 10;
        struct hop_header header = step_at(&f, 11, 2);
        cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE, "beyond what is held");
        cr_expect_eq(err, ODSI_ERR_STATE);
        header = step_at(&f, begin, 4);
        cr_expect_eq(send_step(&f, &header, 1, &err), HOP_TAKE);
        cr_expect_eq(send_step(&f, &header, 1, &err), HOP_DUPLICATE);
        header = step_at(&f, begin + 5, 1);
        cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE, "a gap, held or not");
        header = step_at(&f, begin + 4, 1);
        cr_expect_eq(send_step(&f, &header, 1, &err), HOP_TAKE);
    }
}

/* Goal: a last stage that lies cannot get tokens of its own under the keys of a prompt. */
Test(hop, tokens_of_the_prompt_come_from_the_gateway_alone)
{
    struct fixture f;
    enum odsi_err err;
    set_up(&f, 0);
    f.spec.prompt_count = 70;
    f.spec.prefix_count = 1;
    struct hop_header header = step_at(&f, 0, 64);
    cr_expect_eq(send_step(&f, &header, 3, &err), HOP_REFUSE, "the ring, in place of the gateway");
    cr_expect_eq(err, ODSI_ERR_DENIED);
    cr_expect_eq(send_step(&f, &header, 0, &err), HOP_TAKE);
    header = step_at(&f, 64, 6);
    cr_expect_eq(send_step(&f, &header, 3, &err), HOP_REFUSE);
    cr_expect_eq(send_step(&f, &header, 0, &err), HOP_TAKE);
    header = step_at(&f, 70, 1);
    cr_expect_eq(send_step(&f, &header, 3, &err), HOP_TAKE, "the answer comes around the ring");
}

/* Goal: sessions share pages only when the same gateway sent them over the same stages before. */
Test(hop, a_prefix_scope_is_the_gateway_and_the_stages_before)
{
    struct fixture f;
    const struct digest gateway = id_of(70), other_gateway = id_of(71);
    struct digest scope, other;
    set_up(&f, 1);
    hop_prefix_scope(&scope, &f.spec, &gateway);
    f.stages[1].worker_id = id_of(40);
    f.stages[2].worker_id = id_of(41);
    f.stages[2].layer_end = 7;
    hop_prefix_scope(&other, &f.spec, &gateway);
    cr_expect(digest_equal(&scope, &other), "stages behind it send it nothing of the prompt");
    hop_prefix_scope(&other, &f.spec, &other_gateway);
    cr_expect_not(digest_equal(&scope, &other));
    f.stages[0].layer_end = 1;
    hop_prefix_scope(&other, &f.spec, &gateway);
    cr_expect_not(digest_equal(&scope, &other));
    set_up(&f, 1);
    f.stages[0].worker_id = id_of(42);
    hop_prefix_scope(&other, &f.spec, &gateway);
    cr_expect_not(digest_equal(&scope, &other));
    set_up(&f, 2);
    hop_prefix_scope(&other, &f.spec, &gateway);
    cr_expect_not(digest_equal(&scope, &other));
}

Test(hop, refuses_keys_that_do_not_fit_the_prompt)
{
    static const struct {
        uint32_t prompt_count, prefix_count;
        enum odsi_err err;
    } cases[] = {{100, 1, ODSI_OK},
                 {63, 1, ODSI_ERR_INVALID},
                 {0, 1, ODSI_ERR_INVALID},
                 {101, 0, ODSI_ERR_INVALID},
                 {100, 0, ODSI_OK},
                 {64, 1, ODSI_OK},
                 {64, 2, ODSI_ERR_INVALID},
                 {0, 0, ODSI_OK},
                 {UINT32_MAX, UINT32_MAX, ODSI_ERR_INVALID}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fixture f;
        set_up(&f, 1);
        f.spec.prompt_count = cases[i].prompt_count;
        f.spec.prefix_count = cases[i].prefix_count;
        cr_expect_eq(hop_check_spec(&f.spec, &f.worker), cases[i].err, "case %zu", i);
    }
}

Test(hop, takes_steps_only_from_the_stage_before)
{
    struct fixture f;
    enum odsi_err err;
    set_up(&f, 1);
    struct hop_header header = step_at(&f, 0, 1);
    const uint8_t strangers[] = {0 /* the gateway */, 2, 3, 77};
    for (size_t i = 0; i < sizeof strangers; i++) {
        cr_expect_eq(send_step(&f, &header, strangers[i], &err), HOP_REFUSE);
        cr_expect_eq(err, ODSI_ERR_DENIED);
    }
    set_up(&f, 0);
    header = step_at(&f, 0, 1);
    cr_expect_eq(send_step(&f, &header, 0, &err), HOP_TAKE, "the gateway starts");
    header = step_at(&f, 1, 1);
    cr_expect_eq(send_step(&f, &header, 3, &err), HOP_TAKE, "the ring goes on");
    header = step_at(&f, 2, 1);
    cr_expect_eq(send_step(&f, &header, 2, &err), HOP_REFUSE);
}

Test(hop, refuses_wrong_shapes_and_stale_epochs_without_moving)
{
    struct fixture f;
    enum odsi_err err;
    const struct digest before = id_of(1);
    set_up(&f, 1);
    struct hop_header header = step_at(&f, 0, 2);
    cr_expect_eq(hop_accept(&f.spec, &f.worker, &f.order, &header, &before, 63, &err), HOP_REFUSE);
    cr_expect_eq(err, ODSI_ERR_INVALID);
    header.epoch = 3;
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE);
    cr_expect_eq(err, ODSI_ERR_STATE);
    header = step_at(&f, 0, 2);
    header.stage = 2;
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE);
    header = step_at(&f, 0, 2);
    header.kind = HOP_TOKENS;
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE);
    const uint32_t counts[] = {0, LIMIT_STEP_TOKENS + 1, 101, UINT32_MAX};
    for (size_t i = 0; i < 4; i++) {
        header = step_at(&f, 0, counts[i]);
        cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE);
        cr_expect_eq(err, ODSI_ERR_RANGE);
    }
    header = step_at(&f, UINT32_MAX, 1);
    cr_expect_eq(send_step(&f, &header, 1, &err), HOP_REFUSE);
    cr_expect_eq(f.order.next_position, 0);
}

Test(hop, accepts_a_session_that_fits_this_worker)
{
    for (uint32_t stage = 0; stage < 3; stage++) {
        struct fixture f;
        set_up(&f, stage);
        cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_OK, "%s", odsi_err_text());
    }
}

Test(hop, names_what_is_wrong_with_a_session)
{
    struct fixture f;
    set_up(&f, 1);
    f.spec.model_id = id_of(8);
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_NOT_FOUND);
    set_up(&f, 1);
    f.spec.numerics_version = 99;
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_UNSUPPORTED);
    set_up(&f, 1);
    f.stages[2].layer_first = 5; /* a gap */
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_INVALID);
    set_up(&f, 1);
    f.stages[2].layer_end = 5; /* the last layer is nobody's */
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_INVALID);
    set_up(&f, 1);
    f.worker.id = id_of(50);
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_DENIED);
    set_up(&f, 1);
    f.worker.layer_first = 3;
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_RANGE);
    set_up(&f, 1);
    f.spec.token_limit = 0;
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_INVALID);
    set_up(&f, 2);
    f.spec.sampling.temperature = -1;
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_INVALID);
    set_up(&f, 1);
    f.spec.stage = 3;
    cr_expect_eq(hop_check_spec(&f.spec, &f.worker), ODSI_ERR_INVALID);
}

Test(hop, smooths_round_trips_as_tcp_does)
{
    struct hop_rtt rtt = {0};
    hop_rtt_add(&rtt, 800);
    cr_expect_eq(rtt.mean_us, 800);
    cr_expect_eq(rtt.deviation_us, 400);
    hop_rtt_add(&rtt, 1600);
    cr_expect_eq(rtt.mean_us, 900);
    cr_expect_eq(rtt.deviation_us, 500);
    hop_rtt_add(&rtt, UINT32_MAX);
    cr_expect(rtt.mean_us > 500000000u);
}
