"""In place of `llava.train.recipe`: "trains" by writing down that it did.

The environment's STUB_RECIPE: {"TOWER/seed_S": {"fail": STAGE, "hang": STAGE, "deaf": true}}: the run fails in that
stage, or stays in it until a signal comes, which it does not hear if deaf.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STAGES = ("pretrain", "finetune")


def main(words: list[str]) -> int:
    file, rest = words[0], words[1:]
    out = Path(rest[rest.index("--output_dir") + 1])
    until = rest[rest.index("--until") + 1] if "--until" in rest else None
    name = "/".join(out.parts[out.parts.index("runs") + 1 :])
    behave = json.loads(os.environ["STUB_RECIPE"]).get(name, {})
    with open(out / "calls.jsonl", "a") as calls:
        told = {"until": until, "threads": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid(), "recipe": file}
        calls.write(json.dumps(told | {"words": rest}) + "\n")
    came: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: came.append(number))
    state = {"recipe": "small", "stages": [{"name": stage, "status": "waiting"} for stage in STAGES]}
    state["evaluations"] = [{"name": "heldout", "status": "waiting"}]
    for entry in state["stages"]:
        folder = out / entry["name"]
        if folder.is_symlink() or json.loads(read(folder / "run_state.json")).get("state") == "finished":
            entry["status"] = "finished"
            if entry["name"] == until:
                break
            continue
        print(" 50%|##| 1/2 [00:01<00:01,  1.00s/it]", file=sys.stderr, flush=True)
        folder.mkdir(exist_ok=True)
        tell(out, state, entry, "running")
        while behave.get("hang") == entry["name"] and (behave.get("deaf") or not came):
            time.sleep(0.02)
        with open(out / "signals.jsonl", "a") as signals:
            signals.write(json.dumps(came) + "\n")
        ended = "preempted" if came else "failed" if behave.get("fail") == entry["name"] else "finished"
        (folder / "run_state.json").write_text(json.dumps({"state": ended, "step": 2}))
        if ended == "failed":
            print("error: the loss is not finite", file=sys.stderr)
        tell(out, state, entry, ended, "error: the loss is not finite" if ended == "failed" else None)
        if ended != "finished" or entry["name"] == until:
            return int(ended == "failed")
    if until is None:
        questions = [
            {"id": f"q{n}", "kind": "all", "image": f"{n // 2}_0.png", "question": "?", "answer": "a"} for n in range(8)
        ]
        for number, question in enumerate(questions):
            right = (number + len(name)) % 3 > 0
            question |= {"prediction": "a" if right else "b", "correct": right}
        share = sum(question["correct"] for question in questions) / 8
        content = {"exact_match": share, "n": 8, "by_kind": {"all": {"exact_match": share, "n": 8}}}
        content |= {"questions": questions, "image_folder": None}
        (out / "eval_heldout.json").write_text(json.dumps(content))
        tell(out, state, state["evaluations"][0], "finished")
    return 0


def read(path: Path) -> str:
    return path.read_text() if path.is_file() else "{}"


def tell(out: Path, state: dict, entry: dict, status: str, line: str | None = None) -> None:
    entry |= {"status": status, "last_line": line}
    (out / "recipe.json").write_text(json.dumps(state))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
