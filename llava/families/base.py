"""The contract of a model family: what training, evaluation, chat and packing ask of a model, whatever its make.

Shapes: B rows, L tokens, N positions, D channels of the language model, V tokens of the vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import LlavaError

# a conversation: ("human" | "gpt" | "system", text) in order, `<image>` where a picture is
Turns = list[tuple[str, str]]


@dataclass
class Loaded:
    """A model with what belongs to it.

    Attributes:
        model: None where only samples and prompts are made.
        processor: what is saved beside the model: its tokenizer, or transformers' processor.
        tokenizer: a Hugging Face tokenizer with a fast backend.
        image_processor: None for a model without vision.
        context: the longest sequence in tokens.
        template: name of the conversation template whose rules its turns follow.
        count_visual_tokens: of a model whose forward merges images into the text, what one becomes there (see
            `VisualTokenCounter`); else None.
        preprocessor: LLaVA's `Preprocessor` of conversations; other families write their own chat format.
        system_turn: what becomes of a conversation's own system turn at its front: "template" (it is dropped) or
            "record" (it takes the place of the template's system text); None, of a model that was not trained here: as
            its makers have it, which is the first for LLaVA and the second for chat models.
    """

    model: Any
    processor: Any
    tokenizer: Any
    image_processor: Any
    context: int
    template: str
    count_visual_tokens: Any = None
    preprocessor: Any = None
    system_turn: str | None = None

    def without_model(self) -> "Loaded":
        """What makes samples, and no more: fit for the processes of a data loader."""
        return replace(self, model=None, processor=None)


class Length(NamedTuple):
    """A sample's tokens in the language model and patches in the vision encoder.

    exact: whether they are what the sample will have; else they are the most that it can have.
    """

    tokens: int
    patches: int
    exact: bool


def device_and_dtype(device=None, dtype=None):
    """What a model is loaded to unless told otherwise: cuda in bfloat16 where there is one, else the CPU in float32."""
    import torch

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or ("float32" if device.type == "cpu" else "bfloat16")


def left_padded(rows: list[list[int]], loaded: Loaded) -> dict:
    """`input_ids` and `attention_mask` [B, L] of token ids, padded on the left, on the model's device."""
    import torch

    width, pad, device = max(map(len, rows)), loaded.tokenizer.pad_token_id, loaded.model.device
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class Family(ABC):
    """One family. It holds no state: `loaded` and `args` come with every call.

    Attributes:
        name: its name in `FAMILIES`.
        model_types: `model_type` of the checkpoints that it loads.
        parts: name of a part that can be trained -> beginnings of its parameters' names; the first match counts. The
            names of the parts are the same in every family.
        keys: the model and data keys of a run that it takes; None: all.
        refused: key -> reason, for keys that deserve a better one than `no_such_key`.
        no_such_key: what a refusal says of the others.
        keeps_projector_alone: whether a run that trains the projector only leaves it instead of a whole model.
        order_by_seed: whether records are shuffled by the run's seed alone rather than by accelerate's.
        chooses_template: whether a conversation template can be chosen for it; else it has a chat template of its own.
        returns_prompt: whether `generate` of its model returns the prompt in front of the answer.
    """

    name: str
    model_types: tuple[str, ...]
    parts: dict[str, tuple[str, ...]]
    keys: frozenset[str] | None = None
    refused: dict[str, str] = {}  # noqa: RUF012
    no_such_key: str = ""
    keeps_projector_alone = False
    order_by_seed = False
    chooses_template = False
    returns_prompt = True

    # --- settings ---

    def check(self, run) -> None:
        """Refuse what the settings of a resolved run alone show to be wrong; no weight is read.

        Raises:
            LlavaError: a key that this family does not take, or values that do not go together.
        """
        from llava.config.evaluation import check_evaluation
        from llava.config.schema import own_keys

        check_evaluation(run)
        for name, key in own_keys().items():
            if run[name] == key.default or (key.group not in ("model", "data") and name not in self.refused):
                continue
            if name in self.refused or (self.keys is not None and name not in self.keys):
                reason = self.refused.get(name, self.no_such_key)
                raise LlavaError(f"{run.source(name)}: {name} is {run[name]!r}, but {reason}; expected no {name}")

    def check_fit(self, run) -> dict[str, str]:
        """Refuse what the run's model, and whatever else it names, show to be wrong; configs are read, no weights of a
        model.

        Returns:
            {part: where its weights start from}.

        Raises:
            OutOfReach: a model or encoder that is not on this machine.
            LlavaError: parts that do not fit together, or nothing that is trained.
        """
        from llava.families.settings import check_common

        check_common(run)
        return dict.fromkeys(self.parts, run["model_name_or_path"])

    def check_media(self, run, kinds: set[str]) -> None:
        """Refuse settings that fit no "image" or no "video", where the data have some; `kinds` are those they have."""
        return

    # --- models ---

    @abstractmethod
    def load(self, path: str, *, base: str | None = None, dtype=None, device=None, **overrides) -> Loaded:
        """A checkpoint for inference.

        Args:
            path: folder or hub id, or the folder of a LoRA adapter, which is merged into its base.
            base: the model under an adapter or a projector; None: as the adapter names it.
            dtype: a torch.dtype or its name; None: float32 on a CPU, else bfloat16.
            device: None: cuda where there is one.
            **overrides: of the family's own loading (`load_8bit`, `attn_implementation`, ...).

        Raises:
            LlavaError: it cannot be loaded.
        """

    @abstractmethod
    def prepare(self, model_args, data_args, training_args) -> tuple[Loaded, Any]:
        """The model to train, and the arguments that `sample` and `collate` will get.

        Raises:
            LlavaError: settings or files that cannot be.
        """

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, in a model with LoRA adapters as well."""
        name = name.removeprefix("base_model.model.")
        return next(part for part, prefixes in self.parts.items() if name.startswith(prefixes))

    @abstractmethod
    def answer_states(self, inputs: dict, counts: list[int], loaded: Loaded):
        """The hidden states that predict the last `counts[i]` tokens of each row of prepared inputs, [N, D] in order.

        Raises:
            LlavaError: a row is longer than the model's context.
        """

    def logits(self, model, hidden_ND):
        """[N, V] of hidden states: the model's own output layer, and what follows it."""
        from llava.model.loss import output_logits

        return output_logits(model, hidden_ND)

    # --- samples ---

    def record_template(self, model_args) -> str:
        """The conversation template by whose rules the records of a run are checked."""
        return "qwen_1_5"

    def refused_media(self, model_args) -> dict[str, str]:
        """ "image" or "video" -> what is wrong with a record that has one."""
        return {}

    @abstractmethod
    def sample(self, record: dict, loaded: Loaded, args, at: tuple[int, int] = (0, 0)) -> dict:
        """One record as tensors: at least `input_ids` and `labels`, LongTensors [L].

        Args:
            args: a `SampleArgs`.
            at: (epoch, number of the record), which random choices follow.

        Returns:
            Also `truncated`: True, if it was cut to `args.model_max_length`.

        Raises:
            LlavaError: the record's own fault; `NoLabel` where cutting left nothing to learn.
        """

    def visual_token(self, loaded: Loaded) -> int:
        """The id in a sample's `input_ids` that stands for an image, or for each of its tokens."""
        return IMAGE_TOKEN_INDEX

    @abstractmethod
    def collate(self, samples: list, loaded: Loaded, args) -> dict:
        """A batch for the model's forward, of what `sample` returns; a `BadRecord` among them is listed, not used.

        What the forward would have to read from the device (tokens, labels, sizes) is also in `host`, `HostCopies`.
        """

    def batch_sizes(self, batch: dict, model):
        """The `BatchSizes` of a collated batch, which may lie on the device: what `host` and the shapes say of it.

        Here, of a batch that has a place for each token of its pictures.
        """
        from llava.families.batch_sizes import expanded_sizes

        return expanded_sizes(batch)

    @abstractmethod
    def length(
        self, record: dict, sizes: list[tuple[int, int]], loaded: Loaded, args, frames: int | None = None
    ) -> Length:
        """How long a record's sample will be, from its text and the (width, height) of its pictures, none of which is
        read. Not cut to `args.model_max_length`.

        frames: those that are taken of a record's video; None: `args.frames_upbound`, the most that there may be.
        """

    def text_encoder(self, loaded: Loaded):
        """The `TextEncoder` that samples and lengths are made with."""
        from llava.text_encoding import text_encoder

        return text_encoder(loaded.tokenizer)

    # --- what a model's files say, without its weights ---

    @abstractmethod
    def geometry(self, path: str | None, run=None, **options):
        """What becomes of a photo, a `Geometry`.

        Args:
            path: the model's folder or hub id; None: what is published.
            run: a resolved run that starts from it, which then decides.
            **options: of the family's own, in place of what the files say.

        Raises:
            LlavaError: files that are out of reach, or an option that the family does not have.
        """

    @abstractmethod
    def load_text(self, path: str, run=None) -> Loaded:
        """What writes and counts the prompts of a model, or of a resolved `run` with that model's tokenizer;
        `Loaded.model` holds a config at most.

        Raises:
            LlavaError: there is no tokenizer, or it is not this family's.
        """

    # --- prompts and answers ---

    @abstractmethod
    def prompt_text(self, turns: Turns, loaded: Loaded, *, answer: str | None = None, images: bool = True) -> str:
        """The text of a conversation up to where the next answer begins, or to the end of `answer`.

        Args:
            images: whether an `<image>` stands for an image; else it is text.
        """

    @abstractmethod
    def tokens(self, text: str, loaded: Loaded, *, images: bool = True) -> list[int]:
        """Token ids of a prompt, IMAGE_TOKEN_INDEX for every `<image>` that stands for an image."""

    def prompt(self, turns: Turns, loaded: Loaded, *, answer: str | None = None, images: bool = True) -> list[int]:
        """Token ids of `prompt_text`."""
        return self.tokens(self.prompt_text(turns, loaded, answer=answer, images=images), loaded, images=images)

    def stops(self, loaded: Loaded) -> tuple[list[int], list[str]]:
        """Tokens and texts that end an answer."""
        configured = loaded.model.generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        return sorted({loaded.tokenizer.eos_token_id, *configured} - {None}), []

    @abstractmethod
    def inputs(self, prompts: list[list[int]], pictures: list[list], loaded: Loaded) -> dict:
        """Keyword arguments of the model's `generate` for a batch, padded on the left, on the model's device.

        Args:
            prompts: token ids of each row, as `prompt` makes them.
            pictures: PIL images of each row, or clips as lists of frames, one per IMAGE_TOKEN_INDEX.
        """

    def squares_several(self, loaded: Loaded) -> bool:
        """Whether several pictures of a prompt are squared and get one crop each, whatever one alone becomes."""
        return False

    @abstractmethod
    def sequence_length(self, inputs: dict, loaded: Loaded) -> tuple[int, int]:
        """(text tokens, visual tokens) of one prepared prompt in the language model."""

    @abstractmethod
    def picture_tokens(self, inputs: dict, loaded: Loaded) -> list[tuple[int, int]]:
        """(tokens of the vision encoder, tokens of the language model) of each picture of prepared inputs."""

    def image_flops(self, loaded: Loaded) -> float | None:
        """Operations of one image through the vision encoder at the encoder's own size, with all its patches, as
        `llava.tools.towers` counts them; None: it has no size of its own.

        Raises:
            LlavaError: they cannot be counted.
        """
        return None

    def choose_patches(self, loaded: Loaded, choice) -> None:
        """Let the pictures to come keep the patches that a `PatchChoice` chooses; None: all.

        Raises:
            LlavaError: the model has patches of one size.
        """
        if choice is not None:
            raise LlavaError(f"adaptive patches: {self.name} has patches of one size, expected a model that can choose")

    def patch_choice(self, loaded: Loaded):
        """The choice that is in force; None: all patches are kept."""
        return None

    # --- hooks of the trainer ---

    def parameter_groups(self, groups: list[dict], model, args) -> list[dict]:
        """An optimizer's new groups, split so that parts with a learning rate of their own have it.

        Args:
            groups: all of the run's learning rate.
            args: the `TrainingArguments`.
        """
        from llava.families.rates import split_by_rate

        return split_by_rate(self, groups, model, args)

    def vision_blocks(self, model) -> tuple[Any, list]:
        """(the vision encoder, its blocks that the features come through, first to last); (None, []) without one."""
        return None, []

    def unused_modules(self, model) -> Iterable:
        """Modules whose weights have no part in the features; they stay frozen."""
        return ()

    def float32_inputs(self, model) -> tuple[str, ...]:
        """Entries of a batch that must not be cast to the model's dtype."""
        return ()

    def check_precision(self, model, precision) -> None:
        """Refuse a model whose code does not compute in the dtypes of the run; they are settled now.

        Args:
            precision: the run's `Precision`, which has been applied.

        Raises:
            LlavaError: what does not.
        """
        return

    def on_prepared(self, model) -> None:
        """The model is ready to be trained, and DeepSpeed has it, if the run uses DeepSpeed; no step has been taken."""
        return

    def on_save(self, model, processor, folder: str) -> None:
        """Write what a folder without a whole model (an adapter, a projector) needs to be loaded; on one rank."""
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)

    def saved_weights(self, model, checkpoint: str):
        """(the model's name, what reads it) of every weight in a checkpoint of a run without LoRA."""
        from llava.model.checkpoint import weights_in

        return weights_in(checkpoint)

    def restore(self, model, checkpoint: str) -> bool:
        """Put a checkpoint's weights into the model of a run that goes on; False: the trainer does it."""
        return False
