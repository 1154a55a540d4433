# Sourced by scripts that run others: `forward COMMAND...` runs it as a child that gets the signals this script gets (a
# Ctrl-C, a `kill` of the script alone), waits until it has ended in order, and returns its exit code.
forward() {
  local child="" code signalled=""
  trap 'signalled=TERM; [ -z "$child" ] || kill -TERM "$child" 2> /dev/null || true' TERM
  trap 'signalled=INT; [ -z "$child" ] || kill -INT "$child" 2> /dev/null || true' INT
  # In a process group of its own the child gets a Ctrl-C from this script alone, and does not ignore it.
  set -m
  "$@" &
  child=$!
  set +m
  # A signal may have come before there was a child.
  [ -z "$signalled" ] || kill "-$signalled" "$child" 2> /dev/null || true
  while :; do
    signalled=
    wait "$child" && code=0 || code=$?
    # A signal ends the waiting, not the child.
    [ -n "$signalled" ] || break
  done
  trap - TERM INT
  return "$code"
}
