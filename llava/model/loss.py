"""The training loss of every model: the output layer runs where there is something to predict, and nowhere else.

Shapes: B rows, L tokens, D channels, N of the tokens, V words of the vocabulary.
"""

import functools
import inspect

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.model.checked_inputs import whole_numbers
from llava.model.chunked_loss import count_chunks, summed_loss
from llava.model.host import send, supervised_places
from llava.model.liger import fused_loss, fuses_loss


def output_logits(model, hidden_ND: torch.Tensor) -> torch.Tensor:
    """[N, D] -> [N, V]: the model's output layer and what its family does behind it, in the model's dtype.

    That is a scale (Cohere's `logit_scale`, Granite's `logits_scaling`) and a soft cap (`final_logit_softcapping` of
    Gemma), as the text config says. Not covered: families that give these names another meaning (HyperCLOVA X
    multiplies by `logits_scaling`) or change the hidden states first (MiniCPM3).
    """
    logits = model.get_output_embeddings()(hidden_ND)
    return _behind_output(model.config.get_text_config(), logits)


def _behind_output(config, logits: torch.Tensor) -> torch.Tensor:
    """What a family does behind its output layer."""
    if (scale := getattr(config, "logit_scale", None)) is not None:
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def supervised_loss(
    model, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor, num_items_in_batch=None, supervised=None
) -> torch.Tensor:
    """Cross entropy of each token with a label, from the hidden state before it: summed in float32, over a count.

    Its memory does not grow with the number of labels: see `llava.model.chunked_loss`.

    Args:
        hidden_BLD: what the model's output layer is given.
        labels_BL: IGNORE_INDEX where nothing is learned.
        num_items_in_batch: the count; None: this batch's labels, so that the loss is their mean.
        supervised: what `supervised_places` says of the labels, beside the hidden states; None: the labels are read,
            for which the host waits on a GPU.

    Returns:
        A scalar; without any label it is 0, and gradients through it are 0.
    """
    if supervised is None:
        supervised = send([*supervised_places(labels_BL.cpu())], hidden_BLD.device)
    places, targets = supervised
    hidden_ND = hidden_BLD.flatten(0, 1).index_select(0, places)
    if len(targets) and fuses_loss(model):
        total = fused_loss(model, hidden_ND, targets)
    elif (chunks := count_chunks(model, hidden_ND)) == 1:
        total = F.cross_entropy(output_logits(model, hidden_ND).float(), targets, reduction="sum")
    else:
        behind = functools.partial(_behind_output, model.config.get_text_config())
        total = summed_loss(model, behind, hidden_ND, targets, chunks)
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    if not isinstance(count, torch.Tensor):  # filled in on the device: a copy from here would wait for it
        count = torch.full((), count, device=total.device)
    return total / count.to(total.device).clamp(min=1)


def supervised_training(*inputs: str):
    """Class decorator for a vision-language model of transformers: in training it computes the loss alone.

    With labels, in training mode or with `num_items_in_batch`, its forward returns `supervised_loss` of its
    `self.model`, without logits; else it is the forward that the class has. `inputs` are named in its signature
    besides those the class names itself, since `Trainer` and `generate` look there for what a model takes. If `host`
    is one of them, `HostCopies` of the labels spare the host a wait.
    """

    def decorate(model_class):
        own_forward = model_class.forward
        signature = inspect.signature(own_forward)
        *named, rest = signature.parameters.values()  # the last one is **kwargs
        more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in inputs]

        @functools.wraps(own_forward)
        def forward(self, *args, **kwargs):
            if kwargs.get("labels") is not None:
                kwargs["labels"] = whole_numbers("labels", kwargs["labels"])
            if not self.training and kwargs.get("num_items_in_batch") is None:
                return own_forward(self, *args, **kwargs)
            given = dict(zip((parameter.name for parameter in named[1:]), args, strict=False)) | kwargs
            labels, count = given.pop("labels", None), given.pop("num_items_in_batch", None)
            if labels is None:
                return own_forward(self, *args, **kwargs)
            given.pop("logits_to_keep", None)
            host, supervised = given.get("host"), None
            hidden = self.model(**given | {"use_cache": False})[0]
            if host is not None and host.labels is not None:
                supervised = send([*supervised_places(host.labels)], hidden.device)
            return CausalLMOutputWithPast(loss=supervised_loss(self, hidden, labels, count, supervised))

        forward.__signature__ = signature.replace(parameters=[*named, *more, rest])
        model_class.forward = forward
        return model_class

    return decorate
