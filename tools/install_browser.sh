#!/usr/bin/env bash
# A Chromium for the page's tests, where there is none yet: Debian's, since playwright's own is a download that many
# networks do not let through. Prints its path; 1 with a reason if there is none to be had.
set -uo pipefail
find_it() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
find_it && exit 0
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "no Chromium: it can be installed by root, with apt-get install chromium" >&2
  exit 1
fi
for attempt in 1 2 3; do
  if apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >&2; then
    find_it && exit 0
  fi
  sleep $((attempt * 5))
done
echo "no Chromium: apt-get could not install it" >&2
exit 1
