"""`python -m llava.config show CONFIG [--key value ...]`, `... value KEY CONFIG ...`, `... table [--update FILE]`."""

import sys

from llava.config.resolve import DEFAULT, Run, resolve
from llava.config.schema import all_keys
from llava.config.table import markdown, update_file
from llava.errors import LlavaError, report_errors

USAGE = """usage: python -m llava.config show [CONFIG.yaml] [--all] [--key value ...]
           the resolved run and where each value comes from; --all: values left at their default as well
       python -m llava.config value KEY [CONFIG.yaml] [--key value ...]
           the value of one key in that run, for scripts
       python -m llava.config table [--update FILE]
           the key table in markdown; --update: rewrite it in FILE between <!-- keys:begin --> and <!-- keys:end -->"""


def show_text(run: Run, everything: bool = False) -> str:
    """The resolved run, one `key  value  source` line per key, in aligned columns."""
    rows = []
    for name in all_keys():
        if everything or run.source(name) != DEFAULT:
            rows.append((name, _value_text(run[name]), run.source(name)))
    names = max((len(row[0]) for row in rows), default=0)
    values = min(max((len(row[1]) for row in rows), default=0), 60)
    lines = [f"config: {run.config or '(none)'}", f"tower:  {run.tower or '(none)'}", ""]
    lines += [f"{name:<{names}}  {value:<{values}}  {source}" for name, value, source in rows]
    return "\n".join(lines)


def _value_text(value) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "(none)" if value is None else repr(value) if value == "" else str(value)


@report_errors
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE)
        return
    command, rest = argv[0], argv[1:]
    if command == "show":
        everything = "--all" in rest
        run = resolve([word for word in rest if word != "--all"])
        from llava.train.settings import check_settings  # what a run would be refused for is said here as there

        check_settings(run)
        for notice in run.notices:
            print(f"note: {notice}", file=sys.stderr)
        print(show_text(run, everything))
    elif command == "value" and rest and rest[0] in all_keys():
        print(_value_text(resolve(rest[1:])[rest[0]]))
    elif command == "table" and not rest:
        print(markdown())
    elif command == "table" and len(rest) == 2 and rest[0] == "--update":
        print(f"{rest[1]}: {'updated' if update_file(rest[1]) else 'already up to date'}")
    else:
        raise LlavaError(f"{' '.join(argv)!r} is not a command of llava.config; see --help")


if __name__ == "__main__":
    main()
