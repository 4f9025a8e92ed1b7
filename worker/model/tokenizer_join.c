#include "worker/model/tokenizer_join.h"

#include "common/base/alloc.h"

#include <string.h>

#define NONE TOKENIZER_NONE

/* A part of the word that is going to be one token; they form a list in text order. */
struct tokenizer_symbol {
    uint64_t hash; /* of its text; SPM only */
    uint32_t start;
    uint32_t size; /* 0: joined to its left neighbour */
    uint32_t id;   /* NONE: no token yet, so it is spelt in bytes */
    uint32_t previous, next;
};

/* Two neighbours that make a token. It is out of date when their sizes no longer add up to size:
 * symbols only grow, so the sum never comes back. */
struct tokenizer_joint {
    uint32_t priority; /* the lower first; among equals the leftmost */
    uint32_t left;
    uint32_t size;
    uint32_t id; /* what they make */
};

/* ---- words that were seen before ------------------------------------------------------------ */

#define SEEN_WORD_SIZE_MAX 64u
#define SEEN_IDS_MAX       6u
#define SEEN_TEXT_SIZE_MIN 256u /* shorter texts hold few words twice */
#define SEEN_COUNT_MAX     16384u

struct tokenizer_seen {
    uint32_t offset;
    uint16_t size; /* 0: nothing yet */
    uint16_t count;
    uint32_t ids[SEEN_IDS_MAX];
};

/* The place of a word; another one with the same place takes it over. So the hash is quick and
 * need not be safe from those who choose the words. */
static struct tokenizer_seen *seen_place(const struct tokenizer_join *self, const char *word,
                                         uint32_t size)
{
    uint64_t hash = size;
    for (; size >= 8; word += 8, size -= 8) {
        uint64_t part;
        memcpy(&part, word, 8);
        hash = (hash ^ part) * UINT64_C(0x9e3779b97f4a7c15);
        hash ^= hash >> 32;
    }
    uint64_t part = 0;
    memcpy(&part, word, size);
    hash = (hash ^ part) * UINT64_C(0x9e3779b97f4a7c15);
    return &self->seen[hash >> 40 & self->seen_mask];
}

/* ---- the heap ------------------------------------------------------------------------------- */

static int is_before(const struct tokenizer_joint *a, const struct tokenizer_joint *b)
{
    return a->priority < b->priority || (a->priority == b->priority && a->left < b->left);
}

/* There is room for two per symbol: each join takes one out and puts at most two in. */
static void heap_push(struct tokenizer_join *self, struct tokenizer_joint joint)
{
    uint32_t at = self->heap_count++;
    while (at > 0 && is_before(&joint, &self->heap[(at - 1) / 2])) {
        self->heap[at] = self->heap[(at - 1) / 2];
        at = (at - 1) / 2;
    }
    self->heap[at] = joint;
}

static struct tokenizer_joint heap_pop(struct tokenizer_join *self)
{
    const struct tokenizer_joint first = self->heap[0];
    const struct tokenizer_joint last = self->heap[--self->heap_count];
    uint32_t at = 0;
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= self->heap_count)
            break;
        if (child + 1 < self->heap_count && is_before(&self->heap[child + 1], &self->heap[child]))
            child++;
        if (!is_before(&self->heap[child], &last))
            break;
        self->heap[at] = self->heap[child];
        at = child;
    }
    self->heap[at] = last;
    return first;
}

/* ---- joining -------------------------------------------------------------------------------- */

static uint64_t joined_hash(const struct tokenizer_join *self, const struct tokenizer_symbol *left,
                            const struct tokenizer_symbol *right)
{
    return tokenizer_table_joined_hash(&self->tokenizer->table, left->hash, right->hash,
                                       right->size);
}

/* Remembers left and its right neighbour when together they are a token. */
static void try_joint(struct tokenizer_join *self, uint32_t left)
{
    const struct tokenizer *tokenizer = self->tokenizer;
    if (left == NONE || self->symbols[left].next == NONE)
        return;
    const struct tokenizer_symbol *a = &self->symbols[left];
    const struct tokenizer_symbol *b = &self->symbols[a->next];
    struct tokenizer_joint joint = {.left = left, .size = a->size + b->size};
    if (tokenizer->kind == TOKENIZER_SPM) {
        if (joint.size > tokenizer->table.size_max)
            return;
        joint.id = tokenizer_table_find(&tokenizer->table, joined_hash(self, a, b),
                                        self->text + a->start, joint.size);
        if (joint.id == NONE)
            return;
        joint.priority = tokenizer->tokens[joint.id].priority;
    } else {
        if (a->id == NONE || b->id == NONE)
            return;
        const struct tokenizer_merge *merge =
            tokenizer_merges_find(&tokenizer->merges, a->id, b->id);
        if (!merge)
            return;
        joint.id = merge->id;
        joint.priority = merge->rank;
    }
    heap_push(self, joint);
}

static void join_all(struct tokenizer_join *self)
{
    const int needs_hash = self->tokenizer->kind == TOKENIZER_SPM;
    self->heap_count = 0;
    for (uint32_t i = 0; i + 1 < self->symbol_count; i++)
        try_joint(self, i);
    while (self->heap_count > 0) {
        const struct tokenizer_joint joint = heap_pop(self);
        struct tokenizer_symbol *left = &self->symbols[joint.left];
        if (left->size == 0 || left->next == NONE)
            continue;
        struct tokenizer_symbol *right = &self->symbols[left->next];
        if (left->size + right->size != joint.size)
            continue;
        if (needs_hash)
            left->hash = joined_hash(self, left, right);
        left->size = joint.size;
        left->id = joint.id;
        right->size = 0;
        left->next = right->next;
        if (left->next != NONE)
            self->symbols[left->next].previous = joint.left;
        try_joint(self, left->previous);
        try_joint(self, joint.left);
    }
}

/* ---- words ---------------------------------------------------------------------------------- */

/* One symbol per byte in byte-level BPE; else one per UTF-8 character, and one per byte that
 * belongs to none. */
static void split(struct tokenizer_join *self, uint32_t offset, uint32_t size)
{
    const struct tokenizer *tokenizer = self->tokenizer;
    const int by_byte = tokenizer->kind == TOKENIZER_BYTE_BPE;
    uint32_t count = 0;
    for (uint32_t at = 0; at < size;) {
        const char *text = self->text + offset + at;
        const int length = by_byte ? 1 : tokenizer_utf8_length((const uint8_t *)text, size - at);
        struct tokenizer_symbol *symbol = &self->symbols[count];
        *symbol = (struct tokenizer_symbol){
            .start = offset + at,
            .size = length > 0 ? (uint32_t)length : 1,
            .previous = count - 1, /* NONE for the first */
            .next = count + 1,
        };
        if (by_byte) {
            symbol->id = tokenizer->byte_tokens[(uint8_t)*text];
        } else {
            symbol->hash = tokenizer_table_hash(&tokenizer->table, text, symbol->size);
            symbol->id = tokenizer_table_find(&tokenizer->table, symbol->hash, text, symbol->size);
        }
        at += symbol->size;
        count++;
    }
    self->symbols[count - 1].next = NONE;
    self->symbol_count = count;
}

static void emit(const struct tokenizer_join *self, struct tokenizer_ids *list)
{
    for (uint32_t i = 0; i != NONE; i = self->symbols[i].next) {
        const struct tokenizer_symbol *symbol = &self->symbols[i];
        if (symbol->id != NONE)
            tokenizer_ids_add(list, symbol->id);
        else
            tokenizer_spell(self->tokenizer, self->text + symbol->start, symbol->size, list);
    }
}

static enum odsi_err make_room(struct tokenizer_join *self, uint32_t size)
{
    if (size <= self->capacity)
        return ODSI_OK;
    alloc_free(self->symbols);
    alloc_free(self->heap);
    self->symbols = NULL;
    self->heap = NULL;
    self->capacity = 0;
    uint32_t capacity = 256;
    while (capacity < size)
        capacity += capacity / 2;
    enum odsi_err err = alloc_zeroed(&self->symbols, capacity, sizeof *self->symbols);
    if (err == ODSI_OK)
        err = alloc_zeroed(&self->heap, 2 * (size_t)capacity, sizeof *self->heap);
    if (err == ODSI_OK)
        self->capacity = capacity;
    return err;
}

/* The id of the whole word, when that settles it. */
static uint32_t whole_word(const struct tokenizer *tokenizer, const char *word, uint32_t size)
{
    if (size == 1 && tokenizer->kind == TOKENIZER_BYTE_BPE)
        return tokenizer->byte_tokens[(uint8_t)*word];
    if (!tokenizer->ignore_merges || size > tokenizer->table.size_max)
        return NONE;
    return tokenizer_table_find(&tokenizer->table,
                                tokenizer_table_hash(&tokenizer->table, word, size), word, size);
}

enum odsi_err tokenizer_join_word(struct tokenizer_join *self, uint32_t offset, uint32_t size,
                                  struct tokenizer_ids *list)
{
    const char *word = self->text + offset;
    struct tokenizer_seen *seen = NULL;
    if (self->seen && size <= SEEN_WORD_SIZE_MAX) {
        seen = seen_place(self, word, size);
        if (seen->size == size && memcmp(self->text + seen->offset, word, size) == 0) {
            for (uint32_t i = 0; i < seen->count; i++)
                tokenizer_ids_add(list, seen->ids[i]);
            return ODSI_OK;
        }
    }
    const uint32_t id = whole_word(self->tokenizer, word, size);
    if (id != NONE) {
        tokenizer_ids_add(list, id);
        if (seen)
            *seen = (struct tokenizer_seen){offset, (uint16_t)size, 1, {id}};
        return ODSI_OK;
    }
    const enum odsi_err err = make_room(self, size);
    if (err != ODSI_OK)
        return err;
    split(self, offset, size);
    join_all(self);
    emit(self, list);
    if (seen) {
        struct tokenizer_ids kept = {.ids = seen->ids, .capacity = SEEN_IDS_MAX};
        emit(self, &kept);
        seen->offset = offset;
        seen->size = kept.count <= SEEN_IDS_MAX ? (uint16_t)size : 0;
        seen->count = (uint16_t)kept.count;
    }
    return ODSI_OK;
}

enum odsi_err tokenizer_join_open(struct tokenizer_join *self, const struct tokenizer *tokenizer,
                                  const char *text, size_t size)
{
    *self = (struct tokenizer_join){.tokenizer = tokenizer, .text = text};
    if (size < SEEN_TEXT_SIZE_MIN)
        return ODSI_OK;
    uint32_t count = 64;
    while (count < size / 16 && count < SEEN_COUNT_MAX)
        count *= 2;
    self->seen_mask = count - 1;
    return alloc_zeroed(&self->seen, count, sizeof *self->seen);
}

void tokenizer_join_close(struct tokenizer_join *self)
{
    alloc_free(self->symbols);
    alloc_free(self->heap);
    alloc_free(self->seen);
    *self = (struct tokenizer_join){.tokenizer = NULL};
}
