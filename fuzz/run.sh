#!/bin/sh
# Fuzzes each target for so many seconds: fuzz/run.sh [SECONDS [TARGET…]]. `fuzz/run.sh check` is the bounded
# run of CI: so many inputs from the corpus and a fixed seed, the same each time. Works on stable Rust; wants a C++
# compiler for libFuzzer. What a target finds is in fuzz/artifacts, and its exit status is not 0 then. New
# inputs stay out of fuzz/corpus, which is what the repository keeps; fuzz/run.sh 0 keeps the useful ones.
set -eu
cd "$(dirname "$0")"
seconds=${1:-10}
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- command report lane stored text fleet brokers

host=$(rustc -vV | sed -n 's/^host: //p')
if ! command -v c++ >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends g++; } || {
        echo "a C++ compiler is missing: install g++" >&2
        exit 1
    }
fi
# As cargo-fuzz does it without a sanitizer, which stable Rust has none of: Rust's own checks panic.
RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Ccodegen-units=1 -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares" \
    cargo build --release --target "$host"

for target in "$@"; do
    new=target/corpus/$target
    mkdir -p "$new" artifacts
    printf '\n== %s\n' "$target"
    if [ "$seconds" = 0 ]; then
        "target/$host/release/$target" -merge=1 "corpus/$target" "$new"
        continue
    fi
    # S2: as much memory as one message of the greatest size may take, and no more.
    log=target/$target.log
    if [ "$seconds" = check ]; then
        bound='-runs=50000 -seed=1 -max_total_time=12'
        new=target/corpus/check.$target
        rm -rf "$new" && mkdir -p "$new"
    else
        bound="-max_total_time=$seconds"
    fi
    # shellcheck disable=SC2086
    "target/$host/release/$target" "$new" "corpus/$target" $bound \
        -max_len=65536 -rss_limit_mb=512 -timeout=10 -artifact_prefix="artifacts/$target-" \
        -print_final_stats=1 >"$log" 2>&1 || {
        tail -40 "$log" >&2
        exit 1
    }
    grep -E 'number_of_executed_units|peak_rss_mb|^Done' "$log"
done
