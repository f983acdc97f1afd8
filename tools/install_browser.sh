#!/usr/bin/env bash
# A browser for the page's tests, where there is none yet: Debian's, since playwright's own is a download that many
# networks do not let through. `chromium`, which is what no word means, or `firefox`, with what it plays H.264 by.
# Prints its path; 1 with a reason if there is none to be had.
set -uo pipefail
set -- "${1:-chromium}"
case "$1" in
  chromium) names=(chromium chromium-browser google-chrome) packages=(chromium) ;;
  firefox) names=(firefox-esr firefox) packages=(firefox-esr libavcodec-extra) ;;
  *) echo "there is no '$1' here; chromium and firefox are" >&2 && exit 2 ;;
esac
find_it() { for name in "${names[@]}"; do command -v "$name" && return; done; return 1; }
find_it && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "no $1: it can be installed by root, with apt-get install ${packages[*]}" >&2
  exit 1
fi
install() { DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >&2; }
for attempt in 1 2 3; do
  if apt-get update -qq >&2 && install; then
    find_it && exit 0
  fi
  sleep $((attempt * 5))
done
echo "no $1: apt-get could not install it" >&2
exit 1
