#!/bin/sh
# usage: resolvers.sh [RELEASE]...
# Makes a root of each Debian release (trixie) in a temporary folder, boots it with systemd-nspawn, and installs by README.md,
# while it looks where dnsmasq listens. Then the host and a guest ask for a guest's name and for another one beside each
# resolver that the host may have, in its modes, as examples/adopting/README.md says. As root; it changes nothing outside of
# the folder. DEBIAN_ROOTS: see root.sh.
# Exit status: 0 as expected, 1 not so, 77 no Debian can be made or booted here (1 with CI=true).
# shellcheck disable=SC2016,SC2119 # commands for the machine, and boot without options
set -eu

# shellcheck source=tests/machines/root.sh
. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    for_each_boot "$@"
fi

step "a root"
installing=$(block README.md 'install -m 755')
make_machine "install systemd-sysv dbus ifupdown udhcpc bind9 bind9-utils bind9-dnsutils openssl ca-certificates \
        systemd-resolved network-manager iproute2
    install --download-only libnss-resolve
    $(printf '%s\n' "$installing" | grep -o 'apt-get install [^&]*' | sed 's/install/install --download-only/')
    openssl req -x509 -newkey rsa:2048 -nodes -days 30 -subj /CN=dns.example -addext 'subjectAltName=DNS:dns.example,IP:192.0.2.53' \
        -keyout /root/key.pem -out /usr/local/share/ca-certificates/dns.crt
    update-ca-certificates"
echo nameserver 192.0.2.53 >"$root/etc/resolv.conf"
add_bridge
systemctl --quiet --root="$root" enable networking.service
systemctl --quiet --root="$root" disable named.service NetworkManager.service NetworkManager-wait-online.service \
    systemd-resolved.service systemd-networkd.service systemd-networkd.socket

# The servers that everybody asks beyond the host: a root zone with signatures, and a way to ask it by TLS
mkdir "$root/root/bind"
cat >"$root/root/bind/named.conf" <<'END'
tls own { cert-file "/usr/local/share/ca-certificates/dns.crt"; key-file "/root/key.pem"; };
options {
    directory "/root/bind"; pid-file none; recursion no; dnssec-validation no;
    listen-on { 192.0.2.53; }; listen-on port 853 tls own { 192.0.2.53; }; listen-on-v6 { none; };
};
controls { };
zone "." { type primary; file "/root/bind/zone"; dnssec-policy default; };
END
printf '%s\n' '$TTL 60' '. SOA ns. ns. 1 3600 600 86400 60' '. NS ns.' 'ns. A 192.0.2.53' 'www.example.org. A 192.0.2.80' \
    >"$root/root/bind/zone"
cat >"$root/root/network" <<'END'
set -eu
ip netns add server
ip link add up0 type veth peer name eth0 netns server
ip address add 192.0.2.1/24 dev up0
ip link set up0 up
ip -n server address add 192.0.2.53/24 dev eth0
ip -n server link set eth0 up
ip netns exec server named -f -c /root/bind/named.conf >/dev/null 2>&1 &
ip netns add web
ip link add web type veth peer name eth0 address 10:66:6a:4c:a1:11 netns web
ip link set web master br0 up
ip -n web link set eth0 up
ip -n web address add 10.83.0.11/24 dev eth0
END

# ---- The machine ----
enter_group
boot
domain=instance.internal
page=$top/examples/adopting/README.md
# guest_asks: the guest finds a name of ours, and another one
guest_asks() {
    until_true 20 "$1: a guest's question for ours" sh -c "ip netns exec web dig +timeout=1 +short @10.83.0.1 host.$domain | grep -x 10.83.0.1"
    until_true 20 "$1: a guest's question for another" sh -c 'ip netns exec web dig +timeout=1 +short @10.83.0.1 www.example.org | grep -x 192.0.2.80'
}
# all_ask: so does the host
all_ask() {
    guest_asks "$1"
    until_true 20 "$1: the host's question for ours" sh -c "getent ahostsv4 host.$domain | grep -F 10.83.0.1"
    until_true 20 "$1: the host's question for another" sh -c 'getent ahostsv4 www.example.org | grep -F 192.0.2.80'
}

step "installed by README.md: dnsmasq never listens on other addresses than the bridge's"
run sh /root/network
until_true 20 "the root zone" sh -c 'dig +dnssec @192.0.2.53 . DNSKEY | grep -w RRSIG'
run sh -euc 'mkdir -p /etc/dnssec-trust-anchors.d
    dig @192.0.2.53 . DNSKEY | dnssec-dsfromkey -2 -f - . >/etc/dnssec-trust-anchors.d/root.positive' 2>"$folder/log" ||
    fail "no trust anchor"
run touch /run/listened /run/watch
run sh -c 'while [ -e /run/watch ]; do ss -Hlntup "sport = :53" | awk "/dnsmasq/ { print \$5 }" >>/run/listened; done' &
lines "installing" "$installing"
run rm /run/watch
run grep -q 10.83.0.1 /run/listened || fail "dnsmasq was never seen"
not run grep -vE '^(10\.83\.0\.1|\[(2001:67c:83::1|fd83:5eed::1|fe80::[^]]*)\](%br0)?|\[fe80::[^]]*%br0\]|[^ ]*%br0):53$' /run/listened ||
    { run sort -u /run/listened >&2; fail "dnsmasq was open on other addresses"; }
run sh -euc 'instances-update.py add 10:66:6a:4c:a1:11 10.83.0.11 web; instances-apply' >"$folder/log" 2>&1
guest_asks "a plain resolv.conf"
run sed -i '1i nameserver 10.83.0.1' /etc/resolv.conf
run systemctl restart dnsmasq
all_ask "a plain resolv.conf with the bridge's address"

step "beside systemd-resolved: installed, and nothing else"
run sh -euc 'mkdir -p /etc/systemd/resolved.conf.d
    printf "%s\n" "[Resolve]" "DNS=192.0.2.53#dns.example" "Domains=~." >/etc/systemd/resolved.conf.d/dns.conf
    ln -sf /run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
    systemctl enable --now systemd-resolved; systemctl restart dnsmasq' >/dev/null 2>&1
guest_asks "systemd-resolved"

# modes WHAT: in each mode of systemd-resolved
modes() {
    for file in stub-resolv.conf resolv.conf; do
        [ "$file" = stub-resolv.conf ] || run sh -c "$(grep -o '`apt-get install libnss[^`]*`' "$page" | tr -d '`')" >"$folder/log" 2>&1
        for mode in 'DNSSEC=no DNSOverTLS=no' 'DNSSEC=yes DNSOverTLS=no' 'DNSSEC=no DNSOverTLS=yes' 'DNSSEC=yes DNSOverTLS=yes'; do
            run sh -euc "printf '%s\n' '[Resolve]' $mode >/etc/systemd/resolved.conf.d/mode.conf
                ln -sf /run/systemd/resolve/$file /etc/resolv.conf; systemctl reset-failed systemd-resolved dnsmasq
                systemctl restart systemd-resolved dnsmasq"
            all_ask "$1, $file, $mode"
        done
    done
}
step "with instances-resolved.service, in each mode"
follow examples/adopting/README.md 'cp examples/adopting/instances-resolved.service'
modes "instances-resolved.service"

step "another domain, whose names would need a signature"
follow examples/dnsmasq/README.md 'vm.example.org'
run sh -euc 'sed -i s/instance.internal/vm.example.org/ /etc/systemd/system/instances-resolved.service
    systemctl daemon-reload; systemctl restart instances-resolved'
domain=vm.example.org
all_ask "another domain"
run sh -euc 'systemctl --quiet disable --now instances-resolved
    sed -i s/vm.example.org/instance.internal/ /etc/dnsmasq.d/*.conf; sed -i /vm.example.org/d /etc/default/instances
    instances-apply; systemctl restart dnsmasq' 2>"$folder/log"
domain=instance.internal
guest_asks "the former domain"
not run getent hosts host.instance.internal || fail "the host still finds names"

step "with networkd"
sed -n '/With networkd, write/,/With$/p' "$page" | grep -o '`[A-Z][^`]*=[^`]*`' | tr -d '`' >"$folder/lines"
cat >"$root/etc/systemd/network/br0.network" <<END
[Match]
Name=br0
[Network]
Address=10.83.0.1/24
Address=2001:67c:83::1/80
Address=fd83:5eed::1/80
$(cat "$folder/lines")
END
run systemctl start systemd-networkd
modes "networkd"
run sh -euc 'rm /etc/systemd/network/br0.network; systemctl stop systemd-networkd.socket systemd-networkd; resolvectl revert br0'

step "with NetworkManager"
tr '\n' ' ' <"$page" | grep -o '`nmcli [^`]*`' | tr -d '`' >"$folder/lines"
nmcli() { run sh -euc "$(grep "$1" "$folder/lines"); nmcli device reapply br0" >"$folder/log" 2>&1 || failed "nmcli"; }
run sh -euc 'sed -i "/br0/,\$d" /etc/network/interfaces
    printf "%s\n" "[keyfile]" "unmanaged-devices=*,except:interface-name:br0" >/etc/NetworkManager/conf.d/only.conf
    ip link delete br0 # or NetworkManager makes a connection br0 of it
    systemctl start NetworkManager
    nmcli connection add type bridge con-name br0 ifname br0 bridge.stp no bridge.mac-address 10:66:6a:4c:a1:fe \
        ipv4.method manual ipv4.addresses 10.83.0.1/24 ipv6.method manual ipv6.addresses 2001:67c:83::1/80,fd83:5eed::1/80
    nmcli connection up br0; ip link set web master br0' >"$folder/log" 2>&1 || { cat "$folder/log" >&2; fail "NetworkManager"; }
nmcli dns-over-tls
modes "NetworkManager"
# Its resolvconf would stand in the way, had it stayed.
run sh -euc 'dpkg --purge libnss-resolve systemd-resolved; rm -f /etc/resolv.conf
    nmcli connection modify br0 ipv4.dns-search "" ipv4.dns 192.0.2.53; nmcli device reapply br0
    systemctl restart NetworkManager dnsmasq' >"$folder/log" 2>&1 || failed "NetworkManager alone"
guest_asks "NetworkManager alone"
nmcli dns-priority
run nmcli connection modify br0 +ipv4.dns 192.0.2.53 # since it has no other connection
run nmcli device reapply br0 >/dev/null
all_ask "NetworkManager alone"
step "as expected"
