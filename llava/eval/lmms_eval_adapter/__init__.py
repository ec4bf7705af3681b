"""The models of this package for lmms-eval (0.7.3), found through its entry points:

    python -m lmms_eval --model llava_towers --model_args pretrained=DIR --tasks mme,ai2d --batch_size 16

lmms-eval knows two kinds of models. Its guide recommends chat models, which get messages with images between the texts,
and these are what `llava_towers` is; but its chat tasks only generate. Tasks that compare the likelihoods of given
answers (`output_type: multiple_choice`) take the older kind, which exists here too: add `--force_simple` for them.

`--model_args` are those of `models.LlavaTowers`. Nothing here imports torchvision, timm or wandb.
"""


def manifest():
    """What the entry point `lmms_eval.models` names; called whenever lmms-eval starts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = f"{__name__}.models"
    return ModelManifest(
        model_id="llava_towers",
        simple_class_path=f"{here}.LlavaTowers",
        chat_class_path=f"{here}.LlavaTowersChat",
    )
