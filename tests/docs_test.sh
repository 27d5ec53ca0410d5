#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Each name in `backticks` in docs/afternoon.md must be in the code, outside of C++ comments; what
# looks like a path must be there. No line is over 100 columns. ./dev check runs it.
set -euo pipefail
cd "$(dirname "$0")/.."
page=docs/afternoon.md status=0

code=$(sed 's://.*$::' ./*.h ./*.cpp ./*.cu ./*.cuh tests/*.h tests/*.cpp && cat dev)
words=$(grep -oE '[A-Za-z_][A-Za-z0-9_]*' <<<"$code" | sort -u)
complain() { echo "$page: $1" >&2 && status=1; }

# Spans of code, one a line; the indented blocks are pictures and commands.
# shellcheck disable=SC2016  # Markdown's quotes, not the shell's
spans=$(grep -v '^    ' "$page" | grep -oE '`[^`]+`' | tr -d '`' | sort -u)
while IFS= read -r span; do
    for part in $span; do
        if [[ $part =~ ^[A-Za-z0-9_/.-]+\.(h|cpp|cu|md|sh)$ || $part == ./* ]]; then
            [ -e "$part" ] || complain "there is no $part"
        elif [[ $part != /* && $part != *\<* ]]; then # neither a URL's path nor a token like <bos>
            while IFS= read -r name; do
                grep -qxF "$name" <<<"$words" || complain "$name, of \`$span\`, is not in the code"
            done < <(grep -oE '[A-Za-z_][A-Za-z0-9_]+' <<<"$part" || true)
        fi
    done
done <<<"$spans"

for exercise in tests/exercises/[0-9]_*.cpp; do
    grep -qF "\`$exercise\`" "$page" || complain "it does not mention $exercise"
done
LC_ALL=C.UTF-8 grep -nE '^.{101,}$' "$page" >&2 && complain "lines over 100 columns"
[ $status != 0 ] || echo "$(wc -l <<<"$spans") spans of code in $page, and each name is there"
exit $status
