"""LLaVA's other name for `python -m llava.eval.model_vqa`."""

from llava.eval.model_vqa import main

if __name__ == "__main__":
    main()
