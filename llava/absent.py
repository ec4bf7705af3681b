"""Parts of LLaVA's and LLaVA-NeXT's code that do not exist here: importing one is no error, using it is one line."""

from llava.errors import LlavaError, report_errors


def absent(name: str, instead: str) -> type:
    """A stand-in for a class or a function.

    Args:
        name: in full, such as llava.model.apply_delta.apply_delta.
        instead: what to use, as the end of a sentence.

    Returns:
        A class whose call and `from_pretrained` raise a `LlavaError` that says so.
    """

    def refuse(*args, **kwargs):
        raise LlavaError(f"{name}: there is no such part here; {instead}")

    module, _, last = name.rpartition(".")
    methods = {"__new__": refuse, "from_pretrained": staticmethod(refuse)}
    return type(last, (), {"__module__": module, "__doc__": f"Not here; {instead}.", **methods})


def absent_command(name: str, instead: str):
    """The `main` of a module that LLaVA's documents start with `python -m`: it ends with one line, exit status 2."""

    @report_errors
    def main(argv=None):
        raise LlavaError(f"python -m {name}: there is no such program here; {instead}")

    return main
