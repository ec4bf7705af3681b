"""Checks of values and tensors, and the table that a verifying command prints of them.

What a check finds is a list of (what was compared, what is wrong with it or None, its largest difference or None).
"""

LIMIT = 1e-5
MOST_LINES = 6  # of what is wrong in one check


class Report:
    """Runs checks and prints a row for each.

    A check returns [(what was compared, what is wrong with it or None, its difference or None)].
    """

    def __init__(self, verbose: bool):
        self.verbose, self.count, self.failed, self.largest = verbose, 0, [], 0.0

    def title(self, text: str) -> None:
        print(f"\n{text:<44}{'compared':>12}{'largest difference':>20}")

    def check(self, name: str, side: str, function, *args) -> None:
        self.count += 1
        try:
            found = function(*args)
        except Exception as error:  # whatever it is: a side that cannot be run does not agree
            found = [(type(error).__name__, str(error).partition("\n")[0], None)]
        wrong = [f"{label}: {what}" for label, what, _ in found if what is not None] or ([] if found else ["nothing"])
        if wrong:
            self.failed.append(f"{name} ({side})")
        sizes = [size for _, _, size in found if size is not None]
        # NaN is the largest of all
        largest = max(sizes, key=lambda size: (size != size, size), default=None)
        self.largest = max(self.largest, largest or 0.0)
        compared = f"{len(found)} {'values' if largest is None else 'tensors'}"
        shown = "" if largest is None else f"{largest:.1e}"
        print(f"  {name:<32}{side:<10}{compared:>12}{shown:>20}  {'FAIL' if wrong else 'ok'}")
        for line in wrong[: None if self.verbose else MOST_LINES]:
            print(f"      {line}")
        if len(wrong) > MOST_LINES and not self.verbose:
            print(f"      and {len(wrong) - MOST_LINES} more")
        for label, what, size in found if self.verbose else ():
            if what is None:
                print(f"      {label}" + ("" if size is None else f": {size:.1e}"))

    def close(self) -> int:
        """Print the verdict; returns the exit status."""
        if self.failed:
            print(f"\n{len(self.failed)} of {self.count} checks FAIL: {', '.join(self.failed)}")
            return 1
        print(f"\nall {self.count} checks hold, largest difference {self.largest:.1e}")
        return 0


def facts(found: dict, expected: dict) -> list:
    """Each expected value is there, and equal."""
    result = []
    for key, value in expected.items():
        there = found.get(key, "nothing")
        result.append((key, None if there == value else f"found {there!r}, expected {value!r}", None))
    return result


def same(found: dict, expected: dict) -> list:
    """Neither has what the other lacks."""
    return facts(found, expected) + [(key, "found, not expected", None) for key in found if key not in expected]


def near(found: dict, expected: dict, scaled: bool = False) -> list:
    """Each expected tensor is there within LIMIT.

    scaled: tell the difference of a hidden state in units of its largest value, where that is above 1: hidden states
        of large models grow with depth, and their rounding with them.
    """
    result = []
    for key, tensor in expected.items():
        difference = float((found[key].double() - tensor.double()).abs().max())
        if scaled and key.startswith("hidden"):
            difference /= max(1.0, float(tensor.abs().max()))
        wrong = None if difference <= LIMIT else f"differs by {difference:.1e}, expected at most {LIMIT:.0e}"
        result.append((key, wrong, difference))
    return result


def identical(found: dict, expected: dict) -> list:
    """The same names and shapes, and the same numbers to the last bit."""
    result = [entry for entry in same(shapes(found), shapes(expected)) if entry[1] is not None]
    for key in () if result else expected:
        difference = float((found[key].double() - expected[key].double()).abs().max())
        result.append((key, None if difference == 0 else f"differs by {difference:.1e}, expected 0", difference))
    return result


def under(title: str, found: list) -> list:
    """The same findings, told under a title."""
    return [(f"{title} {label}", *rest) for label, *rest in found]


def shapes(state: dict) -> dict:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
