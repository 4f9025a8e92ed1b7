/* Made-up vocabularies: the bytes, the special tokens of a known one, and for the rest words over a
 * to z, the short ones first, so that every longer one can be joined from two that are there. */
#ifndef ODSI_WORKER_MODEL_SYNTH_VOCAB_H
#define ODSI_WORKER_MODEL_SYNTH_VOCAB_H
#include "worker/model/gguf_writer.h"
#include "worker/model/synth_shape.h"

#include <stdint.h>

/* The fewest tokens that a vocabulary of this kind can have. */
uint32_t synth_vocab_size_min(enum synth_vocabulary vocabulary);
/* Writes all tokenizer.* keys. size >= synth_vocab_size_min. */
void synth_vocab_write(struct gguf_writer *out, enum synth_vocabulary vocabulary, uint32_t size);
#endif
