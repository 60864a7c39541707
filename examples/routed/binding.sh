#!/bin/sh
# usage: binding.sh add FILE | remove FILE|DEVICE | restore [DEVICE] | list
# Binds a guest to its device, as a binding file of nfdhcpd says: lines INDEV=, MAC=, IP= or SUBNET6= or both, and if
# wanted HOSTNAME=, GATEWAY6=, EUI64= and MTU=, with or without quotes; others are ignored. add makes the lease, the
# gateway's address on the device, the routes to the guest, proxy ARP, and a device tap* if there is none. What it makes
# is in a record: remove undoes that, and restore makes it again, for a boot or a device that has come back.
set -eu
umask 022

usage() { sed -n '2s/^# //p' "$0" >&2; exit 2; }
say() { echo "binding.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

export PATH="$PATH:/usr/sbin:/sbin"
state=${ROUTED_STATE:-/var/lib/misc/routed}
pid_file=${ROUTED_PID:-/run/dnsmasq.gw0.pid}
case "${1-}:$#" in add:2 | remove:2 | restore:1 | restore:2 | list:1) ;; *) usage ;; esac
for program in ip nft flock python3 dhcp_release; do
    command -v "$program" >/dev/null || fail "$program is missing"
done
mkdir -p "$state/hosts" "$state/options" "$state/bindings"

# put FILE TEXT: at once, and only if it is not so already, for dnsmasq watches
put() {
    if [ "$(cat "$1" 2>/dev/null)" != "$2" ]; then
        printf '%s\n' "$2" >"$state/new"
        mv "$state/new" "$1"
    fi
}

device='' mac='' ip='' gateway='' ip6='' gateway6='' name='' mtu='' file='' made='' was='' # what a record has
# load WHICH: read the record of a device, or of the file that it was made from
load() {
    path=$(realpath -m -- "$1")
    for record in "$state"/bindings/*; do
        [ -e "$record" ] || break
        # shellcheck source=/dev/null
        . "$record"
        if [ "$device" = "$1" ] || [ "$file" = "$path" ]; then return 0; fi
    done
    fail "$1 has no binding"
}

# guarded: fail unless the rules are loaded and hold for the device
guarded() {
    nft get element inet routed guests "{ \"$device\" }" >/dev/null 2>&1 ||
        fail "$device is not in the set guests of routed.nft, or that is not loaded (nft -f routed.nft)"
}

# elements ACTION: add or delete the elements of the rules' sets; a failure ends it, unless its caller says || true
elements() {
    one="\"$device\" . $mac"
    octets=$(echo "$mac" | tr -d :)
    tables="bound { $one }"
    [ -z "$ip" ] || tables="$tables;bindings4 { $one . $ip };clients { $one . 0x${octets%??????} . 0x${octets#??????} }"
    [ -z "$ip6" ] || tables="$tables;bindings6 { $one . $ip6 }"
    echo "$tables" | tr ';' '\n' | while read -r element; do nft "$1" element inet routed "$element"; done
}

# make: all that the record says, as often as wanted
make() {
    elements add
    if [ -n "$made" ] && [ ! -e "/sys/class/net/$device" ]; then ip tuntap add dev "$device" mode tap; fi
    if [ -e "/sys/class/net/$device" ]; then
        ip link set "$device" up ${mtu:+mtu "$mtu"}
        if [ -n "$ip" ]; then
            echo 1 >"/proc/sys/net/ipv4/conf/$device/proxy_arp"
            ip address replace "$gateway/32" dev "$device"
            ip route replace "$ip/32" dev "$device"
        fi
        if [ -n "$ip6" ]; then
            ip address replace "$gateway6" dev "$device" nodad noprefixroute
            ip -6 route replace "$ip6/128" dev "$device"
        fi
    else
        say "$device: not there yet; when it is: binding.sh restore $device"
    fi
    [ -z "$mtu" ] || put "$state/options/$device" "tag:$device,option:mtu,$mtu"
    [ -z "$ip" ] || put "$state/hosts/$device" "$mac,$ip${name:+,$name}" # last, for it makes the lease
}

# undo: take away all that make makes, whatever of it is there
undo() {
    elements delete 2>/dev/null || true
    rm -f "$state/hosts/$device" "$state/options/$device"
    if [ -n "$made" ]; then
        ip link delete "$device" 2>/dev/null || true
    elif [ -e "/sys/class/net/$device" ]; then
        ip address delete "$gateway/32" dev "$device" 2>/dev/null || true
        ip address delete "$gateway6" dev "$device" 2>/dev/null || true
        ip route delete "$ip/32" dev "$device" 2>/dev/null || true
        ip -6 route delete "$ip6/128" dev "$device" 2>/dev/null || true
        ip link set "$device" mtu "${was% *}" || true
        echo "${was#* }" >"/proc/sys/net/ipv4/conf/$device/proxy_arp" || true
    fi
    # dnsmasq forgets a lease's file only when it reads all of them again, and a lease when it is released
    pid=$(cat "$pid_file" 2>/dev/null || true)
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = dnsmasq ]; then
        kill -HUP "$pid"
        [ -z "$ip" ] || dhcp_release gw0 "$ip" "$mac" || say "$device: the lease of $ip stays until it expires"
    elif [ -n "$ip" ] && [ -e "$state/leases" ]; then
        sed -i "/ $mac $ip /d" "$state/leases"
    fi
    rm -f "$state/bindings/$device"
}

if [ "$1:$#" = restore:1 ]; then # each by itself, so that one that fails is no other's trouble
    status=0
    for record in "$state"/bindings/*; do
        if [ -e "$record" ]; then sh "$0" restore "${record##*/}" || status=1; fi
    done
    exit "$status"
fi

exec 9>"$state/lock"
flock 9 # one at a time
case $1 in
add)
    new=$(ip -json address show | python3 "$(dirname "$(realpath "$0")")/binding-record.py" "$2" "$state/bindings")
    eval "$new"
    guarded
    if [ -e "/sys/class/net/$device/master" ]; then fail "$2: $device is in a bridge: the rules don't hold there"; fi
    if [ -e "/sys/class/net/$device" ]; then
        was="$(cat "/sys/class/net/$device/mtu") $(cat "/proc/sys/net/ipv4/conf/$device/proxy_arp")"
    else
        case $device in tap*) made=yes ;; *) fail "$2: $device: no such device" ;; esac
    fi
    put "$state/bindings/$device" "$new
made=$made was='$was'"
    trap undo EXIT # a failure leaves nothing half done
    make
    trap - EXIT
    say "$device: $mac has${ip:+ $ip}${ip6:+ $ip6}"
    ;;
remove)
    load "$2"
    undo
    say "$device: removed"
    ;;
restore)
    load "$2"
    guarded
    make
    say "$device: restored"
    ;;
list)
    for record in "$state"/bindings/*; do
        [ -e "$record" ] || break
        # shellcheck source=/dev/null
        . "$record"
        echo "$device $mac ${ip:--} ${ip6:--} ${name:--} $file"
    done
    ;;
esac
