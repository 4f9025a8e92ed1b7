/* The manifest: what a model is, in canonical bytes. Its SHA-256 is the model id, so a worker with
 * other weights, another tokenizer or other hyper-parameters has another id and is found at the
 * door (protocol.md, "Session" 1).
 *
 * Layout, integers little-endian:
 *   8   "ODSIMAN2"
 *   4   arch, dim, layer_count, head_count, kv_head_count, head_dim, ffn_dim, vocab_size,
 *       context_length, expert_count, expert_used_count, features, act, rope_style, rope_dim,
 *       window, window_period (seventeen u32)
 *   4   rms_eps, rope_base, rope_base_windowed, rope_linear, rope_amplitude, embed_scale,
 *       attention_scale, attention_softcap, logit_softcap (nine f32, as their bits)
 *   32  SHA-256 of the tokenizer's canonical bytes (tokenizer.h)
 *   2+n name (u16 length, at most 127 printable ASCII bytes): general.name, empty when the file
 *       has none, so that renaming a file does not make another model of it
 *   4   tensor count, then per tensor in ascending byte order of its name:
 *       2+n name, 4 type, 4 dim_count, 8 x dim_count dims, 8 size, 32 SHA-256 of its bytes
 *
 * Threads: pure functions; any thread. */
#ifndef ODSI_WORKER_MODEL_MANIFEST_H
#define ODSI_WORKER_MODEL_MANIFEST_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/crypto/digest.h"
#include "worker/model/model.h"
#include "worker/model/source.h"

#include <stddef.h>
#include <stdint.h>

#define MANIFEST_SIZE_MAX (32u << 20)

/* What a manifest says about a tensor besides its description. */
struct manifest_digest {
    struct digest digest; /* of its bytes */
    size_t at;            /* where manifest_write put it */
};

/* Appends the manifest of these tensors, which are in ascending order of their names, and sets
 * where their digests are. name is the model's own (see above). Check out's status. */
void manifest_write(struct buf *out, const struct model_params *params, const char *name,
                    const struct digest *tokenizer_digest, const struct source_tensor *tensors,
                    struct manifest_digest *digests, uint32_t tensor_count);

/* Reads the fixed part of a manifest that came from a peer: checks its structure to the last byte
 * and all limits. Fills params (weight_size too) and the tokenizer's digest.
 * Errors: ODSI_ERR_CORRUPT. */
ODSI_MUST_USE enum odsi_err manifest_read(const uint8_t *data, size_t size,
                                          struct model_params *params,
                                          struct digest *tokenizer_digest);
#endif
