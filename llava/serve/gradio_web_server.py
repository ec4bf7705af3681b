"""The page of LLaVA's web demo, which does not exist here."""

from llava.absent import absent, absent_command

_INSTEAD = "chat with python -m llava.serve.cli, or export the model for a server with python -m llava.tools.export_hf"

build_demo = absent("llava.serve.gradio_web_server.build_demo", _INSTEAD)
main = absent_command("llava.serve.gradio_web_server", _INSTEAD)

if __name__ == "__main__":
    main()
