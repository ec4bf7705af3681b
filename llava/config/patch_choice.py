"""`PatchChoice`: which patches are kept, said once for configs, image processors, evaluation and pictures.

Neither torch nor anything that needs it is imported here, so that a config can be checked and a `--help` printed.
"""

import contextlib
import math
import operator
import random
from dataclasses import dataclass

from llava.errors import LlavaError

METHODS = ("v1", "v2", "budget")  # the selections of `selection.py`
ALL = ("all", "none", None)  # in place of a method: no choice, every base patch is kept
IMPORTANCES = ("entropy", "laplacian", "reconstruction")  # what a patch is measured by, see `importance.py`
IMPORTANCE_ALIASES = {"upsample_mse": "reconstruction"}  # published
NUM_SCALES = 3  # patch sizes, each twice the one before
THRESHOLDS = (3.0, 2.0)  # v1's published ones: bits of entropy for two and four base patches a side
MEMBERS = ("method", "alpha", "thresholds", "importance", "num_scales")
PUBLISHED = {  # member -> its published argument name
    "method": "patch_selection_method",
    "alpha": "alpha",
    "thresholds": "patch_thresholds",
    "importance": "patch_importance",
}


@dataclass(frozen=True)
class PatchChoice:
    """A selection of patches with its settings. Where all patches are kept there is None in its place.

    method: v1 (thresholds), v2 (a threshold relative to the image's mean) or budget (a share of the base patches).
    alpha: budget: share of the base patches; v2: the threshold over the mean. A pair (lowest, highest): each image of a
        training draws its own, evaluation and saved folders have the middle. None with v1.
    importance: entropy, laplacian or reconstruction (also called upsample_mse).
    thresholds: v1: one for each size above the base, the smaller size first; known for entropy and up to three sizes.
    num_scales: patch sizes, each twice the one before.

    Raises:
        LlavaError: "MEMBER: ..." for a value that cannot be, one that is missing, or one that the method does not use.
    """

    method: str
    alpha: float | tuple[float, float] | None = None
    importance: str = "entropy"
    thresholds: tuple[float, ...] | None = None
    num_scales: int = NUM_SCALES

    def __post_init__(self):
        if self.method not in METHODS:
            raise LlavaError(f"method: found {self.method!r}, expected one of {', '.join(METHODS)}, or all")
        importance = check_importance(self.importance)
        used, unused = ("thresholds", "alpha") if self.method == "v1" else ("alpha", "thresholds")
        if (found := getattr(self, unused)) is not None:
            users = "budget and v2" if unused == "alpha" else "v1"
            raise LlavaError(f"{unused}: has no part in method {self.method}, it is used by {users}; found {found!r}")
        scales = whole_number(self.num_scales)
        if scales is None or not 1 <= scales <= 8:
            raise LlavaError(f"num_scales: found {self.num_scales!r}, expected a whole number from 1 to 8")
        object.__setattr__(self, "num_scales", scales)
        value = getattr(self, used)
        if value is None and used == "thresholds" and importance == "entropy" and self.num_scales <= NUM_SCALES:
            value = THRESHOLDS[: self.num_scales - 1]
        if value is None:
            raise LlavaError(f"{used}: missing, which {self.method} needs")
        value = check_alpha(value) if used == "alpha" else tuple(check_thresholds(value, self.num_scales))
        check_together(self.method, importance)
        object.__setattr__(self, "importance", importance)
        object.__setattr__(self, used, value)

    # --- from and to other forms ---

    @classmethod
    def from_mapping(cls, mapping, where: str = "adaptive_patches") -> "PatchChoice | None":
        """From `adaptive_patches` of a config; None, or a method of all or none, keeps all patches.

        Raises:
            LlavaError: "WHERE: ...", as the class and for an unknown member.
        """
        if mapping is None or isinstance(mapping, PatchChoice):
            return mapping
        if not isinstance(mapping, dict):
            raise LlavaError(f"{where}: found {mapping!r}, expected a mapping such as {{method: budget, alpha: 0.3}}")
        unknown = [member for member in mapping if member not in MEMBERS]
        if unknown:
            raise LlavaError(f"{where}: found {', '.join(map(repr, unknown))}, expected some of {', '.join(MEMBERS)}")
        if mapping.get("method") is None:
            raise LlavaError(f"{where}: method: found None, expected one of {', '.join(METHODS)}, or all")
        return cls._named(mapping, {member: f"{where}: {member}" for member in MEMBERS})

    @classmethod
    def completed(cls, given: dict, own: dict, names: dict[str, str]) -> "PatchChoice | None":
        """Some members of a choice, the others as a model's image processor has them.

        Args:
            given: members by name.
            own: method, alpha, thresholds and importance; those that the method does not use do not count.
            names: what a member is called in messages.
        """
        method = given.get("method", own["method"])
        unused = MEMBERS if method in ALL else ("alpha",) if method == "v1" else ("thresholds",)
        own = {member: value for member, value in own.items() if member not in unused}
        return cls._named({**own, "method": method, **given}, names)

    @classmethod
    def from_published(
        cls,
        patch_selection_method=None,
        alpha=1.0,
        patch_thresholds=None,
        patch_importance="entropy",
        *,
        num_scales: int = NUM_SCALES,
        names: dict[str, str] = PUBLISHED,
    ) -> "PatchChoice | None":
        """From the published arguments; those that the method does not use are checked and left out."""
        if patch_selection_method in ALL:
            return None
        with naming(names):
            if alpha is not None:
                check_alpha(alpha)
            if patch_thresholds is not None:
                check_thresholds(patch_thresholds, num_scales)
        own = dict(method=patch_selection_method, alpha=alpha, thresholds=patch_thresholds, importance=patch_importance)
        return cls.completed({"num_scales": num_scales}, own, names)

    @classmethod
    def parse(cls, text: str, where: str = "selections") -> "PatchChoice | None":
        """From none, v1, v2 (alpha 1), v2:ALPHA or budget:ALPHA, as a command line has it and `str` writes it."""
        method, _, number = text.partition(":")
        with contextlib.suppress(LlavaError, ValueError):
            if method in ALL and not number:
                return None
            return cls(method, alpha=float(number) if number else 1.0 if method == "v2" else None)
        raise LlavaError(f"{where}: found {text!r}, expected none, v1, v2, v2:ALPHA or budget:ALPHA")

    @classmethod
    def _named(cls, members: dict, names: dict[str, str]) -> "PatchChoice | None":
        """The choice of these members; messages have `names` in place of theirs."""
        method = members["method"]
        if method not in ALL:
            with naming(names):
                return cls(**members)
        lost = next((member for member in members if member != "method" and members[member] is not None), None)
        if lost is not None:
            said = f"{members[lost]} with {names['method'].rpartition(' ')[2]} {method}"
            raise LlavaError(f"{names[lost]}: found {said}, expected {', '.join(METHODS)}")
        return None

    def to_published(self) -> dict:
        """The published arguments that the method uses; of a range of alphas, the middle."""
        values = {"method": self.method, "importance": self.importance, "alpha": self.middle}
        values |= {"thresholds": self.thresholds and list(self.thresholds)}
        return {PUBLISHED[member]: value for member, value in values.items() if value is not None}

    def to_mapping(self) -> dict:
        """What `from_mapping` reads, for YAML or JSON, without members at their default."""
        values = {member: getattr(self, member) for member in MEMBERS}
        values = {member: value for member, value in values.items() if value != getattr(type(self), member, None)}
        return {member: list(value) if isinstance(value, tuple) else value for member, value in values.items()}

    def __str__(self) -> str:
        """What `parse` reads back: budget:0.5, v2:1, v1; of a range the middle, which is what is evaluated."""
        return self.method if self.alpha is None else f"{self.method}:{repr(self.middle).removesuffix('.0')}"

    @property
    def description(self) -> str:
        """For people: budget, alpha 0.3 to 1.0."""
        if self.alpha is None:
            return f"{self.method}, thresholds {self.thresholds}"
        return f"{self.method}, alpha {' to '.join(map(str, self.alpha)) if self.draws else self.alpha}"

    # --- alpha ---

    @property
    def draws(self) -> bool:
        """Whether each image of a training has an alpha of its own."""
        return isinstance(self.alpha, tuple)

    @property
    def middle(self) -> float | None:
        """alpha, or the middle of its range."""
        return round(sum(self.alpha) / 2, 6) if self.draws else self.alpha

    def draw(self, seed: int, epoch: int, record: int, image: int) -> float | None:
        """alpha of one image, drawn evenly where it is a range.

        From the four numbers alone: the same on any number of processes and workers, and after a resumption.

        Args:
            seed: of the run.
            epoch: from 0.
            record: its index in the data.
            image: which of the record's images, from 0.
        """
        if not self.draws:
            return self.alpha
        return random.Random(f"{seed}/{epoch}/{record}/{image}").uniform(*self.alpha)


@contextlib.contextmanager
def naming(names: dict[str, str]):
    """Messages about "MEMBER: ..." get the name that the member was given under."""
    try:
        yield
    except LlavaError as error:
        member, _, rest = str(error).partition(": ")
        raise LlavaError(f"{names.get(member, member)}: {rest}") from None


def check_importance(name: str, called: str = "importance", also: tuple[str, ...] = ()) -> str:
    """The importance's own name; `LlavaError` for an unknown one, under the name that the argument was `called`."""
    known = IMPORTANCE_ALIASES.get(name, name) if isinstance(name, str) else name
    if known not in IMPORTANCES:
        expected = ", ".join((*IMPORTANCES, *IMPORTANCE_ALIASES, *also))
        raise LlavaError(f"{called}: found {name!r}, expected {expected}")
    return known


def check_together(method: str, importance: str) -> None:
    """Refuse a budget, which is spent by the importance of base patches, where that is 0 for all of them."""
    if method == "budget" and importance == "reconstruction":
        raise LlavaError(
            "importance: found 'reconstruction' with method budget, expected entropy or laplacian: the reconstruction "
            "error of all base patches is 0"
        )


def number(value) -> float | None:
    """A number of Python, numpy or torch as a float; None for anything else, truth values and text among it."""
    kind = str(getattr(value, "dtype", type(value).__name__))
    if kind.endswith(("bool", "bool_", "str")) or getattr(value, "ndim", 0) or not hasattr(value, "__float__"):
        return None
    return float(value)


def whole_number(value) -> int | None:
    """As `number`, of types of whole numbers alone."""
    return operator.index(value) if number(value) is not None and hasattr(value, "__index__") else None


def check_alpha(alpha) -> float | tuple[float, float]:
    """A number, or the ends of a range as a tuple; `LlavaError` unless they are finite, not negative and in order."""
    pair = isinstance(alpha, (list, tuple)) or getattr(alpha, "ndim", 0) == 1
    values = [number(value) for value in (alpha if pair else [alpha])]
    fit = len(values) == 1 + pair and all(value is not None and 0 <= value < math.inf for value in values)
    if not fit or values[0] > values[-1]:
        raise LlavaError(
            f"alpha: found {alpha!r}, expected a number, or two from the lower to the higher one, each 0 or more"
        )
    return tuple(values) if pair else values[0]


def check_thresholds(thresholds, num_scales: int) -> list[float]:
    """The thresholds as floats; `LlavaError` unless there is one, finite, for each level above the first."""
    listed = isinstance(thresholds, (list, tuple)) or getattr(thresholds, "ndim", 0) == 1
    given = thresholds if listed else [None]
    try:
        values = [float(value) if isinstance(value, str) else number(value) for value in given]
    except ValueError:
        values = [None]
    if None in values:
        raise LlavaError(f"thresholds: found {thresholds!r}, expected a list of numbers")
    if len(values) != num_scales - 1 or not all(map(math.isfinite, values)):
        raise LlavaError(
            f"thresholds: found {values}, expected {num_scales - 1} numbers for {num_scales} scales, a finite one for "
            "each size above the base"
        )
    return values
