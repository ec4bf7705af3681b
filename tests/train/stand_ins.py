"""Small models in place of those that published launch lines name: of the same kinds, and towers of the same sides."""

from pathlib import Path
from types import SimpleNamespace

from tests import tiny
from tests.support import encoders

# what a name of a model or checkpoint holds -> kind of language model
LANGUAGE_MODELS = {"mistral": "mistral", "vicuna": "llama", "llava-v1.5": "llama", "qwen3": "qwen3"}
CHECKPOINTS = ("llava-v1.5-13b", "onevision/", "llava-onevision")  # that have a tower already
# name of a tower -> (kind, side in pixels)
TOWERS = {
    "openai/clip-vit-large-patch14": ("clip", 224),
    "openai/clip-vit-large-patch14-336": ("clip", 336),
    "google/siglip-so400m-patch14-384": ("siglip", 384),
    "lmms-lab/onevision-encoder-large": ("hevc_vit", 448),
    "SigLIP2/siglip2-so400m-patch16-naflex": ("siglip2", 224),
}
# a run of one step on a CPU; compiling takes a minute, and what is not installed is asked for nowhere
SMALL = {
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "save_strategy": "no",
    "report_to": "none",
    "torch_compile": False,
    "deepspeed": None,
    "disable_tqdm": True,
}


class StandIns:
    """Made in a folder when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder

    @staticmethod
    def kind_of(name: str) -> str:
        """The kind of language model that a name stands for, and whether it is a checkpoint with a tower."""
        kind = next((kind for part, kind in LANGUAGE_MODELS.items() if part in name.lower()), "qwen2")
        return f"{kind} with a tower" if any(part in name.lower() for part in CHECKPOINTS) else kind

    def language_model(self, kind: str) -> str:
        folder = self.folder / kind
        heads = {"head_dim": 16} if kind == "qwen3" else {}
        return str(folder) if folder.exists() else tiny.llm(folder, kind, max_position_embeddings=32768, **heads)

    def tower(self, name: str) -> str:
        kind, side = TOWERS[name]
        folder = self.folder / f"{kind}_{side}"
        if not folder.exists():
            if kind == "siglip2":
                return encoders.folder(folder, "siglip2_vision_model")
            tiny.tower(folder, kind, side=side)
        return str(folder)

    def checkpoint(self, kind: str, tower: str) -> str:
        folder = self.folder / f"{kind}_{Path(tower).name}"
        if not folder.exists():
            from llava.model.builder import load_tokenizer, make_config, read_config
            from llava.model.families import model_classes

            base = self.language_model(kind)
            architecture = {"llama": "LlavaLlamaForCausalLM", "qwen2": "LlavaQwenForCausalLM"}[kind]
            model_class, config_class = model_classes(architecture)
            model = model_class(make_config(base, config_class, read_config(base)))
            parts = SimpleNamespace(
                vision_tower=tower,
                mm_vision_select_layer=-2,
                mm_vision_select_feature="patch",
                mm_projector_type="mlp2x_gelu",
                mm_patch_merge_type="flat",
            )
            model.get_model().initialize_vision_modules(parts)
            model.save_pretrained(folder)
            load_tokenizer(base).save_pretrained(folder)
        return str(folder)

    def projector(self, kind: str, width: int) -> str:
        """The name that scripts give it, where the first stage here has left the file under another."""
        from llava.model.checkpoint import save_projector
        from llava.model.multimodal_projector.builder import build_vision_projector

        folder = self.folder / f"projector_{kind}_{width}"
        sizes = SimpleNamespace(mm_projector_type=kind, mm_hidden_size=width, hidden_size=32)
        projector = build_vision_projector(sizes)
        save_projector({f"model.mm_projector.{name}": w for name, w in projector.state_dict().items()}, str(folder))
        return str(folder / "mm_projector.bin")

    def records(self, plain: bool) -> str:
        kinds = "iii" if plain else "itm"
        path = self.folder / kinds / "records.json"
        return str(path) if path.exists() else tiny.records(path.parent, kinds)

    def line(self, argv: list[str], out: Path) -> list[str]:
        """A launch line with these models and data in place of its own, and `SMALL`."""
        from llava.config.commandline import parse_command_line

        given = parse_command_line(argv).values
        kind, begun, _ = self.kind_of(given["model_name_or_path"]).partition(" with")
        tower = self.tower(given["vision_tower"])
        changed = {
            "model_name_or_path": self.checkpoint(kind, tower) if begun else self.language_model(kind),
            "vision_tower": tower,
            "data_path": self.records(given.get("version") == "plain"),
            "output_dir": out,
            **{key: value for key, value in SMALL.items() if value is not None},
        }
        changed["image_folder"] = Path(changed["data_path"]).parent / "images"
        if "pretrain_mm_mlp_adapter" in given:
            width = 64 if TOWERS[given["vision_tower"]][0] == "hevc_vit" else 32
            changed["pretrain_mm_mlp_adapter"] = self.projector(given.get("mm_projector_type", "linear"), width)
        if "video_folder" in given:
            changed["video_folder"] = changed["image_folder"]
        return [
            *without(argv, "deepspeed"),
            *(word for key, value in changed.items() for word in (f"--{key}", str(value))),
        ]


def without(argv: list[str], key: str) -> list[str]:
    """A line without one of its keys and the value that follows it."""
    place = argv.index(f"--{key}") if f"--{key}" in argv else None
    return argv if place is None else argv[:place] + argv[place + 2 :]
