"""What runs in the device's shell: POSIX sh and the tools that Android's toybox has, too.

Arguments are given as ``$1`` and so on, never put into the text.
"""

from __future__ import annotations

__all__ = ["FACTS", "KEEPER", "LAUNCH", "READY", "RECEIVE", "STOP"]

READY = "deploykit-folder "

# $1: folder to work in, or empty. It makes a private folder, says where, and waits. When its
# input ends (the session is over, the connection cut, the other side dead) or no sign of life
# came for minutes (the network went away without a word), it ends what we started and removes
# the folder.
KEEPER = """
umask 077
base=$1
[ -n "$base" ] || for b in "$TMPDIR" /tmp /data/local/tmp; do
  if [ -n "$b" ] && [ -d "$b" ] && [ -w "$b" ]; then base=$b; break; fi
done
d=$(mktemp -d "${base:-/tmp}/deploykit.XXXXXX") || exit 73
clean() {
  trap '' HUP INT TERM
  rm -f "$d/alive"  # first: who starts a process now sees it and gives up
  for p in $(cat "$d"/pids/* 2>/dev/null); do kill -9 -"$p" "$p"; done 2>/dev/null
  rm -rf "$d" 2>/dev/null || { sleep 1; rm -rf "$d"; }
}
trap 'clean; kill -9 -$$ 2>/dev/null' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$d/pids" "$d/files" || exit 73
: > "$d/alive" || exit 73
(
  while sleep 60; do
    [ -n "$(find "$d/alive" -mmin -4 2>/dev/null)" ] || { clean; kill -9 $$; exit; }
  done
) < /dev/null > /dev/null 2>&1 &
echo "deploykit-folder $d"
while read -r _; do : > "$d/alive"; done
"""

# $1: our folder, $2: a name for the process, the rest: its command. In the background and waited
# for, so that its number is known and is forgotten the moment it ends.
LAUNCH = """
umask 077
d=$1; name=$2; shift 2
cd "$d" || exit 71
exec 3<&0
"$@" <&3 3<&- &
p=$!
exec 3<&-
echo "$$ $p" > "pids/$name" && [ -e alive ] || { kill -9 "$p"; exit 73; }
wait "$p"; code=$?
rm -f "pids/$name"
exit "$code"
"""

# $1: our folder, $2: the name given to LAUNCH
STOP = """
for p in $(cat "$1/pids/$2" 2>/dev/null); do kill -9 -"$p" "$p"; done 2>/dev/null
rm -f "$1/pids/$2"
"""

# $1: our folder, $2: the archive's sha256; the archive comes on standard input. A cut connection
# looks like the end of the file, hence the check; and adb calls a command that a vanished device
# never finished a success, hence the word at the end.
RECEIVE = """
umask 077
part="$1/$2.part"; place="$1/files/$2"
fail() { rm -rf "$part" "$place"; exit 74; }
cat > "$part" || fail
sum=$(sha256sum "$part" 2>/dev/null || shasum -a 256 "$part") || fail
[ "${sum%% *}" = "$2" ] || { echo "what arrived is not what was sent" >&2; fail; }
mkdir "$place" && tar -xf "$part" -C "$place" || fail
rm -f "$part"
echo received
"""

# $1: our folder, $2: a Python. Lines of key=value.
FACTS = """
echo "machine=$(uname -m)"
echo "system=$(uname -sr)"
echo "model=$(getprop ro.product.model 2>/dev/null || tr -d '\\000' \
  < /proc/device-tree/model 2>/dev/null)"
echo "python=$("$2" -c 'import platform; print(platform.python_version())' 2>/dev/null)"
echo "taskset=$(command -v taskset)"
echo "free_kb=$(df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print $4 }')"
echo "memory_kb=$(awk '/^MemTotal:/ { print $2 }' /proc/meminfo 2>/dev/null)"
for c in /sys/devices/system/cpu/cpu[0-9]*; do
  [ -d "$c" ] || continue
  f=$(cat "$c/cpufreq/cpuinfo_max_freq" 2>/dev/null)
  g=$(cat "$c/cpufreq/scaling_governor" 2>/dev/null)
  echo "core=${c##*cpu} ${f:-0} ${g:--}"
done
for z in /sys/class/thermal/thermal_zone*; do
  t=$(cat "$z/temp" 2>/dev/null) && echo "zone=$(cat "$z/type" 2>/dev/null) $t"
done
command -v dumpsys > /dev/null 2>&1 && dumpsys thermalservice 2>/dev/null |
  sed -n 's/^Thermal Status: */throttling=/p'
exit 0
"""
