#!/usr/bin/env python3
"""Tests of tidy.py: every rule catches the snippets that break it, and lets good code pass.

Ends with "N passed, N failed".
"""
import sys

import tidy

GOOD_HEADER = """\
/* What it is for. */
#ifndef ODSI_COMMON_BASE_ARENA_H
#define ODSI_COMMON_BASE_ARENA_H
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif
#define ARENA_MAX 3u
struct arena;
enum arena_kind { ARENA_A, ARENA_B };

enum odsi_err arena_open(struct arena **out, size_t size,
                         enum arena_kind kind);
const char *arena_name_view(const struct arena *self);
static inline int helper(int x)
{
    return x;
}
#ifdef __cplusplus
}
#endif
#endif
"""
GOOD_SOURCE = """\
#include "common/base/arena.h"

#include <string.h>

/* free(x) and malloc(y) in a comment, "a\\"b", and 'c' are no calls. */
static const char *const names[] = {"system(1)", "free(2)"};
static const int sizes[2] = {1, 2};
const struct arena arena_default = {.free = 3};
static int forward(struct arena *self);
static int (*const handlers[])(struct arena *) = {forward};

struct arena {
    void (*free)(void *memory);
    int count;
};

int arena_use(struct arena *self)
{
    static const int table[3] = {1};
    self->free(self);
    return table[0] + sizes[1] + names[0][0];
}
"""
GOOD = {
    "Makefile": "C_base := $(wildcard common/base/*.c)\nTESTS := $(wildcard tests/unit/$(1)/*.c)\n",
    "common/base/arena.h": GOOD_HEADER,
    "common/base/arena.c": GOOD_SOURCE,
    "tests/unit/base/test_arena.c":
        '#include "common/base/arena.h"\n\nTest(arena, opens)\n{\n}\n',
}


def function_of(lines):
    return "int arena_f(void)\n{\n" + "    f();\n" * lines + "}\n"


def guarded(path, body=""):
    guard = "ODSI_" + "".join(c if c.isalnum() else "_" for c in path).upper()
    return f"#ifndef {guard}\n#define {guard}\n{body}#endif\n"


def body_of(call):
    return "int arena_f(void)\n{\n    %s;\n}\n" % call


# (rule, path, text, line of the finding); added to the good tree or put in a file's place.
BAD = [
    ("width", "common/base/arena.c", "/* " + "x" * 98 + "\n */\n", 1),
    ("width", "tests/tidy.sh", "#" * 101 + "\n", 1),
    ("white-space", "common/base/arena.c", "int arena_f(void); \n", 1),
    ("white-space", "common/base/arena.c", "\n\tint x;\n", 2),
    ("white-space", "README.md", "no end", 1),
    ("white-space", "README.md", "two ends\n\n", 3),
    ("unfinished", "common/base/arena.c", "\n/* TODO: later */\n", 2),
    ("unfinished", "deploy/setup", "# FIXME\n", 1),
    ("machine-path", "README.md", "see /" "work/shared\n", 1),
    ("machine-path", "common/base/arena.c", 'static const char a[] = "/' 'root/x";\n', 1),
    ("file-length", "common/base/arena.c", "\n" * 900 + "int arena_f(void);\n", 900),
    ("function-length", "common/base/arena.c", function_of(71), 2),
    ("function-length", "tests/unit/base/test_arena.c", function_of(101), 2),
    ("banned-call", "common/base/arena.c", body_of("strcpy(a, b)"), 3),
    ("banned-call", "common/base/arena.c", body_of("x = (char *)malloc(3)"), 3),
    ("banned-call", "common/base/arena.c", body_of("if (x)free (y)"), 3),
    ("banned-call", "worker/cli/cli_x.c", body_of("exit(1)"), 3),
    ("banned-call", "tests/unit/base/test_arena.c", body_of("assert(1)"), 3),
    ("kernel-libm", "kernels/ref/ref_x.c", body_of("y = expf(x)"), 3),
    ("kernel-libm", "kernels/cuda/x.cu", body_of("y = sin(x)"), 3),
    ("typedef", "common/base/arena.h", guarded("common/base/arena.h", "typedef struct a a;\n"), 3),
    ("prefix", "common/base/arena.h", guarded("common/base/arena.h", "int other_f(int a);\n"), 3),
    ("prefix", "common/base/arena.h",
     guarded("common/base/arena.h", "enum odsi_err\nmake_it(int a,\n  int b);\n"), 4),
    ("prefix", "common/base/arena.h",
     guarded("common/base/arena.h", "struct arena *open(void);\n"), 3),
    ("mutable-state", "common/base/arena.c", "static int counter;\n", 1),
    ("mutable-state", "common/base/arena.c", "static const char *name = 0;\n", 1),
    ("mutable-state", "common/base/arena.c", "struct arena arena_all = {\n    1,\n};\n", 1),
    ("mutable-state", "common/base/arena.c", "static _Thread_local char text[12];\n", 1),
    ("mutable-state", "common/base/arena.c", "static struct arena table[2][3] = {{0}};\n", 1),
    ("mutable-state", "common/base/arena.c", "int arena_count = 0;\n", 1),
    ("mutable-state", "common/base/arena.c", body_of("static uint64_t seed = 1"), 3),
    ("mutable-state", "common/base/arena.c", "static void (*hook)(int) = 0;\n", 1),
    ("mutable-state", "common/base/err.c", "int no_err_text_here(void);\n", 1),
    ("include-path", "common/base/arena.c", '#include "arena.h"\n', 1),
    ("include-path", "common/base/arena.c", "\n#include <common/base/arena.h>\n", 2),
    ("include-direction", "common/base/arena.c", '#include "common/crypto/digest.h"\n', 1),
    ("include-direction", "common/crypto/digest.c", '#include "common/wire/codec.h"\n', 1),
    ("include-direction", "kernels/ref/ref_x.c", '#include "worker/model/model.h"\n', 1),
    ("include-direction", "worker/engine/engine.c", '#include "common/net/rpc_call.h"\n', 1),
    ("include-direction", "worker/hop/hop.c", '#include "coordinator/members.h"\n', 1),
    ("include-direction", "coordinator/members.c", '#include "kernels/ops.h"\n', 1),
    ("include-direction", "coordinator/members.c", '#include "worker/model/model.h"\n', 1),
    ("include-direction", "attic/x.c", "int x_f(void);\n", 1),
    ("include-foreign", "worker/hop/hop.c", "#include <grpc/grpc.h>\n", 1),
    ("include-foreign", "common/net/rpc.c", "#include <grpc/grpc.h>\n", 1),
    ("include-foreign", "common/wire/codec.c", "#include <openssl/evp.h>\n", 1),
    ("include-foreign", "coordinator/members.c", "#include <sqlite3.h>\n", 1),
    ("include-foreign", "worker/hop/hop.c", "#include <jansson.h>\n", 1),
    ("include-foreign", "worker/cli/cli_x.c", "#include <criterion/criterion.h>\n", 1),
    ("include-generated", "worker/hop/hop.c", '#include "odsi/v1/hop.pb-c.h"\n', 1),
    ("own-header-first", "common/base/arena.c",
     '#include <string.h>\n#include "common/base/arena.h"\n', 1),
    ("own-header-first", "common/base/arena.c", "int arena_f(void);\n", 1),
    ("header-guard", "common/base/arena.h", GOOD_HEADER.replace("BASE_ARENA", "ARENA"), 1),
    ("header-guard", "common/base/arena.h", "#pragma once\nint arena_f(void);\n", 1),
    ("header-guard", "common/base/arena.h", GOOD_HEADER + "int arena_late(void);\n", 1),
    ("extern-c", "kernels/quant.h", guarded("kernels/quant.h", "int quant_f(void);\n"), 1),
    ("unique-stem", "worker/hop/arena.c", "int x;\n", 1),
    ("dead-file", "common/attic/old.c", "int old_f(void);\n", 1),
    ("dead-file", "common/base/unused.h", guarded("common/base/unused.h"), 1),
    ("test-name", "tests/unit/base/test_arena.c", "\nTest(buf, grows)\n{\n}\n", 2),
]
# Exceptions that must stay open, as (path, text); nothing may be found in path.
ALLOWED = [
    ("worker/cli/cli_x.c", '#include <jansson.h>\n#include "odsi/v1/hop.pb-c.h"\n'),
    ("common/net/rpc_call.c", '#include "common/net/rpc_call.h"\n#include <grpc/grpc.h>\n#include <openssl/ssl.h>\n'),
    ("common/base/alloc.c", "static atomic_long fail_after;\n" + body_of("free(malloc(1))")),
    ("common/base/err.c", "static _Thread_local char err_text[3];\n"),
    ("worker/main.c", "static int stopping;\n" + body_of("exit(1)")),
    ("tests/support/process.c", "static int count;\n" + body_of("_exit(1)")),
    ("common/base/arena.c",
     '#include "common/base/arena.h"\n' + function_of(70) + "struct late {\n    int x;\n};\n"),
    ("common/base/arena.c",
     '#include "common/base/arena.h"\nint arena_f(void)\n{\n    int x = 1;\n    return x;\n}\n'
     "static int later(int a,\n                 int b);\nextern char **environ;\n"),
    ("kernels/cpu/cpu_loops.h", guarded("kernels/cpu/cpu_loops.h", "void avx2_fill(int a);\n")),
    ("README.md", "a path: build/work/x, $HOME/work/y, ../work/z and mktemp /tmp/a-XXXXXX\n"),
    ("tests/vectors/big.md", "TODO \n"),
]
# Known to exist, so that a wrong direction is not reported as a wrong path.
EXISTING = ("common/crypto/digest.h", "common/wire/codec.h", "worker/model/model.h",
            "common/net/rpc_call.h", "coordinator/members.h", "kernels/ops.h")


def findings_with(path=None, text=None):
    texts = dict(GOOD)
    if path and not tidy.matches(path, tidy.NOT_OURS):
        texts[path] = text
    return tidy.check(tidy.Tree(texts, [*texts, *EXISTING]))


def main():
    passed = failed = 0

    def expect(condition, claim, findings):
        nonlocal passed, failed
        if condition:
            passed += 1
            return
        failed += 1
        print(f"FAILED: {claim}")
        for finding in findings:
            print(f"    {finding.path}:{finding.line}: {finding.rule}: {finding.text}")

    of_tree = [finding for finding in findings_with() if finding.path not in EXISTING]
    expect(not of_tree, "the good tree has no finding", of_tree)
    for rule, path, text, line in BAD:
        findings = findings_with(path, text)
        hits = [f for f in findings if (f.rule, f.path, f.line) == (rule, path, line)]
        expect(hits, f"{rule} is found in {path}:{line}: {text[:60]!r}", findings)
    for path, text in ALLOWED:
        findings = [finding for finding in findings_with(path, text)
                    if finding.path == path and finding.rule != "dead-file"]
        expect(not findings, f"nothing is found in {path}: {text[:60]!r}", findings)
    for rule in tidy.RULES:
        expect(any(rule == bad[0] for bad in BAD), f"{rule} has a bad snippet", [])
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
