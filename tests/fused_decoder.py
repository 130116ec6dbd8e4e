# SPDX-License-Identifier: Apache-2.0
"""A decoder built as vLLM builds it, rank by rank, in a page of torch: flat tokens, fused layers, norms with residuals.

Its layers have the names and attributes that the vLLM host looks for, so that the host is tested where vLLM cannot run.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Ranks"]


class Method:
    """vLLM's `quant_method` of a layer without quantization."""

    def apply(self, layer, x, bias=None):
        return functional.linear(x, layer.weight, bias)

    def embedding(self, layer, ids):
        return functional.embedding(ids, layer.weight)


class Layer(nn.Module):
    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.contiguous(), requires_grad=False)
        self.quant_method = Method()

    def forward(self, x, bias=True):
        return self.quant_method.apply(self, x, self.bias if bias else None)


class RMSNorm(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.weight, self.variance_epsilon = base.weight, base.variance_epsilon

    def forward(self, x, residual=None):
        raise AssertionError("the host replaces norms")


class Rotary(nn.Module):
    is_neox_style = True

    def __init__(self, head_size):
        super().__init__()
        self.head_size = head_size

    def forward(self, positions, query, key):
        raise AssertionError("the host replaces the rotary embedding")


def _part(cut, tensor):
    if tensor is None or cut is None:
        return tensor
    return tensor[cut.start : cut.stop] if cut.axis == "out" else tensor[:, cut.start : cut.stop]


class RankModel(nn.Module):
    """One rank's part of a Hugging Face model; `cut` says which part of a parameter it holds."""

    def __init__(self, model, cut):
        super().__init__()
        config = model.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary = Rotary(head)

        def fused(prefix, owner, names):
            found = {f"{prefix}.{name}": getattr(owner, name) for name in names}
            weights = [_part(cut(f"{name}.weight"), layer.weight) for name, layer in found.items()]
            biases = [_part(cut(f"{name}.bias"), layer.bias) for name, layer in found.items() if layer.bias is not None]
            return Layer(torch.cat(weights), torch.cat(biases) if biases else None)

        self.model = nn.Module()
        embedding = model.model.embed_tokens.weight
        self.model.embed_tokens = Layer(_part(cut("model.embed_tokens.weight"), embedding))
        tied = model.lm_head.weight is embedding
        self.lm_head = self.model.embed_tokens if tied else Layer(_part(cut("lm_head.weight"), model.lm_head.weight))
        self.model.layers = nn.ModuleList()
        for number, block in enumerate(model.model.layers):
            name, made = f"model.layers.{number}", nn.Module()
            made.input_layernorm = RMSNorm(block.input_layernorm)
            made.post_attention_layernorm = RMSNorm(block.post_attention_layernorm)
            made.self_attn, made.mlp = nn.Module(), nn.Module()
            attention = f"{name}.self_attn"
            made.self_attn.qkv_proj = fused(attention, block.self_attn, ["q_proj", "k_proj", "v_proj"])
            made.self_attn.o_proj = fused(attention, block.self_attn, ["o_proj"])
            made.self_attn.rotary_emb = rotary
            for norm in ("q_norm", "k_norm"):
                if hasattr(block.self_attn, norm):
                    setattr(made.self_attn, norm, RMSNorm(getattr(block.self_attn, norm)))
            made.mlp.gate_up_proj = fused(f"{name}.mlp", block.mlp, ["gate_proj", "up_proj"])
            made.mlp.down_proj = fused(f"{name}.mlp", block.mlp, ["down_proj"])
            self.model.layers.append(made)
        self.model.norm = RMSNorm(model.model.norm)


class Ranks:
    """All ranks of a tensor-parallel group, one after another in one process; sums and joins stand for collectives."""

    def __init__(self, models, tables, use):
        """`use(rank)` makes a rank's step the process's."""
        self.models, self.tables, self.use = models, tables, use

    def _each(self, work):
        results = []
        for rank, model in enumerate(self.models):
            self.use(rank)
            results.append(work(rank, model))
        return results

    def embed(self, ids):
        def part(rank, model):
            cut = self.tables[rank].cut("model.embed_tokens.weight")
            start, stop = (0, len(model.model.embed_tokens.weight)) if cut is None else (cut.start, cut.stop)
            known = (ids >= start) & (ids < stop)
            layer = model.model.embed_tokens
            return layer.quant_method.embedding(layer, torch.where(known, ids - start, 0)) * known[:, None]

        return sum(self._each(part))

    @torch.no_grad()
    def forward(self, ids, lengths):
        """Hidden states [tokens, hidden_size] of prompts one behind another."""
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden, residual = self.embed(ids), None
        for number in range(len(self.models[0].model.layers)):
            hidden, residual = self._block(number, hidden, residual, positions, lengths)
        return self._each(lambda rank, model: model.model.norm(hidden, residual))[0][0]

    @torch.no_grad()
    def logits(self, hidden):
        """[rows, vocabulary]."""
        return torch.cat(self._each(lambda rank, model: model.lm_head(hidden)), dim=1)

    def _block(self, number, hidden, residual, positions, lengths):
        def attention(rank, model):
            block = model.model.layers[number]
            entered = block.input_layernorm(hidden, residual) if residual is not None else block.input_layernorm(hidden)
            normed, after = entered if residual is not None else (entered, hidden)
            return self._attend(block.self_attn, normed, positions, lengths, rank), after

        results = self._each(attention)
        summed, after = sum(result for result, _ in results), results[0][1]

        def mlp(rank, model):
            block = model.model.layers[number]
            normed, behind = block.post_attention_layernorm(summed, after)
            gate, up = block.mlp.gate_up_proj(normed).chunk(2, dim=1)
            return block.mlp.down_proj(functional.silu(gate) * up, rank == 0), behind

        results = self._each(mlp)
        return sum(result for result, _ in results), results[0][1]

    def _attend(self, layer, x, positions, lengths, rank):
        layout, size = self.tables[rank].layout, layer.rotary_emb.head_size
        heads, shared = layout.heads // layout.size, max(1, layout.key_value_heads // layout.size)
        q, k, v = layer.qkv_proj(x).split([heads * size, shared * size, shared * size], dim=1)
        if hasattr(layer, "q_norm"):
            q = layer.q_norm(q.view(len(x), heads, size)).view(q.shape)
            k = layer.k_norm(k.view(len(x), shared, size)).view(k.shape)
        q, k = layer.rotary_emb(positions, q, k)
        rows = []
        for tokens in torch.arange(len(x)).split(list(lengths)):
            parts = [part[tokens].view(1, len(tokens), -1, size).transpose(1, 2) for part in (q, k, v)]
            found = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            rows.append(found.transpose(1, 2).reshape(len(tokens), -1))
        return layer.o_proj(torch.cat(rows), rank == 0)
