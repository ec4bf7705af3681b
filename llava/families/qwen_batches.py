"""Batches of Qwen's vision-language models: padded rows, or all samples packed into one."""

from llava.constants import IGNORE_INDEX
from llava.families.base import Loaded


class QwenBatches:
    """How a family makes its batches, before `Family`."""

    def collate(self, samples, loaded, args):
        """As the contract; with `args.pack_sequences` one row of all samples, and `host.packed` their lengths.

        A batch without images gets one of a single token that has no influence, since each of several processes runs
        the vision encoder in each step, as ZeRO-3 and DDP need: masked behind the last row, or the last segment of a
        packed one. `host` holds copies of all but the pixels.
        """
        import torch

        from llava.data.collator import pack_rows, pad_rows, record_ids
        from llava.model.host import HostCopies

        pad, image_token, packed = loaded.tokenizer.pad_token_id, self.visual_token(loaded), None
        if args.pack_sequences:
            batch, samples, packed = pack_rows(samples, pad)
        else:
            batch, samples = pad_rows(samples, pad)
            batch["attention_mask"] = batch["attention_mask"].long()
        images = [sample for sample in samples if "pixel_values" in sample]
        if not images:
            rows = len(batch["input_ids"])
            for key, fill in (("input_ids", pad), ("labels", IGNORE_INDEX), ("attention_mask", 0)):
                if key in batch:
                    batch[key] = torch.cat([batch[key], torch.full((rows, 1), fill)], dim=1)
            batch["input_ids"][-1, -1] = image_token
            images = [self._no_image(loaded)]
            packed = packed and [*packed, 1]
        keys = [key for key in loaded.image_processor.model_input_names if key in images[0]]
        batch |= {key: torch.cat([image[key] for image in images]) for key in keys}
        batch["mm_token_type_ids"] = (batch["input_ids"] == image_token).long()
        host = {key: value for key, value in batch.items() if torch.is_tensor(value) and key != "pixel_values"}
        return batch | {"host": HostCopies(record_ids=record_ids(samples), packed=packed, **host)}

    def _no_image(self, loaded: Loaded) -> dict:
        """The smallest image: one token."""
        import torch

        images = loaded.image_processor
        side, values = images.merge_size, 3 * images.temporal_patch_size * images.patch_size**2
        image = {"pixel_values": torch.zeros(side**2, values), "image_grid_thw": torch.tensor([[1, side, side]])}
        if self.patch_choice(loaded) is not None:
            image["image_patch_levels"] = torch.ones(side**2, dtype=torch.uint8)
        return image
