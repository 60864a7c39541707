# shellcheck shell=sh disable=SC2016,SC2034,SC2317 # apt's own variable, what the caller uses, and a trap
# What the other shell scripts here begin with: a Debian root in a temporary folder. Each sources this file, and calls
# for_each with its releases. That runs the script again for each of them with the arguments "inside RELEASE FOLDER", in
# namespaces of its own for mounts and processes. They go, and the folder, also when it fails or is interrupted.
# DEBIAN_ROOTS: a folder to take RELEASE.tar from, a minimal root, and to put it into where it is not there.

top=$(cd "$(dirname "$0")/../.." && pwd)
export PATH="$PATH:/usr/sbin:/sbin"
say() { echo "${0##*/}: $*" >&2; }
fail() { say "FAILED: $*"; exit 1; }
# cannot WHY: it can't be tried here, which with CI=true is a failure
cannot() { say "$*"; [ "${CI-}" = true ] && exit 1; exit 77; }
not() { ! "$@"; }
# block PAGE WORDS: the commands of a page's block that has these words
block() { "$top/tests/block.sh" "$@" || fail "no such block: $*"; }
need() {
    [ "$(id -u)" -eq 0 ] || cannot "needs root"
    for program in "$@"; do
        command -v "$program" >/dev/null || cannot "needs $program"
    done
}

# ---- Outside ----
# clear_group: takes away the control group of the folder's name, where the script has made one
clear_group() {
    export group="/sys/fs/cgroup/${folder##*/}"
    unshare --mount sh -c 'mount -t cgroup2 none /sys/fs/cgroup && for _ in $(seq 100); do
        [ -d "$group" ] || exit 0
        find "$group" -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
    done' || true
}
clear_up() {
    # The first process of the namespaces ends when all others in them have ended, and unshare waits for it.
    if [ -n "$inside" ]; then
        first=$(cat "/proc/$inside/task/$inside/children" 2>/dev/null || :)
        # shellcheck disable=SC2086 # a number and a space
        kill -KILL ${first:-$inside} 2>/dev/null || :
        wait "$inside" || :
    fi
    [ -z "$folder" ] || { clear_group; rm -rf --one-file-system "$folder"; }
    folder='' inside=''
}
for_each() {
    folder='' inside='' status=0
    trap 'status=$?; trap "" INT TERM HUP; clear_up; exit $status' EXIT
    trap 'exit 130' INT TERM HUP
    for release in "$@"; do
        folder=$(mktemp -d /var/tmp/instances.XXXXXX)
        setpriv --pdeathsig KILL unshare --mount --propagation private --pid --fork --kill-child --mount-proc \
            "$0" inside "$release" "$folder" </dev/null &
        inside=$!
        wait "$inside" || status=$?
        inside=''
        [ "$status" -eq 0 ] || exit "$status"
        clear_up
    done
    exit 0
}

# for_each_boot [RELEASE...]: the same for releases (trixie) that systemd-nspawn is to boot
for_each_boot() {
    need systemd-nspawn unshare nsenter nft
    [ $# -gt 0 ] || set -- trixie
    for_each "$@"
}

# ---- Inside ----
if [ "${1-}" = inside ]; then
    release=$2 folder=$3 root=$3/root leaders=''
    started=$(date +%s)
fi
step() { say "$release, $(($(date +%s) - started)) s: $*"; }
# make_root: a minimal Debian in $root, where apt works and starts nothing
make_root() {
    tar=${DEBIAN_ROOTS:+$DEBIAN_ROOTS/$release.tar}
    mkdir "$root"
    [ -z "$tar" ] || { exec 9>"$tar.lock"; flock 9; } # one makes it, for all that want it at once
    if [ -n "$tar" ] && [ -e "$tar" ]; then
        tar -xf "$tar" -C "$root"
    else
        need debootstrap
        mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m 1 '/debian/*$') ||
            cannot "apt has no Debian mirror"
        debootstrap --variant=minbase "$release" "$root" "$mirror" >"$folder/log" 2>&1 ||
            { tail -n 5 "$folder/log" >&2; cannot "debootstrap failed"; }
        [ -z "$tar" ] || { tar -cf "$tar.new" -C "$root" . && mv "$tar.new" "$tar"; }
    fi
    exec 9>&-
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    apt-config dump Acquire >"$root/etc/apt/apt.conf.d/90acquire"
    echo force-unsafe-io >"$root/etc/dpkg/dpkg.cfg.d/fast"
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
}
# in_root COMMANDS: in the root, where apt is up to date, and install PACKAGE... leaves out what is recommended
in_root() {
    mount -t proc proc "$root/proc"
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive LC_ALL=C sh -euc "
        install() { apt-get install -y --no-install-recommends \"\$@\"; }
        rm -f /etc/apt/apt.conf.d/docker-clean
        apt-get update
        $1" >"$folder/log" 2>&1 || { tail -n 5 "$folder/log" >&2; cannot "no packages"; }
    umount "$root/proc"
}
# make_machine COMMANDS: a root that boots, with this project and what these commands install
make_machine() {
    make_root
    add_project
    fit_kernel
    in_root "$1
        systemd-machine-id-setup"
    rm "$root/usr/sbin/policy-rc.d" "$root/etc/resolv.conf"
}
# add_bridge: with Debian's ifupdown, br0 as br0.conf and README have it
add_bridge() {
    cat >>"$root/etc/network/interfaces" <<'END'
auto br0
iface br0 inet static
    address 10.83.0.1/24
    pre-up ip link add br0 address 10:66:6a:4c:a1:fe type bridge
    up ip address add 2001:67c:83::1/80 dev br0 nodad
    up ip address add fd83:5eed::1/80 dev br0 nodad
END
}
# add_project: a copy of this project in its /root/instances
add_project() {
    rm -rf "$root/root/instances"
    mkdir -p "$root/root/instances"
    tar -cf - -C "$top" --exclude=.git . | tar -xf - -C "$root/root/instances"
}
# fit_kernel: from that copy it takes, as README says, what the kernel here can't do
fit_kernel() {
    unshare --net nft 'table bridge t { chain c { meta ibrname br0 accept; }; }' 2>/dev/null ||
        sed -i '/^ *meta [io]brname /d' "$root/root/instances/examples/nftables/bridge.nft" \
            "$root/root/instances/examples/network/network.nft"
}

# ---- A machine of it ----
# enter_group: all that is started from here on is in a control group of the folder's name, $group
enter_group() {
    mount -t cgroup2 none /sys/fs/cgroup 2>/dev/null || cannot "no cgroup2 can be mounted"
    group=/sys/fs/cgroup/${folder##*/}
    mkdir "$group"
    echo $$ >"$group/cgroup.procs"
}
# run COMMAND...: as root in the machine that was booted last, whose first process is $leader
run() {
    nsenter --target "$leader" --all -- env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        HOME=/root LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"
}
# failed WHAT: with what was printed last, and what its services have said
failed() {
    cat "$folder/output" "$folder/log" >&2
    for leader in $leaders; do
        run journalctl --no-pager -n 40 -u 'instances*' -u dnsmasq -u '*resolve*' -u unbound -u NetworkManager -u 'kea*' -u etcd >&2 || true
    done
    fail "$1"
}
# until_true SECONDS WHAT COMMAND...: a command in the machine, until it succeeds. until_here: a command here
until_true() {
    seconds=$1 what=$2
    shift 2
    until_here "$seconds" "$what" run "$@"
}
until_here() {
    seconds=$1 what=$2
    shift 2
    end=$(($(date +%s) + seconds))
    until "$@" >"$folder/output" 2>"$folder/log"; do
        [ "$(date +%s)" -lt "$end" ] || failed "$what: not within $seconds s"
        sleep 0.2
    done
}
# lines WHAT COMMANDS: commands in the machine, in this project's folder
lines() { run sh -euc "cd /root/instances; $2" >"$folder/output" 2>"$folder/log" || failed "$1"; }
# follow PAGE WORDS: the block of a page that has these words
follow() {
    commands=$(block "$@") # by itself, so that a block that is not there ends this
    lines "the block that has: $2" "$commands"
}
# boot [OPTION...]: boots $root, with these options of systemd-nspawn; its process is $nspawn
boot() {
    systemd-nspawn --quiet --register=no --keep-unit --private-network --resolv-conf=off --timezone=off \
        --link-journal=no --console=pipe --machine="${folder##*/}" --directory="$root" "$@" --boot >"$folder/console" 2>&1 &
    nspawn=$!
    for _ in $(seq 300); do
        sleep 0.2
        leader=$(cat "/proc/$nspawn/task/$nspawn/children") || break
        leader=${leader% }
        case $(run systemctl is-system-running 2>/dev/null) in running | degraded) leaders="$leaders $leader"; return ;; esac
    done
    tail -n 5 "$folder/console" >&2
    cannot "systemd-nspawn does not boot here"
}
# make_switch: two bridges, in a network of their own, for the machines that boot_host boots
make_switch() {
    unshare --net sleep 86400 &
    switch=$!
    until [ "$(readlink "/proc/$switch/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.1; done
    for bridge in lan management; do on_switch ip link add "$bridge" up type bridge; done
}
on_switch() { nsenter --target "$switch" --net -- "$@"; }
# boot_host HOST NUMBER [OPTION...]: a machine of the root, and its two interfaces: eth0 for guests, eth1 for management
boot_host() {
    host=$1 number=$2
    shift 2
    mkdir "$folder/$host" "$folder/$host.upper" "$folder/$host.work"
    mkdir "$group/$host" # of its own, for each systemd believes that all in it is its
    mount -t overlay overlay -o "lowerdir=$folder/root,upperdir=$folder/$host.upper,workdir=$folder/$host.work" "$folder/$host" ||
        cannot "no overlay can be mounted"
    echo "$host" >"$folder/$host/etc/hostname"
    systemd-id128 new >"$folder/$host/etc/machine-id"
    echo $$ >"$group/$host/cgroup.procs"
    root=$folder/$host
    boot "$@"
    echo $$ >"$group/cgroup.procs"
    echo "$leader" >"$folder/$host.leader"
    for port in lan:eth0 management:eth1; do
        on_switch ip link add "$host-${port%:*}" type veth peer name "${port#*:}" netns "$leader"
        on_switch ip link set "$host-${port%:*}" master "${port%:*}" up
    done
    run sh -euc "ip address add 192.0.2.$number/24 dev eth1; ip link set eth1 up"
}
# on HOST COMMAND...: as root in its machine
on() {
    leader=$(cat "$folder/$1.leader")
    shift
    run "$@"
}
