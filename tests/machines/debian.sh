#!/bin/sh
# usage: debian.sh here | RELEASE...
# The life of the Debian package: built, checked, installed, configured by the steps that it prints, upgraded, removed,
# installed again, purged. In a root of each release (trixie, bookworm), made in a temporary folder; or here: in a
# temporary overlay of this machine, without what needs apt. As root; it changes nothing outside. DEBIAN_ROOTS: see root.sh.
# Exit status: 0 as expected, 1 not so, 77 can't be tried (1 with CI=true).
# shellcheck disable=SC2016,SC2317 # apt's own variables, and a trap
set -eu

# shellcheck source=tests/machines/root.sh
. "$(dirname "$0")/root.sh"

if [ "${1-}" != inside ]; then
    [ $# -gt 0 ] || { echo "usage: debian.sh here | RELEASE..." >&2; exit 2; }
    need unshare nft
    for_each "$@"
fi

network=''
# shellcheck disable=SC2086 # a command, or none
run() {
    $network chroot "$root" env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
        DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 "$@" >"$folder/log" 2>&1
}
must() { run "$@" || { tail -n 20 "$folder/log" >&2; fail "$*"; }; }
# cut_off: what is run from now on has a network of its own, without a way out
cut_off() {
    touch "$folder/net"
    unshare --net="$folder/net" true
    network="nsenter --net=$folder/net"
}

step "a root"
if [ "$release" = here ]; then
    mount -t tmpfs tmpfs "$folder"
    mkdir "$folder/upper" "$folder/work" "$root"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$folder/upper,workdir=$folder/work" "$root" 2>/dev/null ||
        cannot "no overlay can be mounted here"
    [ -e "$root/var/lib/dpkg/status" ] || cannot "the machine's files are in more than one file system"
    mount -t tmpfs tmpfs "$root/run"
    mount -t tmpfs tmpfs "$root/tmp"
    cut_off
    run dpkg --purge instances || : # and what was installed by hand
    find "$root/etc" "$root/var/lib/misc" "$root/usr/local/sbin" -name 'instances*' -prune -exec rm -rf {} +
else
    make_root
    mount --bind "$root" "$root" # "ip netns exec" wants to be in a root that is a mount
fi
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
add_project
fit_kernel

block examples/debian/README.md 'examples/debian/build.sh' >"$folder/lines"
build=$(sed -n 1p "$folder/lines") install=$(sed -n 2p "$folder/lines")
if [ "$release" = here ]; then
    build=${build##*&& }
    install="dpkg -i ./instances_*_all.deb"
else
    step "what it takes to look at it"
    must apt-get update
    must apt-get install -y --no-install-recommends systemd udhcpc dnsmasq iproute2 lintian apparmor apparmor-profiles
fi

step "built by the README"
must sh -euc "cd root/instances; $build"
package=$(cd "$root/root/instances" && echo instances_*_all.deb)
version=${package#*_} version=${version%_all.deb}
if [ "$release" != here ]; then
    step "lintian"
    must sh -euc "mkdir /root/source; cd /root/source
        DEB_CHECK_COMMAND='lintian --fail-on=error,warning' /root/instances/examples/debian/build.sh"
    not grep -E '^[EW]:' "$folder/log" || fail lintian
    step "installed with apt, and purged: only what it depends on is left"
    must sh -euc "cd root/instances; $install"
    must apt-get purge -y instances
    not ls -d "$root/etc/instances" "$root/etc/default/instances" "$root/usr/sbin/instances-apply" 2>/dev/null || fail "purge"
fi
# older VERSION: the same package with a lower version and another text of the settings
older() {
    must sh -euc "cd /root/instances; dpkg-deb -R $package /root/older
        sed -i 's/^Version: .*/Version: $1/' /root/older/DEBIAN/control
        echo '# $1' >>/root/older/etc/default/instances
        dpkg-deb --root-owner-group -b /root/older instances_$1_all.deb; rm -r /root/older"
}
older "$version~1"
older "$version~2"

# ---- A bridge, and a guest on it ----
mkdir -p "$root/etc/dnsmasq.d" "$root/run/dnsmasq"
[ -n "$network" ] || cut_off
must sh -euc 'ip link set lo up
    ip link add br0 address 10:66:6a:4c:a1:fe type bridge
    ip link set br0 up
    ip address add 10.83.0.1/24 dev br0
    ip address add 2001:67c:83::1/80 dev br0 nodad
    ip address add fd83:5eed::1/80 dev br0 nodad
    ip netns add guest
    ip link add guest0 type veth peer name eth0 address 10:66:6a:4c:a1:11 netns guest
    ip link set guest0 master br0 up
    ip -n guest link set eth0 up'
files() { (cd "$root" && find etc run usr var/lib -xdev | grep -v -e ^var/lib/apt -e ^var/lib/dpkg -e ^usr/share/mime | sort); }
files >"$folder/before"
# left: what is there now and was not
left() { files | comm -13 "$folder/before" - | tr '\n' ' '; }
dpkg_i() { must dpkg --force-confold -i "/root/instances/instances_$1_all.deb"; }
has() { grep -rq "$1" "$root/$2" || fail "$2 has no $1"; }
guarded() { run nft list table bridge instances; }

step "installed, a lower version: nothing is in force"
dpkg_i "$version~2"
sed -n '/Next steps/,/^More/s/^  //p' "$folder/log" >"$folder/steps"
[ -s "$folder/steps" ] || fail "it prints no next steps"
[ -z "$(find "$root/etc/systemd/system" -name 'instances.*')" ] || fail "a unit is enabled"
not guarded || fail "a table is there"

step "upgraded: the settings, which nobody edited, are the new ones"
dpkg_i "$version~1"
has "^# $version~1" etc/default/instances
not grep '^  ' "$folder/log" || fail "the next steps are printed again"

step "configured by the printed next steps: a lease is registered, has a name and a guard"
sed -i 's/ --now//' "$folder/steps" # systemd is not at work here: boot.sh looks at that
[ "$release" != here ] || sed -i '/^apt-get/d' "$folder/steps"
must sh -euc "$(cat "$folder/steps")"
[ "$(find "$root/etc/systemd/system" -name 'instances.*' | wc -l)" -eq 4 ] || fail "the units are not enabled"
must instances-apply
$network chroot "$root" dnsmasq --keep-in-foreground --conf-file=/etc/dnsmasq.d/br0.conf --user=root --no-resolv \
    --pid-file --log-facility=- >"$folder/dnsmasq.log" 2>&1 &
dnsmasq=$!
must ip netns exec guest udhcpc -f -q -n -i eth0 -s /bin/true -t 20 -T 1 -x hostname:web
for _ in $(seq 100); do [ -e "$root/var/lib/misc/instances.updated" ] && break; sleep 0.1; done
must instances-apply
has '"name": "web"' var/lib/misc/instances.json
has ' web.instance.internal' var/lib/misc/instances.hosts.d
guarded || fail "no guard"
has '10:66:6a:4c:a1:11' "../log"
kill "$dnsmasq"
wait "$dnsmasq" || :

step "upgraded, with settings that were edited: they and all else stay, the new ones lie beside them"
echo INSTANCES_ADDRESS_SETS=host,web >>"$root/etc/default/instances"
cp "$root/var/lib/misc/instances.json" "$folder/registry"
dpkg_i "$version"
has '^INSTANCES_ADDRESS_SETS=host,web' etc/default/instances
has "^# $version~1" etc/default/instances
not grep -q "$version~1" "$root/etc/default/instances.dpkg-dist" || fail "the new settings are not there"
guarded || fail "an upgrade takes the guard away"
must dpkg --verify instances
not grep -v ' c /etc/default/instances$' "$folder/log" || fail "files are not those of the package"

step "removed: nothing is in force, and what was known and said stays"
must dpkg --remove instances
not guarded || fail "the guard is left, to which nobody tells the news"
not run sh -c 'command -v instances-apply || ls /run/instances' || fail "programs or notes are left"
cmp "$root/var/lib/misc/instances.json" "$folder/registry" || fail "the registry"
has '^INSTANCES_ADDRESS_SETS=host,web' etc/default/instances

step "installed again: all is as it was"
dpkg_i "$version"
not grep '^  ' "$folder/log" || fail "the next steps are printed again"
must instances-apply
guarded || fail "no guard"

step "purged: only what the administrator put there, and dnsmasq's leases, are left"
must dpkg --purge instances
has 'dnsmasq stays' ../log
not guarded || fail "the guard is left"
expected="etc/dnsmasq.d/br0.conf etc/instances etc/instances/bridge.nft var/lib/misc/dnsmasq.br0.leases "
[ "$(left)" = "$expected" ] || fail "left: $(left)"

step "installed again, and undone by README.md: only dnsmasq's leases are left"
dpkg_i "$version"
must sh -euc "$(cat "$folder/steps")"
must instances-apply
guarded || fail "no guard"
must sh -euc "$(block README.md 'dpkg --purge' | sed 's/ --now//')" # as above
not guarded || fail "the guard is left"
[ "$(left)" = "var/lib/misc/dnsmasq.br0.leases " ] || fail "left: $(left)"

if [ "$release" != here ]; then
    step "AppArmor takes the snippet, as said on the page and in README.Debian"
    must apt-get install -y "/root/instances/$package"
    must sh -euc "cd /root/instances; $(block examples/debian/README.md 'apparmor_parser -Q' | sed s/-r/-Q/)"
    : >"$root/etc/apparmor.d/local/usr.sbin.dnsmasq"
    must sh -euc "$(sed -n '/^  cat.*apparmor/,/^$/{ s/apparmor_parser -r/apparmor_parser -Q/; p }' \
        "$top/examples/debian/debian/README.Debian")"
    must sh -c 'apparmor_parser -N /etc/apparmor.d/usr.sbin.dnsmasq | grep instances_update'
fi
step "as expected"
