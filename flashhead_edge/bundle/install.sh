#!/bin/sh
# Installs this bundle without a network, and takes it away again.
#   sh install.sh [install|check|back|uninstall] [--prefix DIR]
# DIR is /opt/flashhead for root, ~/.local/share/flashhead for others. In it:
#   versions/ID   a virtual environment and the model, one for each installed bundle
#   current       -> versions/ID: switched last, so that whatever fails before leaves what was there
#   previous      -> the version before, to which `back` returns
# All is in functions, called in the last line: a copy of this file that was cut off does nothing.
set -eu

TARGET='@TARGET@'
VERSION='@VERSION@'
PYTHON='@PYTHON@'
PLATFORM='@PLATFORM@'
GLIBC='@GLIBC@'
NEEDED_KIB='@NEEDED_KIB@'
SYSTEM_PACKAGES='@SYSTEM_PACKAGES@'

die() {
    echo "install.sh: $*" >&2
    exit 1
}

check_files() {
    cd "$HERE" || die "$HERE: it cannot be entered; unpack the bundle where you may read"
    [ -s SHA256SUMS ] || die "$HERE/SHA256SUMS: the file is missing or empty, expected it beside install.sh; copy the archive again and unpack it"
    grep -Eqv '^[0-9a-f]{64}  [^ ].*$' SHA256SUMS && die "$HERE/SHA256SUMS: a line is damaged, expected a checksum and a path; copy the archive again and unpack it"
    listed=$(cut -c67- SHA256SUMS | LC_ALL=C sort)
    there=$(find . -type f ! -path ./SHA256SUMS | cut -c3- | LC_ALL=C sort)
    odd=$(printf '%s\n%s\n' "$listed" "$there" | LC_ALL=C sort | uniq -u | head -n 1)
    if [ -n "$odd" ] && [ -f "$odd" ]; then
        die "$HERE/$odd: SHA256SUMS does not name it, expected the bundle's files alone; unpack the archive into an empty folder"
    elif [ -n "$odd" ]; then
        die "$HERE/$odd: the file is missing, expected all that SHA256SUMS names; the archive was copied or unpacked in part: copy it again and unpack it"
    fi
    bad=$(LC_ALL=C sha256sum --check --quiet SHA256SUMS 2>/dev/null | head -n 1 | sed 's/: FAILED.*$//')
    [ -z "$bad" ] || die "$HERE/$bad: its content is not the bundle's (SHA-256), expected it unchanged; copy the archive again and unpack it"
}

find_python() {
    for name in "python$PYTHON" python3; do
        path=$(command -v "$name" 2>/dev/null) || continue
        found=$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        [ "$found" = "$PYTHON" ] && { PY=$path; return; }
    done
    die "Python $PYTHON: it was not found, expected it on a machine of $TARGET; this machine needs a bundle of another target (flashhead bundle --target)"
}

check_machine() {
    here=$("$PY" -c 'import sysconfig; print(sysconfig.get_platform())')
    [ "$here" = "$PLATFORM" ] || die "this machine: Python says $here, expected $PLATFORM for $TARGET; use a bundle made for this machine (flashhead bundle --target)"
    libc=$("$PY" -c 'import os; print((os.confstr("CS_GNU_LIBC_VERSION") or "none").split()[-1])' 2>/dev/null) || libc=none
    "$PY" -c 'import sys; a, b = (tuple(map(int, s.split("."))) for s in sys.argv[1:]); sys.exit(a < b)' "$libc" "$GLIBC" 2>/dev/null ||
        die "this machine: its glibc is $libc, expected $GLIBC or newer for $TARGET; use a bundle of an older target"
    "$PY" -c 'import venv' 2>/dev/null || die "$PY: it has no module venv, expected the whole of Python's standard library; install the system's python$PYTHON packages"
}

lock() {
    if ! (: >>"$PREFIX/.lock") 2>/dev/null; then # exec alone would end the shell without a word
        [ -z "${FRESH:-}" ] || rmdir "$PREFIX" 2>/dev/null || true
        die "$PREFIX/.lock: it cannot be written, the disk is full or read-only; free some space and run it again"
    fi
    exec 9>"$PREFIX/.lock"
    if command -v flock >/dev/null 2>&1; then
        flock -n 9 || die "$PREFIX: another install.sh is at work there; wait until it is done"
    fi
}

ours() {
    [ -f "$PREFIX/.flashhead-bundle" ]
}

point() { # LINK ID: one rename, so that the link is the old one or the new one
    ln -s "versions/$2" "$PREFIX/.$1.new" && mv -T "$PREFIX/.$1.new" "$PREFIX/$1"
}

target_of() { # LINK: the ID that it leads to, or nothing
    [ -L "$PREFIX/$1" ] && basename "$(readlink "$PREFIX/$1")" || true
}

clean() { # whatever a failed or killed run left
    rm -f "$PREFIX/.current.new" "$PREFIX/.previous.new"
    for folder in "$PREFIX"/versions/*; do
        [ -d "$folder" ] || continue
        [ -f "$folder/.complete" ] || rm -rf "$folder"
    done
}

undo() {
    trap - EXIT INT TERM HUP
    [ -z "${NEW:-}" ] || rm -rf "$NEW"
    rm -f "$PREFIX/.current.new" "$PREFIX/.previous.new"
    if [ -n "${FRESH:-}" ]; then
        rm -rf "${PREFIX:?}/versions" "${PREFIX:?}/bin" "$PREFIX/.flashhead-bundle" "$PREFIX/.lock"
        rmdir "$PREFIX" 2>/dev/null || true
    fi
    if [ -n "${WHAT:-}" ]; then
        [ -z "${LOG:-}" ] || tail -n 3 "$LOG" >&2
        was=$(target_of current)
        kept="nothing is installed"
        [ -z "$was" ] || kept="$was stays as it was"
        echo "install.sh: $WHAT failed${SPACE:-}; what was begun is removed, $kept; mend the cause and run it again" >&2
    fi
    [ -z "${LOG:-}" ] || rm -f "$LOG"
    exit 1
}

full() { # a word on the disk, where it is why
    left=$(df -Pk "$PREFIX" | awk 'NR == 2 { print $4 }')
    if grep -qi 'no space left\|disk quota' "$LOG" 2>/dev/null || [ "${left:-1}" -lt 1024 ]; then SPACE=", the disk is full"; fi
}

step() { # WHAT COMMAND...: quiet unless it fails
    WHAT=$1
    shift
    "$@" >>"$LOG" 2>&1 || { full; undo; }
    WHAT=
}

write_unit() { # FILE: the service of the current version; the GPU's device files belong to these groups, where there are such
    groups=
    for group in video render; do
        if getent group "$group" >/dev/null; then groups="$groups $group"; fi
    done
    [ -z "$groups" ] || groups="SupplementaryGroups=$groups"
    sed "s|@PREFIX@|$PREFIX|g; s|@GROUPS@|$groups|; s|= |=|" "$HERE/flashhead.service" >"$1"
}

install() {
    find_python
    check_machine
    check_files
    ID="$VERSION-$(sha256sum SHA256SUMS | cut -c1-12)"
    FRESH=
    if [ -e "$PREFIX" ]; then
        ours || [ -z "$(ls -A "$PREFIX")" ] || die "$PREFIX: it holds something else, expected an empty folder or an earlier installation; choose another with --prefix"
        ours || FRESH=yes
    else
        FRESH=yes
        mkdir -p "$PREFIX" 2>/dev/null || die "$PREFIX: it cannot be made; choose a folder that you may write with --prefix, or run with sudo"
    fi
    [ -w "$PREFIX" ] || die "$PREFIX: you may not write there; choose another folder with --prefix, or run with sudo"
    lock
    LOG=$(mktemp) || die "${TMPDIR:-/tmp}: no file can be made there, expected room for a log; free some space"
    NEW=
    WHAT=
    trap 'WHAT=${WHAT:-the installation}; undo' EXIT
    trap 'WHAT="the installation (interrupted)"; undo' INT TERM HUP
    clean
    was=$(target_of current)
    if [ -f "$PREFIX/versions/$ID/.complete" ]; then
        echo "$ID is there already"
    else
        free=$(df -Pk "$PREFIX" | awk 'NR == 2 { print $4 }')
        if [ "$free" -lt "$NEEDED_KIB" ]; then
            WHAT="$PREFIX: $((NEEDED_KIB / 1024)) MiB are needed, $((free / 1024)) MiB are free: the check of the disk"
            undo
        fi
        echo "installing $ID into $PREFIX (about $((NEEDED_KIB / 1024)) MiB)"
        NEW="$PREFIX/versions/$ID"
        step "writing to $PREFIX" mkdir -p "$PREFIX/versions" "$PREFIX/bin"
        step "writing to $PREFIX" touch "$PREFIX/.flashhead-bundle"
        # The system's Python may lack ensurepip (Ubuntu's python3-venv), so pip comes out of its wheel.
        step "making the environment" "$PY" -m venv --without-pip $SYSTEM_PACKAGES "$NEW"
        set -- "$HERE"/wheels/pip-*.whl
        step "installing the wheels" env PYTHONPATH= PYTHONNOUSERSITE=1 PIP_CONFIG_FILE=/dev/null "$NEW/bin/python" "$1/pip" --isolated install \
            --no-index --find-links "$HERE/wheels" --no-cache-dir --disable-pip-version-check --ignore-installed --no-deps --require-hashes \
            --root-user-action ignore --requirement "$HERE/requirements.txt"
        step "copying the model" cp -R "$HERE/model" "$NEW/model"
        if [ -d "$HERE/ahead" ]; then
            step "copying what was made ahead" mkdir -p "$NEW/share/flashhead-edge"
            step "copying what was made ahead" cp -R "$HERE/ahead/." "$NEW/share/flashhead-edge/"
        fi
        step "copying the manifest" cp "$HERE/bundle.json" "$HERE/install.sh" "$NEW/"
        step "writing the unit" write_unit "$NEW/flashhead.service"
        step "the check of what was installed" env PYTHONPATH= PYTHONNOUSERSITE=1 "$NEW/bin/flashhead" inspect "$NEW/model" --json
        step "writing to the disk" sync
        step "writing to $PREFIX" touch "$NEW/.complete"
    fi
    if [ "$was" != "$ID" ]; then
        [ -z "$was" ] || step "switching" point previous "$was"
        step "switching" point current "$ID"
    fi
    NEW=
    FRESH=
    trap - EXIT INT TERM HUP
    rm -f "$LOG"
    ln -sfn ../current/bin/flashhead "$PREFIX/bin/flashhead"
    cp "$PREFIX/current/flashhead.service" "$PREFIX/flashhead.service" # a file: systemctl enable does not take a link
    keep=$(target_of previous)
    for folder in "$PREFIX"/versions/*; do
        name=$(basename "$folder")
        [ "$name" = "$ID" ] || [ "$name" = "$keep" ] || rm -rf "$folder"
    done
    echo "installed $ID; try: $PREFIX/bin/flashhead generate $PREFIX/current/model --prompt Hello"
    [ "$(id -u)" != 0 ] || echo "as a service: sudo systemctl enable --now $PREFIX/flashhead.service; after an upgrade: sudo systemctl restart flashhead"
    [ -z "$was" ] || [ "$was" = "$ID" ] || echo "the version before: sh install.sh back --prefix $PREFIX"
}

need_ours() {
    ours || die "$PREFIX: no bundle is installed there, expected a folder that install.sh made; name it with --prefix"
    [ -w "$PREFIX" ] || die "$PREFIX: you may not write there; run with sudo"
    lock
}

back() {
    need_ours
    before=$(target_of previous)
    now=$(target_of current)
    if [ -z "$before" ] || [ ! -f "$PREFIX/versions/$before/.complete" ]; then
        die "$PREFIX: there is no version before ${now:-this one}, expected one upgrade at least; uninstall takes all away"
    fi
    if ! point current "$before" || ! point previous "$now"; then
        die "$PREFIX: the link current could not be switched; free some space and run it again"
    fi
    echo "back at $before; $now is kept: back again returns to it"
}

uninstall() {
    need_ours
    if [ -e /etc/systemd/system/flashhead.service ] && [ "$(readlink /etc/systemd/system/flashhead.service)" = "$PREFIX/flashhead.service" ]; then
        die "flashhead.service: systemd still starts it from $PREFIX, expected it disabled; type: sudo systemctl disable --now flashhead"
    fi
    rm -f "$PREFIX/current" "$PREFIX/previous" "$PREFIX/bin/flashhead" "$PREFIX/flashhead.service"
    rm -rf "$PREFIX/versions"
    rm -f "$PREFIX/.current.new" "$PREFIX/.previous.new" "$PREFIX/.lock" "$PREFIX/.flashhead-bundle"
    rmdir "$PREFIX/bin" "$PREFIX" 2>/dev/null || echo "$PREFIX is kept: it holds files that install.sh did not make" >&2
    echo "uninstalled"
}

main() {
    HERE=$(cd "$(dirname "$0")" && pwd)
    VERB=install
    if [ "$(id -u)" = 0 ]; then PREFIX=/opt/flashhead; else PREFIX=$HOME/.local/share/flashhead; fi
    while [ $# -gt 0 ]; do
        case $1 in
            install | check | back | uninstall) VERB=$1 ;;
            --prefix)
                [ $# -gt 1 ] || die "--prefix: a folder is missing; sh install.sh --prefix DIR"
                PREFIX=$2
                shift
                ;;
            *) die "$1: not known, expected install, check, back or uninstall, and --prefix DIR; sh install.sh uninstall" ;;
        esac
        shift
    done
    case $PREFIX in /*) ;; *) PREFIX=$(pwd)/$PREFIX ;; esac
    case $PREFIX in *["'\"|&\\ "]*) die "$PREFIX: it has a blank or a sign that a unit file cannot hold, expected a plain path; choose another with --prefix" ;; esac
    case $VERB in
        check)
            find_python
            check_machine
            check_files
            echo "the bundle is whole, and made for this machine ($TARGET)"
            ;;
        *) "$VERB" ;;
    esac
}

main "$@"
