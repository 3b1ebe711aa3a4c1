# The job of the demo's Linux guest (scripts/guest-image runs it in its initramfs). Sourced words of
# the kernel's command line: demo.mib, demo.rate: memory to write, MiB and MiB/s; demo.probe: none.
# It says `DEMO word {json}` on the console, and hears `hash` and `stop` from it.
# shellcheck shell=sh
mib=64 rate=8
for word in $(cat /proc/cmdline); do
    case $word in
        demo.mib=*) mib=${word#*=} ;;
        demo.rate=*) rate=${word#*=} ;;
        demo.probe) exit 0 ;;
    esac
done
# A line comes as it was sent, and is not sent back.
stty -echo < /dev/console

nic() {
    for device in /sys/class/net/*; do
        [ "$(cat "$device/address")" = "$1" ] && basename "$device"
    done
}
connect() {
    echo 0 > "/proc/sys/net/ipv6/conf/$1/accept_dad"
    ip link set "$1" up
    ip addr add "10.80.$2.2/24" dev "$1"
    ip -6 addr add "fd80:$2::2/64" dev "$1"
}
first=$(nic 52:54:00:fe:00:01)
second=$(nic 52:54:00:fe:00:02)
connect "$first" 0
connect "$second" 1

# Says the last line of a program's output.
say_last() { echo "DEMO $1 $(tail -n 1 "/tmp/$1")"; }
# Takes the hashes of some packets, says them. Their first bytes would be long to say.
say_hashes() {
    guest_net rxhash --iface "$first" --count 40 --seconds 60 > /tmp/hash
    sed -n '/"event":"packet"/ { s/,"head":"[0-9a-f]*"//; s/^/DEMO hash /p }' /tmp/hash
}

echo "DEMO kernel $(uname -r)"
guest_net ethtool-rxhash on --iface "$first" > /tmp/rxhash
say_last rxhash
guest_net udp-seq recv --listen 10.80.0.2:7000 > /tmp/udp0 &
guest_net udp-seq recv --listen '[fd80:1::2]:7000' > /tmp/udp1 &
guest_net tcp-recv --listen '[fd80:0::2]:7001' > /tmp/tcp0 &
guest_net tcp-recv --listen 10.80.1.2:7001 > /tmp/tcp1 &
guest_net dirty --mib "$mib" --rate "$rate" > /tmp/dirty &
for name in udp0 udp1 tcp0 tcp1 dirty; do
    until grep -qE '"event":"(listening|ready)"' "/tmp/$name"; do sleep 0.1; done
done
echo "DEMO ready"
say_hashes
echo "DEMO hashed"
while read -r word; do
    case $word in
        hash) say_hashes; echo "DEMO hashed2" ;;
        stop) break ;;
    esac
done < /dev/console
killall -TERM guest_net
wait
for name in udp0 udp1 tcp0 tcp1 dirty; do say_last $name; done
echo "DEMO end"
sleep 1
