#!/bin/sh
# usage: incus list --all-projects --format json | reconcile.sh [--apply [--force]]
# Brings the registry in line with Incus: names are Incus's, and of the MAC addresses with Incus's prefix those that no
# instance has any more are removed. Shows what it would do; with --apply, gives the names; with --force, removes, too.
# (What is missing from a list may only be missing from that list: of one project, say, or an empty one.)
#
# An instance's first interface has its name, further ones NAME-INTERFACE; instances of projects other than "default"
# are called NAME-PROJECT. Left as they are, and told: a name that two interfaces would have, one that belongs to the
# host or to a guest that is not Incus's, and one that is no name in DNS.
# Settings, such as INSTANCES_BASE_PATH, are in /etc/default/instances.
set -eu

fail() { echo "reconcile.sh: $*" >&2; exit 1; }

apply=false force=false
case "$#:$*" in
0:) ;;
1:--apply) apply=true ;;
2:'--apply --force') apply=true force=true ;;
*) sed -n '2s/^# //p' "$0" >&2; exit 2 ;;
esac
settings=${INSTANCES_SETTINGS:-/etc/default/instances}
set -a
# shellcheck disable=SC1090 # the administrator's file
[ ! -e "$settings" ] || . "$settings"
set +a
export PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin"
registry=${INSTANCES_BASE_PATH:-/var/lib/misc/instances}${INSTANCES_BASE_ID:+-$INSTANCES_BASE_ID}.json
for program in jq instances-update.py; do
    command -v "$program" >/dev/null || fail "no program $program; install it first"
done
jq -es 'length == 1 and (.[0] | type == "object" and all(.[]; type == "object"))' "$registry" >/dev/null 2>&1 ||
    fail "$registry: not there, or no registry"
links=$(ip -json link show) # the host's own interfaces may have Incus's prefix, too

# A MAC address that was set (hwaddr) counts, else the one that Incus made (volatile).
plan=$(jq -rs --slurpfile registry "$registry" --argjson links "$links" '
    def is_name: test("\\A[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\\z");
    def is_mac: test("\\A([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}\\z");
    if length == 1 and (.[0] | type) == "array" then .[0] else error("not one list") end
    | [.[]
        | (.name + if (.project // "default") == "default" then "" else "-" + .project end) as $name
        | ((.config // {} | with_entries(select(.key | test("^volatile\\.[^.]+\\.hwaddr$")) | .key |= split(".")[1]))
            + ((.devices // {}) + (.expanded_devices // {})
                | with_entries(select(.value.hwaddr // "" | is_mac) | .value |= .hwaddr)))
        | to_entries | sort_by(.key) | to_entries[]
        | {mac: (.value.value | ascii_downcase), name: ($name + if .key == 0 then "" else "-" + .value.key end)}]
    | map(.mac) as $macs
    | ($links | map(.address // "")) as $own
    | (group_by(.name | ascii_downcase) | map(select(length > 1) | .[].name)) as $twice
    | $registry[0] as $known
    | [$known | keys[] | select(startswith("10:66:6a:")) | select(IN($macs[], $own[]) | not)] as $gone
    | [$known | to_entries[] | select(.key | IN($macs[], $gone[]) | not) | .value.name // ""] as $others
    | (.[] | select(.mac | IN($own[]) | not)
        | if .name | is_name | not then "left \(.mac) \(.name) is no name in DNS"
          elif .name | IN($twice[]) then "left \(.mac) \(.name) would be the name of two"
          elif .name | ascii_downcase | IN($others[] | ascii_downcase) then "left \(.mac) \(.name) is the name of another"
          elif $known[.mac] and $known[.mac].name != .name then "--rename \(.mac) \(.name)"
          else empty end),
      ($gone[] | "--remove \(.)")
' 2>/dev/null) || fail "what came is not the list of incus list --all-projects --format json"
[ -n "$plan" ] || exit 0
gone=$(printf '%s\n' "$plan" | grep -c '^--remove') || true
printf '%s\n' "$plan" | {
    status=0
    while read -r action mac name; do
        if [ "$action" = left ]; then
            echo "reconcile.sh: $mac is left as it is: $name" >&2
        elif ! $apply; then
            echo "instances-update.py $action $mac${name:+ $name}"
        elif [ "$action" = --rename ] || $force; then
            # shellcheck disable=SC2086 # without a name for --remove
            instances-update.py "$action" "$mac" $name || status=1
        fi
    done
    if [ "$gone" -gt 0 ] && ! $force; then
        echo "reconcile.sh: in the registry and not in the list: $gone; removed with --apply --force only" >&2
        ! $apply || status=1
    fi
    exit $status
}
