#!/bin/sh
# Usage: check_tools.sh PYTHON. Says what a build lacks on this machine, all at once, and how to get it.
python=$1
missing=0

lacks() {
    echo "missing: $1" >&2
    echo "    $2" >&2
    missing=1
}

if ! command -v "$python" >/dev/null 2>&1; then
    lacks "a Python interpreter named $python" "apt install python3 python3-venv python3-dev, or make PYTHON=python3.12"
elif ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    lacks "Python 3.10 to 3.13 ($python is $("$python" -V 2>&1))" "name another: make PYTHON=python3.12"
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        lacks "Python's venv module" "apt install python3-venv"
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        lacks "Python's C headers (Python.h)" "apt install python3-dev"
fi

rust=$(sed -n 's/^rust-version = "1\.\([0-9]*\)"$/\1/p' Cargo.toml)
if ! command -v cargo >/dev/null 2>&1; then
    lacks "cargo (Rust 1.$rust or newer)" "https://rustup.rs"
elif minor=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\).*/\1/p') && [ "${minor:-0}" -lt "$rust" ]; then
    lacks "Rust 1.$rust or newer (this is 1.$minor)" "rustup update, or https://rustup.rs"
fi

command -v "${CXX:-c++}" >/dev/null 2>&1 || lacks "a C++ compiler (${CXX:-c++})" "apt install g++"

exit $missing
