# shellcheck shell=bash
# Sourced by the other scripts: makes `python` one that has this project installed.
#
#   prepare_environment [EXTRA]    EXTRA is an optional-dependency group of pyproject.toml
#
# An active environment (venv or conda) is used as it is and only completed; otherwise .venv is
# made. Nothing is installed when nothing has changed since the last time.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# What an installation depends on, as one checksum.
installation_key() {
    cat pyproject.toml constraints.txt | cksum | tr -s ' \t' '-'
}

install_project() {
    local extra=$1 torch_version constraints=(-c constraints.txt)
    # An environment that brings its own PyTorch (a CUDA build, say) keeps it.
    if python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
        [ "$OWN_ENVIRONMENT" = yes ] || constraints=()
    else
        torch_version=$(grep '^torch==' constraints.txt)
        echo "Installing $torch_version ..."
        python -m pip install --quiet --disable-pip-version-check "$torch_version" ||
            fail "pip could not install $torch_version (see above)."
    fi
    echo "Installing torchtitan_mixtures${extra:+ with [$extra]} ..."
    python -m pip install --quiet --disable-pip-version-check "${constraints[@]}" \
        -e ".${extra:+[$extra]}" || fail "pip could not install the project (see above)."
}

prepare_environment() {
    local extra=${1:-} prefix stamp key
    OWN_ENVIRONMENT=no
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        OWN_ENVIRONMENT=yes
        if [ ! -x .venv/bin/python ]; then
            local base=${PYTHON:-python3}
            "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
                fail "$base is missing or older than Python 3.11; name another with PYTHON=..."
            echo "Creating .venv ..."
            "$base" -m venv .venv ||
                fail "$base cannot create a virtual environment (on Debian: install python3-venv)."
        fi
        PATH=$PWD/.venv/bin:$PATH
        export VIRTUAL_ENV=$PWD/.venv
    fi
    prefix=$(python -c 'import sys; print(sys.prefix)')
    stamp=$prefix/.torchtitan_mixtures${extra:+-$extra}
    key=$(installation_key)-$(printf '%s' "$PWD" | cksum | tr -s ' \t' '-')
    # The stamp is written last: an interrupted installation is repeated.
    if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
        install_project "$extra"
        # With the extra everything without it is there as well.
        printf '%s\n' "$key" | tee "$prefix/.torchtitan_mixtures" >"$stamp" 2>/dev/null || true
    fi
}
