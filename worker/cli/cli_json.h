/* JSON output: one object on one line of standard output, with jansson.
 *
 * Building needs no check at every step: a constructor that failed gives NULL, jansson refuses to
 * store NULL and says so, the builder adds those answers up and returns NULL, and cli_json_print
 * turns NULL into an error. Any thread. */
#ifndef ODSI_WORKER_CLI_CLI_JSON_H
#define ODSI_WORKER_CLI_CLI_JSON_H
#include "common/base/err.h"
#include "common/crypto/digest.h"

#include <jansson.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

/* Text as it is, with bytes that are not UTF-8 replaced by U+FFFD. */
json_t *cli_json_text(const char *text, size_t size);
/* A number; decimal text above 2^63 - 1, which jansson's integers cannot hold. */
json_t *cli_json_u64(uint64_t value);
/* A finite number; null for NaN and infinities, which JSON does not have. */
json_t *cli_json_f64(double value);
json_t *cli_json_digest(const struct digest *digest);
json_t *cli_json_ids(const uint32_t *ids, uint32_t count);
/* [[id, logit] ...] of the `count` largest logits, the lower id first among equals. */
json_t *cli_json_top(const float *logits, uint32_t vocab_size, uint32_t count);
/* "0-11", as flags write it. */
json_t *cli_json_layers(uint32_t first, uint32_t end);

/* Takes object and prints it; floats with nine digits, which bring a binary32 back exactly.
 * Errors: ODSI_ERR_NO_MEMORY (also for NULL), ODSI_ERR_IO. */
ODSI_MUST_USE enum odsi_err cli_json_print(json_t *object, FILE *to);
#endif
