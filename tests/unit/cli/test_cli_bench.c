#include "worker/cli/cli_bench.h"

#include <criterion/criterion.h>

Test(cli_bench, percentiles_are_values_that_were_measured)
{
    double values[] = {5, 1, 4, 2, 3};
    cr_expect_eq(cli_bench_percentile(values, 5, 0.5), 3);
    cr_expect_eq(cli_bench_percentile(values, 5, 0.99), 5);
    cr_expect_eq(cli_bench_percentile(values, 5, 0.2), 1);
    cr_expect_eq(cli_bench_percentile(values, 5, 0.21), 2);
    cr_expect_eq(cli_bench_percentile(values, 5, 0), 1);
    cr_expect_eq(cli_bench_percentile(values, 5, 1), 5);
    double one[] = {7};
    cr_expect_eq(cli_bench_percentile(one, 1, 0.5), 7);
}
