"""LLaVA-NeXT's scores of its interleaved benchmarks, whose program does not exist here."""

from llava.absent import absent_command

main = absent_command(
    "llava.eval.evaluate_interleave",
    "score answers with python -m llava.eval.score",
)

if __name__ == "__main__":
    main()
