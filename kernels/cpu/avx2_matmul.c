#include "kernels/cpu/avx2_loops.h"
#include "kernels/cpu/avx2_vec.inc"
/* the functions themselves */
#include "kernels/cpu/simd_matmul.inc"
