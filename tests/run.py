#!/usr/bin/env python3
"""Runs test programs one after another and adds up what they say.

    tests/run.py --build build/release NAME=COMMAND ...

A program's output goes to BUILD/tests/NAME.log and is shown only when it failed. It fails when it
exits with another code than 0, reports a failed test, reports no test at all, runs too long, or
when a sanitizer or valgrind wrote into its log: Criterion does not look at how the process of a
passed test ended, so that a leak found there changes no exit code.

The last line is "N passed, N failed".
"""
import argparse
import glob
import os
import re
import shlex
import signal
import subprocess
import sys
import time

SHOWN_LINES = 80
CRITERION = re.compile(
    r"Synthesis: Tested: (\d+) \| Passing: (\d+) \| Failing: (\d+) \| Crashing: (\d+)")
PLAIN = re.compile(r"^(\d+) passed, (\d+) failed$", re.MULTILINE)
REPORT = re.compile(
    r"ERROR: \w+Sanitizer|WARNING: ThreadSanitizer: |Sanitizer:DEADLYSIGNAL"
    r"|: runtime error: |^==\d+== \S", re.MULTILINE)

# Reports go to files, since programs that a test starts write into logs of their own.
# detect_stack_use_after_return stays off: its frames lack the alignment of AVX-512 variables, and
# the compiler's own loads then fault (GCC bug 110027).
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:allocator_may_return_null=1",
    "LSAN_OPTIONS": "print_suppressions=0:suppressions="
                    + os.path.abspath(os.path.join(os.path.dirname(__file__), "support/lsan.supp")),
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # gRPC is not compiled with -fsanitize=thread, so its own synchronization is invisible.
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:second_deadlock_stack=1:history_size=4:"
                    "allocator_may_return_null=1",
}


def test_environment(build, report_path):
    """Ours, without the ODSI_* that would answer for flags of the programs under test."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ODSI_")}
    for name, value in os.environ.items():
        if name == "ODSI_CPU" or name.startswith("ODSI_TEST_"):
            env[name] = value
    env["ODSI_BIN"] = os.path.abspath(os.path.join(build, "bin"))
    for name, value in SANITIZER_OPTIONS.items():
        env[name] = f"{value}:log_path={report_path}:{os.environ.get(name, '')}"
    return env


def read_text(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def run(command, log_path, env, limit_s):
    """Returns the exit code, or None when the time limit passed. Leaves no process behind."""
    with open(log_path, "wb") as log:
        try:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                       stdin=subprocess.DEVNULL, env=env, start_new_session=True)
        except OSError as error:
            log.write(f"{command[0]}: {error.strerror}\n".encode())
            return 127
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def judge(code, text, limit_s):
    """Returns (passed, failed, why it failed or '')."""
    criterion = CRITERION.findall(text)
    plain = PLAIN.findall(text)
    passed = failed = 0
    if criterion:
        _, passed, failing, crashing = map(int, criterion[-1])
        failed = failing + crashing
    elif plain:
        passed, failed = map(int, plain[-1])
    why = ""
    if code is None:
        why = f"still running after {limit_s} s"
    elif failed:
        why = f"{failed} failed"
    elif REPORT.search(text):
        why = "a sanitizer or valgrind reported something"
    elif code != 0:
        why = f"exit code {code}"
    elif passed == 0:
        why = "it ran no test"
    if why and not failed:
        failed = 1
    return passed, failed, why


def show_failure(log_path, text):
    lines = text.splitlines()
    if len(lines) > SHOWN_LINES:
        print(f"    ... ({len(lines) - SHOWN_LINES} lines more in {log_path})")
    for line in lines[-SHOWN_LINES:]:
        print("    " + line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", required=True, help="build folder of this variant")
    parser.add_argument("--limit", type=int, default=900, help="seconds for one program")
    parser.add_argument("--title", default="tests", help="word before the totals")
    parser.add_argument("tests", nargs="+", metavar="NAME=COMMAND")
    options = parser.parse_args()

    folder = os.path.abspath(os.path.join(options.build, "tests"))
    os.makedirs(folder, exist_ok=True)
    started = time.monotonic()
    passed_all = failed_all = 0
    for test in options.tests:
        name, _, command = test.partition("=")
        log_path = os.path.join(folder, name + ".log")
        report_path = os.path.join(folder, name + ".report")
        for old in glob.glob(report_path + ".*"):
            os.remove(old)
        env = test_environment(options.build, report_path)
        began = time.monotonic()
        code = run(shlex.split(command), log_path, env, options.limit)
        text = read_text(log_path) + "".join(map(read_text, sorted(glob.glob(report_path + ".*"))))
        passed, failed, why = judge(code, text, options.limit)
        passed_all += passed
        failed_all += failed
        print(f"  {'FAIL' if why else 'ok':4} {name:32} {passed:5} passed "
              f"{time.monotonic() - began:7.1f} s{': ' + why if why else ''}", flush=True)
        if why:
            show_failure(log_path, text)
    seconds = time.monotonic() - started
    print(f"{options.title}: {passed_all} passed, {failed_all} failed in {seconds:.0f} s")
    print(f"{passed_all} passed, {failed_all} failed")
    return 1 if failed_all else 0


if __name__ == "__main__":
    sys.exit(main())
