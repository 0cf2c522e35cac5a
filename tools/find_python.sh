#!/usr/bin/env bash
# Print the Python that .venv is made with: $1 when given, else one that is proven; exit 2 with a hint when there is none.
# With TORCH=system it is the interpreter that has torch, which is the container's python3.
set -u
proven="3.11 3.12 3.13"
hint="hint: install one of them (for Debian and Ubuntu: apt-get install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12"

version_of() {  # works in every Python from 2.6 on; empty when the command does not run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_proven() { case " $proven " in *" $1 "*) [ -n "$1" ] ;; *) false ;; esac; }

if [ -n "${1:-}" ]; then
    found=$(version_of "$1")
    if [ -z "$found" ]; then
        echo "error: PYTHON=$1 is no Python that runs" >&2
        echo "$hint" >&2
        exit 2
    fi
    if ! is_proven "$found"; then
        echo "error: PYTHON=$1 is Python $found; megatron-cpt runs on ${proven// /, }" >&2
        echo "$hint" >&2
        exit 2
    fi
    command -v "$1"
    exit 0
fi

candidates="python3.11 python3.12 python3.13 python3 python"
[ "${TORCH:-}" != system ] || candidates="python3 python python3.12 python3.13 python3.11"
seen=""
for name in $candidates; do
    found=$(version_of "$name")
    if is_proven "$found"; then
        command -v "$name"
        exit 0
    fi
    [ -z "$found" ] || seen="$seen $name is Python $found;"
done
echo "error: no Python ${proven// /, } on PATH:${seen:- there is no python3 at all;} megatron-cpt runs on these" >&2
echo "$hint" >&2
exit 2
