#!/usr/bin/env bash
# Write requirements/cpu.lock and gpu.lock anew from pyproject.toml, with uv in a folder of its own: requirements/lock.sh [OPTION ...]
# Versions of the files as they are stay where they still satisfy pyproject.toml. `--upgrade` takes the newest, `--upgrade-package
# NAME` that of one package. Only metadata is asked for: no GPU is needed, and no wheel is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
uv_version=0.13.9
lowest=3.11  # of requires-python; one file is for all of 3.11 to 3.13

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet "uv==$uv_version"

for build in cpu gpu; do
  mkdir "$work/$build"
  cat > "$work/$build/pyproject.toml" <<'CONFIG'
[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64' and python_full_version < '3.14'"]
CONFIG
done

# PyTorch's CPU build stands in its own index alone, under a version (2.13.0+cpu) that the registry does not have, and needs fewer
# packages than the registry's build of that version: only those, and not torch itself, belong into the file. The three packages
# without which kdray does better are those that setup.sh removes.
torch=$(sed -n 's/^torch=//p' setup.sh)
cat >> "$work/cpu/pyproject.toml" <<CONFIG
override-dependencies = ["torch==$torch"]

[[tool.uv.dependency-metadata]]
name = "torch"
version = "$torch"
requires-dist = [
  "filelock", "fsspec>=0.8.5", "jinja2", "networkx>=2.5.1", "setuptools>=77.0.3", "sympy>=1.13.3", "typing-extensions>=4.10.0",
]

# uv reads one of its files, and only that for Linux says this.
[[tool.uv.dependency-metadata]]
name = "intel-openmp"
version = "2024.2.1"
requires-dist = ["intel-cmplr-lib-ur==2024.2.1"]
CONFIG
left_out=(--no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec)

lock() {
  local build=$1
  shift
  local file="requirements/$build.lock"
  [ ! -f "$file" ] || cp "$file" "$work/$build.lock"
  "$work/venv/bin/uv" pip compile pyproject.toml --project "$work/$build" --extra "$build" --extra wandb --extra mlflow \
    --extra lm-eval --extra dev --universal --python-version "$lowest" --generate-hashes --no-annotate --no-header \
    --no-emit-index-url --no-emit-find-links --quiet --output-file "$work/$build.lock" "$@"
  {
    echo "# Exact versions with hashes for Linux on x86_64, Python 3.11 to 3.13. Written by \`make lock\`; installed by \`LOCKED=1 ./setup.sh\`."
    [ "$build" = gpu ] || echo "# Without torch: its CPU build comes from PyTorch's own index, whose files this cannot know; setup.sh installs it first."
    cat "$work/$build.lock"
  } > "$file"
}

lock cpu "${left_out[@]}" "$@"
lock gpu "$@"
