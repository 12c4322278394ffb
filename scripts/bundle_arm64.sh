#!/bin/bash
# A bundle on an emulated Debian 12 for arm64: made, installed without a network, one answer, taken away again.
#   sudo scripts/bundle_arm64.sh MODEL [WORK]
# MODEL is a folder of `flashhead export onnx`; WORK (build/arm64) keeps the Debian between runs. FLASHHEAD names the command (.venv/bin/flashhead).
# The answer must be this machine's own: both are greedy.
# Needs root, debootstrap (DEBOOTSTRAP names another than the PATH's) and qemu-user-static. Emulation is some twenty times slower than
# the real thing: no time that it prints says anything of a board.
set -euo pipefail
cd "$(dirname "$0")/.."
model=$(realpath "${1:?the folder of an exported model}")
work=$(mkdir -p "${2:-build/arm64}" && realpath "${2:-build/arm64}")
flashhead=${FLASHHEAD:-.venv/bin/flashhead}
[ "$(id -u)" = 0 ] || { echo "chroot needs root: run this with sudo" >&2; exit 1; }
qemu=$(command -v qemu-aarch64-static) || { echo "qemu-aarch64-static is missing: install qemu-user-static" >&2; exit 1; }

registered='' mounted=''
leave() {
    for place in "$work/root/proc" "$work/root/dev/pts"; do ! mountpoint -q "$place" || umount "$place"; done
    [ -z "$registered" ] || echo -1 >/proc/sys/fs/binfmt_misc/flashhead-arm64
    [ -z "$mounted" ] || umount /proc/sys/fs/binfmt_misc
}
trap leave EXIT
if [ "$(uname -m)" != aarch64 ]; then
    [ -e /proc/sys/fs/binfmt_misc/register ] || { mount -t binfmt_misc none /proc/sys/fs/binfmt_misc && mounted=yes; }
    if ! grep -qs aarch64 /proc/sys/fs/binfmt_misc/*; then
        magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
        mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
        printf '%s' ":flashhead-arm64:M::$magic:$mask:$qemu:F" >/proc/sys/fs/binfmt_misc/register
        registered=yes
    fi
fi

if [ ! -f "$work/root/.whole" ]; then
    rm -rf "$work/root"
    "${DEBOOTSTRAP:-debootstrap}" --arch=arm64 --variant=minbase --include=python3,curl,ca-certificates bookworm "$work/root" >"$work/debootstrap.log"
    touch "$work/root/.whole"
fi
mountpoint -q "$work/root/proc" || mount -t proc none "$work/root/proc"

echo "== the bundle"
"$flashhead" bundle "$model" "$work/bundle.tar" --target linux-aarch64-cp311 --overwrite 2>"$work/bundle.log" || { tail -n 3 "$work/bundle.log" >&2; exit 1; }
rm -rf "$work/root/srv/bundle" && mkdir -p "$work/root/srv/bundle"
tar xf "$work/bundle.tar" -C "$work/root/srv/bundle"

# a network namespace of its own, with nothing but its loopback: what is installed cannot have come from elsewhere
inside() { unshare --net chroot "$work/root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 "$@"; }
echo "== on $(inside uname -m), without a network"
inside sh -c 'sh /srv/bundle/flashhead-*/install.sh check'
inside sh -c 'sh /srv/bundle/flashhead-*/install.sh'
inside /opt/flashhead/bin/flashhead --version
asked="What is the capital of France?"
here=$("$flashhead" generate "$model" --prompt "$asked" --max-new-tokens 12 2>/dev/null)
there=$(inside /opt/flashhead/bin/flashhead generate /opt/flashhead/current/model --prompt "$asked" --max-new-tokens 12 2>"$work/generate.log")
grep operators "$work/generate.log"
echo "$there"
[ "$here" = "$there" ] || { echo "on this machine the answer is: $here" >&2; exit 1; }
if inside /opt/flashhead/bin/flashhead serve --help >/dev/null 2>&1; then
    echo "== over HTTP"
    # shellcheck disable=SC2016 # expanded inside
    inside bash -c '
        ip link set lo up 2>/dev/null || python3 -c "import fcntl, socket, struct; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(s, 0x8914, struct.pack(\"16sh\", b\"lo\", 0x1 | 0x40))"
        /opt/flashhead/bin/flashhead serve /opt/flashhead/current/model --port 8123 & server=$!
        trap "kill $server; wait $server" EXIT
        for i in $(seq 300); do curl -fs http://127.0.0.1:8123/v1/models >/dev/null && break; sleep 1; done
        curl -fsS http://127.0.0.1:8123/v1/chat/completions -H "Content-Type: application/json" \
            -d "{\"model\": \"model\", \"max_tokens\": 12, \"temperature\": 0, \"messages\": [{\"role\": \"user\", \"content\": \"$0\"}]}"
        echo' "$asked" | tee "$work/http.json"
    grep -qF "$here" "$work/http.json" || { echo "on this machine the answer is: $here" >&2; exit 1; }
else
    echo "== no answer over HTTP: this version has no flashhead serve"
fi
inside sh -c 'sh /srv/bundle/flashhead-*/install.sh uninstall'
rm -rf "$work/root/srv/bundle"
