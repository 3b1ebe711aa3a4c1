# What a Linux guest of the lab's tests does: runs the commands that come on its virtio console.
#
# A request is a line `NUMBER COMMAND`. The answer is the command's output, each line behind
# `NUMBER: `, and then `NUMBER! STATUS`. Requests are served one by one; one that shall go on while
# others are served starts jobs of its own (`COMMAND > FILE 2>&1 &`). `exit STATUS` ends the guest.
while ! [ -c /dev/hvc0 ]; do sleep 0.1; done
exec < /dev/hvc0 > /dev/hvc0
# Once it is open: the settings last until nobody has it open.
stty raw -echo
while read -r number command; do
    case $command in
        '') continue ;;
        exit*) $command ;;
    esac
    (eval "$command") > /tmp/answer 2>&1 < /dev/null
    status=$?
    sed "s/^/$number: /" /tmp/answer
    # A last line may lack its end.
    if [ -n "$(tail -c 1 /tmp/answer)" ]; then echo; fi
    echo "$number! $status"
done
