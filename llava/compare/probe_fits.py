"""What is fitted on frozen features to see what they tell: a linear probe, k nearest neighbours, an attentive probe.

Shapes: N pictures, T tokens of a picture, D channels, H heads, K classes. All choices (penalty, learning rate) are made
on validation pictures, never on those that the scores are of; what was chosen is then fitted to both parts.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)  # of the mean loss, the strongest first
NEIGHBOURS, TEMPERATURE = 20, 0.07
RATES = (1e-3, 3e-3, 1e-2)
EPOCHS, LEAST_STEPS, BATCH, HEADS = 20, 300, 64, 8
_SCHEMA = 1  # of the probes: to be raised where they would score otherwise


@dataclass(frozen=True)
class Parts:
    """Which pictures are what: their classes [N], and numbers of those that are fitted to, decide, and are asked."""

    labels: torch.Tensor
    fit: list[int]
    validation: list[int]
    test: list[int]

    @property
    def train(self) -> list[int]:
        """All but the test pictures."""
        return [*self.fit, *self.validation]

    @property
    def classes(self) -> int:
        return int(self.labels.max()) + 1


@dataclass(frozen=True)
class Scored:
    """Of each test picture whether it was told right [n], and what was chosen on the way."""

    correct: torch.Tensor
    chosen: float


def stamp(parts: Parts, seed: int) -> str:
    """Changes with whatever is asked of the same features."""
    settings = PENALTIES, NEIGHBOURS, TEMPERATURE, RATES, EPOCHS, LEAST_STEPS, BATCH, HEADS, seed, _SCHEMA
    rows = parts.labels.tolist(), parts.fit, parts.validation, parts.test
    return hashlib.sha256(repr((settings, rows)).encode()).hexdigest()[:24]


# --- linear ---


def fit_logistic(x, y, classes: int, penalty: float, start=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Multinomial logistic regression: the least mean cross entropy + penalty / 2 * |weights|^2, by L-BFGS.

    Args:
        x: [N, D], float64.
        y: [N], class numbers.
        start: (weights, bias) to begin from; zeros otherwise.

    Returns:
        weights [K, D] and bias [K], which is not penalised.
    """
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=1000, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss():
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(x, *parameters), y) + penalty / 2 * parameters[0].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return parameters[0].detach(), parameters[1].detach()


def linear_probe(means: torch.Tensor, parts: Parts, quiet: bool = False) -> Scored:
    """Logistic regression on pictures' mean tokens (as CLIP's linear probe: Radford et al. 2021).

    Channels are standardised by the pictures that are fitted to. Of two penalties that tell as many validation pictures
    the stronger is taken; without such pictures the middle one.

    Args:
        means: [N, D].
    """
    from tqdm import tqdm

    penalty = PENALTIES[len(PENALTIES) // 2]
    if parts.validation:
        best, start, (x, other) = -1.0, None, _standardised(means, parts.fit, parts.validation)
        penalties = tqdm(PENALTIES, desc="linear probe", unit="penalty", disable=quiet)
        for candidate in penalties:  # each begins where a stronger one ended
            start = fit_logistic(x, parts.labels[parts.fit], parts.classes, candidate, start)
            share = _told(F.linear(other, *start), parts.labels[parts.validation]).double().mean().item()
            if share > best:
                best, penalty = share, candidate
    x, asked = _standardised(means, parts.train, parts.test)
    found = fit_logistic(x, parts.labels[parts.train], parts.classes, penalty)
    return Scored(_told(F.linear(asked, *found), parts.labels[parts.test]), penalty)


def _standardised(means, known: list[int], asked: list[int]) -> list[torch.Tensor]:
    known, asked = means[known].double(), means[asked].double()
    mean, std = known.mean(0), known.std(0, correction=0)
    scale = torch.where(std > 1e-8 * (1 + mean.abs()), std, 1.0)  # a channel that never changes tells nothing
    return [(x - mean) / scale for x in (known, asked)]


def _told(scores, labels):
    return scores.argmax(1) == labels


# --- nearest neighbours ---


def knn_probe(means: torch.Tensor, parts: Parts) -> Scored:
    """The class with the most weight among the k nearest training pictures: weights exp(cosine / 0.07) (Wu et al. 2018;
    as DINO: Caron et al. 2021). k is 20, or the count of the smallest class.

    Args:
        means: [N, D].
    """
    labels = parts.labels[parts.train]
    counts = labels.bincount(minlength=parts.classes)
    k = min(NEIGHBOURS, int(counts.min()))
    known, asked = (F.normalize(means[rows].double(), dim=1) for rows in (parts.train, parts.test))
    guesses = []
    for rows in asked.split(1024):
        similar, nearest = (rows @ known.T).topk(k, dim=1)
        votes = rows.new_zeros(len(rows), parts.classes)
        votes.scatter_add_(1, labels[nearest], (similar / TEMPERATURE).exp())
        guesses.append(votes.argmax(1))
    return Scored(torch.cat(guesses) == parts.labels[parts.test], k)


# --- attentive ---


class AttentiveHead(nn.Module):
    """Cross-attention of one learned query over a picture's tokens, and a linear classifier of what it gathers (CAE:
    Chen et al. 2022; as AIM's probe: El-Nouby et al. 2024).

    The keys are linear in the tokens and there is one query, so that a head's query times its key matrix is one vector
    of D channels: it is what is learned, and no key is computed. Tokens are standardised by `mean` and `scale`, [D].
    """

    def __init__(self, mean, scale, classes: int):
        super().__init__()
        width = len(mean)
        heads = math.gcd(width, HEADS)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.query = nn.Parameter(torch.randn(heads, width) * 0.02)
        self.value = nn.Parameter(torch.randn(heads, width, width // heads) * width**-0.5)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens, mask):
        """[B, T, D] and mask [B, T], true where there is a token -> scores [B, K]."""
        tokens = ((tokens - self.mean) / self.scale).masked_fill(~mask[:, :, None], 0)
        weights = torch.einsum("btd,hd->bht", tokens, self.query).masked_fill(~mask[:, None], -torch.inf).softmax(2)
        gathered = torch.einsum("bht,btd->bhd", weights, tokens)
        return self.classifier(torch.einsum("bhd,hdk->bhk", gathered, self.value).flatten(1))


def attentive_probe(batch: Callable, moments: Callable, parts: Parts, seed: int = 0, quiet: bool = False) -> Scored:
    """`AttentiveHead` trained by AdamW for 20 epochs (300 steps, where that is more) with a cosine schedule.

    The learning rate is one of three, the one that tells most validation pictures; of equals the lowest. The same seed
    gives the same head.

    Args:
        batch: numbers of pictures -> (tokens [B, T, D], mask [B, T]).
        moments: numbers of pictures -> mean and standard deviation of their tokens' channels, [D] each.
    """
    from tqdm import tqdm

    rates = RATES if parts.validation else (RATES[len(RATES) // 2],)
    steps = _steps(len(parts.fit)) * len(rates) * (len(rates) > 1) + _steps(len(parts.train))
    with tqdm(total=steps, desc="attentive probe", unit="step", disable=quiet) as bar:
        best, rate = -1.0, rates[0]
        for candidate in rates if len(rates) > 1 else ():
            head = _trained(batch, moments, parts, parts.fit, candidate, seed, bar)
            share = _head_told(head, batch, parts, parts.validation).double().mean().item()
            if share > best:
                best, rate = share, candidate
        head = _trained(batch, moments, parts, parts.train, rate, seed, bar)
        return Scored(_head_told(head, batch, parts, parts.test), rate)


def _steps(pictures: int) -> int:
    return max(EPOCHS * math.ceil(pictures / BATCH), LEAST_STEPS)


def _trained(batch, moments, parts: Parts, rows: list[int], rate: float, seed: int, bar) -> AttentiveHead:
    labels, total = parts.labels, _steps(len(rows))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = AttentiveHead(*moments(rows), parts.classes).to(labels.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: (1 + math.cos(math.pi * at / total)) / 2)
    order = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    with torch.enable_grad():
        for _ in range(total):
            if not waiting:
                waiting = torch.randperm(len(rows), generator=order).tolist()
            chosen, waiting = [rows[i] for i in waiting[:BATCH]], waiting[BATCH:]
            loss = F.cross_entropy(head(*batch(chosen)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()
    return head


@torch.no_grad()
def _head_told(head, batch, parts: Parts, rows: list[int]):
    parts_of = [rows[at : at + BATCH] for at in range(0, len(rows), BATCH)]
    return torch.cat([_told(head(*batch(chosen)), parts.labels[chosen]) for chosen in parts_of])
