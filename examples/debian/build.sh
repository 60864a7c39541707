#!/bin/sh
# usage: build.sh
# Builds the Debian package of the checkout that this script is in, and leaves it in the folder where you are, in place
# of another version: README's instances_*_all.deb is one file.
set -eu

case "$*" in
'') ;;
-h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;;
--version) echo "build.sh: 4.0"; exit ;;
*) echo "build.sh: error: $*: no such usage: see --help" >&2; exit 2 ;;
esac
top=$(cd "$(dirname "$0")/../.." && pwd)
here=$PWD
umask 022
command -v dh >/dev/null || { echo "build.sh: needs debhelper: apt-get install debhelper" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
trap 'exit 130' INT TERM HUP

mkdir "$folder/instances"
cd "$folder/instances"
cp -R "$top/instances-update.py" "$top/instances-process.py" "$top/README.md" "$top/LICENSE" "$top/examples" .
mv examples/debian/debian .
cp examples/systemd/instances.path examples/systemd/instances@.path debian/
cp examples/systemd/instances.service examples/systemd/instances.timer debian/
# Where a package's programs are, and its Python
sed -i 's|/usr/local/sbin/instances|/usr/sbin/instances|' debian/instances.service examples/dnsmasq/br0.conf
sed -i '1s|^#!/usr/bin/env python3$|#!/usr/bin/python3|' instances-update.py instances-process.py \
    examples/systemd/instances-apply examples/systemd/instances-edit examples/show/instances-[cs]*

# Links to what the package does not have, in the pages that it has
sed -i 's,\[\([^]]*\)\](\(\.\./\)*\(tests\|LICENSE\|debian/c\)[^)]*),\1,g' README.md examples/README.md examples/*/README.md

# A version that grows with each build
sed -i "1s/(\(.*\))/(\1+$(date -u +%Y%m%d%H%M%S))/" debian/changelog

# Scripts need no compiler, so -I: what every package is thought to need may be missing.
dpkg-checkbuilddeps -I
dpkg-buildpackage --no-check-builddeps --no-sign
rm -f "$here"/instances_*_all.deb
cp ../instances_*_all.deb "$here"
echo "build.sh: made $(cd .. && echo instances_*_all.deb)" >&2
