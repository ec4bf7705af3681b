"""The key table: as markdown for the docs, and as the text of `--help`."""

from pathlib import Path

from llava.config.keys import GROUPS
from llava.config.old_names import OLD_NAMES
from llava.config.schema import Key, own_keys
from llava.config.trainer_fields import trainer_fields
from llava.errors import LlavaError

BEGIN, END = "<!-- keys:begin -->", "<!-- keys:end -->"


def _default(key: Key) -> str:
    return "" if key.default is None else repr(key.default) if key.default == "" else str(key.default)


def _note(key: Key) -> str:
    notes = [key.description]
    if key.only_default:
        notes = [f"{key.only_default} is not available in this version: only the default is accepted"]
    if key.aliases:
        notes.append("also called " + ", ".join(f"`{alias}`" for alias in key.aliases))
    return "; ".join(notes).replace("|", "\\|")


def markdown() -> str:
    """The documented key table, without the markers."""
    lines = []
    for group, model in GROUPS.items():
        lines += [f"**{group}**: {model.__doc__.strip()}", "", "| key | type | default | tower YAML | meaning |"]
        lines.append("|---|---|---|---|---|")
        for key in own_keys().values():
            if key.group == group:
                tower = "yes" if key.tower else ""
                lines.append(f"| `{key.name}` | {key.expected} | {_default(key)} | {tower} | {_note(key)} |")
        lines.append("")
    lines += [
        "Older names of transformers 4, translated, or accepted with one warning where nothing takes their value:",
        ", ".join(f"`{name}`" + (f" (`{old.target}`)" if old.target else "") for name, old in sorted(OLD_NAMES.items()))
        + ".",
    ]
    return "\n".join(lines)


def update_file(path: str | Path) -> bool:
    """Rewrite the table between the markers in `path`; True if the file changed. `LlavaError` without the markers."""
    path = Path(path)
    if not path.is_file():
        raise LlavaError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise LlavaError(f"{path}: expected the lines {BEGIN} and {END} once each, in this order")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    new = f"{head}{BEGIN}\n{markdown()}\n{END}{tail}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


def help_text() -> str:
    """The text of the trainer's `--help`."""
    lines = [
        "usage: python -m llava.train.train [CONFIG.yaml] [--key value | --key=value | --flag | --no_flag ...]",
        "",
        "Precedence: command line > CONFIG.yaml > tower YAML (--tower FILE) > checkpoint config > default.",
        "`python -m llava.config show CONFIG.yaml [--key value ...]` prints the resolved run.",
    ]
    for group, model in GROUPS.items():
        lines += ["", f"{group}: {model.__doc__.strip()}"]
        for key in own_keys().values():
            if key.group == group and not key.only_default:
                default = f" [{_default(key)}]" if _default(key) else ""
                lines.append(f"  --{key.name:<30} {key.description}{default}")
    others = [name for name in trainer_fields() if name not in own_keys()]
    lines += ["", "and the fields of transformers.TrainingArguments, with its defaults:"]
    row = " "
    for name in others:
        if len(row) + len(name) > 115:
            lines.append(row)
            row = " "
        row += f" --{name}"
    return "\n".join([*lines, row])
