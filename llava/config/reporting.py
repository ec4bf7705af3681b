"""`report_to`: what transformers reports metrics to, and the packages that it needs for that."""

import importlib.util

from llava.errors import LlavaError

# name -> packages, any one of which will do; none: a service that its environment brings
REPORTS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
ALONE = ("none", "all")  # nothing, or whatever is installed


def report_names(value: str | list[str]) -> list[str]:
    """The names in a value of `report_to`, without none and all."""
    return [name for name in ([value] if isinstance(value, str) else value) if name not in ALONE]


def check_reports(run) -> None:
    """Raise `LlavaError` for a package that `report_to` needs and this machine lacks."""
    for name in report_names(run["report_to"]):
        packages = REPORTS[name]
        if packages and not any(importlib.util.find_spec(package) for package in packages):
            raise LlavaError(
                f"{run.source('report_to')}: report_to is {name}, which needs the package {' or '.join(packages)}; "
                "expected it installed, or report_to none"
            )
