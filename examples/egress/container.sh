#!/bin/sh
# usage: container.sh start PID UPSTREAM | stop PID
# Lets one container, by the process ID of its first process, connect only to what egress.sh allows. Its DNS queries are
# redirected to a dnsmasq in its network namespace, which asks the resolver at the address UPSTREAM. Nothing of its files
# is read, run or changed, so there is nothing to undo in them; and when it ends, so does the dnsmasq.
set -eu

usage() { sed -n '2s/^# //p' "$0" >&2; exit 2; }
say() { echo "container.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

case "${1-}:$#" in start:3 | stop:2) ;; *) usage ;; esac
case $2 in '' | *[!0-9]*) usage ;; esac
case ${3-0.0.0.0} in
*[!0-9a-fA-F.:]*) usage ;;
*:*) family=ip6 ;;
*[!0-9.]*) usage ;;
*.*.*.*) family=ip ;;
*) usage ;;
esac
pid=$2
run=${EGRESS_RUN:-/run}
export PATH="$PATH:/usr/sbin:/sbin"

net=$(readlink "/proc/$pid/ns/net") || fail "$pid: no such process, or none that we may look into"
for own in 1 self; do
    [ "$net" != "$(readlink "/proc/$own/ns/net")" ] || fail "$pid: has the host's network, not one of its own"
done
file=$run/egress.$(echo "$net" | tr -cd 0-9).pid # by the namespace: no other has its number while our dnsmasq is in it

enter() { nsenter --net="/proc/$pid/ns/net" "$@"; }

# running: whether the process of the pid file is the dnsmasq that we started; sets dnsmasq
running() {
    dnsmasq=$(cat "$file" 2>/dev/null) && grep -qzxF -- "--pid-file=$file" "/proc/$dnsmasq/cmdline" 2>/dev/null
}

end() {
    if running; then
        kill "$dnsmasq"
        while grep -qs '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$dnsmasq/status"; do sleep 0.1; done # its port is free
    fi
    rm -f "$file"
}

start() {
    config=$("$(dirname "$0")/egress.sh" config)
    if running; then fail "$pid: runs already, stop it first"; fi
    trap 'exit 1' HUP INT TERM
    trap end EXIT
    printf '%s\n' "$config" | enter dnsmasq --conf-file=- "--pid-file=$file" --user=nobody --interface=lo --port=10053 \
        --bind-interfaces --no-resolv --no-hosts "--server=$1" || fail "$pid: nothing is changed"
    running || fail "$pid: nothing is changed, dnsmasq has ended"
    enter nft -f - <<END || fail "$pid: nothing is changed"
        table inet egress
        delete table inet egress
        table inet egress {
            set allow_v4 {
                type ipv4_addr
                flags timeout
                timeout 10m
            }
            set allow_v6 {
                type ipv6_addr
                flags timeout
                timeout 10m
            }
            set denied {
                type ipv4_addr
                flags timeout
                timeout 10m
            }
            # Before the redirection that the container's manager may have for its own resolver
            chain names {
                type nat hook output priority -101; policy accept;
                meta l4proto { 6, 17 } th dport 53 meta skuid 65534 $family daddr $1 accept
                meta l4proto { 6, 17 } th dport 53 redirect to :10053
            }
            chain output {
                type filter hook output priority 0; policy drop;
                oifname "lo" accept
                ip daddr 127.0.0.0/8 accept
                ip6 daddr ::1 accept
                ct state established,related accept
                icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept
                icmpv6 type { mld-listener-report, mld2-listener-report } accept
                # So that it keeps its own leases
                ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
                ip6 daddr ff02::1:2 udp sport 546 udp dport 547 accept
                meta skuid 65534 meta l4proto { 6, 17 } th dport 53 $family daddr $1 accept
                meta l4proto { 6, 17 } th dport { 53, 853 } counter drop
                ip daddr @allow_v4 accept
                ip6 daddr @allow_v6 accept
                counter drop
            }
        }
END
    trap - EXIT
    (exec </dev/null >/dev/null 2>&1 9>&-; follow) &
    say "$pid: started"
}

# follow: our dnsmasq would keep the network of a container that has ended
follow() {
    trap '' HUP
    while [ -d "/proc/$pid" ]; do
        kill -0 "$dnsmasq" 2>/dev/null || exit 0
        sleep 1
    done
    end
}

stop() {
    if enter nft delete table inet egress 2>/dev/null; then say "$pid: stopped"; else say "$pid: did not run"; fi
    end
}

exec 9>"$run/egress.lock"
flock -w 60 9 || fail "another container.sh is at work (it has the lock $run/egress.lock)"
if [ "$1" = start ]; then start "$3"; else stop; fi
