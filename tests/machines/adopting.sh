#!/bin/sh
# usage: adopting.sh [RELEASE]...
# Makes a root of each Debian release (trixie) in a temporary folder and boots it with systemd-nspawn: a host with guests, a
# dnsmasq and a resolver of its own. Follows examples/adopting/README.md there, each command, to the guard and back, while all
# guests ping each other and the host. As root; it changes nothing outside of the folder. DEBIAN_ROOTS: see root.sh.
# Exit status: 0 as expected, 1 not so, 77 no Debian can be made or booted here (1 with CI=true).
# shellcheck disable=SC2016,SC2119 # commands for the machine, and boot without options
set -eu

# shellcheck source=tests/machines/root.sh
. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    for_each_boot "$@"
fi

step "a root"
make_machine "install systemd-sysv dbus ifupdown iproute2 iputils-ping dhcpcd-base bind9-dnsutils \
        dnsmasq unbound dns-root-data systemd-resolved python3 python3-filelock nftables procps
    echo 'Acquire::Retries 0;' >/etc/apt/apt.conf.d/99offline"
add_bridge
sed -i 's,fd83:5eed::1/80,fd83:5eed::1/64,' "$root/etc/network/interfaces" # that there is no SLAAC on a /64 shows, too
systemctl --quiet --root="$root" enable networking.service
systemctl --quiet --root="$root" disable systemd-resolved.service systemd-networkd.service systemd-networkd.socket

# What is there before: unbound for the host, and a dnsmasq with ranges, a lease file and a way to bind of its own
echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
cat >"$root/etc/unbound/unbound.conf.d/lan.conf" <<'END'
server:
    domain-insecure: "example.org"
    private-address: 10.0.0.0/8
forward-zone:
    name: "."
    forward-addr: 192.0.2.53
END
cat >"$root/etc/dnsmasq.d/lan.conf" <<'END'
interface=br0
except-interface=lo
bind-interfaces
dhcp-range=10.83.0.50,10.83.0.90,1h
dhcp-range=2001:67c:83::50,2001:67c:83::90,80,1h
dhcp-range=fd83:5eed::50,fd83:5eed::90,64,1h
dhcp-leasefile=/var/lib/misc/lan.leases
enable-ra
no-ping
no-hosts
no-resolv
server=192.0.2.53
END
# Five guests by DHCP, one with fixed addresses, and one that has no right to its address. All have a namespace, as has the
# server that the resolvers ask.
guests='web db build cache git'
cat >"$root/root/guests" <<END
set -eu
add() {
    ip netns add \$1
    ip link add \$1 type veth peer name eth0 address 10:66:6a:4c:a1:\$2 netns \$1
    ip link set \$1 master br0 up
}
number=10
for guest in $guests; do
    number=\$((number + 1))
    add \$guest \$number
    ip netns exec \$guest sh -c "mount -t tmpfs none /run; mount -t tmpfs none /var/lib/dhcpcd
        exec dhcpcd --nobackground --noarp --noipv4ll --nohook resolv.conf --hostname=\$guest eth0" >/dev/null 2>&1 &
done
add mail 20
ip -n mail link set eth0 up
ip -n mail address add 10.83.0.20/24 dev eth0
ip -n mail address add 2001:67c:83::20/80 dev eth0 nodad
add rogue 66
ip -n rogue link set eth0 up
ip -n rogue address add 10.83.0.166/24 dev eth0
ip netns add server
ip link add server type veth peer name eth0 netns server
ip address add 192.0.2.1/24 dev server
ip link set server up
ip -n server address add 192.0.2.53/24 dev eth0
ip -n server link set eth0 up
ip netns exec server dnsmasq --conf-file=/dev/null --no-resolv --no-hosts --pid-file --address=/www.example.org/192.0.2.80 --address=/#/
END
# Each guest pings all others and the host, on all addresses
cat >"$root/root/pings" <<END
set -eu
addresses() {
    device=\$1
    shift
    ip "\$@" -o address show dev \$device scope global -tentative | sed 's,.* inet6* \([^/]*\)/.*,\1,'
}
mkdir /run/pings
for guest in $guests mail; do
    others=\$(for other in $guests mail; do [ \$other = \$guest ] || addresses eth0 -n \$other; done)
    for other in \$(addresses br0) \$others; do
        ip netns exec \$guest ping -n -i 0.2 \$other >/run/pings/\$guest-\$other 2>&1 &
        echo \$! >>/run/pings.pids
    done
done
END

# ---- The machine ----
enter_group
boot

# follow PAGE WORDS: run the block that has these words, with the lease file of this dnsmasq
follow() {
    commands=$(block "$@")
    lines "the block that has: $2" "$(printf '%s\n' "$commands" | sed 's,/var/lib/misc/dnsmasq\.leases,/var/lib/misc/lan.leases,')"
}
# state: what is on the disk, and in force
state() {
    run sh -c 'set -- /etc /usr/local /var/lib/misc
        find "$@" -type l -printf "%p %l\n" | sort
        find "$@" -type f -not -name lan.leases -exec sha256sum {} + | sort
        nft list ruleset
        systemctl list-unit-files --no-legend --state=enabled'
}
# leases: all of dnsmasq's, and the addresses that the guests have
leases() {
    run sh -euc "cut -d ' ' -f 2- /var/lib/misc/lan.leases | sort
        for guest in $guests mail; do ip -n \$guest -o address show dev eth0 | sed 's/ valid_lft.*//'; done"
}
# goes GUEST: it reaches the host
goes() { run ip netns exec "$1" ping -q -c 2 -i 0.2 -W 1 10.83.0.1 >/dev/null; }
# names COMMAND: it finds the names of all guests. nameless COMMAND: not even one
names() {
    for guest in $guests; do
        until_true 20 "$* $guest.instance.internal" sh -c "$* $guest.instance.internal | grep -F 10.83.0."
    done
}
nameless() {
    run "$@" web.instance.internal >"$folder/output" 2>"$folder/log" || true
    [ ! -s "$folder/output" ] || failed "$*: a name is left"
}

step "a host with guests that have leases of both versions"
run sh /root/guests
for guest in $guests; do
    until_true 40 "leases of $guest" sh -c "[ \$(ip -n $guest -o address show dev eth0 scope global -tentative | wc -l) -eq 3 ]"
done
until_true 10 "the host's resolver" getent hosts www.example.org
goes rogue || fail "nothing is to be seen of what the guard will stop"
state >"$folder/before"
leases >"$folder/leases"
run sh /root/pings

step "names"
follow examples/adopting/README.md 'ss -lunp'
grep -q 'users:(("dnsmasq"' "$folder/output" || fail "the page does not find the DHCP server"
grep -q 'dhcp-leasefile=/var/lib/misc/lan.leases' "$folder/output" || fail "the page does not find the lease file"
follow examples/adopting/README.md 'apt-get update'
names dig +short +timeout=1 @10.83.0.1

step "compared"
follow examples/adopting/README.md 'leases=/var'
[ "$(grep -cE '^(2001|fd83):.* [a-z]+$' "$folder/output")" -eq 10 ] || failed "IPv6 leases are not missed"
follow examples/adopting/README.md 'DNSMASQ_MAC=$mac'
cp "$folder/output" "$folder/entered"
follow examples/nftables/README.md 'instances-update.py add'
follow examples/adopting/README.md 'leases=/var'
echo '10.83.0.166 10:66:6a:4c:a1:66' | cmp -s - "$folder/output" || { cat "$folder/entered" >&2; failed "compared"; }

step "observed"
follow examples/adopting/README.md 'cp examples/nftables/bridge.nft'
goes rogue || fail "the guard drops while it observes"
follow examples/adopting/README.md 'nft list set'
[ "$(grep -o '10:66:6a:4c:a1:.. \. ".*" counter' "$folder/output" | cut -c 1-17 | sort -u)" = 10:66:6a:4c:a1:66 ] || failed "others would be dropped"

step "enforced"
follow examples/adopting/README.md 'nft flush set'
not goes rogue || fail "the guard lets an attacker through"
run nft list set bridge instances instances_dropped | grep -q 10:66:6a:4c:a1:66 || fail "what stops it is not the guard"

step "the host asks, by unbound, by systemd-resolved, and dnsmasq alone"
nameless getent ahosts
follow examples/adopting/README.md 'cp examples/adopting/unbound.conf'
names getent ahostsv4
run sh -euc 'rm /etc/unbound/unbound.conf.d/instances.conf; systemctl reload unbound'
until_true 20 "unbound" getent hosts www.example.org
nameless getent ahosts

run sh -euc "systemctl stop unbound; cp /etc/dnsmasq.d/lan.conf /etc/default/dnsmasq /root/
    sed -i -e /no-resolv/d -e /server=/d /etc/dnsmasq.d/lan.conf
    ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
    systemctl start systemd-resolved; systemctl restart dnsmasq; resolvectl dns server 192.0.2.53; resolvectl domain server '~.'"
until_true 10 "refused without a server" sh -c 'ip netns exec web dig +timeout=1 @10.83.0.1 www.example.org | grep REFUSED'
nameless getent ahosts
follow examples/adopting/README.md 'echo IGNORE_RESOLVCONF'
until_true 10 "another name" sh -c 'ip netns exec web dig +timeout=1 +short @10.83.0.1 www.example.org | grep 192.0.2.80'
follow examples/adopting/README.md 'cp examples/adopting/instances-resolved.service'
names getent ahostsv4
run systemctl --quiet disable --now instances-resolved.service
run rm /etc/systemd/system/instances-resolved.service
nameless getent ahosts

run sh -euc 'systemctl stop systemd-resolved; rm /etc/resolv.conf; echo nameserver 192.0.2.53 >/etc/resolv.conf'
nameless getent ahosts
run sed -i '1i nameserver 10.83.0.1' /etc/resolv.conf
run systemctl restart dnsmasq
names getent ahostsv4
run getent hosts www.example.org >/dev/null || fail "the host's other names"
until_true 10 "another name" sh -c 'ip netns exec web dig +timeout=1 +short @10.83.0.1 www.example.org | grep 192.0.2.80'

run sh -euc 'mv /root/lan.conf /etc/dnsmasq.d/; mv /root/dnsmasq /etc/default/
    echo nameserver 127.0.0.1 >/etc/resolv.conf; systemctl start unbound; systemctl restart dnsmasq
    systemctl reset-failed dnsmasq' # or there were too many starts

step "another domain, and back"
follow examples/dnsmasq/README.md 'vm.example.org'
until_true 20 "another domain" sh -c 'dig +short +timeout=1 @10.83.0.1 web.vm.example.org | grep -F 10.83.0.'
nameless dig +short +timeout=1 @10.83.0.1
run sh -euc 'sed -i s/vm.example.org/instance.internal/ /etc/dnsmasq.d/*.conf
    sed -i /vm.example.org/d /etc/default/instances; instances-apply; systemctl restart dnsmasq' 2>"$folder/log"
names dig +short +timeout=1 @10.83.0.1

step "gone back, step by step"
follow examples/adopting/README.md '=observe >>/etc/default/instances\ninstances-apply'
goes rogue || fail "it does not observe again"
follow examples/adopting/README.md 'rm /etc/instances/bridge.nft'
[ -z "$(run nft list ruleset)" ] || fail "the guard is left"
names dig +short +timeout=1 @10.83.0.1
follow examples/adopting/README.md 'rm /etc/dnsmasq.d/instances.conf'
nameless dig +short +timeout=1 @10.83.0.1
follow README.md 'dpkg --purge'
state | diff "$folder/before" - || fail "something is left"

step "nobody has lost a ping or an address"
leases | diff "$folder/leases" - || fail "addresses"
run sh -c 'kill -INT $(cat /run/pings.pids)'
until_true 10 "the end of the pings" sh -c '[ "$(grep -l transmitted /run/pings/* | wc -l)" -eq "$(wc -l </run/pings.pids)" ]'
run sh -c 'for pings in /run/pings/*; do
        sed -n "s/.*bytes from.*icmp_seq=\([0-9]*\) .*/\1/p" "$pings" | sort -nu >/run/answered
        sent=$(sed -n "s/ packets transmitted.*//p" "$pings")
        echo "${pings##*/} $sent $(wc -l </run/answered) $(tail -n 1 /run/answered)"
    done' >"$folder/pings"
# Of each, what was answered is all up to the last one that was; one more may have been on its way.
awk '{ sent += $2 } $3 != $4 || $2 > $4 + 1 || $2 < 25 { print; lost = 1 } END { print NR " pings, " sent " packets"; exit lost }' \
    "$folder/pings" >&2 || fail "pings are lost"
step "as expected"
