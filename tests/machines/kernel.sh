#!/bin/sh
# usage: kernel.sh RELEASE...
# Boots the kernel of each Debian release (bookworm, trixie) in qemu, with a root of that release made in a temporary folder,
# and runs there, with br_netfilter at work: test_kernel.py and test_plain.py; of test_bridge.py what a registered guest does
# to others, but for the tests of one field each and of a rogue server, which take long; and the one of ten guests that join
# at once.
# It needs no KVM. As root; it changes nothing outside of the folder. DEBIAN_ROOTS: see root.sh.
# Exit status: 0 as expected, 1 not so, 77 can't be tried (1 with CI=true).
# shellcheck disable=SC2154 # variables of root.sh
set -eu

# shellcheck source=tests/machines/root.sh
. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    [ $# -gt 0 ] || { echo "usage: kernel.sh RELEASE..." >&2; exit 2; }
    need unshare mke2fs qemu-system-x86_64
    for_each "$@"
fi

step "a root with its kernel"
make_root
add_project
# Of the drivers only those of the machine and of guests, which spares a minute; of modules, the initial file system has
# what mounts the root.
cat >"$root/etc/dpkg/dpkg.cfg.d/small" <<'END'
path-exclude=*/kernel/drivers/*
path-include=*/kernel/drivers/block/virtio_blk.*
path-include=*/kernel/drivers/net/veth.*
path-include=*/kernel/drivers/virtio/*
END
mkdir -p "$root/etc/initramfs-tools/conf.d" "$root/usr/share/initramfs-tools/modules.d"
echo MODULES=list >"$root/etc/initramfs-tools/conf.d/instances"
printf '%s\n' virtio_pci virtio_blk ext4 >"$root/usr/share/initramfs-tools/modules.d/instances"
in_root "install linux-image-amd64 python3 python3-filelock python3-hypothesis python3-pytest \
        python3-pytest-timeout python3-pytest-xdist python3-scapy dnsmasq-base nftables iproute2 iputils-ping udhcpc \
        isc-dhcp-client bind9-dnsutils procps strace ifupdown
    apt-get clean"

# The machine's first process. Its second serial port is a file here, whose last line is how the tests ended.
cat >"$root/sbin/tests" <<'END'
#!/bin/sh
exec >/dev/ttyS1 2>&1
mount -t tmpfs tmpfs /tmp
modprobe br_netfilter
cd /root/instances
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C CI=true TEST_PATIENCE=5
python3 -B -m pytest --color=no -q -rs -n 2 --dist loadfile -o timeout=1200 \
    -k "not unregistered] and not unregistered- and not -host- and not one_field and not rogue" \
    tests/test_kernel.py tests/test_bridge.py \
    "tests/test_joining.py::test_ten_guests_that_start_at_once_are_all_registered_and_reach_the_host[1]"
echo "exit status $?"
echo o >/proc/sysrq-trigger
sleep 60
END
chmod 755 "$root/sbin/tests"
mke2fs -q -t ext4 -O ^has_journal -d "$root" "$folder/disk" 2G >"$folder/log" 2>&1 ||
    { tail -n 5 "$folder/log" >&2; cannot "no disk can be made"; }

step "the tests"
timeout 1500 qemu-system-x86_64 -nodefaults -no-reboot -display none -nic none -accel tcg -cpu max -smp 2 -m 2048 \
    -kernel "$root"/boot/vmlinuz-* -initrd "$root"/boot/initrd.img-* \
    -append "console=ttyS0 quiet panic=-1 mitigations=off root=/dev/vda rw init=/sbin/tests" \
    -drive "file=$folder/disk,format=raw,if=virtio,cache=unsafe" \
    -serial "file:$folder/console" -serial "file:$folder/tests" >"$folder/log" 2>&1 ||
    { cat "$folder/log" >&2; say "qemu failed, or its 25 minutes were over"; }
tr -d '\r' <"$folder/tests" >"$folder/report"
cat "$folder/report"
case $(tail -n 1 "$folder/report") in
"exit status 0") not grep -q ' skipped' "$folder/report" || fail "tests were skipped" ;;
"exit status "*) fail "the tests" ;;
*) tail -n 20 "$folder/console" >&2; fail "the machine ended before its tests" ;;
esac
step "as expected"
