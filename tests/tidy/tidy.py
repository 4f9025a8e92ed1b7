#!/usr/bin/env python3
"""Checks the rules of this house over the whole tree, as a part of `make test`.

    tests/tidy/tidy.py [ROOT]

Prints one line per finding, "path:line: rule: what is wrong and what to do", and ends with
"N passed, N failed", counting rules. test_tidy.py holds a bad snippet for every rule.
"""
import fnmatch
import os
import re
import subprocess
import sys
from collections import namedtuple

Finding = namedtuple("Finding", "path line rule text")

WIDTH_MAX = 100
FILE_LINES_MAX = 900
FUNCTION_LINES_MAX = 70
TEST_FUNCTION_LINES_MAX = 100

C_ENDS = (".c", ".h", ".cu", ".cuh")
# Kept as they are: data, texts by others, prose, and the snippets that break rules on purpose.
CODE_ENDS = C_ENDS + (".py", ".sh", ".proto", ".mk")
CODE_NAMES = ("Makefile", "setup", "run")
TEXT_ENDS = CODE_ENDS + (".md", ".yaml", ".yml", ".json", ".html", ".css", ".js", ".service",
                         ".txt", ".toml")
NOT_OURS = ("tests/vectors/*", "tests/tidy/*", "proto/grpc/*", "LICENSE", "build/*", "shared/*")
# The record of how the demo model was made, left as it ran.
WIDE = ("deploy/demo/recipe/*",)

# call: (why, where it is allowed)
BANNED = {
    "strcpy": ("has no limit: use snprintf or struct buf", ()),
    "strcat": ("has no limit: use snprintf or struct buf", ()),
    "strncpy": ("leaves texts without an end: use snprintf", ()),
    "sprintf": ("has no limit: use snprintf", ()),
    "vsprintf": ("has no limit: use vsnprintf", ()),
    "gets": ("has no limit: use fgets", ()),
    "strtok": ("keeps hidden state: use strchr or strcspn", ()),
    "atoi": ("cannot report a mistake: use strtol and check the end, or args_read", ()),
    "atol": ("cannot report a mistake: use strtol and check the end, or args_read", ()),
    "atof": ("cannot report a mistake: use strtof and check the end, or args_read", ()),
    "alloca": ("can overrun the stack: use alloc_zeroed", ()),
    "system": ("runs a shell: use posix_spawn or fork and exec", ()),
    "popen": ("runs a shell: use posix_spawn or fork and exec", ()),
    "rand": ("is no generator worth having: use a seeded one of your own", ()),
    "srand": ("is no generator worth having: use a seeded one of your own", ()),
    "signal": ("differs between systems: use sigaction", ()),
    "malloc": ("passes by the checks of alloc.h: use alloc_zeroed", ("common/base/alloc.c",)),
    "calloc": ("passes by the checks of alloc.h: use alloc_zeroed", ("common/base/alloc.c",)),
    "realloc": ("passes by the checks of alloc.h: use alloc_resize", ("common/base/alloc.c",)),
    "free": ("use alloc_free", ("common/base/alloc.c",)),
    "aligned_alloc": ("use alloc_aligned", ("common/base/alloc.c",)),
    "posix_memalign": ("use alloc_aligned", ("common/base/alloc.c",)),
    "strdup": ("use alloc_text", ()),
    "strndup": ("use alloc_text", ()),
    "asprintf": ("use buf_printf", ()),
    "assert": ("vanishes with NDEBUG: use ODSI_ASSERT for our bugs, odsi_fail for the world", ()),
    "exit": ("only main decides that the program ends: return an enum odsi_err",
             ("*main.c", "tests/*")),
    "abort": ("only ODSI_ASSERT ends a program: return an enum odsi_err",
              ("common/base/assert.h", "tests/*")),
}
# The arithmetic has one meaning on every machine; the libraries' differ in their last bits.
BANNED_IN_KERNELS = ("exp", "exp2", "expm1", "log", "log2", "log10", "sin", "cos", "tan", "tanh",
                     "pow", "erf")

# Which folders a folder may include from; the longest prefix of a path decides.
MAY_INCLUDE = {
    "common/base": ("common/base",),
    "common/crypto": ("common/crypto", "common/base"),
    "common/wire": ("common/wire", "common/crypto", "common/base"),
    "common/ledger": ("common/ledger", "common/crypto", "common/base"),
    "common/net": ("common/net", "common/wire", "common/crypto", "common/base"),
    "kernels": ("kernels", "common/base"),
    "worker/model": ("worker/model", "worker/engine", "kernels", "common/base", "common/crypto"),
    "worker/engine": ("worker/model", "worker/engine", "kernels", "common/base", "common/crypto"),
    "worker": ("worker", "kernels", "common"),
    "coordinator": ("coordinator", "common"),
    "tests": ("tests", "worker", "coordinator", "kernels", "common"),
}
# Headers of a library are for the files that wrap it, and for tests.
FOREIGN = {
    "grpc/*": ("common/net/rpc_*",),
    "openssl/*": ("common/crypto/*", "common/net/rpc_*"),
    "sqlite3.h": ("coordinator/store_sqlite.c",),
    "libpq-fe.h": ("coordinator/store_postgres.c",),
    "jansson.h": ("worker/cli/*", "worker/gateway/*", "worker/model/hf_*"),
    "pcre2.h": ("worker/model/tokenizer_split.c",),
    "cuda*": ("kernels/cuda/*",),
    "nccl.h": ("kernels/cuda/*",),
    "criterion/*": (),
    "protobuf-c/*": ("*service.[ch]", "*_client.[ch]", "*_wire.[ch]", "*/rpc_*", "*/cli_*"),
}
GENERATED_USERS = ("*service.[ch]", "*_client.[ch]", "*_wire.[ch]", "*/rpc_*", "*/cli_*", "tests/*")
GENERATED = ("*.pb-c.h", "odsi_version.h", "descriptors.inc")

# Variables that outlive a call and change, each with the reason why it may.
MUTABLE = {
    ("common/base/err.c", "err_text"): "the sentence of the last failure, per thread like errno",
    ("common/base/log.c", "log_program"): "set once in main, before threads start",
    ("common/base/log.c", "log_max"): "set once in main, before threads start",
    ("common/base/alloc.c", "fail_after"): "the test hook that refuses the Nth allocation",
    ("common/crypto/digest.c", "sha256_once"): "guards sha256_md",
    ("common/crypto/digest.c", "sha256_md"): "fetched once from OpenSSL, then only read",
}
# Prefixes of external functions besides the file's stem.
PREFIXES = {
    "common/base/err.h": ("odsi_",),
}
# Instruction sets, which are the prefix in kernels/cpu.
ISA_PREFIXES = ("scalar_", "fma_", "avx2_", "avx512_")


def matches(path, patterns):
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def is_c(path):
    return path.endswith(C_ENDS)


def is_test(path):
    return path.startswith("tests/")


def is_code(path):
    return path.endswith(CODE_ENDS) or os.path.basename(path) in CODE_NAMES


def is_text(path):
    return path.endswith(TEXT_ENDS) or os.path.basename(path) in CODE_NAMES


def stem_of(path):
    return os.path.splitext(os.path.basename(path))[0]


COMMENT_OR_LITERAL = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.DOTALL)


def without_comments_and_literals(text):
    """The same text with every comment and the inside of every literal as spaces."""
    def blank(match):
        found = match.group(0)
        if found[0] == "/":
            return re.sub(r"[^\n]", " ", found)
        return found[0] + " " * (len(found) - 2) + found[0]
    return COMMENT_OR_LITERAL.sub(blank, text)


class Source:
    """One file: its text, and for C the code alone."""

    def __init__(self, path, text):
        self.path = path
        self.text = text
        self.lines = text.split("\n")
        self.code = without_comments_and_literals(text) if is_c(path) else ""
        self.code_lines = self.code.split("\n")

    def line_at(self, offset):
        return self.text.count("\n", 0, offset) + 1

    def includes(self):
        """(line, is_system, path) of each #include."""
        pattern = re.compile(r'^[ \t]*#[ \t]*include[ \t]+([<"])([^>"\n]+)[>"]', re.MULTILINE)
        for match in pattern.finditer(self.text):
            yield self.line_at(match.start()), match.group(1) == "<", match.group(2)


class Tree:
    """The files under check; `paths` also names those that were not read."""

    def __init__(self, texts, paths=None):
        self.sources = [Source(path, text) for path, text in sorted(texts.items())]
        self.paths = set(paths if paths is not None else texts)
        self.makefile = texts.get("Makefile", "")

    def of(self, accept):
        return [source for source in self.sources if accept(source.path)]


RULES = {}


def rule(name):
    def register(function):
        RULES[name] = function
        return function
    return register


# ---- the text of a file ---------------------------------------------------------------------


@rule("width")
def check_width(tree):
    for source in tree.of(lambda path: is_code(path) and not matches(path, WIDE)):
        for number, line in enumerate(source.lines, 1):
            if len(line) > WIDTH_MAX:
                yield source.path, number, f"{len(line)} columns: at most {WIDTH_MAX}"


@rule("white-space")
def check_white_space(tree):
    for source in tree.of(is_text):
        for number, line in enumerate(source.lines, 1):
            if line != line.rstrip():
                yield source.path, number, "white space at the end of the line"
            if "\t" in line and is_c(source.path):
                yield source.path, number, "a tab: indent with spaces"
        if source.text and not source.text.endswith("\n"):
            yield source.path, len(source.lines), "the last line has no end"
        if source.text.endswith("\n\n"):
            yield source.path, len(source.lines), "empty lines at the end of the file"


@rule("unfinished")
def check_unfinished(tree):
    for source in tree.of(is_text):
        for match in re.finditer(r"\b(TODO|FIXME|XXX)\b", source.text):
            yield (source.path, source.line_at(match.start()),
                   f"{match.group(1)}: finish it, or file an issue")


@rule("machine-path")
def check_machine_path(tree):
    for source in tree.of(is_text):
        for match in re.finditer(r"(?<![\w.$}/-])/(work|root)/", source.text):
            yield (source.path, source.line_at(match.start()),
                   f"{match.group(0)} is a path of one machine: say it relative to the root")


@rule("file-length")
def check_file_length(tree):
    for source in tree.of(is_code):
        count = source.text.count("\n")
        if count > FILE_LINES_MAX:
            yield (source.path, FILE_LINES_MAX,
                   f"{count} lines: at most {FILE_LINES_MAX}; split it by state, not by layer")


# ---- functions and names ---------------------------------------------------------------------


@rule("function-length")
def check_function_length(tree):
    for source in tree.of(is_c):
        limit = TEST_FUNCTION_LINES_MAX if is_test(source.path) else FUNCTION_LINES_MAX
        opened = 0
        for number, line in enumerate(source.code_lines, 1):
            if line.startswith("{"):
                opened = number
            elif line.startswith("}") and opened:
                count = number - opened - 1
                if count > limit:
                    yield (source.path, opened,
                           f"a function of {count} lines: at most {limit}; name its parts")
                opened = 0


def calls(source, names):
    pattern = re.compile(r"(?<![\w.>])(%s)[ \t]*\(" % "|".join(names))
    for match in pattern.finditer(source.code):
        yield source.line_at(match.start()), match.group(1)


@rule("banned-call")
def check_banned_calls(tree):
    for source in tree.of(is_c):
        for line, name in calls(source, BANNED):
            why, allowed = BANNED[name]
            if not matches(source.path, allowed):
                yield source.path, line, f"{name} {why}"


@rule("kernel-libm")
def check_kernel_libm(tree):
    names = [name + end for name in BANNED_IN_KERNELS for end in ("", "f", "l")]
    for source in tree.of(lambda path: is_c(path) and path.startswith("kernels/")):
        for line, name in calls(source, names):
            yield (source.path, line,
                   f"{name} of libm differs between machines: use kernels/det.h")


@rule("typedef")
def check_typedef(tree):
    for source in tree.of(is_c):
        for match in re.finditer(r"\btypedef\s+(struct|enum|union)\b", source.code):
            yield (source.path, source.line_at(match.start()),
                   f"typedef of a {match.group(1)}: write '{match.group(1)} name'")


def declared_functions(source):
    """(line, name) of the functions that a header declares for others."""
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", lambda m: re.sub(r"[^\n]", " ", m.group(0)),
                  source.code, flags=re.MULTILINE)
    pattern = re.compile(r"^(?!static|typedef|struct \w+ \{|enum|\})[A-Za-z_][\w \t\n*]*?"
                         r"[ \t\n*](\w+)\(", re.MULTILINE)
    enums = re.compile(r"^enum \w+[ \t\n*]+(\w+)\(", re.MULTILINE)
    for found in (pattern, enums):
        for match in found.finditer(code):
            if not match.group(1).isupper() and "INLINE" not in match.group(0):
                yield source.line_at(match.start(1)), match.group(1)


def prefixes_of(path):
    stem = stem_of(path)
    allowed = [stem.split("_")[0] + "_", *PREFIXES.get(path, ())]
    if stem.endswith("s"):
        allowed.append(stem[:-1] + "_")
    if path.startswith("kernels/") and path.count("/") > 1:
        allowed.append(path.split("/")[1] + "_")  # the backend, as in cuda_rmsnorm
        allowed += ISA_PREFIXES if path.startswith("kernels/cpu/") else ()
    return allowed


@rule("prefix")
def check_prefix(tree):
    # A fixture of one test program needs no prefix, and ops.h declares the ops of all backends.
    ours = lambda path: (path.endswith(".h") and path != "kernels/ops.h"
                         and (not is_test(path) or path.startswith("tests/support/")))
    for source in tree.of(ours):
        allowed = prefixes_of(source.path)
        for line, name in declared_functions(source):
            if name != stem_of(source.path) and not name.startswith(tuple(allowed)):
                yield (source.path, line,
                       f"{name}: external functions here begin with {' or '.join(allowed)}")


# `static struct x *name[N] = ...` at the left edge, or inside a function when static.
VARIABLE = re.compile(
    r"^(?P<specifiers>(?:[ \t]+static|[A-Za-z_])[\w \t*]*?[ \t*])(?P<name>\w+)"
    r"(?:\[[^\n;=]*\])*[ \t]*(?:=[^;=]|;)", re.MULTILINE)
POINTER_VARIABLE = re.compile(
    r"^[ \t]*static\b[^;={}()\n]*\(\*[ \t]*(?P<name>\w+)[^)]*\)\(", re.MULTILINE)
NOT_VARIABLES = ("typedef", "extern", "return", "goto", "struct", "enum", "union", "else", "case")


def mutable_variables(source):
    for match in VARIABLE.finditer(source.code):
        words = match.group("specifiers").split()
        if words[0] in NOT_VARIABLES and not (len(words) > 2 or "*" in match.group("specifiers")
                                              or words[0] == "struct" and len(words) == 2):
            continue
        if words[0] in ("typedef", "extern", "return", "goto", "else", "case"):
            continue
        kept = match.group("specifiers").rsplit("*", 1)[-1]
        if not re.search(r"\bconst\b", kept):
            yield source.line_at(match.start("name")), match.group("name")
    for match in POINTER_VARIABLE.finditer(source.code):
        if "const" not in match.group(0).rsplit("*", 1)[-1]:
            yield source.line_at(match.start("name")), match.group("name")


@rule("mutable-state")
def check_mutable_state(tree):
    allowed = {}
    ours = lambda path: is_c(path) and not is_test(path) and os.path.basename(path) != "main.c"
    for source in tree.of(ours):
        for line, name in mutable_variables(source):
            if (source.path, name) in MUTABLE:
                allowed[source.path, name] = True
            else:
                yield (source.path, line,
                       f"{name} is state that all callers share: keep it in an object")
    for path, name in MUTABLE:
        if path in tree.paths and (path, name) not in allowed:
            yield path, 1, f"{name} is in tidy's list of shared state, but not in the file"


# ---- includes --------------------------------------------------------------------------------


@rule("include-path")
def check_include_path(tree):
    for source in tree.of(is_c):
        for line, is_system, path in source.includes():
            if not is_system and path not in tree.paths and not matches(path, GENERATED):
                yield source.path, line, f'"{path}" is no path from the root'
            if is_system and path in tree.paths:
                yield source.path, line, f'<{path}> is ours: write "{path}"'


@rule("include-direction")
def check_include_direction(tree):
    for source in tree.of(is_c):
        above = [folder for folder in MAY_INCLUDE if source.path.startswith(folder + "/")]
        if not above:
            yield source.path, 1, "this folder is not in tidy's map: say what it may include"
            continue
        folder = max(above, key=len)
        for line, is_system, path in source.includes():
            if is_system or path not in tree.paths:
                continue
            if not any(path.startswith(other + "/") for other in MAY_INCLUDE[folder]):
                yield source.path, line, f'{folder} may not know "{path}"'


@rule("include-foreign")
def check_include_foreign(tree):
    for source in tree.of(is_c):
        if is_test(source.path):
            continue
        for line, _, path in source.includes():
            for pattern, users in FOREIGN.items():
                if matches(path, (pattern,)) and not matches(source.path, users):
                    yield (source.path, line,
                           f"<{path}> is only for {', '.join(users) or 'tests'}")


@rule("include-generated")
def check_include_generated(tree):
    for source in tree.of(is_c):
        for line, _, path in source.includes():
            if path.endswith(".pb-c.h") and not matches(source.path, GENERATED_USERS):
                yield (source.path, line,
                       f'"{path}": generated messages stay in *service, *_client, *_wire, rpc_*, cli_*')


@rule("own-header-first")
def check_own_header_first(tree):
    for source in tree.of(lambda path: path.endswith((".c", ".cu"))):
        own = os.path.splitext(source.path)[0] + ".h"
        if own not in tree.paths:
            continue
        first = next(source.includes(), None)
        if not first or first[2] != own:
            yield source.path, first[0] if first else 1, f'include "{own}" first'


@rule("header-guard")
def check_header_guard(tree):
    for source in tree.of(lambda path: path.endswith((".h", ".cuh"))):
        guard = "ODSI_" + re.sub(r"\W", "_", source.path).upper()
        first = re.search(r"^[ \t]*#.*\n[ \t]*#.*$", source.code, re.MULTILINE)
        wanted = f"#ifndef {guard}\n#define {guard}"
        if not first or first.group(0) != wanted or source.code.split()[-1:] != ["#endif"]:
            yield source.path, 1, f"the header's guard is not {guard}"


@rule("extern-c")
def check_extern_c(tree):
    ours = lambda path: re.fullmatch(r"(kernels|common/base)/\w+\.h", path)
    for source in tree.of(ours):
        if list(declared_functions(source)) and not re.search(r'^extern "C"', source.text,
                                                              re.MULTILINE):
            yield source.path, 1, 'CUDA sources include this: put extern "C" around its functions'


# ---- the tree --------------------------------------------------------------------------------


@rule("unique-stem")
def check_unique_stem(tree):
    for end in (".c", ".h"):
        seen = {}
        for path in sorted(tree.paths):
            if path.endswith(end) and os.path.basename(path) != "main.c":
                other = seen.setdefault(stem_of(path), path)
                if other != path:
                    yield path, 1, f"{other} has the same stem: a prefix must name one file"


def reached_by_make(makefile):
    """Patterns of the paths that the Makefile names. Who uses generated headers is no target."""
    text = makefile.replace("\\\n", " ")
    text = re.sub(r"^PB_USERS .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\$\(\w+\)", "*", text)
    return [re.sub("%", "*", name) for name in re.findall(r"[\w./*%-]+\.(?:c|cu|py)\b", text)]


@rule("dead-file")
def check_dead_file(tree):
    patterns = reached_by_make(tree.makefile)
    for path in sorted(tree.paths):
        if path.endswith((".c", ".cu")) and not matches(path, patterns):
            yield path, 1, "the Makefile builds nothing from it: delete it or build it"
    included = {path for source in tree.of(is_c) for _, _, path in source.includes()}
    for path in sorted(tree.paths):
        if path.endswith((".h", ".cuh")) and path not in included:
            yield path, 1, "nobody includes it: delete it"


@rule("test-name")
def check_test_name(tree):
    for source in tree.of(lambda path: re.fullmatch(r"tests/unit/\w+/test_\w+\.c", path)):
        stem = stem_of(source.path)[len("test_"):]
        for match in re.finditer(r"^Test\((\w+)", source.code, re.MULTILINE):
            if match.group(1) != stem:
                yield (source.path, source.line_at(match.start()),
                       f"suite {match.group(1)}: the file's stem says {stem}")


def check(tree):
    """All findings, in the order of the rules."""
    findings = []
    for name, function in RULES.items():
        findings += [Finding(path, line, name, text) for path, line, text in function(tree)]
    return findings


def list_files(root):
    """Every file that belongs to the tree, as git sees it or, without git, as the disk has it."""
    command = ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        out = subprocess.run(command, check=True, capture_output=True).stdout
        paths = [path for path in out.decode().split("\0") if path]
    except (OSError, subprocess.CalledProcessError):
        paths = [os.path.relpath(os.path.join(folder, name), root)
                 for folder, _, names in os.walk(root) for name in names]
    return [path for path in paths
            if not matches(path, NOT_OURS) and os.path.isfile(os.path.join(root, path))]


def read_tree(root):
    paths = list_files(root)
    texts = {}
    for path in paths:
        if is_text(path):
            with open(os.path.join(root, path), encoding="utf-8") as file:
                texts[path] = file.read()
    return Tree(texts, paths)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    root = sys.argv[1] if len(sys.argv) > 1 else os.path.join(here, "..", "..")
    findings = check(read_tree(root))
    for finding in findings:
        print(f"{finding.path}:{finding.line}: {finding.rule}: {finding.text}")
    failed = len({finding.rule for finding in findings})
    print(f"{len(RULES) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
