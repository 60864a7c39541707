#!/bin/sh
# usage: egress.sh allow DOMAIN | deny DOMAIN | list | apply | start PID UPSTREAM | stop PID
# Lets instances connect only to what dnsmasq resolved for domains that are allowed: (profile + live) - denied, three
# files in /etc/egress with a domain a line. allow and deny change the last two, which so survive a restart.
# apply: writes dnsmasq's configuration and restarts it. start, stop: the same for one container by itself, with a
# dnsmasq in the network namespace of its process PID that asks the resolver UPSTREAM.
set -eu

usage() { sed -n '2s/^# //p' "$0" >&2; exit 2; }
say() { echo "egress.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

lists=${EGRESS_LISTS:-/etc/egress}
run=${EGRESS_RUN:-/run}
config=${EGRESS_CONFIG:-/etc/dnsmasq.d/egress.conf}
restart=${EGRESS_RESTART:-systemctl restart dnsmasq}
export PATH="$PATH:/usr/sbin:/sbin"

# clean: domains on standard input, lower-case, without *. in front; what is none is left out with a warning
clean() {
    while read -r line; do
        domain=$(printf '%s' "$line" | tr '[:upper:]' '[:lower:]' | sed 's/^\*\.//; s/\.$//')
        case $domain in '' | '#'*) continue ;; esac
        if [ ${#domain} -le 253 ] &&
            printf '%s\n' "$domain" | grep -Eqx '([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?'; then
            echo "$domain"
        else
            say "$line is left out: no domain"
        fi
    done
}
file() { if [ -e "$lists/$1" ]; then clean <"$lists/$1"; fi; }

# put LIST DOMAIN, take LIST DOMAIN: change a list, as a whole
put() { { file "$1"; echo "$2"; } | sort -u >"$lists/$1.new" && mv "$lists/$1.new" "$lists/$1"; }
take() { file "$1" | { grep -vxF -- "$2" || true; } >"$lists/$1.new" && mv "$lists/$1.new" "$lists/$1"; }

merged() {
    file denied >"$lists/.denied"
    { file profile; file live; } | sort -u | { grep -vxFf "$lists/.denied" || true; }
    rm -f "$lists/.denied"
}

nftsets() { merged | sed 's,.*,nftset=/&/4#inet#egress#allow_v4\,6#inet#egress#allow_v6,'; }

need_nftset() {
    dnsmasq --version | grep -Eq '(^| )nftset( |$)' || fail "this dnsmasq has no nftset: nothing is changed"
}

apply() {
    need_nftset
    nftsets >"$config.new"
    if ! dnsmasq --test --conf-file="$config.new" 2>"$lists/.test"; then
        say "the old configuration stays: $(tail -n 1 "$lists/.test")"
        rm -f "$config.new" "$lists/.test"
        exit 1
    fi
    rm -f "$lists/.test"
    mv "$config.new" "$config"
    $restart
}

# running PID: whether the process of the pid file is the dnsmasq that we started for the container; sets dnsmasq_pid
running() {
    dnsmasq_pid=$(cat "$run/egress.$1.pid" 2>/dev/null) && [ -n "$dnsmasq_pid" ] &&
        tr '\0' '\n' <"/proc/$dnsmasq_pid/cmdline" 2>/dev/null | grep -qxF -- "--pid-file=$run/egress.$1.pid"
}

start() {
    need_nftset
    [ -d "/proc/$1" ] || fail "$1: no such process"
    [ "$(readlink "/proc/$1/ns/net")" != "$(readlink /proc/self/ns/net)" ] || fail "$1: has no network namespace of its own"
    if running "$1"; then fail "$1: runs already"; fi
    rm -f "$run/egress.$1.pid"
    case $2 in *:*) family=ip6 ;; *) family=ip ;; esac
    nsenter -t "$1" -n nft -f - <<END
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
            chain output {
                type filter hook output priority 0; policy drop;
                oifname "lo" accept
                ct state established,related accept
                icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept
                meta skuid 65534 meta l4proto { 6, 17 } th dport 53 $family daddr $2 accept
                meta l4proto { 6, 17 } th dport { 53, 853 } counter drop
                ip daddr @allow_v4 accept
                ip6 daddr @allow_v6 accept
                counter drop
            }
        }
END
    nftsets >"$run/egress.$1.conf"
    nsenter -t "$1" -n dnsmasq "--conf-file=$run/egress.$1.conf" "--pid-file=$run/egress.$1.pid" --user=nobody \
        --listen-address=127.0.0.1 --bind-interfaces --no-resolv --no-hosts "--server=$2"
    nsenter -t "$1" -m sh -c 'cp /etc/resolv.conf /etc/resolv.conf.egress && echo "nameserver 127.0.0.1" >/etc/resolv.conf'
    say "$1: started"
}

stop() {
    if running "$1"; then
        kill "$dnsmasq_pid"
        while running "$1"; do sleep 0.1; done
        say "$1: stopped"
    else
        say "$1: did not run"
    fi
    rm -f "$run/egress.$1.pid" "$run/egress.$1.conf"
    if [ -d "/proc/$1" ]; then
        nsenter -t "$1" -n sh -c 'nft delete table inet egress 2>/dev/null || true'
        nsenter -t "$1" -m sh -c '[ ! -e /etc/resolv.conf.egress ] || { cat /etc/resolv.conf.egress >/etc/resolv.conf; rm /etc/resolv.conf.egress; }'
    fi
}

mkdir -p "$lists"
case "${1-}:$#" in
allow:2 | deny:2)
    domain=$(printf '%s\n' "$2" | clean)
    [ -n "$domain" ] || exit 1
    if [ "$1" = allow ]; then
        put live "$domain"
        take denied "$domain"
    else
        put denied "$domain"
        take live "$domain"
    fi
    ;;
list:1) merged ;;
apply:1) apply ;;
start:3 | stop:2)
    case $2 in '' | *[!0-9]*) usage ;; esac
    "$@"
    ;;
*) usage ;;
esac
