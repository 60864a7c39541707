#!/bin/sh
# usage: binding.sh add FILE | remove FILE | list
# Binds a guest to its device, as a binding file of nfdhcpd says: lines INDEV=, MAC=, IP=, and if wanted HOSTNAME=,
# GATEWAY6=, SUBNET6=, EUI64= and MTU=, with or without quotes; others are ignored. add makes the lease, the routes to
# the guest, proxy ARP and neighbour proxying, and the device as a TAP if there is none; remove undoes that.
set -eu

usage() { sed -n '2s/^# //p' "$0" >&2; exit 2; }
fail() { echo "binding.sh: $*" >&2; exit 1; }

export PATH="$PATH:/usr/sbin:/sbin"
state=${ROUTED_STATE:-/var/lib/misc/routed}
pid_file=${ROUTED_PID:-/run/dnsmasq.gw0.pid}
case "${1-}:$#" in
add:2 | remove:2) ;;
list:1)
    for file in "$state"/bindings/*; do [ ! -e "$file" ] || echo "${file##*/} $(tr '\n' ' ' <"$file")"; done
    exit 0
    ;;
*) usage ;;
esac
file=$2
if [ ! -f "$file" ] || [ ! -r "$file" ]; then fail "$file: no such file, or not readable"; fi

# value KEY PATTERN: the key's value, "" if it has none; fails unless it matches the extended regular expression as a whole
value() {
    text=$(sed -n "s/^[[:space:]]*$1=//p" "$file" | tail -n 1 | sed "s/[[:space:]]*\$//; s/^\"\\(.*\\)\"\$/\\1/; s/^'\\(.*\\)'\$/\\1/")
    [ -z "$text" ] || printf '%s\n' "$text" | grep -Eqx -- "$2" || fail "$file: $1=$text is not valid"
    printf '%s' "$text"
}
octet='(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])'
device=$(value INDEV 'tap[A-Za-z0-9_.-]{1,12}')
mac=$(value MAC '([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}')
mac=$(echo "$mac" | tr A-F a-f)
address=$(value IP "$octet(\\.$octet){3}")
name=$(value HOSTNAME '[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?')
gateway6=$(value GATEWAY6 '[0-9a-fA-F:]+')
subnet6=$(value SUBNET6 '[0-9a-fA-F:]+::/64')
address6=$(value EUI64 '[0-9a-fA-F:]+')
mtu=$(value MTU '(12[89][0-9]|1[3-9][0-9]{2}|[2-9][0-9]{3})')
for pair in "INDEV=$device" "MAC=$mac" "IP=$address"; do
    [ -n "${pair#*=}" ] || fail "$file: ${pair%=*} is missing"
done
if [ -z "$address6" ] && [ -n "$subnet6" ]; then # the address that the guest makes: modified EUI-64
    address6=${subnet6%::/64}
    while [ "$(echo "$address6" | tr -cd : | wc -c)" -lt 3 ]; do address6=$address6:0; done
    address6=$address6:$(echo "$mac" | { IFS=: read -r a b c d e f; echo "$(printf %x $((0x$a ^ 2)))$b:${c}ff:fe$d:$e$f"; })
fi

# undo: take away all that add makes, whatever of it is there
undo() {
    rm -f "$state/hosts/$device" "$state/options/$device"
    ip route delete "$address/32" dev "$device" 2>/dev/null || true
    nft delete element inet routed bound "{ \"$device\" }" 2>/dev/null || true
    nft delete element inet routed bindings4 "{ \"$device\" . $mac . $address }" 2>/dev/null || true
    [ -z "$gateway6" ] || ip -6 neighbour delete proxy "$gateway6" dev "$device" 2>/dev/null || true
    if [ -n "$address6" ]; then
        ip -6 route delete "$address6/128" dev "$device" 2>/dev/null || true
        nft delete element inet routed bindings6 "{ \"$device\" . $mac . $address6 }" 2>/dev/null || true
    fi
    if grep -qs '^MADE=yes$' "$state/bindings/$device"; then
        ip link delete "$device" 2>/dev/null || true
    elif [ -e "/sys/class/net/$device" ]; then
        echo 0 >"/proc/sys/net/ipv4/conf/$device/proxy_arp"
        echo 0 >"/proc/sys/net/ipv6/conf/$device/proxy_ndp"
    fi
    rm -f "$state/bindings/$device"
}

if [ "$1" = remove ]; then
    [ -e "$state/bindings/$device" ] || fail "$file: $device has no binding"
    undo
    # dnsmasq forgets a lease's file only when it reads all of them again
    pid=$(cat "$pid_file" 2>/dev/null || true)
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dnsmasq ]; then kill -HUP "$pid"; fi
    echo "binding.sh: $device: removed"
    exit 0
fi

[ ! -e "$state/bindings/$device" ] || fail "$file: $device has a binding already: remove it first"
if grep -qsE "^(MAC=$mac|IP=$address)\$" "$state"/bindings/*; then fail "$file: $mac or $address is bound to another device"; fi
mkdir -p "$state/hosts" "$state/options" "$state/bindings"
trap undo EXIT # a failure leaves nothing half done
printf 'INDEV=%s\nMAC=%s\nIP=%s\n' "$device" "$mac" "$address" >"$state/bindings/$device"
if [ ! -e "/sys/class/net/$device" ]; then
    ip tuntap add dev "$device" mode tap
    echo MADE=yes >>"$state/bindings/$device"
fi
ip link set "$device" up ${mtu:+mtu "$mtu"}
echo 1 >"/proc/sys/net/ipv4/conf/$device/proxy_arp"
echo 1 >"/proc/sys/net/ipv6/conf/$device/proxy_ndp"
nft add element inet routed bound "{ \"$device\" }"
nft add element inet routed bindings4 "{ \"$device\" . $mac . $address }"
ip route replace "$address/32" dev "$device"
[ -z "$gateway6" ] || ip -6 neighbour replace proxy "$gateway6" dev "$device"
if [ -n "$address6" ]; then
    nft add element inet routed bindings6 "{ \"$device\" . $mac . $address6 }"
    ip -6 route replace "$address6/128" dev "$device"
fi
[ -z "$mtu" ] || echo "tag:$device,option:mtu,$mtu" >"$state/options/$device"
echo "$mac,set:$device,$address${name:+,$name}" >"$state/hosts/$device" # last, for it makes the lease
trap - EXIT
echo "binding.sh: $device: $mac has $address${address6:+ and $address6}"
