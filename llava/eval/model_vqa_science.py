"""LLaVA's answers to ScienceQA, whose program does not exist here."""

from llava.absent import absent_command

main = absent_command(
    "llava.eval.model_vqa_science",
    "ask its questions as LLaVA's records with python -m llava.eval.model_vqa, or use lmms-eval's task scienceqa_img",
)

if __name__ == "__main__":
    main()
