"""A model of LLaVA's web demo, served by SGLang, which does not exist here."""

from llava.absent import absent_command

_INSTEAD = "chat with python -m llava.serve.cli, or export the model for a server with python -m llava.tools.export_hf"

main = absent_command("llava.serve.sglang_worker", _INSTEAD)

if __name__ == "__main__":
    main()
