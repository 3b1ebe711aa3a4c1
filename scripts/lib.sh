# Shared by all scripts; sourced, not run.
# shellcheck shell=bash
set -euo pipefail

FERRY_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Downloads and images that are dear to make again live outside the tree.
FERRY_CACHE=${FERRY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ferry}
export FERRY_ROOT FERRY_CACHE

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }

# Directory of an unpacked kernel package: kernel_dir 6.12 | 6.12-cloud | 6.1-cloud
kernel_dir() { printf '%s/kernels/%s\n' "$FERRY_CACHE" "$1"; }
# Its version string, as uname -r prints it.
kernel_version() { ls "$(kernel_dir "$1")/lib/modules"; }
# Its bzImage.
kernel_image() { printf '%s/boot/vmlinuz-%s\n' "$(kernel_dir "$1")" "$(kernel_version "$1")"; }
# The ELF kernel taken out of it, for PVH.
kernel_vmlinux() { printf '%s/boot/vmlinux-%s\n' "$(kernel_dir "$1")" "$(kernel_version "$1")"; }
