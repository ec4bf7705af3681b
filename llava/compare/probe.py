"""What frozen towers tell of labelled pictures without a language model, and how far that ranks them as a VLM does."""

import gc
import math
import traceback
from pathlib import Path

from llava.errors import LlavaError

KINDS = ("linear", "knn", "attentive")
FEWEST_TOWERS = 8  # of which an agreement has an interval
_NORMAL_975 = 1.959963984540054


def probe(towers: dict, folder: str, output: str, *, images: dict | None = None, seed: int = 0, device=None) -> dict:
    """Linear probe, k nearest neighbours and attentive probe of each tower's frozen features.

    The features are what the projector would get (after a token compressor too, with the patches that an adaptive
    tower keeps), of pixels made as in training. See `llava.compare.probe_fits` for the three.

    Args:
        towers: {name: settings}, namespaces as a tower YAML's keys give them.
        folder: of labelled pictures, as `llava.compare.probe_folder.read_folder` takes it.
        output: folder where the features are kept, for a second call.
        images: the recipe's keys for pictures (`image_aspect_ratio`, `image_grid_pinpoints`, ...), which hold for all
            towers; without it each tower's settings say them.
        seed: of what is drawn: the test and validation pictures, the start and the order of the attentive probe.
        device: where it is computed; a GPU where there is one.

    Returns:
        {name: {"linear", "knn", "attentive": share of the test pictures told right, or None, "intervals": {kind: [low,
        high]} (95%, Wilson), "chosen": {kind: penalty, k or learning rate}, "n": test pictures, "n_classes",
        "left_out": unreadable pictures, "tokens": of a picture on average, "note": or "", "error": one line, or
        None}}. A tower that fails stops no other.

    Raises:
        LlavaError: a folder that no probe can be made of.
    """
    import torch
    from tqdm import tqdm

    from llava.compare.probe_folder import read_folder

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pictures = read_folder(folder, seed, Path(output) / "pictures.json")
    facts = {"n": len(pictures.of("test")), "n_classes": len(pictures.classes), "left_out": pictures.left_out}
    found = {}
    for name, settings in towers.items():
        try:
            found[name] = _tower_row(name, settings, images, pictures, Path(output), seed, device) | facts
        except Exception as error:  # whatever an encoder's own code raises: the others go on
            known = isinstance(error, LlavaError)
            line = next(iter(str(error).splitlines()), "")
            line = line if known else f"{type(error).__name__}: {line}".removesuffix(": ")
            tqdm.write(f"{name}: no probe: {line}" if known else traceback.format_exc().rstrip())
            found[name] = dict.fromkeys(KINDS) | facts | {"note": "", "error": line}
        gc.collect()  # a tower's weights go before the next one's come
    return found


def _tower_row(name: str, settings, images, pictures, output: Path, seed: int, device) -> dict:
    import torch
    from tqdm import tqdm

    from llava.compare.probe_features import laid_over, tower_features
    from llava.compare.probe_fits import Parts, stamp
    from llava.compare.probe_folder import read_json, write_json

    tqdm.write(f"probe of {name}: {len(pictures.paths)} pictures of {len(pictures.classes)} classes")
    features, note, folder = tower_features(laid_over(settings, images), pictures, output / "features", device)
    labels = torch.tensor(pictures.labels, device=device)
    parts = Parts(labels, *(pictures.of(part) for part in ("fit", "validation", "test")))
    asked, file = stamp(parts, seed), folder / "scores.json"  # so that a second call fits nothing anew
    known = read_json(file) if file.is_file() else None
    if not isinstance(known, dict) or known.get("asked") != asked:
        known = {"asked": asked, "row": _fitted(features, parts, seed, device)}
        write_json(file, known)
    return known["row"] | {"tokens": features.tokens_per_picture, "note": note, "error": None}


def _fitted(features, parts, seed: int, device) -> dict:
    """The scores of the three probes, their intervals, and what was chosen for them."""
    from llava.compare import probe_fits

    means = features.means.to(device)
    scored = {
        "linear": probe_fits.linear_probe(means, parts),
        "knn": probe_fits.knn_probe(means, parts),
        "attentive": probe_fits.attentive_probe(features.batch, features.moments, parts, seed),
    }
    right, total = {kind: int(one.correct.sum()) for kind, one in scored.items()}, len(parts.test)
    return {
        **{kind: count / total for kind, count in right.items()},
        "intervals": {kind: list(wilson(count, total)) for kind, count in right.items()},
        "chosen": {kind: one.chosen for kind, one in scored.items()},
    }


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% interval of a share, right / total (Wilson 1927); it stays within 0 and 1."""
    share, z = right / total, _NORMAL_975
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    reach = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def agreement(probe: dict, vlm: dict) -> dict:
    """How far a probe ranks towers as their scores inside a VLM do.

    Spearman's rank correlation (equal scores share their mean rank) with a 95% interval by Fisher's z of variance
    (1 + r^2 / 2) / (n - 3) (Bonett and Wright 2000). It says what other towers of the kind compared would show; what
    the scores themselves are uncertain by is not in it. Of ranks that agree wholly, where that interval has no width,
    the bound is taken from the next lower correlation that n ranks can have.

    Args:
        probe, vlm: {tower: score}; towers without a score in both count for nothing.

    Returns:
        {"spearman", "low", "high", "n_towers", "note"}: below 8 towers without an interval, and with all scores of a
        side equal without a correlation: those are None, and the note says why.
    """
    names = [name for name in probe if _is_score(probe[name]) and _is_score(vlm.get(name))]
    result = {"spearman": None, "low": None, "high": None, "n_towers": len(names), "note": ""}
    towers = f"{len(names)} tower{'' if len(names) == 1 else 's'}"
    if len(names) < FEWEST_TOWERS:
        result["note"] = f"{towers}: too few to say"
    r = _correlation(*(_ranks([scores[name] for name in names]) for scores in (probe, vlm)))
    if r is None:
        result["note"] = result["note"] or f"{towers} with equal scores: no ranks to compare"
        return result
    result["spearman"] = r
    if len(names) >= FEWEST_TOWERS:
        result["low"], result["high"] = _interval(r, len(names))
    return result


def _is_score(value) -> bool:
    return value is not None and math.isfinite(value)


def _ranks(values: list[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    order = sorted(values)
    return [order.index(value) + (order.count(value) + 1) / 2 for value in values]


def _correlation(a: list[float], b: list[float]) -> float | None:
    """Pearson's; None where one side does not vary."""
    if len(a) < 2 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    shared = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    own = math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))
    return max(-1.0, min(1.0, shared / own))


def _interval(r: float, n: int) -> tuple[float, float]:
    most = 1 - 12 / (n * (n * n - 1))  # two neighbours changed places
    inside = max(-most, min(most, r))
    reach = _NORMAL_975 * math.sqrt((1 + inside * inside / 2) / (n - 3))
    low, high = math.tanh(math.atanh(inside) - reach), math.tanh(math.atanh(inside) + reach)
    return (-1.0 if r < -most else low), (1.0 if r > most else high)
