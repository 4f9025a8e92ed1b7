#include "kernels/cpu/cpu_backend.h"

#include <stddef.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

const char *cpu_level_name(enum cpu_level level)
{
    static const char *const names[CPU_LEVEL_COUNT] = {"scalar", "avx2", "avx512"};
    return names[level];
}

#if defined(__x86_64__)
/* __builtin_cpu_supports also asks whether the system saves the registers. */
static const char *lacks_avx2(void)
{
    unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!__builtin_cpu_supports("avx2"))
        return "AVX2";
    if (!__builtin_cpu_supports("fma"))
        return "FMA";
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_F16C))
        return "F16C";
    return NULL;
}

static const char *lacks_avx512(void)
{
    if (!__builtin_cpu_supports("avx512f"))
        return "AVX-512F";
    if (!__builtin_cpu_supports("avx512bw"))
        return "AVX-512BW";
    if (!__builtin_cpu_supports("avx512vl"))
        return "AVX-512VL";
    if (!__builtin_cpu_supports("avx512dq"))
        return "AVX-512DQ";
    if (!__builtin_cpu_supports("avx512vnni"))
        return "AVX-512 VNNI";
    return lacks_avx2();
}
#endif

const char *cpu_level_lacks(enum cpu_level level)
{
    if (level == CPU_SCALAR)
        return NULL;
#if defined(__x86_64__)
    return level == CPU_AVX2 ? lacks_avx2() : lacks_avx512();
#else
    return "an x86-64 processor";
#endif
}
