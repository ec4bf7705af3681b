"""What the checks work with: small pictures, clips, records, tokenizers and a checkpoint, made when first asked for."""

import json
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from tests import tiny
from tests.data.common import tokenizer
from tests.serve import checkpoints


class World:
    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def picture(width: int, height: int) -> Image.Image:
        """Whose red and green are the column and the row, so that a crop tells where it comes from."""
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        return Image.fromarray(np.stack([columns, rows, rows ^ columns], axis=-1))

    @cached_property
    def tower(self) -> str:
        return tiny.tower(self.folder / "clip")

    @cached_property
    def processor(self):
        from transformers import CLIPImageProcessorPil

        return CLIPImageProcessorPil.from_pretrained(self.tower)

    @cached_property
    def tokenizer(self):
        return tokenizer("qwen")

    @cached_property
    def checkpoint(self) -> str:
        return checkpoints.save(self.folder / "checkpoint")

    @cached_property
    def loaded(self):
        """(tokenizer, model, image_processor, context_len)"""
        from llava.model.builder import load_pretrained_model

        return load_pretrained_model(self.checkpoint, None, "llava_qwen", torch_dtype="float32")

    @cached_property
    def png(self) -> str:
        path = self.folder / "picture.png"
        self.picture(60, 40).save(path)
        return str(path)

    @cached_property
    def clip(self) -> str:
        """13 frames of 64 x 48 pixels, four a second."""
        import av

        path = self.folder / "clip.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for value in range(13):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 18 * value, np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return str(path)

    @cached_property
    def records(self) -> str:
        return tiny.records(self.folder / "data", "imt")

    def data_args(self, **changes) -> SimpleNamespace:
        """LLaVA-NeXT's DataArguments for `records`, as its train.py completes them."""
        values = dict(
            data_path=self.records,
            image_folder=str(self.folder / "data" / "images"),
            image_aspect_ratio="anyres",
            image_grid_pinpoints="[[56, 28], [28, 56], [56, 56]]",
            video_folder=None,
            video_fps=1,
            frames_upbound=0,
            force_sample=False,
            add_time_instruction=False,
            early_mix_text=False,
            is_multimodal=True,
            mm_use_im_start_end=False,
            image_processor=self.processor,
        )
        return SimpleNamespace(**values | changes)

    def clip_record(self) -> str:
        """Path of a record with the clip."""
        turns = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "It turns white."}]
        path = self.folder / "clip.json"
        path.write_text(json.dumps([{"id": "c", "video": Path(self.clip).name, "conversations": turns}]))
        return str(path)
