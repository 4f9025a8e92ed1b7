#include "worker/cli/cli_sampling.h"

#include <criterion/criterion.h>
#include <string.h>

Test(cli_sampling, the_default_is_greedy_and_valid)
{
    const struct cli_sampling sampling = {0};
    struct sampler_params params;
    cr_expect_eq(cli_sampling_check(&sampling), ODSI_OK);
    cli_sampling_params(&sampling, &params);
    cr_expect_eq(params.temperature, 0.0f);
    cr_expect_eq(params.penalty_window, 64, "what the gateway makes of 0 too");
}

Test(cli_sampling, hands_every_flag_on)
{
    const struct cli_sampling sampling = {.temperature = 0.5f,
                                          .top_k = 3,
                                          .top_p = 0.25f,
                                          .min_p = 0.125f,
                                          .repetition_penalty = 1.5f,
                                          .penalty_window = 7,
                                          .seed = 11,
                                          .stop = {.items = {"a", "bc"}, .count = 2}};
    struct sampler_params params;
    struct stop stop;
    cr_assert_eq(cli_sampling_check(&sampling), ODSI_OK);
    cli_sampling_params(&sampling, &params);
    cr_expect_eq(params.temperature, 0.5f);
    cr_expect_eq(params.top_k, 3);
    cr_expect_eq(params.top_p, 0.25f);
    cr_expect_eq(params.min_p, 0.125f);
    cr_expect_eq(params.repetition_penalty, 1.5f);
    cr_expect_eq(params.penalty_window, 7);
    cr_expect_eq(params.seed, 11);
    cr_assert_eq(cli_sampling_stop(&sampling, &stop), ODSI_OK);
    cr_assert_eq(stop.string_count, 2);
    cr_expect_eq(memcmp(stop.strings[1].data, "bc", 2), 0);
}

Test(cli_sampling, refuses_what_a_worker_would_refuse)
{
    struct cli_sampling sampling = {.temperature = -1.0f};
    cr_expect_eq(cli_sampling_check(&sampling), ODSI_ERR_INVALID);
    sampling = (struct cli_sampling){.top_p = 1.5f};
    cr_expect_eq(cli_sampling_check(&sampling), ODSI_ERR_INVALID);
    sampling = (struct cli_sampling){.stop = {.items = {""}, .count = 1}};
    cr_expect_eq(cli_sampling_check(&sampling), ODSI_ERR_INVALID);
    cr_expect(strstr(odsi_err_text(), "--stop"), "%s", odsi_err_text());
    sampling.stop.count = LIMIT_STOP_COUNT + 1;
    for (uint32_t i = 0; i < sampling.stop.count; i++)
        sampling.stop.items[i] = "x";
    cr_expect_eq(cli_sampling_check(&sampling), ODSI_ERR_INVALID);
}
