#!/usr/bin/env bash
# build_wheel.sh [DIR]: builds an sdist, and from it a wheel with both libraries, in DIR (by default dist). The wheel's tag
# is that of the oldest systems that load both. It takes the tools of $VENV (by default .venv).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-dist}
bin=$(realpath -s "${VENV:-.venv}")/bin
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT

# With one time for all files, a commit has one wheel. A tree without a commit has the present time.
if commit_time=$(git log -1 --format=%ct 2>/dev/null); then
    export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$commit_time}
fi
"$bin/python" -m build --no-isolation --outdir "$built" . >"$built/log" 2>&1 || {
    cat "$built/log" >&2
    exit 1
}
libraries=(torchrec_qr/ops/_kernels.so torchrec_qr/ops/_serving.so)
missing=()
contents=$("$bin/python" -m zipfile -l "$built"/*.whl)
for library in "${libraries[@]}"; do grep -q "^$library " <<<"$contents" || missing+=("$library"); done
if [ ${#missing[@]} -gt 0 ]; then
    cat "$built/log" >&2
    echo "The wheel lacks ${missing[*]}: see above why the compiler did not build it (Debian, Ubuntu: apt-get install g++)." >&2
    exit 1
fi

# PyTorch brings its own libraries and the OpenMP of the process. A second OpenMP would start threads of its own.
mkdir -p "$out"
rm -f "$out"/torchrec_qr-*
PATH=$bin:$PATH "$bin/python" -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude libgomp.so.1 \
    --wheel-dir "$out" "$built"/*.whl >"$built/log" 2>&1 || {
    cat "$built/log" >&2
    exit 1
}
mv "$built"/*.tar.gz "$out"
ls -l "$out"/torchrec_qr-*
