"""LLaVA's answers to Q-Bench, whose program does not exist here."""

from llava.absent import absent_command

main = absent_command(
    "llava.eval.model_vqa_qbench",
    "ask its questions with python -m llava.eval.model_vqa, or use lmms-eval",
)

if __name__ == "__main__":
    main()
