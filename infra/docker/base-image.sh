#!/usr/bin/env bash
# The local base image, made without any registry: Debian's packages of Python and what it links to, unpacked
# into an empty root. No shell, no package manager, no setuid program. As root, on any Debian or Ubuntu.
#
#   infra/docker/base-image.sh OUTPUT.tar          perennial/images.py imports it into the engine
set -euo pipefail

suite=bookworm
packages=(
    base-files base-passwd tzdata media-types ca-certificates
    libc6 libgcc-s1 libstdc++6 zlib1g
    libbz2-1.0 libcrypt1 libexpat1 libffi8 liblzma5 libsqlite3-0 libssl3 libuuid1
    PYTHON-minimal libPYTHON-minimal libPYTHON-stdlib
)
# Modules whose libraries are left out (Kerberos among them), and what only a terminal or a compiler would use.
left_out=(lib-dynload/{nis,readline,_curses,_curses_panel,_dbm}.*.so lib2to3 pydoc_data idlelib ensurepip turtledemo)

give_up() {
    printf '✗ %s\nExpected: %s\nNext: %s\n' "$@" >&2
    exit 1
}

(($# == 1)) || give_up "infra/docker/base-image.sh was called with $# arguments" "one, the tar file to write" "infra/docker/base-image.sh base.tar"
output=$(realpath "$1")
((EUID == 0)) || give_up "base-image.sh runs as $(id -un)" "root: it unpacks a system and enters it by chroot" "sudo infra/docker/base-image.sh $1"
command -v debootstrap >/dev/null || give_up "there is no debootstrap here" "Debian's package of that name" "apt-get install -y --no-install-recommends debootstrap"

work=$(mktemp -d "$output.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root
mkdir -p "$root"

include=python3,libpython3-stdlib,$(IFS=,; echo "${packages[*]}" | sed 's/,[^,]*PYTHON[^,]*//g')
debootstrap --download-only --variant=minbase --include="$include" "$suite" "$work/debs" >"$work/log" 2>&1 ||
    give_up "debootstrap failed: $(tail -n 3 "$work/log")" "a reachable Debian mirror with $suite" "debootstrap --download-only --variant=minbase $suite DIR, to see all it says"
archives=$work/debs/var/cache/apt/archives
python=$(cd "$archives" && echo python3.*-minimal_*.deb | sed 's/-minimal_.*//')

# bookworm wants /bin, /lib… to be links into /usr before anything is unpacked.
mkdir -p "$root"/usr/{bin,sbin,lib,lib64} "$root"/var/lib/dpkg/status.d
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$root/$folder"; done
for package in "${packages[@]//PYTHON/$python}"; do
    deb=("$archives/$package"_*.deb)
    test -f "${deb[0]}" || give_up "debootstrap did not fetch $package" "every package of the list in base-image.sh" "edit the list for $suite"
    dpkg-deb --fsys-tarfile "${deb[0]}" | tar --extract --keep-directory-symlink --directory "$root"
    dpkg-deb --field "${deb[0]}" >"$root/var/lib/dpkg/status.d/$package" # where scanners of images look
done

cd "$root"
(cd "usr/lib/$python" && rm -rf "${left_out[@]}")
rm -rf usr/share/{man,locale,lintian,i18n,info,applications,pixmaps,python3,bug} usr/lib/*/gconv
rm -rf usr/share/zoneinfo/{posix,right} usr/sbin usr/lib/"$python"/{test,*/test,*/tests}
find usr/share/doc -type f ! -name copyright -delete
find . -type d -name __pycache__ -prune -exec rm -rf {} +
find usr/bin -mindepth 1 ! -name "$python" -delete
mkdir -p usr/sbin tmp
ln -s "$python" usr/bin/python3
chmod 1777 tmp
find . -xdev -type f -perm /6000 -exec chmod ug-s {} +

install -m 644 usr/share/base-passwd/passwd.master etc/passwd
install -m 644 usr/share/base-passwd/group.master etc/group
echo 'serving:x:65532:65532::/nonexistent:/usr/sbin/nologin' >>etc/passwd
echo 'serving:x:65532:' >>etc/group
mkdir -p etc/ssl/certs
cat usr/share/ca-certificates/mozilla/*.crt >etc/ssl/certs/ca-certificates.crt # Debian's, nothing of this machine
mkdir -p usr/lib/ssl
ln -s /etc/ssl/certs/ca-certificates.crt usr/lib/ssl/cert.pem

ldconfig -r .
chroot . "/usr/bin/$python" -m compileall -q --invalidation-mode unchecked-hash "/usr/lib/$python"

# Same packages, same bytes: the engine then sees the same layer.
tar --create --sort=name --mtime=@315532800 --owner=0 --group=0 --numeric-owner --file "$work/root.tar" .
mv "$work/root.tar" "$output"
