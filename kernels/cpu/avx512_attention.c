#include "kernels/cpu/avx512_loops.h"
#include "kernels/cpu/avx512_vec.inc"
/* the functions themselves */
#include "kernels/cpu/simd_attention.inc"
