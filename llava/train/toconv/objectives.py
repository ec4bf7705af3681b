"""What a token compressor learns from images alone: to stay close to the tokens that it stands for.

Shapes: B images, N = in*in original tokens x, M = out*out compressed tokens y, D channels.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK = 10  # iterations whose intermediate results are kept at once for the gradient


def optimal_transport(cost, epsilon: float = 0.1, iterations: int = 100):
    """Cost <P, C> of the entropic transport plan P between uniform marginals (Sinkhorn, arXiv 1306.0895).

    The scalings and the plan stay logarithms, so that the result is finite for any finite cost.

    Args:
        cost: C, [B, M, N].

    Returns:
        [B], differentiable through the iterations.
    """
    log_kernel = -cost / epsilon
    log_u, log_v = torch.zeros_like(cost[:, :, 0]), torch.zeros_like(cost[:, 0])
    for start in range(0, iterations, CHUNK):
        count = min(CHUNK, iterations - start)
        # recomputed in the backward pass: hundreds of matrices of M x N per image would not fit beside the encoder
        log_u, log_v = checkpoint(_iterate, log_kernel, log_u, log_v, count, use_reentrant=False)
    # The last log_v makes every column sum to 1/N; as a softmax it does so even where the costs are so large that the
    # rounding of log_u + log_v alone would overflow.
    plan = torch.softmax(log_kernel + log_u[:, :, None], dim=1) / cost.shape[2]
    return (plan * cost).sum((1, 2))


def _iterate(log_kernel, log_u, log_v, count: int):
    log_a, log_b = (-math.log(size) for size in log_kernel.shape[1:])
    for _ in range(count):
        log_u = log_a - torch.logsumexp(log_kernel + log_v[:, None], dim=2)
        log_v = log_b - torch.logsumexp(log_kernel + log_u[:, :, None], dim=1)
    return log_u, log_v


def unit_tokens(tokens):
    """Tokens of length one in float32, whatever their scale (a square of the largest would overflow)."""
    tokens = tokens.float()
    largest = tokens.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(tokens.dtype).tiny)
    return F.normalize(tokens / largest, dim=-1)


def sinkhorn_loss(compressed, tokens, epsilon: float = 0.1, iterations: int = 100):
    """Optimal transport between the compressed and the original tokens of an image, as published for ToConv.

    Tokens have length one, cost is their squared Euclidean distance, and the loss of a batch is
    sqrt(mean <P, C> / (N + M) + 1e-8).

    Args:
        compressed: [B, M, D].
        tokens: [B, N, D].
    """
    y, x = unit_tokens(compressed), unit_tokens(tokens)
    cost = (2 - 2 * y @ x.transpose(1, 2)).clamp(0, 4)
    distance = optimal_transport(cost, epsilon, iterations).mean()
    return torch.sqrt(distance / (x.shape[1] + y.shape[1]) + 1e-8)


def field_cosine(compressed, tokens, compressor):
    """Cosine between each compressed token and the tokens of its receptive field, averaged over the field: [B, M].

    The field is the k x k window of the compressor's convolution, clipped at the border.
    """
    side = compressor.input_grid_size
    x = unit_tokens(tokens).transpose(1, 2).unflatten(2, (side, side))
    geometry = compressor.kernel_size, compressor.stride, compressor.padding
    # the mean of the cosines is the cosine with the mean of unit tokens
    field = F.avg_pool2d(x, *geometry, count_include_pad=False).flatten(2).transpose(1, 2)
    return (unit_tokens(compressed) * field).sum(-1)


class SinkhornObjective(nn.Module):
    """`sinkhorn`: optimal transport of the token sets plus the receptive-field cosine, as published for ToConv."""

    def __init__(self, compressor, config):
        super().__init__()
        self.config = config

    def update_critic(self, compressed, tokens, generator, average):
        """There is no critic."""
        return {}

    def forward(self, compressor, compressed, tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss, its parts before weighting)."""
        transport = sinkhorn_loss(compressed, tokens, self.config.sinkhorn_epsilon, self.config.sinkhorn_iterations)
        field = 1 - field_cosine(compressed, tokens, compressor).mean()
        loss = self.config.sinkhorn_weight * transport + self.config.field_weight * field
        return loss, {"transport": transport, "field": field}

    @staticmethod
    def measure(loss, parts):
        """What the best checkpoint has least of."""
        return loss


class Critic(nn.Module):
    """Score of single tokens, [..., D] -> [...]: high for original ones. No norm over a batch, which the gradient
    penalty of single samples forbids."""

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(dim),
            nn.Linear(dim, dim),
            nn.GELU(),
            nn.Linear(dim, dim // 2),
            nn.GELU(),
            nn.Linear(dim // 2, 1),
        )

    def forward(self, tokens):
        return self.layers(tokens).squeeze(-1)


class Decoder(nn.Module):
    """The original grid of tokens from the compressed one, [B, M, D] -> [B, N, D]."""

    def __init__(self, input_grid_size: int, output_grid_size: int, dim: int):
        super().__init__()
        self.sides = output_grid_size, input_grid_size
        self.spread = nn.Conv2d(dim, dim, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, dim, input_grid_size, input_grid_size))
        self.mix = nn.Conv2d(dim, dim, 1)

    def forward(self, compressed):
        before, after = self.sides
        grid = compressed.transpose(1, 2).unflatten(2, (before, before))
        grid = F.interpolate(grid, size=(after, after), mode="bilinear", align_corners=False)
        return self.mix(F.gelu(self.spread(grid) + self.place)).flatten(2).transpose(1, 2)


class WGANObjective(nn.Module):
    """`wgan_gp`: compressed tokens a critic takes for original ones (WGAN-GP, arXiv 1704.00028), and from which a
    decoder restores the original ones (mean squared error + 1 - cosine)."""

    def __init__(self, compressor, config):
        super().__init__()
        self.config = config
        self.critic = Critic(compressor.hidden_dim)
        self.decoder = Decoder(compressor.input_grid_size, compressor.output_grid_size, compressor.hidden_dim)
        # the critic needs no momentum from before its opponent moved
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.learning_rate, betas=(0.0, 0.9))

    def update_critic(self, compressed, tokens, generator, average):
        """`critic_steps` steps of the critic on one batch; as many original tokens as compressed ones are drawn.

        Args:
            generator: of the random draws, on the CPU.
            average: makes the mean over processes of a list of parameters' gradients.
        """
        fake, tokens = compressed.detach().float(), tokens.float()
        for _ in range(self.config.critic_steps):
            drawn = torch.rand(tokens.shape[:2], generator=generator).topk(fake.shape[1], dim=1).indices
            real = tokens.gather(1, drawn.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[2]))
            mix = torch.rand(fake.shape[:2], generator=generator).to(fake.device)[..., None]
            penalty = self._gradient_penalty(mix * real + (1 - mix) * fake)
            distance = self.critic(real).mean() - self.critic(fake).mean()
            self.critic_optimizer.zero_grad()
            (self.config.lambda_gp * penalty - distance).backward()
            average(list(self.critic.parameters()))
            self.critic_optimizer.step()
        return {"critic_distance": distance.detach(), "gradient_penalty": penalty.detach()}

    def _gradient_penalty(self, points):
        points = points.requires_grad_()
        (gradient,) = torch.autograd.grad(self.critic(points).sum(), points, create_graph=True)
        # 1e-12: the square root of a zero gradient has none itself
        return ((gradient.square().sum(-1) + 1e-12).sqrt() - 1).square().mean()

    def forward(self, compressor, compressed, tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(loss of compressor and decoder, its parts before weighting)."""
        tokens = tokens.float()
        restored = self.decoder(compressed.float())
        error = F.mse_loss(restored, tokens) + 1 - F.cosine_similarity(restored, tokens, dim=-1).mean()
        adversarial = -self.critic(compressed.float()).mean()
        loss = self.config.adversarial_weight * adversarial + error
        return loss, {"reconstruction": error, "adversarial": adversarial}

    @staticmethod
    def measure(loss, parts):
        """What the best checkpoint has least of: a critic's scores of different moments do not compare."""
        return parts["reconstruction"]


OBJECTIVES = {"sinkhorn": SinkhornObjective, "wgan_gp": WGANObjective}
