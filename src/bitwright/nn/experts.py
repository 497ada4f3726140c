"""QuantExperts: the experts of one layer, each with linears of its own, packed or not."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.models.experts import UnfusedExperts


class QuantExperts(UnfusedExperts):
    """Same forward as the fused experts module of transformers; only experts that tokens were sent to are run.

    Children are those of `UnfusedExperts` ("0", "1", ..., each with its linears by name); any of them may be a
    QuantLinear or an nn.Linear, each with a scheme of its own.
    """

    @classmethod
    def adopt(cls, unfused: UnfusedExperts) -> QuantExperts:
        """Take over the children of `unfused`; nothing is copied."""
        module = cls.__new__(cls)
        module.__dict__.update(unfused.__dict__)
        return module

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [M, H], top_k_index [M, k] (num_experts or more: no expert), top_k_weights [M, k] -> [M, H]."""
        output = torch.zeros_like(hidden_states)
        for e in torch.unique(top_k_index).tolist():  # sorted, so sums run in the order of the fused module
            if e >= self.num_experts:
                continue
            position, token = (e == top_k_index.T).nonzero(as_tuple=True)
            y = self.linear(e, self._down)(self._down_input(e, hidden_states[token]))
            y = y * top_k_weights[token, position, None]
            output.index_add_(0, token, y.to(output.dtype))
        return output
