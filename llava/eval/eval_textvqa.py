"""LLaVA's score of TextVQA, whose program does not exist here."""

from llava.absent import absent_command

main = absent_command(
    "llava.eval.eval_textvqa",
    "score answers with python -m llava.eval.score, metric vqa, or use lmms-eval's task textvqa_val",
)

if __name__ == "__main__":
    main()
