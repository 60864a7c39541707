#!/bin/sh
# usage: lan.sh [RELEASE]...
# Makes a root of each Debian release (trixie) in a temporary folder and boots it with systemd-nspawn: a host on a LAN with a
# router of its own. Follows examples/lan/README.md there, each command, to the undo, while a machine of the LAN pings the host;
# then guests get their leases from Kea, as the router and on the host. As root; it changes nothing outside of the folder.
# DEBIAN_ROOTS: see root.sh. Exit status: 0 as expected, 1 not so, 77 no Debian can be made or booted here (1 with CI=true).
# shellcheck disable=SC2016,SC2119 # commands for the machine, and boot without options
set -eu

# shellcheck source=tests/machines/root.sh
. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    for_each_boot "$@"
fi

installing=$(block examples/lan/README.md 'apt-get install')
step "a root"
make_machine "install systemd-sysv dbus ifupdown udhcpc iputils-ping isc-dhcp-client bind9-dnsutils dnsmasq-base \
        unbound dns-root-data kea-dhcp4-server kea-dhcp6-server network-manager procps
    $(printf '%s\n' "$installing" | grep -o 'apt-get install [^#]*' | sed 's/install/install --download-only/')"
echo nameserver 192.168.1.1 >"$root/etc/resolv.conf"
systemctl --quiet --root="$root" disable unbound.service kea-dhcp4-server.service kea-dhcp6-server.service NetworkManager.service \
    NetworkManager-wait-online.service systemd-networkd.service systemd-networkd.socket networking.service
printf '[main]\nplugins=keyfile\ndns=none\n[keyfile]\nunmanaged-devices=*,except:interface-name:eth0,except:interface-name:br0\n' \
    >"$root/etc/NetworkManager/NetworkManager.conf"

# The LAN: a switch with the router and a machine, in namespaces; eth0 is the host's interface. Then three guests.
cat >"$root/root/lan" <<'END'
set -eu
port() { # NAMESPACE MAC
    ip netns add $1
    ip link add $1 netns switch type veth peer name eth0 address $2 netns $1
    ip -n switch link set $1 master lan up
    ip -n $1 link set eth0 up
}
ip netns add switch
ip -n switch link add lan type bridge
ip -n switch link set lan up
port router 10:66:6a:4c:a1:01
port pc 10:66:6a:4c:a1:02
ip link add eth0 address 10:66:6a:4c:a1:fe type veth peer name host netns switch
ip -n switch link set host master lan up
ip link set eth0 up
ip address add 192.168.1.5/24 dev eth0
ip route add default via 192.168.1.1
ip -n router address add 192.168.1.1/24 dev eth0
ip -n router address add fd12:3456:789a:1::1/64 dev eth0 nodad
ip -n pc address add 192.168.1.50/24 dev eth0
END
cat >"$root/root/serve" <<'END'
exec ip netns exec router dnsmasq --conf-file=/dev/null --user=root --no-resolv --no-hosts --interface=eth0 --bind-interfaces \
    --dhcp-range=192.168.1.100,192.168.1.199,1h --dhcp-range=fd12:3456:789a:1::100,fd12:3456:789a:1::1ff,slaac,64,1h --enable-ra \
    --no-ping --dhcp-leasefile=/run/router.leases --pid-file=/run/router.pid --address=/www.example.org/192.0.2.80 \
    --stop-dns-rebind "$@"
END
cat >"$root/root/guest" <<'END'
set -eu
ip netns add $1
ip link add $1 type veth peer name eth0 address 10:66:6a:4c:a2:$2 netns $1
ip link set $1 master br0 up
ip -n $1 link set lo up
ip -n $1 link set eth0 up
printf '#!/bin/sh\ncase $1 in bound|renew) ip address replace $ip/24 dev eth0 ;; esac\n' >/root/script
chmod 755 /root/script
ip netns exec $1 udhcpc -f -i eth0 -s /root/script -x hostname:$1 -T 1 -A 1 >/run/$1.udhcpc 2>&1 &
echo $! >/run/$1.pid
END

# ---- The machine ----
enter_group
boot
# ping_host: the LAN's machine pings the host from now on. none_lost: not one was lost since then
ping_host() { run sh -c 'ip netns exec pc ping -n -i 0.05 192.168.1.5 >/run/pings 2>&1 & echo $! >/run/pings.pid'; }
none_lost() {
    until_true 10 "pings" sh -c '[ $(wc -l </run/pings) -gt 60 ]'
    run sh -c 'kill -INT $(cat /run/pings.pid); sleep 0.5; tail -n 3 /run/pings' >"$folder/output"
    grep -q ' 0% packet loss' "$folder/output" || failed "pings are lost: $1"
    say "$1: $(grep -o '.*received' "$folder/output")"
}
is_bridge() {
    until_true 10 "the bridge" sh -c 'ip -o address show br0 | grep -F 192.168.1.5/24 && ! ip -o -4 address show eth0 | grep . &&
        [ $(cat /sys/class/net/br0/address) = 10:66:6a:4c:a1:fe ] && ip route show default | grep "via 192.168.1.1 dev br0" &&
        [ $(ip route show default | wc -l) = 1 ] && ip -n pc neigh flush all; ip netns exec pc ping -c 1 -W 1 192.168.1.5'
}
# no_bridge: as a boot begins. with_address: as it was before
no_bridge() { run sh -c 'ip link delete br0; ip link set eth0 nomaster down; ip address flush dev eth0' 2>/dev/null; }
with_address() { run sh -euc 'ip link set eth0 up; ip address add 192.168.1.5/24 dev eth0; ip route replace default via 192.168.1.1'; }

step "a LAN"
run sh /root/lan
run sh /root/serve
until_true 10 "the host" ip netns exec pc ping -c 1 -W 1 192.168.1.5

step "the bridge: with networkd, by itself at its start, with NetworkManager, with ifupdown"
ping_host
follow examples/lan/README.md 'br0.netdev'
follow examples/lan/README.md 'ip -batch'
run systemctl start systemd-networkd
until_true 20 "networkd" sh -c 'networkctl status br0 | grep configured && networkctl status eth0 | grep enslaved'
is_bridge
none_lost networkd
run systemctl stop systemd-networkd systemd-networkd.socket
no_bridge
run systemctl start systemd-networkd
is_bridge
run systemctl stop systemd-networkd systemd-networkd.socket
run sh -c 'rm /etc/systemd/network/*'
no_bridge
with_address
run systemctl start NetworkManager
until_true 10 "NetworkManager" nmcli device
ping_host
follow examples/lan/README.md 'ip -batch'
follow examples/lan/README.md 'nmcli'
until_true 20 "NetworkManager" sh -c 'nmcli -t -f DEVICE,STATE device | grep ^eth0:connected$'
is_bridge
none_lost NetworkManager
run systemctl stop NetworkManager
no_bridge
run rm -r /run/NetworkManager # as a boot does
run systemctl start NetworkManager
is_bridge
run systemctl stop NetworkManager
no_bridge
with_address
ping_host
follow examples/lan/README.md 'interfaces.d'
follow examples/lan/README.md 'ip -batch'
is_bridge
none_lost ifupdown
no_bridge
run ifup br0
is_bridge
ping_host

step "registry, names, guard"
for guest in 1:web 2:db 3:cache; do run sh /root/guest "${guest#*:}" "0${guest%:*}"; done
until_true 60 "leases" sh -c 'tail /run/*.udhcpc; bridge link; ip route; [ "$(for g in web db cache; do ip -n $g -o -4 address show eth0; done | wc -l)" -eq 3 ]'
follow examples/lan/README.md 'apt-get install'
until_true 10 "the program" systemctl is-active instances-snoop
follow examples/lan/README.md 'bridge fdb'
run cat /var/lib/misc/instances.json >"$folder/registry"
[ "$(grep -c '"ipv4": "192.168.1.1[0-9][0-9]"' "$folder/registry")" -eq 3 ] || { cp "$folder/registry" "$folder/output"; failed "entered"; }
run nft flush set bridge instances instances_dropped # they answered before they were registered
run sh -c 'kill -USR1 $(cat /run/web.pid /run/db.pid /run/cache.pid)'
for guest in web db cache; do
    until_true 20 "the name $guest" sh -c "dig +short +timeout=1 @192.168.1.5 $guest.instance.internal | grep 192.168.1.1"
done
[ -z "$(run dig +short @192.168.1.5 www.example.org)" ] || fail "it answers other questions"
run nft list set bridge instances instances_dropped >"$folder/output"
not grep -q counter\ packets "$folder/output" || failed "would be dropped"
follow examples/lan/README.md '/^INSTANCES_GUARD=/d'
run ip -n db address add 192.168.1.50/24 dev eth0
not run ip netns exec db ping -c 1 -W 1 -I 192.168.1.50 192.168.1.5 >/dev/null || fail "a guest is the LAN's machine"
run ip -n db address delete 192.168.1.50/24 dev eth0
for guest in web db cache; do run ip netns exec "$guest" ping -q -c 1 -W 1 192.168.1.50 >/dev/null || fail "$guest is cut off"; done

step "the router finds the names: dnsmasq, unbound"
ask() { run ip netns exec pc dig +short +timeout=1 +tries=1 @192.168.1.1 "${1-web.instance.internal}"; }
[ "$(ask www.example.org)" = 192.0.2.80 ] || fail "no answer"
[ -z "$(ask)" ] || fail "without the lines"
run sh -c 'kill $(cat /run/router.pid); sleep 0.5'
for line in $(block examples/lan/README.md 'rebind-domain-ok'); do lines="${lines-} --$line"; done
# shellcheck disable=SC2086 # options
run sh /root/serve $lines
ask | grep -q '^192\.168\.1\.1' || fail "dnsmasq as the router"
run sh -c 'kill $(cat /run/router.pid); sleep 0.5'
run sh /root/serve --port=0
run sh -euc 'cat >/root/unbound.conf <<END
server:
    interface: 192.168.1.1
    access-control: 192.168.1.0/24 allow
    private-address: 192.168.0.0/16
    chroot: ""
    username: ""
    pidfile: ""
$1
END
    exec ip netns exec router unbound -c /root/unbound.conf' sh ''
[ -z "$(ask)" ] || fail "unbound without the lines"
run sh -euc 'pkill -x unbound; sleep 0.5; sed "s/10.83.0.1/192.168.1.5/" /root/instances/examples/adopting/unbound.conf >>/root/unbound.conf
    exec ip netns exec router unbound -c /root/unbound.conf'
ask | grep -q '^192\.168\.1\.1' || fail "unbound as the router"

until_true 20 "nothing that is wrong" instances-show --check # when the router, which started, has announced its prefix

step "a guest that is gone"
follow examples/lan/README.md 'chmod 755'
[ "$(run instances-release 10:66:6a:4c:a2:03)" = 10:66:6a:4c:a2:03 ] || fail "instances-release"
none_lost "all the page"

step "Kea: as the router, and on this host"
run sh -euc 'kill $(cat /run/router.pid); pkill -x unbound; mkdir -p /run/kea /run/lock/kea /var/lib/kea
    for version in 4 6; do
        [ $version = 4 ] && net=192.168.1. prefix=24 || net=fd12:3456:789a:1:: prefix=64
        for interface in eth0 br0; do
            [ $interface = eth0 ] && from=150 || from=170
            cat >/etc/kea/$interface-$version.conf <<END
{"Dhcp$version": {"interfaces-config": {"interfaces": ["$interface"]}, "lease-database": {"type": "memfile", "persist": false},
 "valid-lifetime": 7200, "subnet$version": [{"id": 1, "interface": "$interface", "subnet": "${net%.}$([ $version = 6 ] || echo .0)/$prefix",
 "pools": [{"pool": "${net}$from - ${net}199"}]}]}}
END
        done
    done'
run sh -euc 'for version in 4 6; do ip netns exec router kea-dhcp$version -c /etc/kea/eth0-$version.conf >/run/kea.log 2>&1 & done'
# joins NAME NUMBER: a guest that has leases of both versions from Kea
joins() {
    run sh /root/guest "$1" "$2"
    until_true 20 "DHCP of $1" sh -c "grep -A 5 '\"name\": \"$1\"' /var/lib/misc/instances.json | grep -E '\"ipv4\": \"192.168.1.1[5-9]'"
    until_true 10 "link-local" sh -c "ip -n $1 -6 address show dev eth0 -tentative | grep fe80"
    run timeout 20 ip netns exec "$1" dhclient -6 -lf "/run/$1.leases" -pf "/run/$1.pid6" -sf /root/script6 eth0 2>"$folder/log" || failed "dhclient of $1"
    until_true 20 "DHCPv6 of $1" sh -c "grep -A 5 '\"name\": \"$1\"' /var/lib/misc/instances.json | grep -E '\"ipv6_ula\": \"fd12:3456:789a:1::1[5-9]'"
    run ip netns exec "$1" ping -q -c 1 -W 1 192.168.1.50 >/dev/null || failed "$1 is cut off"
}
run sh -c 'printf "#!/bin/sh\ncase \$reason in BOUND6) ip address replace \$new_ip6_address/64 dev eth0 ;; esac\n" >/root/script6
    chmod 755 /root/script6'
joins mail 04
run sh -euc 'pkill kea-dhcp; sed -i "s/^ExecStart=.*/ExecStart=instances-snoop br0/" /etc/systemd/system/instances-snoop.service
    sed -i "s/^define server = .*/define server = \"none\"/" /etc/instances/bridge.nft
    systemctl daemon-reload; systemctl restart instances-snoop; instances-apply
    for version in 4 6; do kea-dhcp$version -c /etc/kea/br0-$version.conf >/run/kea.log 2>&1 & done' 2>"$folder/log"
joins git 05

step "undone"
follow examples/lan/README.md 'disable --now instances-snoop'
run sh -c 'ls /etc/systemd/system/instances-snoop.service /usr/local/sbin/instances-snoop 2>&1; systemctl is-active instances-snoop' >"$folder/output" || true
{ grep -q inactive "$folder/output" && [ "$(grep -c 'No such' "$folder/output")" -eq 2 ]; } || failed "undone"

step "as expected"
