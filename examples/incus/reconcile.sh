#!/bin/sh
# usage: incus list --all-projects --format json | reconcile.sh [--apply]
# Brings the registry in line with Incus: names are Incus's, and of the MAC addresses with Incus's prefix those that no
# instance has any more are removed. Shows what it would do; with --apply, does it.
#
# An instance's first interface has its name, further ones NAME-INTERFACE; instances of projects other than "default"
# are called NAME-PROJECT. A name that two interfaces would have is given to neither.
set -eu

case "$#:${1-}" in
0:) apply=false ;;
1:--apply) apply=true ;;
*) echo "usage: incus list --all-projects --format json | reconcile.sh [--apply]" >&2; exit 2 ;;
esac
registry=${INSTANCES_BASE_PATH:-/var/lib/misc/instances}${INSTANCES_BASE_ID:+-$INSTANCES_BASE_ID}.json
links=$(ip -json link show) # the host's own interfaces may have Incus's prefix, too

plan=$(jq -r --slurpfile registry "$registry" --argjson links "$links" '
    if type != "array" then error("not a list of instances") else . end
    | [.[]
        | (.name + if (.project // "default") == "default" then "" else "-" + .project end) as $name
        | [(.config // {} | to_entries[] | select(.key | test("^volatile\\.[^.]+\\.hwaddr$"))
                | {nic: (.key | split(".")[1]), mac: .value}),
           (.expanded_devices // {} | to_entries[] | select(.value.hwaddr?) | {nic: .key, mac: .value.hwaddr})]
        | unique_by(.nic) | to_entries[]
        | {mac: (.value.mac | ascii_downcase), name: ($name + if .key == 0 then "" else "-" + .value.nic end)}]
    | (map(.mac) + ($links | map(.address // ""))) as $present
    | (group_by(.name | ascii_downcase) | map(select(length > 1) | .[].name)) as $twice
    | $registry[0] as $known
    | (.[] | select(.name | IN($twice[])) | "twice \(.mac) \(.name)"),
      ($known | keys[] | select(startswith("10:66:6a:")) | select(IN($present[]) | not) | "--remove \(.)"),
      (.[] | select((.name | IN($twice[]) | not) and $known[.mac] and $known[.mac].name != .name)
           | "--rename \(.mac) \(.name)")
')
[ -n "$plan" ] || exit 0
printf '%s\n' "$plan" | {
    status=0
    while read -r action mac name; do
        if [ "$action" = twice ]; then
            echo "reconcile.sh: $mac is left as it is: $name would be the name of another, too" >&2
        elif $apply; then
            # shellcheck disable=SC2086 # without a name for --remove
            instances-update.py "$action" "$mac" $name || status=1
        else
            echo "instances-update.py $action $mac${name:+ $name}"
        fi
    done
    exit $status
}
