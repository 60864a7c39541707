#!/bin/sh
# usage: incus.sh [RELEASE]...
# Makes a root of each Debian release (trixie) in a temporary folder, boots it with systemd-nspawn, installs Debian's Incus and
# libvirt in it and, by the pages, this project and examples/incus and examples/libvirt, and runs incus.py and libvirt.py there.
# As root; it changes nothing outside of the folder. Exit status: 0 as expected, 1 not so, 77 none of that can be had here
# (1 with CI=true).
# shellcheck source=tests/root.sh disable=SC2016 # commands for another shell
set -eu

. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    for_each_boot "$@"
fi

step "a root with Incus and libvirt"
make_root
add_project
fit_kernel
mount -t proc proc "$root/proc"
chmod 755 "$root" # guests are not this root
chroot "$root" env DEBIAN_FRONTEND=noninteractive LC_ALL=C sh -euc "
    apt-get update
    apt-get install -y --no-install-recommends systemd-sysv dbus ifupdown iproute2 udhcpc busybox-static bind9-dnsutils procps \
        python3 python3-filelock dnsmasq dnsmasq-utils nftables incus-base incus-client \
        libvirt-daemon-system libvirt-clients qemu-system-x86 linux-image-cloud-amd64 cpio
    systemd-machine-id-setup" >"$folder/log" 2>&1 || { tail -n 5 "$folder/log" >&2; cannot "no packages"; }
umount "$root/proc"
rm "$root/usr/sbin/policy-rc.d" "$root/etc/resolv.conf"
add_bridge
systemctl --quiet --root="$root" enable networking.service

step "its boot"
enter_group
# Incus makes containers of its own in it, so it may do all that root may; of /proc/sys and /sys, it writes to the network only
export SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
boot --capability=all --system-call-filter="@keyring bpf"

step "this project, by README.md and the page"
{
    block examples/incus/README.md 'ln -sf /dev/null'
    block README.md 'install -m 755' | grep -v '^apt-get'
} >"$folder/installing"
{
    echo "cd /root/instances/examples/incus"
    block examples/incus/README.md 'incus launch' | grep -v -e '^apt-get' -e '^incus launch'
    echo "cd /root/instances/examples/libvirt"
    block examples/libvirt/README.md 'apt-get install' | grep -v '^apt-get'
} >"$folder/pages"
run sh -euc "cd /root/instances; $(cat "$folder/installing")" >"$folder/log" 2>&1 || { tail "$folder/log" >&2; fail "README.md"; }
run cp /root/instances/examples/nftables/firewall.nft /etc/instances/
run sh -c 'echo INSTANCES_ADDRESS_SETS=host,web >>/etc/default/instances'
run python3 -B /root/instances/tests/incus.py prepare || cannot "Incus does not come up"
run sh -euc "$(cat "$folder/pages")" >"$folder/log" 2>&1 || { tail "$folder/log" >&2; fail "the pages"; }

step "Incus"
run python3 -B /root/instances/tests/incus.py || fail "see above"
step "libvirt"
run python3 -B /root/instances/tests/libvirt.py || fail "see above"

step "a container by itself, by the page of examples/egress"
run sh -euc "mkdir /etc/egress; echo example.org >/etc/egress/profile; cd /root/instances/examples/egress
    $(block examples/egress/README.md 'systemd-run')" >"$folder/log" 2>&1 || { tail "$folder/log" >&2; fail "the page"; }
rules='nsenter -n -t "$(incus info web | sed -n "s/^PID: //p")" nft list table inet egress'
run sh -c "$rules" >"$folder/log" || fail "no rules in the container"
run systemctl kill --kill-whom=main -s HUP egress-web
run timeout 30 sh -c 'until [ "$(journalctl -u egress-web | grep -c "is held")" = 2 ]; do sleep 0.1; done' ||
    fail "its lists are not read again"
run sh -euc "$(block examples/egress/README.md 'nft delete table inet egress')"
not run sh -c "$rules" >"$folder/log" 2>&1 || fail "rules are left in the container"

step "undone by both pages"
run sh -euc "$(block examples/libvirt/README.md 'disable --now'; block examples/incus/README.md 'incus profile delete')" \
    >"$folder/log" 2>&1 || { tail "$folder/log" >&2; fail "the undo lines"; }
left=$(run find /etc /usr/local -path '*hooks/qemu' -o -name 'instances-libvirt*' -o -name 'instances-incus*')
[ -z "$left" ] || fail "files are left: $left"
step "as expected"
