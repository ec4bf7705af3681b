"""One trained model of a comparison that is asked about pictures: what it is made of, and its time to first token."""

import statistics
import time
from itertools import islice

from llava.errors import LlavaError

PICTURES = 32  # whose tokens are counted
ASKED = 4  # of the questions, those that are timed in each turn
RECORDS = 512  # of training data that stand in for questions, the first ones


class Asking:
    """A trained model with questions about pictures.

    Args:
        subject: a `llava.compare.cost.Subject`.
        run: its resolved training stage.
        device: "cuda" or "cpu".

    Attributes:
        seconds: from a decoded picture to the first token of the answer, one for each question of each turn.
    """

    def __init__(self, subject, run, device: str):
        self.subject, self.run, self.device = subject, run, device
        self.inference, self.questions, self.seconds = None, None, []

    def load(self) -> None:
        """Put the model on the device, and read the questions.

        Raises:
            LlavaError: the model cannot be loaded, or there is no question about a picture.
        """
        if self.inference is None:
            from llava.config.own_tower import class_path
            from llava.inference.engine import Inference
            from llava.model.adaptive_patches import PatchChoice

            subject, own = self.subject, self.run["vision_tower"]
            given = {"vision_tower": own} if own and class_path(own) else {}  # the user's word, in the run's settings
            self.inference = Inference.load(subject.model, subject.base, device=self.device, **given)
            if subject.selection is not None:
                choice = PatchChoice.parse(subject.selection)
                self.inference.family.choose_patches(self.inference.loaded, choice)
            self.questions = self.questions or self._read_questions()
        self.inference.model.to(self.device)

    def rest(self) -> None:
        """Leave the device and keep the model in the host's memory."""
        if self.inference is not None:
            self.inference.model.to("cpu")

    def drop(self) -> None:
        self.inference = None

    def _read_questions(self) -> list:
        """The first questions about different pictures, one picture each."""
        from llava.eval.questions import read_questions

        path, records, folder = self._records()
        seeing = list({record["image"]: record for record in records}.values())[:PICTURES]
        if not seeing:
            raise LlavaError(f"{path}: found no record with one picture, expected some to measure with")
        found = read_questions(seeing, path, folder, self.inference.template, self.run["allow_absolute_paths"])
        return list({question.record: question for question in reversed(found)}.values())[::-1]

    def _records(self) -> tuple[str, list[dict], str | None]:
        """(file, its first records with one picture, their image folder): the subject's, else the first file of the
        stage's data that has some."""
        from llava.data.records import load_records, read_file

        subject, run = self.subject, self.run
        if subject.data_path is not None:
            return subject.data_path, _with_picture(read_file(subject.data_path)), subject.image_folder
        for part, records in load_records(run["data_path"], run["seed"]).by_part():
            if seeing := _with_picture(records):
                return part.path, seeing, part.image_folder or run["image_folder"]
        return run["data_path"], [], None

    def facts(self) -> dict:
        """`visual_tokens` (of the language model, of one picture on average), `tower_params`, `total_params`."""
        family, model = self.inference.family, self.inference.model
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        tower = {"mm_vision_tower", "mm_token_compressor"}
        self._counts = [count for question in self.questions for count in self._tokens(question)]
        return {
            "visual_tokens": statistics.fmean(tokens for _, tokens in self._counts),
            "tower_params": sum(size for name, size in sizes.items() if family.part_of(name) in tower),
            "total_params": sum(sizes.values()),
        }

    def _tokens(self, question) -> list[tuple[int, int]]:
        inference = self.inference
        inputs = inference.inputs([question.prompt(inference)], [self._pictures(question)])
        return inference.family.picture_tokens(inputs, inference.loaded)

    def gflops(self) -> tuple[float, bool]:
        """(1e9 operations of the vision encoder for one image, whether the image is of the encoder's own size); one
        without such a size has those of the pictures on average, one that chooses patches those of the chosen ones.
        After `facts`.

        Raises:
            LlavaError: they cannot be counted.
        """
        from llava.train.flops import encoder_flops

        family, loaded, config = self.inference.family, self.inference.loaded, self.inference.model.config
        found, patches = family.image_flops(loaded), [patches for patches, _ in self._counts]
        if found is None:
            return encoder_flops(config, patches) / len(patches) / 1e9, False
        choice = family.patch_choice(loaded)
        if choice is not None:  # counted with all patches: of these the pictures keep some
            family.choose_patches(loaded, None)
            every = [patches for question in self.questions for patches, _ in self._tokens(question)]
            family.choose_patches(loaded, choice)
            found *= encoder_flops(config, patches) / encoder_flops(config, every)
        return found / 1e9, True

    @staticmethod
    def _pictures(question) -> list:
        from llava.images.reading import load_image

        return [load_image(path) for path in question.paths]

    def measure(self) -> None:
        """One turn: a question to warm up, then the timed ones. Batches of one; a picture is decoded before its time
        begins, and its preprocessing is in it."""
        asked = [(question.prompt(self.inference), self._pictures(question)) for question in self.questions[:ASKED]]
        self._first_token(*asked[0])
        self.seconds += [self._first_token(*question) for question in asked]

    def _first_token(self, prompt: list[int], pictures: list) -> float:
        _wait(self.device)
        start = time.perf_counter()
        self.inference.generate([prompt], [pictures], max_new_tokens=1)
        _wait(self.device)
        return time.perf_counter() - start

    @property
    def figures(self) -> dict:
        return {"ttft_ms": [1000 * seconds for seconds in self.seconds]}


def _with_picture(records: list[dict]) -> list[dict]:
    return list(islice((record for record in records if isinstance(record.get("image"), str)), RECORDS))


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
