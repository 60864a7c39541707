#!/bin/sh
# usage: block.sh PAGE WORDS
# Prints the fenced block of a page (README.md, examples/cron/README.md) that has these words, for a test to run. By such
# calls tests/test_pages.py knows which blocks are tested. Exit status: 0, or 1 unless exactly one block has them.
set -eu

[ $# -eq 2 ] || { echo "usage: block.sh PAGE WORDS" >&2; exit 2; }
awk -v words="$2" '
    /^```/ { if (on && index(text, words)) { found++; printf "%s", text }; on = !on; text = ""; next }
    on { text = text $0 "\n" }
    END { exit found != 1 }' "$(dirname "$0")/../$1" || {
    echo "block.sh: $1: not exactly one block has: $2" >&2
    exit 1
}
