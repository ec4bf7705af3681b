"""The two classes that lmms-eval loads. It imports this module only when one of them is asked for."""

import json
from collections import defaultdict
from datetime import timedelta
from itertools import groupby

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from tqdm import tqdm

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError
from llava.eval.lmms_eval_adapter.media import read_image, read_video, read_visual
from llava.eval.questions import add_images
from llava.inference.engine import Inference
from llava.inference.likelihood import log_likelihoods, split_tokens

# what tasks may ask of `generate`; the rest of their generation_kwargs (image_aspect_ratio, ...) is not generate's
_OPTIONS = ("num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens")
_SAMPLING = ("temperature", "top_p", "top_k")
# lmms-eval adds the separator of few-shot examples to every task's `until`; an answer in paragraphs is not over there
_NOT_AN_END = "\n\n"


class Score(tuple, GenerationResult):
    """(value, is greedy), as `loglikelihood` has to return it.

    lmms-eval 0.7.3 turns what any model returns into text, plain pairs too, which its multiple choice then cannot read;
    only the content of a GenerationResult is kept. `Score(pair)` is the pair, and a result with the pair as its text.
    """


def generation_options(kwargs: dict, max_new_tokens: int) -> tuple[dict, list[str]]:
    """A task's generation_kwargs as (options of transformers' `generate`, texts that end an answer)."""
    until = kwargs.get("until") or []
    until = [text for text in ([until] if isinstance(until, str) else until) if text and text != _NOT_AN_END]
    sample = bool(kwargs.get("do_sample", True)) and float(kwargs.get("temperature") or 0) > 0
    names = _OPTIONS + (_SAMPLING if sample else ())
    options = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    length = kwargs.get("max_new_tokens") or kwargs.get("max_gen_toks") or max_new_tokens
    return {"do_sample": sample, "max_new_tokens": int(length), **options}, until


class LlavaTowers(lmms):
    """A checkpoint as lmms-eval's older kind of model: text, with a list of images or videos.

    Args:
        pretrained, model_base: as `load_pretrained_model` takes them.
        conv_template: None takes the checkpoint's.
        device: None takes this process's GPU where there is one.
        dtype: None takes float32 on a CPU, else bfloat16.
        batch_size: requests answered at once.
        max_frames_num: frames taken of a video.
        max_new_tokens: longest answer to tasks that do not say.
        attn_implementation: as transformers'.
        vision_tower, trust_remote_code: as `load_pretrained_model` takes them.
        max_batch_size: accepted, since lmms-eval passes it.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        model_base: str | None = None,
        conv_template: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_frames_num: int = 32,
        max_new_tokens: int = 1024,
        attn_implementation: str | None = None,
        vision_tower: str | None = None,
        trust_remote_code: bool = False,
        max_batch_size=None,
    ):
        from accelerate import Accelerator, InitProcessGroupKwargs

        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise LlavaError(f"batch_size: found {batch_size!r}, expected a number from 1")
        self.batch_size, self.max_frames = int(batch_size), int(max_frames_num)
        self.max_new_tokens = int(max_new_tokens)
        # processes work for themselves and wait for the slowest at the end
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is None or self._world_size > 1:
            device = self.accelerator.device
            device = "cpu" if device.type == "cpu" else str(device)  # which numbers its CPUs
        self.inference = Inference.load(
            pretrained,
            model_base,
            version=conv_template,
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
            **({} if vision_tower is None else {"vision_tower": vision_tower}),
            **({"trust_remote_code": True} if trust_remote_code in (True, "True", "true") else {}),
        )

    @property
    def device(self):
        return self.inference.model.device

    @property
    def tokenizer(self):
        return self.inference.tokenizer

    @property
    def config(self):
        return self.inference.model.config

    def clean(self):
        """Frees the model's memory before answers are scored, which may need a judge model."""
        self.inference = None
        super().clean()

    # --- requests ---

    def _generation_kwargs(self, request) -> dict:
        return request.args[1]

    def _doc(self, request):
        *_, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _read(self, request) -> tuple[list[tuple[str, str]], list]:
        """The (speaker, text) turns of a request, and its pictures."""
        if len(request.args) < 6:  # an answer scored without its question, as mutual information asks for
            return [("human", request.args[0])], []
        context, doc_to_visual = request.args[0], request.args[2]
        visuals = doc_to_visual(self._doc(request))
        visuals = [] if visuals is None else visuals if isinstance(visuals, list | tuple) else [visuals]
        metadata = request.metadata or {}
        if visuals and metadata.get("task_type") == "video" and "sample_frames" in metadata:
            pictures = [read_video(list(visuals), int(metadata["sample_frames"]))]
        else:
            pictures = [read_visual(visual, self.max_frames) for visual in visuals]
        return [("human", self._add_images(context, len(pictures)))], pictures

    def _add_images(self, text: str, count: int) -> str:
        if text.count(DEFAULT_IMAGE_TOKEN) != count:  # it is written about, or stands for what the task left out
            text = text.replace(DEFAULT_IMAGE_TOKEN, "")
        return add_images(text, count)

    def _asked(self, request):
        """A request's turns and pictures; faults name task and document."""
        try:
            return self._read(request)
        except LlavaError as error:
            raise LlavaError(f"task {request.task_name}, document {request.doc_id}: {error}") from None

    def _batches(self, requests: list, key, title: str):
        """Lists of places in `requests`: those of one `key(request)`, of alike context length."""
        groups = defaultdict(list)
        for place, request in enumerate(requests):
            groups[key(request)].append(place)
        with tqdm(total=len(requests), desc=title, unit="request", disable=self.rank != 0) as bar:
            for places in groups.values():
                places.sort(key=lambda place: len(requests[place].args[0]), reverse=True)  # memory shows at once
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    yield batch
                    bar.update(len(batch))

    # --- what lmms-eval calls ---

    def generate_until(self, requests: list) -> list[str]:
        """The answer to each request; requests with the same generation_kwargs share batches."""

        def settings(request) -> str:
            return json.dumps(self._generation_kwargs(request), sort_keys=True, default=str)

        answers = [""] * len(requests)
        for batch in self._batches(requests, settings, "generate"):
            kwargs = self._generation_kwargs(requests[batch[0]])
            options, until = generation_options(kwargs, self.max_new_tokens)
            asked = [self._asked(requests[place]) for place in batch]
            prompts = [self.inference.prompt(turns) for turns, _ in asked]
            texts = self.inference.generate(prompts, [pictures for _, pictures in asked], until, **options)
            for place, text in zip(batch, texts, strict=True):
                answers[place] = text
                self.cache_hook.add_partial("generate_until", (requests[place].args[0], kwargs), answers[place])
        return answers

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """(value, whether greedy decoding would give the answer) for each given answer.

        The value is the sum of the log-probabilities of the answer's tokens. Of `multiple_choice` tasks lmms-eval 0.7.3
        takes the SMALLEST value for the model's choice, since its own models return losses; there the sum is negated.
        """
        values = [Score((0.0, False))] * len(requests)
        for batch in self._batches(requests, lambda request: None, "loglikelihood"):
            asked = [self._asked(requests[place]) for place in batch]
            split = [
                split_tokens(self.inference, turns, self._continuation(requests[place]))
                for place, (turns, _) in zip(batch, asked, strict=True)
            ]
            prompts, continuations = (list(part) for part in zip(*split, strict=True))
            pictures = [pictures for _, pictures in asked]
            scores = log_likelihoods(self.inference, prompts, continuations, pictures)
            for place, (value, greedy) in zip(batch, scores, strict=True):
                choice = isinstance(requests[place].args[1], str)  # else a function: output_type loglikelihood
                values[place] = Score((-value if choice else value, greedy))
        return values

    def _continuation(self, request) -> str:
        target = request.args[1]
        return target if isinstance(target, str) else str(target(self._doc(request)))

    def generate_until_multi_round(self, requests: list) -> list[str]:
        raise LlavaError("llava_towers: found a task of several rounds, expected one question and one answer")


class LlavaTowersChat(LlavaTowers):
    """A checkpoint as lmms-eval's chat model: messages with roles, images and videos between the texts."""

    is_simple = False

    def _generation_kwargs(self, request) -> dict:
        return request.args[2]

    def _read(self, request) -> tuple[list[tuple[str, str]], list]:
        messages = request.args[1](self._doc(request))
        turns, pictures, system = [], [], ""
        for message in messages:
            text, found = self._message(message["content"])
            if message["role"] == "system":  # the templates have system texts of their own
                system = f"{text}\n"
                continue
            speaker = "gpt" if message["role"] == "assistant" else "human"
            turns.append((speaker, self._add_images(system + text, len(found))))
            pictures += found
            system = ""
        if not turns or turns[-1][0] != "human":
            raise LlavaError("messages: found no user's message at the end, expected the question there")
        return turns, pictures

    def _message(self, content) -> tuple[str, list]:
        """A message's text and its pictures.

        Where the texts have as many `<image>` as there are pictures, those are their places; else each run of pictures
        gets a line of its own where it stands among the texts.
        """
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        pictures = [self._picture(item) for item in items if item["type"] != "text"]
        texts = [item["text"] for item in items if item["type"] == "text"]
        if sum(text.count(DEFAULT_IMAGE_TOKEN) for text in texts) == len(pictures):
            return "".join(texts), pictures
        lines = []
        for is_text, run in groupby(items, key=lambda item: item["type"] == "text"):
            if is_text:
                lines.append("".join(item["text"] for item in run).replace(DEFAULT_IMAGE_TOKEN, ""))
            else:
                lines.append(" ".join(DEFAULT_IMAGE_TOKEN for _ in run))
        return "\n".join(lines), pictures

    def _picture(self, item: dict):
        if item["type"] == "image":
            return read_image(item["url"])
        if item["type"] == "video":
            return read_video(item, self.max_frames)
        raise LlavaError(f"messages: found {item['type']}, expected text, image or video")

    def loglikelihood(self, requests: list):
        raise LlavaError("llava_towers: found answers to score, expected --force_simple, with which lmms-eval has them")
