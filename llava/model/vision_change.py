"""What becomes of a checkpoint's vision half in a run that may name another one; imports neither torch nor towers."""

import os
from dataclasses import dataclass
from types import SimpleNamespace

from llava.config.own_tower import same_class
from llava.config.schema import own_keys
from llava.model.vision_settings import uses_compression

# config keys that describe the vision side; a run's arguments are copied into them
VISION_KEYS = (
    "mm_vision_tower",
    "mm_vision_tower_type",
    "tower_args",
    "vision_tower_image",
    "vision_tower_weights",
    "mm_vision_select_layer",
    "mm_vision_select_feature",
    "mm_patch_merge_type",
    "mm_projector_type",
    "s2",
    "s2_scales",
    "image_size",
    "vision_tower_stage",
    "use_token_compression",
    "compression_input_size",
    "compression_output_size",
    "adaptive_patches",
)
# of them, what describes one encoder and no other
SAID_OF_TOWER = (
    *("mm_vision_tower_type", "tower_args", "vision_tower_image", "vision_tower_weights"),
    *("image_size", "vision_tower_stage"),
)
_TOWER_KEYS = {"mm_vision_tower", *SAID_OF_TOWER, "s2", "s2_scales"}
_SIZE_KEYS = {"image_size", "vision_tower_stage"}  # which an encoder's forward sees to, the weights being the same
_FEATURE_KEYS = _TOWER_KEYS | {"mm_vision_select_layer", "mm_vision_select_feature"}
_COMPRESSION_KEYS = {"use_token_compression", "compression_input_size", "compression_output_size"}


@dataclass(frozen=True)
class Origin:
    """Where the weights of a part come from; `random`: they are drawn for this run."""

    text: str
    random: bool = False


@dataclass(frozen=True)
class VisionChange:
    """From the vision half of a checkpoint to that of a run.

    Attributes:
        before: `VISION_KEYS` and `mm_hidden_size` of the checkpoint; None: it has no vision half.
        after: the same keys of the run's model, `mm_hidden_size` left out.
    """

    before: dict | None
    after: dict

    @classmethod
    def between(cls, old, new, folder: str | None) -> "VisionChange":
        """From what a checkpoint's config says to a changed one: mappings or objects with the keys as attributes.

        Args:
            folder: the checkpoint's, in which its tower may lie.
        """
        before = {key: _value(old, key) for key in (*VISION_KEYS, "mm_hidden_size")}
        after = {key: _value(new, key) for key in VISION_KEYS}
        if before["mm_vision_tower"] is None:
            return cls(None, after)
        if same_tower(before["mm_vision_tower"], after["mm_vision_tower"], folder):
            after["mm_vision_tower"] = before["mm_vision_tower"]
        if same_class(before["mm_vision_tower_type"], after["mm_vision_tower_type"]):
            after["mm_vision_tower_type"] = before["mm_vision_tower_type"]
        return cls(before, after)

    @property
    def changed(self) -> set[str]:
        return {key for key in VISION_KEYS if self.before is None or self.before[key] != self.after[key]}

    @property
    def new_tower(self) -> bool:
        """The tower is loaded from its source, in place of what the checkpoint holds."""
        if self.before is None:
            return True
        fixed = self.before["mm_vision_tower_type"] == "timm"  # its positions are weights of the one size
        return bool(self.changed & (_TOWER_KEYS if fixed else _TOWER_KEYS - _SIZE_KEYS))

    @property
    def new_size(self) -> bool:
        """The checkpoint's tower sees pictures at another size, or gives the map of another stage."""
        return not self.new_tower and bool(self.changed & _SIZE_KEYS)

    def new_compressor(self, feature_size: int, had: int | None) -> bool:
        """The compressor is made anew, for features of so many channels; `had`: those that the checkpoint's takes."""
        return (
            self.new_tower
            or bool(self.changed & (_COMPRESSION_KEYS | _SIZE_KEYS))
            or (had is not None and had != feature_size)
        )

    def new_projector(self, hidden_size: int) -> bool:
        """The projector is made anew, for a tower of so many channels."""
        had = self.before and self.before["mm_hidden_size"]
        return self.before is None or had not in (None, hidden_size) or "mm_projector_type" in self.changed

    def origins(self, tower, projector_file: str | None, compressor_file: str | None) -> dict[str, Origin]:
        """{part: where it starts from}, of the parts that the model with this tower has.

        Args:
            projector_file, compressor_file: what the run starts them from, if anything.
        """
        found = {"mm_vision_tower": Origin(self.after["mm_vision_tower"] if self.new_tower else "the checkpoint")}
        if tower.token_compressor is not None:
            found["mm_token_compressor"] = _origin(compressor_file, self._renews_compressor(tower))
        if self.after["mm_projector_type"] != "identity":
            found["mm_mlp_adapter"] = self._projector_origin(tower.hidden_size, projector_file)
        return found

    def _renews_compressor(self, tower) -> bool:
        if self.before is None or not uses_compression(SimpleNamespace(**self.before)):
            return True
        had, scales = self.before["mm_hidden_size"], tower.hidden_size // tower.feature_size
        return self.new_compressor(tower.feature_size, had and had // scales)

    def _projector_origin(self, hidden_size: int, file: str | None) -> Origin:
        kept = _origin(file, self.new_projector(hidden_size))
        other = self.before is not None and self.changed & _FEATURE_KEYS
        if file or kept.random or not other:
            return kept
        was = ", ".join(f"{key} {self.before[key]}" for key in VISION_KEYS if key in other)
        return Origin(f"the checkpoint, where it was trained behind another tower ({was}) whose width fits")


def _origin(file: str | None, new: bool) -> Origin:
    if file:
        return Origin(file)
    return Origin("new and random", random=True) if new else Origin("the checkpoint")


def _value(source, key: str):
    """A key's value; where it is not told (LLaVA-NeXT's checkpoints lack what is this project's own), the default."""
    found = source.get(key) if isinstance(source, dict) else getattr(source, key, None)
    default = own_keys()[key].default if found is None and key in own_keys() else None
    return found or default or None


def same_tower(had: str, given: str | None, folder: str | None) -> bool:
    """Whether a run names the tower that a checkpoint names: equal, one folder or class under two names, or a folder
    inside the checkpoint's, `folder`."""
    inside = os.path.join(folder or "", had)
    return had == given or same_class(had, given) or any(_same_folder(given, path) for path in (had, inside))


def _same_folder(a, b) -> bool:
    """Two spellings of one existing folder."""
    return bool(a and b) and os.path.isdir(a) and os.path.realpath(a) == os.path.realpath(b)
