"""A model's generation settings in a form that transformers saves.

Published models have settings that contradict each other (Vicuna and Llama 2 name a temperature and do_sample false).
transformers loads most of them, and refuses to save them once a token id has changed, as it does in training.
"""

import re

from transformers import GenerationConfig

from llava.utils import rank0_print

# what counts in sampling alone -> the values that sampling takes
_SAMPLING = {
    "temperature": lambda value: value > 0,
    "top_k": lambda value: value >= 0 and value == int(value),
    "top_p": lambda value: 0 <= value <= 1,
    "min_p": lambda value: 0 <= value <= 1,
    "top_h": lambda value: 0 < value <= 1,
    "typical_p": lambda value: 0 < value <= 1,
    "epsilon_cutoff": lambda value: 0 <= value < 1,
    "eta_cutoff": lambda value: 0 <= value < 1,
}


_DEFAULTS = GenerationConfig().to_dict()


class _Unchecked(GenerationConfig):
    """Read as they stand: some settings transformers refuses to load, too."""

    def validate(self, *args, **kwargs):
        pass


def generation_settings(path: str, cache_dir: str | None = None) -> GenerationConfig:
    """A model's generation settings as it may save them: `mended` from generation_config.json, else config.json.

    Args:
        path: folder or hub id.
        cache_dir: as transformers'.
    """
    try:
        found = read_settings(path, cache_dir=cache_dir)
    except OSError:  # there is no such file; older models have them in config.json
        found = read_settings(path, cache_dir=cache_dir, config_file_name="config.json", _from_model_config=True)
    return mended(found, path)


def read_settings(path: str, **kwargs) -> GenerationConfig:
    """generation_config.json as it stands; `kwargs` as transformers'. Raises OSError where there is none."""
    return _Unchecked.from_pretrained(path, **kwargs)


def mended(found: GenerationConfig, path: str) -> GenerationConfig:
    """Settings that pass `GenerationConfig.validate(strict=True)`; those of `path` that pass already stay as they are.

    Sampling values without do_sample get it, since they mean sampling; what cannot be kept is left out. One line names
    what is changed.
    """
    before, settings = found.to_dict(), _Unchecked(**found.to_dict())
    if _faults(settings):
        _mend_sampling(settings)
    while names := _faults(settings):
        for name in names:
            if name in _DEFAULTS:
                setattr(settings, name, _DEFAULTS[name])
            else:
                delattr(settings, name)
    after = settings.to_dict()
    changed = [f"{name} {before[name]} -> {after.get(name)}" for name in before if before[name] != after.get(name)]
    if changed:
        rank0_print(
            f"note: {path}: its generation settings do not go together; they are saved with {', '.join(changed)}"
        )
    return GenerationConfig.from_dict(after)


def _mend_sampling(settings) -> None:
    """Sample where values of sampling are set, and drop the values that it would not take."""
    temperature = settings.temperature
    if isinstance(temperature, (int, float)) and temperature <= 0:  # another way to say that nothing is sampled
        settings.do_sample = False
        for name in _SAMPLING:
            setattr(settings, name, None)
        return
    for name, fits in _SAMPLING.items():
        value = getattr(settings, name, None)
        if value is not None and not (isinstance(value, (int, float)) and fits(value)):
            setattr(settings, name, None)
    several = (settings.num_return_sequences or 1) > 1 and (settings.num_beams or 1) == 1
    if several or set(_faults(settings)) & _SAMPLING.keys():
        settings.do_sample = True


def _faults(settings) -> list[str]:
    """Names of the settings that transformers objects to."""
    values = {name: value for name, value in settings.to_dict().items() if value is not None}
    try:
        checked = GenerationConfig()
        checked.__dict__.update(settings.__dict__)
        checked.validate(strict=True)
    except (ValueError, TypeError) as error:
        listed = re.findall(r"^- `(\w+)`:", str(error), flags=re.MULTILINE)
        named = [name for name in re.findall(r"`(\w+)`", str(error)) if name in values]
        rest = [name for name in values if not name.endswith("_token_id")]
        return listed or named[:1] or rest or list(values)
    return []
