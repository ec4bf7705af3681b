"""Checkpoints of LLaVA's first version, which are not made or read here."""

from llava.absent import absent, absent_command

_INSTEAD = "every folder that is saved here is whole; adapters are merged by python -m llava.tools.merge_lora"

consolidate_ckpt = absent("llava.model.consolidate.consolidate_ckpt", _INSTEAD)
main = absent_command("llava.model.consolidate", _INSTEAD)

if __name__ == "__main__":
    main()
