#!/usr/bin/env bash
# Creates .venv with everything that constraints.txt pins and installs auricle into it; `make setup` calls it.
#   PYTHON=python3.12 launch/setup/setup.sh      with another interpreter (3.11 or newer)
# It does nothing when .venv already matches pyproject.toml and constraints.txt.
set -euo pipefail
cd "$(dirname "$0")/../.."

pick_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "auricle needs Python 3.11 or newer; tried: ${PYTHON:-python3, python3.11 … python3.14}." \
    "Install one, or name it: PYTHON=/path/to/python make setup" >&2
  exit 1
}

pinned() { sed -n "s/^$1==//p" constraints.txt; }

quietly() { # runs pip; on a terminal one line shows the package that it is at, elsewhere nothing but errors
  if [ -t 1 ]; then
    "$@" | while IFS= read -r line; do
      case "$line" in Collecting* | *Downloading* | Building* | Installing*) printf '\r\033[K%.78s' "$line" ;; esac
    done
    printf '\r\033[K'
  else
    "$@" > /dev/null
  fi
}

install_torchaudio() {
  # PyPI's torchaudio is linked to CUDA; beside a CPU build of torch its Python part works without those libraries.
  local version folder
  version=$(pinned torchaudio)
  if .venv/bin/python -W ignore -c 'import sys, torch; sys.exit(torch.version.cuda is None)'; then
    quietly .venv/bin/pip install --no-deps "torchaudio==$version"
  elif ! .venv/bin/pip list --format=freeze 2>/dev/null | grep -qx "torchaudio==$version+cpu"; then
    folder=$(mktemp -d)
    quietly .venv/bin/pip download --no-deps --dest "$folder" "torchaudio==$version"
    .venv/bin/python launch/setup/repack_torchaudio.py "$folder"/torchaudio-*.whl "$folder/cpu" > /dev/null
    .venv/bin/pip install -qq --no-deps "$folder"/cpu/*.whl
    rm -r "$folder"
  fi
}

main() {
  local python stamp
  mkdir -p .venv
  exec 9> .venv/.setup.lock
  flock 9 2>/dev/null || true # two makes at once; macOS has no flock
  stamp=.venv/.installed-$(cat pyproject.toml constraints.txt launch/setup/setup.sh launch/setup/repack_torchaudio.py | cksum | tr ' ' -)
  [ -e "$stamp" ] && return
  python=$(pick_python)
  echo "setting up .venv with $("$python" --version); the first time takes some minutes"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  echo "1/4 pip and setuptools"
  quietly .venv/bin/pip install "pip==$(pinned pip)" "setuptools==$(pinned setuptools)"
  echo "2/4 torch $(pinned torch), the largest package"
  quietly .venv/bin/pip install --constraint constraints.txt "torch==$(pinned torch)"
  echo "3/4 torchaudio $(pinned torchaudio)"
  install_torchaudio
  echo "4/4 auricle and $(grep -c == constraints.txt) pinned packages"
  quietly .venv/bin/pip install --constraint constraints.txt --editable '.[dev]'
  rm -f .venv/.installed-*
  touch "$stamp"
  echo "ready: .venv/bin/auricle --help"
}

main
