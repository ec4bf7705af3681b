"""Vision-language models of transformers as they are trained here: the loss alone, and folders that are stock ones."""

import functools

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from llava.model.loss import supervised_training


class SavesStockNames:
    """In front of a class of transformers: weights are saved under their published names, however they were loaded.

    Left to itself, transformers undoes on saving all renamings that it knows, also those that a model loaded under
    ZeRO-3 had no use for.
    """

    def save_pretrained(self, save_directory, *args, **kwargs):
        self._weight_conversions = get_checkpoint_conversion_mapping(type(self).__name__)
        super().save_pretrained(save_directory, *args, **kwargs)


@functools.cache
def training_class(stock):
    """A class of transformers with `supervised_training` and its own name, by which transformers finds the names of
    its weights and which saved folders carry."""
    own = type(stock.__name__, (SavesStockNames, stock), {"__module__": stock.__module__, "__doc__": stock.__doc__})
    return supervised_training()(own)
