#include "common/net/rpc_descriptor.h"

#include "common/base/alloc.h"

#include <string.h>

#define FILES_MAX 256u
#define DEPTH_MAX 32u /* of messages inside messages */

/* Field numbers of google/protobuf/descriptor.proto. */
enum {
    SET_FILE = 1,
    FILE_NAME = 1,
    FILE_PACKAGE = 2,
    FILE_DEPENDENCY = 3,
    FILE_MESSAGE = 4,
    FILE_ENUM = 5,
    FILE_SERVICE = 6,
    FILE_EXTENSION = 7,
    MESSAGE_FIELD = 2,
    MESSAGE_NESTED = 3,
    MESSAGE_ENUM = 4,
    MESSAGE_EXTENSION = 6,
    MESSAGE_ONEOF = 8,
    ENUM_VALUE = 2,
    SERVICE_METHOD = 2,
    ANY_NAME = 1, /* of a message, field, enum, value, service, method */
};

struct span {
    const uint8_t *data;
    size_t size;
};

struct rpc_descriptor {
    size_t count;
    struct span files[FILES_MAX];
};

/* ---- the wire ----------------------------------------------------------------------------- */

static int take_varint(struct span *self, uint64_t *out)
{
    *out = 0;
    for (unsigned shift = 0; shift < 64 && self->size > 0; shift += 7) {
        const uint8_t byte = *self->data;
        self->data++;
        self->size--;
        *out |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return 1;
    }
    return 0;
}

/* Takes one field off the front. value is empty for numbers. Returns 1, 0 at the end, -1 for bytes
 * that are no protobuf. */
static int take_field(struct span *self, uint64_t *field, struct span *value)
{
    uint64_t key = 0;
    uint64_t number = 0;
    size_t skip = 0;
    if (self->size == 0)
        return 0;
    if (!take_varint(self, &key))
        return -1;
    *field = key >> 3;
    *value = (struct span){.data = self->data, .size = 0};
    switch (key & 7) {
    case 0:
        return take_varint(self, &number) ? 1 : -1;
    case 1:
        skip = 8;
        break;
    case 2:
        if (!take_varint(self, &number) || number > self->size)
            return -1;
        *value = (struct span){.data = self->data, .size = (size_t)number};
        skip = (size_t)number;
        break;
    case 5:
        skip = 4;
        break;
    default:
        return -1;
    }
    if (skip > self->size)
        return -1;
    self->data += skip;
    self->size -= skip;
    return 1;
}

static struct span find_field(struct span message, uint64_t wanted)
{
    struct span value;
    uint64_t field = 0;
    while (take_field(&message, &field, &value) == 1)
        if (field == wanted)
            return value;
    return (struct span){.data = NULL, .size = 0};
}

static int span_is(struct span span, const char *text)
{
    return span.size > 0 && strlen(text) == span.size && memcmp(span.data, text, span.size) == 0;
}

/* ---- files -------------------------------------------------------------------------------- */

enum odsi_err rpc_descriptor_open(struct rpc_descriptor **out, const uint8_t *data, size_t size)
{
    struct rpc_descriptor *self = NULL;
    struct span set = {.data = data, .size = size};
    struct span file;
    uint64_t field = 0;
    int state = 0;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    while ((state = take_field(&set, &field, &file)) == 1) {
        if (field != SET_FILE)
            continue;
        if (self->count == FILES_MAX || find_field(file, FILE_NAME).size == 0) {
            state = -1;
            break;
        }
        self->files[self->count++] = file;
    }
    if (state != 0) {
        alloc_free(self);
        return odsi_fail(ODSI_ERR_CORRUPT, "a descriptor set of %zu bytes that cannot be read",
                         size);
    }
    *out = self;
    return ODSI_OK;
}

enum odsi_err rpc_descriptor_open_own(struct rpc_descriptor **out)
{
    static const uint8_t own[] = {
#include "descriptors.inc" /* made by the Makefile from proto/ */
    };
    return rpc_descriptor_open(out, own, sizeof own);
}

void rpc_descriptor_close(struct rpc_descriptor **self)
{
    alloc_free(*self);
    *self = NULL;
}

size_t rpc_descriptor_file_count(const struct rpc_descriptor *self)
{
    return self->count;
}

const uint8_t *rpc_descriptor_file_view(const struct rpc_descriptor *self, size_t index,
                                        size_t *size)
{
    *size = self->files[index].size;
    return self->files[index].data;
}

static size_t by_name(const struct rpc_descriptor *self, struct span name)
{
    for (size_t i = 0; i < self->count; i++) {
        const struct span own = find_field(self->files[i], FILE_NAME);
        if (own.size == name.size && memcmp(own.data, name.data, name.size) == 0)
            return i;
    }
    return RPC_DESCRIPTOR_NONE;
}

size_t rpc_descriptor_by_name(const struct rpc_descriptor *self, const char *name)
{
    return by_name(self, (struct span){.data = (const uint8_t *)name, .size = strlen(name)});
}

void rpc_descriptor_mark_imports(const struct rpc_descriptor *self, size_t index, uint8_t *marks)
{
    struct span file = self->files[index];
    struct span name;
    uint64_t field = 0;
    if (marks[index])
        return; /* also what ends the recursion, which is at most file_count deep */
    marks[index] = 1;
    while (take_field(&file, &field, &name) == 1) {
        if (field != FILE_DEPENDENCY)
            continue;
        const size_t imported = by_name(self, name);
        if (imported != RPC_DESCRIPTOR_NONE)
            rpc_descriptor_mark_imports(self, imported, marks);
    }
}

/* ---- symbols ------------------------------------------------------------------------------ */

/* When symbol begins with the name of thing as a whole component, what is left of it: "" or the
 * text behind the dot. Else NULL. */
static const char *strip_name(struct span thing, const char *symbol)
{
    const struct span name = find_field(thing, ANY_NAME);
    if (name.size == 0 || strncmp(symbol, (const char *)name.data, name.size) != 0)
        return NULL;
    symbol += name.size;
    if (symbol[0] == '.' && symbol[1] != '\0')
        return symbol + 1;
    return symbol[0] == '\0' ? symbol : NULL;
}

/* Whether symbol is the name of one of the fields `member` of parent. */
static int has_member(struct span parent, uint64_t member, const char *symbol)
{
    struct span value;
    uint64_t field = 0;
    while (take_field(&parent, &field, &value) == 1)
        if (field == member && span_is(find_field(value, ANY_NAME), symbol))
            return 1;
    return 0;
}

/* Enum values are siblings of their enum, as in C. */
static int enum_defines(struct span thing, const char *symbol)
{
    return span_is(find_field(thing, ANY_NAME), symbol) || has_member(thing, ENUM_VALUE, symbol);
}

static int message_defines(struct span message, const char *symbol, unsigned depth)
{
    struct span value;
    uint64_t field = 0;
    const char *rest = strip_name(message, symbol);
    if (!rest || depth == DEPTH_MAX)
        return 0;
    if (rest[0] == '\0' || has_member(message, MESSAGE_FIELD, rest) ||
        has_member(message, MESSAGE_EXTENSION, rest) || has_member(message, MESSAGE_ONEOF, rest))
        return 1;
    while (take_field(&message, &field, &value) == 1)
        if ((field == MESSAGE_NESTED && message_defines(value, rest, depth + 1)) ||
            (field == MESSAGE_ENUM && enum_defines(value, rest)))
            return 1;
    return 0;
}

static int service_defines(struct span service, const char *symbol)
{
    const char *rest = strip_name(service, symbol);
    return rest && (rest[0] == '\0' || has_member(service, SERVICE_METHOD, rest));
}

static int file_defines(struct span file, const char *symbol)
{
    const struct span package = find_field(file, FILE_PACKAGE);
    struct span value;
    uint64_t field = 0;
    if (package.size > 0) {
        if (strncmp(symbol, (const char *)package.data, package.size) != 0 ||
            symbol[package.size] != '.')
            return 0;
        symbol += package.size + 1;
    }
    while (take_field(&file, &field, &value) == 1)
        if ((field == FILE_MESSAGE && message_defines(value, symbol, 0)) ||
            (field == FILE_ENUM && enum_defines(value, symbol)) ||
            (field == FILE_SERVICE && service_defines(value, symbol)) ||
            (field == FILE_EXTENSION && span_is(find_field(value, ANY_NAME), symbol)))
            return 1;
    return 0;
}

size_t rpc_descriptor_by_symbol(const struct rpc_descriptor *self, const char *symbol)
{
    for (size_t i = 0; i < self->count; i++)
        if (file_defines(self->files[i], symbol))
            return i;
    return RPC_DESCRIPTOR_NONE;
}
