"""One mixture of samples, four ways through a training step: LLaVA-NeXT's, stock transformers', this project's unpacked
and packed. Same weights, same pictures, same tokens.

A way takes PIL pictures and token ids and gives the loss; preparing the pixels is part of it.
"""

import json
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

MIXTURE = Path(__file__).parent / "train_mixture.json"
SEED = 20261125  # that it was made with


def make_mixture(seed: int, count: int) -> list[dict]:
    """Sizes and lengths of samples as instruction data mix them: of 100, 45 are text, 35 have a picture of anyres in up
    to five crops, 10 one that is one crop and an overview, 10 two to four pictures."""
    random = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=random))

    made = []
    for _ in range(count):
        kind = between(1, 100)
        pictures = 0 if kind <= 45 else 1 if kind <= 90 else between(2, 4)
        wide, high = ((200, 336), (200, 336)) if 80 < kind <= 90 else ((500, 1100), (400, 900))
        images = [[between(*wide), between(*high)] for _ in range(pictures)]
        made.append({"images": images, "prompt": between(20, 60), "answer": between(10, 60 if images else 250)})
    return made


def read_mixture(scale: float = 1.0) -> list[dict]:
    """The committed mixture; `scale` shrinks its pictures with a smaller tower's crops."""
    samples = json.loads(MIXTURE.read_text())["samples"]
    return [s | {"images": [[max(round(side * scale), 8) for side in size] for size in s["images"]]} for s in samples]


def make_samples(mixture: list[dict], vocabulary: int, seed: int = 0) -> list[dict]:
    """Pictures of noise and random tokens: {"pictures", "ids", "labels"}; the pictures stand in front."""
    random = torch.Generator().manual_seed(seed)
    made = []
    for sample in mixture:
        noise = [torch.randint(0, 256, (h // 8 + 1, w // 8 + 1, 3), generator=random) for w, h in sample["images"]]
        pictures = [
            Image.fromarray(values.byte().numpy()).resize(tuple(size))
            for values, size in zip(noise, sample["images"], strict=True)
        ]
        text = torch.randint(3, vocabulary, (sample["prompt"] + sample["answer"],), generator=random).tolist()
        ids = [text[0], *[IMAGE_TOKEN_INDEX] * len(pictures), *text[1:]]
        labels = [IGNORE_INDEX] * (len(ids) - sample["answer"]) + ids[len(ids) - sample["answer"] :]
        made.append({"pictures": pictures, "ids": ids, "labels": labels})
    return made


def checkpointing_as(model, other) -> None:
    """Gradient checkpointing of another model, if a model has it."""
    if model.is_gradient_checkpointing:
        other.gradient_checkpointing_enable({"use_reentrant": False})


class Project:
    """This project: crops processed together, one tower call, loss at supervised positions; padded or packed."""

    def __init__(self, model, pack: bool):
        from llava.data.collator import DataCollatorForSupervisedDataset

        self.model, self.attention = model, "varlen" if pack else "sdpa"
        self.collate = DataCollatorForSupervisedDataset(0, pack=pack)

    def batch(self, samples: list[dict]) -> dict:
        """What the collator makes of the samples, on the model's device."""
        from llava.images.processing import process_pictures
        from llava.model.visual_merge import pixel_options

        tower, options = self.model.get_vision_tower(), pixel_options(self.model.config)
        made = []
        for sample in samples:
            one = {"input_ids": torch.tensor(sample["ids"]), "labels": torch.tensor(sample["labels"])}
            if sample["pictures"]:
                one["images"] = process_pictures(sample["pictures"], tower.image_processor, options)
                one["image_sizes"] = [picture.size for picture in sample["pictures"]]
                one["modalities"] = ["image"] * len(sample["pictures"])
            made.append(one)
        batch, device = self.collate(made), self.model.device
        if "images" in batch:
            batch["images"] = [image.to(device) for image in batch["images"]]
        return batch | {name: batch[name].to(device) for name in ("input_ids", "labels", "attention_mask")}

    def loss_of(self, batch: dict) -> torch.Tensor:
        self.model.config._attn_implementation = self.attention
        return self.model(**batch).loss

    def loss(self, samples: list[dict]) -> torch.Tensor:
        return self.loss_of(self.batch(samples))


class LlavaNext:
    """LLaVA-NeXT's way, on this project's weights: every crop through the image processor by itself, a loop that merges
    and unpads image by image and row by row, rows padded on the right, logits of all positions in float32."""

    def __init__(self, model):
        from transformers import CLIPVisionModel

        self.model = model
        tower = model.get_vision_tower().vision_tower
        with torch.device(model.device):
            self.encoder = CLIPVisionModel(tower.config).train()
        weights = {name.removeprefix("vision_model."): p for name, p in tower.named_parameters()}
        self.encoder.load_state_dict(weights, assign=True)  # not copies: they learn here
        checkpointing_as(model, self.encoder)

    def loss(self, samples: list[dict]) -> torch.Tensor:
        model, inner = self.model, self.model.get_model()
        tower, device = model.get_vision_tower(), model.device
        crops, shapes = [], []
        for sample in samples:
            several = len(sample["pictures"]) > 1
            for picture in sample["pictures"]:
                pieces, shape = self._pieces(picture, several)
                processed = [tower.image_processor(piece, return_tensors="pt")["pixel_values"][0] for piece in pieces]
                crops.append(torch.stack(processed))
                shapes.append((picture.size, shape))
        if not crops:  # a picture of zeros for a batch of text
            crops, shapes = [torch.zeros(1, 3, tower.image_size, tower.image_size)], []
        pixels = torch.cat(crops).to(device)
        out = self.encoder(pixels, output_hidden_states=True)
        states = out.hidden_states[-2][:, 1:]
        features = inner.mm_projector(states).split([len(part) for part in crops])
        merged = [self._merged(feature, size, shape) for feature, (size, shape) in zip(features, shapes, strict=False)]
        dummy = features[0].sum() * 0 if not shapes else 0
        images = iter(merged)
        rows, labels = zip(*(self._row(sample, images) for sample in samples), strict=True)
        longest = max(map(len, rows))
        embeds = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows]) + dummy
        targets = torch.stack([F.pad(row, (0, longest - len(row)), value=IGNORE_INDEX) for row in labels])
        mask = torch.stack([torch.arange(longest, device=device) < len(row) for row in rows])
        model.config._attn_implementation = "sdpa"
        hidden = inner(inputs_embeds=embeds, attention_mask=mask, use_cache=False)[0]
        logits = model.lm_head(hidden).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE_INDEX)

    def _row(self, sample: dict, images) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and labels of a sample: its text is embedded at once, cut at its pictures, and laid out anew."""
        device = self.model.device
        ids, marks = (torch.tensor(sample[name], device=device) for name in ("ids", "labels"))
        text = ids != IMAGE_TOKEN_INDEX
        cuts = (~text).nonzero()[:, 0].tolist()
        lengths = [end - begin - 1 for begin, end in pairwise([-1, *cuts, len(ids)])]
        texts = self.model.get_model().embed_tokens(ids[text]).split(lengths)
        targets = marks[text].split(lengths)
        row, labels = [texts[0]], [targets[0]]
        for part, target in zip(texts[1:], targets[1:], strict=True):
            image = next(images)
            row += [image, part]
            labels += [target.new_full((len(image),), IGNORE_INDEX), target]
        return torch.cat(row), torch.cat(labels)

    def _pieces(self, picture: Image.Image, several: bool) -> tuple[list[Image.Image], tuple[int, int] | None]:
        """The overview and the crops of one picture, and its grid in crops; of several each is squared."""
        from llava.images.geometry import select_best_resolution

        side = self.model.get_vision_tower().image_size
        if several:
            mean = self.model.get_vision_tower().image_processor.image_mean
            square = Image.new("RGB", (max(picture.size),) * 2, tuple(int(255 * value) for value in mean))
            square.paste(picture, tuple((max(picture.size) - length) // 2 for length in picture.size))
            return [square], None
        width, height = select_best_resolution(picture.size, self.model.config.image_grid_pinpoints)
        if width / picture.width < height / picture.height:
            inside = (width, min(-int(-(picture.height * width / picture.width) // 1), height))
        else:
            inside = (min(-int(-(picture.width * height / picture.height) // 1), width), height)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(picture.resize(inside), ((width - inside[0]) // 2, (height - inside[1]) // 2))
        crops = [
            canvas.crop((left, top, left + side, top + side))
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]
        return [picture.resize((side, side)), *crops], (width // side, height // side)

    def _merged(self, feature, size: tuple[int, int], shape: tuple[int, int] | None) -> torch.Tensor:
        """Base tokens, then the map without its padding, a newline behind each row."""
        newline = self.model.get_model().image_newline
        if shape is None or len(feature) == 1:
            return torch.cat([feature[0], newline[None]])
        base, rest, grid = feature[0], feature[1:], round(feature.shape[1] ** 0.5)
        across, down = shape
        whole = rest.view(down, across, grid, grid, -1).permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
        width, height = size
        rows, columns = whole.shape[1:]
        if width / height > columns / rows:
            cut = (rows - int(height * columns / width)) // 2
            whole = whole[:, cut : rows - cut]
        else:
            cut = (columns - int(width * rows / height)) // 2
            whole = whole[:, :, cut : columns - cut]
        line = newline[:, None, None].expand(*whole.shape[:-1], 1)
        whole = torch.cat([whole, line], dim=-1).flatten(1, 2).T
        return torch.cat([base, whole])


class Stock:
    """transformers' `LlavaNextForConditionalGeneration` with its own image processor, rows padded on the right.

    It cuts each of several pictures into crops, where LLaVA-NeXT squares each into one. To have the least that it can
    make of them, two crops and the overview, they are given to it no larger than a crop.
    """

    def __init__(self, model):
        from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, Qwen2Config
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        ours, tower = model.config, model.get_vision_tower()
        text = Qwen2Config(**{name: getattr(ours, name) for name in _TEXT_SIZES})
        side = tower.image_size
        grid = [[height, width] for width, height in ours.image_grid_pinpoints]
        self.config = LlavaNextConfig(
            vision_config=tower.vision_tower.config.to_dict(),
            text_config=text.to_dict(),
            image_grid_pinpoints=grid,
            image_token_index=ours.vocab_size - 1,
            vision_feature_layer=-2,
        )
        with torch.device(model.device):
            self.model = LlavaNextForConditionalGeneration._from_config(self.config, attn_implementation="sdpa")
        self.model.load_state_dict(_as_stock(model.state_dict(), self.model.state_dict().keys()))
        self.model.train()
        checkpointing_as(model, self.model)
        self.process = LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=grid
        )

    def loss(self, samples: list[dict]) -> torch.Tensor:
        pictures = [picture for sample in samples for picture in self._pictures(sample)]
        media, counts = {}, iter(())
        if pictures:
            media = dict(self.process(pictures, return_tensors="pt"))
            counts = iter([self._tokens(*size) for size in media["image_sizes"].tolist()])
        rows = []
        for sample in samples:
            ids, labels = [], []
            for token, label in zip(sample["ids"], sample["labels"], strict=True):
                times = next(counts) if token == IMAGE_TOKEN_INDEX else 1
                ids += [self.config.image_token_index if token == IMAGE_TOKEN_INDEX else token] * times
                labels += [label] * times
            rows.append((torch.tensor(ids), torch.tensor(labels)))
        longest = max(len(ids) for ids, _ in rows)
        batch = {
            "input_ids": torch.stack([F.pad(ids, (0, longest - len(ids))) for ids, _ in rows]),
            "attention_mask": torch.stack([(torch.arange(longest) < len(ids)).long() for ids, _ in rows]),
            "labels": torch.stack([F.pad(mark, (0, longest - len(mark)), value=IGNORE_INDEX) for _, mark in rows]),
        }
        given = {name: value.to(self.model.device) for name, value in (batch | media).items()}
        return self.model(**given).loss

    def _pictures(self, sample: dict) -> list[Image.Image]:
        if len(sample["pictures"]) < 2:
            return sample["pictures"]
        side = self.process.crop_size["height"]
        return [ImageOps.contain(picture, (side, side)) for picture in sample["pictures"]]

    def _tokens(self, height: int, width: int) -> int:
        from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

        vision = self.config.vision_config
        counter = LlavaNextProcessor.__new__(LlavaNextProcessor)
        counter.image_processor, counter.patch_size = self.process, vision.patch_size
        counter.num_additional_image_tokens, counter.vision_feature_select_strategy = 1, "default"
        # its own code, too, takes the class token off again
        return counter._get_number_of_features(height, width, vision.image_size, vision.image_size) - 1


_TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"),
)


def _as_stock(state: dict, names) -> dict:
    """This project's weights under transformers' names."""
    moved = {}
    for name, value in state.items():
        name = name.replace("model.vision_tower.vision_tower.", "model.vision_tower.")
        name = name.replace("model.mm_projector.0.", "model.multi_modal_projector.linear_1.")
        name = name.replace("model.mm_projector.2.", "model.multi_modal_projector.linear_2.")
        if name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")):
            name = name.replace("model.", "model.language_model.", 1)
        moved[name] = value
    lacking = set(names) - moved.keys()
    if lacking:
        for name in list(lacking):  # with or without the prefix of CLIP's own class
            other = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
            if other in moved:
                moved[name] = moved.pop(other)
    return {name: moved[name] for name in names}
