"""Pictures in a conversation's messages, as LLaVA's web demo keeps them: (text, picture or list of pictures, mode).

A picture is a PIL image or a path. What a model sees is not made here (see `llava.mm_utils.process_images`).
"""

import base64
import io
import re

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.errors import LlavaError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tiff", ".webp")
VIDEO_ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".wmv", ".flv", ".mpeg", ".mpg")
_BORDER = (122, 116, 104)  # LLaVA's, the mean colour of CLIP's pictures


def pictures_of(message) -> tuple[list, str]:
    """The pictures of one message, and how they are to be shaped."""
    if not isinstance(message, tuple):
        return [], "Default"
    pictures = message[1] if isinstance(message[1], list) else [message[1]]
    return pictures, message[2] if len(message) > 2 else "Default"


def shown(picture, mode: str, max_len: int, min_len: int):
    """A PIL image (RGB) to show: squared ("Pad"), 336 x 336 ("Resize") or as it is ("Default", "Crop"); then scaled,
    its aspect kept, to a shorter side of at most `min_len` and a longer one of at most `max_len` pixels, never larger.

    Raises:
        LlavaError: another mode, or a file that cannot be read.
    """
    from PIL import Image

    if mode not in ("Pad", "Default", "Crop", "Resize"):
        raise LlavaError(f"image_process_mode: found {mode!r}, expected Pad, Default, Crop or Resize")
    if not isinstance(picture, Image.Image):
        try:
            with Image.open(picture) as file:
                picture = file.convert("RGB")
        except OSError as error:
            raise LlavaError(f"image {picture}: cannot be read ({error})") from None
    picture = picture.convert("RGB")
    if mode == "Pad":
        side = max(picture.size)
        canvas = Image.new("RGB", (side, side), _BORDER)
        canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = canvas
    elif mode == "Resize":
        picture = picture.resize((336, 336))
    aspect = max(picture.size) / min(picture.size)
    shorter = max(int(min(max_len / aspect, min_len, min(picture.size))), 1)
    sides = int(shorter * aspect), shorter
    return picture.resize(sides if picture.width >= picture.height else sides[::-1])


def as_base64(picture, image_format: str) -> str:
    """A PIL image's file as base64 text."""
    held = io.BytesIO()
    picture.save(held, format=image_format)
    return base64.b64encode(held.getvalue()).decode()


def is_path(picture, endings: tuple[str, ...]) -> bool:
    """Whether a message's picture is a path with one of these endings."""
    return isinstance(picture, str) and picture.lower().endswith(endings)


def html(data: str) -> str:
    """A JPEG, given as base64 text, as the web page's chat shows it."""
    return f'<img src="data:image/jpeg;base64,{data}" alt="picture" style="max-width: 256px; max-height: 256px"/>'


class ShowsPictures:
    """Mixin of `Conversation`: its `messages` from `offset` on, the user's and the model's in turn."""

    def process_image(
        self, image, image_process_mode, return_pil=False, image_format="PNG", max_len: int = 672, min_len: int = 448
    ):
        """A picture to show, as base64 text or PIL image; see `shown`."""
        image = shown(image, image_process_mode, max_len, min_len)
        return image if return_pil else as_base64(image, image_format)

    def get_images(self, return_pil: bool = False, return_path: bool = False) -> list:
        """The pictures of the user's messages: as base64 text of a PNG, as PIL images, or as they were given.

        A path that is no picture's, such as a video's, always stays as it is.
        """
        found = []
        for _, message in self.messages[self.offset :][::2]:
            pictures, mode = pictures_of(message)
            for picture in pictures:
                as_given = return_path or (isinstance(picture, str) and not self.is_image_file(picture))
                found.append(picture if as_given else self.process_image(picture, mode, return_pil))
        return found

    def is_image_file(self, filename) -> bool:
        return is_path(filename, IMAGE_ENDINGS)

    def is_video_file(self, filename) -> bool:
        return is_path(filename, VIDEO_ENDINGS)

    def to_gradio_chatbot(self) -> list:
        """[question, answer] of each round, pictures as HTML in front of their text; a video is a round of its own,
        ((path,), None)."""
        rounds = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2:
                rounds[-1][-1] = message
                continue
            pictures, _ = pictures_of(message)
            text = message[0] if isinstance(message, tuple) else message
            if len(pictures) == 1:
                text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
            elif pictures:
                text = re.sub(f"(?<={DEFAULT_IMAGE_TOKEN})\n(?={DEFAULT_IMAGE_TOKEN})", " ", text).strip()
            rounds += [((picture,), None) for picture in pictures if self.is_video_file(picture)]
            images = [picture for picture in pictures if not isinstance(picture, str) or self.is_image_file(picture)]
            tags = [html(self.process_image(image, "Default", image_format="JPEG")) for image in images]
            rounds.append(["\n\n".join([*tags, "", text]) if tags else text, None])
        return rounds
