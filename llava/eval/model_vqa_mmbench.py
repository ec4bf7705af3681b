"""LLaVA's answers to MMBench's table, whose program does not exist here."""

from llava.absent import absent_command

main = absent_command(
    "llava.eval.model_vqa_mmbench",
    "use lmms-eval's tasks mmbench_* (python -m llava.train.recipe, evaluations of the kind lmms_eval)",
)

if __name__ == "__main__":
    main()
