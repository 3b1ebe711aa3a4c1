# What a Linux guest of the lab's tests does: runs the commands that come on its virtio console.
#
# A request is a line `NUMBER COMMAND`. The answer is the command's output, each line behind
# `NUMBER: `, and then `NUMBER! STATUS`. Requests are served one by one; one that shall go on while
# others are served starts jobs of its own (`COMMAND > FILE 2>&1 &`). `exit STATUS` ends the guest.
while ! [ -c /dev/hvc0 ]; do sleep 0.1; done
stty -F /dev/hvc0 raw -echo
exec < /dev/hvc0 > /dev/hvc0
while read -r number command; do
    case $command in
        '') continue ;;
        exit*) $command ;;
    esac
    (eval "$command") > /tmp/answer 2>&1 < /dev/null
    status=$?
    while read -r line || [ -n "$line" ]; do
        echo "$number: $line"
    done < /tmp/answer
    echo "$number! $status"
done
