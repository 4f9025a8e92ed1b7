#include "kernels/cpu/cpu_loops.h"
void avx2_loops_fill(struct cpu_loops *loops)
{
    (void)loops;
}
