#!/bin/sh
# usage: incus.sh [RELEASE]...
# Makes a root of each Debian release (trixie) in a temporary folder, boots it with systemd-nspawn, installs Debian's Incus,
# libvirt and LXC in it and, by the pages, this project and examples/incus and examples/libvirt, and runs incus.py and
# libvirt.py there; then, with two more machines on its network, hosts.py; and plain.py, by the page of examples/plain.
# As root; it changes nothing outside of the folder. Exit status: 0 as expected, 1 not so, 77 none of that can be had here
# (1 with CI=true).
# shellcheck source=tests/machines/root.sh disable=SC2016 # commands for another shell
set -eu

. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    for_each_boot "$@"
fi

step "a root with Incus and libvirt"
make_machine "install systemd-sysv dbus ifupdown iproute2 udhcpc busybox-static bind9-dnsutils procps \
        python3 python3-filelock dnsmasq nftables incus-base incus-client \
        libvirt-daemon-system libvirt-clients qemu-system-x86 linux-image-cloud-amd64 cpio \
        openssh-server openssh-client lxc systemd-container iputils-ping
    ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
    cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys"
chmod 755 "$root" # guests are not this root
add_bridge
echo 'StrictHostKeyChecking accept-new' >>"$root/etc/ssh/ssh_config"
printf '127.0.0.1 localhost\n192.0.2.1 a\n192.0.2.2 b\n192.0.2.3 c\n' >"$root/etc/hosts"
sed -i '/^ *meta ibrname /d' "$root/root/instances/examples/plain/ports.nft"
systemctl --quiet --root="$root" enable networking.service
systemctl --quiet --root="$root" disable systemd-networkd.service lxc-net.service

step "its boot"
enter_group
# Incus makes containers of its own in it, so it may do all that root may; of /proc/sys and /sys, it writes to the network only
export SYSTEMD_NSPAWN_API_VFS_WRITABLE=network
make_switch
boot_host a 1 --capability=all --system-call-filter="@keyring bpf"

step "this project, by README.md and the page"
{
    block examples/incus/README.md 'ln -sf /dev/null'
    block README.md 'install -m 755' | grep -v '^apt-get'
} >"$folder/installing"
{
    echo "cd /root/instances/examples/incus"
    block examples/incus/README.md 'incus launch' | grep -v '^incus launch'
    echo "cd /root/instances/examples/libvirt"
    block examples/libvirt/README.md 'install -m 755'
} >"$folder/pages"
lines "README.md" "$(cat "$folder/installing")"
run cp /root/instances/examples/nftables/firewall.nft /etc/instances/
run sh -c 'echo INSTANCES_ADDRESS_SETS=host,web >>/etc/default/instances'
run python3 -B /root/instances/tests/machines/incus.py prepare || cannot "Incus does not come up"
lines "the pages" "$(cat "$folder/pages")"

step "Incus"
run python3 -B /root/instances/tests/machines/incus.py || fail "see above"
step "libvirt"
run python3 -B /root/instances/tests/machines/libvirt.py || fail "see above"

step "a container by itself, by the page of examples/egress"
lines "the page" "mkdir /etc/egress; echo example.org >/etc/egress/profile; cd examples/egress
    $(block examples/egress/README.md 'systemd-run')"
rules='nsenter -n -t "$(incus info web | sed -n "s/^PID: //p")" nft list table inet egress'
run sh -c "$rules" >"$folder/log" || fail "no rules in the container"
run systemctl kill --kill-whom=main -s HUP egress-web
run timeout 30 sh -c 'until [ "$(journalctl -u egress-web | grep -c "is held")" = 2 ]; do sleep 0.1; done' ||
    fail "its lists are not read again"
run sh -euc "$(block examples/egress/README.md 'nft delete table inet egress')"
not run sh -c "$rules" >"$folder/log" 2>&1 || fail "rules are left in the container"

step "three hosts"
sharing='ip link set eth0 master br0 up; rm /etc/instances/bridge.nft
    sed -i "/^ *meta ibrname /d" /root/instances/examples/network/network.nft
    cp /root/instances/examples/network/network.nft /etc/instances/; instances-apply'
lines "the guard of a" "$sharing"
number=1
for host in b c; do
    number=$((number + 1))
    boot_host "$host" "$number" --capability=all --system-call-filter="@keyring bpf"
    lines "$host" "$(grep -v -e 'br0.conf' -e 'br0 host' -e 'restart dnsmasq' "$folder/installing")
        systemctl disable --now dnsmasq; ip address flush dev br0 scope global
        ip link set br0 address 10:66:6a:4c:a1:f$number
        echo 'a writes it' >/var/lib/misc/instances.follows
        cd /root/instances/examples/libvirt; $(block examples/libvirt/README.md 'install -m 755')
        $sharing"
    for file in vmlinuz initrd; do cp "$folder/a/var/lib/libvirt/images/$file" "$folder/$host/var/lib/libvirt/images/"; done
done
leader=$(cat "$folder/a.leader")
run python3 -B /root/instances/tests/machines/hosts.py || fail "see above"

step "undone by both pages"
lines "the undo lines" "$(block examples/libvirt/README.md 'disable --now'; block examples/incus/README.md 'incus profile delete')"
left=$(run find /etc /usr/local -path '*hooks/qemu' -o -name 'instances-libvirt*' -o -name 'instances-incus*')
[ -z "$left" ] || fail "files are left: $left"

step "plain LXC, systemd-nspawn and QEMU"
run python3 -B /root/instances/tests/machines/plain.py || fail "see above"
step "as expected"
