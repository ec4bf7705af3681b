"""Weights as a difference to LLaMA's (LLaVA's first releases), which are not made or read here."""

from llava.absent import absent, absent_command

_INSTEAD = "weights are published whole: load the merged checkpoint"

apply_delta = absent("llava.model.apply_delta.apply_delta", _INSTEAD)
main = absent_command("llava.model.apply_delta", _INSTEAD)

if __name__ == "__main__":
    main()
