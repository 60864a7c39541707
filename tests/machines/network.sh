#!/bin/sh
# usage: network.sh [RELEASE]...
# Makes a root of each Debian release (trixie), boots three machines of it with systemd-nspawn that have a network for
# guests and one for management, and follows examples/network/README.md on them, each command, to its undo. As root; it
# changes nothing outside of its temporary folder. DEBIAN_ROOTS: see root.sh.
# Exit status: 0 as expected, 1 not so, 77 no Debian can be made or booted here (1 with CI=true).
# shellcheck disable=SC2016 # commands for the machines
set -eu

# shellcheck source=tests/machines/root.sh
. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    need ip
    for_each_boot "$@"
fi

installing=$(block README.md 'install -m 755' |
    grep -v -e bridge.nft -e dnsmasq/br0.conf -e 'br0 host' -e 'restart dnsmasq')

step "a root"
make_machine "install systemd-sysv dbus iproute2 udhcpc openssl python3 python3-filelock nftables procps
    apt-get install -y --download-only dnsmasq etcd-server etcd-client"
systemctl --quiet --root="$root" disable systemd-networkd.service systemd-networkd.socket
systemctl --quiet --root="$root" mask systemd-networkd-wait-online.service

# ---- Three machines of it, on a switch ----
enter_group
make_switch
each() { for host in a b c; do on "$host" "$@"; done; }
# lines_on HOST COMMANDS: as they stand on the page. everywhere COMMANDS: on each host
lines_on() {
    leader=$(cat "$folder/$1.leader")
    lines "on $1" "cd examples/network; $2"
}
everywhere() { for host in a b c; do lines_on "$host" "$1"; done; }

step "three machines"
for host in a:1 b:2 c:3; do
    boot_host "${host%:*}" "${host#*:}"
    run sh -euc 'ip link add br0 up type bridge; ip link set eth0 master br0 up'
done

step "installed by the first page, and etcd by its own"
everywhere "cd /root/instances; $installing"
lines_on a "$(block examples/network/README.md 'openssl req')"
etcd=$(block examples/network/README.md 'apt-get install -y etcd-server')
number=0
for host in a b c; do
    number=$((number + 1))
    mkdir -p "$folder/$host/root/etcd"
    cp "$folder/a/root/etcd/ca.crt" "$folder/a/root/etcd/$host.crt" "$folder/a/root/etcd/$host.key" "$folder/$host/root/etcd/" 2>/dev/null || true
    lines_on "$host" "$(echo "$etcd" | sed "s/^host=a.*/host=$host address=192.0.2.$number/")"
done
healthy=$(block examples/network/README.md 'endpoint health')
for host in a b c; do until_here 60 "etcd of $host" on "$host" sh -euc "$healthy"; done
[ "$(on a ss -Htln 'sport = 2379 or sport = 2380' | grep -cv -e 127.0.0.1:2379 -e 192.0.2.1:2380)" -eq 0 ] || fail "etcd listens elsewhere, too"

step "the guard and the names"
for host in a b c; do
    lines_on "$host" "$(block examples/network/README.md 'cp network.nft')"
    until_here 20 "the guard of $host" on "$host" sh -c 'nft list chain bridge instances at_forward | grep -q eth0'
done

step "one host writes"
everywhere "$(block examples/network/README.md 'INSTANCES_WRITER=a')"
on a sh -euc 'ip address add 10.83.0.1/24 dev br0; ip address add 2001:67c:83::1/80 dev br0 nodad; ip address add fd83:5eed::1/80 dev br0 nodad'
until_here 20 "a writes" on a sh -c '[ ! -e /var/lib/misc/instances.follows ]'
lines_on a "$(block examples/network/README.md 'cp ../dnsmasq/br0.conf')"
# guest HOST NUMBER: a guest of a host, which gets an address
guest() {
    on "$1" sh -euc "ip netns add g$2; ip link add g$2 type veth peer name eth0 address 10:66:6a:4c:b0:1$2 netns g$2
        ip link set g$2 master br0 up; ip -n g$2 link set eth0 up
        printf '#!/bin/sh\n[ \"\$1\" != bound ] || ip address replace \$ip/24 dev eth0\n' >/root/lease; chmod 755 /root/lease"
    until_here 40 "a lease for the guest of $1" on "$1" ip netns exec "g$2" udhcpc -f -q -n -i eth0 -s /root/lease -x "hostname:g$2"
}
# known MAC: all hosts have it in force
known() {
    for host in a b c; do
        until_here 20 "$1 on $host" on "$host" sh -c "nft list set bridge instances instances_ip | grep -q $1"
    done
}
name() { until_here 20 "the name $2 on $1" on "$1" ip netns exec "$3" busybox nslookup "$2.instance.internal" 10.83.0.2; }
guest b 1
guest c 2
known 10:66:6a:4c:b0:11
known 10:66:6a:4c:b0:12
name b g2 g1
name c g1 g2
not on b instances-update.py --remove 10:66:6a:4c:b0:11 2>"$folder/log" || fail "b may write"
grep -q 'a writes it' "$folder/log" || fail "b does not say who writes"
on b ip netns exec g1 busybox ping -q -c 1 "$(on c ip netns exec g2 ip -4 -o address show eth0 | grep -o '10\.83[0-9.]*' | head -n 1)" >/dev/null ||
    fail "guests do not reach each other"

step "a writer that can't tell which registry is newer"
for word in --give --take; do
    on a systemctl stop instances-follow
    on a rm /var/lib/misc/instances.shared
    on a instances-update.py add 10:66:6a:4c:b1:01 10.83.0.77
    on a instances-update.py --rename 10:66:6a:4c:b1:01 "kept${word#--}"
    on a systemctl start instances-follow
    until_here 20 "a says so" on a sh -c 'journalctl -q -u instances-follow -n 1 | grep -q "etcd has another registry"'
    lines_on a "instances-follow.py $word"
    until_here 20 "a goes on" on a sh -c 'journalctl -q -u instances-follow -n 1 | grep -q "goes on"'
    sorted="import json; print(sorted(json.load(open('/var/lib/misc/instances.json')).items()))"
    registries_equal() { [ "$(each python3 -c "$sorted" | sort -u | wc -l)" -eq 1 ]; }
    until_here 20 "one registry" registries_equal
    on b grep -q keptgive /var/lib/misc/instances.json || fail "after $word"
done

step "any host can be the one"
on a sh -euc 'rm -f /etc/dnsmasq.d/br0.conf; ip address flush dev br0 scope global; systemctl stop dnsmasq'
everywhere "$(block examples/network/README.md 'cp gateway.ip')"
leader_is() { [ "$(for host in a b c; do on "$host" ip link show gw0 >/dev/null 2>&1 && echo "$host"; done)" = "$1" ]; }
find_leader() { for leading in a b c; do if leader_is "$leading"; then return 0; fi; done; return 1; }
until_here 30 "a leader" find_leader
pings() { on c ip netns exec g2 busybox ping -q -c 1 -W 1 10.83.0.1; }
find_leader
first=$leading
until_here 20 "the gateway" pings
for how in "systemctl restart instances-lead" "systemctl kill --signal=KILL --kill-whom=main instances-lead"; do
    find_leader
    first=$leading
    # shellcheck disable=SC2086 # a command and its arguments
    on "$first" $how
    changed() { find_leader && [ "$leading" != "$first" ]; }
    until_here 30 "another leads after: $how" changed
    not on "$first" sh -c 'ps ax | grep "[g]ateway.conf"' >/dev/null || fail "dnsmasq outlives the leader"
    until_here 20 "the gateway" pings
done
guest a 3
known 10:66:6a:4c:b0:13

keys=$(block examples/network/README.md 'endpoint health' | grep '^export')
with_keys() { lines_on "$1" "$keys; $2"; }
healthy() { for host in a b c; do on "$host" sh -euc "$healthy" || return 1; done; }
enter() { find_leader && on "$leading" instances-update.py add "10:66:6a:4c:b2:0$1" "10.83.0.8$1"; }
# works NUMBER: a guest that is new on whichever host leads is known on all
works() {
    until_here 60 "etcd" healthy
    until_here 60 "a change on the host that leads" enter "$1"
    known "10:66:6a:4c:b2:0$1"
}

step "etcd's database is full"
on c sh -euc "$keys; echo ETCD_QUOTA_BACKEND_BYTES=16384 >>/etc/default/etcd; systemctl restart etcd
    until etcdctl alarm list | grep NOSPACE; do etcdctl put other \"\$(seq 9999)\" || sleep 0.2; done
    sed -i /QUOTA/d /etc/default/etcd; systemctl restart etcd"
on b systemctl restart instances-lead
for host in a b c; do with_keys "$host" "$(block examples/network/README.md 'alarm disarm')"; done
works 1

step "one host's etcd is lost"
on c sh -euc 'systemctl kill --signal=KILL etcd; rm -rf /var/lib/etcd/default'
removed() { on b sh -euc "$keys; $(block examples/network/README.md 'member remove')"; }
until_here 60 "c's etcd is a new member" removed
lines_on c "$(block examples/network/README.md 'STATE=existing')"
works 2

step "a snapshot is restored"
with_keys a 'etcdctl snapshot save /root/etcd.snapshot'
for host in b c; do cp "$folder/a/root/etcd.snapshot" "$folder/$host/root/"; done
works 3
everywhere "$(block examples/network/README.md 'default/member')"
for host in a b c; do with_keys "$host" "$(block examples/network/README.md 'snapshot restore')"; done
everywhere "systemctl start --no-block etcd"
works 4
known 10:66:6a:4c:b2:03

step "etcd is made anew"
everywhere "$(block examples/network/README.md 'default/member')"
everywhere "systemctl start --no-block etcd"
works 5
known 10:66:6a:4c:b2:04

step "certificates are renewed"
lines_on a "cd /root/etcd; $(block examples/network/README.md 'openssl req' | sed -n '/^for host/,/^done/p')"
for host in a b c; do
    cp "$folder/a/root/etcd/$host.crt" "$folder/a/root/etcd/$host.key" "$folder/$host/root/etcd/" 2>/dev/null || true
    lines_on "$host" "host=$host; $(echo "$etcd" | grep '^install')"
done
works 6

step "undone: nothing is left"
everywhere "$(block examples/network/README.md 'rm -rf /etc/etcd')"
for host in a b c; do
    left=$(on "$host" sh -c 'ip -o link show; ip rule; ip -6 rule; nft list tables' | grep -e gw0 -e dns0 -e 'lookup 83' -e instances) || true
    [ -z "$left" ] || { on "$host" journalctl --no-pager -n 30 -o short-precise -u 'instances*' >&2; fail "left on $host: $left"; }
    left=$(on "$host" find /etc /usr/local /var/lib/misc '(' -name '*instances-lead*' -o -name '*instances-follow*' -o -name '*instances-names*' \
        -o -name '*.follows' -o -name network.nft -o -name 'gateway.*' -o -name 'names.*' ')')
    [ -z "$left" ] || fail "left on $host: $left"
done
step "as expected"
