#!/bin/sh
# build.sh OUT.elf: builds the native guest with the host's own toolchain.
#
# The flags are given here and not in .cargo/config.toml so that `cargo clippy`
# and editors treat this folder like any other. --target is named so that the
# flags do not reach the build script.
set -eu
out=${1:?usage: build.sh OUT.elf}
here=$(cd "$(dirname "$0")" && pwd)
target=x86_64-unknown-linux-gnu
target_dir=${CARGO_TARGET_DIR:-$here/target}/native-guest

# relocation-model, code-model: the image sits at 1 MiB and is not relocated.
# no-redzone: interrupt handlers may share the stack they interrupt.
# -lld: the layout is written for (and tested with) GNU ld.
RUSTFLAGS="-C relocation-model=static -C code-model=kernel -C no-redzone=yes -C linker-features=-lld" \
    cargo build --manifest-path "$here/Cargo.toml" --target-dir "$target_dir" \
    --target $target --release --bin ferry-guest --quiet --locked
cp "$target_dir/$target/release/ferry-guest" "$out"
