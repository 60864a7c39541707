#!/bin/sh
# usage: egress.sh allow DOMAIN | deny DOMAIN | list | config | apply
# Lets instances connect only to what dnsmasq resolved for domains that are allowed: (profile + live) - denied, three
# files in /etc/egress with a domain a line. allow and deny change the last two, which so survive a restart. A domain
# covers those below it, and where one of two is below the other, the longer one decides.
# list: what holds, with a hyphen before what is denied below an allowed domain. config: the same for dnsmasq.
# apply: writes that to dnsmasq's configuration and restarts dnsmasq.
set -eu

usage() { sed -n '2s/^# //p' "$0" >&2; exit 2; }
say() { echo "egress.sh: $*" >&2; }
fail() { say "$*"; exit 1; }

lists=${EGRESS_LISTS:-/etc/egress}
file=${EGRESS_CONFIG:-/etc/dnsmasq.d/egress.conf}
restart=${EGRESS_RESTART:-systemctl restart dnsmasq}
export PATH="$PATH:/usr/sbin:/sbin" LC_ALL=C

# clean [FILE...]: the domains, in lower case, without comments, the line ends of other systems and *. in front; what is
# none is told, such as an address or a top-level domain
clean() {
    awk '{
        sub(/^\357\273\277/, ""); sub(/#.*/, ""); gsub(/^[ \t\r]+|[ \t\r]+$/, "")
        domain = tolower($0); sub(/^\*\./, "", domain); sub(/\.$/, "", domain)
        if (domain == "") next
        count = split(domain, labels, "."); valid = count > 1 && length(domain) <= 253 && labels[count] ~ /^[a-z]/
        for (i = 1; i <= count; i++)
            if (labels[i] !~ /^[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?$/ || length(labels[i]) > 63) valid = 0
        if (valid) print domain; else print "egress.sh: " $0 " is left out: no domain" >"/dev/stderr"
    }' "$@"
}

# domains LIST...: those of the lists that exist
domains() {
    for list; do
        shift
        [ ! -e "$lists/$list" ] || set -- "$@" "$lists/$list"
    done
    clean "$@" </dev/null
}

# put LIST DOMAIN, take LIST DOMAIN: change a list, as a whole
put() {
    others=$(domains "$1")
    printf '%s\n' "$others" "$2" | sort -u >"$lists/.$1.new"
    mv "$lists/.$1.new" "$lists/$1"
}
take() {
    others=$(domains "$1")
    printf '%s\n' "$others" | { grep -vxF -- "$2" || true; } >"$lists/.$1.new"
    mv "$lists/.$1.new" "$lists/$1"
}

list() {
    allowed=$(domains profile live)
    denied=$(domains denied)
    printf '%s\n' "$allowed" "" "$denied" | awk '
        $0 == "" { below = NR > 1 || below; next }
        !below { allowed[$0]; next }
        { denied[$0] }
        END {
            for (domain in allowed) if (!(domain in denied)) print domain
            for (domain in denied)
                for (rest = domain; sub(/^[^.]*\./, "", rest) && !(rest in denied);)
                    if (rest in allowed) { print "-" domain; break }
        }' | sort
}

# dnsmasq keeps no cache, since it fills the sets only when it has asked; and clients keep an answer for a second only,
# should somebody have flushed the sets. An element that is there keeps its old timeout when it is added again, so it is
# added, deleted and added: dnsmasq gives nft what follows the family with spaces for #, and nft takes ; for a new line.
# What is denied below an allowed domain goes into a set that no rule names.
config() {
    dnsmasq --version | grep -Eq '(^| )nftset( |$)' || fail "this dnsmasq has no nftset: nothing is changed"
    rules=$(list)
    printf '%s\n' cache-size=0 max-ttl=1
    printf '%s\n' "$rules" | awk '
        function fill(family, set) {
            return family "#" set "," family "#inet#egress#denied#{#0.0.0.0#}#;#delete#element#" set "," family "#" set
        }
        sub(/^-/, "") { print "nftset=/" $0 "/4#inet#egress#denied"; next }
        /./ { print "nftset=/" $0 "/" fill(4, "inet#egress#allow_v4") "," fill(6, "inet#egress#allow_v6") }'
}

# dnsmasq reads all files of its folder but those with a dot in front
apply() {
    new=$(dirname "$file")/.egress.new
    old=$(dirname "$file")/.egress.old
    text=$(config)
    printf '%s\n' "$text" >"$new"
    if ! problem=$(dnsmasq --test --conf-file="$new" 2>&1); then
        rm -f "$new"
        fail "the old configuration stays: $(printf '%s\n' "$problem" | tail -n 1)"
    fi
    rm -f "$old"
    [ ! -e "$file" ] || cp -p "$file" "$old"
    mv "$new" "$file"
    if ! $restart; then
        if [ -e "$old" ]; then mv "$old" "$file"; else rm -f "$file"; fi
        $restart || fail "dnsmasq does not start, with the old configuration neither"
        fail "dnsmasq does not start with the new configuration: the old one is back"
    fi
    rm -f "$old"
    say "dnsmasq is restarted, with $(grep -c ^nftset "$file" || true) domains"
}

lock() {
    mkdir -p "$lists"
    exec 9>"$lists/.lock"
    flock -w 60 9 || fail "another egress.sh is at work (it has the lock $lists/.lock)"
}

case "${1-}:$#" in
allow:2 | deny:2)
    domain=$(printf '%s\n' "$2" | clean)
    [ -n "$domain" ] || fail "nothing is changed: give one domain, as example.org"
    lock
    if [ "$1" = allow ]; then
        put live "$domain"
        take denied "$domain"
        say "$domain is allowed from the next apply on"
    else
        put denied "$domain"
        take live "$domain"
        say "$domain is denied from the next apply on"
        list 2>/dev/null | awk -v below=".$domain" '
            !/^-/ && substr("." $0, length($0) - length(below) + 2) == below {
                print "egress.sh: " $0 " stays allowed" >"/dev/stderr"
            }'
    fi
    ;;
list:1) list ;;
config:1) config ;;
apply:1)
    lock
    apply
    ;;
*) usage ;;
esac
