#!/bin/sh
# Makes the base image lean, in a stage of its own: Python, the libraries that wheels are linked with, certificates, time
# zones and sh stay; package manager, Perl, tools and their libraries go. What stays is in dpkg's list, for scanners.
# It deletes the system that it runs in: only where the publisher of the image has said which Python it holds.
set -eu
[ -n "${PYTHON_SHA256:-}" ] || { echo "lean.sh is for an image of Python that is being built" >&2; exit 1; }

cd /usr/local/lib/python3.*/
rm -r config-* ensurepip idlelib pydoc_data tkinter turtledemo site-packages/pip*
rm -f lib-dynload/_tkinter* lib-dynload/_test*
rm -r /usr/local/include /usr/local/lib/pkgconfig /usr/local/bin/idle* /usr/local/bin/pip* /usr/local/bin/pydoc*
# The publisher removes the byte code, and nothing can be written where these images run: each start would compile anew.
python3 -m compileall -q -j 0 .

# What is mounted over these folders in its first life takes their owner.
mkdir -p /data/models /pictures
chown -R 10001:10001 /data /pictures

# Those first whose last words need what goes next. openssl stays: where libssl looks for certificates are its links.
dpkg --purge --force-all libpam-modules libpam-modules-bin libpam-runtime libpam0g passwd
dpkg --purge --force-all adduser apt bash bsdutils debconf debian-archive-keyring diffutils findutils grep gzip \
  hostname init-system-helpers libapt-pkg7.0 libdb5.3t64 libsemanage-common libsemanage2 libsepol2 login login.defs mawk \
  mount ncurses-bin perl-base sqv sysvinit-utils tar util-linux
# What no list names: package lists, documents, and converters for iconv, which Python has of its own.
rm -rf "$0" /etc/apt /usr/lib/*/gconv /usr/share/doc /var/cache/debconf /var/lib/apt /var/lib/systemd /var/log/*
# Last, what deletes, and the libraries of all these.
rm /var/lib/dpkg/info/dpkg.postrm
dpkg --purge --force-all coreutils dpkg libacl1 libattr1 libaudit-common libaudit1 libblkid1 libbsd0 libcap-ng0 libcap2 \
  libdebconfclient0 libgmp10 libhogweed6t64 liblastlog2-2 liblz4-1 libmd0 libmount1 libnettle8t64 libpcre2-8-0 \
  libseccomp2 libselinux1 libsmartcols1 libsystemd0 libudev1 libxxhash0 sed
