"""Reading a clip through its codec and choosing patches, against PyAV decoding the same frames alone.

    python benchmarks/video.py                              # clips of 10 s, 1280x720, made on the spot
    python benchmarks/video.py --clips A.mp4 B.webm         # yours

Both sides take turns in one process, with as many decoder threads. Writes one JSON.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# name: (encoder, container, options); what these encoders do by themselves, but fast
CODECS = {
    "h264": ("libx264", "mp4", {"preset": "fast"}),
    "mpeg4": ("mpeg4", "mp4", {"q:v": "4"}),
    "hevc": ("libx265", "mp4", {"preset": "ultrafast", "x265-params": "log-level=none"}),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="video.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--codecs", nargs="+", choices=CODECS, default=["h264", "mpeg4", "hevc"], help="of the clips made"
    )
    parser.add_argument("--clips", type=Path, nargs="+", help="files to read instead")
    parser.add_argument("--seconds", type=int, default=10, help="of a clip that is made, 30 frames each (10)")
    parser.add_argument("--resolution", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), default=(1280, 720))
    parser.add_argument("--frames", type=int, default=64, help="sampled frames (64)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("WIDTH", "HEIGHT"), help="that frames are scaled to")
    parser.add_argument("--patch", type=int, default=16, help="pixels of a patch's side (16)")
    parser.add_argument("--budget", type=float, default=0.125, help="share of the patches that is kept (0.125)")
    parser.add_argument(
        "--threads",
        type=int,
        choices=range(1, 5),
        default=1,
        help="of the decoder; those of H.264 and its like decode alone faster with more, ours do not (1)",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each side (7)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "video.json", help="JSON to write")
    return parser


def texture(generator, height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3] with the spectrum of photographs, amplitude falling with frequency."""
    noise = np.fft.rfft2(generator.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    grey = np.fft.irfft2(noise / frequency**1.1, s=(height, width))
    grey = 128 + 45 * (grey - grey.mean()) / grey.std()
    return np.clip(grey[..., None] * (1, 0.95, 0.9), 0, 255).astype(np.uint8)


def pictures(count: int, width: int, height: int):
    """Frames: a textured view over which the camera pans by 2 pixels a frame, for half of the time, and two squares
    that go their own ways."""
    generator = np.random.default_rng(0)
    view, side = texture(generator, height, width + count), height // 6
    squares = [texture(generator, side, side) for _ in range(2)]
    for at in range(count):
        left = 2 * min(at, count // 2)
        frame = view[:, left : left + width].copy()
        for turn, square in enumerate(squares):
            x = int((width - side) * (0.5 + 0.5 * np.sin(at / 40 + 2 * turn)))
            y = int((height - side) * (0.5 + 0.5 * np.sin(at / 31 + turn)))
            frame[y : y + side, x : x + side] = square
        yield frame


def make_clip(folder: Path, codec: str, seconds: int, width: int, height: int) -> Path:
    import av

    encoder, suffix, options = CODECS[codec]
    path = folder / f"{codec}.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(encoder, rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", 4_000_000
        for pixels in pictures(30 * seconds, width, height):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def decode(path: Path, threads: int) -> int:
    """The other side: every frame, left as the decoder gives it. How many there were."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        return sum(1 for _ in container.decode(stream))


def decode_rgb(path: Path, threads: int, wanted: set[int], size) -> np.ndarray:
    """The same with the sampled frames as one RGB array, which any reader makes of them."""
    import av
    from av.video.reformatter import Interpolation, VideoReformatter

    taken, convert = None, VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "AUTO", threads
        at = 0
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                width, height = size or (frame.width, frame.height)
                how = Interpolation.BICUBIC if size else Interpolation.BILINEAR
                taken = np.empty((len(wanted), height, width, 3), np.uint8) if taken is None else taken
                taken[at] = convert.reformat(frame, width, height, "rgb24", interpolation=how).to_ndarray()
                at += 1
    return taken


def clocked(work) -> tuple[object, float, float]:
    """(what it gives, wall seconds, CPU seconds of all threads)"""
    begun, cpu = time.perf_counter(), time.process_time()
    made = work()
    return made, time.perf_counter() - begun, time.process_time() - cpu


def measure(path: Path, args) -> dict:
    """Of one clip; prints a line."""
    from llava.images.clip import read_clip
    from llava.images.video_patches import patch_energy, select

    size = args.size and tuple(args.size)

    def choose(clip):
        energy = patch_energy(clip, args.patch)
        return select(energy, method="codec", budget=args.budget, changed_T=clip.changed_T), energy.size

    names = ("decode", "decode_rgb", "read", "select")
    wall, cpu = ({name: [] for name in names} for _ in range(2))
    for turn in range(args.repeats + 1):
        took = [clocked(lambda: decode(path, args.threads))]
        count = took[0][0]
        wanted = set(np.linspace(0, count - 1, args.frames, dtype=int).tolist())
        took.append(clocked(lambda wanted=wanted: decode_rgb(path, args.threads, wanted, size).shape))
        clip, *times = clocked(lambda: read_clip(path, args.frames, max_alive=4 * args.threads, size=size))
        took += [(None, *times), clocked(lambda clip=clip: choose(clip))]
        kept, total = took[-1][0]
        facts = {"size": list(clip.frames_THWC.shape[2:0:-1]), "source": clip.source}
        del clip  # so that no side meets memory that another holds
        if turn:  # the first of each side warms the caches
            for name, (_, seconds, used) in zip(names, took, strict=True):
                wall[name].append(seconds)
                cpu[name].append(used)
    figures = {"clip": path.name, "frames": count, **facts}
    figures |= {"patches": [len(kept), total]}
    for kind, times in (("", wall), ("_cpu", cpu)):
        ours = np.add(times["read"], times["select"])
        figures |= {f"{name}{kind}_s": summary(values) for name, values in times.items()}
        figures |= {f"ratio{kind}": summary(ours / times["decode"])}
        figures |= {f"ratio_rgb{kind}": summary(ours / times["decode_rgb"])}
    median = {name: value["median"] for name, value in figures.items() if isinstance(value, dict)}
    low, high = figures["ratio"]["p25"], figures["ratio"]["p75"]
    print(
        f"{path.name}: decoding {count} frames {median['decode_s']:.3f} s, {len(wanted)} of them to RGB "
        f"{median['decode_rgb_s']:.3f} s, reading + selection {median['read_s']:.3f} + {median['select_s']:.3f} s "
        f"({figures['source']}): {median['ratio']:.2f} x decoding ({low:.2f}-{high:.2f}), {median['ratio_rgb']:.2f} x "
        f"that with RGB; CPU time {median['ratio_cpu']:.2f} and {median['ratio_rgb_cpu']:.2f} x; "
        f"{len(kept):,} of {total:,} patches",
        flush=True,
    )
    return figures


def summary(values: list[float]) -> dict:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {"median": float(middle), "p25": float(low), "p75": float(high), "all": [float(value) for value in values]}


def main(argv=None) -> int:
    from gpu_checks.measure import hardware

    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        width, height = args.resolution
        made = args.clips or [make_clip(Path(folder), codec, args.seconds, width, height) for codec in args.codecs]
        rows = [measure(path, args) for path in made]
    shapes = {name: getattr(args, name) for name in ("frames", "size", "patch", "budget", "threads", "repeats")}
    report = {"schema": 1, "shapes": shapes, "hardware": hardware("cpu"), "figures": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2))
    print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
