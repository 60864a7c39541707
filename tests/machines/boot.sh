#!/bin/sh
# usage: boot.sh [RELEASE]...
# Makes a root of each Debian release (trixie) in a temporary folder, boots it with systemd-nspawn, installs by README.md,
# and looks at what is in force in each case of a machine's life, while a guest asks for leases and tries an address of
# another. As root; it changes nothing outside of the folder. DEBIAN_ROOTS: see root.sh. BOOT_PACKAGE=1: it installs the
# Debian package, by the lines of README.md and the steps that it prints.
# Exit status: 0 as expected, 1 not so, 77 no Debian can be made or booted here (1 with CI=true).
# shellcheck disable=SC2016,SC2119,SC2317 # commands for the machine, boot without options, and a trap
set -eu

# shellcheck source=tests/machines/root.sh
. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    for_each_boot "$@"
fi

guest=10:66:6a:4c:a1:11

step "a root"
by_hand=$(block README.md 'install -m 755') by_package=$(block README.md 'examples/debian/build.sh')
undoing=$(block README.md 'dpkg --purge')
installing=$by_hand
[ -z "${BOOT_PACKAGE-}" ] || installing=$by_package
# Its packages wait in apt's cache for the machine, which has no network.
make_machine "install systemd-sysv dbus ifupdown iproute2 udhcpc
    $(printf '%s\n' "$by_hand" "$installing" | grep -o 'apt-get install [^&]*' | grep -v '\./' | sort -u |
        sed 's/install/install --download-only/')"

# Its bridge, and a guest that is started as Incus, libvirt and LXC are: when there is a network. It asks for a lease every
# quarter of a minute (bridge.nft drops more), and all the while, from its first frame, tries an address that is not its own.
add_bridge
cat >"$root/etc/systemd/system/guest.service" <<'END'
[Unit]
After=network.target
[Service]
ExecStart=/usr/local/sbin/guest
[Install]
WantedBy=multi-user.target
END
cat >"$root/usr/local/sbin/guest" <<END
#!/bin/sh
set -eu
ip netns add guest
own() { ip netns exec guest "\$@"; }
own sh -c 'echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6'
ip link add guest0 type veth peer name eth0 address $guest netns guest
ip link set guest0 master br0 up
own ip link set eth0 up
own ip address add 10.83.0.66/24 dev eth0
while true; do
    for _ in \$(seq 15); do
        if own busybox ping -q -c 1 -W 1 -I 10.83.0.66 10.83.0.1 >/dev/null 2>&1; then echo open; sleep 1; else echo guarded; fi
    done
    if own udhcpc -f -q -n -i eth0 -s /bin/true -T 1 -t 4 -x hostname:web >/dev/null 2>&1; then echo lease; else echo none; fi
done >/run/guest
END
chmod 755 "$root/usr/local/sbin/guest"
# As cloud-init has it, the network is to be there before other things that are early.
cat >"$root/etc/systemd/system/early.service" <<'END'
[Unit]
DefaultDependencies=no
After=network.target
Before=sysinit.target
[Service]
Type=oneshot
ExecStart=/bin/true
[Install]
WantedBy=sysinit.target
END
systemctl --quiet --root="$root" enable guest.service early.service networking.service

# ---- A machine of it ----
enter_group
halt() {
    run systemctl poweroff
    wait "$nspawn" || true
}

# guest_is guarded|open: its next tries; and it got all leases that it has asked for since the last time
guest_is() {
    lines=$(run cat /run/guest | wc -l)
    until_true 30 "the guest goes on" sh -c "[ \$(tail -n +$((lines + 1)) /run/guest | grep -cvx -e lease -e none) -ge 3 ]"
    run tail -n +$((lines + 2)) /run/guest | grep -vx lease >"$folder/tries"
    not grep -qvx "$1" "$folder/tries" || { cat "$folder/tries"; fail "the guest is not $1"; }
    not run sh -c "tail -n +$asked /run/guest | grep -x none" || fail "the guest got no lease"
    asked=$((lines + 1))
}
guard='nft list chain bridge instances at_prerouting | grep -q instances_guard'
name='busybox nslookup web.instance.internal 10.83.0.1 | grep -q "10\.83\.0\.1[0-9][0-9]$"'
told() { until_true 20 "the journal has: $1" sh -c "journalctl -b -u instances.service | grep -q '$1'"; }
# works: it has done its work, and waits for the next
works() {
    until_true 20 "it works" sh -c "$guard && systemctl show -P ActiveState instances.service | grep -qx inactive &&
        systemctl show -P Result instances.service | grep -qx success"
}

step "its first boot"
boot
until_true 20 "the guest" test -s /run/guest
[ "$(run head -n 1 /run/guest)" = open ] || fail "the guest was never free to take another's address"

step "installed by README.md: the guest gets a lease and a name, and is held to its address"
lines "installing" "$installing"
if [ -n "${BOOT_PACKAGE-}" ]; then
    [ -z "$(run nft list tables)$(run systemctl list-unit-files --no-legend --state=enabled 'instances*')" ] ||
        fail "the package changes something before it is configured"
    tr -d '\r' <"$folder/output" | sed -n '/^instances: .*Next steps/,/^More/s/^  //p' >"$folder/steps"
    lines "the next steps" "$(cat "$folder/steps")"
    run sh -c 'echo "# of the former release" >>/var/lib/misc/instances.nftables_chains'
    run sh -euc "cd /root/instances; dpkg -i instances_*_all.deb" >/dev/null 2>&1 || fail "an upgrade"
    not run grep -q former /var/lib/misc/instances.nftables_chains || fail "an upgrade leaves the files of the former release"
    run systemctl is-active instances.path instances.timer >/dev/null || fail "an upgrade stops the units"
fi
until_true 5 "the guard" sh -c "$guard"
until_true 30 "the guest's name" sh -c "$name"
asked=$(run cat /run/guest | wc -l)
guest_is guarded

step "instances-show: who the guest is, and from which address it sends; nothing is wrong; numbers by the page of examples/show"
# Until the host has forgotten who had the guest's address before the guard was on
until_true 60 "nothing is wrong" sh -c 'instances-show --check | grep -x "nothing is wrong"'
until_true 10 "why it is dropped" sh -c "instances-show web | grep -q \"sends from 10.83.0.66, which is nobody's\""
run sh -c 'instances-show web | grep -q "port: guest0, heard"' || fail "its port"
run mkdir -p /var/lib/prometheus/node-exporter
run sh -euc "cd /root/instances/examples/show; $(block examples/show/README.md 'enable --now instances-metrics.timer')"
run grep -q '^instances_registered.* 2$' /var/lib/prometheus/node-exporter/instances.prom || fail "numbers"
run rm /var/lib/prometheus/node-exporter/instances.prom
until_true 75 "the timer" test -s /var/lib/prometheus/node-exporter/instances.prom
run systemctl disable --now instances-metrics.timer
run rm /etc/systemd/system/instances-metrics.service /etc/systemd/system/instances-metrics.timer
run rm -r /var/lib/prometheus

step "a rule file that wants another setting, then the setting; then the file is edited, and taken away"
run cp /root/instances/examples/nftables/firewall.nft /etc/instances/
told 'firewall.nft: not loaded'
run sh -c "$guard" || fail "a broken rule file keeps the guard out"
run sh -c 'echo INSTANCES_ADDRESS_SETS=host,web >/etc/default/instances'
until_true 20 "the setting" sh -c 'nft list set inet instances web.v4.instance | grep -q 10.83.0.1'
works
run sed -i 's/not for instances/edited/' /etc/instances/firewall.nft
until_true 5 "the edited file" sh -c 'nft list table inet instances | grep -q edited'
works
run sh -c 'echo INSTANCES_ADDRESS_SETS=host,web,db >/etc/default/instances'
until_true 5 "another setting" nft list set inet instances db.v4.instance
works
run rm /etc/instances/firewall.nft
until_true 5 "the end of its table" sh -c '! nft list table inet instances'
guest_is guarded

step "nftables.service is restarted"
run systemctl restart nftables.service
until_true 5 "the guard" sh -c "$guard"
guest_is guarded

step "somebody empties the guard's table and deletes the names: within a minute they are back"
run nft flush table bridge instances
run sh -c 'rm /var/lib/misc/instances.hosts.d/*'
until_true 75 "the guard" sh -c "$guard"
until_true 5 "the names" sh -c "$name"
guest_is guarded

step "a broken registry, and its mending"
run sh -c 'cd /var/lib/misc && cp -p instances.json whole && echo { >instances.json && touch instances.updated'
told 'mend it'
guest_is guarded
run sh -c 'cd /var/lib/misc && mv whole instances.json'
until_true 20 "the update" sh -c '[ ! -e /var/lib/misc/instances.updated ]'
works

step "one more command after each run, outside of the unit's limits"
run mkdir -p /etc/systemd/system/instances.service.d
run sh -c 'printf "%s\n" "[Service]" "ExecStartPost=+/bin/sh -c \"systemctl is-active dnsmasq >/etc/more\"" \
    >/etc/systemd/system/instances.service.d/more.conf'
run systemctl daemon-reload
listing=$(run nft -a -s -t list ruleset)
run systemctl start instances.service
[ "$listing" = "$(run nft -a -s -t list ruleset)" ] || fail "rules are loaded again without a change"
run grep -qx active /etc/more || fail "ExecStartPost=+"

step "its second boot, with a broken rule file: the guard is there before the guest, and the guest all the same"
works
run sh -c 'echo "table {" >/etc/instances/broken.nft'
told 'broken.nft: not loaded'
halt
boot
asked=1
told 'broken.nft: not loaded'
until_true 20 "the guest" sh -c '[ "$(wc -l </run/guest)" -ge 4 ]'
[ "$(run head -n 1 /run/guest)" = guarded ] || fail "the guest's first frame came before the guard"
guest_is guarded
run journalctl -b -u instances.service -u network-pre.target | grep -m 1 -e 'bridge.nft: loaded' -e Reached |
    grep -q loaded || fail "the network came before the guard"
not run sh -c 'journalctl -b | grep "ordering cycle"' || fail "units wait for each other"
run rm /etc/instances/broken.nft
works

step "installed again by the page of examples/systemd"
lines "the page" "cd examples/systemd; $(block examples/systemd/README.md 'install -m 755')"
until_true 20 "the setting" grep -q web.v4 /var/lib/misc/instances.nftables_sets
works

step "one more registry by the page of examples/systemd, with a guest; and undone"
run sh -euc 'ip link add br1 address 10:66:6a:4c:a1:fd type bridge
    ip address add 10.84.0.1/24 dev br1
    ip address add 2001:67c:84::1/80 dev br1 nodad
    ip address add fd84:5eed::1/80 dev br1 nodad
    ip link set br1 up
    ip netns add other
    ip link add other0 type veth peer name eth0 address 10:66:6a:4c:a1:21 netns other
    ip link set other0 master br1 up
    ip -n other link set eth0 up'
lines "the page" "cd examples/systemd; $(block examples/systemd/README.md 'INSTANCES_BASE_ID=br1 >')"
until_true 20 "the other guard" sh -c 'nft list table bridge instances-br1 | grep -q 10.84.0.1'
run ip netns exec other udhcpc -f -q -n -i eth0 -s /bin/true -T 1 -t 20 -x hostname:web >/dev/null 2>&1 || fail "its guest"
until_true 5 "the other guest's name" sh -c 'busybox nslookup web.instance.internal 10.84.0.1 | grep -q "10\.84\.0\.1[0-9][0-9]$"'
until_true 5 "its guard" sh -c 'nft list table bridge instances-br1 | grep -q 10:66:6a:4c:a1:21'
not run sh -c 'nft list set bridge instances instances_ip | grep -q 10:66:6a:4c:a1:21' || fail "the first guard has its guest"
run sh -c "$guard && $name" || fail "the first registry is not as it was"
works
not run sh -c 'journalctl -b | grep "ordering cycle"' || fail "units wait for each other"
lines "its undo lines" "$(block examples/systemd/README.md '--remove /etc/default/instances-br1')"
[ -z "$(run find /run /etc /var/lib/misc -name '*br1*' -not -name '*.leases')" ] || fail "something of it is left"
not run nft list table bridge instances-br1 >/dev/null 2>&1 || fail "its guard is left"
run sh -c "$guard && $name" || fail "the first registry is gone, too"
run ip link delete br1
run ip netns delete other

step "undone by README.md: only dnsmasq is left"
lines "the undo lines" "$undoing"
[ -z "${BOOT_PACKAGE-}" ] || grep -q 'dnsmasq stays' "$folder/output" "$folder/log" || fail "purge does not say what stays"
[ -z "$(run systemctl list-unit-files --no-legend 'instances*')" ] || fail "units are left"
[ -z "$(run nft list tables)" ] || fail "tables are left"
left=$(run find /run /etc /usr /var/lib/misc -name '*instances*' -o -name br0.conf)
[ -z "$left" ] || fail "files are left: $left"
run test -s /var/lib/misc/dnsmasq.br0.leases || fail "dnsmasq has no leases"
until_true 20 "dnsmasq on all addresses" busybox nslookup localhost 127.0.0.1
until_true 20 "the guest is free" sh -c 'tail -n 1 /run/guest | grep -x open'
halt
step "as expected"
