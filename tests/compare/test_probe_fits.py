"""The three probes on features made here: against scikit-learn, formulas written out, and PyTorch's own attention."""

import math

import numpy as np
import pytest
import torch

from llava.compare import probe_fits
from llava.compare.probe_features import Features
from llava.compare.probe_fits import (
    PENALTIES,
    AttentiveHead,
    Parts,
    attentive_probe,
    fit_logistic,
    knn_probe,
    linear_probe,
)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Enough steps for what is asked here."""
    monkeypatch.setattr(probe_fits, "LEAST_STEPS", 100)
    monkeypatch.setattr(probe_fits, "EPOCHS", 4)
    monkeypatch.setattr(probe_fits, "RATES", (3e-3, 1e-2))


def features(tokens: list[torch.Tensor]) -> Features:
    """As they come from files, two of them."""
    half = len(tokens) // 2
    return Features(
        [
            {
                "tokens": torch.cat(part),
                "lengths": torch.tensor([len(t) for t in part]),
                "means": torch.stack([t.double().mean(0) for t in part]),
                "squares": torch.stack([t.double().square().mean(0) for t in part]),
            }
            for part in (tokens[:half], tokens[half:])
        ]
    )


def parts_of(labels, fit: float = 0.4, validation: float = 0.2) -> Parts:
    cuts = [round(len(labels) * share) for share in (fit, fit + validation)]
    rows = list(range(len(labels)))
    return Parts(labels, rows[: cuts[0]], rows[cuts[0] : cuts[1]], rows[cuts[1] :])


def clusters(count: int, classes: int = 3, width: int = 8, spread: float = 0.4, seed: int = 0):
    """Tokens, two to five of each picture, around a centre for each class; and labels."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=rng) * 2
    labels = torch.randint(classes, (count,), generator=rng)
    lengths = torch.randint(2, 6, (count,), generator=rng).tolist()
    tokens = [
        centres[y] + spread * torch.randn(n, width, generator=rng)
        for y, n in zip(labels.tolist(), lengths, strict=True)
    ]
    return features(tokens), labels


def share(scored) -> float:
    return scored.correct.double().mean().item()


def all_three(made: Features, parts: Parts) -> dict[str, float]:
    return {
        "linear": share(linear_probe(made.means, parts, quiet=True)),
        "knn": share(knn_probe(made.means, parts)),
        "attentive": share(attentive_probe(made.batch, made.moments, parts, quiet=True)),
    }


def test_classes_apart_are_told():
    made, labels = clusters(300)
    assert min(all_three(made, parts_of(labels)).values()) > 0.97


def test_shuffled_labels_are_not_told():
    made, labels = clusters(600)
    shuffled = labels[torch.randperm(600, generator=torch.Generator().manual_seed(5))]
    found = all_three(made, parts_of(shuffled))
    reach = 4 * math.sqrt(2 / 9 / 240)  # of a share of 240 guesses among three
    assert all(abs(value - 1 / 3) < reach for value in found.values())


# --- linear ---


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_logistic_regression_is_scikit_learns(penalty):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn comes with the demo's extra")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 6)), rng.integers(0, 3, 90)
    x[:, 0] += y  # some of it can be told
    theirs = linear_model.LogisticRegression(C=1 / (penalty * len(x)), tol=1e-10, max_iter=10_000).fit(x, y)
    weight, bias = fit_logistic(torch.tensor(x), torch.tensor(y), 3, penalty)
    assert np.allclose(weight, theirs.coef_, atol=1e-4)
    own, other = bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean()  # a common part tells nothing
    assert np.allclose(own, other, atol=1e-4)


def test_penalty_is_the_one_that_tells_most_validation_pictures():
    linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn comes with the demo's extra")
    rng = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (150,), generator=rng)  # of two classes scikit-learn has another penalty
    means = torch.randn(150, 40, generator=rng).double()
    means[:, 0] += 1.2 * labels
    means[:, 1] *= 100  # standardising matters
    parts = parts_of(labels)
    known, asked = means[parts.fit], means[parts.validation]
    mean, std = known.mean(0), known.std(0, correction=0)
    shares = [
        linear_model.LogisticRegression(C=1 / (penalty * len(known)), tol=1e-10, max_iter=10_000)
        .fit((known - mean) / std, labels[parts.fit])
        .score((asked - mean) / std, labels[parts.validation])
        for penalty in PENALTIES
    ]
    assert len(set(shares)) > 1
    found = linear_probe(means, parts, quiet=True)
    assert found.chosen == PENALTIES[int(np.argmax(shares))]
    # what is scored is a fit to both parts
    own = []
    for rows in (parts.train, parts.fit):
        mean, std = means[rows].mean(0), means[rows].std(0, correction=0)
        model = linear_model.LogisticRegression(C=1 / (found.chosen * len(rows)), tol=1e-10, max_iter=10_000)
        model.fit((means[rows] - mean) / std, labels[rows])
        told = model.predict((means[parts.test] - mean) / std)
        own.append((told == labels[parts.test].numpy()).tolist())
    assert found.correct.tolist() == own[0] != own[1]


def test_test_pictures_choose_nothing():
    made, labels = clusters(200, spread=4.0)
    parts = parts_of(labels)
    other = labels.clone()
    other[parts.test] = (other[parts.test] + 1) % 3
    wrong = Parts(other, parts.fit, parts.validation, parts.test)
    for kind in (
        lambda p: linear_probe(made.means, p, quiet=True),
        lambda p: attentive_probe(made.batch, made.moments, p, quiet=True),
    ):
        assert kind(parts).chosen == kind(wrong).chosen


def test_without_validation_pictures_the_middle_is_taken(monkeypatch):
    made, labels = clusters(60)
    parts = Parts(labels, list(range(40)), [], list(range(40, 60)))
    monkeypatch.setattr(probe_fits, "RATES", (1e-9, 1e-2, 1e-8))
    assert linear_probe(made.means, parts, quiet=True).chosen == 1e-3
    found = attentive_probe(made.batch, made.moments, parts, quiet=True)
    assert found.chosen == 1e-2 and share(found) > 0.9


def test_a_channel_that_never_changes_does_no_harm():
    made, labels = clusters(120)
    made.means[:, 0] = 1e6
    assert share(linear_probe(made.means, parts_of(labels), quiet=True)) > 0.9


# --- nearest neighbours ---


def test_neighbours_vote_as_the_formula_says():
    made, labels = clusters(150, classes=4, spread=5.0)
    parts = parts_of(labels)
    means, right = made.means.numpy(), []
    k = min(20, int(np.bincount(labels[parts.train]).min()))
    for i in parts.test:
        cosine = {j: means[i] @ means[j] / np.linalg.norm(means[i]) / np.linalg.norm(means[j]) for j in parts.train}
        votes = np.zeros(4)
        for j in sorted(cosine, key=cosine.get)[-k:]:
            votes[labels[j]] += np.exp(cosine[j] / 0.07)
        right.append(votes.argmax() == labels[i].item())
    found = knn_probe(made.means, parts)
    assert found.correct.tolist() == right and 0.3 < np.mean(right) < 0.95
    assert found.chosen == k < 20


def test_no_more_neighbours_than_the_smallest_class_has():
    made, labels = clusters(100, classes=2)
    rows = [i for i in range(80) if labels[i] == 0] + [i for i in range(80) if labels[i] == 1][:3]
    found = knn_probe(made.means, Parts(labels, rows[:-1], rows[-1:], list(range(80, 100))))
    assert found.chosen == 3 and share(found) == 1


# --- attentive ---


def one_in_many(count: int, tokens: int = 12, width: int = 8):
    """Pictures whose class is a sign in one marked token; the others make up for it, so that the mean says nothing."""
    rng = torch.Generator().manual_seed(0)
    labels, made = torch.randint(2, (count,), generator=rng), []
    for label in labels.tolist():
        x = torch.randn(tokens, width, generator=rng)
        at = int(torch.randint(tokens, (1,), generator=rng))
        x[at, 0] = 6.0  # the mark
        x[:, 1] -= x[:, 1].mean()
        sign = 3.0 * (2 * label - 1)
        x[:, 1] -= sign / (tokens - 1)
        x[at, 1] += sign + sign / (tokens - 1)
        made.append(x)
    return features(made), labels


def test_attention_finds_the_one_token_that_tells(monkeypatch):
    monkeypatch.setattr(probe_fits, "LEAST_STEPS", 300)
    monkeypatch.setattr(probe_fits, "RATES", (1e-2,))
    made, labels = one_in_many(600)
    parts = parts_of(labels)
    assert share(linear_probe(made.means, parts, quiet=True)) < 0.65
    assert share(knn_probe(made.means, parts)) < 0.65
    assert share(attentive_probe(made.batch, made.moments, parts, quiet=True)) > 0.95


def test_head_is_multi_head_attention_with_one_query():
    torch.manual_seed(0)
    width, heads = 16, 8
    own = AttentiveHead(torch.zeros(width), torch.ones(width), 5)
    own.query.data = torch.randn(heads, width) * 0.1
    theirs = torch.nn.MultiheadAttention(width, heads, bias=False, batch_first=True)
    theirs.out_proj.weight.data = torch.eye(width)
    # keys are the tokens where the key matrix is the identity: a head then reads its own channels of them
    query = torch.randn(width)
    matrices = torch.randn(3, width, width) * 0.3
    theirs.in_proj_weight.data = matrices.flatten(0, 1)
    size = width // heads
    asked = (matrices[0] @ query).view(heads, size)
    keys = matrices[1].view(heads, size, width)
    own.query.data = torch.einsum("hk,hkd->hd", asked, keys) / size**0.5
    own.value.data = matrices[2].view(heads, size, width).transpose(1, 2).contiguous()
    tokens, lengths = torch.randn(3, 7, width), torch.tensor([7, 4, 1])
    mask = torch.arange(7) < lengths[:, None]
    gathered, _ = theirs(query.expand(3, 1, width), tokens, tokens, key_padding_mask=~mask)
    assert torch.allclose(own(tokens, mask), own.classifier(gathered[:, 0]), atol=1e-5)


def test_padding_counts_for_nothing():
    torch.manual_seed(0)
    head = AttentiveHead(torch.ones(8), torch.full((8,), 2.0), 3)
    tokens = [torch.randn(n, 8) for n in (2, 5)]
    made = features(tokens)
    batch, mask = made.batch([0, 1])
    assert batch.shape == (2, 5, 8) and mask.sum(1).tolist() == [2, 5]
    alone = [head(*made.batch([row])) for row in (0, 1)]
    batch = torch.cat([batch, torch.zeros(2, 3, 8)], 1)
    mask = torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1)
    batch[~mask] = torch.nan
    together = head(batch, mask)
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    together.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_attention_is_the_same_each_time():
    made, labels = clusters(120, spread=3.0)
    parts, heads = parts_of(labels), []
    for _ in range(2):
        torch.rand(3)  # what has been drawn before does not matter
        found = probe_fits._trained(made.batch, made.moments, parts, parts.fit, 1e-2, 0, _Bar())
        heads.append(torch.cat([parameter.flatten() for parameter in found.parameters()]))
    assert torch.equal(*heads)


class _Bar:
    def update(self):
        pass


def test_moments_are_the_tokens_own():
    rng = torch.Generator().manual_seed(0)
    tokens = [torch.randn(6, 4, generator=rng) * 3 + 50 for _ in range(10)]
    mean, deviation = features(tokens).moments([1, 4, 7])
    chosen = torch.cat([tokens[i] for i in (1, 4, 7)]).double()
    assert torch.allclose(mean.double(), chosen.mean(0), rtol=1e-6)
    assert torch.allclose(deviation.double(), chosen.std(0, correction=0), rtol=1e-5)
