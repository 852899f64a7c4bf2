"""The parameters in which a control is linear, and their Fisher information.

With shifts ``c_k = sum_i theta_i phi_i(x_k)`` the Gram matrix ``G = E_{P^u} sum_k phi(x_k) phi(x_k)^T`` is the Fisher
information of the path law in theta, and the Hessian of every regression ``E sum_k |c_k - y_k|^2/2``. So
``theta - G^{-1} grad`` is the least-squares solution of a regression, and ``delta^T G delta / 2`` the KL between the
path laws before and after a step delta.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain


@dataclass
class Gram:
    """``G`` in float64, of all outputs: their features are p shared ones and q of each output's own, so that the
    matrix of output o is ``[[shared, border_o], [border_o^T, own_o]]``.

    Vectors are ``(p + q, m)``, a column for each output, shared features first.

    Attributes:
        shared: ``(p, p)``. border: ``(p, m, q)``. own: ``(m, q, q)``; both None where outputs have no features of
            their own.
    """

    shared: Tensor
    border: Tensor | None = None
    own: Tensor | None = None

    @property
    def blocks(self) -> list[Tensor]:
        return [t for t in (self.shared, self.border, self.own) if t is not None]

    def lerp_(self, other: Gram, weight: float) -> Gram:
        for mine, its in zip(self.blocks, other.blocks):
            mine.lerp_(its, weight)
        return self

    def product(self, v: Tensor) -> Tensor:
        """``G v`` of a vector ``(p + q, m)``."""
        if self.border is None or self.own is None:
            return self.shared @ v
        s, o = v.split((len(self.shared), self.own.shape[1]))
        first = self.shared @ s + torch.einsum("pmq,qm->pm", self.border, o)
        second = torch.einsum("pmq,pm->qm", self.border, s) + torch.einsum("mij,jm->im", self.own, o)
        return torch.cat((first, second))

    def scale(self, outputs: int) -> Tensor:
        """The diagonal and a tenth of its mean, ``(p + q, m)``: what damping is relative to.

        Of the shared features the mean is the geometric one of all outputs': they have one matrix then.
        """
        shared = self.shared.diagonal()
        if self.own is None:
            return (shared + 0.1 * shared.mean()).unsqueeze(1).expand(-1, outputs)
        own = self.own.diagonal(dim1=1, dim2=2)
        mean = (shared.sum() + own.sum(1)) / (len(shared) + own.shape[1])
        middle = mean.clamp(min=torch.finfo(mean.dtype).tiny).log().mean().exp()
        shared = (shared + 0.1 * middle).unsqueeze(1).expand(-1, outputs)
        return torch.cat((shared, (own + 0.1 * mean.unsqueeze(1)).mT))

    def damped(self, damping: float, outputs: int) -> DampedGram:
        """``G + damping scale`` as factors, with as much more damping as rounding makes necessary."""
        scale = self.scale(outputs)
        while True:
            if (found := DampedGram.of(self, damping, scale)) is not None:
                return found
            damping = max(10 * damping, 1e-7)


@dataclass
class DampedGram:
    """``G + D`` of a :class:`Gram`, D a diagonal: the Cholesky factor of the shared block, which is one for all
    outputs, and those of each output's Schur complement.

    Attributes:
        added: D, ``(p + q, m)``. root: ``(p, p)``. border: ``root^{-1} border``. roots: ``(m, q, q)``.
    """

    added: Tensor
    root: Tensor
    border: Tensor | None = None
    roots: Tensor | None = None

    @classmethod
    def of(cls, gram: Gram, damping: float, scale: Tensor) -> DampedGram | None:
        """None where a factor does not exist in floating-point arithmetic."""
        added, p = damping * scale, len(gram.shared)
        root, info = torch.linalg.cholesky_ex(gram.shared + torch.diag(added[:p, 0]))
        if bool(info):
            return None
        if gram.border is None or gram.own is None:
            return cls(added, root)
        border = torch.linalg.solve_triangular(root, gram.border.flatten(1), upper=False).unflatten(
            1, gram.own.shape[:2]
        )
        by_output = border.permute(1, 0, 2)
        complements = gram.own + torch.diag_embed(added[p:].mT) - by_output.mT @ by_output
        roots, infos = torch.linalg.cholesky_ex(complements)
        return None if bool(infos.any()) else cls(added, root, border, roots)

    def solve(self, v: Tensor) -> Tensor:
        """``(G + D)^{-1} v`` of a vector ``(p + q, m)``."""
        if self.border is None or self.roots is None:
            return torch.cholesky_solve(v, self.root)
        s, o = v.split((len(self.root), self.roots.shape[1]))
        s = torch.linalg.solve_triangular(self.root, s, upper=False)
        o = o - torch.einsum("pmq,pm->qm", self.border, s)
        o = torch.cholesky_solve(o.mT.unsqueeze(2), self.roots).squeeze(2).mT
        s = s - torch.einsum("pmq,qm->pm", self.border, o)
        return torch.cat((torch.linalg.solve_triangular(self.root.mT, s, upper=True), o))


class LinearPart:
    """Parameters in which a control is linear, seen as columns, one for each output.

    Attributes:
        parameters: in the order of ``gather`` and ``scatter``.
        redundant: parameters that make no function the others cannot make; they stay as they are.
    """

    parameters: list[nn.Parameter]
    redundant: list[nn.Parameter]

    def gram(
        self,
        chain: Chain,
        states: Tensor,
        y: Any = None,
        weights: Tensor | None = None,
        step_weights: Tensor | None = None,
    ) -> Gram:
        """``G``, from stored states ``(K, batch, *event)`` of all steps of the chain.

        Args:
            weights: of the paths, ``(batch,)`` with mean 1; None: all 1.
        """
        raise NotImplementedError

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters as ``(p + q, m)``."""
        raise NotImplementedError

    def scatter(self, values: Tensor) -> list[Tensor]:
        """The inverse of ``gather``."""
        raise NotImplementedError


class PartOfSegment(LinearPart):
    """A linear part of one segment of a chain: the learned start or the process after it."""

    def __init__(self, part: LinearPart, segment: int) -> None:
        self.part, self.segment = part, segment
        self.parameters, self.redundant = part.parameters, part.redundant
        self.gather, self.scatter = part.gather, part.scatter

    def gram(
        self,
        chain: Chain,
        states: Tensor,
        y: Any = None,
        weights: Tensor | None = None,
        step_weights: Tensor | None = None,
    ) -> Gram:
        own = slice(chain.start, None) if self.segment else slice(chain.start)
        step_weights = None if step_weights is None else step_weights[own]
        return self.part.gram(chain.segments[self.segment], states[own], y, weights, step_weights)


def gram_of_features(
    chain: Chain,
    phi: Tensor,
    modulated: Tensor,
    plain: Tensor,
    own: Tensor | None,
    weights: Tensor | None = None,
    step_weights: Tensor | None = None,
) -> Gram:
    """``G`` of features ``[phi_f(t) modulated_i(x), plain_j(x, t)]`` for all outputs, and ``phi_f(t) own_{o,j}(x)`` for
    output o alone.

    The moments of the states are taken time by time, and multiplied with those of the time features: the cost is that
    of the moments.

    Args:
        phi: ``(K, F)``; modulated: ``(K, batch, a)``; plain: ``(K, batch, h)``; own: ``(K, batch, m, j)`` or None.
    """
    gains = [chain.gain(k) for k in range(chain.steps)]
    # a matrix gain enters by its mean square: G is a metric here, and need not be exact
    square = [float(g.square().sum()) / g.shape[1] if isinstance(g, Tensor) else g * g for g in gains]
    weight = phi.new_tensor(square, dtype=torch.float64).reshape(-1, 1, 1)
    if step_weights is not None:
        weight = weight * step_weights.double().reshape(-1, 1, 1)
    phi = phi.double()
    a, batch, time = modulated.shape[2], modulated.shape[1], phi.shape[1]
    z = torch.cat((modulated, plain), 2)
    if weights is not None:
        root = weights.sqrt().unsqueeze(1)
        z, own = z * root, None if own is None else own * root.unsqueeze(2)
    moments = (z.mT @ z).double() * (weight / batch)
    corner = torch.einsum("kf,kg,kij->figj", phi, phi, moments[:, :a, :a]).reshape(time * a, time * a)
    side = torch.einsum("kf,kij->fij", phi, moments[:, :a, a:]).flatten(0, 1)
    shared = torch.cat((torch.cat((corner, side), 1), torch.cat((side.mT, moments[:, a:, a:].sum(0)), 1)))
    if own is None:
        return Gram(shared)
    m, j = own.shape[2:]
    cross = torch.einsum("kbi,kbq->kiq", z, own.flatten(2)).double() * (weight / batch)
    cross = cross.unflatten(2, (m, j))
    upper = torch.einsum("kf,kg,kimj->fimgj", phi, phi, cross[:, :a]).reshape(time * a, m, time * j)
    lower = torch.einsum("kg,kimj->imgj", phi, cross[:, a:]).reshape(-1, m, time * j)
    inner = torch.einsum("kbmi,kbmj->kmij", own, own).double() * (weight.unsqueeze(3) / batch)
    block = torch.einsum("kf,kg,kmij->mfigj", phi, phi, inner).reshape(m, time * j, time * j)
    return Gram(shared, torch.cat((upper, lower)), block)
