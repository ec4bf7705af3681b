"""Whether a LLaVA checkpoint and a folder of transformers are the same model, one in memory after the other.

Both get the same pictures and questions through their own pipelines: pixels, prompts, token ids, token counts, logits
and greedy answers are compared.
"""

import gc
import json
import os
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from llava.errors import LlavaError
from llava.tools.hf.probes import Probe, llava_prompt, messages, probes

FLOAT32_TOLERANCE = 1e-4  # absolute, on logits
HALF_TOLERANCE = 4  # on logits, in units of the dtype's precision times the largest logit
PIXEL_TOLERANCE = 1e-6
NEW_TOKENS = 12
POSITIONS = 128  # logits are compared at so many places of a sequence, half of them at its end


class Report(NamedTuple):
    """What was found: the largest difference of logits, its limit, the dtype, how many greedy tokens agreed.

    blank: whether transformers' tokenizer lacks the blank behind an image.
    """

    difference: float
    tolerance: float
    dtype: str
    tokens: int
    blank: bool


# --- how exact the comparison can be ----------------------------------------------------------------------------------


def check_device(device: str) -> None:
    """Raise LlavaError where there is no such device."""
    import torch

    if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        raise LlavaError(f"--device: found {device!r}, expected cpu, or cuda where there is one")


def available_memory(device: str) -> int:
    """Bytes that can be had on a device."""
    import torch

    if device != "cpu":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def choose_dtype(weights, device: str) -> str:
    """float32 where one copy of the weights fits into memory in it, else the dtype of most weights.

    Args:
        weights: `streaming.Weights` of the model.
        device: "cpu" or a CUDA device.
    """
    count, kinds = 0, Counter()
    for stored in weights.stored.values():
        count += stored.numel
        kinds[stored.dtype] += stored.numel
    if count * 4 * 1.15 + 2**30 <= available_memory(device):
        return "float32"
    stored = kinds.most_common(1)[0][0]
    return "bfloat16" if device == "cpu" and stored == "float16" else stored  # float16 is half done on CPUs


def limit(dtype: str, logits) -> float:
    """The largest difference of logits that passes."""
    import torch

    if dtype == "float32":
        return min(FLOAT32_TOLERANCE, 1e-3 * logits.abs().max().item())  # some models' logits are all small
    return HALF_TOLERANCE * torch.finfo(getattr(torch, dtype)).eps * logits.abs().max().item()


# --- the two sides ----------------------------------------------------------------------------------------------------


@contextmanager
def _greedy(model, eos: list[int], pad: int | None):
    """The model's settings replaced by greedy decoding, since a repetition penalty would count other tokens."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos or None, pad_token_id=pad
    )
    yield


def _kept(length: int):
    """Positions whose logits are compared."""
    import torch

    if length <= POSITIONS:
        return torch.arange(length)
    spread = torch.linspace(0, length - 1, POSITIONS // 2).long()
    return torch.cat([spread, torch.arange(length - POSITIONS // 2, length)]).unique()


def _write(folder: str, index: int, tensors: dict, text: str) -> None:
    from safetensors.torch import save_file

    found = {key: value.detach().cpu().float().contiguous() for key, value in tensors.items()}
    save_file(found, os.path.join(folder, f"{index}.safetensors"), {"text": json.dumps(text)})


def _read(folder: str, index: int) -> tuple[dict, str]:
    from safetensors import safe_open

    with safe_open(os.path.join(folder, f"{index}.safetensors"), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["text"])  # noqa: SIM118


@dataclass(frozen=True)
class Setting:
    """How both models are run.

    dtype: of the computation.
    device: "cpu" or a CUDA device.
    eos: ids that end an answer.
    rounded: dtype that the weights were converted to, which those of the source are rounded to as well.
    """

    dtype: str
    device: str
    eos: list[int]
    rounded: str | None = None

    def round(self, model) -> None:
        """Round a source's weights, one after the other."""
        import torch

        if self.rounded:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(getattr(torch, self.rounded)).to(parameter.dtype)


def observe_llava(path: str, template: str, out: str, run: Setting, is_source: bool) -> list[Probe]:
    """Run the probes through a LLaVA checkpoint and write what came out to the folder `out`; returns the probes."""
    import torch
    from tqdm import tqdm

    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    name = get_model_name_from_path(path)
    tokenizer, model, images, _ = load_pretrained_model(
        path, None, name, device_map=run.device, torch_dtype=run.dtype, attn_implementation="sdpa"
    )
    if is_source:
        run.round(model)
    asked = probes(model.config, model.get_vision_tower())
    count = model.visual_token_counter()
    with torch.inference_mode(), _greedy(model, run.eos, tokenizer.pad_token_id):
        for index, probe in enumerate(tqdm(asked, desc="running LLaVA", unit="question")):
            prompt = llava_prompt(template, probe)
            ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
            given, length, found = {}, len(ids), {"ids": ids}
            if probe.picture is not None:
                pixels = process_images([probe.picture], images, model.config)[0]
                found["pixels"] = pixels
                length += count(pixels.shape, probe.picture.size) - 1
                given = {"images": [pixels.to(run.device, model.dtype)], "image_sizes": [probe.picture.size]}
            found["length"] = torch.tensor(length)
            ids = ids[None].to(run.device)
            kept = _kept(length).to(run.device)
            assert (ids == IMAGE_TOKEN_INDEX).sum() == len(given.get("images", ()))
            found["logits"] = model(ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept, **given).logits[0]
            found["tokens"] = model.generate(ids, attention_mask=torch.ones_like(ids), **given)[0]
            _write(out, index, found, prompt)
    return asked


def hf_inputs(processor, probe: Probe, prompt: str | None):
    """(prompt text, what the model is given): by the chat template, or of a prompt that is given."""
    if prompt is None:
        prompt = processor.apply_chat_template(messages(probe), add_generation_prompt=True, tokenize=False)
    images = None if probe.picture is None else [probe.picture]
    return prompt, processor(text=prompt, images=images, return_tensors="pt")


def observe_hf(
    path: str, asked: list[Probe], expected: str, own_prompts: bool, out: str, run: Setting, is_source: bool
):
    """Run the probes through a transformers folder and write what came out to the folder `out`.

    Returns whether LLaVA's blank behind an image was put into its ids.

    Args:
        asked: the probes.
        expected: folder of what LLaVA gave, compared before the weights are read as far as the inputs go.
        own_prompts: let its chat template write the prompts; else it is given LLaVA's.
        run: how.

    Raises:
        LlavaError: other inputs, or weights that do not fit the folder's config.
    """
    import torch
    from tqdm import tqdm

    from llava.tools.hf.processor import load_processor

    processor = load_processor(path)
    inputs, blank = [], False
    for index, probe in enumerate(asked):
        ours, prompt = _read(expected, index)
        text, given = hf_inputs(processor, probe, None if own_prompts else prompt)
        blank |= _compare_inputs(probe, ours, prompt, text, given, processor, own_prompts)
        inputs.append((text, given))
    model = load_hf(path, run.dtype, run.device)
    if is_source:
        run.round(model)
    with torch.inference_mode(), _greedy(model, run.eos, processor.tokenizer.pad_token_id):
        for index, (text, given) in enumerate(tqdm(inputs, desc="running transformers", unit="question")):
            given = given.to(run.device)
            if "pixel_values" in given:
                given["pixel_values"] = given["pixel_values"].to(model.dtype)
            length = given["input_ids"].shape[1]
            logits = model(**given, logits_to_keep=_kept(length).to(run.device)).logits[0]
            tokens = model.generate(**given)[0, length:]
            _write(out, index, {"logits": logits, "tokens": tokens}, text)
    return blank


def load_hf(path: str, dtype: str, device: str):
    """A transformers folder's model; LlavaError where a weight is missing or has another shape."""
    import torch

    from llava.tools.hf.configs import read_hf

    model_class = read_hf(path)[1].load("ForConditionalGeneration")
    try:
        model, info = model_class.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise LlavaError(f"{path}: transformers cannot load it ({str(error).splitlines()[0][:160]})") from None
    if info["missing_keys"]:
        raise LlavaError(f"{path}: transformers misses {', '.join(sorted(info['missing_keys'])[:3])}")
    return model.eval().to(device)


# --- the comparison ---------------------------------------------------------------------------------------------------


def _compare_inputs(probe: Probe, ours: dict, prompt: str, text: str, given, processor, own_prompts: bool) -> bool:
    """Raise LlavaError where prompts, token ids or pixels differ.

    Where LLaVA's prompts were given, transformers' ids may lack LLaVA's blank behind the image: then `given` gets
    LLaVA's ids, and True is returned.
    """
    where = f"not the same model: {probe.name}"
    if text != prompt:
        raise LlavaError(f"{where}: transformers' prompt is {text!r}, LLaVA's {prompt!r}")
    found, length = given["input_ids"][0].tolist(), int(ours["length"])
    expected = _spread(ours["ids"].long().tolist(), length, processor.image_token_id)
    blank = False
    if found != expected and not own_prompts:
        blank = found == _without_blank(expected, processor)
    if blank:
        import torch

        given["input_ids"] = torch.tensor([expected])
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    elif len(found) != length:
        raise LlavaError(f"{where}: transformers' sequence has {len(found)} tokens, LLaVA's {length}")
    elif found != expected:
        place = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise LlavaError(
            f"{where}: transformers' token ids are {found[place : place + 8]} from token {place} on, LLaVA's "
            f"{expected[place : place + 8]}"
        )
    if probe.picture is not None:
        _compare_pixels(where, ours["pixels"], given["pixel_values"][0])
    return blank


def _spread(ids: list[int], length: int, image_token: int) -> list[int]:
    """LLaVA's ids with the image token repeated to the length of the whole sequence."""
    from llava.constants import IMAGE_TOKEN_INDEX

    if IMAGE_TOKEN_INDEX not in ids:
        return ids
    at = ids.index(IMAGE_TOKEN_INDEX)
    return ids[:at] + [image_token] * (length - len(ids) + 1) + ids[at + 1 :]


def _without_blank(ids: list[int], processor) -> list[int]:
    """Ids without the blank behind the last image token."""
    image = processor.image_token_id
    if image not in ids:
        return ids
    behind = len(ids) - ids[::-1].index(image)
    blank = processor.tokenizer.convert_tokens_to_ids("\u2581")
    return ids[:behind] + ids[behind + 1 :] if ids[behind : behind + 1] == [blank] else ids


def _compare_pixels(where: str, ours, theirs) -> None:
    if theirs.shape != ours.shape:
        raise LlavaError(f"{where}: transformers' pixels are {tuple(theirs.shape)}, LLaVA's {tuple(ours.shape)}")
    difference = (theirs.float() - ours).abs().max().item()
    if not difference <= PIXEL_TOLERANCE:
        raise LlavaError(f"{where}: pixels differ by {difference:.1e}, more than {PIXEL_TOLERANCE:.0e}")


def _compare_outputs(probe: Probe, ours: dict, theirs: dict, dtype: str) -> tuple[float, float]:
    """(difference of logits, its limit)."""
    where = f"not the same model: {probe.name} (in {dtype})"
    width = min(ours["logits"].shape[-1], theirs["logits"].shape[-1])  # either may have spare rows
    a, b = ours["logits"][:, :width], theirs["logits"][:, :width]
    difference, most = (a - b).abs().max().item(), limit(dtype, a)
    if not difference <= most:  # NaN too
        place = int((a - b).abs().nan_to_num(float("inf")).amax(-1).argmax())
        raise LlavaError(
            f"{where}: logits differ by {difference:.1e}, more than {most:.1e}, the most at row {place} of {len(a)} "
            "compared"
        )
    mine, other = ours["tokens"].long().tolist(), theirs["tokens"].long().tolist()
    if mine != other:
        raise LlavaError(f"{where}: transformers answers {other}, LLaVA {mine}")
    return difference, most


def verify(llava: str, hf: str, template: str, own_prompts: bool, source: str, device="cpu", eos=(), rounded=None):
    """Hold a LLaVA checkpoint and a transformers folder against each other; returns a `Report`.

    Args:
        llava, hf: the folders.
        template: LLaVA's conversation template.
        own_prompts: let the folder's chat template write its prompts.
        source: the one of the two that the other was made from.
        device, eos, rounded: as `Setting`.

    Raises:
        LlavaError: they differ; says in what and where.
    """
    from llava.tools.hf.streaming import Weights

    run = Setting(choose_dtype(Weights(llava), device), device, list(eos), rounded)
    with tempfile.TemporaryDirectory() as work:
        ours, theirs = (os.path.join(work, side) for side in ("llava", "hf"))
        os.mkdir(ours)
        os.mkdir(theirs)
        asked = observe_llava(llava, template, ours, run, source == llava)
        free()
        blank = observe_hf(hf, asked, ours, own_prompts, theirs, run, source == hf)
        free()
        found, tokens = [], 0
        for index, probe in enumerate(asked):
            a, b = _read(ours, index)[0], _read(theirs, index)[0]
            found.append(_compare_outputs(probe, a, b, run.dtype))
            tokens += len(a["tokens"])
    worst = max(found)
    return Report(worst[0], worst[1], run.dtype, tokens, blank)


def free() -> None:
    """Give back what the model took that went out of scope."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
