# The runs that a script starts: what they are told when the script is told to stop, and how they ended.
# shellcheck shell=bash

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    echo "usage: source scripts/supervise.sh: what scripts/common.sh needs; by itself it does nothing (see scripts/finetune.sh --help)"
    exit 0
fi
TOLD="" # the signal that this script was told to stop with

# supervise TELL COMMAND...: run a command; a signal to stop that this script gets meanwhile calls TELL SIGNAL PID. Bash
# handles signals only when what it waits for in the foreground has ended, so the command runs in the background; and in
# a process group of its own: Ctrl-C goes to the whole group of a terminal, and must reach a run once, as a second one
# means "at once". So the run has no terminal to read from.
supervise() {
    local tell="$1" child="" early="" heard status=0 signal
    shift
    for signal in INT TERM HUP USR1; do
        # shellcheck disable=SC2064 # each trap names its own signal
        trap "hear $signal" "$signal"
    done
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    [[ -z "$early" ]] || "$tell" "$early" "$child"
    while :; do
        heard=no
        wait "$child" || status=$?
        [[ "$heard" == yes ]] || break # else it was the signal that ended the wait
        status=0
    done
    trap - INT TERM HUP USR1
    return "$status"
}

# hear SIGNAL: of supervise, whose variables it sees.
hear() {
    TOLD="$1" heard=yes
    if [[ -n "$child" ]]; then
        "$tell" "$1" "$child"
    else
        early="$1"
    fi
}

# tell_ranks SIGNAL PID: to the processes that train, which finish their step and save. A launcher above them is told
# nothing: it would kill them after a time, and fail. Before there are any, what was started is ended.
tell_ranks() {
    local ranks
    ranks="$(ranks_below "$2")"
    # shellcheck disable=SC2086 # numbers
    kill -s "$1" ${ranks:-$2} 2>/dev/null || true # they may have ended by now
}

# ranks_below PID: the processes below a launcher that it has given a RANK (common.sh keeps none); not their workers.
ranks_below() {
    local stat line pid
    for stat in /proc/[0-9]*/stat; do
        { read -r line <"$stat"; } 2>/dev/null || continue # it has ended
        pid="${line%% *}" line="${line##*) }"              # state, parent, ...
        [[ "$line" == ?" $1 "* ]] || continue
        if grep -qz '^RANK=' "/proc/$pid/environ" 2>/dev/null; then
            echo "$pid"
        else
            ranks_below "$pid"
        fi
    done
}

# state_text FOLDER: what a run has written of its state, "" where there is nothing to be read.
state_text() {
    { [[ -f "$1/run_state.json" ]] && tr -d '\0' <"$1/run_state.json"; } 2>/dev/null || true
}

# state_of FOLDER: running, finished, preempted or failed, as the run in FOLDER says in its run_state.json; an earlier
# version's folder has none, and a trainer_state.json where its run has finished. "unknown" of neither, or half a file.
state_of() {
    local text pattern='[{,][[:space:]]*"state"[[:space:]]*:[[:space:]]*"([a-z]+)"'
    if [[ ! -e "$1/run_state.json" && -s "$1/trainer_state.json" ]]; then
        echo finished
        return
    fi
    text="$(state_text "$1")"
    if [[ "$text" == "{"*"}" && "$text" =~ $pattern ]]; then
        echo "${BASH_REMATCH[1]}"
    else
        echo unknown
    fi
}

# how_it_ended FOLDER BEFORE STATUS: finished, preempted or failed, of a run that was started when state_text said BEFORE
# and has ended with an exit status. What counts is what the run says; a run that ended before it said anything was
# stopped where this script was told to stop.
how_it_ended() {
    local state
    state="$(state_of "$1")"
    if [[ "$3" != 0 && "$(state_text "$1")" == "$2" ]]; then
        state=unknown # what is said there is of an earlier run
    fi
    case "$state" in
        finished | preempted | failed) echo "$state" ;;
        *) [[ -n "$TOLD" ]] && echo preempted || echo failed ;;
    esac
}
