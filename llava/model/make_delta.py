"""Weights as a difference to LLaMA's (LLaVA's first releases), which are not made or read here."""

from llava.absent import absent, absent_command

_INSTEAD = "weights are saved whole"

make_delta = absent("llava.model.make_delta.make_delta", _INSTEAD)
main = absent_command("llava.model.make_delta", _INSTEAD)

if __name__ == "__main__":
    main()
