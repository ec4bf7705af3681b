"""A model of LLaVA's web demo, which does not exist here."""

from llava.absent import absent, absent_command

_INSTEAD = "chat with python -m llava.serve.cli, or export the model for a server with python -m llava.tools.export_hf"

ModelWorker = absent("llava.serve.model_worker.ModelWorker", _INSTEAD)
main = absent_command("llava.serve.model_worker", _INSTEAD)

if __name__ == "__main__":
    main()
