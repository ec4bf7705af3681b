"""What compressed tokens keep: a linear probe of their classes, and a picture of their similarity to the originals."""

import torch
import torch.nn.functional as F

from llava.train.toconv.objectives import field_cosine

# of the kernel's mean diagonal
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


def ridge_accuracy(train, train_classes, test, test_classes) -> float:
    """Share of test rows whose class a linear ridge regression on the training rows tells.

    Features are standardised by the training rows; the penalty is the one with the least squared leave-one-out error
    on them, in closed form. Solved for the rows rather than the columns, of which there may be many more.

    Args:
        train, test: [rows, features].
        train_classes, test_classes: [rows], class numbers.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    kernel = (train @ train.T).double()
    target = F.one_hot(train_classes, int(train_classes.max()) + 1).double()
    offset = target.mean(0)
    target = target - offset
    values, vectors = torch.linalg.eigh(kernel)
    rotated = vectors.T @ target
    best_error, best = None, None
    for penalty in PENALTIES:
        shrunk = 1 / (values.clamp(min=0) + penalty * kernel.diagonal().mean())
        weights = (vectors * shrunk) @ rotated  # (K + penalty)^-1 target
        inverse_diagonal = (vectors.square() * shrunk).sum(1)
        error = (weights / inverse_diagonal[:, None]).square().mean()  # leave-one-out residuals
        if best_error is None or error < best_error:
            best_error, best = error, weights
    scores = (test @ train.T).double() @ best + offset
    return (scores.argmax(1) == test_classes).double().mean().item()


def average_pooling(tokens, input_grid_size: int, output_grid_size: int):
    """[B, in*in, D] -> [B, out*out, D], the compression that learns nothing."""
    grid = tokens.transpose(1, 2).unflatten(2, (input_grid_size, input_grid_size))
    return F.adaptive_avg_pool2d(grid, output_grid_size).flatten(2).transpose(1, 2)


@torch.no_grad()
def probe(compressor, train, train_classes, test, test_classes) -> dict[str, float]:
    """Accuracy of `ridge_accuracy` on all tokens of an image in a row: uncompressed, average-pooled and compressed.

    Args:
        train, test: lists of original tokens, [N, D] each, on any device.
    """
    sides = compressor.input_grid_size, compressor.output_grid_size
    device = next(compressor.parameters()).device

    def compress(tokens):
        return torch.cat([compressor(part.to(device)).cpu() for part in tokens.split(64)])

    kinds = {
        "uncompressed": lambda tokens: tokens,
        "average pooling": lambda tokens: average_pooling(tokens, *sides),
        "compressed": compress,
    }
    train, test = torch.stack(train).float().cpu(), torch.stack(test).float().cpu()
    return {
        name: ridge_accuracy(kind(train).flatten(1), train_classes, kind(test).flatten(1), test_classes)
        for name, kind in kinds.items()
    }


@torch.no_grad()
def similarity_sum(compressor, compressed, tokens):
    """Receptive-field cosine of each output position, [M], summed over a batch."""
    return field_cosine(compressed, tokens, compressor).sum(0)


def draw_heat_map(similarity, path: str, title: str) -> None:
    """A PNG of the similarity per output token, [M], row-major: dark 0 or less, light 1."""
    from llava.drawing.panels import heat_panel

    side = round(len(similarity) ** 0.5)
    cell = max(480 // side, 1)
    title = f"{title}: mean {similarity.mean():.3f}, min {similarity.min():.3f}, max {similarity.max():.3f}"
    values = similarity.detach().cpu().float().view(side, side).numpy()
    heat_panel(values, cell, 1.0, 1, side * cell, side * cell, title).save(path)
