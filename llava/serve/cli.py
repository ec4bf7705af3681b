"""Talk to a checkpoint.

    python -m llava.serve.cli --model-path checkpoints/demo/finetune --image-file photo.jpg
    printf 'What is shown?\\nIn which colour?\\n' | python -m llava.serve.cli --model-path DIR --image-file photo.jpg

The conversation template and the tokens that end an answer come from the checkpoint. In a pipe every line is a message
and stdout holds the answers alone; commands such as /image work there too.
"""

import argparse
import contextlib
import os
import sys
import unicodedata

from llava.errors import LlavaError, report_errors
from llava.inference import own_code

COMMANDS = """\
/image PATH   show a picture with the next message (several: once each)
/clear        forget the conversation and its pictures
/save FILE    write the conversation as a LLaVA record (.json, .jsonl)
/help         these lines
/quit         end (also Ctrl-D); Ctrl-C ends an answer"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.cli",
        description=__doc__,
        epilog=f"commands:\n{COMMANDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--model-base", help="language model under a projector-only checkpoint or an adapter")
    parser.add_argument(
        "--image-file",
        nargs="+",
        default=[],
        metavar="FILE",
        help="pictures that go with the first message, also as a,b",
    )
    parser.add_argument("--allow-remote", action="store_true", help="let pictures be http(s) addresses")
    parser.add_argument("--conv-mode", help="conversation template (default: the checkpoint's)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0: always the likeliest token (default: 0.2)")
    parser.add_argument("--top-p", type=float, help="sample from the likeliest tokens of this share alone")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longest answer, in tokens (default: 512)")
    parser.add_argument("--seed", type=int, help="makes sampled answers repeatable")
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-8bit", action="store_true", help="quantise with bitsandbytes")
    bits.add_argument("--load-4bit", action="store_true", help="quantise with bitsandbytes")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", help="default: float32 on cpu, else bfloat16")
    own_code.add_options(parser)
    parser.add_argument("--debug", action="store_true", help="print every prompt on stderr")
    return parser


def check_args(args) -> None:
    """LlavaError for values that only fail later, and worse."""
    from llava.conversation import get_template

    if args.conv_mode is not None:
        get_template(args.conv_mode)
    if args.temperature < 0:
        raise LlavaError(f"--temperature: found {args.temperature:g}, expected 0 or more")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise LlavaError(f"--top-p: found {args.top_p:g}, expected more than 0 and at most 1")
    if args.max_new_tokens < 1:
        raise LlavaError(f"--max-new-tokens: found {args.max_new_tokens}, expected 1 or more")


def check_device(name: str | None) -> None:
    """LlavaError for a device that is none, or that is not here."""
    import torch

    if name is None:
        return
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise LlavaError(f"--device: found {name!r}, expected cpu, cuda or cuda:N") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise LlavaError(f"--device: found {name!r}, but PyTorch sees no GPU here; expected cpu")


def sampling(args) -> dict:
    """Options of transformers' `generate`; greedy ones silence the checkpoint's own sampling settings."""
    if args.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    top_p = {} if args.top_p is None else {"top_p": args.top_p}
    return {"do_sample": True, "temperature": args.temperature, **top_p}


def load_chat(args):
    """The `Chat` that the command line describes, its first pictures waiting."""
    from llava.inference.pictures import open_picture, split_sources

    # before the model, which takes longer to load
    pictures = [open_picture(source, args.allow_remote) for source in split_sources(args.image_file)]
    check_device(args.device)

    from llava.inference.engine import Inference
    from llava.serve.chat import Chat

    options = {"load_8bit": args.load_8bit, "load_4bit": args.load_4bit, **own_code.overrides(args)}
    with contextlib.redirect_stdout(sys.stderr):  # stdout is the answers'
        inference = Inference.load(
            args.model_path, args.model_base, version=args.conv_mode, device=args.device, dtype=args.dtype, **options
        )
    if pictures and inference.image_processor is None:
        raise LlavaError(f"--image-file: {args.model_path} has no vision tower, expected text alone")
    if args.seed is not None:
        from transformers import set_seed

        set_seed(args.seed)
    chat = Chat(inference, max_new_tokens=args.max_new_tokens, allow_remote=args.allow_remote, **sampling(args))
    chat.waiting = pictures
    return chat


class Terminal:
    """Reads messages and commands and writes answers: to a person, or as one end of a pipe.

    In a pipe stdout gets the answers alone, each ended by a newline, and faults go to stderr.
    """

    def __init__(self, chat, debug: bool = False):
        self.chat, self.debug = chat, debug
        self.interactive = chat.interruptible = sys.stdin.isatty()
        self.started = False  # whether anything of the answer was shown

    def run(self) -> None:
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (editing and history for input())
            for picture in self.chat.waiting:
                self.notify(f"{picture.source}: goes with the first message")
            self.notify("/help lists the commands")
        while True:
            try:
                line = self.read()
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                print("\n(/quit or Ctrl-D ends)", flush=True)
                continue
            if line is None or not self.handle(line.strip()):
                return

    def read(self) -> str | None:
        """The next line; None at the end."""
        if not self.interactive:
            line = sys.stdin.readline()
            return line or None
        try:
            if sys.stdout.isatty():
                return input("USER: ")
            print("USER: ", end="", file=sys.stderr, flush=True)  # stdout goes elsewhere
            return input()
        except EOFError:
            print(file=sys.stderr)
            return None

    def handle(self, line: str) -> bool:
        """Do what a line says; False ends the session."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        try:
            if not line:
                return True
            if command in ("/quit", "/exit"):
                return False
            if command == "/help":
                self.notify(COMMANDS)
            elif command == "/clear":
                self.chat.clear()
                self.notify("forgotten")
            elif command == "/image":
                self.add_pictures(rest)
            elif command == "/save":
                self.notify(f"saved to {self.chat.save(self.needed(rest, '/save FILE'))}")
            elif self.looks_like_a_command(command):
                raise LlavaError(f"{command}: no such command; /help lists them")
            else:
                self.answer(line)
        except LlavaError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return True

    @staticmethod
    def looks_like_a_command(word: str) -> bool:
        """/word, but not a path, which may well be what a message begins with."""
        return word.startswith("/") and word[1:].isalpha()

    @staticmethod
    def needed(rest: str, usage: str) -> str:
        if not rest:
            raise LlavaError(f"nothing after the command, expected {usage}")
        return rest

    def add_pictures(self, rest: str) -> None:
        from llava.inference.pictures import split_sources

        for source in split_sources([self.needed(rest, "/image PATH")]):
            picture = self.chat.add_picture(source)
            self.notify(f"{source}: {picture.image.width} x {picture.image.height} pixels, goes with the next message")
        inference = self.chat.inference
        several = len(self.chat.pictures) + len(self.chat.waiting) > 1
        if several and inference.family.squares_several(inference.loaded):
            self.notify("several pictures: each is squared and given one crop, as in training")

    def answer(self, text: str) -> None:
        if self.debug:
            turns = [*self.chat.turns, ("human", self.chat.message(text))]
            print(f"prompt: {self.chat.prompt(turns)!r}", file=sys.stderr, flush=True)
        self.started, answer = False, ""
        try:
            answer = self.chat.ask(text, self.show)
        except KeyboardInterrupt:  # before the first token
            if not self.interactive:
                raise
        if not self.started:
            self.show("")
        print(flush=True)
        if not answer:
            self.notify("(no answer; the message is forgotten)")

    def show(self, piece: str) -> None:
        """A piece of an answer."""
        if self.interactive and not self.started:
            print("ASSISTANT: ", end="")
        self.started = True
        if sys.stdout.isatty():  # a model must not steer the terminal
            piece = "".join(c for c in piece if c in "\n\t" or unicodedata.category(c) != "Cc")
        print(piece, end="", flush=True)

    def notify(self, text: str) -> None:
        """A notice, which is no part of an answer: at a terminal alone."""
        if self.interactive:
            print(text, file=sys.stdout if sys.stdout.isatty() else sys.stderr, flush=True)


@report_errors
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_args(args)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what is not in the locale's encoding is no reason to end
    try:
        Terminal(load_chat(args), args.debug).run()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has gone; nothing more can be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
