"""A comparison as it might come out: seven towers, two seeds, digits drawn by Pillow, and what a report gets of it."""

import itertools
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# name: (chance to read a left, a right digit; visual tokens, M parameters of the tower, GFLOPs, ms to the first token)
TOWERS = {
    "clip": (0.97, 0.93, 49, 0.42, 0.041, 21.3),
    "siglip": (0.95, 0.94, 49, 0.41, 0.040, 21.9),
    "hevc_vit": (0.96, 0.96, 49, 0.56, 0.055, 24.2),
    "hevc_vit_packing": (0.96, 0.95, 49, 0.56, 0.056, 26.0),
    "clip_toconv_24to12": (0.88, 0.80, 16, 0.61, 0.044, 15.2),
    "adaptive": (0.93, 0.90, 27.4, 0.56, 0.031, 18.8),
    "dinov2": (0.70, 0.62, 49, 0.43, 0.042, 22.0),
}
KINDS = ("left digit", "right digit")
QUESTION = "Which digit is at the {side} of this picture?"


def draw_digit(path: Path, digits: str, rng: random.Random) -> None:
    """Two digits on a grey ground, 28 pixels high."""
    picture = Image.new("RGB", (56, 28), (rng.randrange(60, 120),) * 3)
    pen = ImageDraw.Draw(picture)
    for place, digit in enumerate(digits):
        colour = tuple(rng.randrange(150, 256) for _ in range(3))
        pen.text((28 * place + 8, 2), digit, fill=colour, font=ImageFont.load_default(20))
    picture.save(path)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def answered(rng: random.Random, truth: str, chance: float) -> str:
    return truth if rng.random() < chance else rng.choice([digit for digit in "0123456789" if digit != truth])


def questions(folder: Path, towers: dict, seeds: list[int], pictures: int) -> list[dict]:
    """Two questions on each picture."""
    rng, rows = random.Random(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        digits = f"{rng.randrange(10)}{rng.randrange(10)}"
        draw_digit(folder / f"{number}.png", digits, rng)
        for side, (kind, truth) in enumerate(zip(KINDS, digits, strict=True)):
            said = {
                name: {str(seed): answered(rng, truth, facts[side]) for seed in seeds} for name, facts in towers.items()
            }
            row = {"key": len(rows), "id": f"test-{number}", "kind": kind, "image": f"{number}.png"}
            row |= {"question": QUESTION.format(side=kind.split()[0]), "answer": truth, "predictions": said}
            correct = {name: {seed: text == truth for seed, text in by.items()} for name, by in said.items()}
            rows.append(row | {"correct": correct})
    return rows


def tower_row(name: str, facts: tuple, rows: list[dict], seeds: list[int]) -> dict:
    def share(seed=None, kind=None) -> float:
        chosen = [row["correct"][name] for row in rows if kind in (None, row["kind"])]
        return mean(by[str(s)] for by in chosen for s in ([seed] if seed is not None else seeds))

    _, _, tokens, params, gflops, first = facts
    found = {"mean": share(), "low": share() - 0.021, "high": share() + 0.019, "n": len(rows)}
    found["per_seed"] = {str(seed): share(seed) for seed in seeds}
    found["by_kind"] = {kind: {"mean": share(kind=kind), "n": len(rows) // 2} for kind in KINDS}
    blank = {kind: {"mean": 0.11, "chance": 0.103} for kind in KINDS}
    found["blank"] = {"mean": 0.11, "by_kind": blank}
    cost = {"visual_tokens": tokens, "tower_params": params * 1e6, "total_params": (params + 1.37) * 1e6}
    cost |= {"trained_params": 1.37e6, "tower_gflops": gflops}
    for key, value in (("ttft_ms", first), ("train_samples_per_s", 4000 / first), ("peak_memory_mb", 800 + 3 * first)):
        cost[key] = {"median": value, "p25": value * 0.97, "p75": value * 1.04}
    probe = {"linear": share() - 0.02, "attentive": share() + 0.001, "knn": share() - 0.07}
    intervals = {key: [value - 0.05, value + 0.02] for key, value in probe.items()}
    probe |= {"intervals": intervals, "n": 500, "note": "", "error": None}
    row = {"name": name, "config": f"configs/towers/demo_{name}.yaml", "status": "finished", "error": None}
    row |= {"n_seeds": len(seeds), "learning_rate": None, "cost": cost, "scores": {"heldout": found}, "probe": probe}
    return row


def pair_rows(towers: list[dict], marks: bool) -> list[dict]:
    found = []
    for a, b in itertools.combinations(towers, 2):
        gap = a["scores"]["heldout"]["mean"] - b["scores"]["heldout"]["mean"]
        p = max(0.0, 0.5 - 8 * abs(gap))
        row = {"evaluation": "heldout", "a": a["name"], "b": b["name"], "difference": gap}
        row |= {"low": gap - 0.031, "high": gap + 0.029, "p": p, "p_holm": min(1.0, 3 * p)}
        found.append(row | {"significant": marks and row["p_holm"] < 0.05})
    return found


def comparison(folder: Path, towers: dict | None = None, seeds=(0, 1), pictures: int = 60) -> tuple[dict, dict]:
    """(results, details); the pictures are put into `folder`."""
    towers, seeds = TOWERS if towers is None else towers, list(seeds)
    rows = questions(folder, towers, seeds, pictures)
    found = [tower_row(name, facts, rows, seeds) for name, facts in towers.items()]
    results = {"schema": 1, "name": "demo", "commit": "409ac5d", "host": "2 cores, torch 2.13.0", "match": "none"}
    results |= {"seeds": seeds, "towers": found, "pairs": pair_rows(found, len(seeds) > 1)}
    results |= {
        "notes": ["costs of 3 towers were measured while another run was active"],
        "fixed": {"recipe": "configs/recipes/demo.yaml", "language model": "demo, 1.2M parameters", "batch size": 64},
        "fixed_hash": "9f2c51d07ab3",
        "detectable_difference": {"heldout": 0.034},
        "differences": [
            {"what": "visual tokens", "values": {name: facts[2] for name, facts in towers.items()}},
            {"what": "pixels", "values": {name: [56, 56] for name in towers}},
        ],
        "probe_agreement": {
            "spearman": 0.86, "low": 0.2, "high": 0.98, "n_towers": len(found),
            "note": f"{len(found)} towers: too few to say",
        },
    }  # fmt: skip
    return results, {"heldout": {"image_folder": str(folder), "questions": rows}}


def failed_tower(name: str, status: str = "failed", error: str | None = "CUDA out of memory") -> dict:
    """A tower of which no run has finished."""
    row = {"name": name, "config": f"configs/towers/{name}.yaml", "status": status, "error": error, "n_seeds": 0}
    return row | {"learning_rate": None, "cost": {}, "scores": {}, "probe": None}
