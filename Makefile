# make demo   set up, then distil the bundled data with the bundled checkpoint   (ARGS="--overwrite" to do it again)
# make test   set up, then run the tests             (ARGS="-k distill" adds options; ARGS=--cov: with coverage, slow)
# make lint   set up, then check format, rules and types
# make setup  set up all that these need, and no more
# make clean  remove .venv and caches
#
# Set-up makes .venv with the versions of constraints.txt. It is done again only when they, pyproject.toml, the Python
# version or the place of the checkout change. PYTHON=python3.12 chooses the interpreter (3.10 to 3.13).

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:
.PHONY: help demo test lint setup clean

PYTHON ?=
ARGS ?=

# Nothing needs the Hub: the demo's checkpoint comes from a package, its data from data/.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What an installation depends on, as one number.
define STATE
import hashlib, pathlib, platform, sys
parts = [pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
parts += [word.encode() for word in (sys.argv[1], platform.python_version(), platform.machine(), str(pathlib.Path.cwd()))]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
endef

# sh -c "$SETUP" setup EXTRAS...: .venv holds all the extras; the last one is the stamp's name.
define SETUP
set -eu
stop() { printf '%s\n' "$$@" >&2; exit 2; }
version_of() { "$$1" -c 'import platform; print(platform.python_version())' 2>/dev/null || echo none; }
fits() { "$$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

others="python3.13 python3.12 python3.11 python3.10 python"
candidates=$${PYTHON:-".venv/bin/python python3 $$others"}  # a .venv that fits is kept unless PYTHON names another
python=
for candidate in $$candidates; do
    if fits "$$candidate"; then python=$$candidate; break; fi
done
[ -n "$$python" ] || stop "nlpxfer needs Python 3.10 to 3.13; none among: $$candidates" \
    "  python3 is $$(version_of python3)" "  Try: install one of them and name it: make $$GOAL PYTHON=python3.12"

extras=$$(printf '%s,' "$$@"); extras=$${extras%,}
for level in "$$@"; do :; done
stamp=.venv/.installed-$$level
version=$$(version_of "$$python")
if [ "$$(cat $$stamp 2>/dev/null)" = "$$("$$python" -c "$$STATE" "$$extras")" ] && [ "$$(version_of .venv/bin/python)" = "$$version" ]; then
    exit 0
fi

start=$$(date +%s)
if [ "$$(version_of .venv/bin/python)" != "$$version" ] || [ ! -e .venv/.made ]; then
    if [ "$$python" = .venv/bin/python ] && ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        for python in python3 $$others; do if fits "$$python"; then break; fi; done
    fi
    if [ "$$python" != .venv/bin/python ]; then
        echo "Set-up: .venv with Python $$version"
        # Debian's Python has no ensurepip until python3-venv is installed; then a pip from outside fills .venv.
        "$$python" -m venv --clear .venv >/dev/null 2>&1 || "$$python" -m venv --clear --without-pip .venv || stop \
            "Python $$version cannot make a virtual environment." "  Try: install its venv module (Debian: apt install python3-venv)"
    fi
    : > .venv/.made
fi

pip=
if .venv/bin/python -m pip --version >/dev/null 2>&1; then pip=".venv/bin/python -m pip"; fi
for candidate in "$$python" python3 $$others; do
    if [ -z "$$pip" ] && "$$candidate" -m pip --python .venv/bin/python --version >/dev/null 2>&1; then
        pip="$$candidate -m pip --python .venv/bin/python"
    fi
done
[ -n "$$pip" ] || stop "No Python here has pip 22.3 or newer." \
    "  Try: install python3-venv or python3-pip (Debian: apt install python3-venv), then: rm -rf .venv"
echo "Set-up: installing nlpxfer[$$extras] into .venv; the first time takes minutes (progress: .venv/install.log)"
if ! $$pip install -c constraints.txt -e ".[$$extras]" >.venv/install.log 2>&1; then
    tail -n 15 .venv/install.log >&2
    stop "The installation failed; all its output is in .venv/install.log." "  Try: make $$GOAL again, with a network"
fi

done= ; for level in "$$@"; do  # the stamps come last: a set-up that was broken off is done again
    done=$${done:+$$done,}$$level
    "$$python" -c "$$STATE" "$$done" > ".venv/.installed-$$level"
done
echo "Set-up: done in $$(( $$(date +%s) - start )) s"
endef

# How many cores this process may use; under `accelerate launch` torch would otherwise run on one.
define CORES
import os
print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
endef

export STATE SETUP CORES PYTHON
export GOAL = $(firstword $(MAKECMDGOALS))

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo:
	@sh -c "$$SETUP" setup demo
	@OMP_NUM_THREADS="$${OMP_NUM_THREADS:-$$(.venv/bin/python -c "$$CORES")}"; export OMP_NUM_THREADS; \
	PATH="$(CURDIR)/.venv/bin:$$PATH"; export PATH; set -x; \
	accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/distill.py $(ARGS)

test:
	@sh -c "$$SETUP" setup demo test
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist worksteal $(ARGS)

lint:
	@sh -c "$$SETUP" setup demo test dev
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

setup:
	@sh -c "$$SETUP" setup demo test dev

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .coverage
