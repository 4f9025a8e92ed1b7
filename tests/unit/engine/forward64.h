/* The forward pass in binary64 with the C library's functions: what the engine's results are held
 * against to be right, and not only equal everywhere. It reads the tensors by name and shares with
 * the engine the hyper-parameters and the meaning of a quantized block (kernels/quant.h), nothing
 * else: no activation is rounded, no key or value, and sums have no order. */
#ifndef ODSI_TESTS_UNIT_ENGINE_FORWARD64_H
#define ODSI_TESTS_UNIT_ENGINE_FORWARD64_H
#include <stdint.h>

/* logits[count][vocab_size] of the model at path after each of the tokens. Ends the test when
 * something is missing. */
void forward64_run(double *logits, const char *path, const uint32_t *tokens, uint32_t count);
#endif
