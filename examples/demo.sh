#!/bin/sh
# usage: demo.sh
# Shows the two scripts at work with real programs, in network namespaces of its own; as root, on Debian 12 or 13.
# It changes nothing else, and ends with 0 only if every step came out as expected.
set -eu

[ $# -eq 0 ] || { echo "usage: demo.sh" >&2; exit 2; }
[ "$(id -u)" -eq 0 ] || { echo "demo.sh: run it as root" >&2; exit 1; }
top=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
host=demo$$-host web=demo$$-web db=demo$$-db
processes=
export PATH="$top:/usr/sbin:/usr/bin:/sbin:/bin" # as a service has it: with Debian's Python
export INSTANCES_BASE_PATH="$folder/instances"

finish() {
    status=$?
    trap - EXIT INT TERM
    for process in $processes; do kill "$process" 2>/dev/null || true; done
    wait
    for namespace in $web $db $host; do ip netns delete "$namespace" 2>/dev/null || true; done
    rm -rf "$folder"
    [ $status -eq 0 ] && echo "demo.sh: all came out as expected" || echo "demo.sh: failed" >&2
    exit $status
}
trap finish EXIT
trap 'exit 130' INT TERM

step() { printf '\n== %s\n' "$*"; }

# expect PATTERN COMMAND...: show the command's output; fail unless a line of it matches
expect() {
    pattern=$1
    shift
    "$@" >"$folder/output" 2>&1 || true
    sed 's/^/   /' "$folder/output"
    grep -Eq -- "$pattern" "$folder/output" || { echo "demo.sh: expected '$pattern' of: $*" >&2; exit 1; }
}

# until_true COMMAND...: wait until it succeeds, 20 s at most
until_true() {
    deadline=$(($(date +%s) + 20))
    until "$@" >/dev/null 2>&1; do
        [ "$(date +%s)" -lt $deadline ] || { echo "demo.sh: waited in vain for: $*" >&2; exit 1; }
        sleep 0.1
    done
}

# address NAME SUBDOMAIN: what the hosts file says
address() { sed -n "s/ .*$1\\.$2\\.instance.*//p" "$folder/instances.hosts"; }
on() { ip netns exec "$@"; }

# background NAMESPACE COMMAND...: start it, to be ended with the demo
background() {
    ip netns exec "$@" >>"$folder/log" 2>&1 & # not by on, so that $! is the command's own
    processes="$processes $!"
}

cat >"$folder/client" <<'END'
#!/bin/sh
# what both DHCP clients run: take the address
case "${1-}${reason-}" in
bound | renew) ip address replace "$ip/24" dev "$interface" ;;
BOUND6 | RENEW6) ip address replace "$new_ip6_address/$new_ip6_prefixlen" dev "$interface" ;;
esac
END
chmod 755 "$folder" "$folder/client"
# the examples, with this folder's paths
mkdir "$folder/rules" "$folder/instances.hosts.d"
printf '%s\n' "PATH='$PATH'" "INSTANCES_BASE_PATH='$INSTANCES_BASE_PATH'" "INSTANCES_RULES='$folder/rules'" \
    "INSTANCES_RUN='$folder/run'" INSTANCES_ADDRESS_SETS=host,web >"$folder/settings"
sed "s#/var/lib/misc#$folder#" "$top/examples/nftables/bridge.nft" >"$folder/rules/bridge.nft"
unshare -n nft 'table bridge t { chain c { meta ibrname br0 accept; }; }' 2>/dev/null ||
    sed -i '/meta ibrname/d' "$folder/rules/bridge.nft" # a kernel without it; here is no other bridge
sed "s#/var/lib/misc#$folder#; s#/usr/local/sbin#$top#" "$top/examples/dnsmasq/br0.conf" >"$folder/dnsmasq.conf"

step "A bridge on a host, with an IPv4, a global and a unique local IPv6 address"
ip netns add $host
on $host ip link add br0 address 10:66:6a:4c:a1:fe type bridge
on $host ip link set br0 up
on $host ip address add 10.83.0.1/24 dev br0
on $host ip address add 2001:67c:83::1/80 dev br0 nodad
on $host ip address add fd83:5eed::1/80 dev br0 nodad
expect 'br0 .*10\.83\.0\.1/24' on $host ip -brief address show dev br0

step "The administrator registers the bridge, then starts dnsmasq on it"
expect 'host: initialized' on $host instances-update.py --initialize br0 host
background $host dnsmasq --conf-file="$folder/dnsmasq.conf" --no-resolv --pid-file --keep-in-foreground --log-facility=-
until_true grep -q 'started, version' "$folder/log"
expect 'started' grep 'dnsmasq.*started' "$folder/log"

step "Two clients get leases from it, of both IP versions; dnsmasq's script registers them"
number=1
for client in $web $db; do
    name=${client##*-}
    ip netns add "$client"
    on $host ip link add port-"$name" type veth peer name eth0 address 10:66:6a:4c:a1:1$number netns "$client"
    on $host ip link set port-"$name" master br0 up
    on "$client" ip link set lo up
    on "$client" ip link set eth0 up
    number=$((number + 1))
done
for client in $web $db; do
    name=${client##*-}
    until_true sh -c "ip netns exec $client ip -6 address show dev eth0 -tentative | grep -q fe80"
    echo "send fqdn.fqdn \"$name\";" >"$folder/$name.conf"
    background "$client" udhcpc -f -i eth0 -x "hostname:$name" -s "$folder/client"
    until_true grep -q " $name: .*ipv4 " "$folder/log"
    background "$client" dhclient -6 -d -cf "$folder/$name.conf" -lf "$folder/$name.leases" -pf "$folder/$name.pid" \
        -sf "$folder/client" eth0
    until_true grep -q " $name: .*ipv6_gua " "$folder/log"
    until_true grep -q " $name: .*ipv6_ula " "$folder/log"
done
expect '"name": "db"' cat "$folder/instances.json"

step "The processor makes the names, the chains and the sets of it; instances-apply hands them over"
on $host "$top/examples/systemd/instances-apply" "$folder/settings" 2>"$folder/summary"
expect '3 instances, 12 host addresses, 12 set elements' cat "$folder/summary"
expect '10:66:6a:4c:a1:12.*"db"' on $host nft list set bridge instances instances_ip
until_true sh -c "ip netns exec $web dig +short @10.83.0.1 db.instance.internal | grep -q ."

step "Each client's names, in all their subdomains, asked from the other"
for pair in "$web db" "$db web"; do
    client=${pair% *} name=${pair#* }
    for query in "A instance v4" "AAAA instance g6" "AAAA instance u6" "A v4.instance v4" "AAAA v6.instance g6" \
        "AAAA v6.instance u6" "AAAA g6.instance g6" "AAAA u6.instance u6" "AAAA l6.instance l6"; do
        # shellcheck disable=SC2086 # the three words
        set -- $query
        expect "$(address "$name" "$3")" on "$client" dig +noall +answer @10.83.0.1 "$name.$2.internal" "$1"
    done
done

step "The clients reach each other over IPv4 and IPv6, link-local too"
for address in "$(address db v4)" "$(address db g6)" "$(address db u6)" "$(address db l6)%eth0"; do
    until_true on $web ping -n -c 1 -W 1 "$address"
    expect ' 0% packet loss' on $web ping -n -c 1 -W 1 "$address"
done

step "web takes db's addresses, and answers ARP requests and neighbour solicitations for them"
on $web ip address add "$(address db v4)/24" dev eth0
on $web ip address add "$(address db g6)/80" dev eth0 nodad
on $host ip neighbour flush dev br0
expect ' 0% packet loss' on $host ping -n -c 1 -W 2 "$(address db v4)"
expect ' 0% packet loss' on $host ping -n -c 1 -W 2 "$(address db g6)"

step "The answers were dropped and counted: the host still knows db by its own MAC address"
for chain in instances_drop_arp instances_drop_ndp; do
    until_true sh -c "ip netns exec $host nft list chain bridge instances $chain | grep -q 'packets [1-9].*drop'"
    expect 'packets [1-9].*drop' on $host nft list chain bridge instances $chain
done
expect "$(address db v4) .*10:66:6a:4c:a1:12" on $host ip neighbour show "$(address db v4)" dev br0
expect "$(address db g6) .*10:66:6a:4c:a1:12" on $host ip neighbour show "$(address db g6)" dev br0

step "The administrator renames db to store and removes web: the names follow"
address=$(address db v4)
expect 'store: renamed' on $host instances-update.py --rename 10:66:6a:4c:a1:12 store
expect 'web: removed' on $host instances-update.py --remove 10:66:6a:4c:a1:11
on $host "$top/examples/systemd/instances-apply" "$folder/settings" 2>"$folder/summary"
expect '2 instances' cat "$folder/summary"
until_true sh -c "ip netns exec $db dig +short @10.83.0.1 store.v4.instance.internal | grep -q ."
expect "$address" on $db dig +noall +answer @10.83.0.1 store.v4.instance.internal
for name in db web; do
    expect 'status: NXDOMAIN' on $db dig +noall +comments @10.83.0.1 "$name.v4.instance.internal"
done

step "Without a further change, the processor has nothing to do and says so by its exit status"
expect '^10$' sh -c 'instances-process.py; echo $?'
