"""The parameters in which a control is linear, and their Fisher information.

With shifts ``c_k = sum_i theta_i phi_i(x_k)`` the Gram matrix ``G = E_{P^u} sum_k phi(x_k) phi(x_k)^T`` is the Fisher
information of the path law in theta, and the Hessian of every regression ``E sum_k |c_k - y_k|^2/2``. So
``theta - G^{-1} grad`` is the least-squares solution of a regression, and ``delta^T G delta / 2`` the KL between the
path laws before and after a step delta.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chains.base import Chain


class LinearPart:
    """Parameters in which a control is linear, seen as columns: ``groups`` systems of the same size, each for one
    output or for all.

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
    ) -> Tensor:
        """``G`` ``(groups, p, p)`` in float64, from stored states ``(K, batch, *event)`` of all steps of the chain.

        Args:
            weights: of the paths, ``(batch,)`` with mean 1; None: all 1.
        """
        raise NotImplementedError

    def gather(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like the parameters as ``(groups, p, columns)``."""
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
    ) -> Tensor:
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
) -> Tensor:
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
        return shared.unsqueeze(0)
    m, j = own.shape[2:]
    cross = torch.einsum("kbi,kbq->kiq", z, own.flatten(2)).double() * (weight / batch)
    cross = cross.unflatten(2, (m, j))
    upper = torch.einsum("kf,kg,kimj->mfigj", phi, phi, cross[:, :a]).reshape(m, time * a, time * j)
    lower = torch.einsum("kg,kimj->migj", phi, cross[:, a:]).reshape(m, -1, time * j)
    border = torch.cat((upper, lower), 1)
    inner = torch.einsum("kbmi,kbmj->kmij", own, own).double() * (weight.unsqueeze(3) / batch)
    block = torch.einsum("kf,kg,kmij->mfigj", phi, phi, inner).reshape(m, time * j, time * j)
    return torch.cat((torch.cat((shared.expand(m, -1, -1), border), 2), torch.cat((border.mT, block), 2)), 1)
