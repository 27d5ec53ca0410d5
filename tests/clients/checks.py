# SPDX-License-Identifier: Apache-2.0
"""What the tests of clients share: checks that are counted, and a run of all tests of a file."""
import sys
import traceback

count = 0


def check(condition, *why):
    global count
    count += 1
    if not condition:
        raise AssertionError(*why)


def run(**tests):
    """Runs every test, also after one that fails: NAME=TEST prints one line for each."""
    failed = 0
    for name, test in tests.items():
        before = count
        try:
            about = test() or ""
            print(f"{name.replace('_', '-')} {about}: {count - before} checks")
        except Exception:
            failed += 1
            print(f"{name} failed", file=sys.stderr)
            traceback.print_exc()
    if failed:
        sys.exit(1)
