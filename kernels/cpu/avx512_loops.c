#include "kernels/cpu/cpu_loops.h"
void avx512_loops_fill(struct cpu_loops *loops)
{
    (void)loops;
}
